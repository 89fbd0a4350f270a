"""Scores to numbers, each with its standard error where the examples are independent draws."""

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np


class Measurement(NamedTuple):
    """A value, its standard error (None where there is no estimate of it), and of how many examples it is."""

    value: float
    stderr: float | None
    n: int


def mean(values: Sequence[float]) -> Measurement:
    """The mean; its standard error is the sample's standard deviation / sqrt(n)."""
    n = len(values)
    return Measurement(float(np.mean(values)), float(np.std(values, ddof=1)) / math.sqrt(n) if n > 1 else None, n)


def ratio(numerators: Sequence[float], denominators: Sequence[float]) -> Measurement:
    """sum(numerators) / sum(denominators) of independent pairs, such as nats and tokens of documents.

    The standard error is that of the ratio estimator (Cochran 1977, section 2.11).
    """
    y, x = np.asarray(numerators, np.float64), np.asarray(denominators, np.float64)
    value, n = float(y.sum() / x.sum()), len(x)
    if n < 2:
        return Measurement(value, None, n)
    spread = math.sqrt(float(np.sum((y - value * x) ** 2)) * n / (n - 1))
    return Measurement(value, spread / float(x.sum()), n)


def exponential(log: Measurement) -> Measurement:
    """exp of a measurement; the standard error to first order. Infinite where a float cannot hold it."""
    try:
        value = math.exp(log.value)
    except OverflowError:
        value = math.inf
    return log._replace(value=value, stderr=None if log.stderr is None else value * log.stderr)


def scaled(measured: Measurement, factor: float) -> Measurement:
    """A measurement in another unit."""
    stderr = None if measured.stderr is None else measured.stderr * factor
    return measured._replace(value=measured.value * factor, stderr=stderr)
