"""Compares the pretraining objectives (data.objective) by the transfer to fine-tuning.

    python -m benchmarks.objectives --workdir=runs/objectives
    python -m benchmarks.objectives --workdir=runs/objectives_small --pretrain_tokens=400000 --rows=1000 \
        --layers=2 --width=64 --context=64

For each seed, trains the model of configs/gpt2.py:runlocal with each objective on the same texts, those of all labelled
rows except the test rows, without labels, at equal tokens: positions that the model reads, on which the masked and the
prefix language model have fewer targets. Then fine-tunes all weights on labelled rows, with causal and with
bidirectional attention, both without the auxiliary language-model loss. "none" is fine-tuned from random weights.

Prints for each objective the held-out loss of pretraining, which is not comparable between objectives, and the mean
score of fine-tuning with its 95 % confidence interval over the seeds (Student's t); writes them to
WORKDIR/results.json. Finished runs are not repeated, so that an interrupted benchmark resumes.
"""

import dataclasses
import json
import runpy
import statistics
from pathlib import Path
from typing import Any

from absl import app, flags

from benchmarks.finetuning import every, text_of
from benchmarks.measuring import interval
from gptjax import config as c
from gptjax.data.labelled import Row, read_rows, split_rows
from gptjax.metrics.report_files import write_predictions
from gptjax.metrics.task_reports import MAIN_METRIC
from gptjax.run import run
from gptjax.training.metrics_file import read_metrics

KIND = "classification"
OBJECTIVES: dict[str, dict[str, Any]] = {
    "causal": {},
    "masked": {"objective": "masked"},
    "masked words": {"objective": "masked", "mask_whole_words": True},
    "fill_in_the_middle": {"objective": "fill_in_the_middle"},
    "prefix": {"objective": "prefix"},
}
ATTENTION = {"causal": False, "bidirectional": True}  # of fine-tuning: task.bidirectional


def main(_: list[str]) -> None:
    root = Path(WORKDIR.value)
    root.mkdir(parents=True, exist_ok=True)
    train, test, texts = choose_rows()
    files = {name: root / f"{name}.jsonl" for name in ("train", "test", "texts")}
    for name, records in (("train", fields(train)), ("test", fields(test)), ("texts", texts)):
        write_predictions(files[name], records)
    results: dict[str, Any] = {}
    for name in ("none", *OBJECTIVES):
        found: dict[str, Any] = {"held_out_loss": [], **{attention: [] for attention in ATTENTION}}
        for seed in range(SEEDS.value):
            workdir = pretrain(files, root, "causal" if name == "none" else name, seed)
            if name != "none":
                found["held_out_loss"].append(held_out_loss(workdir))
            for attention in ATTENTION:
                found[attention].append(finetune(files, root, name, workdir, attention, seed))
        results[name] = found
    names = ("source", "pretrain_tokens", "rows", "test_rows", "epochs", "layers", "width", "context")
    settings = {name: flags.FLAGS[name].value for name in names}
    (root / "results.json").write_text(json.dumps({"settings": settings, "results": results}, indent=2) + "\n")
    print_table(results)


def choose_rows() -> tuple[list[Row], list[Row], list[dict[str, str]]]:
    """Returns training rows, test rows, and the texts of all rows that are not in the test split, as records."""
    rows = {text_of(row): row for row in reversed(read_rows(SOURCE.value, KIND, {}))}  # without repeated texts
    train, test = split_rows(list(rows.values())[::-1], 0.1)
    return every(train, ROWS.value), every(test, TEST_ROWS.value), [{"text": text_of(row)} for row in train]


def fields(rows: list[Row]) -> list[dict[str, Any]]:
    return [row.fields for row in rows]


def pretrain(files: dict[str, Path], root: Path, objective: str, seed: int) -> Path:
    """Trains with an objective, unless that is done; returns the workdir."""
    workdir = root / f"{objective.replace(' ', '_')}-{seed}"
    config = c.resolve(runpy.run_path("configs/gpt2.py")["get_config"]("runlocal"))
    heads = None if WIDTH.value is None else WIDTH.value // 32
    given = {"num_layers": LAYERS.value, "embed_dim": WIDTH.value, "num_heads": heads, "context_length": CONTEXT.value}
    sizes = {name: value for name, value in given.items() if value is not None}
    config = c.replace(config, {"model": sizes, "batch": {"tokens_per_batch": 16 * sizes.get("context_length", 128)}})
    sections: dict[str, dict[str, Any]] = {
        "data": {"source": f"jsonl:{files['texts']}", "packing": "segment"} | OBJECTIVES[objective],
        "batch": {"total_tokens": PRETRAIN_TOKENS.value},
        "evaluation": {"every_tokens": None, "sample_tokens": 0},
        "checkpoint": {"every_tokens": None, "keep_last": 1},
        "logging": {"tensorboard": False},
    }
    if not is_done(workdir, PRETRAIN_TOKENS.value):
        run(dataclasses.replace(c.replace(config, sections), seed=seed), workdir)
    return workdir


def is_done(workdir: Path, tokens: int) -> bool:
    """Whether the run has evaluated its last step."""
    if not (workdir / "metrics.jsonl").exists():
        return False
    return any(record["split"] == "validation" and record["tokens"] >= tokens for record in read_metrics(workdir)[1])


def held_out_loss(workdir: Path) -> float:
    validation = [record for record in read_metrics(workdir)[1] if record["split"] == "validation"]
    return float(validation[-1]["loss"])


def finetune(files: dict[str, Path], root: Path, name: str, pretrained: Path, attention: str, seed: int) -> float:
    """Fine-tunes from `pretrained`, unless that is done; returns the score on the test rows."""
    workdir = root / f"{name.replace(' ', '_')}-{attention}-{seed}"
    if not (workdir / "report.json").exists():
        argument = f"task={KIND},data=jsonl:{files['train']},init_from={pretrained},runlocal"
        config = c.resolve(runpy.run_path("configs/finetune.py")["get_config"](argument))
        sections: dict[str, dict[str, Any]] = {
            "data": {"validation_source": f"jsonl:{files['test']}"},
            "task": {"bidirectional": ATTENTION[attention], "lm_weight": 0.0},
            "batch": {"epochs": EPOCHS.value},
            "optimizer": {"peak_lr": 1e-3, "warmup_fraction": 0.1},
            "evaluation": {"every_epochs": None},
            "checkpoint": {"every_epochs": None, "keep_last": 1},
            "logging": {"tensorboard": False},
        }
        config = dataclasses.replace(c.replace(config, sections), seed=seed)
        if name == "none":  # the same model and tokenizer, without the weights
            tokenizer = pretrained.absolute() / "tokenizer" / "tokenizer.json"
            config = c.replace(config, {"data": {"tokenizer": f"json:{tokenizer}"}, "model": {"vocab_size": None}})
            config = dataclasses.replace(config, init_from=None)
        run(config, workdir)
    return float(json.loads((workdir / "report.json").read_text())[MAIN_METRIC[KIND]])


def shown(scores: list[float]) -> str:
    """The mean with the half-width of its 95 % confidence interval, which one score does not have."""
    mean, half = interval(scores)
    return f"{mean:.4f}" if len(scores) < 2 else f"{mean:.4f} ± {half:.4f}"


def print_table(results: dict[str, dict[str, Any]]) -> None:
    metric = MAIN_METRIC[KIND]
    print(f"\n{SEEDS.value} seeds, {PRETRAIN_TOKENS.value:,} tokens of pretraining, {ROWS.value:,} training rows")
    print(f"| pretraining | held-out loss | {metric}, causal | {metric}, bidirectional |")
    print("|---|---|---|---|")
    for name, found in results.items():
        loss = f"{statistics.mean(found['held_out_loss']):.3f}" if found["held_out_loss"] else ""
        print(f"| {name} | {loss} | {shown(found['causal'])} | {shown(found['bidirectional'])} |")


if __name__ == "__main__":
    WORKDIR = flags.DEFINE_string("workdir", None, "Directory for the runs.", required=True)
    SOURCE = flags.DEFINE_string("source", "tweets", "Labelled rows, in a form of data.source.")
    PRETRAIN_TOKENS = flags.DEFINE_integer("pretrain_tokens", 5_000_000, "Length of pretraining.", lower_bound=1)
    ROWS = flags.DEFINE_integer("rows", 2000, "Training rows.", lower_bound=2)
    TEST_ROWS = flags.DEFINE_integer("test_rows", 1000, "Test rows.", lower_bound=1)
    SEEDS = flags.DEFINE_integer("seeds", 3, "Runs of each objective.", lower_bound=1)
    LAYERS = flags.DEFINE_integer("layers", None, "Layers of the model.", lower_bound=1)
    WIDTH = flags.DEFINE_integer("width", None, "Width of the model, a multiple of 32: heads have 32.", lower_bound=32)
    CONTEXT = flags.DEFINE_integer("context", None, "Context of the model.", lower_bound=16)
    EPOCHS = flags.DEFINE_float("epochs", 3.0, "Of each fine-tuning run.")
    app.run(main)
