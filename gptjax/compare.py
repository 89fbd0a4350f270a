"""Compares runs: a table of what differs, with standard errors over seeds and paired tests; curves; CSV.

python -m gptjax.compare runs/gpt2 runs/gpt_modern
python -m gptjax.compare sweeps/lr --output=sweeps/lr/comparison --x=flops
python -m gptjax.compare runs/* --metric=perplexity --baseline=optimizer.name=adamw
python -m gptjax.compare --evaluations runs/gpt2 runs/gpt_modern

Runs are given as workdirs, or as the directory of a sweep; they may still be running. Runs that differ in the seed
alone are one row. With --output, writes table.txt, runs.csv, curves.png and curves.html to that directory.

With --evaluations compares the results that gptjax.evaluate wrote for each workdir: all tasks in one table, and paired
tests on the same examples. No model is loaded. With --output, writes table.txt, evaluations.csv and evaluations.json.
"""

import sys
from collections.abc import Mapping
from typing import cast

from absl import flags

from gptjax import cli
from gptjax.config import UserError
from gptjax.files import expand, write_whole

X = flags.DEFINE_enum("x", "tokens", ["tokens", "flops", "seconds"], "Axis of the curves.")
METRIC = flags.DEFINE_string("metric", None, "Metric to compare. Default: evaluation.metric of the runs.")
SPLIT = flags.DEFINE_string("split", "validation", "Split of the records that have the metric, such as train.")
BASELINE = flags.DEFINE_string(
    "baseline", None, "Row from which differences are taken, such as optimizer.peak_lr=0.001. Default: the best one."
)
EVALUATIONS = flags.DEFINE_bool(
    "evaluations",
    False,
    "Compares results of gptjax.evaluate; --metric: default: the first of each task; all: all scores.",
)
OUTPUT = flags.DEFINE_string("output", None, "Directory for the table, CSV, and the curves as picture and page.")


def main() -> None:
    if not cli.paths():
        raise UserError("needs workdirs, such as: python -m gptjax.compare runs/gpt2 runs/gpt_modern")
    if EVALUATIONS.value:
        compare_results()
        return
    from gptjax.comparison.runs import choose_quantity, group_runs, read_runs
    from gptjax.comparison.tables import comparison_table, runs_csv

    runs = read_runs(map(expand, cli.paths()), say)
    quantity = choose_quantity(runs, SPLIT.value, METRIC.value)
    groups = group_runs(runs, say)
    table = comparison_table(groups, quantity, baseline=BASELINE.value)
    print(table, end="")
    if OUTPUT.value is None:
        return
    from gptjax.comparison.curves import Axis, draw_page, draw_png, group_curve

    axis = cast(Axis, X.value)
    curves = [curve for group in groups if (curve := group_curve(group, quantity, axis)) is not None]
    files: dict[str, str | bytes] = {"table.txt": table, "runs.csv": runs_csv(groups, quantity)}
    files["curves.png"] = draw_png(curves, quantity, axis)
    try:
        files["curves.html"] = draw_page(curves, quantity, axis)
    except UserError as missing:  # the rest needs no plotly
        say(str(missing))
    write(OUTPUT.value, files)


def compare_results() -> None:
    """Compares the results of `gptjax.evaluate` of the workdirs."""
    given = [flag for flag in ("x", "split") if flags.FLAGS[flag].present]
    if given:
        raise UserError(f"--{given[0]} is for curves, which --evaluations has none of")
    from gptjax.comparison.evaluation_tables import evaluation_csv, evaluation_json, evaluation_table
    from gptjax.comparison.evaluations import compare_evaluations, read_evaluations

    evaluations = read_evaluations(map(expand, cli.paths()))
    compared = compare_evaluations(evaluations, METRIC.value, BASELINE.value)
    table = evaluation_table(evaluations, compared)
    print(table, end="")
    if OUTPUT.value is not None:
        tables = {"evaluations.csv": evaluation_csv(compared), "evaluations.json": evaluation_json(compared)}
        write(OUTPUT.value, {"table.txt": table, **tables})


def write(output: str, files: Mapping[str, str | bytes]) -> None:
    """Writes files to the directory --output, and names them."""
    directory = expand(output)
    try:
        directory.mkdir(parents=True, exist_ok=True)
        for name, content in files.items():
            write_whole(directory / name, content)
    except OSError as error:
        raise UserError(f"cannot write in --output={directory}: {error.strerror}") from None
    print(f"\nwritten to {directory}: {', '.join(files)}")


def say(text: str) -> None:
    """Prints a note to stderr; standard output is for the table."""
    print(text, file=sys.stderr, flush=True)


if __name__ == "__main__":
    cli.run(main, takes_paths=True)
