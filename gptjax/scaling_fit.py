"""Fits a scaling law to runs, from a CSV file or from workdirs.

python -m gptjax.scaling fit --csv=runs.csv --law=chinchilla --output=laws/chinchilla
python -m gptjax.scaling fit --workdirs='sweeps/ladder/*' --law=compute --output=laws/compute

N is parameters, D tokens, C FLOPs. Laws of the loss: chinchilla (N, D; approach 3 of Hoffmann et al. 2022), kaplan
(N, D), kaplan_parameters (N), kaplan_tokens (D), kaplan_compute (C), compute (C; GPT-4's L(C) = a C^b + c). Laws of the
best model size: isoflop (approach 2: several sizes for each of several amounts of compute), envelope (approach 1:
training curves). pass_rate (C): GPT-4's law of -log(pass rate), from a CSV with a row for each problem and model.

Writes fit.json (parameters, bootstrap intervals, the data's hash, the command) and figures to --output.
"""

import glob
import json
import shlex
import sys
from pathlib import Path
from typing import Any

import numpy as np
from absl import flags

from gptjax import cli
from gptjax.config import UserError
from gptjax.files import expand, write_whole
from gptjax.scaling.allocations import APPROACHES, Allocation, fit_envelope, fit_isoflop
from gptjax.scaling.fit_files import law_names, tree_of_fit
from gptjax.scaling.law_fits import LEVEL, SAMPLES, Fit, fit_law
from gptjax.scaling.laws import LAWS
from gptjax.scaling.model_sizes import COUNTS
from gptjax.scaling.run_table import RunTable, mean_surprise, read_csv

LAW = flags.DEFINE_enum("law", "chinchilla", law_names(), "The law to fit.")
CSV = flags.DEFINE_string("csv", None, "CSV file with a header and a row for each run: parameters, tokens, loss.")
COLUMNS = flags.DEFINE_string("columns", "", "Columns of the CSV by our names: parameters=params,loss=val_loss,...")
WHERE = flags.DEFINE_string("where", "", "Read only the rows of the CSV with these values: COLUMN=VALUE,...")
WORKDIRS = flags.DEFINE_list(
    "workdirs", [], "Instead of --csv: workdirs of finished runs, or patterns such as 'runs/*'."
)
COUNT = flags.DEFINE_enum("count", "total", list(COUNTS), "What N counts; in a CSV, what its parameters are.")
MIN_RATIO = flags.DEFINE_float("min_tokens_per_parameter", None, "Leave out runs with fewer tokens per parameter.")
MAX_FLOPS = flags.DEFINE_float("max_flops", None, "Leave out runs with more FLOPs, to test the fit on these.")
DROP_HIGHEST = flags.DEFINE_integer(
    "drop_highest", 0, "Leave out so many runs, those of the highest loss.", lower_bound=0
)
OUTPUT = flags.DEFINE_string("output", None, "Directory for fit.json and the figures.")
BOOTSTRAP = flags.DEFINE_integer("samples", SAMPLES, "Number of bootstrap samples.", lower_bound=20)
SEED = flags.DEFINE_integer("seed", 0, "Seed of the bootstrap.")


def main() -> None:
    if (CSV.value is None) == (not WORKDIRS.value):
        raise UserError("give --csv=FILE or --workdirs=DIR,..., one of the two")
    if OUTPUT.value is None:
        raise UserError("needs --output=DIR, for fit.json and the figures")
    output = expand(OUTPUT.value)
    if output.exists() and not output.is_dir():
        raise UserError(f"--output={output} is not a directory")
    runs, left_out = selected(read_runs())
    fit = fitted(runs)
    from gptjax.metrics.law_figures import draw_allocation, draw_fit
    from gptjax.training.provenance import git_commit

    extra = {
        "data": {"source": runs.source, "sha256": runs.sha256, "rows": len(runs), "left_out": left_out},
        "command": shlex.join(["python", "-m", "gptjax.scaling", "fit", *sys.argv[1:]]),
        "git_commit": git_commit(),
        "seed": SEED.value,
        "runs": rows_of(fit, runs),
    }
    try:
        output.mkdir(parents=True, exist_ok=True)
        figures = draw_fit(fit, runs, output) if isinstance(fit, Fit) else draw_allocation(fit, runs, output)
        write_whole(output / "fit.json", json.dumps(tree_of_fit(fit, COUNT.value, extra), indent=2) + "\n")
    except OSError as error:
        raise UserError(f"cannot write to --output={output}: {error.strerror}") from None
    print(report(fit, runs, left_out))
    print(f"wrote {', '.join(str(path) for path in (output / 'fit.json', *figures))}")


def read_runs() -> RunTable:
    """Reads what --csv or --workdirs name.

    Raises:
      UserError: see `read_csv` and `gptjax.training.measured_runs.table_of_runs`.
    """
    law = LAW.value
    if CSV.value is not None:
        if law == "pass_rate":
            needed = ["flops", "pass_rate"]
        elif law in APPROACHES:
            needed = ["parameters", "tokens", "flops", "loss"]
        else:
            needed = [*LAWS[law].columns, "loss"]
        runs = read_csv(expand(CSV.value), pairs("columns"), needed, pairs("where"))
        return mean_surprise(runs) if law == "pass_rate" else runs
    if law == "pass_rate":
        raise UserError("--law=pass_rate needs --csv, with the pass rate of each problem and model")
    from gptjax.training.measured_runs import table_of_runs

    return table_of_runs(workdirs(), COUNT.value, curves=law == "envelope")


def pairs(flag: str) -> dict[str, str]:
    """The value of a flag KEY=VALUE,...."""
    text = str(flags.FLAGS[flag].value)
    found = [part.partition("=") for part in text.split(",") if part]
    if not all(key and value for key, _, value in found):
        raise UserError(f"--{flag}={text} is not of the form KEY=VALUE,...")
    return {key: value for key, _, value in found}


def workdirs() -> list[Path]:
    """The workdirs that --workdirs names; UserError for a pattern without a match."""
    found: list[Path] = []
    for pattern in WORKDIRS.value:
        matches = sorted(
            Path(name) for name in glob.glob(str(expand(pattern))) if (Path(name) / "config.json").exists()
        )
        if not matches:
            raise UserError(f"--workdirs={pattern} matches no workdir: one has a config.json")
        found += [path for path in matches if path not in found]
    return found


def selected(runs: RunTable) -> tuple[RunTable, int]:
    """Returns the runs that the flags keep, and the number of those left out."""
    kept = np.ones(len(runs), bool)
    if MIN_RATIO.value is not None:
        runs.needs("parameters", "tokens")
        # Tables round the ratio: 19.99 is 20.
        kept &= runs.columns["tokens"] / runs.columns["parameters"] >= MIN_RATIO.value * (1 - 1e-3)
    if MAX_FLOPS.value is not None:
        runs.needs("flops")
        kept &= runs.columns["flops"] <= MAX_FLOPS.value
    if DROP_HIGHEST.value:
        runs.needs("loss")
        highest = np.argsort(-runs.columns["loss"], kind="stable")[: DROP_HIGHEST.value]
        kept[highest] = False
    if not kept.any():
        raise UserError(f"the flags leave out all {len(runs)} runs of {runs.source}")
    return runs.take(kept), int((~kept).sum())


def fitted(runs: RunTable) -> Fit | Allocation:
    """Fits the law of --law."""
    if LAW.value == "isoflop":
        return fit_isoflop(runs, BOOTSTRAP.value, SEED.value)
    if LAW.value == "envelope":
        return fit_envelope(runs, BOOTSTRAP.value, SEED.value)
    return fit_law(LAWS[LAW.value], runs, BOOTSTRAP.value, SEED.value)


def rows_of(fit: Fit | Allocation, runs: RunTable) -> list[dict[str, Any]]:
    """The fitted runs, with the law's value at each."""
    rows = runs.rows()
    if isinstance(fit, Fit):
        for row, value in zip(rows, fit.law.value(fit.theta, runs.columns), strict=True):
            row["fitted"] = float(value)
    return rows


def report(fit: Fit | Allocation, runs: RunTable, left_out: int) -> str:
    """The parameters with their intervals, and how well the law fits."""
    law = fit.law.name if isinstance(fit, Fit) else fit.approach
    equation = fit.law.equation if isinstance(fit, Fit) else "N_opt = G C^a, D_opt = H C^b"
    omitted = f", {left_out} left out" if left_out else ""
    lines = [f"{law}: {equation}", f"{len(runs)} rows of {runs.source}{omitted}", ""]
    intervals = fit.intervals
    for name, value in fit.parameters.items():
        bounds = "" if intervals is None else "  [{:.6g}, {:.6g}]".format(*intervals[name])
        lines.append(f"  {name:<8} {value:>12.6g}{bounds}")
    if intervals is not None:
        lines[2] = f"{LEVEL:.0%} bootstrap intervals"
    if isinstance(fit, Fit):
        errors = np.abs(fit.law.value(fit.theta, runs.columns) / runs.columns[fit.law.measured] - 1)
        lines += [
            f"objective {fit.objective:.6g}; relative error {errors.mean():.2%} in the mean, {errors.max():.2%} at most"
        ]
    else:
        lines += [f"left out: {line}" for line in fit.left_out]
        if fit.frontier is not None:
            values = ", ".join(f"{name} {value:.5g}" for name, value in fit.frontier.parameters.items())
            lines += [f"loss of the optima: {fit.frontier.law.equation}, {values}"]
    return "\n".join(lines)


if __name__ == "__main__":
    cli.run(main)
