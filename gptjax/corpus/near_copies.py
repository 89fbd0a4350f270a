"""MinHash signatures of documents and their bands for locality-sensitive hashing (Broder 1997; Leskovec et al., ch. 3).

Two documents are near copies if the Jaccard similarity of their sets of 5-word shingles is at least a threshold. Each
value of a signature is equal for two documents with the probability of their similarity. Documents that agree in all
rows of a band are candidates, and the share of equal values of the signatures decides.
"""

import functools

import numpy as np
import numpy.typing as npt

from gptjax.corpus.word_grams import Hashes, gram_hashes, mixed

Signatures = npt.NDArray[np.uint32]

SHINGLE_WORDS = 5
MAX_HASHES = 128
FOUND = 0.99  # least probability that a pair of the threshold's similarity is a candidate
MARGIN = 2.0  # standard errors of the estimate below the threshold that still count as a near copy
_CHUNK = 4096  # shingles whose permutations are computed at once, in an array of 2 MB that is used again


class Bands:
    """Layout of a signature.

    Attributes:
      rows: hash values of a band.
      bands: number of bands.
      least_equal: number of equal values of two signatures from which on they are of near copies.
    """

    def __init__(self, similarity: float) -> None:
        """Chooses as many rows as find a pair of `similarity` with a probability of `FOUND`."""
        self.rows = max(
            rows
            for rows in range(1, MAX_HASHES + 1)
            if rows == 1 or 1 - (1 - similarity**rows) ** (MAX_HASHES // rows) >= FOUND
        )
        self.bands = MAX_HASHES // self.rows
        self.num_hashes = self.rows * self.bands
        error = (similarity * (1 - similarity) / self.num_hashes) ** 0.5
        self.least_equal = int(np.ceil((similarity - MARGIN * error) * self.num_hashes))

    def signature(self, words: Hashes) -> Signatures:
        """Returns the signature of the words of a document, uint32 (hashes,); the words must not be empty.

        Its values are those of `datasketch.MinHash` with seed 1 and the scheme affine32: the minima over all shingles s
        of a_k s + b_k modulo 2**32.
        """
        shingles = _premixed((gram_hashes(words, min(SHINGLE_WORDS, len(words))) >> np.uint64(32)).astype(np.uint32))
        factors, terms = _permutations(self.num_hashes)
        signature = np.full(self.num_hashes, 2**32 - 1, np.uint32)
        for start in range(0, len(shingles), _CHUNK):
            chunk = shingles[start : start + _CHUNK]
            permuted = self._buffer[: self.num_hashes * len(chunk)].reshape(self.num_hashes, len(chunk))
            np.multiply(factors[:, None], chunk, out=permuted)
            np.add(permuted, terms[:, None], out=permuted)
            np.minimum(signature, permuted.min(1), out=signature)
        return signature

    @functools.cached_property
    def _buffer(self) -> Signatures:
        return np.empty(self.num_hashes * _CHUNK, np.uint32)

    def keys(self, signatures: Signatures) -> Hashes:
        """Returns the keys of the bands of signatures (documents, hashes), uint64 (bands, documents); none is 0."""
        rows = signatures.reshape(len(signatures), self.bands, self.rows).astype(np.uint64)
        keys = np.zeros((len(signatures), self.bands), np.uint64)
        for row in range(self.rows):
            keys = mixed(keys ^ rows[:, :, row]) + np.uint64(row + 1)
        return np.maximum(np.ascontiguousarray(keys.T), 1)


@functools.cache
def _permutations(num_hashes: int) -> tuple[Signatures, Signatures]:
    """Factors a and terms b of datasketch's permutations of 32-bit integers, uint32 (hashes,) each."""
    from datasketch import MinHash

    factors, terms = MinHash(num_hashes, seed=1, scheme="affine32").permutations
    return factors, terms


def _premixed(values: Signatures) -> Signatures:
    """Applies the finaliser of MurmurHash3, which datasketch applies before the permutations, to uint32 values."""
    values = (values ^ (values >> np.uint32(16))) * np.uint32(0x85EBCA6B)
    values = (values ^ (values >> np.uint32(13))) * np.uint32(0xC2B2AE35)
    return values ^ (values >> np.uint32(16))
