"""Reading and writing of safetensors files, one tensor at a time.

The safetensors library maps or copies a whole file, which counts as memory of the process, so a model that fills the
machine could not be read or written. Format: https://github.com/huggingface/safetensors.
"""

import dataclasses
import json
import math
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from gptjax.config import UserError
from gptjax.files import is_plain_name, read_json

SINGLE_FILE = "model.safetensors"
INDEX_FILE = SINGLE_FILE + ".index.json"
MAX_FILE_BYTES = 5 * 10**9  # of tensors in one file, as transformers does
_MAX_HEADER_BYTES = 100_000_000  # the format's own limit

DTYPES = {"F32": np.dtype(np.float32), "F16": np.dtype(np.float16), "BF16": np.dtype(jnp.bfloat16)}
_BYTES = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2, "I64": 8, "I32": 4, "I16": 2, "I8": 1, "U8": 1, "BOOL": 1}
_PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl", "*.h5", "*.msgpack")


@dataclasses.dataclass(frozen=True)
class Tensor:
    """A tensor in a file: `dtype` as named by the format, `start` in bytes from the start of the file."""

    file: Path
    dtype: str
    shape: tuple[int, ...]
    start: int
    num_bytes: int


def read_headers(directory: Path) -> dict[str, Tensor]:
    """Reads the headers of all tensors of a model's directory, by name.

    Raises:
      UserError: there are no safetensors files, one is damaged or truncated, or the index does not match them.
    """
    single, index = directory / SINGLE_FILE, directory / INDEX_FILE
    if single.is_file():
        return read_header(single)
    if not index.is_file():
        found = sorted(path.name for pattern in _PICKLES for path in directory.glob(pattern))
        other = f"its {found[0]} is" if found else "pickled weights are"
        raise UserError(
            f"{directory} has neither {SINGLE_FILE} nor {INDEX_FILE}, and {other} not read, as a pickle can run any "
            "code: if you trust it, convert it with AutoModelForCausalLM.from_pretrained(DIR).save_pretrained(NEW_DIR) "
            "of transformers"
        )
    files = _read_index(index)
    tensors: dict[str, Tensor] = {}
    for file in sorted(set(files.values())):
        if not (directory / file).is_file():
            raise UserError(f"{directory / file}, named in {INDEX_FILE}, is missing: download it again")
        for name, tensor in read_header(directory / file).items():
            if files.get(name) != file:
                raise UserError(f"{tensor.file} has the tensor {name}, which {INDEX_FILE} does not list for it")
            tensors[name] = tensor
    if missing := sorted(set(files) - set(tensors)):
        raise UserError(
            f"{directory / files[missing[0]]} lacks the tensor {missing[0]}, which {INDEX_FILE} lists for it"
        )
    return tensors


def _read_index(path: Path) -> dict[str, str]:
    """Reads the name of each tensor's file, in the directory of the index, by name of the tensor."""
    try:
        files = read_json(path)["weight_map"]
        pairs = list(files.items())
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise UserError(f"cannot read {path}: {error!r}") from None
    for name, file in pairs:
        if not is_plain_name(file) or not file.endswith(".safetensors"):
            raise UserError(f"{path} has the tensor {name} in {file!r}, which is not the name of a file next to it")
    return files


def read_header(path: Path) -> dict[str, Tensor]:
    size = path.stat().st_size
    with path.open("rb") as file:
        header_bytes = int.from_bytes(file.read(8), "little")
        if size < 8 or not 0 < header_bytes <= min(_MAX_HEADER_BYTES, size - 8):
            raise UserError(f"{path} is not a safetensors file, or is cut off in its header: fetch it again")
        content = file.read(header_bytes)
    try:
        header = json.loads(content)
        header.pop("__metadata__", None)
        items = list(header.items())
    except (ValueError, TypeError, AttributeError, RecursionError) as error:
        raise UserError(f"{path} has a damaged header ({error}): fetch it again") from None
    return {name: _tensor(path, size, 8 + header_bytes, name, entry) for name, entry in items}


def _tensor(path: Path, size: int, data_start: int, name: str, entry: Any) -> Tensor:
    try:
        dtype, shape, (start, end) = entry["dtype"], tuple(entry["shape"]), entry["data_offsets"]
        sound = isinstance(dtype, str) and all(type(number) is int and number >= 0 for number in (*shape, start, end))
    except (TypeError, ValueError, KeyError):
        sound = False
    if not sound:
        raise UserError(f"{path} has a damaged header: the tensor {name} is described by {entry!r}")
    if dtype in _BYTES and end - start != math.prod(shape) * _BYTES[dtype]:
        raise UserError(f"{path}: the tensor {name} {list(shape)} of {dtype} does not fill its {end - start} bytes")
    if data_start + end > size:
        raise UserError(
            f"{path} is cut off: the tensor {name} {list(shape)} ends at byte {data_start + end}, the file at {size}: "
            "fetch it again"
        )
    return Tensor(path, dtype, shape, data_start + start, end - start)


def read(tensor: Tensor, row: int | None = None) -> np.ndarray:
    """The values of a tensor of one of DTYPES or U8, in an array of its own; `row`: of this row of its first axis."""
    shape, start = (tensor.shape, 0) if row is None else (tensor.shape[1:], row * tensor.num_bytes // tensor.shape[0])
    array = np.empty(shape, DTYPES.get(tensor.dtype, np.dtype(np.uint8)))
    with tensor.file.open("rb") as file:
        file.seek(tensor.start + start)
        count = file.readinto(array.reshape(-1).view(np.uint8).data)
    if count != array.nbytes:
        raise UserError(f"{tensor.file} became shorter while it was read")
    return array


def same_bytes(first: Tensor, second: Tensor, chunk_bytes: int = 2**24) -> bool:
    """Whether two tensors have the same dtype, shape and values."""
    if (first.dtype, first.shape) != (second.dtype, second.shape):
        return False
    with first.file.open("rb") as one, second.file.open("rb") as other:
        one.seek(first.start)
        other.seek(second.start)
        for start in range(0, first.num_bytes, chunk_bytes):
            count = min(chunk_bytes, first.num_bytes - start)
            if one.read(count) != other.read(count):
                return False
    return True


# --- writing ----------------------------------------------------------------------------------------------------------


class Declared(NamedTuple):
    """A tensor to write, with its dtype as named by the format."""

    name: str
    dtype: str
    shape: tuple[int, ...]

    @property
    def num_bytes(self) -> int:
        return math.prod(self.shape) * _BYTES[self.dtype]


def write(
    directory: Path, declared: list[Declared], arrays: Iterable[np.ndarray], max_file_bytes: int = MAX_FILE_BYTES
) -> None:
    """Writes model.safetensors, or shards and their index if the tensors exceed `max_file_bytes`.

    Args:
      declared: all tensors.
      arrays: their values in the same order, consumed one at a time.
    """
    files: list[list[Declared]] = [[]]
    for tensor in declared:
        if files[-1] and sum(other.num_bytes for other in files[-1]) + tensor.num_bytes > max_file_bytes:
            files.append([])
        files[-1].append(tensor)
    names = [SINGLE_FILE]
    if len(files) > 1:
        stem = SINGLE_FILE.removesuffix(".safetensors")
        names = [f"{stem}-{i:05}-of-{len(files):05}.safetensors" for i in range(1, len(files) + 1)]
        index = {
            "metadata": {"total_size": sum(tensor.num_bytes for tensor in declared)},
            "weight_map": {tensor.name: name for name, file in zip(names, files, strict=True) for tensor in file},
        }
        (directory / INDEX_FILE).write_text(json.dumps(index, indent=2) + "\n")
    values = iter(arrays)
    for name, tensors in zip(names, files, strict=True):
        with (directory / name).open("wb") as out:
            out.write(_header(tensors))
            for tensor in tensors:
                array = np.ascontiguousarray(next(values))
                assert array.shape == tensor.shape
                assert array.dtype == DTYPES.get(tensor.dtype, np.uint8)
                out.write(array.reshape(-1).view(np.uint8).data)


def _header(tensors: list[Declared]) -> bytes:
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}  # required by transformers
    start = 0
    for tensor in tensors:
        end = start + tensor.num_bytes
        header[tensor.name] = {"dtype": tensor.dtype, "shape": list(tensor.shape), "data_offsets": [start, end]}
        start = end
    content = json.dumps(header, separators=(",", ":")).encode()
    content += b" " * (-len(content) % 8)  # the tensors start aligned
    return len(content).to_bytes(8, "little") + content
