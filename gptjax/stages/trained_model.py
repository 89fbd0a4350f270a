"""The model of a workdir, as every command that uses one reads it."""

import dataclasses
from pathlib import Path
from typing import Any, Literal

import jax
from jax.sharding import Mesh

from gptjax.config import Config, MeshConfig, UserError, parse_arg, replace
from gptjax.data.tokenizers import Tokenizer
from gptjax.models.gpt import GPT
from gptjax.parallel.mesh import make_mesh
from gptjax.stages.start import load_weights


@dataclasses.dataclass(frozen=True)
class TrainedModel:
    """A model with its weights.

    Attributes:
      config: of the run, complete.
      model: `model.config` is the resolved GPTConfig.
      params: as `model.init` makes them, unboxed, laid out over `mesh`.
      head: parameters of the task's head; None where the stage has none.
      mesh: to be in use (`jax.set_mesh`) wherever the params are.
      step: of the checkpoint.
    """

    config: Config
    model: GPT
    params: Any
    head: Any
    tokenizer: Tokenizer
    mesh: Mesh
    step: int


def load_model(
    workdir: Path,
    mesh: MeshConfig | None = None,
    dtype: Literal["float32", "bfloat16"] | None = None,
    *,
    best: bool = False,
    step: int | None = None,
) -> TrainedModel:
    """Loads the newest weights of `workdir`: their moving average where the run kept one.

    Args:
      mesh: how to lay them out over the devices; None: all on axis `data`.
      dtype: of activations; None: as trained.
      best: load those of the best checkpoint instead.
      step: load those of this step instead.

    Raises:
      UserError: not a workdir, no such checkpoint in it, or a mesh that does not fit.
    """
    device_mesh = make_mesh(MeshConfig() if mesh is None else mesh)
    with jax.set_mesh(device_mesh):
        weights = load_weights(workdir, device_mesh, best=best, step=step)
    config = predicting(weights.config)
    if dtype is not None:
        config = replace(config, {"model": {"dtype": dtype}})
    model = GPT(config.model)
    return TrainedModel(config, model, weights.gpt, weights.head, weights.tokenizer, device_mesh, weights.step)


def predicting(config: Config) -> Config:
    """`config` for a command that uses the model.

    An attention backend that was named for the machine that trained may be none of this one's.
    """
    return replace(config, {"model": {"attention_backend": "auto"}})


def parse_mesh(text: str) -> MeshConfig:
    """A command's `--mesh=fsdp=2,tensor=4`; what is not given is 1, and `data` all that the others leave.

    Raises:
      UserError: an unknown axis, or a size that is not a whole number.
    """
    try:
        return MeshConfig(**parse_arg(text, **dataclasses.asdict(MeshConfig())))
    except UserError as error:
        raise UserError(f"--mesh={text}: {str(error).replace('config argument', 'axis')}") from None
