"""Coordinate check: sizes of activations in the first training steps, against the width and the depth of a model.

python -m gptjax.scaling coordinates --config=configs/transfer.py --widths=16,32,64,128 --output=checks/width
python -m gptjax.scaling coordinates --config=configs/transfer.py --parametrizations=standard,completep \\
    --depths=2,4,8,16 --config.optimizer.name=muon --output=checks/depth

Models of the given widths, with the depth of --config, and of the given depths, with its width, train on one random
batch. An activation is flat if its change since the initialisation after the last step neither grows nor shrinks, and
its size does not grow: if the exponents of the fitted powers are at most --tolerance. The base model of muP is the one
of --config, unless model.base_width and model.base_depth are set.

Writes coordinates.json, and width.png or layers.png, to --output.
"""

import dataclasses
import json
import shlex
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

from absl import flags

from gptjax import cli
from gptjax.config import Config, GPTConfig, UserError, check
from gptjax.files import expand, write_whole

PARAMETRIZATIONS = ("standard", "mup", "completep")

CONFIG = cli.ConfigFlag()
WIDTHS = flags.DEFINE_list("widths", [], "Widths, such as 32,64,128,256.")
DEPTHS = flags.DEFINE_list("depths", [], "Numbers of layers, such as 2,4,8,16.")
KINDS = flags.DEFINE_list("parametrizations", [], "Parametrizations to compare. Default: that of --config.")
STEPS = flags.DEFINE_integer("steps", 4, "Training steps.", lower_bound=1)
SEEDS = flags.DEFINE_integer("seeds", 2, "Number of seeds, over which means are taken.", lower_bound=1)
ROWS = flags.DEFINE_integer("rows", 8, "Rows of the batch.", lower_bound=1)
TOLERANCE = flags.DEFINE_float("tolerance", 0.2, "Largest exponent that is flat.", lower_bound=0.0)
OUTPUT = flags.DEFINE_string("output", None, "Directory for coordinates.json and the figures.")


def main() -> None:
    config = CONFIG.load()
    if config is None:
        raise UserError("needs --config=FILE, the base model and its optimizer")
    sizes = {"width": numbers("widths"), "layers": numbers("depths")}
    if not any(sizes.values()):
        raise UserError("needs --widths=A,B,... or --depths=A,B,..., at least two sizes")
    kinds = KINDS.value or [config.model.parametrization]
    if unknown := [kind for kind in kinds if kind not in PARAMETRIZATIONS]:
        raise UserError(f"--parametrizations={unknown[0]} is not one of {', '.join(PARAMETRIZATIONS)}")
    if config.stage != Config.stage:
        raise UserError(f"stage={config.stage}: the check trains on text; use the config of a pretraining run")
    if OUTPUT.value is None:
        raise UserError("needs --output=DIR, for coordinates.json and the figures")
    output = expand(OUTPUT.value)
    if output.exists() and not output.is_dir():
        raise UserError(f"--output={output} is not a directory")
    config = with_vocabulary(config)
    runs = {
        (axis, kind): list(variants(config, kind, axis, found))
        for axis, found in sizes.items()
        if found
        for kind in kinds
    }
    from gptjax.parallel import program_cache  # after the checks: this takes seconds to import

    program_cache.use(CONFIG.compiled_programs_dir())
    report: list[dict[str, Any]] = []
    figures: dict[str, Any] = {}
    for (axis, kind), members in runs.items():
        rows, changes = checked(axis, kind, members)
        report += rows
        figures.setdefault(axis, {})[kind] = changes
    write(output, config, report, figures)


def numbers(flag: str) -> list[int]:
    """The value of a flag A,B,...: no number or at least two, in ascending order."""
    texts: list[str] = flags.FLAGS[flag].value or []
    found = sorted({int(text) for text in texts if text.isdigit() and int(text) > 0})
    if texts and (len(found) != len(texts) or len(found) < 2):
        raise UserError(f"--{flag}={','.join(texts)} is not a list of at least two different positive numbers")
    return found


def with_vocabulary(config: Config) -> Config:
    """The config with a vocabulary, that of bytes if it has none: the tokens are random."""
    model = dataclasses.replace(config.model, vocab_size=config.model.vocab_size or 256)
    return dataclasses.replace(config, model=model)


def variants(config: Config, kind: str, axis: str, sizes: list[int]) -> Iterator[tuple[int, Config]]:
    """Yields the configs of all sizes, checked; raises UserError."""
    from gptjax.scaling.model_sizes import resized

    for size in sizes:
        model = resized(based(config.model, kind), **{axis: size})
        batch = dataclasses.replace(config.batch, microbatch_size=None, ramp_start_tokens=None, ramp_tokens=None)
        batch = dataclasses.replace(batch, tokens_per_batch=ROWS.value * model.context_length)
        changed = dataclasses.replace(config, model=model, batch=batch)
        check(changed)
        yield size, changed


def based(model: GPTConfig, kind: str) -> GPTConfig:
    """The model with another parametrization, its own base sizes or else its own size as base."""
    bases: dict[str, Any] = {"base_width": None, "base_depth": None, "base_head_width": None}
    if kind != "standard":
        bases = {"base_width": model.base_width or model.embed_dim, "base_head_width": model.base_head_width}
        bases["base_depth"] = (model.base_depth or model.num_layers) if kind == "completep" else None
    return dataclasses.replace(model, **bases, parametrization=cast(Any, kind))


def checked(axis: str, kind: str, members: list[tuple[int, Config]]) -> tuple[list[dict[str, Any]], Any]:
    """Trains all sizes of one parametrization; prints and returns a row for each kind of activations.

    Returns:
      The rows, and kind of activations -> size -> changes, for the figure.
    """
    from gptjax.stages import registry
    from gptjax.training.coordinate_check import mean_of_seeds, measured, one_batch, slopes

    by_size = {}
    for size, config in members:
        lr = config.optimizer.peak_lr
        seeds = [config.seed + i for i in range(SEEDS.value)]
        batches = [one_batch(config.model, ROWS.value, seed) for seed in seeds]
        by_size[size] = mean_of_seeds(measured(registry.objective(config), seeds, batches, STEPS.value, lr))
    rows = []
    print(
        f"\n{kind}, {axis} {', '.join(map(str, by_size))}: {members[0][1].optimizer.name}, {STEPS.value} steps",
        flush=True,
    )
    for slope in slopes(by_size, TOLERANCE.value):
        verdict = "flat" if slope.is_flat else "NOT FLAT"
        print(f"  {slope.kind:<13} size ~ {axis}^{slope.size:+.2f}  change ~ {axis}^{slope.change:+.2f}  {verdict}")
        rows.append(
            {"axis": axis, "parametrization": kind, **slope._asdict()}
            | {
                "sizes": {str(size): run.size[slope.kind].tolist() for size, run in by_size.items()},
                "changes": {str(size): run.change[slope.kind].tolist() for size, run in by_size.items()},
            }
        )
    changes = {row["kind"]: {size: run.change[row["kind"]] for size, run in by_size.items()} for row in rows}
    return rows, changes


def write(output: Path, config: Config, report: list[dict[str, Any]], figures: dict[str, Any]) -> None:
    """Writes the figures and coordinates.json, and prints what is not flat."""
    from gptjax.config.saved import to_tree
    from gptjax.metrics.coordinate_figures import draw_coordinates

    tree = {
        "command": shlex.join(["python", "-m", "gptjax.scaling", "coordinates", *sys.argv[1:]]),
        "steps": STEPS.value,
        "tolerance": TOLERANCE.value,
        "coordinates": report,
        "config": to_tree(config),
    }
    paths = [output / f"{axis}.png" for axis in figures]
    try:
        output.mkdir(parents=True, exist_ok=True)
        for path, (axis, changes) in zip(paths, figures.items(), strict=True):
            draw_coordinates(changes, axis, path)
        write_whole(output / "coordinates.json", json.dumps(tree, indent=2) + "\n")
    except OSError as error:
        raise UserError(f"cannot write to --output={output}: {error.strerror}") from None
    wrong = [f"{row['parametrization']} {row['kind']} ({row['axis']})" for row in report if not row["is_flat"]]
    print(f"\nnot flat: {', '.join(wrong) if wrong else 'none'}")
    print(f"wrote {', '.join(str(path) for path in (output / 'coordinates.json', *paths))}")
