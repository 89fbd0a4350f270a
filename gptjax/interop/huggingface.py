"""Import and export of Hugging Face directories: config.json, safetensors, tokenizer files.

All names and shapes are checked from headers before a weight is read, weights are held in memory one tensor at a time,
and a directory is written under a temporary name and renamed when it is complete.
"""

import contextlib
import dataclasses
import itertools
import json
import re
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
from gptjax.files import expand, remove_tree, unfinished_path
from gptjax.interop import families, image_processors, llava_family, safetensors_files, task_heads
from gptjax.interop.family import Family, Placement, placements
from gptjax.interop.pretrained_weights import read_parameters
from gptjax.interop.safetensors_files import DTYPES, Declared
from gptjax.interop.task_heads import ExportedHead
from gptjax.interop.tokenizer_files import ends_of, read_tokenizer, write_tokenizer
from gptjax.models.gpt import GPT, abstract_params
from gptjax.parallel.mesh import make_mesh
from gptjax.stages import registry
from gptjax.stages.registry import completed_config
from gptjax.stages.saved_weights import load_weights

DType = Literal["float32", "bfloat16"]

_HUB_FILES = ["*.safetensors", "*.json", "merges.txt"]
_HUB_NAME = re.compile(r"\w[\w.-]*/\w[\w.-]*")
_CONTAINER_DTYPE = {str(dtype): name for name, dtype in DTYPES.items()}


def load_pretrained(
    directory: str | Path, dtype: DType = "float32", mesh: Mesh | None = None, param_dtype: DType = "float32"
) -> tuple[GPT, Any]:
    """Loads the model in a Hugging Face directory, of a family in `families.FAMILIES`.

    `model.apply({"params": params}, tokens_BT)` gives the logits, float32 (B, T, V), of transformers' model.

    Args:
      directory: directory with config.json and model.safetensors, or its shards and their index.
      dtype: dtype of activations.
      mesh: mesh over which the parameters are sharded; None: all devices if their number divides the model width.
      param_dtype: dtype of the parameters, whatever the file's. Training needs float32: bfloat16 has a relative spacing
        of 1/256, so most updates of a small learning rate round to zero. For inference bfloat16 halves the memory.

    Returns:
      The model, and its parameters in the structure of `model.init`.

    Raises:
      UserError: a tensor is missing, damaged, superfluous or of a wrong shape, or GPTConfig cannot express the model.
    """
    directory = Path(directory).expanduser()
    family, config = families.read_config(directory)
    config = dataclasses.replace(config, dtype=dtype, param_dtype=param_dtype)
    mesh = make_mesh(_spread(config)) if mesh is None else mesh
    abstract = abstract_params(GPT(config), mesh)
    leaves = _by_path(abstract)
    arrays = read_parameters(directory, family, config, leaves)
    return GPT(config), jax.tree.unflatten(jax.tree.structure(abstract), [arrays[path] for path in leaves])


def save_pretrained(
    config: GPTConfig,
    params: Any,
    directory: str | Path,
    tokenizer: tokenizers.Tokenizer | None = None,
    max_file_bytes: int = safetensors_files.MAX_FILE_BYTES,
) -> None:
    """Writes a directory that transformers' AutoModelForCausalLM loads, with bit-identical `params`.

    Args:
      config: resolved config of the model.
      params: parameters in the structure of `GPT(config).init`, unboxed; this process must hold all of them.
      directory: directory to create; it must not exist, or be empty.
      tokenizer: tokenizer to write with the model; its end-of-text becomes the config's. None: neither is written.
      max_file_bytes: maximum bytes of tensors in a file; a larger model is written as shards with an index.

    Raises:
      UserError: no family can express the config, or `directory` is not empty.
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
    head: ExportedHead | None = None,
) -> None:
    """Implements `save_pretrained` with shapes and dtypes in `abstract`, by path, and values in `leaves`.

    Args:
      chat: as in `write_tokenizer`.
      head: head of a fine-tuned task, which replaces the language model's.
    """
    assert config.vocab_size is not None
    of_images: dict[str, np.ndarray] = {}
    if config.reads_images:
        config, abstract, leaves, of_images = _split_images(config, abstract, leaves)
    family = families.family_of(config)
    theirs = families.to_config_json(family, config, () if tokenizer is None else tokenizer.ends)
    if chat is not None:
        several = [*chat.end_tokens, *(() if tokenizer is None else tokenizer.ends)]
        theirs["eos_token_id"] = chat.end_of_turn if len(chat.end_tokens) == 1 else list(dict.fromkeys(several))
    layer: dict[str, np.ndarray] = {}
    if head is not None:
        layer = {f"{head.module}.{name}": array for name, array in head.tensors.items()}
        theirs |= head.settings | {"architectures": [head.architecture]}
    layer |= of_images
    tensors = _TensorPieces(family, config, abstract)
    declared = tensors.declared + [
        Declared(name, _CONTAINER_DTYPE[str(array.dtype)], array.shape) for name, array in layer.items()
    ]
    arrays = itertools.chain(tensors.values(leaves), layer.values())

    with new_directory(directory) as unfinished:
        (unfinished / "config.json").write_text(json.dumps(theirs, indent=2) + "\n")
        safetensors_files.write(unfinished, declared, arrays, max_file_bytes)
        if config.reads_images:
            image_processors.write_processor(config.vision, unfinished)
        if tokenizer is not None:
            write_tokenizer(tokenizer, unfinished, config.context_length, chat, is_task=head is not None)


def _split_images(
    config: GPTConfig, abstract: dict[str, Any], leaves: Iterator[Any]
) -> tuple[GPTConfig, dict[str, Any], Iterator[Any], dict[str, np.ndarray]]:
    """Separates the tensors of a LLaVA's tower and projector from the parameters of its text model.

    A tied head becomes one of its own with equal values, as transformers' LLaVA does not tie that of a GPT-2.
    """
    llava_family.vision_keys(config, {})  # raises for settings that a LLaVA lacks
    values = dict(zip(abstract, leaves, strict=True))
    of_images = dict(llava_family.to_theirs(config, values))
    text = {path: leaf for path, leaf in abstract.items() if not path.startswith("vision/")}
    if config.tied_head:
        config = dataclasses.replace(config, tied_head=False)
        text["head_embedding/embedding"] = text["token_embedding/embedding"]
        values["head_embedding/embedding"] = values["token_embedding/embedding"]
    return config, text, iter([values[path] for path in text]), of_images


class _TensorPieces:
    """The tensors of transformers that parameters become, in the order in which the parameters are complete.

    A tensor may have the columns of two parameters; the first of them is held until the second is there.
    """

    def __init__(self, family: Family, config: GPTConfig, abstract: dict[str, Any]) -> None:
        """`abstract`: shapes and dtypes of the parameters, by path, in the order of their values."""
        self._paths = list(abstract)
        self._pieces: dict[str, list[Placement]] = {}
        for path, leaf in abstract.items():
            for place in placements(family, len(config.attention_pattern), path, leaf.shape):
                self._pieces.setdefault(place.name, []).append(place)
        # Tensors by the last parameter that they need.
        self._names: dict[str, list[str]] = {path: [] for path in abstract}
        self.declared: list[Declared] = []
        for name, pieces in self._pieces.items():
            self._names[pieces[-1].path].append(name)
        for path, names in self._names.items():
            dtype = _CONTAINER_DTYPE[str(abstract[path].dtype)]
            full = llava_family.text_name if config.reads_images else family.full_name
            self.declared += [Declared(full(name), dtype, self._pieces[name][-1].shape) for name in names]

    def values(self, leaves: Iterator[Any]) -> Iterator[np.ndarray]:
        """Yields the tensors in the order of `declared`; `leaves`: values of the parameters."""
        held: dict[str, Any] = {}
        for path, leaf in zip(self._paths, leaves, strict=True):
            held[path] = leaf
            for name in self._names[path]:
                yield self._joined(self._pieces[name], held)
            for complete in {place.path for name in self._names[path] for place in self._pieces[name]}:
                del held[complete]

    @staticmethod
    def _joined(pieces: list[Placement], held: dict[str, Any]) -> np.ndarray:
        parts = [place.to_theirs(np.asarray(_layer(held[place.path], place.row))) for place in pieces]
        if pieces[0].first is None:
            return parts[0]
        tensor = np.empty(pieces[0].shape, parts[0].dtype)
        for place, part in zip(pieces, parts, strict=True):
            tensor[..., place.first :: 2] = part
        return tensor


def _layer(leaf: Any, row: int | None) -> Any:
    return leaf if row is None else leaf[row]


def read_model(
    source: str, dtype: DType = "float32", tokenizer: str | None = None, param_dtype: DType = "float32"
) -> tuple[GPT, Any, tokenizers.Tokenizer]:
    """Reads the model, its parameters and its tokenizer. Arguments and errors are those of `import_workdir`."""
    directory = _find(source)
    found = _tokenizer(directory, tokenizer)
    _, config = families.read_config(directory)
    assert config.vocab_size is not None
    if config.vocab_size < found.vocab_size:
        raise UserError(
            f"the tokenizer has {found.vocab_size} tokens, but the model in {directory} a vocab_size of only "
            f"{config.vocab_size}: give the model's own with --tokenizer"
        )
    if ends := ends_of(directory, found):
        found = found.with_ends(ends)
    model, params = load_pretrained(directory, dtype, param_dtype=param_dtype)
    return model, params, found


def import_workdir(
    source: str,
    workdir: Path,
    dtype: DType = "float32",
    tokenizer: str | None = None,
    param_dtype: DType = "float32",
) -> None:
    """Creates a workdir from a Hugging Face directory, for all commands and for `init_from`.

    Args:
      source: directory as for `load_pretrained`, or a model's name on the Hugging Face Hub.
      workdir: directory to create; it must not exist, or be empty.
      dtype: dtype of activations.
      tokenizer: gpt2, cl100k_base, bytes or json:PATH. None: the directory's own.
      param_dtype: as in `load_pretrained`.

    Raises:
      UserError: as in `load_pretrained`; there is no tokenizer, or it has more tokens than the model.
    """
    check_new(workdir)
    model, params, found = read_model(source, dtype, tokenizer, param_dtype)
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
    """Writes the newest, the best or the chosen weights of a workdir as a Hugging Face directory (`save_pretrained`).

    Low-rank matrices are merged. A fine-tuned task becomes the transformers class with its head (`interop.task_heads`)
    with the weights of the best checkpoint, as in `gptjax.predict`; its tokenizer adds the start, delimiter and extract
    tokens. The tokenizer of a chat model has the chat template and its special tokens.

    Raises:
      UserError: transformers has no class for the model or its head; `directory` is not new.
    """
    check_new(directory)
    config, tokenizer = completed_config(workdir)
    family = families.family_of(config.model)  # before the checkpoint is opened
    task_heads.check(workdir, family, config)
    mesh = make_mesh(MeshConfig())
    abstract = abstract_params(GPT(config.model), mesh)
    definition = registry.definition(config)
    if definition.adds_tokens or config.peft.method != "none" or best or step is not None:
        is_task = definition.head == "task"
        with jax.set_mesh(mesh):
            weights = load_weights(workdir, mesh, best=best or definition.uses_best_checkpoint, step=step)
        head, leaves = None, _by_path(weights.gpt)
        if is_task:
            head, leaves = task_heads.split_head(family, config, tokenizer, weights.gpt | {"head": weights.head})
        arrays = (np.asarray(leaves[path]) for path in _by_path(abstract))
        form = chat_format(config.chat, tokenizer, config.model.vision) if definition.conversational else None
        _save(config.model, _by_path(abstract), arrays, directory, tokenizer, chat=form, head=head)
        return
    with Checkpoints(workdir, config.checkpoint, read_only=True) as checkpoints:
        if checkpoints.latest_step() is None:
            raise UserError(f"{workdir} has no checkpoint yet")
        _save(config.model, _by_path(abstract), checkpoints.stream_params(abstract), directory, tokenizer)


# --- atomic directories -----------------------------------------------------------------------------------------------


def check_new(directory: Path) -> None:
    """Raises UserError unless `directory` does not exist or is empty."""
    if directory.exists() and (not directory.is_dir() or any(directory.iterdir())):
        raise UserError(f"{directory} exists already: name a new directory, or remove it")


@contextlib.contextmanager
def new_directory(directory: Path) -> Iterator[Path]:
    """Yields a temporary directory, which is renamed to `directory` on success and removed on an error."""
    check_new(directory)
    unfinished = unfinished_path(directory.absolute())
    try:
        unfinished.mkdir(parents=True)
        yield unfinished
        unfinished.rename(directory)
    except OSError as error:
        raise UserError(f"cannot write {directory}: {error.strerror}") from None
    finally:
        remove_tree(unfinished)


# --- reading ----------------------------------------------------------------------------------------------------------


def _find(source: str) -> Path:
    """Returns the directory named by `source`, downloaded if it is a model on the Hugging Face Hub."""
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
                f"{directory} has neither tokenizer.json nor vocab.json and merges.txt: name the model's tokenizer, "
                "as in --tokenizer=gpt2 or --tokenizer=json:PATH"
            )
        return found
    tokenizers.check_spec(spec)
    kind, _, path = spec.partition(":")
    if kind == "json":
        return tokenizers.read_json(expand(path))
    if path:
        raise UserError(f"--tokenizer={spec} is a tokenizer to train: name the one that the model was trained with")
    cache_dir = expand(DataConfig.cache_dir)
    return tokenizers.get_tokenizer(spec, train_documents=tuple, corpus_fingerprint="", cache_dir=cache_dir)


def _spread(config: GPTConfig) -> MeshConfig:
    """Returns a mesh with all devices on axis fsdp, or on data if their number does not divide the model width."""
    return MeshConfig() if config.embed_dim % jax.device_count() else MeshConfig(data=1, fsdp=-1)


def _by_path(tree: Any) -> dict[str, Any]:
    """Returns the leaves of a tree, by paths such as layers/block_0/mlp/up/kernel, in the tree's order."""
    leaves = jax.tree_util.tree_flatten_with_path(tree)[0]
    return {jax.tree_util.keystr(path, simple=True, separator="/"): leaf for path, leaf in leaves}
