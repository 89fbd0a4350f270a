"""Fine-tuning methods side by side: from scratch, all weights, LoRA, AdaLoRA, adapters, and a classical baseline.

    python -m benchmarks.finetuning --init_from=runs/demo --workdir=runs/finetuning
    python -m benchmarks.finetuning --init_from=runs/demo --workdir=runs/tagging --task=tagging --source=brown:DIR

Each method trains on the same rows with several seeds. Prints the score of each, its spread over the seeds, its share
of the score of fine-tuning all weights, and of their number; writes them to WORKDIR/TASK.json. A run that is finished
is not run again, so a benchmark that was stopped goes on.
"""

import dataclasses
import json
import runpy
import statistics
from pathlib import Path
from typing import Any

from absl import app, flags

from benchmarks.baselines import frequent_tag_baseline, tfidf_baseline
from gptjax import config as c
from gptjax.data.labelled import Row, read_rows, split_rows
from gptjax.evaluation.report_files import write_predictions
from gptjax.evaluation.reports import MAIN_METRIC, classification_report, tagging_report
from gptjax.training.metrics import read_metrics
from gptjax.training.run import run

INIT_FROM = flags.DEFINE_string("init_from", None, "Workdir of the pretrained weights.", required=True)
WORKDIR = flags.DEFINE_string("workdir", None, "Directory for the runs.", required=True)
TASK = flags.DEFINE_enum("task", "classification", ["classification", "tagging"], "What is learned.")
SOURCE = flags.DEFINE_string("source", "tweets", "Labelled rows, in a form of data.source.")
ROWS = flags.DEFINE_integer("rows", 4000, "Training rows.", lower_bound=2)
TEST_ROWS = flags.DEFINE_integer("test_rows", 2000, "Rows that the score is of.", lower_bound=1)
SEEDS = flags.DEFINE_integer("seeds", 3, "Runs of each method.", lower_bound=1)
EPOCHS = flags.DEFINE_float("epochs", 3.0, "Of each run.")
METHODS = flags.DEFINE_list("methods", ["scratch", "none", "lora", "adalora", "adapters"], "Which to run.")

NAMES = {"scratch": "all weights, from scratch", "none": "all weights"}
PEAK_LR = {
    "scratch": 2e-3,
    "none": 1e-3,
    "lora": 5e-3,
    "adalora": 1e-2,
    "adapters": 5e-3,
    "head": 1e-2,
    "top_layers": 2e-3,
}


def main(_: list[str]) -> None:
    root = Path(WORKDIR.value)
    train, test = choose_rows()
    files = [root / f"{TASK.value}-{name}.jsonl" for name in ("train", "test")]
    root.mkdir(parents=True, exist_ok=True)
    for path, rows in zip(files, (train, test), strict=True):
        write_predictions(path, (row.fields for row in rows))
    metric = MAIN_METRIC[TASK.value]
    results = {}
    for method in METHODS.value:
        found = [run_once(method, seed, files, root) for seed in range(SEEDS.value)]
        results[method] = {"trained": found[0]["trained"], "scores": [of_seed[metric] for of_seed in found]}
    results["baseline"] = {"trained": None, "scores": [baseline(train, test)[metric]]}
    settings = {name: flags.FLAGS[name].value for name in ("init_from", "source", "rows", "test_rows", "epochs")}
    (root / f"{TASK.value}.json").write_text(json.dumps({"settings": settings, "results": results}, indent=2) + "\n")
    print_table(results, metric)


def choose_rows() -> tuple[list[Row], list[Row]]:
    """Training and test rows; of rows that are there twice the first, lest the test has what was trained on."""
    rows = {json.dumps(row.fields.get("text", row.fields.get("tokens"))): row for row in reversed(all_rows())}
    train, test = split_rows(list(rows.values()), 0.1)
    every = max(1, len(train) // ROWS.value)
    return train[::every][: ROWS.value], test[:: max(1, len(test) // TEST_ROWS.value)][: TEST_ROWS.value]


def all_rows() -> list[Row]:
    return read_rows(SOURCE.value, TASK.value, {})


def run_once(method: str, seed: int, files: list[Path], root: Path) -> dict[str, Any]:
    """The report of a run, and how many parameters it trained."""
    workdir = root / f"{TASK.value}-{method}-{seed}"
    report = workdir / "report.json"
    if not report.exists():
        run(make_config(method, seed, files), workdir)
    header, _ = read_metrics(workdir)
    return json.loads(report.read_text()) | {"trained": header["trained_parameters"]}


def make_config(method: str, seed: int, files: list[Path]) -> c.Config:
    """That of configs/finetune.py at this size."""
    get_config = runpy.run_path("configs/finetune.py")["get_config"]
    peft = "none" if method == "scratch" else method
    argument = f"task={TASK.value},data=jsonl:{files[0]},method={peft},init_from={INIT_FROM.value},runlocal"
    config = c.resolve(get_config(argument))
    sections: dict[str, dict[str, Any]] = {
        "data": {"validation_source": f"jsonl:{files[1]}"},
        "batch": {"epochs": EPOCHS.value},
        "optimizer": {"peak_lr": PEAK_LR[method], "warmup_fraction": 0.1},
        "evaluation": {"every_epochs": None},
        "checkpoint": {"every_epochs": None},
        "peft": {"adapter_dim": 32},
        "logging": {"tensorboard": False},
    }
    config = dataclasses.replace(c.replace(config, sections), seed=seed)
    if method == "scratch":  # the same model and tokenizer, and none of the weights
        tokenizer = Path(INIT_FROM.value).absolute() / "tokenizer" / "tokenizer.json"
        config = dataclasses.replace(c.replace(config, {"data": {"tokenizer": f"json:{tokenizer}"}}), init_from=None)
    return config


def baseline(train: list[Row], test: list[Row]) -> dict[str, float]:
    """TF-IDF and logistic regression; of tagging the commonest tag of each word."""
    if TASK.value == "tagging":
        tags = frequent_tag_baseline(
            [row.fields["tokens"] for row in train],
            [row.fields["tags"] for row in train],
            [row.fields["tokens"] for row in test],
        )
        return tagging_report([row.fields["tags"] for row in test], tags).metrics
    predicted = tfidf_baseline(
        [row.fields["text"] for row in train],
        [row.fields["label"] for row in train],
        [row.fields["text"] for row in test],
    )
    labels = sorted({row.fields["label"] for row in train})
    gold = [labels.index(row.fields["label"]) for row in test]
    return classification_report(gold, [labels.index(label) for label in predicted], labels).metrics


def print_table(results: dict[str, dict[str, Any]], metric: str) -> None:
    whole = results.get("none")
    print(f"\n| method | trained parameters | {metric}, mean of {SEEDS.value} | spread | of all weights' |")
    print("|---|---|---|---|---|")
    for method, found in results.items():
        mean = statistics.fmean(found["scores"])
        spread = f"{min(found['scores']):.4f} to {max(found['scores']):.4f}" if len(found["scores"]) > 1 else ""
        share = "" if whole is None else f"{mean / statistics.fmean(whole['scores']):.3f}"
        trained = "" if found["trained"] is None else f"{found['trained']:,}"
        if whole is not None and found["trained"] is not None:
            trained += f" ({100 * found['trained'] / whole['trained']:.1f} %)"
        print(f"| {NAMES.get(method, method)} | {trained} | {mean:.4f} | {spread} | {share} |")


if __name__ == "__main__":
    app.run(main)
