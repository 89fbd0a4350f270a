"""Models in and out of Hugging Face directories: config.json, safetensors, tokenizer files.

All names and shapes are checked from headers before a weight is read, weights pass through memory one tensor at a time,
and what is written appears at its place only when it is whole.
"""

import contextlib
import dataclasses
import json
import math
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import jax
import numpy as np
from jax.sharding import Mesh

from gptjax.checkpoint.manager import Checkpoints
from gptjax.config import BatchConfig, Config, DataConfig, GPTConfig, MeshConfig, UserError, to_json
from gptjax.data import tokenizers
from gptjax.data.templates import ChatFormat, chat_format
from gptjax.files import unfinished_path
from gptjax.interop import families, heads, safetensors_files
from gptjax.interop.families import Family, Placement, placements
from gptjax.interop.heads import Head
from gptjax.interop.safetensors_files import DTYPES, Declared, Tensor
from gptjax.interop.tokenizer_files import ends_of, read_tokenizer, write_tokenizer
from gptjax.models.gpt import GPT, abstract_params
from gptjax.parallel.mesh import make_mesh
from gptjax.stages import registry
from gptjax.stages.registry import completed_config
from gptjax.stages.start import load_weights

DType = Literal["float32", "bfloat16"]

_HUB_FILES = ["*.safetensors", "*.json", "merges.txt"]
_HUB_NAME = re.compile(r"\w[\w.-]*/\w[\w.-]*")
_CONTAINER_DTYPE = {str(dtype): name for name, dtype in DTYPES.items()}


def load_pretrained(
    directory: str | Path, dtype: DType = "float32", mesh: Mesh | None = None, param_dtype: DType = "float32"
) -> tuple[GPT, Any]:
    """The model in a Hugging Face directory, of a family in `families.FAMILIES`.

    `model.apply({"params": params}, tokens_BT)` gives the logits, float32 (B, T, V), of transformers' model.

    Args:
      directory: with config.json and model.safetensors, or its shards and their index.
      dtype: of activations.
      mesh: over which the parameters are laid out; None: spread over all devices where the model's width divides.
      param_dtype: of the parameters, whatever the file's. Training needs float32: in bfloat16, whose spacing is 1/256
        of a value, most updates of a small learning rate round to nothing. bfloat16 halves the memory of a model that
        is only used.

    Returns:
      The model, and its parameters as `model.init` makes them.

    Raises:
      UserError: something is missing, damaged, left over, of another shape, or beyond what GPTConfig can say.
    """
    directory = Path(directory).expanduser()
    family, config = families.read_config(directory)
    config = dataclasses.replace(config, dtype=dtype, param_dtype=param_dtype)
    mesh = make_mesh(_spread(config)) if mesh is None else mesh
    abstract = abstract_params(GPT(config), mesh)
    leaves = _by_path(abstract)
    tensors = _without_prefix(directory, safetensors_files.read_headers(directory))
    table = _match(directory, family, config, leaves, tensors)
    # The largest first: while the last is read, in a buffer of its own, it is the small ones that are held twice.
    order = sorted(leaves, key=lambda path: -math.prod(leaves[path].shape))
    arrays = {path: _read_parameter(leaves[path], config.param_dtype, table[path], tensors) for path in order}
    return GPT(config), jax.tree.unflatten(jax.tree.structure(abstract), [arrays[path] for path in leaves])


def save_pretrained(
    config: GPTConfig,
    params: Any,
    directory: str | Path,
    tokenizer: tokenizers.Tokenizer | None = None,
    max_file_bytes: int = safetensors_files.MAX_FILE_BYTES,
) -> None:
    """Writes a directory that transformers' AutoModelForCausalLM loads, with the very bits of `params`.

    Args:
      config: resolved.
      params: as `GPT(config).init` makes them, unboxed; this process must hold all of them.
      directory: made; it must not exist, or be empty.
      tokenizer: written beside the model; its end of text becomes the config's. None: neither.
      max_file_bytes: of tensors in one file; a larger model is written in several, with an index.

    Raises:
      UserError: no family can express the config, or `directory` has something in it.
    """
    leaves = _by_path(params)
    _save(config, leaves, iter(leaves.values()), Path(directory).expanduser(), tokenizer, max_file_bytes)


def _save(
    config: GPTConfig,
    abstract: dict[str, Any],
    leaves: Iterator[Any],
    directory: Path,
    tokenizer: tokenizers.Tokenizer | None,
    max_file_bytes: int = safetensors_files.MAX_FILE_BYTES,
    chat: ChatFormat | None = None,
    head: Head | None = None,
) -> None:
    """`save_pretrained` of parameters whose shapes and dtypes are in `abstract`, by path, and values in `leaves`.

    Args:
      chat: as of `write_tokenizer`.
      head: of a fine-tuned task, instead of the language model's.
    """
    assert config.vocab_size is not None
    family = families.family_of(config)
    theirs = families.to_config_json(family, config, () if tokenizer is None else tokenizer.ends)
    if chat is not None:
        theirs["eos_token_id"] = chat.end_of_turn
    layer: dict[str, np.ndarray] = {}
    if head is not None:
        layer = {f"{head.module}.{name}": array for name, array in head.tensors.items()}
        theirs |= head.settings | {"architectures": [head.architecture]}
    period = len(config.attention_pattern)
    places = {path: list(placements(family, period, path, leaf.shape)) for path, leaf in abstract.items()}
    declared = [
        Declared(families.PREFIX + place.name, _CONTAINER_DTYPE[str(leaf.dtype)], place.shape)
        for path, leaf in abstract.items()
        for place in places[path]
    ] + [Declared(name, _CONTAINER_DTYPE[str(array.dtype)], array.shape) for name, array in layer.items()]

    def arrays() -> Iterator[np.ndarray]:
        for path, leaf in zip(abstract, leaves, strict=True):
            for place in places[path]:
                yield place.to_theirs(np.asarray(leaf if place.row is None else leaf[place.row]))
        yield from layer.values()

    with new_directory(directory) as unfinished:
        (unfinished / "config.json").write_text(json.dumps(theirs, indent=2) + "\n")
        safetensors_files.write(unfinished, declared, arrays(), max_file_bytes)
        if tokenizer is not None:
            write_tokenizer(tokenizer, unfinished, config.context_length, chat, is_task=head is not None)


def import_workdir(
    source: str,
    workdir: Path,
    dtype: DType = "float32",
    tokenizer: str | None = None,
    param_dtype: DType = "float32",
) -> None:
    """Makes a workdir of a Hugging Face directory, for every command that reads one and for `init_from`.

    Args:
      source: a directory as for `load_pretrained`, or a model's name on the Hugging Face Hub.
      workdir: made; it must not exist, or be empty.
      dtype: of activations.
      tokenizer: gpt2, cl100k_base, bytes or json:PATH, in place of the directory's own. None: the directory's.
      param_dtype: as of `load_pretrained`.

    Raises:
      UserError: as of `load_pretrained`; no tokenizer, or one of more tokens than the model has.
    """
    check_new(workdir)
    directory = _find(source)
    found = _tokenizer(directory, tokenizer)
    _, config = families.read_config(directory)
    assert config.vocab_size is not None
    if config.vocab_size < found.vocab_size:
        raise UserError(
            f"the tokenizer has {found.vocab_size} tokens, and the model in {directory} a vocab_size of only "
            f"{config.vocab_size}: give the model's own by --tokenizer"
        )
    if ends := ends_of(directory, found):
        found = found.with_ends(ends)
    model, params = load_pretrained(directory, dtype, param_dtype=param_dtype)
    if isinstance(found, tokenizers.HuggingFaceTokenizer):
        tokenizer = f"json:{workdir.absolute() / 'tokenizer' / 'tokenizer.json'}"
    assert tokenizer is not None
    run = Config(
        model=model.config,
        data=DataConfig(tokenizer=tokenizer),
        batch=BatchConfig(epochs=1.0, tokens_per_batch=model.config.context_length),  # nothing is trained here
    )
    with new_directory(workdir) as unfinished:
        (unfinished / "config.json").write_text(to_json(run))
        found.save(unfinished / "tokenizer")
        with Checkpoints(unfinished, run.checkpoint) as checkpoints:
            checkpoints.save_params(params)


def export_workdir(workdir: Path, directory: Path, *, best: bool = False, step: int | None = None) -> None:
    """Writes the newest weights of a workdir as a Hugging Face directory (`save_pretrained`).

    Low-rank matrices are merged. A fine-tuned task becomes a class of transformers with a head (`interop.heads`), with
    the weights of the best checkpoint, as in `gptjax.predict`; its tokenizer writes the start, delimiter and extract
    tokens. The tokenizer of a chat model has the special tokens of its template, and the template.

    Raises:
      UserError: transformers has no class for the model or its head; `directory` is not new.
    """
    check_new(directory)
    config, tokenizer = completed_config(workdir)
    family = families.family_of(config.model)  # before the checkpoint is opened
    heads.check(workdir, family, config)
    mesh = make_mesh(MeshConfig())
    abstract = abstract_params(GPT(config.model), mesh)
    definition = registry.definition(config)
    if definition.adds_tokens or config.peft.method != "none" or best or step is not None:
        is_task = definition.head == "task"
        with jax.set_mesh(mesh):
            weights = load_weights(workdir, mesh, best=best or definition.uses_best_checkpoint, step=step)
        head, leaves = None, _by_path(weights.gpt)
        if is_task:
            head, leaves = heads.split_head(family, config, tokenizer, weights.gpt | {"head": weights.head})
        arrays = (np.asarray(leaves[path]) for path in _by_path(abstract))
        form = chat_format(config.chat, tokenizer) if definition.conversational else None
        _save(config.model, _by_path(abstract), arrays, directory, tokenizer, chat=form, head=head)
        return
    with Checkpoints(workdir, config.checkpoint, read_only=True) as checkpoints:
        if checkpoints.latest_step() is None:
            raise UserError(f"{workdir} has no checkpoint yet")
        _save(config.model, _by_path(abstract), checkpoints.stream_params(abstract), directory, tokenizer)


# --- what is written is whole -----------------------------------------------------------------------------------------


def check_new(directory: Path) -> None:
    """Raises UserError unless `directory` does not exist, or is an empty one."""
    if directory.exists() and (not directory.is_dir() or any(directory.iterdir())):
        raise UserError(f"{directory} exists already: name a new directory, or remove it")


@contextlib.contextmanager
def new_directory(directory: Path) -> Iterator[Path]:
    """A directory to write into, which becomes `directory` when nothing is raised, and is removed otherwise."""
    check_new(directory)
    unfinished = unfinished_path(directory.absolute())
    try:
        unfinished.mkdir(parents=True)
        yield unfinished
        unfinished.rename(directory)
    except OSError as error:
        raise UserError(f"cannot write {directory}: {error.strerror}") from None
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)


# --- what is read -----------------------------------------------------------------------------------------------------


def _find(source: str) -> Path:
    """The directory that `source` names, downloaded when it is that of a model on the Hugging Face Hub."""
    if (directory := Path(source).expanduser()).is_dir():
        return directory
    if not _HUB_NAME.fullmatch(source) or directory.parent.is_dir():  # in an existing directory: a local name, misspelt
        raise UserError(f"there is no directory {source}")
    import huggingface_hub

    try:
        return Path(huggingface_hub.snapshot_download(source, allow_patterns=_HUB_FILES))
    except Exception as error:  # of several libraries: no network, no such model, no access to it, a full disk
        reason = next(iter(str(error).strip().splitlines()), "no reason given")
        raise UserError(
            f"there is no directory {source}, and no model of that name could be downloaded from the Hugging Face Hub "
            f"({type(error).__name__}: {reason})"
        ) from None


def _tokenizer(directory: Path, spec: str | None) -> tokenizers.Tokenizer:
    if spec is None:
        found = read_tokenizer(directory)
        if found is None:
            raise UserError(
                f"{directory} has no tokenizer.json, and no vocab.json and merges.txt: name the model's tokenizer by "
                "--tokenizer=gpt2, or json:PATH"
            )
        return found
    tokenizers.check_spec(spec)
    kind, _, path = spec.partition(":")
    if kind == "json":
        return tokenizers.read_json(Path(path).expanduser())
    if path:
        raise UserError(f"--tokenizer={spec} is one to be trained: name the one that the model was trained with")
    cache_dir = Path(DataConfig.cache_dir).expanduser()
    return tokenizers.get_tokenizer(spec, train_documents=tuple, corpus_fingerprint="", cache_dir=cache_dir)


def _spread(config: GPTConfig) -> MeshConfig:
    """All devices on axis fsdp; where they do not divide the model's width, a copy on each."""
    return MeshConfig() if config.embed_dim % jax.device_count() else MeshConfig(data=1, fsdp=-1)


def _by_path(tree: Any) -> dict[str, Any]:
    """The leaves of a tree, by paths such as layers/block_0/mlp/up/kernel, in the tree's order."""
    leaves = jax.tree_util.tree_flatten_with_path(tree)[0]
    return {jax.tree_util.keystr(path, simple=True, separator="/"): leaf for path, leaf in leaves}


def _without_prefix(directory: Path, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The weights by their names in the tables: without PREFIX, and without the buffers."""
    weights: dict[str, Tensor] = {}
    for full_name, tensor in tensors.items():
        name = full_name.removeprefix(families.PREFIX)
        if families.BUFFERS.fullmatch(name):
            continue
        if name in weights:
            raise UserError(f"{directory} has the tensor {name} twice, with and without {families.PREFIX!r}")
        weights[name] = tensor
    return weights


def _match(
    directory: Path, family: Family, config: GPTConfig, leaves: dict[str, Any], tensors: dict[str, Tensor]
) -> dict[str, list[Placement]]:
    """Their tensors that make up each of our parameters, each tensor used, and each of the shape that it must have.

    The head is dropped from `tensors`, or takes the place of the token embedding that it is the same as.
    """
    embedding = family.names["token_embedding/embedding"][0]
    head = tensors.pop(families.HEAD, None)
    if head is not None and embedding not in tensors:
        tensors[embedding] = head
    unused = dict(tensors)
    table: dict[str, list[Placement]] = {}
    for path, leaf in leaves.items():
        table[path] = []
        for place in placements(family, len(config.attention_pattern), path, leaf.shape):
            tensor = unused.pop(place.name, None)
            if tensor is None:
                raise UserError(
                    f"{directory} lacks the tensor {place.name} {list(place.shape)}, which its config.json "
                    f"({family.model_type}, {config.num_layers} layers) asks for"
                )
            if tensor.shape != place.shape:
                raise UserError(
                    f"{tensor.file}: the tensor {place.name} has shape {list(tensor.shape)}, but config.json asks for "
                    f"{list(place.shape)}: one of the two is another model's"
                )
            if tensor.dtype not in DTYPES:
                raise UserError(
                    f"{tensor.file}: the tensor {place.name} is of dtype {tensor.dtype}: save it as one of "
                    f"{', '.join(DTYPES)}"
                )
            table[path].append(place)
    if unused:
        name, tensor = next(iter(unused.items()))
        raise UserError(
            f"{tensor.file} has the tensor {name} {list(tensor.shape)}, which has no place in a {family.model_type} of "
            f"{config.num_layers} layers with a language-modelling head"
        )
    if head is not None and not safetensors_files.same_bytes(head, tensors[embedding]):
        raise UserError(
            f"{head.file}: {families.HEAD} {list(head.shape)} is not the same as {embedding} "
            f"{list(tensors[embedding].shape)}: a head that is not tied to the embedding is not supported"
        )
    return table


def _read_parameter(
    leaf: jax.ShapeDtypeStruct, dtype: str, places: list[Placement], tensors: dict[str, Tensor]
) -> jax.Array:
    """One of our parameters, laid out as `leaf` says: each tensor is read once, and each device gets its shard."""

    def bounds(index: tuple[slice, ...] | None) -> tuple[slice, ...]:
        assert index is not None
        return tuple(slice(*part.indices(size)[:2]) for part, size in zip(index, leaf.shape, strict=True))

    assert leaf.sharding is not None
    shards = [bounds(index) for index in leaf.sharding.addressable_devices_indices_map(leaf.shape).values()]
    buffers = {
        str(shard): (shard, _aligned([part.stop - part.start for part in shard], jax.numpy.dtype(dtype)))
        for shard in shards
    }
    for place in places:
        tensor = tensors[place.name]
        values = place.to_ours(safetensors_files.read(tensor))
        if not np.isfinite(values).all():
            raise UserError(f"{tensor.file}: the tensor {place.name} has values that are not finite numbers")
        for shard, buffer in buffers.values():
            # No mesh axis splits layers, nor queries from keys and values: a shard has all rows and parts.
            inner = shard if place.row is None else shard[1:]
            target = buffer if place.row is None else buffer[place.row]
            if place.part is not None:
                inner, target = inner[:1] + inner[2:], target[:, place.part]
            target[...] = values[inner]
        del values  # before the next is read
    return jax.make_array_from_callback(leaf.shape, leaf.sharding, lambda index: buffers[str(bounds(index))][1])


def _aligned(shape: list[int], dtype: np.dtype) -> np.ndarray:
    """An empty array that begins at a multiple of 64 bytes: JAX takes such a one for a CPU's without copying it."""
    num_bytes = math.prod(shape) * dtype.itemsize
    memory = np.empty(num_bytes + 64, np.uint8)
    start = -memory.ctypes.data % 64
    return memory[start : start + num_bytes].view(dtype).reshape(shape)
