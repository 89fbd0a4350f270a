"""Export of LoRA workdirs to Hugging Face PEFT directories, and import (formats: `gptjax/interop/peft_files.py`)."""

import json
from pathlib import Path
from typing import Any

import jax
import numpy as np

from gptjax.checkpoint.manager import Checkpoints
from gptjax.checkpoint.state import abstract_state
from gptjax.config import (
    BatchConfig,
    Config,
    DataConfig,
    GPTConfig,
    MeshConfig,
    UserError,
    read_config,
    to_json,
)
from gptjax.data.templates import chat_format
from gptjax.interop import families, task_heads
from gptjax.interop.family import HEAD, Family, placements
from gptjax.interop.huggingface import check_new, new_directory
from gptjax.interop.peft_files import load_lora, save_lora
from gptjax.interop.tokenizer_files import write_tokenizer
from gptjax.models import peft
from gptjax.parallel.mesh import make_mesh
from gptjax.stages import registry
from gptjax.stages.registry import completed_config
from gptjax.stages.saved_weights import given_base, load_given, load_parts

_EMBEDDINGS = {"token_embedding/embedding", "head_embedding/embedding"}


def export_adapter(workdir: Path, directory: Path, *, best: bool = False, step: int | None = None) -> None:
    """Writes the LoRA matrices of a workdir as a PEFT directory, to be loaded over the exported `init_from`.

    Other trained parameters are in `modules_to_save`: the embeddings, if special tokens were added (the whole table, so
    the base model must be resized first), and the head of a fine-tuned task with the layer norm that its bias is folded
    into (`interop.task_heads`). The directory also has the tokenizer of a task or a chat model, and for a task the
    config.json of the model with its head and labels.

    Raises:
      UserError: the workdir is not of peft.method=lora; transformers has no class for its head; or as in `save_lora`.
    """
    check_new(directory)
    config, tokenizer = completed_config(workdir)
    method = config.peft.method
    if method != "lora" or config.init_from is None:
        remedy = "transformers has no such layers" if method == "adapters" else "export the whole model with --to_hf"
        raise UserError(f"{workdir} is of peft.method={method}, but PEFT's files are for lora: {remedy}")
    family = families.family_of(config.model)
    task_heads.check(workdir, family, config)
    mesh, is_task = make_mesh(MeshConfig()), registry.definition(config).head == "task"
    with jax.set_mesh(mesh):
        best = best or registry.definition(config).uses_best_checkpoint
        parts = load_parts(workdir, mesh, best=best, step=step)
        params = peft.join(parts.base, parts.trained)
    head, leaves = None, peft.flatten(params)
    if is_task:
        head, leaves = task_heads.split_head(family, config, tokenizer, params)
    modules: dict[str, dict[str, np.ndarray]] = {}
    for path in _EMBEDDINGS & peft.flatten(parts.trained).keys():
        (name,) = family.names[path]
        assert isinstance(name, str)
        table = {"weight": np.asarray(leaves[path])}
        modules[family.full_name(name.removesuffix(".weight"))] = table
        if head is None and config.model.tied_head:
            modules[HEAD.removesuffix(".weight")] = table  # tied weights, which PEFT's copy unties
    if head is not None:
        modules[head.module] = head.tensors
        if head.is_folded:
            modules |= _last_norm(family, config.model, leaves)

    def write_more(unfinished: Path) -> None:
        form = (
            chat_format(config.chat, tokenizer, config.model.vision)
            if registry.definition(config).conversational
            else None
        )
        if is_task or form is not None:
            write_tokenizer(tokenizer, unfinished, config.model.context_length, form, is_task=is_task)
        if head is not None:
            theirs = families.to_config_json(family, config.model, tokenizer.ends) | head.settings
            theirs["architectures"] = [head.architecture]
            (unfinished / "config.json").write_text(json.dumps(theirs, indent=2) + "\n")

    lora = {path: np.asarray(leaf) for path, leaf in leaves.items() if path.endswith(peft.LORA)}
    save_lora(
        directory,
        config.peft,
        config.model,
        peft.unflatten(lora),
        task_type="CAUSAL_LM" if head is None else head.task_type,
        modules=modules,
        write_more=write_more,
    )


def _last_norm(family: Family, model: GPTConfig, leaves: dict[str, Any]) -> dict[str, dict[str, np.ndarray]]:
    """Returns the tensors of the layer norm before the head, by module of transformers and name."""
    path, row = task_heads.last_norm(model)
    found: dict[str, dict[str, np.ndarray]] = {}
    for name in ("scale", "bias"):
        leaf = np.asarray(leaves[f"{path}/{name}"])
        places = list(placements(family, len(model.attention_pattern), f"{path}/{name}", leaf.shape))
        module, _, theirs = places[row or 0].name.rpartition(".")
        found.setdefault(family.full_name(module), {})[theirs] = leaf if row is None else leaf[row]
    return found


def import_adapter(directory: Path, base: Path, workdir: Path) -> None:
    """Creates a workdir from a PEFT directory: the LoRA matrices, over the weights of the workdir `base`.

    Raises:
      UserError: `base` is not a workdir, or its model does not fit the matrices; or as in `load_lora`.
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
        parameters = registry.parameters(config)
        wanted = abstract_state(parameters, mesh).params
        params = jax.tree.map(lambda leaf, like: jax.device_put(leaf.astype(like.dtype), like.sharding), leaves, wanted)
        fixed = given_base(parameters, load_given(parameters, mesh), mesh)
        with new_directory(workdir) as unfinished:
            (unfinished / "config.json").write_text(to_json(config))
            tokenizer.save(unfinished / "tokenizer")
            with Checkpoints(unfinished, config.checkpoint) as checkpoints:
                checkpoints.save_params(params, fixed)
