"""Scores of short answers, against values by hand and the definitions of the benchmarks."""

import itertools

import pytest

from gptjax.metrics.answers import (
    drop,
    exact_match,
    final_number,
    open_match,
    pass_at_k,
    squad,
    squad_normalised,
    stated_number,
    summary_rouge,
    token_f1,
    trivia_match,
)


@pytest.mark.parametrize(
    ("metric", "completion", "references", "expected"),
    [
        (exact_match, " Paris\n", ["Paris"], 1),
        (exact_match, "paris", ["Paris"], 0),
        (trivia_match, " J.W. Goethe!", ["Goethe", "jw goethe"], 1),
        (trivia_match, "The Beatles", ["Beatles"], 0),
        (open_match, "The Beatles", ["beatles"], 1),
        (open_match, "Banana", ["na na"], 0),
        (open_match, "an apple", ["apple"], 1),
    ],
)
def test_exact_matches(metric, completion, references, expected):
    assert metric(completion, references) == {"exact_match": expected}


def test_squad_is_that_of_the_official_evaluation():
    assert squad_normalised("The  cat's, a \n Hat!") == "cats hat"
    assert token_f1("the cat sat", "cat sat down") == pytest.approx(2 / 3 * 1.2)  # 2 of 2 and 2 of 3 words
    assert token_f1("to be or not to be", "to be") == pytest.approx(2 * (2 / 6) * 1 / (2 / 6 + 1))
    assert squad("in Rome", ["Rome", "In Rome."]) == {"exact_match": 1, "f1": 1}
    assert squad("Rome", ["Paris", "of Rome"]) == {"exact_match": 0, "f1": pytest.approx(2 / 3)}


@pytest.mark.parametrize(("completion", "right"), [("", 1), (" Unanswerable.", 1), ("the", 1), ("Rome", 0)])
def test_a_question_without_an_answer(completion, right):
    assert squad(completion, []) == {"exact_match": right, "f1": right}
    assert squad(completion, ["Paris"]) == {"exact_match": 0, "f1": 0}


@pytest.mark.parametrize(
    ("completion", "references", "match", "f1"),
    [
        ("3", ["3"], 1, 1),
        (" 3.0 yards", ["3 yards"], 1, 1),
        ("4 yards", ["3 yards"], 0, 0),  # another number
        ("3 miles", ["3"], 0, 0.67),
        ("Tom Brady", [("Tom Brady", "Peyton Manning")], 0, 0.5),  # one of two spans
        ("two-yard run", ["two yard run"], 1, 1),
        ("the end", ["5", "end"], 1, 1),
        ("x", [""], 0, 0),
    ],
)
def test_drop(completion, references, match, f1):
    assert drop(completion, references) == {"exact_match": match, "f1": f1}


@pytest.mark.parametrize(
    ("metric", "completion", "strict", "flexible"),
    [
        (final_number, " So 3 + 4 = 7.\n#### 7", 1, 1),
        (final_number, "#### 1,007 and 7", 0, 1),
        (final_number, "It is $7.", 0, 1),
        (final_number, "7 or 8", 0, 0),
        (final_number, "seven", 0, 0),
        (stated_number, " 3 + 4 = 7. The answer is 7.", 1, 1),
        (stated_number, "The answer is 8. No, 7", 0, 1),
        (stated_number, "#### 7", 0, 1),
    ],
)
def test_numbers(metric, completion, strict, flexible):
    expected = {"exact_match_strict": strict, "exact_match_flexible": flexible}
    assert metric(completion, ["3 + 4 = <<3+4=7>>7\n#### 7"]) == expected


def test_numbers_of_a_reference_with_separators():
    assert final_number("#### 1234", ["#### 1,234"])["exact_match_strict"] == 1
    assert stated_number("The answer is $70,000.", ["#### 70000"])["exact_match_flexible"] == 1


def test_rouge_stems_words_and_takes_the_best_reference():
    assert summary_rouge("dogs ran", ["a cat", "the dog ran"]) == {
        "rouge1": pytest.approx(0.8),  # 2 of 2 and 2 of 3 words
        "rouge2": pytest.approx(2 / 3),
        "rougeL": pytest.approx(0.8),
    }


def test_pass_at_k_is_the_share_of_subsets_with_a_correct_sample():
    n = 6
    for correct, k in itertools.product(range(n + 1), range(1, n + 1)):
        subsets = list(itertools.combinations(range(n), k))
        expected = sum(any(sample < correct for sample in subset) for subset in subsets) / len(subsets)
        assert pass_at_k(n, correct, k) == pytest.approx(expected)
