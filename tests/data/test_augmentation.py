"""Augmented dialogues: turns are dropped or permuted, the last one is kept, and nothing else changes."""

import pytest

from gptjax.config import RegularisationConfig
from gptjax.data.augmentation import with_copies
from gptjax.data.labelled import Row

DIALOGUES = [
    Row({"text": "\n".join(f"turn {i} of {n}" for i in range(4)), "label": f"line\n{n % 2}"}, f"file:{n}")
    for n in range(60)
]
SINGLE = Row({"text": "one turn", "label": "a"}, "file:61")


def turns(row: Row) -> list[str]:
    return row.fields["text"].split("\n")


@pytest.fixture(params=[{"drop_turns": 1.0}, {"shuffle_turns": 1.0}, {"drop_turns": 0.5, "shuffle_turns": 0.5}])
def config(request) -> RegularisationConfig:
    return RegularisationConfig(augmented_copies=2, **request.param)


def copies(config: RegularisationConfig, seed: int = 0) -> list[tuple[Row, Row]]:
    """Each copy, with the row that it is a copy of."""
    found = with_copies([*DIALOGUES, SINGLE], config, seed)
    assert found[:61] == [*DIALOGUES, SINGLE]
    by_place = {row.place: row for row in DIALOGUES}
    return [(copy, by_place[copy.place]) for copy in found[61:]]


def test_the_last_turn_and_the_label_stay(config):
    found = copies(config)
    assert len(found) > 60
    for copy, row in found:
        assert turns(copy)[-1] == turns(row)[-1]
        assert copy.fields["label"] == row.fields["label"]
        assert copy != row


def test_oldest_turns_are_dropped_up_to_any():
    found = copies(RegularisationConfig(augmented_copies=2, drop_turns=1.0))
    assert len(found) == 120
    for copy, row in found:
        assert turns(copy) == turns(row)[-len(turns(copy)) :]
    assert {len(turns(copy)) for copy, _ in found} == {1, 2, 3}


def test_turns_are_shuffled_and_none_is_lost():
    found = copies(RegularisationConfig(augmented_copies=2, shuffle_turns=1.0))
    assert all(sorted(turns(copy)) == sorted(turns(row)) for copy, row in found)
    assert len({tuple(turn.split()[1] for turn in turns(copy)) for copy, _ in found}) == 5  # 3! orders but the first


def test_a_probability_is_the_share_of_copies_that_change():
    found = copies(RegularisationConfig(augmented_copies=5, drop_turns=0.3))
    assert len(found) / 300 == pytest.approx(0.3, abs=0.08)


def test_copies_are_drawn_by_the_seed(config):
    assert copies(config) == copies(config)
    assert copies(config) != copies(config, seed=1)
    first, second = ([c for c, r in copies(config) if r is DIALOGUES[n]] for n in (3, 4))
    assert len(first) < 2 or first[0] != first[1] or len(second) < 2 or second[0] != second[1]


def test_without_copies_nothing_is_added():
    assert with_copies(DIALOGUES, RegularisationConfig(), 0) == DIALOGUES
