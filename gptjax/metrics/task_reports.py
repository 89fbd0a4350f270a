"""What predictions on labelled examples are worth: metrics by name, and the report of them that people expect.

Pure functions of gold and predicted labels; no model. Where a ratio is 0/0, such as the precision of a label that is
never predicted, it counts as 0, as in scikit-learn and seqeval.
"""

import dataclasses
import re
import string
import unicodedata
from collections import Counter
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from gptjax.config import UserError

# By kind of task, the metric that people compare it by. Higher is better for each.
MAIN_METRIC = {
    "classification": "accuracy",
    "entailment": "accuracy",
    "similarity": "accuracy",
    "multiple_choice": "accuracy",
    "regression": "pearson",
    "tagging": "f1",
    "question_answering": "f1",
}
OUTSIDE = "O"  # the tag of a word that belongs to nothing
AVERAGES = ("micro", "macro", "weighted")
_SCHEMES = {"BIO": set("BI"), "IOBES": set("BIES"), "BILOU": set("BILU")}


@dataclasses.dataclass(frozen=True, eq=False)
class Report:
    """What a set of predictions is worth."""

    metrics: dict[str, float]  # in [0, 1], except correlations, in [-1, 1], and mean_squared_error
    text: str  # what a terminal shows, some lines, each with its end
    confusion: npt.NDArray[np.int64] | None = None  # (labels, labels): how often the row's was taken for the column's
    labels: tuple[str, ...] = ()  # of the rows and columns


def report(kind: str, gold: Sequence[Any], predicted: Sequence[Any], labels: Sequence[str] = ()) -> Report:
    """The report for a task of this kind, one of `TaskConfig.kind`; gold and predicted as its own function has them.

    Raises:
      UserError: as that function.
    """
    match kind:
        case "classification" | "entailment" | "similarity":
            return classification_report(gold, predicted, labels)
        case "multiple_choice":
            return choice_report(gold, predicted)
        case "regression":
            return regression_report(gold, predicted)
        case "tagging":
            return tagging_report(gold, predicted, labels)
        case "question_answering":
            return question_answering_report(gold, predicted)
    raise ValueError(f"no report for {kind!r}")


# --- one label an example ---------------------------------------------------------------------------------------------


def classification_report(gold: npt.ArrayLike, predicted: npt.ArrayLike, labels: Sequence[str]) -> Report:
    """accuracy, micro_f1, macro_f1, weighted_f1, matthews, and a table of each label.

    A label that occurs neither in `gold` nor in `predicted` has no line and is not in an average. With one label an
    example, micro_f1 is the accuracy. matthews is R_K of Gorodkin 2004; 0 where all of either side is one label.

    Args:
      gold, predicted: int (N,), places in `labels`.

    Raises:
      UserError: no examples, different numbers of them, or a number that is no label's.
    """
    from sklearn.metrics import matthews_corrcoef

    gold_N, predicted_N = _label_ids(gold, predicted, len(labels))
    rows, averages = _scores(gold_N, predicted_N, labels)
    accuracy = float(np.mean(gold_N == predicted_N))
    one_sided = min(len(np.unique(gold_N)), len(np.unique(predicted_N))) < 2
    matthews = 0.0 if one_sided else float(matthews_corrcoef(gold_N, predicted_N))
    text = (
        f"accuracy {accuracy:.4f}, Matthews correlation {matthews:.4f} of {_count(gold_N, 'example')}\n\n"
        f"{_table('label', rows, averages)}"
    )
    metrics = {"accuracy": accuracy, **_average_f1(averages), "matthews": matthews}
    return Report(metrics, text, _confusion(gold_N, predicted_N, len(labels)), tuple(labels))


def choice_report(gold: npt.ArrayLike, predicted: npt.ArrayLike) -> Report:
    """accuracy. The answers of one question have nothing in common with those of another: no table, no confusion.

    Args:
      gold, predicted: int (N,), the place of an answer among its question's.

    Raises:
      UserError: no questions, or different numbers of them.
    """
    gold_N, predicted_N = np.asarray(gold, np.int64), np.asarray(predicted, np.int64)
    _check_numbers(gold_N, predicted_N)
    accuracy = float(np.mean(gold_N == predicted_N))
    return Report({"accuracy": accuracy}, f"accuracy {accuracy:.4f} of {_count(gold_N, 'question')}\n")


# --- a number an example ----------------------------------------------------------------------------------------------


def regression_report(gold: npt.ArrayLike, predicted: npt.ArrayLike) -> Report:
    """pearson, spearman (ties share their mean rank), mean_squared_error.

    Numbers that are all the same have no correlation with anything; it counts as 0, as for a guess, and the text says
    so.

    Args:
      gold, predicted: float (N,).

    Raises:
      UserError: no examples, different numbers of them, or a number that is not finite.
    """
    from scipy.stats import rankdata

    gold_N, predicted_N = np.asarray(gold, np.float64), np.asarray(predicted, np.float64)
    _check_numbers(gold_N, predicted_N)
    text = ""
    for name, values_N in (("gold", gold_N), ("predicted", predicted_N)):
        if not np.isfinite(values_N).all():
            place = int(np.argmin(np.isfinite(values_N)))
            raise UserError(f"{name} number {place + 1} is {values_N[place]}: give finite numbers")
        if np.ptp(values_N) == 0:
            text += f"all {name} numbers are {values_N[0]:g}: a correlation with them is undefined and counts as 0\n"
    pearson = _correlation(gold_N, predicted_N)
    spearman = _correlation(rankdata(gold_N), rankdata(predicted_N))
    error = float(np.mean((gold_N - predicted_N) ** 2))
    text = (
        f"Pearson correlation {pearson:.4f}, Spearman correlation {spearman:.4f}, mean squared error {error:.4f} "
        f"of {_count(gold_N, 'example')}\n{text}"
    )
    return Report({"pearson": pearson, "spearman": spearman, "mean_squared_error": error}, text)


def _correlation(x_N: npt.NDArray[np.float64], y_N: npt.NDArray[np.float64]) -> float:
    """Pearson's; 0 where either is constant."""
    # The mean of equal numbers may differ from them in the last bit: ask for their range, not for their variance.
    if np.ptp(x_N) == 0 or np.ptp(y_N) == 0:
        return 0.0
    x_N, y_N = (centred / np.abs(centred).max() for centred in (x_N - x_N.mean(), y_N - y_N.mean()))
    return float(np.clip(x_N @ y_N / (np.linalg.norm(x_N) * np.linalg.norm(y_N)), -1.0, 1.0))


# --- a tag a word -----------------------------------------------------------------------------------------------------


def tagging_report(
    gold: Sequence[Sequence[str]], predicted: Sequence[Sequence[str]], labels: Sequence[str] = ()
) -> Report:
    """accuracy (of words), f1, and of tags micro_f1, macro_f1, weighted_f1, with a table of each tag.

    Where tags mark spans (see `tag_scheme`), also of whole entities entity_precision, entity_recall, entity_f1
    (micro-averages), with a table of each type, as seqeval computes them. BIO is read as by conlleval, the CoNLL shared
    tasks' script: an I- that follows O, the sentence's start or another type begins an entity, as B- would. IOBES and
    BILOU are read strictly: what is not a whole B- I- E- (B- I- L-) or a single S- (U-) is no entity. An entity is
    right if its type and both its ends are. f1 is entity_f1 there, and micro_f1 elsewhere.

    Averages leave O out, as is usual: most words have it, and what finds nothing would score well. So micro_f1 is the
    accuracy for part-of-speech tags, which have no O, and not for entities.

    Args:
      gold, predicted: for each sentence a tag for each word.
      labels: all tags, in the order of the tables; what is not among them comes after. Empty: sorted.

    Raises:
      UserError: no words, or different numbers of sentences, or of words in one.
    """
    _check_lengths(len(gold), len(predicted))
    for number, (tags, guesses) in enumerate(zip(gold, predicted, strict=True), start=1):
        if len(tags) != len(guesses):
            raise UserError(
                f"sentence {number} has {len(tags)} gold tags and {len(guesses)} predicted ones: give one a word"
            )
    gold_words, predicted_words = ([tag for tags in side for tag in tags] for side in (gold, predicted))
    _check_lengths(len(gold_words), len(predicted_words))
    names = tuple(dict.fromkeys([*labels, *sorted({*gold_words, *predicted_words}, key=_by_type)]))
    ids = {tag: index for index, tag in enumerate(names)}
    gold_N, predicted_N = (np.array([ids[tag] for tag in words]) for words in (gold_words, predicted_words))
    rows, averages = _scores(gold_N, predicted_N, names, left_out=OUTSIDE)
    accuracy, f1 = float(np.mean(gold_N == predicted_N)), averages[0].f1
    metrics = {"accuracy": accuracy, "f1": f1, **_average_f1(averages)}
    text = f"accuracy {accuracy:.4f} of {_count(gold_N, 'word')} in {_count(gold, 'sentence')}\n\n"
    if (scheme := tag_scheme(names)) is not None:
        entities, entity_averages = _entity_scores(gold, predicted, scheme)
        micro = entity_averages[0]
        metrics |= {"f1": micro.f1, "entity_precision": micro.precision, "entity_recall": micro.recall}
        metrics["entity_f1"] = micro.f1
        text += f"{_table('entity', entities, entity_averages)}\n"
    text += _table("tag", rows, averages)
    if OUTSIDE in names:
        text += f"the averages leave {OUTSIDE} out\n"
    return Report(metrics, text, _confusion(gold_N, predicted_N, len(names)), names)


def tag_scheme(tags: Sequence[str]) -> str | None:
    """How these tags mark spans: "BIO", "IOBES" or "BILOU"; None: they do not.

    Each tag but O is a prefix of the scheme, "-" and a type, and not all are O. Where B- and I- alone occur, it is BIO.
    """
    marks = {match[1] if (match := re.fullmatch(r"([A-Z])-.+", tag)) else "" for tag in tags if tag != OUTSIDE}
    return next((name for name, known in _SCHEMES.items() if marks and marks <= known), None)


def _by_type(tag: str) -> tuple[bool, str, str]:
    """Sorts B-LOC, I-LOC, B-PER, I-PER, O."""
    return tag == OUTSIDE, re.sub("^[BIESLU]-", "", tag), tag


# --- an answer a question ---------------------------------------------------------------------------------------------


def question_answering_report(gold_answers: Sequence[Sequence[str]], predicted: Sequence[str]) -> Report:
    """exact_match and f1 of SQuAD (Rajpurkar et al. 2016, section 6.1), each the mean over questions.

    Both compare answers in lower case, without ASCII punctuation and the articles a, an, the. A question's score is the
    best over its gold answers; one with none left after that has no answer, and the empty prediction is right
    (Rajpurkar et al. 2018).

    Args:
      gold_answers: for each question those that are right; none: the text does not answer it.
      predicted: for each question one answer.

    Raises:
      UserError: no questions, or different numbers of them.
    """
    _check_lengths(len(gold_answers), len(predicted))
    exact_match = f1 = 0.0
    for answers, guess in zip(gold_answers, predicted, strict=True):
        guess_words = answer_words(guess)
        right = [words for words in map(answer_words, answers) if words] or [[]]
        exact_match += max(words == guess_words for words in right)
        f1 += max(_overlap_f1(words, guess_words) for words in right)
    metrics = {"exact_match": exact_match / len(predicted), "f1": f1 / len(predicted)}
    text = f"exact match {metrics['exact_match']:.4f}, F1 {metrics['f1']:.4f} of {_count(predicted, 'question')}\n"
    return Report(metrics, text)


def answer_words(answer: str) -> list[str]:
    """The words that SQuAD's evaluation compares of an answer."""
    # Punctuation goes first and leaves no space: "a.m." is the word "am", and no article.
    bare = answer.lower().translate(str.maketrans("", "", string.punctuation))
    return re.sub(r"\b(?:a|an|the)\b", " ", bare).split()


def _overlap_f1(gold_words: list[str], guess_words: list[str]) -> float:
    """F1 of two bags of words; two empty ones agree."""
    if not gold_words or not guess_words:
        return float(gold_words == guess_words)
    return 2 * (Counter(gold_words) & Counter(guess_words)).total() / (len(gold_words) + len(guess_words))


# --- shared by the above ----------------------------------------------------------------------------------------------


class _Row(NamedTuple):
    """A line of a table."""

    name: str
    precision: float
    recall: float
    f1: float
    support: int


def _scores(
    gold_N: npt.NDArray[np.int64],
    predicted_N: npt.NDArray[np.int64],
    labels: Sequence[str],
    left_out: str | None = None,
) -> tuple[list[_Row], list[_Row]]:
    """A row for each label that occurs, and the micro, macro and weighted averages over all of these but `left_out`."""
    from sklearn.metrics import precision_recall_fscore_support

    def score(ids: Sequence[int], average: str | None) -> tuple[Any, ...]:
        return precision_recall_fscore_support(gold_N, predicted_N, labels=ids, average=average, zero_division=0.0)

    present = [int(label) for label in np.union1d(gold_N, predicted_N)]
    scores = zip(present, *score(present, None), strict=True)
    rows = [_Row(labels[label], float(p), float(r), float(f), int(n)) for label, p, r, f, n in scores]
    counted = [label for label in present if labels[label] != left_out]
    support = int(np.isin(gold_N, counted).sum())
    averages = []
    for average in AVERAGES:
        p, r, f, _ = score(counted, average) if counted else (0.0, 0.0, 0.0, None)
        averages.append(_Row(f"{average} avg", float(p), float(r), float(f), support))
    return rows, averages


def _entity_scores(
    gold: Sequence[Sequence[str]], predicted: Sequence[Sequence[str]], scheme: str
) -> tuple[list[_Row], list[_Row]]:
    """A row for each type that occurs, and the micro, macro and weighted averages, of entities."""
    import seqeval.scheme
    from seqeval.metrics import classification_report as seqeval_report

    # seqeval tells lists of tags from lists of lists by type.
    gold, predicted = [list(tags) for tags in gold], [list(tags) for tags in predicted]
    if scheme == "BIO":
        has_entities = any(tag != OUTSIDE for side in (gold, predicted) for tags in side for tag in tags)
    else:
        kind = getattr(seqeval.scheme, scheme)
        has_entities = any(any(seqeval.scheme.Entities(side, kind).entities) for side in (gold, predicted))
    if not has_entities:  # which seqeval warns of
        return [], [_Row(f"{average} avg", 0.0, 0.0, 0.0, 0) for average in AVERAGES]
    strict = {} if scheme == "BIO" else {"mode": "strict", "scheme": getattr(seqeval.scheme, scheme)}
    scores = seqeval_report(gold, predicted, output_dict=True, zero_division=0, **strict)
    rows = [
        _Row(name, float(row["precision"]), float(row["recall"]), float(row["f1-score"]), int(row["support"]))
        for name, row in scores.items()
    ]
    return rows[: -len(AVERAGES)], rows[-len(AVERAGES) :]


def _average_f1(averages: list[_Row]) -> dict[str, float]:
    return {f"{row.name.removesuffix(' avg')}_f1": row.f1 for row in averages}


def _table(title: str, rows: list[_Row], averages: list[_Row]) -> str:
    """Precision, recall, F1 and support of rows, and below a blank line of averages."""
    width = max(_width(name) for name in (title, *(row.name for row in (*rows, *averages))))

    def line(row: _Row) -> str:
        name = " " * (width - _width(row.name)) + row.name
        return f"{name}  {row.precision:9.4f}  {row.recall:6.4f}  {row.f1:6.4f}  {row.support:8,}\n"

    header = f"{title:>{width}}  precision  recall      F1   support\n"
    return "".join([header, *map(line, rows), "\n", *map(line, averages)])


def _width(text: str) -> int:
    """Columns of a terminal: Chinese characters and the like take two, accents of their own none."""
    return sum(0 if unicodedata.combining(char) else 1 + (unicodedata.east_asian_width(char) in "WF") for char in text)


def _confusion(gold_N: npt.NDArray[np.int64], predicted_N: npt.NDArray[np.int64], n: int) -> npt.NDArray[np.int64]:
    return np.bincount(gold_N * n + predicted_N, minlength=n * n).reshape(n, n)


def _label_ids(
    gold: npt.ArrayLike, predicted: npt.ArrayLike, num_labels: int
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    gold_N, predicted_N = np.asarray(gold, np.int64), np.asarray(predicted, np.int64)
    _check_numbers(gold_N, predicted_N)
    for name, ids_N in (("gold", gold_N), ("predicted", predicted_N)):
        wrong = (ids_N < 0) | (ids_N >= num_labels)
        if wrong.any():
            place = int(np.argmax(wrong))
            raise UserError(f"{name} label {place + 1} is {ids_N[place]}: there are labels 0 to {num_labels - 1}")
    return gold_N, predicted_N


def _check_numbers(gold_N: npt.NDArray[Any], predicted_N: npt.NDArray[Any]) -> None:
    if gold_N.ndim != 1 or predicted_N.ndim != 1:
        raise ValueError(f"one number an example, not arrays of shape {gold_N.shape} and {predicted_N.shape}")
    _check_lengths(len(gold_N), len(predicted_N))


def _check_lengths(gold: int, predicted: int) -> None:
    if gold != predicted:
        raise UserError(f"{gold} gold answers and {predicted} predictions: give one prediction for each")
    if gold == 0:
        raise UserError("no examples to report on: give at least one")


def _count(things: Sequence[Any] | npt.NDArray[Any], name: str) -> str:
    return f"{len(things):,} {name}{'' if len(things) == 1 else 's'}"
