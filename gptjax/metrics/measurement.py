"""Means and ratios of scores with standard errors, for independent examples."""

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np


class Measurement(NamedTuple):
    """A value, its standard error (None: no estimate), and the number of examples."""

    value: float
    stderr: float | None
    n: int


def mean(values: Sequence[float]) -> Measurement:
    """Computes the mean; the standard error is the sample standard deviation / sqrt(n)."""
    n = len(values)
    return Measurement(float(np.mean(values)), float(np.std(values, ddof=1)) / math.sqrt(n) if n > 1 else None, n)


def ratio(numerators: Sequence[float], denominators: Sequence[float]) -> Measurement:
    """Computes sum(numerators) / sum(denominators) of independent pairs, such as nats and tokens of documents.

    The standard error is that of the ratio estimator (Cochran 1977, section 2.11).
    """
    y, x = np.asarray(numerators, np.float64), np.asarray(denominators, np.float64)
    value, n = float(y.sum() / x.sum()), len(x)
    if n < 2:
        return Measurement(value, None, n)
    spread = math.sqrt(float(np.sum((y - value * x) ** 2)) * n / (n - 1))
    return Measurement(value, spread / float(x.sum()), n)


def exponential(log: Measurement) -> Measurement:
    """Computes exp of a measurement, with the standard error to first order; infinity on overflow."""
    try:
        value = math.exp(log.value)
    except OverflowError:
        value = math.inf
    return log._replace(value=value, stderr=None if log.stderr is None else value * log.stderr)


def weighted_mean(measured: Sequence[Measurement], weights: Sequence[float]) -> Measurement:
    """Computes the mean of independent measurements by weights that sum to 1; n is the number of all their examples."""
    value = math.fsum(w * m.value for w, m in zip(weights, measured, strict=True))
    errors = [m.stderr for m in measured if m.stderr is not None]
    known = len(errors) == len(measured)
    stderr = math.hypot(*(w * e for w, e in zip(weights, errors, strict=True))) if known else None
    return Measurement(value, stderr, sum(m.n for m in measured))


def scaled(measured: Measurement, factor: float) -> Measurement:
    """Multiplies a measurement by a constant, such as a change of unit."""
    stderr = None if measured.stderr is None else measured.stderr * factor
    return measured._replace(value=measured.value * factor, stderr=stderr)
