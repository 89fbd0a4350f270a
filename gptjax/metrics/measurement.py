"""Means and ratios of scores with standard errors, for independent examples."""

import dataclasses
import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from gptjax.metrics.resampling import Sample, ratio_sample


class Measurement(NamedTuple):
    """A score of examples.

    Attributes:
      stderr: standard error; None: no estimate.
      n: number of examples.
      sample: what each example adds to the score; None: the score is no function of sums over examples.
    """

    value: float
    stderr: float | None
    n: int
    sample: Sample | None = None


def mean(values: Sequence[float]) -> Measurement:
    """Computes the mean; the standard error is the sample standard deviation / sqrt(n)."""
    n = len(values)
    stderr = float(np.std(values, ddof=1)) / math.sqrt(n) if n > 1 else None
    return Measurement(float(np.mean(values)), stderr, n, ratio_sample(values, np.ones(n)))


def ratio(numerators: Sequence[float], denominators: Sequence[float]) -> Measurement:
    """Computes sum(numerators) / sum(denominators) of independent pairs, such as nats and tokens of documents.

    The standard error is that of the ratio estimator (Cochran 1977, section 2.11).
    """
    y, x = np.asarray(numerators, np.float64), np.asarray(denominators, np.float64)
    value, n = float(y.sum() / x.sum()), len(x)
    if n < 2:
        return Measurement(value, None, n, ratio_sample(y, x))
    spread = math.sqrt(float(np.sum((y - value * x) ** 2)) * n / (n - 1))
    return Measurement(value, spread / float(x.sum()), n, ratio_sample(y, x))


def exponential(log: Measurement) -> Measurement:
    """Computes exp of a measurement, with the standard error to first order; infinity on overflow."""
    try:
        value = math.exp(log.value)
    except OverflowError:
        value = math.inf
    sample = None if log.sample is None else dataclasses.replace(log.sample, form="exponential")
    return Measurement(value, None if log.stderr is None else value * log.stderr, log.n, sample)


def weighted_mean(measured: Sequence[Measurement], weights: Sequence[float]) -> Measurement:
    """Computes the mean of independent means or ratios by weights that sum to 1; n is the number of all examples."""
    value = math.fsum(w * m.value for w, m in zip(weights, measured, strict=True))
    errors = [m.stderr for m in measured if m.stderr is not None]
    known = len(errors) == len(measured)
    stderr = math.hypot(*(w * e for w, e in zip(weights, errors, strict=True))) if known else None
    samples = [m.sample for m in measured if m.sample is not None]
    strata = tuple(terms for sample in samples for terms in sample.strata)
    sample = Sample(strata, tuple(map(float, weights))) if len(strata) == len(weights) else None
    return Measurement(value, stderr, sum(m.n for m in measured), sample)


def scaled(measured: Measurement, factor: float) -> Measurement:
    """Multiplies a mean or ratio by a constant, such as a change of unit."""
    stderr, sample = None if measured.stderr is None else measured.stderr * factor, measured.sample
    if sample is not None:
        sample = dataclasses.replace(sample, weights=tuple(weight * factor for weight in sample.weights))
    return Measurement(measured.value * factor, stderr, measured.n, sample)
