"""BLEU and ROUGE against their definitions, and invariants for any texts."""

import math
import subprocess
import sys

import pytest
import sacrebleu
from hypothesis import given
from hypothesis import strategies as st

from gptjax.data.words import words
from gptjax.metrics.text import bleu, bleu_of_sums, bleu_terms, corpus_bleu, distinct, rouge, rouge_l

TEXTS = st.text(st.sampled_from("ab cde.好的,Ä_"), max_size=20)


def test_bleu_by_hand():
    # Of 6 words 5 are the reference's, of 5 pairs 4, of 4 triples 3, of 3 quadruples 2; both are as long.
    answer, reference = "the cat sat on the rug", "the cat sat on the mat"
    assert bleu(answer, reference) == pytest.approx((5 / 6 * 4 / 5 * 3 / 4 * 2 / 3) ** (1 / 4))
    # Three words of five: all right, and short. There are no quadruples, so the mean is of three orders.
    assert bleu("a b c", "a b c d e") == pytest.approx(math.exp(1 - 5 / 3))
    # No pair and no triple is right: half of one, then a quarter of one.
    assert bleu("a c b", "a b c") == pytest.approx((3 / 3 * 0.5 / 2 * 0.25 / 1) ** (1 / 3))


def test_corpus_bleu_counts_all_pairs_together():
    answers, references = ["a b c d e", "a b c x"], ["a b c d e", "a b c d"]
    # Matches of 1 to 4 words: 5+3 of 9, 4+2 of 7, 3+1 of 5, 2+0 of 3.
    score, signature = corpus_bleu(answers, references)
    assert score == pytest.approx((8 / 9 * 6 / 7 * 4 / 5 * 2 / 3) ** (1 / 4))
    assert "tok:13a" in signature
    assert "version" in signature


def test_rouge_by_hand():
    # Words in common: the, cat, on, mat (the second "the" too); pairs: "the mat" alone; in order: the cat on the mat.
    found = rouge("the cat lay on the mat", "the black cat sat on the mat")
    assert found["rouge1"] == pytest.approx(2 * (5 / 6 * 5 / 7) / (5 / 6 + 5 / 7))
    assert found["rouge2"] == pytest.approx(2 * (2 / 5 * 2 / 6) / (2 / 5 + 2 / 6))
    assert found["rougeL"] == rouge_l("the cat lay on the mat", "the black cat sat on the mat")
    assert rouge_l("b a", "a b") == pytest.approx(1 / 2)
    assert rouge("b a", "a b")["rouge1"] == 1.0


def test_other_scripts_count():
    """The packages' own words are of the letters a to z, or all that is between two blanks."""
    assert words("Ärger, 2 großen_Tagen") == ["ärger", "2", "großen", "tagen"]
    assert words("我是AI。はい") == ["我", "是", "ai", "は", "い"]
    for answer, reference in (("我是一个学生", "我是一个老师"), ("так и есть", "так и было")):
        assert 0.3 < rouge_l(answer, reference) < 1
        assert 0.3 < bleu(answer, reference) < 1
    score, signature = corpus_bleu(["我是一个学生"], ["我是一个老师"])
    assert score > 0.3
    assert "tok:zh" in signature


def test_japanese_is_compared_by_characters():
    answer, reference = "これはとてもおもしろいです", "これはたいへんおもしろいです"
    score, signature = corpus_bleu([answer], [reference])
    assert "tok:char" in signature
    by_blanks, _ = corpus_bleu([" ".join(answer)], [" ".join(reference)])
    assert score == pytest.approx(by_blanks)
    assert bleu(answer, reference) > 0.4


@given(TEXTS, TEXTS)
def test_ranges(answer, reference):
    assert 0 <= bleu(answer, reference) <= 1
    assert all(0 <= value <= 1 for value in rouge(answer, reference).values())
    if words(answer):
        assert bleu(answer, answer) == pytest.approx(1)
        assert rouge_l(answer, answer) == pytest.approx(1)


@pytest.mark.parametrize("empty", ["", " \n", "..."])
def test_an_empty_answer_is_worth_nothing(empty):
    for metric in (bleu, rouge_l):
        assert metric(empty, "a b") == metric("a b", empty) == 0


def test_distinct():
    assert distinct(["a b a", "A, b"], 1) == 2 / 5
    assert distinct(["a b a", "a b"], 2) == 2 / 3  # no pair goes from one text into the next
    assert distinct(["a", ""], 2) == distinct([], 1) == 0


def test_nothing_of_jax_and_nothing_slow_before_it_is_used():
    slow = "[name for name in ('jax', 'sacrebleu', 'rouge_score', 'nltk') if name in sys.modules]"
    code = f"import sys, gptjax.metrics.text; print({slow})"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout == "[]\n"


def test_bleu_of_several_references_is_that_of_sacrebleu():
    """Captions have several references, and not all images equally many."""
    completions = ["a cat on a mat", "two dogs run over the grass", "a red bus"]
    references = [
        ["a cat sits on a mat", "there is a cat on the mat"],
        ["two dogs are running over grass"],
        ["a red bus in a street", "a bus that is red", "red bus"],
    ]
    found = bleu_of_sums(bleu_terms(completions, references).sum(axis=0, keepdims=True))[0]
    streams = [[refs[i] if i < len(refs) else None for refs in references] for i in range(3)]
    assert found == pytest.approx(sacrebleu.corpus_bleu(completions, streams).score / 100)
    first = bleu_terms(completions, [refs[0] for refs in references])
    assert found > bleu_of_sums(first.sum(axis=0, keepdims=True))[0]
