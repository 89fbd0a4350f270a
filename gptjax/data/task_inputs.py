"""Labelled rows to the token sequences that a fine-tuned GPT reads, and what it says of them back to tags and answers.

Radford et al. 2018, section 3.3 and figure 1: whatever the task, its input becomes sequences that begin with a start
token, have a delimiter between their parts, and end with an extract token, at which a head reads what the task is.
"""

import dataclasses
import itertools
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from gptjax.config import TaskConfig, UserError
from gptjax.data.labelled import Row
from gptjax.data.tokenizers import BytesTokenizer, HuggingFaceTokenizer, TiktokenTokenizer, Tokenizer

Ids = npt.NDArray[np.int32]

# Kinds of task whose labels are names
NAMED = ("classification", "entailment", "similarity", "tagging")


class Special(NamedTuple):
    """Ids behind the tokenizer's vocabulary, so that no text has them."""

    start: int
    delimiter: int
    extract: int
    blank: int  # in the place of what is not to be read, or what the tokenizer knows nothing of


NUM_SPECIAL_TOKENS = len(Special._fields)


def special_tokens(tokenizer: Tokenizer) -> Special:
    return Special(*range(tokenizer.vocab_size, tokenizer.vocab_size + NUM_SPECIAL_TOKENS))


@dataclasses.dataclass(frozen=True, eq=False)
class EncodedRow:
    """An example: a row, or the part of a row that fits into the context.

    Attributes:
      row: its place among the rows.
      sequences: each int32 (T_c,), the last token being `extract`.
      targets: by the name that the loss reads them by; none if the row has no label.
        labels: int32 (), the place of its label or choice; float32 () in regression; int32 (T,) in tagging, the place
          of the tag at the piece that stands for a word, and -1 elsewhere.
        starts, stops: int32 (), the positions of the first and the last piece of the answer; 0, which is the start
          token, where this part of the row does not have it.
      words: of tagging, int32 (T,): which word of the row a position tells the tag of; -1: none. Each word of a row is
        told at one position of one of its examples.
      offsets: of question answering, int32 (T, 2): the characters of the context, from and to, that a position has;
        -1 where it is not of the context.
    """

    row: int
    sequences: tuple[Ids, ...]
    targets: dict[str, npt.NDArray[np.generic]]
    words: Ids | None = None
    offsets: Ids | None = None

    @property
    def num_tokens(self) -> int:
        return sum(map(len, self.sequences))


# --- labels -----------------------------------------------------------------------------------------------------------


def find_labels(rows: Sequence[Row], kind: str, given: tuple[str, ...]) -> tuple[str, ...]:
    """The labels of a task, in the order of the head's outputs.

    Args:
      rows: training rows.
      kind: of task; where labels are no names, there are none.
      given: task.labels; empty: those of the rows, sorted.

    Raises:
      UserError: all rows have one label, a label is not among the given ones, or there should be none.
    """
    if kind not in NAMED:
        if given:
            raise UserError(f"task.labels={given} is not for task.kind={kind}, whose labels have no names: unset it")
        return ()
    found = sorted({label for row in rows for label in _names(row)})
    if len(set(given)) < len(given):
        raise UserError(f"task.labels={given} has a label twice")
    if given:
        check_labels(rows, given)
    if len(found) < 2:
        first, last = rows[0].place, rows[-1].place
        raise UserError(f"{first} to {last}: all rows have the label {found[0]!r}; a task needs two labels or more")
    return given or tuple(found)


def check_labels(rows: Sequence[Row], labels: Sequence[str]) -> None:
    """Raises UserError when a row has a label that is not among `labels`."""
    known = set(labels)
    for row in rows:
        for label in _names(row):
            if label not in known:
                shown = ", ".join(itertools.islice(labels, 20)) + (", ..." if len(labels) > 20 else "")
                raise UserError(f"{row.place}: unknown label {label!r}: known are {shown}")


def balanced_weights(rows: Sequence[Row], labels: Sequence[str]) -> tuple[float, ...]:
    """How much an example of each label counts so that all labels count the same: n / (k * count), as scikit-learn's.

    n counts the examples (in tagging the words), k the labels that occur; one that does not weighs 1.
    """
    counts = Counter(label for row in rows for label in _names(row))
    return tuple(counts.total() / (len(counts) * counts[label]) if counts[label] else 1.0 for label in labels)


def _names(row: Row) -> list[str]:
    """The names of labels that a row has."""
    return row.fields["tags"] if "tags" in row.fields else [row.fields["label"]] if "label" in row.fields else []


# --- rows to sequences ------------------------------------------------------------------------------------------------


def encode(
    rows: Sequence[Row], task: TaskConfig, labels: Sequence[str], tokenizer: Tokenizer, context_length: int
) -> list[EncodedRow]:
    """The examples of all rows, in their order.

    A text that does not fit into the context loses its end; of two texts the longer one does. The rows of tagging and
    question answering, of which nothing may be lost, become several examples, each of which repeats half of the one
    before. A row without a label, as for prediction, becomes examples without targets.

    Args:
      rows: of one kind, `task.kind`.
      labels: of `find_labels`.
      tokenizer: that of the model.
      context_length: the most tokens of a sequence.

    Raises:
      UserError: an unknown label, rows with different numbers of choices, or a context that is too short.
    """
    if context_length < 8:
        raise UserError(f"model.context_length={context_length} is too short for a text and special tokens: 8 at least")
    if task.kind in NAMED:
        check_labels(rows, labels)
    encoder = _Encoder(task, {label: i for i, label in enumerate(labels)}, tokenizer, context_length)
    examples_of: dict[str, Callable[[int, Row], Iterator[EncodedRow]]] = {
        "tagging": encoder.tagging,
        "question_answering": encoder.question_answering,
    }
    examples = [e for i, row in enumerate(rows) for e in examples_of.get(task.kind, encoder.whole)(i, row)]
    for example in examples:
        if len(example.sequences) != len(examples[0].sequences):
            unit = "choices" if task.kind == "multiple_choice" else "texts"
            raise UserError(
                f"{rows[example.row].place} has {len(example.sequences)} {unit}, but "
                f"{rows[examples[0].row].place} has {len(examples[0].sequences)}: all rows need the same number"
            )
    return examples


class _Encoder:
    """What `encode` knows while it goes over the rows."""

    def __init__(self, task: TaskConfig, label_ids: dict[str, int], tokenizer: Tokenizer, context_length: int) -> None:
        self._task, self._label_ids, self._tokenizer = task, label_ids, tokenizer
        self._context_length = context_length
        self._special = special_tokens(tokenizer)
        self._pieces_of: dict[str, Ids] = {}  # of words, most of which come again and again

    def whole(self, index: int, row: Row) -> Iterator[EncodedRow]:
        """The one example of a row whose label is about all of it."""
        fields, encoded, kind = row.fields, self._tokenizer.encode, self._task.kind
        if kind == "multiple_choice":
            context = encoded(fields["context"])
            sequences = [self._sequence(context, encoded(choice)) for choice in fields["choices"]]
        elif "second" in fields:
            first, second = encoded(fields["first"]), encoded(fields["second"])
            sequences = [self._sequence(first, second), self._sequence(second, first)]
        elif kind == "entailment":
            sequences = [self._sequence(encoded(fields["premise"]), encoded(fields["hypothesis"]))]
        else:
            sequences = [self._sequence(encoded(fields["first" if kind == "regression" else "text"]))]
        targets: dict[str, npt.NDArray[np.generic]] = {}
        if "label" in fields:
            label = self._label_ids[fields["label"]] if kind in NAMED else fields["label"]
            targets["labels"] = np.array(label, np.float32 if kind == "regression" else np.int32)
        yield EncodedRow(index, tuple(sequences), targets)

    def _sequence(self, first: Ids, second: Ids | None = None) -> Ids:
        """[start first extract] or [start first delimiter second extract]; int32 (T,)."""
        start, delimiter, extract, _ = self._special
        if second is None:
            return _join([start], first[: self._context_length - 2], [extract])
        room = self._context_length - 3
        half = (room + 1) // 2
        first = first[: max(half, room - len(second))]
        return _join([start], first, [delimiter], second[: room - len(first)], [extract])

    def tagging(self, index: int, row: Row) -> Iterator[EncodedRow]:
        tokens, tags = row.fields["tokens"], row.fields.get("tags")
        # With the blank before it that the running text has, a word gives the pieces that the text has there.
        words = [self._word(word if i == 0 else " " + word) for i, word in enumerate(tokens)]
        lengths = np.array([len(word) for word in words])
        stops = np.cumsum(lengths)
        told = np.full(stops[-1], -1, np.int32)  # which word a piece tells the tag of
        told[stops - lengths if self._task.label_piece == "first" else stops - 1] = np.arange(len(words))
        pieces, done = np.concatenate(words), 0
        for begin, end in _windows(len(pieces), self._context_length - 2):
            # A word is told in the first window that has its piece: there it has the most text before it.
            of_window = np.where(np.arange(begin, end) >= done, told[begin:end], -1)
            done = end
            if of_window.max() < 0:  # within one endless word
                continue
            words_T = _join([-1], of_window, [-1])
            targets: dict[str, npt.NDArray[np.generic]] = {}
            if tags is not None:
                tags_of_row = np.array([self._label_ids[tag] for tag in tags], np.int32)
                targets["labels"] = np.where(words_T >= 0, tags_of_row[words_T], np.int32(-1))
            sequence = _join([self._special.start], pieces[begin:end], [self._special.extract])
            yield EncodedRow(index, (sequence,), targets, words=words_T)

    def _word(self, word: str) -> Ids:
        if word not in self._pieces_of:
            pieces = self._tokenizer.encode(word)
            self._pieces_of[word] = pieces if len(pieces) else np.array([self._special.blank], np.int32)
        return self._pieces_of[word]

    def question_answering(self, index: int, row: Row) -> Iterator[EncodedRow]:
        start, delimiter, extract, _ = self._special
        room = self._context_length - 3
        question = self._tokenizer.encode(row.fields["question"])[: room // 2]
        pieces, offsets_N2 = _pieces_and_offsets(self._tokenizer, row.fields["context"])
        if not len(pieces):
            raise UserError(f"{row.place}: the tokenizer reads nothing of its context")
        answers = row.fields.get("answers")
        first = last = -1
        if answers is not None:
            from_character = answers["answer_start"][0]
            to_character = from_character + len(answers["text"][0])
            covered = np.flatnonzero((offsets_N2[:, 1] > from_character) & (offsets_N2[:, 0] < to_character))
            if len(covered):  # unless the tokenizer reads nothing of the answer
                first, last = int(covered[0]), int(covered[-1])
        for begin, end in _windows(len(pieces), room - len(question)):
            before = 2 + len(question)
            offsets_T2 = np.full((before + end - begin + 1, 2), -1, np.int32)
            offsets_T2[before:-1] = offsets_N2[begin:end]
            targets: dict[str, npt.NDArray[np.generic]] = {}
            if answers is not None:
                here = begin <= first and last < end
                span = (before + first - begin, before + last - begin) if here else (0, 0)
                targets = {"starts": np.array(span[0], np.int32), "stops": np.array(span[1], np.int32)}
            sequence = _join([start], question, [delimiter], pieces[begin:end], [extract])
            yield EncodedRow(index, (sequence,), targets, offsets=offsets_T2)


def _join(*parts: npt.ArrayLike) -> Ids:
    return np.concatenate([np.asarray(part, np.int32) for part in parts])


def _windows(length: int, room: int) -> Iterator[tuple[int, int]]:
    """From and to of windows of up to `room` that cover [0, length); the first half of each is in the one before."""
    step = max(1, room // 2)
    for begin in range(0, max(1, length - room + step), step):
        begin = max(0, min(begin, length - room))
        yield begin, min(begin + room, length)


def _pieces_and_offsets(tokenizer: Tokenizer, text: str) -> tuple[Ids, Ids]:
    """Ids of a text, int32 (N,), and the characters of it, from and to, that each has a part of, int32 (N, 2)."""
    if isinstance(tokenizer, HuggingFaceTokenizer):
        encoding = tokenizer._tokenizer.encode(text, add_special_tokens=False)
        return np.array(encoding.ids, np.int32), np.array(encoding.offsets, np.int32).reshape(-1, 2)
    ids = tokenizer.encode(text)
    if isinstance(tokenizer, TiktokenTokenizer):
        lengths = np.array([len(piece) for piece in tokenizer.encoding.decode_tokens_bytes(ids.tolist())], np.int64)
    else:
        assert isinstance(tokenizer, BytesTokenizer), type(tokenizer)
        lengths = np.ones(len(ids), np.int64)
    # A byte belongs to the character whose first byte came last.
    character = np.cumsum((np.frombuffer(text.encode(), np.uint8) & 0xC0) != 0x80) - 1
    stops = np.cumsum(lengths)
    return ids, np.stack([character[stops - lengths], character[stops - 1] + 1], axis=1).astype(np.int32)


# --- what the model says, back to tags and answers --------------------------------------------------------------------


def decode_tags(
    examples: Sequence[EncodedRow], predictions: Sequence[npt.NDArray[np.integer]], labels: Sequence[str]
) -> list[list[str]]:
    """A tag for each word of each row.

    Args:
      examples: all of the rows' examples, in any order.
      predictions: of each, int (T,) or longer: the place among `labels` of the tag that each position tells.
    """
    tags_of: dict[int, dict[int, str]] = {}
    for example, predicted_T in zip(examples, predictions, strict=True):
        assert example.words is not None
        positions = np.flatnonzero(example.words >= 0)
        words, tags = example.words[positions].tolist(), predicted_T[positions].tolist()
        tags_of.setdefault(example.row, {}).update(zip(words, (labels[tag] for tag in tags), strict=True))
    return [[tags_of[row][word] for word in range(len(tags_of[row]))] for row in sorted(tags_of)]


class Span(NamedTuple):
    """An answer: the text of the context that begins at character `start`, and the sum of its two scores."""

    text: str
    start: int
    score: float


def decode_spans(
    examples: Sequence[EncodedRow],
    start_scores: Sequence[npt.NDArray[np.floating]],
    stop_scores: Sequence[npt.NDArray[np.floating]],
    rows: Sequence[Row],
    *,
    max_answer_pieces: int = 30,
) -> list[Span]:
    """The best answer to each row's question, over all of its examples.

    Args:
      examples: all of the rows' examples, in any order.
      start_scores, stop_scores: of each, (T,) or longer: how likely the answer's first and last piece is there, such
        as logarithms of probabilities.
      rows: those that were encoded.
      max_answer_pieces: an answer is no longer.
    """
    best: dict[int, Span] = {}
    for example, starts_T, stops_T in zip(examples, start_scores, stop_scores, strict=True):
        assert example.offsets is not None
        positions = np.flatnonzero(example.offsets[:, 1] >= 0)
        starts_N, stops_N = starts_T[positions].astype(np.float64), stops_T[positions].astype(np.float64)
        longest = min(max_answer_pieces, len(positions))
        padded = np.pad(stops_N, (0, longest - 1), constant_values=-np.inf)
        scores_NL = starts_N[:, None] + np.lib.stride_tricks.sliding_window_view(padded, longest)
        place, more = np.unravel_index(np.argmax(scores_NL), scores_NL.shape)
        score = float(scores_NL[place, more])
        if example.row not in best or score > best[example.row].score:
            offsets_N2, context = example.offsets[positions], rows[example.row].fields["context"]
            begin, end = int(offsets_N2[place, 0]), int(offsets_N2[place + more, 1])
            answer = context[begin:end].strip()  # a piece may begin with a blank
            best[example.row] = Span(answer, begin + context[begin:end].find(answer), score)
    return [best[row] for row in sorted(best)]
