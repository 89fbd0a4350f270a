"""De-tokenisers: conversion to plain text and back to the benchmark's own form."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gptjax.config import UserError
from gptjax.evaluation.detokenizers import DETOKENIZERS, get_detokenizer, original_tokens

PAIRS = {
    "wikitext": [
        (" = = Early life = = ", "== Early life =="),
        (" = Robert Boulter = ", "= Robert Boulter ="),
        (" ", ""),
        (" He played <unk> , a well @-@ known rôle ; it ran . ", "He played <unk>, a well-known rôle; it ran."),
        (" It cost $ 1 @,@ 234 @.@ 5 ( about 10 % ) ! ", "It cost $ 1,234.5 (about 10 %)!"),
        (' He said " I don \'t know . " and left . ', 'He said "I don\'t know." and left.'),
        (" Boulter 's role [ sic ] was : none ? ", "Boulter's role [sic] was: none?"),
        (" and so on . . . ", "and so on..."),
    ],
    "ptb": [
        (" mr. <unk> does n't own N shares ", "mr. <unk> doesn't own N shares"),
        (" the company 's profit rose N % to $ N million ", "the company's profit rose N% to $N million"),
    ],
    "lm1b": [
        ('" We didn \'t know , " he said .', '"We didn\'t know," he said.'),
        ("The bank 's loss ( see below ) .", "The bank's loss (see below)."),
    ],
    "lambada": [
        ("`` why ? '' she asked , but he did n't say", '"why?" she asked, but he didn\'t say'),
        ("he liked bob 's dog", "he liked bob's dog"),
    ],
}


@pytest.mark.parametrize(("name", "tokenised", "plain"), [(name, *pair) for name in PAIRS for pair in PAIRS[name]])
def test_examples_of_each_form(name, tokenised, plain):
    detokenizer = DETOKENIZERS[name]
    assert detokenizer.to_plain(tokenised) == plain
    assert detokenizer.to_tokenised(plain) == tokenised
    assert detokenizer.restored_lines(tokenised) == 1.0


def test_every_detokenizer_has_examples():
    assert set(PAIRS) == set(DETOKENIZERS)


WORDS = st.sampled_from(["a", "the", "<unk>", "Émile", "ran", "7", "x2", "St"])
MARKS = st.sampled_from([",", ".", ";", ":", "!", "?", "'s"])
NUMBERS = st.sampled_from(["3 @.@ 5", "1 @,@ 000 @,@ 000", "well @-@ known"])


def phrases(*, quotes: tuple[str, str], joined: st.SearchStrategy[str] | None) -> st.SearchStrategy[str]:
    """Lines as a benchmark has them: words and what is set apart, in any order that its tokeniser can produce."""
    word = st.one_of(WORDS, joined) if joined is not None else WORDS
    clause = st.tuples(word, st.lists(word, max_size=4), st.lists(MARKS, max_size=2)).map(
        lambda parts: " ".join([parts[0], *parts[1], *parts[2]])
    )
    quoted = st.tuples(clause, st.lists(MARKS, max_size=1)).map(
        lambda parts: " ".join([quotes[0], parts[0], quotes[1], *(mark for mark in parts[1] if mark != "'s")])
    )
    return st.lists(st.one_of(clause, quoted), min_size=1, max_size=4).map(" ".join)


@given(st.lists(st.one_of(phrases(quotes=('"', '"'), joined=NUMBERS), st.just("")), max_size=4))
def test_wikitext_comes_back(lines):
    text = "".join(f" {line} \n" if line else " \n" for line in lines)
    wikitext = DETOKENIZERS["wikitext"]
    assert wikitext.to_tokenised(wikitext.to_plain(text)).removesuffix(" ") == text
    assert wikitext.restored_lines(text or " ") == 1.0


@given(phrases(quotes=("(", ")"), joined=None))
def test_lm1b_comes_back(line):
    assert DETOKENIZERS["lm1b"].to_tokenised(DETOKENIZERS["lm1b"].to_plain(line)) == line


@given(phrases(quotes=("``", "''"), joined=None))
def test_lambada_comes_back(line):
    assert DETOKENIZERS["lambada"].to_tokenised(DETOKENIZERS["lambada"].to_plain(line)) == line


def test_what_does_not_come_back_is_measured():
    """A full stop that is part of a word would be set apart."""
    text = " Mr. Smith ran . \n He won . \n"
    assert DETOKENIZERS["wikitext"].to_plain(text) == "Mr. Smith ran.\nHe won.\n"
    assert DETOKENIZERS["wikitext"].restored_lines(text) == 0.5


def test_original_tokens_count_the_ends_of_lines():
    assert original_tokens(" a b , c \n \n d \n") == 5 + 3
    assert original_tokens("a b") == 3


def test_an_unknown_name():
    with pytest.raises(UserError, match="unknown detokenizer 'wiki': one of wikitext, ptb, lm1b, lambada"):
        get_detokenizer("wiki")
