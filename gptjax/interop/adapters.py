"""Workdirs of LoRA matrices to and from Hugging Face PEFT's directories (`gptjax/interop/peft_files.py` has the files)."""

from pathlib import Path

import jax
import numpy as np

from gptjax.checkpoint.manager import Checkpoints
from gptjax.checkpoint.state import abstract_state
from gptjax.config import BatchConfig, Config, DataConfig, MeshConfig, UserError, read_config, to_json
from gptjax.interop.huggingface import check_new, new_directory
from gptjax.interop.peft_files import load_lora, save_lora
from gptjax.models import peft
from gptjax.parallel.mesh import make_mesh
from gptjax.stages.registry import completed_config, make_program
from gptjax.stages.start import given_base, load_given, load_parts


def export_adapter(workdir: Path, directory: Path) -> None:
    """Writes the LoRA matrices of a workdir as a PEFT directory, to be loaded over the exported `init_from`.

    A head and new special tokens are left out: PEFT's files have no place for them.

    Raises:
      UserError: the workdir is not of peft.method=lora; or as `save_lora`.
    """
    check_new(directory)
    config, _ = completed_config(workdir)
    if config.peft.method != "lora" or config.init_from is None:
        raise UserError(
            f"{workdir} is of peft.method={config.peft.method}, and PEFT's files are for lora: export its merged "
            "weights by --to_hf"
        )
    mesh = make_mesh(MeshConfig())
    with jax.set_mesh(mesh):
        parts = load_parts(workdir, mesh, best=config.stage == "finetune")
    leaves = {path: np.asarray(leaf) for path, leaf in peft.flatten(parts.trained).items() if path.endswith(peft.LORA)}
    given, _ = completed_config(Path(config.init_from).expanduser())
    save_lora(directory, config.peft, given.model, peft.unflatten(leaves))


def import_adapter(directory: Path, base: Path, workdir: Path) -> None:
    """Makes a workdir of a PEFT directory, for every command that reads one: the LoRA matrices beside `base`'s weights.

    Raises:
      UserError: `base` is not a workdir, or not of the model that the matrices are for; or as `load_lora`.
    """
    check_new(workdir)
    given, tokenizer = completed_config(base)
    settings, leaves = load_lora(directory, given.model)
    config = Config(
        init_from=str(base.resolve()),
        model=given.model,
        data=DataConfig(tokenizer=read_config(base).data.tokenizer),
        peft=settings,
        batch=BatchConfig(epochs=1.0, tokens_per_batch=given.model.context_length),  # nothing is trained here
    )
    mesh = make_mesh(MeshConfig())
    with jax.set_mesh(mesh):
        program = make_program(config)
        wanted = abstract_state(program, mesh).params
        params = jax.tree.map(lambda leaf, like: jax.device_put(leaf.astype(like.dtype), like.sharding), leaves, wanted)
        fixed = given_base(program, load_given(program, mesh), mesh)
        with new_directory(workdir) as unfinished:
            (unfinished / "config.json").write_text(to_json(config))
            tokenizer.save(unfinished / "tokenizer")
            with Checkpoints(unfinished, config.checkpoint) as checkpoints:
                checkpoints.save_params(params, fixed)
