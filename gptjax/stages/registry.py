"""What is learned in each stage, but for data: as the training loop, the planner and all that reads weights have it."""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from gptjax.checkpoint.state import Batch, Loss, Measures, Program
from gptjax.config import CHAT_STAGES, Config, UserError, read_config
from gptjax.data import tokenizers
from gptjax.data.templates import chat_format
from gptjax.files import read_json
from gptjax.losses.cross_entropy import cross_entropy, logits_dtype
from gptjax.models import peft
from gptjax.models.gpt import GPT, head_embedding, hidden_states
from gptjax.models.heads import VALUE
from gptjax.optim import adalora
from gptjax.parallel.mesh import platform
from gptjax.stages.finetune.regularisation import regularised
from gptjax.stages.finetune.task_model import TaskModel
from gptjax.stages.preference.objective import REFERENCE, RewardModel, dpo_loss
from gptjax.stages.rl.objective import grpo_loss, ppo_loss

TASK_FILE = "task.json"  # of a workdir of stage "finetune": what its rows decided of TaskConfig


def completed_config(workdir: Path) -> tuple[Config, tokenizers.Tokenizer]:
    """The config of a run as it computes with it, and its tokenizer.

    Raises:
      UserError: not a workdir, or a file of it is damaged.
    """
    config, tokenizer = read_config(workdir), tokenizers.load(workdir / "tokenizer")
    if config.stage in CHAT_STAGES:
        return config.completed(chat_format(config.chat, tokenizer).vocab_size), tokenizer
    found = _read_task(workdir / TASK_FILE) if config.stage == "finetune" else None
    return config.completed(tokenizer.vocab_size, found), tokenizer


def _read_task(path: Path) -> dict[str, Any]:
    try:
        found = read_json(path)
        labels, weights = tuple(map(str, found["labels"])), tuple(map(float, found["label_weights"]))
        mean, std = (None if found[name] is None else float(found[name]) for name in ("target_mean", "target_std"))
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"cannot read {path}: {error}") from None
    return {"labels": labels, "label_weights": weights, "target_mean": mean, "target_std": std}


def make_program(config: Config) -> Program:
    """What the stage of `config` learns.

    Args:
      config: complete.

    Raises:
      UserError: `peft` trains a part of weights that are not there, or names none of the model's matrices.
    """
    gpt, frozen, starts = GPT(config.model), tuple[str, ...](), dict[str, str | None]()
    init: Callable[[jax.Array], Any] = partial(_init_gpt, gpt)
    loss: Loss
    if config.stage == "finetune":
        task_model = TaskModel(config)
        init, loss = task_model.init, regularised(config, task_model.loss)
    elif config.stage == "reward":
        reward_model = RewardModel(config)
        init, loss = reward_model.init, reward_model.loss
    elif config.stage == "dpo":
        loss, frozen = dpo_loss(config), (REFERENCE,)
    elif config.stage == "grpo":
        loss, frozen = grpo_loss(config), (REFERENCE,)
    elif config.stage == "ppo":
        init, loss, frozen = _with_value_function(config, init), ppo_loss(config, make_loss(gpt)), (REFERENCE,)
        starts[VALUE] = config.rl.reward.partition(":")[2] if config.ppo.value_init == "reward" else None
    else:
        loss = make_loss(gpt)
    if config.peft.method in ("lora", "adalora"):
        init, loss = _with_low_rank(config, init, loss)
    if frozen:
        init = _with_reference(init, gpt)
    given = None if config.peft.method == "none" else _given_shapes(config)
    return Program(config, init, loss, given, frozen, starts)


def _init_gpt(model: GPT, rng: jax.Array) -> Any:
    return model.init(rng, jnp.zeros((1, 1), jnp.int32))["params"]  # the same for tokens of any shape


def make_loss(model: GPT) -> Loss:
    """Cross entropy of the next token."""

    def loss(params: Any, batch: Batch, rng: jax.Array | None) -> tuple[jax.Array, jax.Array, Measures]:
        x_BTD = hidden_states(
            model,
            params,
            batch["tokens"],
            batch.get("segments"),
            batch.get("positions"),
            deterministic=rng is None,
            rngs=None if rng is None else {"dropout": rng},
        )
        head_VD, weights_BT = head_embedding(params), batch["weights"]
        dtype = "float32" if rng is None else logits_dtype(model.config, platform())  # held-out losses are exact
        nats = cross_entropy(x_BTD, head_VD, batch["targets"], weights_BT, None, model.config.precision, dtype)
        return nats, jnp.sum(weights_BT), {}

    return loss


def _with_low_rank(config: Config, init: Any, loss: Loss) -> tuple[Any, Loss]:
    """With the matrices of LoRA or AdaLoRA beside the weights."""

    def init_all(rng: jax.Array) -> Any:
        params = init(rng)
        return peft.join(params, peft.low_rank(config.peft, params, jax.random.fold_in(rng, 1)))

    def loss_of_all(params: Any, batch: Batch, rng: jax.Array | None) -> tuple[jax.Array, jax.Array, Measures]:
        with peft.applied(config.peft, deterministic=rng is None):
            total, weight, measures = loss(params, batch, rng)
        if config.peft.method == "adalora" and rng is not None:
            total += weight * config.peft.orthogonality * adalora.penalty(params)
        return total, weight, measures

    return init_all, loss_of_all


def _with_reference(init: Callable[[jax.Array], Any], gpt: GPT) -> Callable[[jax.Array], Any]:
    """With a second copy of the GPT's own weights, as they are before the first step."""
    return lambda rng: init(rng) | {REFERENCE: _init_gpt(gpt, rng)}


def _with_value_function(config: Config, init: Callable[[jax.Array], Any]) -> Callable[[jax.Array], Any]:
    """With a second GPT, and the head that says what reward is to come."""
    return lambda rng: init(rng) | {VALUE: RewardModel(config).init(jax.random.fold_in(rng, 1))}


def _given_shapes(config: Config) -> dict[str, tuple[int, ...]]:
    """Shapes, by path, of the weights that `init_from` names.

    Rows of the embedding behind the tokenizer's vocabulary, where special tokens have their place, count as missing.
    """
    assert config.init_from is not None  # config.check
    given, tokenizer = completed_config(Path(config.init_from).expanduser())
    shapes = nn.unbox(jax.eval_shape(lambda: _init_gpt(GPT(given.model), jax.random.key(0))))
    found = {path: leaf.shape for path, leaf in peft.flatten(shapes).items()}
    if config.stage == "finetune":
        rows, width = found["token_embedding/embedding"]
        found["token_embedding/embedding"] = (min(rows, tokenizer.vocab_size), width)
    return found


def plain(config: Config, params: Any) -> Any:
    """All parameters, low-rank matrices folded into the weights: what commands that only use a model take."""
    return peft.merge(config.peft, params)
