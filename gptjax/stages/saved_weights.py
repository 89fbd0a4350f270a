"""Weights of other workdirs: loading them whole or in parts, and checking that they fit a model."""

import dataclasses
from pathlib import Path
from typing import Any

import jax
from jax.sharding import Mesh

from gptjax.checkpoint.manager import Checkpoints
from gptjax.checkpoint.state import ParameterSpec, abstract_state, abstract_weights
from gptjax.config import Config, UserError, differences, read_config
from gptjax.config.model import fields_independent_of_weights
from gptjax.data.tokenizers import Tokenizer
from gptjax.distributed import processes
from gptjax.files import expand, read_json
from gptjax.models.heads import VALUE
from gptjax.parallel.mesh import check_model_fit
from gptjax.stages import registry
from gptjax.stages.preference.reward_model import SCALE_FILE
from gptjax.stages.registry import completed_config


@dataclasses.dataclass(frozen=True)
class SavedParts:
    """The weights of a workdir, with the trained parameters separate from the frozen base.

    Attributes:
      parameters: specification of the parameters.
      base: frozen parameters, those of `init_from`; None where all parameters are trained.
      trained: parameters that the run trained.
      step: step of the checkpoint.
    """

    parameters: ParameterSpec
    tokenizer: Tokenizer
    base: Any
    trained: Any
    step: int

    def join(self, base_and_trained: tuple[Any, Any]) -> Any:
        """Returns all parameters, with low-rank matrices merged into their kernels."""
        return self.parameters.merge(self.parameters.join(*base_and_trained))


def load_parts(
    workdir: Path, mesh: Mesh, *, best: bool = False, step: int | None = None, given: dict[Path, Any] | None = None
) -> SavedParts:
    """Loads the newest weights of a workdir, or their moving average if the run kept one; `mesh` is in use.

    Args:
      best: loads the best checkpoint instead.
      step: loads the checkpoint of this step instead.
      given: cache of base weights by workdir, so that several fine-tuned models can share one base; extended here.

    Raises:
      UserError: `workdir` is not a workdir, has no checkpoint, or its model does not fit the mesh.
    """
    _check_bases(workdir)
    config, tokenizer = completed_config(workdir)
    check_model_fit(config.model, mesh)
    parameters = registry.parameters(config)
    with Checkpoints(workdir, config.checkpoint, read_only=True) as checkpoints:
        # A run in progress may save and delete checkpoints meanwhile, so only their existence is compared.
        any_saved = checkpoints.latest_step() is not None
        processes.check_same({"a checkpoint": any_saved}, "give all processes the same --workdir, on a shared disk")
        if not any_saved:
            raise UserError(f"{workdir} has no checkpoint yet")
        trained, step = checkpoints.restore_params(abstract_weights(parameters, mesh), step, best=best)
        base = None
        if parameters.given is not None:
            base = given_base(parameters, load_given(parameters, mesh, given), mesh)
            checkpoints.check_base(step, base)
    return SavedParts(parameters, tokenizer, base, trained, step)


def _check_bases(workdir: Path) -> None:
    """Raises UserError if the `init_from` chain of PEFT runs is a cycle, so that there are no base weights."""
    seen, place = [], workdir.expanduser().resolve()
    while (config := read_config(place)).peft.method != "none":
        assert config.init_from is not None  # config.check
        seen.append(place)
        place = expand(config.init_from).resolve()
        if place in seen:
            raise UserError(
                f"{workdir} has no base weights: init_from of {seen[-1]} leads back to {place}: correct init_from in "
                "the config.json of one of them"
            )


@dataclasses.dataclass(frozen=True)
class SavedWeights:
    """The weights of a workdir.

    Attributes:
      config: the run's complete config.
      gpt: parameters of the GPT, with low-rank matrices merged.
      head: parameters of the head; None where the stage has none.
      step: step of the checkpoint.
    """

    config: Config
    tokenizer: Tokenizer
    gpt: Any
    head: Any
    step: int


def load_weights(workdir: Path, mesh: Mesh, *, best: bool = False, step: int | None = None) -> SavedWeights:
    """Loads weights as `load_parts` does, and joins base and trained parameters."""
    parts = load_parts(workdir, mesh, best=best, step=step)
    params = dict(parts.join((parts.base, parts.trained)))
    head = params.pop("head", None)
    params.pop(VALUE, None)  # the value head is used in training only
    return SavedWeights(parts.parameters.config, parts.tokenizer, params, head, parts.step)


def load_reward_weights(workdir: Path, mesh: Mesh) -> SavedWeights:
    """Loads the best weights of a run of stage "reward", with rewards shifted to mean 0 on the best completions.

    The run measures the mean reward of the best completions of its data when it ends, and records it with the step of
    the checkpoint it was measured on (`SCALE_FILE`). Before that the mean is taken as 0. A file without a step refers
    to the best checkpoint.

    Raises:
      UserError: as in `load_parts`; the run is of another stage; or the checkpoint of the recorded step was deleted.
    """
    config = read_config(workdir)
    if config.stage != "reward":
        raise UserError(f"{workdir} is of stage {config.stage}: a reward model is a run of stage reward")
    path = workdir / SCALE_FILE
    try:
        scale = read_json(path)
        mean, step = float(scale["mean"]), scale.get("step")
        if not (step is None or type(step) is int):
            raise ValueError(f"step {step!r} is not an integer")
    except FileNotFoundError:  # the run has not ended yet
        mean, step = 0.0, None
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"cannot read {path}: {error}") from None
    if step is not None and not (workdir / "checkpoints" / str(step)).is_dir():
        raise UserError(
            f"{path} was measured on checkpoint {step}, which was deleted: "
            f"run the command that trained {workdir} again until it ends"
        )
    weights = load_weights(workdir, mesh, best=True, step=step)
    linear = weights.head["linear"]
    return dataclasses.replace(weights, head={"linear": linear | {"bias": linear["bias"] - mean}})


def load_given(parameters: ParameterSpec, mesh: Mesh, loaded: dict[Path, Any] | None = None) -> Any:
    """Loads the weights named by `init_from`.

    Args:
      loaded: cache of loaded weights by workdir; extended here.

    Raises:
      UserError: they are the weights of another model; or as in `load_parts`.
    """
    loaded = {} if loaded is None else loaded
    assert parameters.config.init_from is not None
    source = expand(parameters.config.init_from).resolve()
    check_model(parameters.config, completed_config(source)[0], f"init_from={parameters.config.init_from}")
    if source not in loaded:
        loaded[source] = load_weights(source, mesh).gpt
    return loaded[source]


def given_base(parameters: ParameterSpec, given: Any, mesh: Mesh) -> Any:
    """Returns the parameters of `given` that stay frozen, without copying, and without frozen models.

    None: all parameters are trained.
    """
    if parameters.given is None:
        return None
    wanted = abstract_state(parameters, mesh).base
    return first_rows(given, {name: part for name, part in wanted.items() if name not in parameters.frozen})


def check_model(config: Config, given: Config, name: str) -> None:
    """Raises UserError if the weights of a run with config `given`, called `name`, do not fit the model of `config`."""
    free: dict[str, Any] = {name: getattr(config.model, name) for name in fields_independent_of_weights()}
    if not given.model.reads_images:  # the encoder is new
        free["vision"] = config.model.vision
    if given.model.adapter_dim is None:
        free["adapter_dim"] = config.model.adapter_dim
    adds_tokens = registry.definition(config).adds_tokens or config.data.objective != "causal"
    if adds_tokens and (given.model.vocab_size or 0) <= (config.model.vocab_size or 0):
        free["vocab_size"] = config.model.vocab_size  # special tokens are new
    if changed := differences(dataclasses.replace(given.model, **free), config.model, "model."):
        raise UserError(f"{name} has another model: {'; '.join(changed)}")


def first_rows(given: Any, wanted: Any) -> Any:
    """Selects the leaves of `wanted` from `given`, each cut to the rows of `wanted`; whole leaves are not copied."""
    if isinstance(wanted, dict):
        return {name: first_rows(given[name], part) for name, part in wanted.items()}
    rows = given if given.shape == wanted.shape else given[: len(wanted)]
    return jax.device_put(rows.astype(wanted.dtype), wanted.sharding)
