"""The definitions of the stages by name: parameters, objective and complete config of a run.

The functions that build a stage from data and a mesh are in `stages/builders.py`. The two modules are separate because
a stage may use the weights of another: PPO's reward comes from a model that stage "reward" trained.
"""

import dataclasses
import functools
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax

from gptjax.checkpoint.state import SHARED_PROGRAMS, ParameterSpec
from gptjax.config import Config, UserError, changes, computation, read_config
from gptjax.data import tokenizers
from gptjax.files import expand
from gptjax.models import peft
from gptjax.models.gpt import GPT, init_params
from gptjax.stages import pretrain, sft
from gptjax.stages.definition import Definition
from gptjax.stages.finetune import task_model
from gptjax.stages.preference import dpo, reward_model
from gptjax.stages.rl import rl_objective
from gptjax.training.objective import Loss, Objective

DEFINITIONS: dict[str, Definition] = {
    "pretrain": pretrain.DEFINITION,
    "finetune": task_model.DEFINITION,
    "sft": sft.DEFINITION,
    "reward": reward_model.DEFINITION,
    "dpo": dpo.DEFINITION,
    "ppo": rl_objective.PPO,
    "grpo": rl_objective.GRPO,
}


def definition(config: Config) -> Definition:
    """The definition of a config's stage."""
    return DEFINITIONS[config.stage]


def check(config: Config) -> None:
    """Raises UserError when `config` has settings that its stage does not support (`config.checks` covers the rest)."""
    definition(config).check(config)


def check_sections(config: Config) -> None:
    """Raises UserError when `config` sets a section that other stages read and its own does not."""
    readers: dict[str, list[str]] = {}
    for stage, stage_definition in DEFINITIONS.items():
        for section in stage_definition.sections:
            readers.setdefault(section, []).append(stage)
    for section, stages in readers.items():
        changed = changes(getattr(Config(), section), getattr(config, section), f"{section}.")
        if config.stage not in stages and changed:
            name, (_, value) = next(iter(changed.items()))
            raise UserError(
                f"{name}={value!r} has no effect: stage {config.stage} does not read it, only {', '.join(stages)}"
            )


def check_given(config: Config, given: Config) -> None:
    """Raises UserError when the weights of a run with config `given` are of no model that the stage can start from."""
    if given.data.objective == "masked" and definition(config).conversational:
        raise UserError(
            f"init_from={config.init_from} is a masked language model (data.objective=masked), and stage "
            f"{config.stage} needs one that predicts the next token: start from weights of another objective, or first "
            "train these by stage pretrain with data.objective=causal"
        )


def completed_config(workdir: Path) -> tuple[Config, tokenizers.Tokenizer]:
    """The config of a run as it computes with it, and its tokenizer.

    Raises:
      UserError: not a workdir, or one of its files is damaged.
    """
    config, tokenizer = read_config(workdir), tokenizers.load(workdir / "tokenizer")
    return definition(config).complete(config, tokenizer, workdir), tokenizer


def objective(config: Config) -> Objective:
    """The parameters and the loss of a config's stage; arguments and errors are those of `parameters`."""
    return Objective(parameters(config), _loss(computation(config)))


@functools.lru_cache(maxsize=SHARED_PROGRAMS)
def _loss(config: Config) -> Loss:
    """The same function for all runs of a process that compute the same."""
    return definition(config).loss(config)


def parameters(config: Config) -> ParameterSpec:
    """The parameters of a config's stage, with those that `peft` adds or freezes.

    Args:
      config: complete.

    Raises:
      UserError: `peft` needs weights that do not exist, or its targets match none of the model's matrices.
    """
    given = None if config.peft.method == "none" else _given_shapes(config)
    return dataclasses.replace(_parameters(computation(config)), config=config, given=given)


@functools.lru_cache(maxsize=SHARED_PROGRAMS)
def _parameters(config: Config) -> ParameterSpec:
    """The parameters without shapes of given weights: their `init` is the same for all runs that compute the same."""
    spec = definition(config).parameters(config)
    return _with_low_rank(spec) if config.peft.method in ("lora", "adalora") else spec


def _with_low_rank(spec: ParameterSpec) -> ParameterSpec:
    """Adds the matrices of LoRA or AdaLoRA next to the kernels of the policy.

    Other networks, which are frozen or trained whole from weights of their own, have none.
    """

    def init(rng: jax.Array) -> Any:
        params = spec.init(rng)
        policy = {name: part for name, part in params.items() if name not in (*spec.frozen, *spec.sources)}
        return params | peft.join(policy, peft.low_rank(spec.config.peft, policy, jax.random.fold_in(rng, 1)))

    return dataclasses.replace(spec, init=init)


def _given_shapes(config: Config) -> dict[str, tuple[int, ...]]:
    """Shapes, by path, of the weights that `init_from` names."""
    assert config.init_from is not None  # checked with the config
    given, tokenizer = completed_config(expand(config.init_from))
    shapes = nn.unbox(jax.eval_shape(lambda: init_params(GPT(given.model), jax.random.key(0))))
    found = {path: leaf.shape for path, leaf in peft.flatten(shapes).items()}
    if definition(config).reinitialises_special_tokens:
        for path in found.keys() & {"token_embedding/embedding", "head_embedding/embedding"}:
            rows, width = found[path]
            found[path] = (min(rows, tokenizer.vocab_size), width)
    return found
