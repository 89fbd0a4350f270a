"""Tests of the difference between two groups of runs, paired over the seeds that both have."""

import dataclasses
import math
from collections.abc import Sequence

from gptjax.comparison.runs import Group, Quantity

CONFIDENCE = 0.95
RESAMPLES = 100_000  # of the permutation test: up to 16 seeds it is exact


@dataclasses.dataclass(frozen=True)
class Difference:
    """The mean difference of a quantity between two groups.

    Attributes:
      value: mean over the pairs.
      seeds: number of pairs.
      interval: the CONFIDENCE interval by Student's t with seeds - 1 degrees of freedom; None: fewer than two pairs.
      t_test, permutation: two-sided p-values; the permutation test flips the signs of the differences.
    """

    value: float
    seeds: int
    interval: tuple[float, float] | None = None
    t_test: float | None = None
    permutation: float | None = None

    @property
    def within_noise(self) -> bool:
        """Whether the interval contains 0; also where there is none."""
        return self.interval is None or self.interval[0] <= 0 <= self.interval[1]


def paired_difference(differences: Sequence[float]) -> Difference:
    """Tests whether the mean of paired differences is 0; at least one of them is given."""
    from scipy import stats

    n, value = len(differences), math.fsum(differences) / len(differences)
    if n < 2:
        return Difference(value, n)
    error = math.sqrt(math.fsum((d - value) ** 2 for d in differences) / (n - 1) / n)
    if error == 0:  # such as the same run twice: no test is defined
        return Difference(value, n, (value, value), float(value == 0), float(value == 0) or 2.0 ** (1 - n))
    half = float(stats.t.ppf((1 + CONFIDENCE) / 2, n - 1)) * error
    permutation = stats.permutation_test(
        (differences,), lambda d, axis: d.mean(axis), permutation_type="samples", n_resamples=RESAMPLES, rng=0
    )
    t_test = 2 * float(stats.t.sf(abs(value) / error, n - 1))
    return Difference(value, n, (value - half, value + half), t_test, float(permutation.pvalue))


def difference(group: Group, baseline: Group, quantity: Quantity) -> Difference | None:
    """Returns the difference of the last values, group - baseline; None: no seed has a value in both."""
    pairs = [
        (run.final(quantity), baseline.runs[seed].final(quantity))
        for seed, run in sorted(group.runs.items())
        if seed in baseline.runs
    ]
    found = [a - b for a, b in pairs if a is not None and b is not None]
    return paired_difference(found) if found else None
