"""Keys of documents that depend on their text only, and random numbers derived from them."""

import hashlib

import numpy as np
import numpy.typing as npt

from gptjax.corpus.word_grams import mixed


def content_keys(text: str) -> npt.NDArray[np.uint64]:
    """Returns a hash of 128 bits of a text, uint64 (2,)."""
    return np.frombuffer(hashlib.blake2b(text.encode(), digest_size=16).digest(), "<u8")


def uniform(key: int, seed: int) -> float:
    """Returns a random number of U[0, 1) for a key, independent for each seed."""
    seeds = mixed(np.array([seed % 2**64], np.uint64))
    return int(mixed(np.array([key], np.uint64) ^ seeds)[0] >> np.uint64(11)) / 2**53
