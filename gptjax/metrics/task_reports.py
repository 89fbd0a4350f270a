"""Metrics of predictions on labelled examples, and their reports as text and tables.

Pure functions of gold and predicted labels. A ratio 0/0, such as the precision of a label that is never predicted, is
0, as in scikit-learn and seqeval.
"""

import dataclasses
import re
import string
from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from gptjax.config import UserError
from gptjax.metrics.score_table import ScoreRow, by_name, format_table

# The usual metric of each kind of task; higher is better.
MAIN_METRIC = {
    "classification": "accuracy",
    "entailment": "accuracy",
    "similarity": "accuracy",
    "multiple_choice": "accuracy",
    "regression": "pearson",
    "tagging": "f1",
    "question_answering": "f1",
}
OUTSIDE = "O"  # the tag of words outside all entities
AVERAGES = ("micro", "macro", "weighted")
_SCHEMES = {"BIO": set("BI"), "IOBES": set("BIES"), "BILOU": set("BILU")}


@dataclasses.dataclass(frozen=True, eq=False)
class TaskReport:
    """The metrics of a set of predictions.

    Attributes:
      metrics: in [0, 1], except correlations, in [-1, 1], and mean_squared_error.
      text: the report as lines for a terminal.
      confusion: int (labels, labels), rows: gold, columns: predicted; None where a task has no classes.
      labels: names of the rows and columns of `confusion`.
      per_label: precision, recall, f1 and support of each label (in tagging each tag) that occurs.
      per_entity: the same of each entity type, where tags mark spans.
    """

    metrics: dict[str, float]
    text: str
    confusion: npt.NDArray[np.int64] | None = None
    labels: tuple[str, ...] = ()
    per_label: dict[str, dict[str, float]] = dataclasses.field(default_factory=dict)
    per_entity: dict[str, dict[str, float]] = dataclasses.field(default_factory=dict)

    def as_json(self) -> dict[str, Any]:
        """Returns the metrics, and where the task has them "per_label", "per_entity" and "confusion"."""
        found: dict[str, Any] = dict(self.metrics)
        found |= {"per_label": self.per_label} if self.per_label else {}
        found |= {"per_entity": self.per_entity} if self.per_entity else {}
        if self.confusion is not None:
            found["confusion"] = {"labels": list(self.labels), "counts": self.confusion.tolist()}
        return found


def report(kind: str, gold: Sequence[Any], predicted: Sequence[Any], labels: Sequence[str] = ()) -> TaskReport:
    """Returns the report for a task of this kind, a value of `TaskConfig.kind`.

    Args:
      gold, predicted: as taken by the report function of the kind.

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


# --- one label per example --------------------------------------------------------------------------------------------


def classification_report(gold: npt.ArrayLike, predicted: npt.ArrayLike, labels: Sequence[str]) -> TaskReport:
    """Computes accuracy, micro_f1, macro_f1, weighted_f1, matthews, and the scores of each label.

    Labels that occur neither in `gold` nor in `predicted` are left out of the table and the averages. With one label
    per example, micro_f1 equals the accuracy. matthews is R_K (Gorodkin 2004); 0 if either side is constant.

    Args:
      gold, predicted: int (N,), indices into `labels`.

    Raises:
      UserError: no examples, different numbers of them, or an index out of range.
    """
    from sklearn.metrics import matthews_corrcoef

    gold_N, predicted_N = _label_ids(gold, predicted, len(labels))
    rows, averages = _scores(gold_N, predicted_N, labels)
    accuracy = float(np.mean(gold_N == predicted_N))
    one_sided = min(len(np.unique(gold_N)), len(np.unique(predicted_N))) < 2
    matthews = 0.0 if one_sided else float(matthews_corrcoef(gold_N, predicted_N))
    text = (
        f"accuracy {accuracy:.4f}, Matthews correlation {matthews:.4f} of {_count(gold_N, 'example')}\n\n"
        f"{format_table('label', rows, averages)}"
    )
    metrics = {"accuracy": accuracy, **_average_f1(averages), "matthews": matthews}
    confusion = _confusion(gold_N, predicted_N, len(labels))
    return TaskReport(metrics, text, confusion, tuple(labels), per_label=by_name(rows))


def choice_report(gold: npt.ArrayLike, predicted: npt.ArrayLike) -> TaskReport:
    """Computes accuracy. Options differ from question to question, so that there is no table and no confusion matrix.

    Args:
      gold, predicted: int (N,), the index of an option of its question.

    Raises:
      UserError: no questions, or different numbers of them.
    """
    gold_N, predicted_N = np.asarray(gold, np.int64), np.asarray(predicted, np.int64)
    _check_numbers(gold_N, predicted_N)
    accuracy = float(np.mean(gold_N == predicted_N))
    return TaskReport({"accuracy": accuracy}, f"accuracy {accuracy:.4f} of {_count(gold_N, 'question')}\n")


# --- one number per example -------------------------------------------------------------------------------------------


def regression_report(gold: npt.ArrayLike, predicted: npt.ArrayLike) -> TaskReport:
    """Computes pearson, spearman (ties get their mean rank) and mean_squared_error.

    The correlation with a constant is undefined: it is reported as 0, and the text says so.

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
    return TaskReport({"pearson": pearson, "spearman": spearman, "mean_squared_error": error}, text)


def _correlation(x_N: npt.NDArray[np.float64], y_N: npt.NDArray[np.float64]) -> float:
    """Computes Pearson's correlation; 0 if either is constant."""
    # The mean of equal numbers may differ from them in the last bit, so the range is tested and not the variance.
    if np.ptp(x_N) == 0 or np.ptp(y_N) == 0:
        return 0.0
    x_N, y_N = (centred / np.abs(centred).max() for centred in (x_N - x_N.mean(), y_N - y_N.mean()))
    return float(np.clip(x_N @ y_N / (np.linalg.norm(x_N) * np.linalg.norm(y_N)), -1.0, 1.0))


# --- one tag per word -------------------------------------------------------------------------------------------------


def tagging_report(
    gold: Sequence[Sequence[str]], predicted: Sequence[Sequence[str]], labels: Sequence[str] = ()
) -> TaskReport:
    """Computes accuracy (of words), f1, and over tags micro_f1, macro_f1, weighted_f1, with the scores of each tag.

    Where tags mark spans (see `tag_scheme`), also entity_precision, entity_recall, entity_f1 (micro-averages), with the
    scores of each entity type, as seqeval computes them. BIO is decoded as by conlleval, the script of the CoNLL shared
    tasks: an I- after O, after another type or at the start of a sentence begins an entity, as B- does. IOBES and BILOU
    are decoded strictly: only a complete B- I- E- (B- I- L-) or a single S- (U-) is an entity. An entity is correct if
    its type and both its ends are. f1 is entity_f1 there, and micro_f1 elsewhere.

    Averages exclude O, as is usual: most words have it, so that predicting no entities would score well. micro_f1
    therefore equals the accuracy for part-of-speech tags, which have no O, but not for entities.

    Args:
      gold, predicted: for each sentence one tag per word.
      labels: all tags, in the order of the tables; tags not among them come last. Empty: sorted.

    Raises:
      UserError: no words, or different numbers of sentences, or of words in one.
    """
    _check_lengths(len(gold), len(predicted))
    for number, (tags, guesses) in enumerate(zip(gold, predicted, strict=True), start=1):
        if len(tags) != len(guesses):
            raise UserError(
                f"sentence {number} has {len(tags)} gold tags and {len(guesses)} predicted ones: give one per word"
            )
    gold_words, predicted_words = ([tag for tags in side for tag in tags] for side in (gold, predicted))
    _check_lengths(len(gold_words), len(predicted_words))
    names = tuple(dict.fromkeys([*labels, *sorted({*gold_words, *predicted_words}, key=_by_type)]))
    ids = {tag: index for index, tag in enumerate(names)}
    gold_N, predicted_N = (np.array([ids[tag] for tag in words]) for words in (gold_words, predicted_words))
    rows, averages = _scores(gold_N, predicted_N, names, left_out=OUTSIDE)
    accuracy, f1 = float(np.mean(gold_N == predicted_N)), averages[0].f1
    metrics = {"accuracy": accuracy, "f1": f1, **_average_f1(averages)}
    text, per_entity = f"accuracy {accuracy:.4f} of {_count(gold_N, 'word')} in {_count(gold, 'sentence')}\n\n", {}
    if (scheme := tag_scheme(names)) is not None:
        entities, entity_averages = _entity_scores(gold, predicted, scheme)
        micro, per_entity = entity_averages[0], by_name(entities)
        metrics |= {"f1": micro.f1, "entity_precision": micro.precision, "entity_recall": micro.recall}
        metrics["entity_f1"] = micro.f1
        text += f"{format_table('entity', entities, entity_averages)}\n"
    text += format_table("tag", rows, averages)
    if OUTSIDE in names:
        text += f"the averages exclude {OUTSIDE}\n"
    return TaskReport(metrics, text, _confusion(gold_N, predicted_N, len(names)), names, by_name(rows), per_entity)


def tag_scheme(tags: Sequence[str]) -> str | None:
    """Returns the scheme by which tags mark spans, "BIO", "IOBES" or "BILOU"; None: they do not mark spans.

    Each tag other than O is a prefix of the scheme, "-" and a type; tags that are all O have no scheme. If only B- and
    I- occur, it is BIO.
    """
    marks = {match[1] if (match := re.fullmatch(r"([A-Z])-.+", tag)) else "" for tag in tags if tag != OUTSIDE}
    return next((name for name, known in _SCHEMES.items() if marks and marks <= known), None)


def _by_type(tag: str) -> tuple[bool, str, str]:
    """Sort key for the order B-LOC, I-LOC, B-PER, I-PER, O."""
    return tag == OUTSIDE, re.sub("^[BIESLU]-", "", tag), tag


# --- one answer per question ------------------------------------------------------------------------------------------


def question_answering_report(gold_answers: Sequence[Sequence[str]], predicted: Sequence[str]) -> TaskReport:
    """Computes exact_match and f1 of SQuAD (Rajpurkar et al. 2016, section 6.1), both means over questions.

    Answers are compared in lower case, without ASCII punctuation and the articles a, an, the. The score of a question
    is the best over its gold answers. If none is left after normalisation the question has no answer, and the empty
    prediction is correct (Rajpurkar et al. 2018).

    Args:
      gold_answers: for each question the correct answers; empty: the text does not answer it.
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
    return TaskReport(metrics, text)


def answer_words(answer: str) -> list[str]:
    """Normalises an answer as SQuAD's evaluation does, and returns its words."""
    # Punctuation is removed first and leaves no space: "a.m." becomes "am", not an article.
    bare = answer.lower().translate(str.maketrans("", "", string.punctuation))
    return re.sub(r"\b(?:a|an|the)\b", " ", bare).split()


def _overlap_f1(gold_words: list[str], guess_words: list[str]) -> float:
    """Computes F1 of two bags of words; 1 if both are empty."""
    if not gold_words or not guess_words:
        return float(gold_words == guess_words)
    return 2 * (Counter(gold_words) & Counter(guess_words)).total() / (len(gold_words) + len(guess_words))


# --- scores -----------------------------------------------------------------------------------------------------------


def _scores(
    gold_N: npt.NDArray[np.int64],
    predicted_N: npt.NDArray[np.int64],
    labels: Sequence[str],
    left_out: str | None = None,
) -> tuple[list[ScoreRow], list[ScoreRow]]:
    """Scores each label that occurs; returns these, and their micro, macro and weighted averages without `left_out`."""
    from sklearn.metrics import precision_recall_fscore_support

    def score(ids: Sequence[int], average: str | None) -> tuple[Any, ...]:
        return precision_recall_fscore_support(gold_N, predicted_N, labels=ids, average=average, zero_division=0.0)

    present = [int(label) for label in np.union1d(gold_N, predicted_N)]
    scores = zip(present, *score(present, None), strict=True)
    rows = [ScoreRow(labels[label], float(p), float(r), float(f), int(n)) for label, p, r, f, n in scores]
    counted = [label for label in present if labels[label] != left_out]
    support = int(np.isin(gold_N, counted).sum())
    averages = []
    for average in AVERAGES:
        p, r, f, _ = score(counted, average) if counted else (0.0, 0.0, 0.0, None)
        averages.append(ScoreRow(f"{average} avg", float(p), float(r), float(f), support))
    return rows, averages


def _entity_scores(
    gold: Sequence[Sequence[str]], predicted: Sequence[Sequence[str]], scheme: str
) -> tuple[list[ScoreRow], list[ScoreRow]]:
    """Scores each entity type that occurs; returns these, and their micro, macro and weighted averages."""
    import seqeval.scheme
    from seqeval.metrics import classification_report as seqeval_report

    # seqeval distinguishes lists of tags from lists of lists by type: tuples would not do.
    gold, predicted = [list(tags) for tags in gold], [list(tags) for tags in predicted]
    if scheme == "BIO":
        has_entities = any(tag != OUTSIDE for side in (gold, predicted) for tags in side for tag in tags)
    else:
        kind = getattr(seqeval.scheme, scheme)
        has_entities = any(any(seqeval.scheme.Entities(side, kind).entities) for side in (gold, predicted))
    if not has_entities:  # seqeval warns about these
        return [], [ScoreRow(f"{average} avg", 0.0, 0.0, 0.0, 0) for average in AVERAGES]
    strict = {} if scheme == "BIO" else {"mode": "strict", "scheme": getattr(seqeval.scheme, scheme)}
    scores = seqeval_report(gold, predicted, output_dict=True, zero_division=0, **strict)
    rows = [
        ScoreRow(name, float(row["precision"]), float(row["recall"]), float(row["f1-score"]), int(row["support"]))
        for name, row in scores.items()
    ]
    return rows[: -len(AVERAGES)], rows[-len(AVERAGES) :]


def _average_f1(averages: list[ScoreRow]) -> dict[str, float]:
    return {f"{row.name.removesuffix(' avg')}_f1": row.f1 for row in averages}


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
        raise ValueError(f"one number per example, not arrays of shape {gold_N.shape} and {predicted_N.shape}")
    _check_lengths(len(gold_N), len(predicted_N))


def _check_lengths(gold: int, predicted: int) -> None:
    if gold != predicted:
        raise UserError(f"{gold} gold answers and {predicted} predictions: give one prediction for each")
    if gold == 0:
        raise UserError("no examples to report on: give at least one")


def _count(things: Sequence[Any] | npt.NDArray[Any], name: str) -> str:
    return f"{len(things):,} {name}{'' if len(things) == 1 else 's'}"
