"""Reading of the weights of a Hugging Face directory: names and shapes are checked first, then tensors are streamed."""

import dataclasses
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np

from gptjax.config import GPTConfig, UserError
from gptjax.interop import families, llava_family, mxfp4, safetensors_files
from gptjax.interop.family import HEAD, Family, Placement, placements
from gptjax.interop.mxfp4 import PackedTensor
from gptjax.interop.safetensors_files import DTYPES, Tensor

Tensors = dict[str, Tensor | PackedTensor]


def read_parameters(
    directory: Path, family: Family, config: GPTConfig, leaves: dict[str, jax.ShapeDtypeStruct]
) -> dict[str, jax.Array]:
    """Reads all parameters, with their dtypes and shardings in `leaves`, by path.

    The memory on top of the parameters is that of one tensor, or of one expert's part of a tensor.

    Raises:
      UserError: a tensor is missing, damaged, superfluous or of a wrong shape.
    """
    headers = safetensors_files.read_headers(directory)
    of_images: dict[str, jax.Array] = {}
    if config.reads_images:
        headers, of_images = _without_images(directory, config, leaves, headers)
        leaves = {path: leaf for path, leaf in leaves.items() if path not in of_images}
    tensors = _without_prefix(directory, family, headers)
    table = _match(directory, family, config, leaves, tensors)
    # Parameters that are read from the same tensors are read together.
    groups: dict[tuple[str, ...], list[str]] = {}
    for path, places in table.items():
        groups.setdefault(tuple(place.name for place in places), []).append(path)
    # The largest first, so that the peak memory, which includes the buffer of the tensor being read, is low.
    order = sorted(groups.values(), key=lambda paths: -sum(math.prod(leaves[path].shape) for path in paths))
    arrays = of_images
    for paths in order:
        arrays |= _read_group({path: leaves[path] for path in paths}, [table[path] for path in paths], tensors)
    return arrays


def _without_images(
    directory: Path, config: GPTConfig, leaves: dict[str, jax.ShapeDtypeStruct], headers: dict[str, Tensor]
) -> tuple[dict[str, Tensor], dict[str, jax.Array]]:
    """Reads tower and projector of a LLaVA; returns the tensors of its text model, and these parameters by path."""
    tensors = {llava_family.unified_name(name): tensor for name, tensor in headers.items()}
    parameters = {path: np.empty(leaf.shape, leaf.dtype) for path, leaf in leaves.items() if path.startswith("vision/")}
    for entry in llava_family.entries(config):
        tensor, target = tensors.pop(entry.name, None), parameters[entry.path][entry.part]
        if tensor is None:
            raise UserError(f"{directory} lacks the tensor {entry.name}, which its config.json requires")
        wanted = entry.to_theirs(target).shape
        if tensor.shape != wanted or tensor.dtype not in DTYPES:
            raise UserError(
                f"{tensor.file}: the tensor {entry.name} is {tensor.dtype} {list(tensor.shape)}, but config.json "
                f"requires {list(wanted)} of {', '.join(DTYPES)}: one of the two is another model's"
            )
        values = safetensors_files.read(tensor)
        if not np.isfinite(values).all():
            raise UserError(f"{tensor.file}: the tensor {entry.name} has values that are not finite numbers")
        parameters[entry.path][entry.part] = entry.to_ours(values)
    text: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        if name.endswith("position_ids") or name.startswith(f"{llava_family.TOWER}head."):  # a buffer, SigLIP's pooling
            continue
        prefix = next((prefix for prefix in llava_family.TEXT_PREFIXES if name.startswith(prefix)), "")
        text[name.removeprefix(prefix)] = tensor
    return text, {path: jax.device_put(array, leaves[path].sharding) for path, array in parameters.items()}


# --- names and shapes -------------------------------------------------------------------------------------------------


def _without_prefix(directory: Path, family: Family, tensors: dict[str, Tensor]) -> Tensors:
    """Returns the weights by their names in the tables: without the prefix, without buffers, and pairs joined."""
    weights: dict[str, Tensor] = {}
    for full_name, tensor in tensors.items():
        name = full_name.removeprefix(family.prefix)
        if families.BUFFERS.fullmatch(name):
            continue
        if name in weights:
            raise UserError(f"{directory} has the tensor {name} twice, with and without {family.prefix!r}")
        weights[name] = tensor
    if families.quantisation_of(family, families.read_json_config(directory)) == "mxfp4":
        return mxfp4.joined(weights)
    return dict(weights)


def _match(
    directory: Path, family: Family, config: GPTConfig, leaves: dict[str, Any], tensors: Tensors
) -> dict[str, list[Placement]]:
    """Returns the placements of each parameter, having checked that all tensors are used and have the right shapes.

    A tied head is removed from `tensors`, or replaces the token embedding if that is missing.
    """
    embedding = family.names["token_embedding/embedding"][0]
    assert isinstance(embedding, str)
    head = tensors.pop(HEAD, None) if config.tied_head else None
    if head is not None and embedding not in tensors:
        tensors[embedding] = head
    unused = set(tensors)
    table: dict[str, list[Placement]] = {}
    for path, leaf in leaves.items():
        table[path] = list(placements(family, len(config.attention_pattern), path, leaf.shape))
        for place in table[path]:
            tensor = tensors.get(place.name)
            unused.discard(place.name)
            if tensor is None:
                raise UserError(
                    f"{directory} lacks the tensor {place.name} {list(place.shape)}, which its config.json "
                    f"({family.model_type}, {config.num_layers} layers) requires"
                )
            if tensor.shape != place.shape:
                raise UserError(
                    f"{tensor.file}: the tensor {place.name} has shape {list(tensor.shape)}, but config.json requires "
                    f"{list(place.shape)}: one of the two is another model's"
                )
            if tensor.dtype not in DTYPES:
                raise UserError(
                    f"{tensor.file}: the tensor {place.name} is of dtype {tensor.dtype}: save it as one of "
                    f"{', '.join(DTYPES)}"
                )
    if unused:
        name = next(name for name in tensors if name in unused)
        raise UserError(
            f"{tensors[name].file} has the tensor {name} {list(tensors[name].shape)}, which has no place in a "
            f"{family.model_type} of {config.num_layers} layers with a language-modelling head"
        )
    if head is not None and not _same(head, tensors[embedding]):
        raise UserError(
            f"{head.file}: {HEAD} {list(head.shape)} is not the same as {embedding} "
            f"{list(tensors[embedding].shape)}, but config.json says tie_word_embeddings=true: one of the two is wrong"
        )
    return table


def _same(head: Tensor | PackedTensor, embedding: Tensor | PackedTensor) -> bool:
    assert isinstance(head, Tensor)
    assert isinstance(embedding, Tensor)
    return safetensors_files.same_bytes(head, embedding)


# --- values -----------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class _Shards:
    """The buffers of a parameter: one for each different shard of this process's devices."""

    leaf: jax.ShapeDtypeStruct
    buffers: dict[str, tuple[tuple[slice, ...], np.ndarray]]

    @classmethod
    def of(cls, leaf: jax.ShapeDtypeStruct) -> "_Shards":
        assert leaf.sharding is not None
        shards = [_bounds(leaf, index) for index in leaf.sharding.addressable_devices_indices_map(leaf.shape).values()]
        dtype = np.dtype(leaf.dtype)
        return cls(
            leaf,
            {str(shard): (shard, _aligned([part.stop - part.start for part in shard], dtype)) for shard in shards},
        )

    def fill(self, place: Placement, expert: int | None, theirs: np.ndarray) -> None:
        """Copies a tensor, or one expert's, into its place."""
        values = place.to_ours(theirs, expert)
        for shard, buffer in self.buffers.values():
            # The axes of layers and of queries, keys and values are never sharded: a shard has all rows and parts.
            inner, target = (shard, buffer) if place.row is None else (shard[1:], buffer[place.row])
            target = target[place.selection]
            if place.part is not None:
                inner = inner[: place.part_axis] + inner[place.part_axis + 1 :]
            if expert is None:
                _copy(target, values[inner])
            elif inner[0].start <= expert < inner[0].stop:
                _copy(target[expert - inner[0].start], values[inner[1:]])

    def array(self) -> jax.Array:
        leaf = self.leaf
        return jax.make_array_from_callback(
            leaf.shape, leaf.sharding, lambda index: self.buffers[str(_bounds(leaf, index))][1]
        )


def _bounds(leaf: jax.ShapeDtypeStruct, index: tuple[slice, ...] | None) -> tuple[slice, ...]:
    assert index is not None
    return tuple(slice(*part.indices(size)[:2]) for part, size in zip(index, leaf.shape, strict=True))


def _read_group(
    leaves: dict[str, jax.ShapeDtypeStruct], places: list[list[Placement]], tensors: Tensors
) -> dict[str, jax.Array]:
    """Reads parameters that share tensors: each tensor is read once, and each device gets its shards."""
    shards = {path: _Shards.of(leaf) for path, leaf in leaves.items()}
    for same in zip(*places, strict=True):
        for expert, values in _pieces(tensors[same[0].name], same[0]):
            for place in same:
                shards[place.path].fill(place, expert, values)
            del values  # before the next is read
    return {path: shard.array() for path, shard in shards.items()}


def _pieces(tensor: Tensor | PackedTensor, place: Placement) -> Iterator[tuple[int | None, np.ndarray]]:
    """Reads a tensor as a whole; or one expert after the other, each with its index."""
    for expert in range(tensor.shape[0]) if place.stacked else (None,):
        if isinstance(tensor, PackedTensor):
            assert expert is not None
            values = tensor.read(expert)
        else:
            values = safetensors_files.read(tensor, expert)
        if not np.isfinite(values).all():
            raise UserError(f"{tensor.file}: the tensor {place.name} has values that are not finite numbers")
        yield expert, values
        del values


def _copy(target: np.ndarray, values: np.ndarray) -> None:
    if target.dtype == values.dtype:  # twice as fast as numbers of a dtype that numpy itself lacks
        target, values = (x.view(f"u{x.dtype.itemsize}") for x in (target, values))
    target[...] = values


def _aligned(shape: list[int], dtype: np.dtype) -> np.ndarray:
    """Returns an uninitialised array aligned to 64 bytes, which JAX uses on a CPU without copying."""
    num_bytes = math.prod(shape) * dtype.itemsize
    memory = np.empty(num_bytes + 64, np.uint8)
    start = -memory.ctypes.data % 64
    return memory[start : start + num_bytes].view(dtype).reshape(shape)
