"""Task-specific input transformations for fine-tuning, and decoding of predictions to tags and answer spans.

Radford et al. 2018, section 3.3 and figure 1: the input of every task becomes sequences that begin with a start token,
have a delimiter between their parts, and end with an extract token, whose hidden state is the input of the task head.
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

# Kinds of tasks whose labels are names.
NAMED = ("classification", "entailment", "similarity", "tagging")


class Special(NamedTuple):
    """Ids of special tokens appended to the tokenizer's vocabulary, which no text encodes to."""

    start: int
    delimiter: int
    extract: int
    blank: int  # replaces dropped tokens, and words that the tokenizer encodes to nothing


NUM_SPECIAL_TOKENS = len(Special._fields)


def special_tokens(tokenizer: Tokenizer) -> Special:
    return Special(*range(tokenizer.vocab_size, tokenizer.vocab_size + NUM_SPECIAL_TOKENS))


@dataclasses.dataclass(frozen=True, eq=False)
class EncodedRow:
    """A tokenised example: a labelled row, or the part of a row that fits into the context.

    Attributes:
      row: index of the row.
      sequences: O sequences, each int32 (T,), whose last token is `extract`.
      targets: arrays by name; empty if the row has no label.
        labels: int32 (), index of the label or choice; float32 () in regression; int32 (T,) in tagging, index of the
          tag at the position that predicts a word's tag, -1 elsewhere.
        starts, stops: int32 (), positions of the first and last token of the answer; 0, the start token, if this part
          of the row does not contain the answer.
      words: in tagging, int32 (T,), index of the word of the row whose tag a position predicts; -1: none. Each word of
        a row has one position in one of its examples.
      offsets: in question answering, int32 (T, 2), begin and end of a token in characters of the context; -1 for tokens
        outside the context.
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
    """Returns the labels of a task, in the order of the head's outputs; empty for kinds without named labels.

    Args:
      rows: training rows.
      kind: of the task.
      given: task.labels; empty: the labels of the rows, sorted.

    Raises:
      UserError: all rows have the same label, a row has a label that is not given, or the kind has no named labels.
    """
    if kind not in NAMED:
        if given:
            raise UserError(
                f"task.labels={given} does not apply to task.kind={kind}, which has no named labels: unset it"
            )
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
    """Raises UserError if a row has a label that is not in `labels`."""
    known = set(labels)
    for row in rows:
        for label in _names(row):
            if label not in known:
                shown = ", ".join(itertools.islice(labels, 20)) + (", ..." if len(labels) > 20 else "")
                raise UserError(f"{row.place}: unknown label {label!r}: known labels are {shown}")


def balanced_weights(rows: Sequence[Row], labels: Sequence[str]) -> tuple[float, ...]:
    """Returns class weights inversely proportional to label frequencies, n / (k * count), as in scikit-learn.

    n is the number of examples (words in tagging), k the number of labels that occur; others have weight 1.
    """
    counts = Counter(label for row in rows for label in _names(row))
    return tuple(counts.total() / (len(counts) * counts[label]) if counts[label] else 1.0 for label in labels)


def _names(row: Row) -> list[str]:
    """Returns the label names of a row."""
    return row.fields["tags"] if "tags" in row.fields else [row.fields["label"]] if "label" in row.fields else []


# --- rows to sequences ------------------------------------------------------------------------------------------------


def encode(
    rows: Sequence[Row], task: TaskConfig, labels: Sequence[str], tokenizer: Tokenizer, context_length: int
) -> list[EncodedRow]:
    """Tokenises the examples of all rows, in order.

    A text that does not fit into the context is truncated at its end; of two texts, the longer one. Rows of tagging and
    question answering are instead split into several examples, each of which overlaps half of the previous one. Rows
    without a label, as for prediction, become examples without targets.

    Args:
      rows: of the kind `task.kind`.
      task: the task.
      labels: from `find_labels`.
      tokenizer: that of the model.
      context_length: maximum number of tokens of a sequence.

    Raises:
      UserError: an unknown label, rows with different numbers of choices, or a context that is too short.
    """
    if context_length < 8:
        raise UserError(f"model.context_length={context_length} is too short for a text: use 8 or more")
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
    """State of `encode`: the task's options and a cache of encoded words."""

    def __init__(self, task: TaskConfig, label_ids: dict[str, int], tokenizer: Tokenizer, context_length: int) -> None:
        self._task, self._label_ids, self._tokenizer = task, label_ids, tokenizer
        self._context_length = context_length
        self._special = special_tokens(tokenizer)
        self._pieces_of: dict[str, Ids] = {}  # tokens of words, cached as most words repeat

    def whole(self, index: int, row: Row) -> Iterator[EncodedRow]:
        """Yields the example of a row with a label for the whole row."""
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
        """Returns [start first extract] or [start first delimiter second extract], int32 (T,)."""
        start, delimiter, extract, _ = self._special
        if second is None:
            return _join([start], first[: self._context_length - 2], [extract])
        room = self._context_length - 3
        half = (room + 1) // 2
        first = first[: max(half, room - len(second))]
        return _join([start], first, [delimiter], second[: room - len(first)], [extract])

    def tagging(self, index: int, row: Row) -> Iterator[EncodedRow]:
        """Yields the examples of a row whose words have tags."""
        tokens, tags = row.fields["tokens"], row.fields.get("tags")
        # With a preceding blank, a word has the same tokens as in running text.
        words = [self._word(word if i == 0 else " " + word) for i, word in enumerate(tokens)]
        lengths = np.array([len(word) for word in words])
        stops = np.cumsum(lengths)
        word_of = np.full(stops[-1], -1, np.int32)  # word whose tag a token predicts
        word_of[stops - lengths if self._task.label_piece == "first" else stops - 1] = np.arange(len(words))
        pieces, done = np.concatenate(words), 0
        for begin, end in _windows(len(pieces), self._context_length - 2):
            # A tag is predicted in the first window that has its token, where the left context is longest.
            of_window = np.where(np.arange(begin, end) >= done, word_of[begin:end], -1)
            done = end
            if of_window.max() < 0:  # the window lies within a single word
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
        """Yields the examples of a row with question, context and answers."""
        start, delimiter, extract, _ = self._special
        room = self._context_length - 3
        question = self._tokenizer.encode(row.fields["question"])[: room // 2]
        pieces, offsets_N2 = _pieces_and_offsets(self._tokenizer, row.fields["context"])
        if not len(pieces):
            raise UserError(f"{row.place}: the tokenizer encodes its context to no tokens")
        answers = row.fields.get("answers")
        first = last = -1
        if answers is not None:
            from_character = answers["answer_start"][0]
            to_character = from_character + len(answers["text"][0])
            covered = np.flatnonzero((offsets_N2[:, 1] > from_character) & (offsets_N2[:, 0] < to_character))
            if len(covered):  # otherwise the tokenizer encodes the answer to no tokens
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
    """Yields (begin, end) of windows of up to `room` tokens that cover [0, length) and overlap by half."""
    step = max(1, room // 2)
    for begin in range(0, max(1, length - room + step), step):
        begin = max(0, min(begin, length - room))
        yield begin, min(begin + room, length)


def _pieces_and_offsets(tokenizer: Tokenizer, text: str) -> tuple[Ids, Ids]:
    """Encodes a text: ids, int32 (N,), and begin and end of each token in characters, int32 (N, 2)."""
    if isinstance(tokenizer, HuggingFaceTokenizer):
        encoding = tokenizer._tokenizer.encode(text, add_special_tokens=False)
        return np.array(encoding.ids, np.int32), np.array(encoding.offsets, np.int32).reshape(-1, 2)
    ids = tokenizer.encode(text)
    if isinstance(tokenizer, TiktokenTokenizer):
        lengths = np.array([len(piece) for piece in tokenizer.encoding.decode_tokens_bytes(ids.tolist())], np.int64)
    else:
        assert isinstance(tokenizer, BytesTokenizer), type(tokenizer)
        lengths = np.ones(len(ids), np.int64)
    # Index of the character that each byte belongs to: continuation bytes do not start a character.
    character = np.cumsum((np.frombuffer(text.encode(), np.uint8) & 0xC0) != 0x80) - 1
    stops = np.cumsum(lengths)
    return ids, np.stack([character[stops - lengths], character[stops - 1] + 1], axis=1).astype(np.int32)


# --- decoding of predictions ------------------------------------------------------------------------------------------


def decode_tags(
    examples: Sequence[EncodedRow], predictions: Sequence[npt.NDArray[np.integer]], labels: Sequence[str]
) -> list[list[str]]:
    """Returns the tag of each word of each row.

    Args:
      examples: all examples of the rows, in any order.
      predictions: for each example int (T,) or longer, index in `labels` of the predicted tag at each position.
      labels: names of the tags.
    """
    tags_of: dict[int, dict[int, str]] = {}
    for example, predicted_T in zip(examples, predictions, strict=True):
        assert example.words is not None
        positions = np.flatnonzero(example.words >= 0)
        words, tags = example.words[positions].tolist(), predicted_T[positions].tolist()
        tags_of.setdefault(example.row, {}).update(zip(words, (labels[tag] for tag in tags), strict=True))
    return [[tags_of[row][word] for word in range(len(tags_of[row]))] for row in sorted(tags_of)]


class Span(NamedTuple):
    """An answer: text of the context from character `start` on, and the sum of its start and stop scores."""

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
    """Returns the best-scoring answer of each row over all of its examples.

    Args:
      examples: all examples of the rows, in any order.
      start_scores, stop_scores: for each example (T,) or longer, score of each position as the first and the last token
        of the answer, such as logits or log-probabilities.
      rows: the encoded rows.
      max_answer_pieces: maximum number of tokens of an answer.
    """
    best: dict[int, Span] = {}
    for example, starts_T, stops_T in zip(examples, start_scores, stop_scores, strict=True):
        assert example.offsets is not None
        positions = np.flatnonzero(example.offsets[:, 1] >= 0)
        starts_N, stops_N = starts_T[positions].astype(np.float64), stops_T[positions].astype(np.float64)
        longest = min(max_answer_pieces, len(positions))
        padded = np.pad(stops_N, (0, longest - 1), constant_values=-np.inf)
        # X: length of the answer minus 1.
        scores_NX = starts_N[:, None] + np.lib.stride_tricks.sliding_window_view(padded, longest)
        place, more = np.unravel_index(np.argmax(scores_NX), scores_NX.shape)
        score = float(scores_NX[place, more])
        if example.row not in best or score > best[example.row].score:
            offsets_N2, context = example.offsets[positions], rows[example.row].fields["context"]
            begin, end = int(offsets_N2[place, 0]), int(offsets_N2[place + more, 1])
            answer = context[begin:end].strip()  # a token may begin with a blank
            best[example.row] = Span(answer, begin + context[begin:end].find(answer), score)
    return [best[row] for row in sorted(best)]
