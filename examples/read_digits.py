"""Trains a small model from scratch to read images, and shows its answers: scikit-learn's digits as a conversation.

    python examples/read_digits.py --workdir=runs/digits
    python examples/read_digits.py --workdir=runs/digits_demo --init_from=runs/demo

The model is asked which digit an image shows, and which of two digits is larger. A model that is given the questions
without the images is the baseline: it can only guess. Prints the shares of correct answers on images that neither was
trained on, and draws some of them with their answers in WORKDIR/answers.png. Running it again resumes.

With --init_from, a text model learns it in LLaVA's two steps: align, with the text model frozen, and instruct.
"""

import json
from pathlib import Path
from typing import Any

import numpy as np
from absl import flags

from gptjax import cli
from gptjax.api import train
from gptjax.config import Config, VisionConfig, load_config, replace
from gptjax.data.images import digits
from gptjax.evaluation.run_tasks import Options, evaluate

WORKDIR = flags.DEFINE_string("workdir", "runs/digits", "Folder of the runs and of the figure.")
INIT_FROM = flags.DEFINE_string("init_from", None, "Workdir of a text model to start from; default: random weights.")
EPOCHS = flags.DEFINE_float("epochs", None, "Epochs of training; default: those of configs/gpt4.py.", lower_bound=0.0)
QUESTIONS = flags.DEFINE_integer("questions", None, "Held-out questions to ask; default: all.", lower_bound=1)
CONFIG = Path(__file__).parents[1] / "configs" / "gpt4.py"
BASELINE_EPOCHS = 4.0  # the loss without images stays where it is after the first
SHOWN = 16


def main() -> None:
    root = Path(str(WORKDIR.value)).expanduser()
    reading = answers(local_config(reader(root)), root / "images", "digits:test")
    guessing = answers(without_images(local_config("")), root / "text", "digits:test:text")
    print(f"{'held-out questions':<24} {'with images':>12} {'text alone':>12}")
    for name, question in (("which digit?", digits.READ), ("which is larger?", digits.COMPARE)):
        text = question.replace(digits.IMAGE, "").strip()
        shares = [share_correct(found, text) for found in (reading, guessing)]
        print(f"{name:<24} {shares[0]:12.1%} {shares[1]:12.1%}")
    draw(reading, root / "answers.png")
    print(f"examples with answers: {root / 'answers.png'}")


def reader(root: Path) -> str:
    """The arguments of configs/gpt4.py for the model that reads images; aligns the text model of --init_from first."""
    if INIT_FROM.value is None:
        return ""
    train(local_config(f"stage=align,init_from={INIT_FROM.value}"), root / "align")
    return f"stage=instruct,init_from={root / 'align'}"


def local_config(arguments: str) -> Config:
    changes = {} if EPOCHS.value is None else {"batch.epochs": EPOCHS.value}
    return load_config(f"{CONFIG}:runlocal,{arguments}", changes)


def without_images(config: Config) -> Config:
    """The config of the baseline."""
    data = {"source": "digits:train:text", "validation_source": "digits:test:text", "image_shift": 0.0}
    epochs = min(BASELINE_EPOCHS, config.batch.epochs or BASELINE_EPOCHS)
    changes: dict[str, dict[str, Any]] = {
        "model": {"vision": VisionConfig()},
        "data": data,
        "batch": {"epochs": epochs},
    }
    return replace(config, changes)


def answers(config: Config, workdir: Path, source: str) -> list[dict[str, Any]]:
    """Trains, and asks the held-out questions; returns records with the question and whether the answer is correct."""
    train(config, workdir)
    report = workdir / "report.json"
    evaluate(workdir, Options(tasks=("vqa",), source=source, limit=QUESTIONS.value, batch_size=128, output=report))
    lines = report.with_suffix(".answers.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


def share_correct(found: list[dict[str, Any]], question: str) -> float:
    """The share of correct answers to a question."""
    scores = [record["exact_match"] for record in found if record["question"].endswith(question)]
    return float(np.mean(scores)) if scores else float("nan")


def draw(found: list[dict[str, Any]], path: Path) -> None:
    """Draws examples with the model's answers; wrong ones are red."""
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(4, SHOWN // 4, figsize=(12, 9))
    # In order, so that nothing is chosen; questions about one image and about two alternate.
    shown = [record for count in (1, 2) for record in found if len(record["images"]) == count]
    half = [[record for record in shown if len(record["images"]) == count][: SHOWN // 2] for count in (1, 2)]
    for axis, record in zip(axes.flat, [*half[0], *half[1]], strict=False):
        pixels = [digits.image(source) for source in record["images"]]
        gap = np.full((8, 1, 3), 255, np.uint8)
        axis.imshow(np.concatenate([part for image in pixels for part in (image, gap)][:-1], axis=1))
        colour = "black" if record["exact_match"] else "red"
        question = record["question"].replace(digits.IMAGE, "").strip()
        axis.set_title(f"{question} {record['answer']}", color=colour, fontsize=11)
    for axis in axes.flat:
        axis.axis("off")
    figure.tight_layout()
    figure.savefig(path, dpi=100)
    plt.close(figure)


if __name__ == "__main__":
    cli.run(main)
