"""Fits scaling laws to runs: Huber loss of log residuals, L-BFGS from a grid of starts, bootstrap intervals.

Hoffmann et al. 2022, section 3.3 and appendix D.3; Besiroglu et al. 2024 ("Chinchilla Scaling: A replication attempt").
"""

import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from gptjax.config import UserError
from gptjax.scaling.laws import LAWS, PUBLISHED, Floats, Law, compute_optimal
from gptjax.scaling.run_table import RunTable

HUBER_DELTA = 1e-3
LEVEL = 0.95  # of all intervals
SAMPLES = 500  # bootstrap samples
ROUGH_STEPS, REFINED = 20, 5  # steps from each start; the number of results, the best ones, that are refined


@dataclasses.dataclass(frozen=True)
class Fit:
    """A fitted law.

    Attributes:
      law: the functional form.
      theta: (k,), its internal parameters.
      samples: (bootstrap samples, k), internal parameters of fits to resampled runs; none for published laws.
      residuals: (n,), log y - log prediction of the fitted runs, widened by sqrt(n / (n - k)).
      objective: sum of the Huber losses; NaN for published laws.
    """

    law: Law
    theta: Floats
    samples: Floats
    residuals: Floats
    objective: float = math.nan

    @property
    def parameters(self) -> dict[str, float]:
        return self.law.decode(self.theta)

    @property
    def intervals(self) -> dict[str, list[float]] | None:
        """The bootstrap interval of each parameter, [low, high]; None without samples."""
        if not len(self.samples):
            return None
        decoded = [self.law.decode(sample) for sample in self.samples]
        return {name: interval(np.array([sample[name] for sample in decoded])) for name in self.law.names}

    def predict(self, inputs: Mapping[str, float], seed: int = 0) -> tuple[float, list[float] | None]:
        """Returns y at one point, and the interval in which a new run's y is expected; None without samples.

        The interval has both the uncertainty of the fit (the bootstrap samples) and the spread of single runs around
        the law (a residual drawn for each sample).
        """
        value = float(self.law.value(self.theta, inputs)[0])
        if not len(self.samples):
            return value, None
        spread = np.random.default_rng(seed).choice(self.residuals, len(self.samples))
        values = np.array([self.law.value(sample, inputs)[0] for sample in self.samples])
        return value, interval(values * np.exp(spread))

    def optimum(self, flops: float) -> tuple[float, float]:
        """Returns the N and D with the lowest loss under C = 6 N D.

        Raises:
          UserError: the law is not one of parameters and tokens.
        """
        if self.law.columns != ("parameters", "tokens"):
            raise UserError(
                f"the law {self.law.name} has no optimal model size: fit chinchilla, kaplan, isoflop or envelope"
            )
        if self.law.name == "chinchilla":
            return compute_optimal(self.parameters, flops)
        from scipy.optimize import minimize_scalar

        def loss(log_size: float) -> float:
            size = math.exp(log_size)
            return float(self.law.value(self.theta, {"parameters": size, "tokens": flops / (6 * size)})[0])

        found = minimize_scalar(loss, bounds=(0.0, math.log(flops / 6)), method="bounded", options={"xatol": 1e-10})
        size = math.exp(float(found.x))
        return size, flops / (6 * size)

    def tree(self) -> dict[str, Any]:
        """Returns the fit for JSON; `fit_of_tree` reads it."""
        return {
            "law": self.law.name,
            "equation": self.law.equation,
            "source": self.law.source,
            "parameters": self.parameters,
            "intervals": self.intervals,
            "level": LEVEL,
            "objective": None if math.isnan(self.objective) else self.objective,
            "huber_delta": HUBER_DELTA,
            "samples": self.samples.tolist(),
            "residuals": self.residuals.tolist(),
        }


def interval(values: Floats) -> list[float]:
    """Returns the percentiles that enclose LEVEL of the values."""
    tail = 50 * (1 - LEVEL)
    return [float(value) for value in np.percentile(values, [tail, 100 - tail])]


def fit_of_tree(tree: Mapping[str, Any]) -> Fit:
    """Reads what `Fit.tree` returns; raises KeyError, TypeError or ValueError if it is something else."""
    law = LAWS[tree["law"]]
    samples = np.array(tree["samples"], np.float64).reshape(-1, len(law.names))
    residuals = np.array(tree["residuals"], np.float64)
    objective = math.nan if tree["objective"] is None else float(tree["objective"])
    theta = law.encode(tree["parameters"])
    if not (np.isfinite(theta).all() and np.isfinite(samples).all() and np.isfinite(residuals).all()):
        raise ValueError("it has numbers that are not finite")
    if residuals.ndim != 1 or (len(samples) and not len(residuals)):
        raise ValueError("its residuals are not a list of numbers")
    return Fit(law, theta, samples, residuals, objective)


def published(name: str) -> Fit:
    """Returns a law with published parameters, without bootstrap samples; KeyError for another name."""
    law_name, parameters = PUBLISHED[name]
    law = LAWS[law_name]
    return Fit(law, law.encode(parameters), np.zeros((0, len(law.names))), np.zeros(0))


# --- fitting ----------------------------------------------------------------------------------------------------------


def fit_law(law: Law, runs: RunTable, samples: int = SAMPLES, seed: int = 0) -> Fit:
    """Fits a law to runs.

    Args:
      runs: one row for each run, with the columns of the law.
      samples: number of bootstrap samples: the runs, resampled with replacement and fitted again from the optimum.
      seed: of the resampling.

    Raises:
      UserError: too few runs or too few values of an input; losses that do not decrease.
    """
    import scipy.optimize  # noqa: F401  (limits apply to the libraries that are loaded)
    from threadpoolctl import threadpool_limits

    check_runs(law, runs)
    logs = np.log(np.stack([runs.columns[name] for name in law.columns], axis=1))
    targets = np.log(runs.columns[law.measured])
    # Centred inputs make the objective better conditioned: without, coefficients and exponents are strongly correlated.
    centre = logs.mean(axis=0)
    logs -= centre
    generator = np.random.default_rng(seed)
    refits = np.zeros((samples, len(law.names)))
    with threadpool_limits(1):  # the matrices are tiny: threads of BLAS would cost ten times what they compute
        theta, objective = best_of(law, [law.shift(start, centre) for start in law.starts], logs, targets)
        check_decreases(law, theta)
        for number in range(samples):
            counts = np.bincount(generator.integers(len(logs), size=len(logs)), minlength=len(logs))
            found, _ = refine(law, theta, logs, targets, counts.astype(np.float64))
            refits[number] = law.shift(found, -centre)
    residuals = targets - law.log_value(theta, logs)[0]
    residuals *= math.sqrt(len(logs) / (len(logs) - len(law.names)))
    return Fit(law, law.shift(theta, -centre), refits, residuals, objective)


def best_of(law: Law, starts: list[Floats], logs: Floats, targets: Floats) -> tuple[Floats, float]:
    """Returns theta of the lowest objective over all starts, and that objective."""
    from scipy.optimize import minimize

    objective = make_objective(law, logs, targets, np.ones(len(logs)))
    options = {"maxiter": ROUGH_STEPS, "ftol": 1e-10, "gtol": 1e-8}
    rough = [minimize(objective, start, jac=True, method="L-BFGS-B", options=options) for start in starts]
    rough.sort(key=lambda result: result.fun)
    fine = [refine(law, result.x, logs, targets, np.ones(len(logs))) for result in rough[:REFINED]]
    return min(fine, key=lambda result: result[1])


def refine(law: Law, theta: Floats, logs: Floats, targets: Floats, weights: Floats) -> tuple[Floats, float]:
    """Minimises the objective by BFGS from a theta near the optimum; returns theta and the objective.

    BFGS starts from the curvature of the squares that have the same gradient as the Huber losses there. Without, it and
    L-BFGS take hundreds of steps where the runs determine a combination of parameters badly.
    """
    from scipy.optimize import minimize

    values, jacobian = law.log_value(theta, logs)
    steep = weights * np.minimum(1, HUBER_DELTA / np.maximum(np.abs(values - targets), 1e-12))
    curvature = jacobian.T @ (steep[:, None] * jacobian) / (HUBER_DELTA**2 * weights.sum())
    curvature += 1e-9 * np.trace(curvature) * np.eye(len(theta))
    options = {"gtol": 1e-7, "maxiter": 300, "hess_inv0": _symmetric(np.linalg.inv(curvature))}
    objective = make_objective(law, logs, targets, weights)
    found = minimize(objective, theta, jac=True, method="BFGS", options=options)
    return np.asarray(found.x, np.float64), float(found.fun) * HUBER_DELTA**2 * weights.sum()


def _symmetric(matrix: Floats) -> Floats:
    return (matrix + matrix.T) / 2


def make_objective(
    law: Law, logs: Floats, targets: Floats, weights: Floats
) -> Callable[[Floats], tuple[float, Floats]]:
    """Returns the weighted mean of the Huber losses of log residuals, in units of delta^2, with its gradient.

    Minimisers compare changes of the objective with their tolerances, and the sum itself is of the order of 1e-3:
    scipy's L-BFGS-B stops early on it.

    Args:
      logs: (n, columns), logs of inputs.
      targets: (n,), log y.
      weights: (n,), how often each run counts.
    """
    unit = HUBER_DELTA**2 * weights.sum()

    def objective(theta: Floats) -> tuple[float, Floats]:
        with np.errstate(all="ignore"):
            values, jacobian = law.log_value(theta, logs)
            differences = values - targets
            slopes = np.clip(differences, -HUBER_DELTA, HUBER_DELTA)
            total = float(weights @ (slopes * (differences - 0.5 * slopes))) / unit
            gradient = (weights * slopes) @ jacobian / unit
        return (total, gradient) if math.isfinite(total) else (1e300, np.zeros_like(theta))

    return objective


# --- checks -----------------------------------------------------------------------------------------------------------


def check_runs(law: Law, runs: RunTable) -> None:
    """Raises UserError if the runs cannot determine the parameters of the law."""
    count, needed = len(runs), len(law.names) + 1
    if count < needed:
        raise UserError(
            f"{runs.source}: {count} runs are too few for the law {law.name}, which needs at least {needed}"
        )
    # A power law needs two values of its input, and three where a constant or another term is added.
    values = 2 if len(law.names) == 2 else 3
    for name in law.columns:
        distinct = len(np.unique(runs.columns[name]))
        if distinct < values:
            raise UserError(
                f"the runs of {runs.source} have {distinct} different {name}: the law {law.name} needs at least "
                f"{values}"
            )


def check_decreases(law: Law, theta: Floats) -> None:
    """Raises UserError if the fitted y does not decrease with an input."""
    logs = np.zeros((1, len(law.columns)))  # the centre of the runs
    here = float(law.log_value(theta, logs)[0][0])
    for position, name in enumerate(law.columns):
        doubled = logs.copy()
        doubled[0, position] = math.log(2)
        if not float(law.log_value(theta, doubled)[0][0]) < here - 1e-6:
            raise UserError(
                f"{law.measured} does not decrease with {name} in these runs: the law {law.name} cannot be fitted to "
                "them"
            )
