"""Fine-tuning side by side: from scratch, all weights, LoRA, AdaLoRA, adapters, regularisers, and a classical baseline.

    python -m benchmarks.finetuning --workdir=runs/finetuning
    python -m benchmarks.finetuning --workdir=runs/finetuning --variants=regularisation
    python -m benchmarks.finetuning --workdir=runs/tagging --task=tagging --source=brown:DIR

First a small GPT-2 learns to write from the texts of all rows but the test's, their labels unseen (or --init_from names
what has learned elsewhere). Then each variant learns a part of the rows with several seeds. Prints the median score of
each, its spread over the seeds, its share of the score of fine-tuning all weights, and of their number; writes them to
WORKDIR/TASK-VARIANTS.json. A run that is finished is not run again, so a benchmark that was stopped goes on.
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

# What a variant changes of fine-tuning all weights: sections of the config. Those of "methods" are the best of the few
# that were compared on tweets of the training part, by docs/finetuning.md; of adapters, and of what is not there,
# step sizes are choices that were compared with no others.
METHODS: dict[str, dict[str, dict[str, Any]]] = {
    "scratch": {},
    "all weights": {},
    "lora": {"peft": {"method": "lora"}, "optimizer": {"peak_lr": 5e-3}},
    "adalora": {
        # P and Q move by the step size, what lambda adds by its product with the scale, alpha / rank: small and large.
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
LONGER = {"adalora": 2}  # times --epochs: it learns what to keep before it learns with that
NO_DROPOUT = {"embedding_dropout": 0.0, "attention_dropout": 0.0, "residual_dropout": 0.0}
REGULARISERS: dict[str, dict[str, dict[str, Any]]] = {
    "all weights": {},
    "no language loss": {"task": {"lm_weight": 0.0}},
    "no dropout": {"model": NO_DROPOUT, "task": {"head_dropout": 0.0}},
    "label smoothing": {"regularisation": {"label_smoothing": 0.1}},
    "word dropout": {"regularisation": {"word_dropout": 0.1}},
    "token replacement": {"regularisation": {"token_replacement": 0.1}},
    "mixup": {"regularisation": {"mixup_alpha": 0.2}},
    "adversarial": {"regularisation": {"adversarial_epsilon": 0.1}},
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
        results[variant] = {"trained": found[0]["trained"], "scores": [of_seed[metric] for of_seed in found]}
    results["baseline"] = {"trained": None, "scores": [baseline(train, test)[metric]]}
    settings = {name: flags.FLAGS[name].value for name in ("init_from", "source", "rows", "test_rows", "epochs")}
    name = f"{TASK.value}-{'-'.join(VARIANTS.value)}.json"
    (root / name).write_text(json.dumps({"settings": settings, "results": results}, indent=2) + "\n")
    print_table(results, metric)


def choose_rows() -> tuple[list[Row], list[Row], list[dict[str, str]]]:
    """Training and test rows, and the texts of all but the test rows as records.

    Of rows that are there twice the first, lest the test has what was trained on.
    """
    rows = {text_of(row): row for row in reversed(read_rows(SOURCE.value, TASK.value, {}))}
    train, test = split_rows(list(rows.values())[::-1], 0.1)
    texts = [{"text": text_of(row)} for row in train]
    return every(train, ROWS.value), every(test, TEST_ROWS.value), texts


def text_of(row: Row) -> str:
    return row.fields["text"] if "text" in row.fields else " ".join(row.fields["tokens"])


def every(rows: list[Row], count: int) -> list[Row]:
    """`count` rows, or all if there are fewer, spread evenly from the first to the last."""
    count = min(count, len(rows))
    return [rows[i * len(rows) // count] for i in range(count)]


def pretrain(texts: Path, workdir: Path) -> Path:
    """The model of configs/gpt2.py:runlocal, trained on the texts."""
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
    """The report of a run, and how many parameters it trained."""
    workdir = root / f"{TASK.value}-{variant.replace(' ', '_')}-{seed}"
    report = workdir / "report.json"
    if not report.exists():
        run(make_config(variant, seed, files, init_from), workdir)
    header, _ = read_metrics(workdir)
    return json.loads(report.read_text()) | {"trained": header["trained_parameters"]}


def make_config(variant: str, seed: int, files: list[Path], init_from: str) -> c.Config:
    """That of configs/finetune.py at this size, changed."""
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
    if variant == "scratch":  # the same model and tokenizer, and none of the weights
        tokenizer = Path(init_from).absolute() / "tokenizer" / "tokenizer.json"
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
    INIT_FROM = flags.DEFINE_string("init_from", None, "Workdir of pretrained weights; default: they are made.")
    PRETRAIN_TOKENS = flags.DEFINE_integer("pretrain_tokens", 5_000_000, "To make them.", lower_bound=1)
    WORKDIR = flags.DEFINE_string("workdir", None, "Directory for the runs.", required=True)
    TASK = flags.DEFINE_enum("task", "classification", ["classification", "tagging"], "What is learned.")
    SOURCE = flags.DEFINE_string("source", "tweets", "Labelled rows, in a form of data.source.")
    ROWS = flags.DEFINE_integer("rows", 2000, "Training rows.", lower_bound=2)
    TEST_ROWS = flags.DEFINE_integer("test_rows", 1000, "Rows that the score is of.", lower_bound=1)
    SEEDS = flags.DEFINE_integer("seeds", 3, "Runs of each method.", lower_bound=1)
    EPOCHS = flags.DEFINE_float("epochs", 3.0, "Of each run; AdaLoRA has twice as many.")
    VARIANTS = flags.DEFINE_list("variants", ["methods"], "Names of variants, or of groups of them.")
    app.run(main)
