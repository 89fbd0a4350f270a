"""Reports equal values computed by hand, by scikit-learn and by seqeval; the text agrees with the metrics."""

import typing

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats
from seqeval import metrics as seqeval
from sklearn import metrics as sklearn

from gptjax.config import TaskConfig, UserError
from gptjax.metrics import task_reports as reports
from gptjax.metrics.task_reports import (
    MAIN_METRIC,
    TaskReport,
    answer_words,
    choice_report,
    classification_report,
    question_answering_report,
    regression_report,
    report,
    tag_scheme,
    tagging_report,
)

LABELS = ("ham", "spam", "中文 ünï")
KINDS = typing.get_args(typing.get_type_hints(TaskConfig)["kind"])
BIO = ("B-LOC", "I-LOC", "B-PER", "I-PER", "O")
# One right and one wrong prediction (or nearly) of each kind.
EXAMPLES = {
    "classification": ([0, 1], [0, 0]),
    "entailment": ([0, 1], [0, 0]),
    "similarity": ([0, 1], [0, 0]),
    "multiple_choice": ([3, 1], [3, 0]),
    "regression": ([0.5, 1.0, 3.0], [0.5, 2.5, 2.0]),
    "tagging": ([["B-PER", "O"], ["B-LOC"]], [["B-PER", "O"], ["O"]]),
    "question_answering": ([["Paris"], ["the Seine", "a river"]], ["paris.", "the sea"]),
}
pairs = st.lists(st.tuples(st.integers(0, 2), st.integers(0, 2)), min_size=1, max_size=30)
tagged = st.lists(
    st.lists(st.tuples(st.sampled_from(BIO), st.sampled_from(BIO)), max_size=6), min_size=1, max_size=5
).filter(lambda sentences: any(sentences))


def split(examples):
    """Of (gold, predicted) pairs the gold and the predicted."""
    return [gold for gold, _ in examples], [predicted for _, predicted in examples]


def split_sentences(sentences):
    return [split(words)[0] for words in sentences], [split(words)[1] for words in sentences]


def rows(text: str) -> dict[str, list[str]]:
    """A table's lines by their names."""
    lines = [line.rsplit(maxsplit=4) for line in text.splitlines()]
    return {line[0].strip(): line[1:] for line in lines if len(line) == 5 and line[4].replace(",", "").isdigit()}


# --- of every kind ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_text_says_what_the_metrics_say(kind):
    found = report(kind, *EXAMPLES[kind], *([LABELS] if kind in ("classification", "entailment", "similarity") else []))
    assert 0 < found.metrics[MAIN_METRIC[kind]] < 1
    for name, value in found.metrics.items():
        assert f"{value:.4f}" in found.text, name
    assert found.text.endswith("\n")
    assert "nan" not in found.text


@pytest.mark.parametrize("kind", KINDS)
def test_perfect_predictions_have_the_best_score(kind):
    gold = EXAMPLES[kind][0]
    predicted = [answers[0] for answers in gold] if kind == "question_answering" else gold
    found = report(kind, gold, predicted, LABELS if kind != "tagging" else BIO)
    expected = dict.fromkeys(found.metrics, 1.0) | {"mean_squared_error": 0.0}
    assert found.metrics == pytest.approx({name: expected[name] for name in found.metrics})
    if found.confusion is not None:
        assert np.array_equal(found.confusion, np.diag(np.diag(found.confusion)))


@pytest.mark.parametrize("kind", KINDS)
def test_order_of_examples_does_not_matter(kind):
    gold, predicted = EXAMPLES[kind]
    labels = LABELS if kind != "tagging" else BIO
    found, reversed_ = report(kind, gold, predicted, labels), report(kind, gold[::-1], predicted[::-1], labels)
    assert reversed_.metrics == pytest.approx(found.metrics)
    assert reversed_.text == found.text
    assert np.array_equal(reversed_.confusion, found.confusion)


@pytest.mark.parametrize("kind", KINDS)
def test_numbers_of_examples_that_differ_are_refused(kind):
    gold, predicted = EXAMPLES[kind]
    with pytest.raises(UserError, match=rf"{len(gold)} gold answers and 1 predictions"):
        report(kind, gold, predicted[:1], LABELS)
    with pytest.raises(UserError, match="no examples"):
        report(kind, [], [], LABELS)


def test_every_kind_has_a_main_metric_and_no_other_kind_a_report():
    assert set(MAIN_METRIC) == set(KINDS)
    with pytest.raises(ValueError, match="no report for 'translation'"):
        report("translation", [0], [0])


# --- one label an example ---------------------------------------------------------------------------------------------


def test_classification_by_hand():
    # Of ham 2 of 3 are found, of spam 1 of 2; one 中文 is taken for ham.
    found = classification_report([0, 0, 0, 1, 1, 2], [0, 0, 1, 1, 0, 0], LABELS)
    assert found.confusion.tolist() == [[2, 1, 0], [1, 1, 0], [1, 0, 0]]
    assert found.confusion.dtype == np.int64
    assert found.labels == LABELS
    f1 = [2 * 2 / (3 + 4), 2 * 1 / (2 + 2), 0.0]
    assert found.metrics["accuracy"] == found.metrics["micro_f1"] == 0.5
    assert found.metrics["macro_f1"] == pytest.approx(sum(f1) / 3)
    assert found.metrics["weighted_f1"] == pytest.approx((3 * f1[0] + 2 * f1[1] + f1[2]) / 6)
    table = rows(found.text)
    assert table["ham"] == ["0.5000", "0.6667", "0.5714", "3"]
    assert table["spam"] == ["0.5000", "0.5000", "0.5000", "2"]
    assert table["中文 ünï"] == ["0.0000", "0.0000", "0.0000", "1"]
    assert table["macro avg"] == ["0.3333", "0.3889", "0.3571", "6"]
    assert table["weighted avg"] == ["0.4167", "0.5000", "0.4524", "6"]


@given(pairs)
@settings(max_examples=60)
def test_classification_agrees_with_sklearn(examples):
    gold, predicted = split(examples)
    found = classification_report(gold, predicted, LABELS)
    expected = sklearn.classification_report(gold, predicted, output_dict=True, zero_division=0)
    assert found.metrics["accuracy"] == pytest.approx(sklearn.accuracy_score(gold, predicted))
    assert found.metrics["macro_f1"] == pytest.approx(expected["macro avg"]["f1-score"])
    assert found.metrics["weighted_f1"] == pytest.approx(expected["weighted avg"]["f1-score"])
    assert found.confusion.tolist() == sklearn.confusion_matrix(gold, predicted, labels=[0, 1, 2]).tolist()
    # Gorodkin's R_K is the correlation of the one-hot labels, here over all their entries.
    x, y = (np.eye(3)[side] - np.eye(3)[side].mean(0) for side in (gold, predicted))
    norm = np.sqrt((x * x).sum() * (y * y).sum())
    assert found.metrics["matthews"] == pytest.approx((x * y).sum() / norm if norm > 0 else 0.0)
    assert set(rows(found.text)) == {LABELS[i] for i in {*gold, *predicted}} | {
        "micro avg",
        "macro avg",
        "weighted avg",
    }


@given(pairs, st.permutations(range(3)))
@settings(max_examples=30)
def test_names_of_labels_do_not_matter(examples, order):
    gold, predicted = split(examples)
    found = classification_report(gold, predicted, LABELS)
    renamed = classification_report([order[i] for i in gold], [order[i] for i in predicted], "abc")
    assert renamed.metrics == pytest.approx(found.metrics)
    assert np.array_equal(renamed.confusion[np.ix_(order, order)], found.confusion)


def test_one_class_predicted_only():
    found = classification_report([0, 1, 1, 2], [1, 1, 1, 1], LABELS)
    assert found.metrics["accuracy"] == 0.5
    assert found.metrics["matthews"] == 0.0
    assert found.metrics["macro_f1"] == pytest.approx((2 * 2 / (2 + 4)) / 3)


def test_a_number_that_is_no_label_is_refused():
    with pytest.raises(UserError, match="predicted label 2 is 3: there are labels 0 to 2"):
        classification_report([0, 1], [0, 3], LABELS)
    with pytest.raises(UserError, match="gold label 1 is -1: there are labels 0 to 2"):
        classification_report([-1, 1], [0, 1], LABELS)


def test_rows_of_logits_are_refused():
    with pytest.raises(ValueError, match=r"not arrays of shape \(2,\) and \(2, 3\)"):
        classification_report([0, 1], np.zeros((2, 3)), LABELS)


def test_columns_line_up_below_wide_and_combining_characters():
    *_, ham, chinese, accented = (
        line for line in classification_report([0, 1, 2], [0, 1, 2], ["ham", "中文", "e\u0301"]).text.splitlines()[:6]
    )
    # A terminal gives 中 and 文 two columns each, and the accent none.
    assert len(ham) == len(chinese) + 2 == len(accented) - 1


def test_choices_have_an_accuracy_only():
    found = choice_report([0, 3, 1, 1], [0, 3, 0, 2])
    assert found.metrics == {"accuracy": 0.5}
    assert found.text == "accuracy 0.5000 of 4 questions\n"
    assert found.confusion is None


# --- a number an example ----------------------------------------------------------------------------------------------


def test_regression_by_hand():
    found = regression_report([1, 2, 3], [1, 4, 3])
    # Centred: (-1, 0, 1) and (-5, 4, 1) / 3; the ranks of the latter are 1, 3, 2.
    assert found.metrics["pearson"] == pytest.approx(2 / np.sqrt(2 * 42 / 9))
    assert found.metrics["spearman"] == pytest.approx(0.5)
    assert found.metrics["mean_squared_error"] == pytest.approx(4 / 3)


@given(st.lists(st.tuples(st.integers(0, 5), st.integers(-9, 9)), min_size=2, max_size=30), st.floats(1e-3, 1e3))
@settings(max_examples=60)
def test_regression_agrees_with_scipy(examples, scale):
    gold, predicted = split([(x, y * scale) for x, y in examples])
    found = regression_report(gold, predicted)
    if len(set(gold)) > 1 and len(set(predicted)) > 1:
        assert found.metrics["pearson"] == pytest.approx(stats.pearsonr(gold, predicted)[0], abs=1e-9)
        assert found.metrics["spearman"] == pytest.approx(stats.spearmanr(gold, predicted)[0], abs=1e-9)
    else:
        assert found.metrics["pearson"] == found.metrics["spearman"] == 0.0
        assert "undefined and counts as 0" in found.text
    assert found.metrics["mean_squared_error"] == pytest.approx(sklearn.mean_squared_error(gold, predicted))


@pytest.mark.parametrize("size", [1e-200, 0.1, 1e200])
def test_correlation_of_constant_tiny_and_huge_numbers(size):
    gold = np.arange(10)
    # The mean of ten times 0.1 is not 0.1.
    assert regression_report(gold, np.full(10, min(size, 1e100))).metrics["pearson"] == 0.0
    assert reports._correlation(gold.astype(float), -size * gold) == pytest.approx(-1.0)


def test_numbers_that_are_not_finite_are_refused():
    with pytest.raises(UserError, match="predicted number 2 is nan: give finite numbers"):
        regression_report([1, 2], [1, np.nan])


# --- a tag a word -----------------------------------------------------------------------------------------------------


def test_tagging_by_hand():
    gold = [["B-PER", "I-PER", "O", "O"], ["B-LOC", "O"]]
    predicted = [["B-PER", "O", "O", "O"], ["B-LOC", "B-LOC"]]
    found = tagging_report(gold, predicted, BIO)
    assert found.metrics["accuracy"] == pytest.approx(4 / 6)
    # Entities: 2 in gold, 3 predicted, of which one has the right ends.
    assert found.metrics["entity_precision"] == pytest.approx(1 / 3)
    assert found.metrics["entity_recall"] == pytest.approx(1 / 2)
    assert found.metrics["f1"] == found.metrics["entity_f1"] == pytest.approx(2 / 5)
    # Tags but O: 3 in gold, 3 predicted, 2 right; I-LOC does not occur.
    assert found.metrics["micro_f1"] == pytest.approx(2 / 3)
    assert found.metrics["macro_f1"] == pytest.approx((2 / 3 + 1 + 0) / 3)
    entities, tags = found.text.split("         tag  ")
    assert rows(entities)["PER"] == ["0.0000", "0.0000", "0.0000", "1"]
    assert rows(entities)["micro avg"] == ["0.3333", "0.5000", "0.4000", "2"]
    assert rows(tags)["O"] == ["0.6667", "0.6667", "0.6667", "3"]
    assert rows(tags)["micro avg"] == ["0.6667", "0.6667", "0.6667", "3"]
    assert "the averages exclude O" in tags
    assert found.labels == BIO
    assert found.confusion.tolist() == [
        [1, 0, 0, 0, 0],
        [0, 0, 0, 0, 0],
        [0, 0, 1, 0, 0],
        [0, 0, 0, 0, 1],
        [1, 0, 0, 0, 2],
    ]


@given(tagged)
@settings(max_examples=60)
def test_tagging_agrees_with_seqeval_and_sklearn(sentences):
    gold, predicted = split_sentences(sentences)
    found = tagging_report(gold, predicted, BIO)
    scores = {"precision": seqeval.precision_score, "recall": seqeval.recall_score, "f1": seqeval.f1_score}
    for name, score in scores.items():
        assert found.metrics[f"entity_{name}"] == pytest.approx(score(gold, predicted, zero_division=0)), name
    assert found.metrics["accuracy"] == pytest.approx(seqeval.accuracy_score(gold, predicted))
    gold_words, predicted_words = ([tag for tags in side for tag in tags] for side in (gold, predicted))
    present = sorted({*gold_words, *predicted_words} - {"O"})
    if present:
        for average in ("micro", "macro", "weighted"):
            expected = sklearn.f1_score(gold_words, predicted_words, labels=present, average=average, zero_division=0)
            assert found.metrics[f"{average}_f1"] == pytest.approx(expected)


@pytest.mark.parametrize(
    ("predicted", "right"),
    [
        (["O", "I-PER", "I-PER", "O"], 1),  # as B-PER, I-PER
        (["I-LOC", "I-PER", "I-PER", "O"], 1),  # another type ends, and begins
        (["I-PER", "I-PER", "I-PER", "O"], 0),  # longer
        (["O", "B-PER", "B-PER", "O"], 0),  # two
    ],
)
def test_an_inside_tag_that_continues_nothing_begins_an_entity(predicted, right):
    found = tagging_report([["O", "B-PER", "I-PER", "O"]], [predicted])
    assert found.metrics["entity_recall"] == right


def test_entities_do_not_cross_sentences():
    joined, apart = [["B-PER", "I-PER"]], [["B-PER"], ["I-PER"]]
    assert rows(tagging_report(joined, joined).text)["PER"][-1] == "1"
    assert rows(tagging_report(apart, apart).text)["PER"][-1] == "2"


def test_part_of_speech_tags_have_no_entities():
    found = tagging_report([["NN", "PP$", "O'"], []], [["NN", "NN", "O'"], []])
    assert set(found.metrics) == {"accuracy", "f1", "micro_f1", "macro_f1", "weighted_f1"}
    assert found.metrics["f1"] == found.metrics["micro_f1"] == found.metrics["accuracy"] == pytest.approx(2 / 3)
    assert "entity" not in found.text
    assert "exclude O" not in found.text


@pytest.mark.parametrize("predicted", ["O", "B-PER"])
def test_no_entity_to_find(predicted):
    found = tagging_report([["O", "O"]], [["O", predicted]], BIO)
    assert found.metrics["f1"] == found.metrics["entity_f1"] == found.metrics["macro_f1"] == 0.0
    assert found.metrics["accuracy"] == (1.0 if predicted == "O" else 0.5)


def test_tags_mark_spans_or_do_not():
    for tags, scheme in [(BIO, "BIO"), (["I-A"], "BIO"), (["O", "B-A", "S-B"], "IOBES"), (["L-A", "U-B"], "BILOU")]:
        assert tag_scheme(tags) == scheme
    for tags in (["O"], [], ["B-PER", "PER"], ["B-", "O"], ["B", "I"], ["S-A", "L-A"], ["NN", "S-A"]):
        assert tag_scheme(tags) is None


@pytest.mark.parametrize(("end", "single"), ["ES", "LU"])
def test_iobes_and_bilou_are_read_strictly(end, single):
    gold = [["B-ORG", "I-ORG", "E-ORG", "O", "S-LOC"], ["S-PER", "O", "B-LOC", "E-LOC", "O"]]
    # Found: S-LOC and S-PER; wrong: an ORG that is cut short; a B-LOC without its end is no entity.
    guess = [["B-ORG", "E-ORG", "O", "O", "S-LOC"], ["S-PER", "O", "B-LOC", "I-LOC", "O"]]
    gold, guess = (
        [[tag.replace("E-", f"{end}-").replace("S-", f"{single}-") for tag in t] for t in s] for s in (gold, guess)
    )
    found = tagging_report(gold, guess)
    assert found.metrics["entity_precision"] == pytest.approx(2 / 3)
    assert found.metrics["entity_recall"] == 2 / 4
    assert found.metrics["f1"] == found.metrics["entity_f1"] == pytest.approx(4 / 7)
    assert found.metrics["micro_f1"] > found.metrics["f1"]
    assert tagging_report([["O", "B-A"]], [[f"{end}-A", "O"]]).metrics["entity_f1"] == 0.0  # no whole entity at all


def test_tables_have_types_together_and_given_labels_first():
    tags = [["O", "I-PER", "B-LOC", "B-PER", "I-LOC"]]
    assert tagging_report(tags, tags).labels == BIO
    assert tagging_report(tags, tags, ["O", "B-X"]).labels == ("O", "B-X", *BIO[:-1])


def test_sentences_of_other_lengths_are_refused():
    with pytest.raises(UserError, match="sentence 2 has 2 gold tags and 1 predicted ones"):
        tagging_report([["A"], ["A", "B"]], [["A"], ["A"]])
    with pytest.raises(UserError, match="no examples"):
        tagging_report([[]], [[]])


# --- an answer a question ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("answer", "words"),
    [
        ("The  Cat's\ta-B, an ox!", ["cats", "ab", "ox"]),
        ("10 a.m.", ["10", "am"]),  # punctuation goes before articles do
        ("Theatre and Anthem", ["theatre", "and", "anthem"]),
        ("“Ünï” 中文", ["“ünï”", "中文"]),  # ASCII punctuation only
        ("x–the–y", ["x–", "–y"]),  # an article leaves a space
        ("the a.", []),
    ],
)
def test_words_of_an_answer(answer, words):
    assert answer_words(answer) == words


@pytest.mark.parametrize(
    ("answers", "guess", "exact_match", "f1"),
    [
        (["Denver Broncos"], "the DENVER broncos.", 1, 1),
        (["Denver Broncos"], "Denver", 0, 2 / 3),
        (["Denver", "Denver Broncos"], "Denver", 1, 1),  # the best of the gold answers
        (["a b c d", "x y"], "b c x y", 0, 2 * 2 / (2 + 4)),  # "a" is an article
        (["x x y"], "x x x", 0, 2 * 2 / 6),  # a word counts as often as both have it
        (["Denver"], "Boston", 0, 0),
        (["Denver"], "", 0, 0),
        ([], "", 1, 1),  # no answer
        ([], "Denver", 0, 0),
        (["the", "Denver"], "", 0, 0),  # of the gold answers one has words: those without are none
    ],
)
def test_question_answering_by_hand(answers, guess, exact_match, f1):
    found = question_answering_report([answers], [guess])
    assert found.metrics == pytest.approx({"exact_match": exact_match, "f1": f1})


def test_question_answering_is_the_mean_over_questions():
    found = question_answering_report([["x y"], ["z"]], ["x", "z"])
    assert found.metrics == pytest.approx({"exact_match": 1 / 2, "f1": (2 / 3 + 1) / 2})


def test_a_report_is_not_changed_by_accident():
    found = TaskReport({}, "")
    with pytest.raises(AttributeError):
        found.text = "better"
