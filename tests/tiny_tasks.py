"""A few labelled rows of each kind of task, pretrained weights, and runs that take a second or two."""

import dataclasses
import importlib.util
import json
from pathlib import Path
from types import ModuleType
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from gptjax import config as c
from gptjax.checkpoint.manager import Checkpoints
from gptjax.data.tokenizers import BytesTokenizer
from gptjax.models.gpt import GPT, abstract_params
from gptjax.parallel.mesh import make_mesh
from gptjax.stages.finetune.task_model import TASK_FILE, TaskModel, completed

ROOT = Path(__file__).parents[1]
CONTEXT = 32  # the shortest bucket: a step has one shape
MODEL = c.GPTConfig(context_length=CONTEXT, num_layers=2, num_heads=2, embed_dim=16, dtype="float32")
KINDS = (
    *("classification", "entailment", "similarity", "regression", "multiple_choice"),
    *("tagging", "question_answering"),
)
BATCH = 8  # rows
LABELS = ("bad", "fair", "good")


def config_module(name: str) -> ModuleType:
    """Imports a file of configs/."""
    spec = importlib.util.spec_from_file_location(f"{name}_config", ROOT / "configs" / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def write_config(path: Path, config: c.Config) -> Path:
    """Writes a config as a Python file for `--config`."""
    path.write_text(
        "import json\nfrom gptjax.config import config_dict, resolve\n"
        f"def get_config(arg=None):\n    return config_dict(resolve(json.loads({c.to_json(config)!r})))\n"
    )
    return path


def records(kind: str, count: int) -> list[dict]:
    """Returns records of a kind of task; all fit into the context."""
    made = list[Any]()
    for i in range(count):
        label, word = LABELS[i % 3], f"{i:02}" * (1 + i % 4)
        made.append(
            {
                "classification": {"text": f"{label} {word}", "label": label},
                "entailment": {"premise": f"{word} is", "hypothesis": f"a {label}", "label": label},
                "similarity": {"first": f"{label} {i}", "second": word, "label": ("other", "same")[i % 2]},
                "regression": {"first": f"{label} {word}", "second": "so", "label": 2.5 * (i % 3) + 1},
                "multiple_choice": {"context": word, "choices": [f"a{i}", f"bb{i}", "c"], "label": i % 3},
                "tagging": {"tokens": ["in", f"Rome{i}", "it", "is"], "tags": ["O", "B-LOC", "O", "O"]},
                "question_answering": {
                    "context": f"at {word} it is",
                    "question": "where?",
                    "answers": {"text": [word], "answer_start": [3]},
                },
            }[kind]
        )
    return made


def write_rows(directory: Path, kind: str, count: int, name: str = "rows") -> str:
    """Writes rows in a file format that suits the kind; returns the value of data.source."""
    rows, path = records(kind, count), directory / name
    if kind == "classification":
        path.write_text("text,label\n" + "".join(f"{row['text']},{row['label']}\n" for row in rows))
        return f"csv:{path}"
    if kind == "tagging":
        sentences = (zip(row["tokens"], row["tags"], strict=True) for row in rows)
        path.write_text("\n".join("".join(f"{word} {tag}\n" for word, tag in words) for words in sentences))
        return f"conll:{path}"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return f"jsonl:{path}"


def run_config(directory: Path, kind: Any, pretrained: Path | None) -> c.Config:
    """Writes rows to `directory`; returns a config of two steps of one microbatch, pretrained or from scratch."""
    return c.Config(
        stage="finetune",
        init_from=None if pretrained is None else str(pretrained),
        model=MODEL,
        data=c.DataConfig(
            source=write_rows(directory, kind, 2 * BATCH, f"train.{kind}"),
            validation_source=write_rows(directory, kind, 5, f"validation.{kind}"),
            tokenizer="bytes",
            cache_dir=str(directory / "cache"),
        ),
        task=c.TaskConfig(kind=kind),
        peft=c.PeftConfig(rank=2, initial_rank=3, alpha=4.0, adapter_dim=3, num_layers=1, prune_every_steps=1),
        batch=c.BatchConfig(epochs=1.0, tokens_per_batch=BATCH * CONTEXT),
        optimizer=c.OptimizerConfig(peak_lr=1e-2, schedule="constant"),
        logging=c.LoggingConfig(every_steps=1, tensorboard=False),
    )


def save_pretrained(workdir: Path, seed: int = 0, settings: c.GPTConfig = MODEL) -> Path:
    """Writes a workdir with random weights far from uniform."""
    model = GPT(settings.with_vocabulary(BytesTokenizer.vocab_size))
    abstract = abstract_params(model, make_mesh(c.MeshConfig(), jax.devices()[:1]))
    rng = np.random.default_rng(seed)
    params = jax.tree.map(lambda leaf: jnp.asarray(rng.normal(0, 0.3, leaf.shape), leaf.dtype), abstract)
    config = c.Config(
        model=settings,
        data=c.DataConfig(tokenizer="bytes"),
        batch=c.BatchConfig(epochs=1.0, tokens_per_batch=settings.context_length),
    )
    workdir.mkdir(parents=True, exist_ok=True)
    (workdir / "config.json").write_text(c.to_json(config))
    BytesTokenizer().save(workdir / "tokenizer")
    with Checkpoints(workdir, config.checkpoint) as checkpoints:
        checkpoints.save_params(params)
    return workdir


def save_classifier(workdir: Path, config: c.Config) -> Path:
    """Saves random weights, large ones, as those of a classification run of `config`; returns the workdir."""
    found = {"labels": LABELS, "label_weights": (), "target_mean": None, "target_std": None}
    workdir.mkdir()
    (workdir / "config.json").write_text(c.to_json(config))
    (workdir / TASK_FILE).write_text(json.dumps(found))
    BytesTokenizer().save(workdir / "tokenizer")
    shapes = nn.unbox(jax.eval_shape(TaskModel(completed(config, 257, found)).init, jax.random.key(0)))
    rng = np.random.default_rng(0)
    params = jax.tree.map(lambda leaf: jnp.asarray(rng.normal(0, 0.3, leaf.shape), leaf.dtype), shapes)
    with Checkpoints(workdir, config.checkpoint) as checkpoints:
        checkpoints.save_params(params)
    return workdir


def with_method(config: c.Config, method: Any) -> c.Config:
    return dataclasses.replace(config, peft=dataclasses.replace(config.peft, method=method))
