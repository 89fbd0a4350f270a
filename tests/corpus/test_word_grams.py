"""Word n-grams: the hashes of whole arrays agree with words and grams found one by one."""

import numpy as np
import pytest

from gptjax.corpus import word_grams
from gptjax.corpus.word_grams import find_words, gram_hashes

TEXTS = [
    "The quick, brown fox -- it's HERE!\nIt’s  here, again: the quick brown fox.",
    "",
    " \t\n ... !?",
    "Ünïcode ÅNGSTRÖM straße; 東京は日本の首都です。 mixed東京text 42",
    "a b c d e f g " * 40,
]


def words_of(text: str) -> list[str]:
    """Splits at white space and drops punctuation; ideographs and kana are words."""
    found = []
    for token in text.split():
        letters = [character for character in token if character.isalnum()]
        word = ""
        for character in letters:
            if word_grams.WITHOUT_BLANKS and "\u3040" <= character <= "\u9fff":
                found += [word, character] if word else [character]
                word = ""
            else:
                word += character.lower()
        found += [word] if word else []
    return found


@pytest.mark.parametrize("text", TEXTS)
def test_equal_words_have_equal_hashes_and_different_ones_do_not(text: str) -> None:
    found, expected = find_words(text), words_of(text)
    assert len(found.hashes) == len(expected)
    by_word = dict(zip(expected, found.hashes.tolist(), strict=True))
    assert [by_word[word] for word in expected] == found.hashes.tolist()
    assert len(set(by_word.values())) == len(by_word)
    for word, begin, end in zip(expected, found.begins.tolist(), found.ends.tolist(), strict=True):
        assert words_of(text[begin:end]) == [word]


def test_hashes_do_not_depend_on_the_text_around_or_on_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    text = " ".join(TEXTS)
    whole = find_words(text)
    monkeypatch.setattr(word_grams, "_CHUNK", 64)
    for one, other in zip(whole, find_words(text), strict=True):
        np.testing.assert_array_equal(one, other)
    assert find_words("fox").hashes[0] in whole.hashes


def test_grams_are_equal_where_the_words_are() -> None:
    first, second = (find_words(text).hashes for text in ("a b c d e", "x a b c d"))
    assert gram_hashes(first, 3)[:2].tolist() == gram_hashes(second, 3)[1:].tolist()
    assert gram_hashes(find_words("b a").hashes, 2) != gram_hashes(find_words("a b").hashes, 2)
    assert gram_hashes(first, 6).shape == (0,)
