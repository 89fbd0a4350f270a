"""Compares fine-tuning methods: from scratch, all weights, LoRA, AdaLoRA, adapters, regularisers, and a baseline.

    python -m benchmarks.finetuning --workdir=runs/finetuning
    python -m benchmarks.finetuning --workdir=runs/finetuning --variants=regularisation
    python -m benchmarks.finetuning --workdir=runs/tagging --task=tagging --source=brown:DIR

First pretrains a small GPT-2 on the texts of all rows except the test rows, without labels (or takes the weights of
--init_from). Then trains each variant on a subset of the rows with several seeds. Prints for each the median score, its
range over the seeds, its ratio to the score of fine-tuning all weights, and the share of trained parameters; writes
them to WORKDIR/TASK-VARIANTS.json. Finished runs are not repeated, so that an interrupted benchmark resumes.
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
from gptjax.metrics.report_files import write_predictions
from gptjax.metrics.task_reports import MAIN_METRIC, classification_report, tagging_report
from gptjax.run import run
from gptjax.training.metrics_file import read_metrics

# The config of each variant, as differences to fine-tuning all weights. The learning rates of the methods are the best
# of the few compared on training tweets (docs/finetuning.md); those not listed there were not compared with others.
METHODS: dict[str, dict[str, dict[str, Any]]] = {
    "scratch": {},
    "all weights": {},
    "lora": {"peft": {"method": "lora"}, "optimizer": {"peak_lr": 5e-3}},
    "adalora": {
        # P and Q move by the learning rate, the lambda update by its product with the scale alpha / rank: the learning
        # rate is small and the scale large.
        "peft": {
            "method": "adalora",
            "targets": ("layers/.*/kernel",),
            "rank": 6,
            "initial_rank": 9,
            "alpha": 192.0,
            "initial_fraction": 0.2,
            "prune_every_steps": 1,
        },
        "optimizer": {"peak_lr": 5e-3},
    },
    "adapters": {"peft": {"method": "adapters"}, "optimizer": {"peak_lr": 5e-3}},
    "head": {"peft": {"method": "head"}, "optimizer": {"peak_lr": 1e-2}},
    "top layers": {"peft": {"method": "top_layers"}, "optimizer": {"peak_lr": 2e-3}},
}
LONGER = {"adalora": 2}  # factor of --epochs: it chooses ranks before it trains with them
NO_DROPOUT = {"embedding_dropout": 0.0, "attention_dropout": 0.0, "residual_dropout": 0.0}
REGULARISERS: dict[str, dict[str, dict[str, Any]]] = {
    "all weights": {},
    "no language loss": {"task": {"lm_weight": 0.0}},
    "no dropout": {"model": NO_DROPOUT, "task": {"head_dropout": 0.0}},
    "label smoothing": {"regularisation": {"label_smoothing": 0.1}},
    "word dropout": {"regularisation": {"word_dropout": 0.1}},
    "token replacement": {"regularisation": {"token_replacement": 0.1}},
    "mixup": {"regularisation": {"mixup_alpha": 0.2}},
    "adversarial": {"regularisation": {"adversarial_epsilon": 5.0}},
    "layer decay": {"optimizer": {"layer_lr_decay": 0.8}},
    "balanced labels": {"task": {"balanced_labels": True}},
}
GROUPS = {"methods": ["scratch", "all weights", "lora", "adalora", "adapters"], "regularisation": list(REGULARISERS)}


def main(_: list[str]) -> None:
    root = Path(WORKDIR.value)
    train, test, texts = choose_rows()
    files = [root / f"{TASK.value}-{name}.jsonl" for name in ("train", "test", "texts")]
    root.mkdir(parents=True, exist_ok=True)
    for path, records in zip(files, ([row.fields for row in train], [row.fields for row in test], texts), strict=True):
        write_predictions(path, records)
    init_from = pretrain(files[2], root / f"{TASK.value}-pretrained") if INIT_FROM.value is None else INIT_FROM.value
    metric = MAIN_METRIC[TASK.value]
    results = {}
    for variant in [name for part in VARIANTS.value for name in GROUPS.get(part, [part])]:
        found = [run_once(variant, seed, files, root, str(init_from)) for seed in range(SEEDS.value)]
        results[variant] = {"trained": found[0]["trained"], "scores": [report[metric] for report in found]}
    results["baseline"] = {"trained": None, "scores": [baseline(train, test)[metric]]}
    settings = {name: flags.FLAGS[name].value for name in ("init_from", "source", "rows", "test_rows", "epochs")}
    name = f"{TASK.value}-{'-'.join(VARIANTS.value)}.json"
    (root / name).write_text(json.dumps({"settings": settings, "results": results}, indent=2) + "\n")
    print_table(results, metric)


def choose_rows() -> tuple[list[Row], list[Row], list[dict[str, str]]]:
    """Returns training rows, test rows, and the texts of all rows except the test split's as records.

    Of rows with equal texts only the first is kept, so that no training text is in the test rows.
    """
    rows = {text_of(row): row for row in reversed(read_rows(SOURCE.value, TASK.value, {}))}
    train, test = split_rows(list(rows.values())[::-1], 0.1)
    texts = [{"text": text_of(row)} for row in train]
    return every(train, ROWS.value), every(test, TEST_ROWS.value), texts


def text_of(row: Row) -> str:
    return row.fields["text"] if "text" in row.fields else " ".join(row.fields["tokens"])


def every(rows: list[Row], count: int) -> list[Row]:
    """Returns `count` evenly spaced rows, or all if there are fewer."""
    count = min(count, len(rows))
    return [rows[i * len(rows) // count] for i in range(count)]


def pretrain(texts: Path, workdir: Path) -> Path:
    """Trains the model of configs/gpt2.py:runlocal on the texts."""
    config = c.resolve(runpy.run_path("configs/gpt2.py")["get_config"]("runlocal"))
    sections: dict[str, dict[str, Any]] = {
        "data": {"source": f"jsonl:{texts}", "packing": "segment"},
        "batch": {"total_tokens": PRETRAIN_TOKENS.value, "tokens_per_batch": 16 * config.model.context_length},
        "evaluation": {"every_tokens": None},
        "logging": {"tensorboard": False},
    }
    run(c.replace(config, sections), workdir)
    return workdir


def run_once(variant: str, seed: int, files: list[Path], root: Path, init_from: str) -> dict[str, Any]:
    """Trains a variant unless that is done; returns its report and the number of trained parameters."""
    workdir = root / f"{TASK.value}-{variant.replace(' ', '_')}-{seed}"
    report = workdir / "report.json"
    if not report.exists():
        run(make_config(variant, seed, files, init_from), workdir)
    header, _ = read_metrics(workdir)
    return json.loads(report.read_text()) | {"trained": header["trained_parameters"]}


def make_config(variant: str, seed: int, files: list[Path], init_from: str) -> c.Config:
    """Returns the config of a variant, based on configs/finetune.py."""
    changes = c.choose(METHODS | REGULARISERS, variant, "variant")
    get_config = runpy.run_path("configs/finetune.py")["get_config"]
    argument = f"task={TASK.value},data=jsonl:{files[0]},init_from={init_from},runlocal"
    config = c.resolve(get_config(argument))
    sections: dict[str, dict[str, Any]] = {
        "data": {"validation_source": f"jsonl:{files[1]}"},
        "batch": {"epochs": EPOCHS.value * LONGER.get(variant, 1)},
        "optimizer": {"peak_lr": 1e-3, "warmup_fraction": 0.1},
        "evaluation": {"every_epochs": None},
        "checkpoint": {"every_epochs": None},
        "logging": {"tensorboard": False},
    }
    config = dataclasses.replace(c.replace(c.replace(config, sections), changes), seed=seed)
    if variant == "scratch":  # the same model and tokenizer, without the weights
        tokenizer = Path(init_from).absolute() / "tokenizer" / "tokenizer.json"
        config = dataclasses.replace(c.replace(config, {"data": {"tokenizer": f"json:{tokenizer}"}}), init_from=None)
    return config


def baseline(train: list[Row], test: list[Row]) -> dict[str, float]:
    """Scores TF-IDF with logistic regression; for tagging the most frequent tag of each word."""
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
    whole = results.get("all weights")
    print(f"\n| variant | trained parameters | {metric}, median of {SEEDS.value} | spread | of all weights' |")
    print("|---|---|---|---|---|")
    for variant, found in results.items():
        median = statistics.median(found["scores"])
        spread = f"{min(found['scores']):.4f} to {max(found['scores']):.4f}" if len(found["scores"]) > 1 else ""
        share = "" if whole is None else f"{median / statistics.median(whole['scores']):.3f}"
        trained = "" if found["trained"] is None else f"{found['trained']:,}"
        if whole is not None and found["trained"] is not None:
            trained += f" ({100 * found['trained'] / whole['trained']:.1f} %)"
        print(f"| {variant} | {trained} | {median:.4f} | {spread} | {share} |")


if __name__ == "__main__":
    INIT_FROM = flags.DEFINE_string("init_from", None, "Workdir of pretrained weights; default: pretrain.")
    PRETRAIN_TOKENS = flags.DEFINE_integer("pretrain_tokens", 5_000_000, "Length of pretraining.", lower_bound=1)
    WORKDIR = flags.DEFINE_string("workdir", None, "Directory for the runs.", required=True)
    TASK = flags.DEFINE_enum("task", "classification", ["classification", "tagging"], "Kind of task.")
    SOURCE = flags.DEFINE_string("source", "tweets", "Labelled rows, in a form of data.source.")
    ROWS = flags.DEFINE_integer("rows", 2000, "Training rows.", lower_bound=2)
    TEST_ROWS = flags.DEFINE_integer("test_rows", 1000, "Test rows.", lower_bound=1)
    SEEDS = flags.DEFINE_integer("seeds", 3, "Runs of each variant.", lower_bound=1)
    EPOCHS = flags.DEFINE_float("epochs", 3.0, "Per run; AdaLoRA has twice as many.")
    VARIANTS = flags.DEFINE_list("variants", ["methods"], "Names of variants or groups of variants.")
    app.run(main)
