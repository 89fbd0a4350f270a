"""Bootstrap intervals of scores, and paired tests of the difference between two scores of the same examples.

A score is a function of sums over examples, such as a mean, a ratio, a perplexity or BLEU, so it can be computed for
any resampled set of examples from what each example adds to the sums (Efron and Tibshirani 1993, chapter 13; for BLEU
Koehn 2004). Equal examples are interchangeable: only the counts of distinct ones are drawn, which for accuracies are
two numbers a resample.
"""

import dataclasses
import math
from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

import numpy as np
import numpy.typing as npt

from gptjax.metrics.text import bleu_of_sums

Form = Literal["ratio", "exponential", "bleu"]
CONFIDENCE = 0.95
RESAMPLES = 5000
RESAMPLING_SEED = 0
_CHUNK = 2**22  # counts drawn at a time

Array = npt.NDArray[np.float64]


@dataclasses.dataclass(frozen=True)
class Sample:
    """What each example adds to a score.

    The score is the sum over strata of weight * ratio, where ratio is the quotient of the sums of a stratum's two
    columns; `form` "exponential" is exp of that, and "bleu" is corpus BLEU of the sums of ten columns (see
    `gptjax.metrics.text.bleu_terms`), of one stratum of weight 1.

    Attributes:
      strata: float64 (examples, columns) of each stratum; strata are sampled independently of each other.
      weights: weight of each stratum.
    """

    strata: tuple[Array, ...] = dataclasses.field(compare=False, repr=False)
    weights: tuple[float, ...] = (1.0,)
    form: Form = "ratio"

    @property
    def value(self) -> float:
        """The score of the examples themselves."""
        return float(self.scores([terms.sum(0)[None] for terms in self.strata])[0])

    def scores(self, sums: Sequence[Array]) -> Array:
        """Computes scores from sums over examples, float64 (resamples, columns) of each stratum; NaN where undefined.

        Returns:
          float64 (resamples,).
        """
        if self.form == "bleu":
            return bleu_of_sums(sums[0])
        with np.errstate(all="ignore"):  # a resample may lack all examples with a denominator
            mixed = sum(weight * part[:, 0] / part[:, 1] for weight, part in zip(self.weights, sums, strict=True))
            return np.exp(mixed) if self.form == "exponential" else np.asarray(mixed)

    @property
    def is_binary(self) -> bool:
        """Whether the score is the share of examples with the value 1, where others have 0."""
        if self.form != "ratio" or len(self.strata) > 1 or self.weights != (1.0,):
            return False
        terms = self.strata[0]
        return bool(np.all((terms[:, 1] == 1) & ((terms[:, 0] == 0) | (terms[:, 0] == 1))))


def ratio_sample(numerators: Sequence[float] | Array, denominators: Sequence[float] | Array) -> Sample:
    """Returns the sample of sum(numerators) / sum(denominators)."""
    return Sample((np.stack([np.asarray(numerators, np.float64), np.asarray(denominators, np.float64)], axis=1),))


def bootstrap_interval(sample: Sample) -> tuple[float, float] | None:
    """Computes the percentile bootstrap interval of a score, at CONFIDENCE, over examples.

    Where all examples are right, or all wrong, each resample equals the sample: then the interval is the exact one of
    a binomial proportion (Clopper and Pearson 1934).

    Returns:
      The interval; None where it cannot be estimated, from a single example or from equal ones.
    """
    total = sum(map(len, sample.strata))
    if sample.is_binary and sample.value in (0, 1):
        reach = ((1 - CONFIDENCE) / 2) ** (1 / total)
        return (reach, 1.0) if sample.value == 1 else (0.0, 1 - reach)
    if total < 2:
        return None
    rng = np.random.default_rng(RESAMPLING_SEED)
    scores = sample.scores([_resampled_sums(terms, rng) for terms in sample.strata])
    low, high = _percentiles(scores)
    return None if not math.isfinite(high - low) or low == high else (low, high)


class PairedTest(NamedTuple):
    """The difference of a score between two models on the same examples.

    Attributes:
      value: difference of the scores.
      interval: percentile bootstrap interval at CONFIDENCE; None: there is no estimate.
      p_value: two-sided p-value of the hypothesis that the models are exchangeable.
      test: "McNemar" for the exact test of shares (McNemar 1947), "randomization" for others.
    """

    value: float
    interval: tuple[float, float] | None
    p_value: float
    test: Literal["McNemar", "randomization"]


def paired_test(sample: Sample, baseline: Sample) -> PairedTest:
    """Tests the difference `sample` - `baseline` of two scores of the same examples, in the same order.

    The bootstrap draws examples, with both models' terms. The randomization test swaps the two models' terms of each
    example with probability 1/2 (Riezler and Maxwell 2005, section 4.2).

    Raises:
      ValueError: the samples differ in their form or their number of examples.
    """
    shapes = [(each.form, each.weights, [terms.shape for terms in each.strata]) for each in (sample, baseline)]
    if shapes[0] != shapes[1]:
        raise ValueError("the samples differ in their form or their number of examples")
    rng = np.random.default_rng(RESAMPLING_SEED)
    pairs = [np.concatenate(both, axis=1) for both in zip(sample.strata, baseline.strata, strict=True)]
    value = sample.value - baseline.value
    drawn = [_resampled_sums(pair, rng) for pair in pairs]
    low, high = _percentiles(_difference(sample, drawn))
    known = math.isfinite(high - low) and sum(map(len, pairs)) > 1
    interval = (low, high) if known else None
    if sample.is_binary and baseline.is_binary:
        from scipy.stats import binomtest

        gained = pairs[0][:, 0] - pairs[0][:, 2]
        better, worse = int((gained > 0).sum()), int((gained < 0).sum())
        p_value = float(binomtest(better, better + worse).pvalue) if better + worse else 1.0
        return PairedTest(value, interval, p_value, "McNemar")
    swapped = _difference(sample, [_swapped_sums(pair, rng) for pair in pairs])
    reached = int((np.abs(swapped) >= abs(value) - 1e-12 * max(1, abs(sample.value))).sum())
    return PairedTest(value, interval, (1 + reached) / (1 + RESAMPLES), "randomization")


def holm(p_values: Sequence[float]) -> list[float]:
    """Returns p-values adjusted for their number, by Holm 1979: comparable to the level of all tests together."""
    adjusted, highest = [0.0] * len(p_values), 0.0
    for rank, index in enumerate(sorted(range(len(p_values)), key=lambda i: p_values[i])):
        highest = max(highest, min(1.0, p_values[index] * (len(p_values) - rank)))
        adjusted[index] = highest
    return adjusted


def _difference(form: Sample, sums: Sequence[Array]) -> Array:
    """Differences of the scores of the first and the second half of the columns."""
    half = sums[0].shape[1] // 2
    return form.scores([part[:, :half] for part in sums]) - form.scores([part[:, half:] for part in sums])


def _percentiles(scores: Array) -> tuple[float, float]:
    tail = (1 - CONFIDENCE) / 2
    low, high = np.percentile(scores, [100 * tail, 100 * (1 - tail)])
    return float(low), float(high)


def _resampled_sums(terms: Array, rng: np.random.Generator) -> Array:
    """Column sums of RESAMPLES samples of as many rows, drawn with replacement, float64 (RESAMPLES, columns)."""
    rows, counts = np.unique(terms, axis=0, return_counts=True)
    shares = counts / len(terms)
    return np.concatenate([rng.multinomial(len(terms), shares, size) @ rows for size in _sizes(len(rows))])


def _swapped_sums(pairs: Array, rng: np.random.Generator) -> Array:
    """Column sums of RESAMPLES samples in which the halves of each row are swapped with probability 1/2."""
    rows, counts = np.unique(pairs, axis=0, return_counts=True)
    swapped = np.roll(rows, rows.shape[1] // 2, axis=1)
    parts: list[Any] = []
    for size in _sizes(len(rows)):
        chosen = rng.binomial(counts, 0.5, (size, len(rows)))
        parts.append(chosen @ swapped + (counts - chosen) @ rows)
    return np.concatenate(parts)


def _sizes(rows: int) -> list[int]:
    """Numbers of resamples that are computed together; their sum is RESAMPLES."""
    most = max(1, _CHUNK // rows)
    return [min(most, RESAMPLES - start) for start in range(0, RESAMPLES, most)]
