"""Scores of answers, against values by hand and the papers' definitions."""

import pytest

from gptjax.metrics.visual_answers import (
    anls,
    choice_of,
    edit_distance,
    exact_match,
    normalised,
    relaxed_accuracy,
    vqa_accuracy,
)


@pytest.mark.parametrize(
    ("answer", "wanted"),
    [("The cat.", "cat"), ("Two dogs!", "2 dogs"), ("1,000", "1,000"), ("1.5 m", "1.5 m"), ("", "")],
)
def test_normalisation(answer, wanted):
    assert normalised(answer) == wanted
    assert exact_match(answer, [wanted, "x"]) == 1


def test_vqa_accuracy_leaves_out_each_person_once():
    assert vqa_accuracy("yes", ["yes"] * 10) == 1
    assert vqa_accuracy("yes", ["no"] * 10) == 0
    # 2 of 10 agree: without one of the two 1/3, without one of the others 2/3.
    expected = (2 * (1 / 3) + 8 * (2 / 3)) / 10
    assert vqa_accuracy("yes", ["yes"] * 2 + ["no"] * 8) == pytest.approx(expected)
    assert vqa_accuracy("Yes.", ["yes"]) == 1


def test_anls_counts_only_similar_answers():
    assert edit_distance("kitten", "sitting") == 3
    assert anls("kitten", ["sitting"]) == pytest.approx(1 - 3 / 7)
    assert anls("KITTEN ", ["kitten", "x"]) == 1
    assert anls("ab", ["xyz"]) == 0
    assert anls("ab", ["cb"]) == 0  # exactly half


@pytest.mark.parametrize(
    ("answer", "reference", "score"),
    [("104", "100", 1), ("106", "100", 0), ("0", "0.0", 1), ("1,050", "1000", 1), ("5%", "0.05", 1), ("Yes", "yes", 1)],
)
def test_relaxed_accuracy_of_numbers(answer, reference, score):
    assert relaxed_accuracy(answer, [reference]) == score


@pytest.mark.parametrize(
    ("answer", "choice"), [("B", 1), ("(A)", 0), ("B. dog", 1), ("A dog", 0), ("dog", 1), ("bird", None), ("C", None)]
)
def test_a_choice_is_named_by_letter_or_text(answer, choice):
    assert choice_of(answer, ["cat", "dog"]) == choice
