"""Rows of conversations: the same content packed or padded, and each conversation once per epoch."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from gptjax.data.chat_batches import PackedConversations, PackedRankings, RankedSequences, lay_out, rows_needed
from gptjax.data.templates import EncodedConversation

T = 12


def sequences(*lengths: int, first: int = 1) -> list[EncodedConversation]:
    """A sequence of tokens that are all different; the second half is learned."""
    made = []
    for length in lengths:
        made.append(
            EncodedConversation(np.arange(first, first + length, dtype=np.int32), np.arange(length) >= length // 2)
        )
        first += length
    return made


def read_back(arrays: dict[str, np.ndarray]) -> list[tuple]:
    """Each sequence of a layout: its tokens, targets, weights and positions."""
    found = []
    for number in range(1, arrays["segments"].max() + 1):
        here = arrays["segments"] == number
        assert len(set(np.nonzero(here)[0])) == 1, "a sequence is in one row"
        found.append(tuple(arrays[name][here].tolist() for name in ("tokens", "targets", "weights", "positions")))
    return found


def test_a_layout_by_hand():
    arrays = lay_out(sequences(3, 2, 4), 2, 6, pack=True)
    assert arrays["tokens"].tolist() == [[1, 2, 3, 4, 5, 0], [6, 7, 8, 9, 0, 0]]
    assert arrays["targets"].tolist() == [[2, 3, 0, 5, 0, 0], [7, 8, 9, 0, 0, 0]]
    assert arrays["weights"].tolist() == [[1, 1, 0, 1, 0, 0], [0, 1, 1, 0, 0, 0]]
    assert arrays["segments"].tolist() == [[1, 1, 1, 2, 2, 0], [3, 3, 3, 3, 0, 0]]
    assert arrays["positions"].tolist() == [[0, 1, 2, 0, 1, 0], [0, 1, 2, 3, 0, 0]]
    assert arrays["ends"].tolist() == [2, 4, 9]


@given(lengths=st.lists(st.integers(1, T), min_size=1, max_size=20))
def test_packed_and_padded_hold_the_same(lengths):
    made = sequences(*lengths)
    layouts = [lay_out(made, rows_needed(made, T, pack=pack), T, pack=pack) for pack in (True, False)]
    assert len(layouts[0]["tokens"]) <= len(layouts[1]["tokens"]) == len(made)
    assert read_back(layouts[0]) == read_back(layouts[1])
    for arrays in layouts:
        assert arrays["tokens"].reshape(-1)[arrays["ends"]].tolist() == [int(s.tokens[-1]) for s in made]
        padding = arrays["segments"] == 0
        assert padding.sum() == padding.size - sum(lengths)
        assert not any(array[padding].any() for name, array in arrays.items() if name != "ends")


@given(lengths=st.lists(st.integers(1, T), min_size=1, max_size=40))
def test_each_lies_in_the_first_row_with_room(lengths):
    used: list[int] = []
    for number, length in enumerate(lengths):
        row = next((row for row, filled in enumerate(used) if filled + length <= T), len(used))
        used += [0] * (row == len(used))
        used[row] += length
        made = sequences(*lengths[: number + 1])
        end = lay_out(made, len(used), T, pack=True)["ends"][-1]
        assert end == row * T + used[row] - 1
    assert rows_needed(sequences(*lengths), T, pack=True) == len(used)


def test_what_has_no_room_is_an_error():
    with pytest.raises(ValueError, match="sequence 1 of 7 tokens has no room"):
        lay_out(sequences(6, 7), 1, T, pack=True)
    for pack in (True, False):
        with pytest.raises(ValueError, match="sequence 0 of 13 tokens has no room in a row of 12"):
            lay_out(sequences(13), 1, T, pack=pack)
        with pytest.raises(ValueError, match="sequence 0 of 13 tokens has no room in a row of 12"):
            PackedConversations(sequences(13), T, pack=pack, seed=0)


@pytest.mark.parametrize("pack", [True, False])
@pytest.mark.parametrize("seed", [0, None])
def test_an_epoch_has_every_conversation_once(pack, seed):
    made = sequences(*np.random.default_rng(0).integers(1, T + 1, 40).tolist())
    rows = PackedConversations(made, T, pack=pack, seed=seed)
    assert rows.rows_per_epoch < 30 if pack else rows.rows_per_epoch == 40

    def epoch(number: int) -> list[list[int]]:
        first = number * rows.rows_per_epoch
        return [s[0] for i in range(rows.rows_per_epoch) for s in read_back(to_rows(rows[first + i]))]

    wanted = sorted(s.tokens.tolist() for s in made)
    assert sorted(epoch(0)) == wanted
    if seed is None:
        assert len(rows) == rows.rows_per_epoch
        with pytest.raises(IndexError):
            rows[len(rows)]
    else:
        assert sorted(epoch(1)) == wanted
        assert epoch(0) != epoch(1)
        assert epoch(0) == epoch(0)


def to_rows(row: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    return {name: array[None] for name, array in row.items()}


def test_a_share_of_the_rows_is_text():
    text = [
        {
            "tokens": np.full(T, 1000 + i, np.int32),
            "targets": np.full(T, 1001 + i, np.int32),
            "weights": np.ones(T, np.float32),
        }
        for i in range(20)
    ]
    made = sequences(*[T] * 18)
    alone = PackedConversations(made, T, pack=True, seed=3, share=0.1)
    assert alone.rows_per_epoch == 18
    rows = PackedConversations(made, T, pack=True, seed=3, pretraining=text, share=0.1)
    assert rows.rows_per_epoch == 20
    for epoch in range(2):
        read = [rows[epoch * 20 + i] for i in range(20)]
        texts = [row["tokens"][0] for row in read if row["tokens"][0] >= 1000]
        assert texts == [1000 + 2 * epoch, 1001 + 2 * epoch], "each epoch continues in the text"
        assert [i for i, row in enumerate(read) if row["tokens"][0] >= 1000] == [9, 19], "evenly spread"
        assert (read[9]["segments"] == 1).all()
        assert read[9]["positions"].tolist() == list(range(T))
        assert {frozenset(row) for row in read} == {frozenset(read[0])}
        others = sorted(row["tokens"].tolist() for row in read if row["tokens"][0] < 1000)
        assert others == [s.tokens.tolist() for s in made]


def test_a_small_share_is_one_row_of_text():
    text = [{"tokens": np.full(T, 1000, np.int32), "targets": np.zeros(T, np.int32), "weights": np.ones(T, np.float32)}]
    rows = PackedConversations(sequences(*[T] * 18), T, pack=True, seed=3, pretraining=text, share=0.01)
    assert [rows[i]["tokens"][0] >= 1000 for i in range(rows.rows_per_epoch)].count(True) == 1
    assert rows.rows_per_epoch == 19


def ranked(*lengths: tuple[int, ...], first: int = 1) -> list[RankedSequences]:
    """Prompts whose answers have these lengths, all of them different tokens."""
    made = []
    for of_prompt in lengths:
        made.append(RankedSequences(sequences(*of_prompt, first=first), range(1, len(of_prompt) + 1)))
        first += sum(of_prompt)
    return made


def answers_of(arrays: dict[str, np.ndarray]) -> list[list[tuple[int, int]]]:
    """The last tokens and the ranks of the completions of each prompt of an element."""
    tokens = arrays["tokens"].reshape(-1)
    pairs = [
        [(int(tokens[end]), int(level)) for end, level in zip(*prompt, strict=True) if level > 0]
        for prompt in zip(arrays["ends"], arrays["ranks"], strict=True)
    ]
    return [prompt for prompt in pairs if prompt]


def test_rankings_by_hand():
    """The second prompt fills an element, the third and the last share the other with the first."""
    prompts = ranked((16, 8), (30, 20, 12), (9, 9), (14,))
    ranked_answers = PackedRankings(prompts, 1024, pack=True, seed=None)
    read = [ranked_answers[i] for i in range(len(ranked_answers))]
    assert [array["tokens"].shape for array in read] == [(2, 32)] * 2
    assert read[0]["ends"].tolist() == [[15, 23, 0], [40, 49, 0], [63, 0, 0]]
    assert read[0]["ranks"].tolist() == [[1, 2, 0], [1, 2, 0], [1, 0, 0]]
    assert read[1]["ends"].tolist() == [[29, 51, 63], [0, 0, 0], [0, 0, 0]]
    assert read[1]["ranks"].tolist() == [[1, 2, 3], [0, 0, 0], [0, 0, 0]]
    assert answers_of(read[1]) == [[(54, 1), (74, 2), (86, 3)]]


@pytest.mark.parametrize("pack", [True, False])
@given(lengths=st.lists(st.lists(st.integers(1, 48), min_size=2, max_size=5), min_size=1, max_size=30))
def test_every_prompt_is_whole_in_one_element_of_one_shape(lengths, pack):
    prompts = ranked(*map(tuple, lengths))
    elements = PackedRankings(prompts, 48, pack=pack, seed=None)
    read = [elements[i] for i in range(len(elements))]
    assert len({tuple(array.shape for array in arrays.values()) for arrays in read}) == 1
    found = [sequence for arrays in read for sequence in read_back(arrays)]
    assert sorted(f[0] for f in found) == sorted(s.tokens.tolist() for prompt in prompts for s in prompt.sequences)
    wanted = [[(int(s.tokens[-1]), level) for s, level in zip(*prompt, strict=True)] for prompt in prompts]
    assert sorted(prompt for arrays in read for prompt in answers_of(arrays)) == sorted(wanted)
    rows, length = read[0]["tokens"].shape
    longest = max(max(of_prompt) for of_prompt in lengths)
    assert length == (32 if longest <= 32 else 48)
    if pack:
        assert rows == max(rows_needed(prompt.sequences, length, pack=True) for prompt in prompts)
    else:
        assert (len(read), rows) == (len(prompts), max(map(len, lengths)))


def test_little_of_packed_rankings_is_padding():
    drawn = np.random.default_rng(0).gamma(2, 20, (400, 4)).astype(int).clip(4, 128)
    elements = PackedRankings(ranked(*map(tuple, drawn.tolist())), 128, pack=True, seed=0)
    rows, length = elements[0]["tokens"].shape
    assert (length, rows) == (128, 4)
    assert drawn.sum() > 0.8 * elements.rows_per_epoch * rows * length
