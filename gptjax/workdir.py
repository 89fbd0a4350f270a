"""The model of a workdir, as every command that uses one reads it."""

import dataclasses
from pathlib import Path
from typing import Any, Literal

import jax
from jax.sharding import Mesh

from gptjax.config import MeshConfig, UserError, parse_arg, read_config
from gptjax.data import tokenizers
from gptjax.models.gpt import GPT, abstract_params
from gptjax.parallel import distributed
from gptjax.parallel.mesh import check_model_fit, make_mesh
from gptjax.training.checkpoints import Checkpoints


@dataclasses.dataclass(frozen=True)
class TrainedModel:
    """A model with its newest weights.

    Attributes:
      model: `model.config` is the resolved GPTConfig.
      params: as `model.init` makes them, unboxed, laid out over `mesh`.
      mesh: to be in use (`jax.set_mesh`) wherever the params are.
      step: of the checkpoint.
    """

    model: GPT
    params: Any
    tokenizer: tokenizers.Tokenizer
    mesh: Mesh
    step: int


def load_model(
    workdir: Path, mesh: MeshConfig | None = None, dtype: Literal["float32", "bfloat16"] | None = None
) -> TrainedModel:
    """The newest weights of `workdir`: their moving average where the run kept one.

    Args:
      mesh: how to lay them out over the devices; None: all on axis `data`.
      dtype: of activations; None: as trained.

    Raises:
      UserError: not a workdir, no checkpoint in it, or a mesh that does not fit.
    """
    config = read_config(workdir)
    tokenizer = tokenizers.load(workdir / "tokenizer")
    # A backend that was named for the machine that trained may be none of this one's.
    model_config = dataclasses.replace(config.model.with_vocabulary(tokenizer.vocab_size), attention_backend="auto")
    if dtype is not None:
        model_config = dataclasses.replace(model_config, dtype=dtype)
    model, device_mesh = GPT(model_config), make_mesh(MeshConfig() if mesh is None else mesh)
    check_model_fit(model_config, device_mesh)
    with Checkpoints(workdir, config.checkpoint, read_only=True) as checkpoints:
        step = checkpoints.latest_step()
        distributed.check_same({"newest checkpoint": step}, "give all processes the same --workdir, on a shared disk")
        if step is None:
            raise UserError(f"{workdir} has no checkpoint yet")
        with jax.set_mesh(device_mesh):
            params, step = checkpoints.restore_params(abstract_params(model, device_mesh))
    return TrainedModel(model, params, tokenizer, device_mesh, step)


def parse_mesh(text: str) -> MeshConfig:
    """A command's `--mesh=fsdp=2,tensor=4`; what is not given is 1, and `data` all that the others leave.

    Raises:
      UserError: an unknown axis, or a size that is not a whole number.
    """
    try:
        return MeshConfig(**parse_arg(text, **dataclasses.asdict(MeshConfig())))
    except UserError as error:
        raise UserError(f"--mesh={text}: {str(error).replace('config argument', 'axis')}") from None
