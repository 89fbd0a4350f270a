"""How to divide compute between parameters and tokens: Chinchilla's approaches 1 and 2.

Hoffmann et al. 2022, sections 3.1 (minimum over training curves) and 3.2 (isoFLOP profiles). Both find the model size
of the lowest loss for several amounts of compute, and fit power laws N_opt = G C^a and D_opt = H C^b through them. The
losses at these optima are fitted by L(C) = a C^b + c.
"""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from gptjax.config import UserError
from gptjax.scaling.law_fits import LEVEL, SAMPLES, Fit, fit_law, fit_of_tree, interval
from gptjax.scaling.laws import LAWS, Floats
from gptjax.scaling.run_table import RunTable

APPROACHES = {
    "envelope": "Hoffmann et al. 2022, section 3.1: minimum over training curves",
    "isoflop": "Hoffmann et al. 2022, section 3.2: isoFLOP profiles",
}
NAMES = ("G", "a", "H", "b")  # N_opt = G C^a, D_opt = H C^b
TOLERANCE = 0.15  # runs of a budget have at most so much more compute than its smallest one
SIZES = 3  # of models at a budget, at least: a parabola has three coefficients
BUDGETS = 2  # at least: a power law has two parameters
FRONTIER_BUDGETS = 5  # at least, to fit L(C) = a C^b + c
ENVELOPE_POINTS = 1500  # amounts of compute at which curves are compared, as in the paper


@dataclasses.dataclass(frozen=True)
class Parabola:
    """An isoFLOP profile: loss = c0 + c1 x + c2 x^2, x = log N - centre.

    Attributes:
      flops: the budget, geometric mean over its runs.
      product: N D of the budget, geometric mean.
      rows: (n,), indices of its runs in the table.
      coefficients: (3,), of x^2, x and 1.
    """

    flops: float
    product: float
    rows: Floats
    centre: float
    coefficients: Floats

    @property
    def size(self) -> float:
        """N of the lowest loss."""
        return math.exp(self.centre - self.coefficients[1] / (2 * self.coefficients[0]))

    @property
    def loss(self) -> float:
        square, slope, constant = self.coefficients
        return float(constant - slope**2 / (4 * square))

    def value(self, sizes: Floats) -> Floats:
        return np.asarray(np.polyval(self.coefficients, np.log(sizes) - self.centre), np.float64)


@dataclasses.dataclass(frozen=True)
class Allocation:
    """Power laws of the optimal model size and tokens.

    Attributes:
      approach: "envelope" or "isoflop".
      parameters: by NAMES.
      samples: (bootstrap samples, 4), the same of resampled runs.
      points: (m, 4), flops, N, D and loss of each optimum.
      frontier: L(C) at these optima; None: too few.
      left_out: why budgets or curves were left out, one line each.
      parabolas: of approach isoflop.
    """

    approach: str
    parameters: dict[str, float]
    samples: Floats
    points: Floats
    frontier: Fit | None
    left_out: tuple[str, ...] = ()
    parabolas: tuple[Parabola, ...] = ()

    def optimum(self, flops: float) -> tuple[float, float]:
        """Returns N_opt and D_opt."""
        values = self.parameters
        return values["G"] * flops ** values["a"], values["H"] * flops ** values["b"]

    @property
    def intervals(self) -> dict[str, list[float]] | None:
        if not len(self.samples):
            return None
        return {name: interval(self.samples[:, place]) for place, name in enumerate(NAMES)}

    def tree(self) -> dict[str, Any]:
        """Returns the fit for JSON; `allocation_of_tree` reads it."""
        return {
            "law": self.approach,
            "equation": "N_opt = G C^a, D_opt = H C^b",
            "source": APPROACHES[self.approach],
            "parameters": self.parameters,
            "intervals": self.intervals,
            "level": LEVEL,
            "samples": self.samples.tolist(),
            "optima": [dict(zip(("flops", "parameters", "tokens", "loss"), row, strict=True)) for row in self.points],
            "left_out": list(self.left_out),
            "frontier": None if self.frontier is None else self.frontier.tree(),
        }


def allocation_of_tree(tree: Mapping[str, Any]) -> Allocation:
    """Reads what `Allocation.tree` returns; raises KeyError, TypeError or ValueError if it is something else."""
    samples = np.array(tree["samples"], np.float64).reshape(-1, len(NAMES))
    parameters = {name: float(tree["parameters"][name]) for name in NAMES}
    points = [[float(row[name]) for name in ("flops", "parameters", "tokens", "loss")] for row in tree["optima"]]
    frontier = None if tree["frontier"] is None else fit_of_tree(tree["frontier"])
    return Allocation(tree["law"], parameters, samples, np.array(points), frontier, tuple(tree["left_out"]))


# --- approach 2 -------------------------------------------------------------------------------------------------------


def fit_isoflop(runs: RunTable, samples: int = SAMPLES, seed: int = 0) -> Allocation:
    """Fits parabolas of loss over log N to the runs of each budget (Hoffmann et al. 2022, section 3.2).

    Bootstrap samples add resampled residuals to the losses of the parabolas: a budget has too few runs to resample
    those.

    Raises:
      UserError: fewer than BUDGETS budgets have a minimum within the sizes trained.
    """
    parabolas, left_out = [], []
    for rows in budgets(runs.columns["flops"]):
        found = _parabola(runs, rows)
        if isinstance(found, str):
            left_out.append(found)
        else:
            parabolas.append(found)
    if len(parabolas) < BUDGETS:
        raise UserError(
            f"{runs.source}: {len(parabolas)} budgets have an isoFLOP profile with a minimum, and a power law needs "
            f"{BUDGETS}{': ' if left_out else ''}{'; '.join(left_out)}"
        )
    points = _points(parabolas)
    losses = runs.columns["loss"]
    residuals = [losses[each.rows] - each.value(runs.columns["parameters"][each.rows]) for each in parabolas]
    spare = sum(len(each) - 3 for each in residuals)
    refits = []
    if spare > 0:
        pool = np.concatenate(residuals) * math.sqrt(sum(map(len, residuals)) / spare)
        generator = np.random.default_rng(seed)
        for _ in range(samples):
            moved = [_moved(each, runs, generator.choice(pool, len(each.rows))) for each in parabolas]
            kept = [each for each in moved if each is not None]
            if len(kept) >= BUDGETS:
                refits.append(list(_power_laws(_points(kept)).values()))
    frontier = _frontier(runs, points, samples, seed)
    refitted = np.array(refits).reshape(-1, len(NAMES))
    optima = (_power_laws(points), refitted, points, frontier)
    return Allocation("isoflop", *optima, left_out=tuple(left_out), parabolas=tuple(parabolas))


def budgets(flops: Floats) -> list[Floats]:
    """Returns the indices of the runs of each budget, by increasing compute."""
    groups: list[list[int]] = []
    for row in np.argsort(flops, kind="stable").tolist():
        if groups and flops[row] <= (1 + TOLERANCE) * flops[groups[-1][0]]:
            groups[-1].append(row)
        else:
            groups.append([row])
    return [np.array(group) for group in groups]


def _parabola(runs: RunTable, rows: Floats) -> Parabola | str:
    """The profile of a budget, or why it has none."""
    sizes, losses = runs.columns["parameters"][rows], runs.columns["loss"][rows]
    flops = _mean(runs.columns["flops"][rows])
    if len(np.unique(sizes)) < SIZES:
        return f"the budget {flops:.3g} FLOPs has {len(np.unique(sizes))} model sizes, fewer than {SIZES}"
    product = _mean(sizes * runs.columns["tokens"][rows])
    centre = float(np.log(sizes).mean())
    found = Parabola(flops, product, rows, centre, np.polyfit(np.log(sizes) - centre, losses, 2))
    lowest = _with_minimum(found, sizes)
    return lowest or f"the loss of the budget {flops:.3g} FLOPs has no minimum within its model sizes"


def _moved(profile: Parabola, runs: RunTable, residuals: Floats) -> Parabola | None:
    """The profile of losses with other residuals; None: it has no minimum within its sizes."""
    sizes = runs.columns["parameters"][profile.rows]
    fitted = np.polyfit(np.log(sizes) - profile.centre, profile.value(sizes) + residuals, 2)
    return _with_minimum(dataclasses.replace(profile, coefficients=fitted), sizes)


def _with_minimum(profile: Parabola, sizes: Floats) -> Parabola | None:
    inside = profile.coefficients[0] > 0 and sizes.min() <= profile.size <= sizes.max()
    return profile if inside else None


def _points(parabolas: list[Parabola]) -> Floats:
    return np.array([(each.flops, each.size, each.product / each.size, each.loss) for each in parabolas])


# --- approach 1 -------------------------------------------------------------------------------------------------------


def fit_envelope(curves: RunTable, samples: int = SAMPLES, seed: int = 0) -> Allocation:
    """Fits the model sizes of the lowest loss over all training curves (Hoffmann et al. 2022, section 3.1).

    Curves are interpolated in log C. An amount of compute counts if a smaller and a larger model than the best one were
    trained that far: otherwise the best one may only be the best of those that were tried. Bootstrap samples resample
    whole curves.

    Args:
      curves: several rows of each run.

    Raises:
      UserError: there are too few curves, or no amount of compute counts.
    """
    runs = sorted(set(curves.names), key=curves.names.index)
    rows = {name: np.array([i for i, other in enumerate(curves.names) if other == name]) for name in runs}
    if short := [name for name in runs if len(rows[name]) < 2]:
        raise UserError(
            f"{curves.source}: the run {short[0]} has one measured loss: the envelope compares training curves, so "
            "that each run needs several rows of the same name"
        )
    if len({curves.columns["parameters"][rows[name][0]] for name in runs}) < SIZES:
        raise UserError(f"{curves.source} has fewer than {SIZES} model sizes: the envelope needs at least that many")
    points = _envelope(curves, list(rows.values()))
    if len(np.unique(points[:, 1])) < BUDGETS:
        raise UserError(
            f"{curves.source}: the best model changes too rarely with compute to fit a power law: train more sizes, "
            "and the smaller ones for longer"
        )
    generator = np.random.default_rng(seed)
    refits = []
    for _ in range(samples):
        chosen = generator.integers(len(runs), size=len(runs))
        again = _envelope(curves, [rows[runs[i]] for i in sorted(set(chosen.tolist()))])
        if len(np.unique(again[:, 1])) >= BUDGETS:
            refits.append(list(_power_laws(again).values()))
    frontier = _frontier(curves, points[:: max(1, len(points) // 50)], samples, seed)
    refitted = np.array(refits).reshape(-1, len(NAMES))
    return Allocation("envelope", _power_laws(points), refitted, points, frontier)


def _envelope(curves: RunTable, rows: list[Floats]) -> Floats:
    """The optima of some curves: (m, 4), flops, N, D and loss."""
    flops, losses = curves.columns["flops"], curves.columns["loss"]
    low, high = min(flops[each].min() for each in rows), max(flops[each].max() for each in rows)
    grid = np.geomspace(low, high, ENVELOPE_POINTS)
    sizes = np.array([curves.columns["parameters"][each[0]] for each in rows])
    values, tokens = np.full((2, len(rows), len(grid)), np.nan)
    for number, each in enumerate(rows):
        order = each[np.argsort(flops[each])]
        x = np.log(flops[order])
        for target, column in ((values, losses), (tokens, curves.columns["tokens"])):
            target[number] = np.exp(np.interp(np.log(grid), x, np.log(column[order]), left=np.nan, right=np.nan))
    best = np.argmin(np.where(np.isnan(values), np.inf, values), axis=0)
    there = ~np.isnan(values)
    smaller = (there & (sizes[:, None] < sizes[best])).any(axis=0)
    larger = (there & (sizes[:, None] > sizes[best])).any(axis=0)
    counted = np.flatnonzero(smaller & larger)
    chosen = best[counted]
    return np.stack([grid[counted], sizes[chosen], tokens[chosen, counted], values[chosen, counted]], axis=1)


# --- both -------------------------------------------------------------------------------------------------------------


def _power_laws(points: Floats) -> dict[str, float]:
    """Least squares in logs: parameters by NAMES."""
    logs = np.log(points[:, :3])
    a, log_g = np.polyfit(logs[:, 0], logs[:, 1], 1)
    b, log_h = np.polyfit(logs[:, 0], logs[:, 2], 1)
    return {"G": math.exp(log_g), "a": float(a), "H": math.exp(log_h), "b": float(b)}


def _frontier(runs: RunTable, points: Floats, samples: int, seed: int) -> Fit | None:
    """L(C) = a C^b + c through the optima; None: there are too few."""
    if len(points) < FRONTIER_BUDGETS:
        return None
    names = tuple(f"{flops:.6g}" for flops in points[:, 0])
    columns = {"flops": points[:, 0], "loss": points[:, 3]}
    table = RunTable(f"the optima of {runs.source}", names, columns, runs.sha256)
    return fit_law(LAWS["compute"], table, samples, seed)


def _mean(values: Floats) -> float:
    """Geometric mean."""
    return math.exp(float(np.log(values).mean()))
