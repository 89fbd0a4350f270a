"""Loading a trained model from a workdir for inference."""

import dataclasses
from pathlib import Path
from typing import Any, Literal

import jax
from jax.sharding import Mesh

from gptjax.config import Config, MeshConfig, UserError, parse_arg, read_config, replace
from gptjax.data.tokenizers import Tokenizer
from gptjax.models.gpt import GPT
from gptjax.parallel.mesh import make_mesh
from gptjax.stages.pretraining_objectives import attending
from gptjax.stages.saved_weights import load_weights


@dataclasses.dataclass(frozen=True)
class TrainedModel:
    """A model with its weights.

    Attributes:
      config: the run's complete config.
      model: the model; `model.config` is the resolved GPTConfig.
      params: parameters in the structure of `model.init`, unboxed, sharded over `mesh`.
      head: parameters of the task's head; None where the stage has none.
      mesh: must be in use (`jax.set_mesh`) wherever the parameters are used.
      step: step of the checkpoint.
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
    """Loads the newest weights of `workdir`, or their moving average if the run kept one.

    Args:
      mesh: device mesh over which the parameters are sharded; None: all devices on axis `data`.
      dtype: dtype of activations; None: as in training.
      best: loads the best checkpoint instead.
      step: loads the checkpoint of this step instead.

    Raises:
      UserError: `workdir` is not a workdir, has no such checkpoint, or its model does not fit the mesh.
    """
    saved = read_config(workdir)
    if saved.data.objective == "masked":
        raise UserError(
            f"{workdir} is a masked language model (data.objective=masked), which does not predict the next token: "
            "fine-tune it by stage finetune"
        )
    if saved.task.bidirectional:
        raise UserError(f"{workdir} attends in both directions (task.bidirectional=true): use gptjax.predict")
    device_mesh = make_mesh(MeshConfig() if mesh is None else mesh)
    with jax.set_mesh(device_mesh):
        weights = load_weights(workdir, device_mesh, best=best, step=step)
    config = predicting(weights.config)
    if dtype is not None:
        config = replace(config, {"model": {"dtype": dtype}})
    model = GPT(attending(config))
    return TrainedModel(config, model, weights.gpt, weights.head, weights.tokenizer, device_mesh, weights.step)


def predicting(config: Config) -> Config:
    """Returns `config` for inference: the attention backend is chosen for this machine."""
    return replace(config, {"model": {"attention_backend": "auto"}})


def parse_mesh(text: str) -> MeshConfig:
    """Parses a flag such as `--mesh=fsdp=2,tensor=4`; other axes have size 1, and `data` takes the remaining devices.

    Raises:
      UserError: an unknown axis, or a size that is not an integer.
    """
    try:
        return MeshConfig(**parse_arg(text, **dataclasses.asdict(MeshConfig())))
    except UserError as error:
        raise UserError(f"--mesh={text}: {str(error).replace('config argument', 'axis')}") from None
