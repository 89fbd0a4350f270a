"""Hashes of word n-grams, computed for a whole document at once.

A word is lower-case, delimited by white space and without its punctuation, as in Brown et al. 2020, appendix C. In
scripts without blanks between words each character is a word. Hashes have 64 bits; equal grams have equal hashes on
every machine.
"""

import functools
import re
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from gptjax.data.words import WITHOUT_BLANKS

Hashes = npt.NDArray[np.uint64]

_CHUNK = 2**20  # characters hashed at once: temporary arrays take about 50 bytes for each
_PUNCTUATION, _LETTER, _SPACE, _WHOLE_WORD = range(4)
_LAST = 0x32400  # code points from here on are no letters
_BASE = 0x9E3779B97F4A7C15 | 1
_GRAM_BASE = np.uint64(0xD6E8FEB86659FD93)


class Words(NamedTuple):
    """The words of a text.

    Attributes:
      hashes: uint64 (words,).
      begins, ends: int64 (words,), range of the characters of each word in the text.
    """

    hashes: Hashes
    begins: npt.NDArray[np.int64]
    ends: npt.NDArray[np.int64]


def mixed(values: Hashes) -> Hashes:
    """Applies the finaliser of SplitMix64, a bijection, to uint64 values of any shape."""
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))


def find_words(text: str) -> Words:
    """Finds and hashes the words of a text."""
    found: list[Words] = []
    start = 0
    while start < len(text):
        stop = min(start + _CHUNK, len(text))
        if stop < len(text):  # a chunk ends after white space, unless it has none
            blank = max(text.rfind(" ", start, stop), text.rfind("\n", start, stop))
            stop = stop if blank < 0 else blank + 1
        found.append(_words(text[start:stop], start))
        start = stop
    if len(found) == 1:
        return found[0]
    if not found:
        return Words(np.zeros(0, np.uint64), np.zeros(0, np.int64), np.zeros(0, np.int64))
    return Words(*map(np.concatenate, zip(*found, strict=True)))


def gram_hashes(words: Hashes, n: int) -> Hashes:
    """Hashes the n-grams of consecutive words, uint64 (max(0, words - n + 1),)."""
    count = max(0, len(words) - n + 1)
    sums = words[:count].copy()
    for k in range(1, n):
        sums *= _GRAM_BASE
        sums += words[k : k + count]
    return mixed(sums)


def _words(text: str, offset: int) -> Words:
    kinds, letters = _tables()
    codes = np.minimum(np.frombuffer(text.encode("utf-32-le", "surrogatepass"), "<u4"), _LAST)
    kind = kinds[codes]
    (places,) = np.nonzero((kind == _LETTER) | (kind == _WHOLE_WORD))
    if len(places) == 0:
        return Words(np.zeros(0, np.uint64), np.zeros(0, np.int64), np.zeros(0, np.int64))
    # A word begins after white space, and at and after a character that is a word by itself.
    spaces = np.cumsum(kind == _SPACE, dtype=np.int32)[places]
    whole = kind[places] == _WHOLE_WORD
    begins = np.ones(len(places), bool)
    begins[1:] = (spaces[1:] != spaces[:-1]) | whole[1:] | whole[:-1]
    (first,) = np.nonzero(begins)
    last = np.append(first[1:], len(places)) - 1
    # Horner's polynomial of each word as the difference of two prefix sums, modulo 2**64.
    powers, inverses = _powers()
    sums = np.zeros(len(places) + 1, np.uint64)
    np.cumsum(letters[codes[places]] * powers[: len(places)], out=sums[1:])
    hashes = mixed((sums[last + 1] - sums[first]) * inverses[first])
    return Words(hashes, places[first] + offset, places[last] + 1 + offset)


@functools.cache
def _tables() -> tuple[npt.NDArray[np.uint8], Hashes]:
    """For each code point: its kind, and the hash of its lower case."""
    whole_word = re.compile(f"[{WITHOUT_BLANKS}]")
    kinds = np.full(_LAST + 1, _PUNCTUATION, np.uint8)
    lower = np.arange(_LAST + 1, dtype=np.uint64)
    for code in range(_LAST):
        character = chr(code)
        if character.isalnum():
            kinds[code] = _WHOLE_WORD if whole_word.match(character) else _LETTER
            lower[code] = ord(character.lower()[0])
        elif character.isspace():
            kinds[code] = _SPACE
    return kinds, mixed(lower + np.uint64(1))


@functools.cache
def _powers() -> tuple[Hashes, Hashes]:
    """The powers of the polynomial's base and of its inverse modulo 2**64, uint64 (_CHUNK,) each."""

    def of(base: int) -> Hashes:
        powers = np.full(_CHUNK, base, np.uint64)
        powers[0] = 1
        return np.cumprod(powers, dtype=np.uint64)

    return of(_BASE), of(pow(_BASE, -1, 2**64))
