"""Scaling laws: the loss as a function of parameters, tokens and compute.

N is the number of parameters, D the number of training tokens and C the training FLOPs. Each law has the derivatives
by its parameters, so that `law_fits` can fit all of them with the same minimiser.
"""

import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]

SYMBOLS = {"parameters": "N", "tokens": "D", "flops": "C"}


@dataclasses.dataclass(frozen=True)
class Law:
    """A law y(x) of k parameters, fitted in log y.

    A fit uses internal parameters theta, whose objective is better conditioned: logarithms of coefficients.

    Attributes:
      equation: for people, with the symbols of SYMBOLS and `names`.
      source: the paper, and the section in it.
      columns: the inputs x, names of columns of runs.
      measured: the column y: "loss", or "surprise" (-log pass rate).
      names: the k parameters as they are published.
      log_value: (theta (k,), logs of inputs (n, columns)) to log y (n,) and its Jacobian (n, k).
      decode: theta to the published parameters.
      encode: the published parameters to theta.
      shift: theta of the same law when `shift` (columns,) is subtracted from the logs of inputs.
      starts: (starts, k), initial values of theta.
    """

    name: str
    equation: str
    source: str
    columns: tuple[str, ...]
    measured: str
    names: tuple[str, ...]
    log_value: Callable[[Floats, Floats], tuple[Floats, Floats]]
    decode: Callable[[Floats], dict[str, float]]
    encode: Callable[[Mapping[str, float]], Floats]
    shift: Callable[[Floats, Floats], Floats]
    starts: Floats

    def value(self, theta: Floats, inputs: Mapping[str, Any]) -> Floats:
        """Returns y at inputs, arrays of one shape (n,) by column, or numbers."""
        logs = np.log(np.stack([np.atleast_1d(np.asarray(inputs[name], np.float64)) for name in self.columns], axis=-1))
        return np.exp(self.log_value(theta, logs)[0])


def grid(*values: tuple[float, ...]) -> Floats:
    """Returns the product of initial values, (starts, k)."""
    return np.stack(np.meshgrid(*values, indexing="ij"), axis=-1).reshape(-1, len(values)).astype(np.float64)


# --- sums of power laws -----------------------------------------------------------------------------------------------


def _log_sum(terms: Floats) -> tuple[Floats, Floats]:
    """Returns log(sum(exp(terms))) (n,) of terms (n, t), and the share of each term (n, t)."""
    largest = terms.max(axis=1, keepdims=True)
    shares = np.exp(terms - largest)
    total = shares.sum(axis=1, keepdims=True)
    return (largest + np.log(total))[:, 0], shares / total


def _power_sum(
    name: str,
    equation: str,
    source: str,
    columns: tuple[str, ...],
    names: tuple[str, ...],
    starts: Floats,
    *,
    constant: bool,
    measured: str = "loss",
    decode: Callable[[Floats], dict[str, float]] | None = None,
    encode: Callable[[Mapping[str, float]], Floats] | None = None,
) -> Law:
    """Returns the law y = sum_i A_i / x_i^alpha_i, plus E if `constant`.

    theta is (log A_1, ..., log A_c, log E, alpha_1, ..., alpha_c): equation 10 of Hoffmann et al. 2022.
    """
    count, coefficients = len(columns), len(columns) + constant

    def log_value(theta: Floats, logs: Floats) -> tuple[Floats, Floats]:
        terms = np.broadcast_to(theta[:coefficients], (len(logs), coefficients)).copy()
        terms[:, :count] -= theta[coefficients:] * logs
        values, shares = _log_sum(terms)
        return values, np.concatenate([shares, -shares[:, :count] * logs], axis=1)

    def default_decode(theta: Floats) -> dict[str, float]:
        values = [*np.exp(theta[:coefficients]), *theta[coefficients:]]
        return dict(zip(names, map(float, values), strict=True))

    def default_encode(values: Mapping[str, float]) -> Floats:
        ordered = np.array([values[name] for name in names], np.float64)
        return np.concatenate([np.log(ordered[:coefficients]), ordered[coefficients:]])

    def shift(theta: Floats, by: Floats) -> Floats:
        moved = theta.copy()
        moved[:count] -= theta[coefficients:] * by
        return moved

    return Law(
        *(name, equation, source, columns, measured, names),
        *(log_value, decode or default_decode, encode or default_encode, shift, starts),
    )


def _kaplan(name: str, column: str, exponent: str, scale: str, section: str) -> Law:
    """Returns the law L(x) = (x_c / x)^alpha."""
    symbol = SYMBOLS[column]
    return _power_sum(
        name,
        f"L({symbol}) = ({scale} / {symbol})^{exponent}",
        f"Kaplan et al. 2020, {section}",
        (column,),
        (exponent, scale),
        grid((0.0, 2.0), (0.05, 0.3)),
        constant=False,
        decode=lambda theta: {exponent: float(theta[1]), scale: _exp(float(theta[0] / theta[1]))},
        encode=lambda values: np.array([values[exponent] * math.log(values[scale]), values[exponent]]),
    )


def _exp(value: float) -> float:
    """The exponential, at most 1e300: JSON has no infinity."""
    return math.exp(min(value, 690.0))


def _joint_kaplan() -> Law:
    """Returns Kaplan's law of parameters and tokens.

    theta is (u, v, r, alpha_D): log L = alpha_D log(exp(u - r log N) + exp(v - log D)), r = alpha_N / alpha_D.
    """

    def log_value(theta: Floats, logs: Floats) -> tuple[Floats, Floats]:
        u, v, ratio, alpha = theta
        total, shares = _log_sum(np.stack([u - ratio * logs[:, 0], v - logs[:, 1]], axis=1))
        jacobian = [alpha * shares[:, 0], alpha * shares[:, 1], -alpha * shares[:, 0] * logs[:, 0], total]
        return alpha * total, np.stack(jacobian, axis=1)

    def decode(theta: Floats) -> dict[str, float]:
        u, v, ratio, alpha = map(float, theta)
        return {"alpha_N": ratio * alpha, "N_c": _exp(u / ratio), "alpha_D": alpha, "D_c": _exp(v)}

    def encode(values: Mapping[str, float]) -> Floats:
        ratio = values["alpha_N"] / values["alpha_D"]
        return np.array([ratio * math.log(values["N_c"]), math.log(values["D_c"]), ratio, values["alpha_D"]])

    return Law(
        "kaplan",
        "L(N, D) = ((N_c / N)^(alpha_N / alpha_D) + D_c / D)^alpha_D",
        "Kaplan et al. 2020, equation 1.5",
        ("parameters", "tokens"),
        "loss",
        ("alpha_N", "N_c", "alpha_D", "D_c"),
        log_value,
        decode,
        encode,
        lambda theta, by: np.array([theta[0] - theta[2] * by[0], theta[1] - by[1], theta[2], theta[3]]),
        grid((15.0, 25.0, 35.0), (20.0, 30.0), (0.5, 1.0), (0.05, 0.1, 0.3)),
    )


# --- the laws ---------------------------------------------------------------------------------------------------------

LAWS = {
    law.name: law
    for law in (
        _power_sum(
            "chinchilla",
            "L(N, D) = E + A / N^alpha + B / D^beta",
            "Hoffmann et al. 2022, section 3.3",
            ("parameters", "tokens"),
            ("A", "B", "E", "alpha", "beta"),
            grid((0.0, 10.0, 20.0), (0.0, 10.0, 20.0), (0.0, 0.5), (0.0, 0.5, 1.0), (0.0, 0.5, 1.0)),
            constant=True,
        ),
        _joint_kaplan(),
        _kaplan(
            "kaplan_parameters", "parameters", "alpha_N", "N_c", "equation 1.1: converged models, N without embeddings"
        ),
        _kaplan("kaplan_tokens", "tokens", "alpha_D", "D_c", "equation 1.2: large models, early stopping"),
        _kaplan("kaplan_compute", "flops", "alpha_C", "C_c", "equation 1.3: compute-optimal models"),
        _power_sum(
            "compute",
            "L(C) = a C^b + c",
            "OpenAI 2023 (GPT-4), section 3.1",
            ("flops",),
            ("a", "c", "b"),
            grid((0.0, 5.0, 10.0, 20.0), (-1.0, 0.0, 0.5), (0.05, 0.15, 0.3, 0.5)),
            constant=True,
            decode=lambda theta: {"a": _exp(float(theta[0])), "b": -float(theta[2]), "c": _exp(float(theta[1]))},
            encode=lambda values: np.array([math.log(values["a"]), math.log(values["c"]), -values["b"]]),
        ),
        _power_sum(
            "pass_rate",
            "mean of -log(pass rate) over problems = alpha C^-k",
            "OpenAI 2023 (GPT-4), section 3.2",
            ("flops",),
            ("alpha", "k"),
            grid((0.0, 5.0, 10.0), (0.05, 0.2, 0.5)),
            constant=False,
            measured="surprise",
        ),
    )
}

# Published parameters, by a name for commands: the law, and its parameters. Kaplan's C_c is 3.1e8 petaflop/s-days.
PUBLISHED: dict[str, tuple[str, dict[str, float]]] = {
    "hoffmann": ("chinchilla", {"A": 406.4, "B": 410.7, "E": 1.69, "alpha": 0.33917, "beta": 0.28491}),
    "epoch": ("chinchilla", {"A": 482.01, "B": 2085.43, "E": 1.8172, "alpha": 0.3478, "beta": 0.3658}),
    "kaplan_parameters": ("kaplan_parameters", {"alpha_N": 0.076, "N_c": 8.8e13}),
    "kaplan_tokens": ("kaplan_tokens", {"alpha_D": 0.095, "D_c": 5.4e13}),
    "kaplan_compute": ("kaplan_compute", {"alpha_C": 0.050, "C_c": 3.1e8 * 8.64e19}),
}


def compute_optimal(parameters: Mapping[str, float], flops: float) -> tuple[float, float]:
    """Returns the N and D that minimise Chinchilla's law under C = 6 N D (Hoffmann et al. 2022, equation 4)."""
    alpha, beta = parameters["alpha"], parameters["beta"]
    scale = (alpha * parameters["A"] / (beta * parameters["B"])) ** (1 / (alpha + beta))
    size = scale * (flops / 6) ** (beta / (alpha + beta))
    return size, flops / (6 * size)
