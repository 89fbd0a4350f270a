"""Reading and writing of LoRA matrices in Hugging Face PEFT's format: adapter_config.json, adapter_model.safetensors.

PEFT stores (r, inputs) and (outputs, r) for each layer, gptjax (layers, inputs, r) and (layers, r, outputs). Where a
family has separate matrices for queries, keys and values (`family.Placement.part`), they share lora_a in gptjax, and
each has a third of lora_b. LoRA on a mixture of experts is stored as `interop.peft_parameters` describes.
"""

import dataclasses
import json
import math
import re
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from gptjax.config import GPTConfig, PeftConfig, UserError
from gptjax.interop import families, safetensors_files
from gptjax.interop.family import Family, Placement, placements
from gptjax.interop.huggingface import new_directory
from gptjax.interop.peft_parameters import Piece, file_names, is_parameter, joined, of_kernel
from gptjax.interop.peft_settings import CONFIG_FILE, LoraSettings, read_settings
from gptjax.interop.safetensors_files import DTYPES, Declared, Tensor
from gptjax.models import peft
from gptjax.models.gpt import GPT, model_axes

WEIGHTS_FILE, PICKLE_FILE = "adapter_model.safetensors", "adapter_model.bin"
_PREFIX = "base_model.model."
_NAME = re.compile(r"(.+)\.lora_([AB])\.weight")
Pair = tuple[np.ndarray, np.ndarray]  # (inputs, r) and (r, outputs), float32; with the experts before them
_CONTAINER_DTYPE = {str(dtype): name for name, dtype in DTYPES.items()}


def save_lora(
    directory: str | Path,
    config: PeftConfig,
    model: GPTConfig,
    leaves: Any,
    base: str | None = None,
    *,
    task_type: str = "CAUSAL_LM",
    modules: Mapping[str, Mapping[str, np.ndarray]] | None = None,
    write_more: Callable[[Path], None] = lambda _: None,
) -> None:
    """Writes a directory that PEFT's PeftModel.from_pretrained loads over the output of `save_pretrained`.

    Args:
      directory: directory to create; it must not exist, or be empty.
      config: PEFT config with method lora.
      model: resolved config of the model.
      leaves: nested dict of only lora_a and lora_b, unboxed, with the paths of `low_rank`.
      base: name or directory of the base model, written to adapter_config.json; None: none.
      task_type: PEFT's task type, such as SEQ_CLS.
      modules: tensors of `modules_to_save`, which replace those of the base model, by module of transformers' class
        and by name.
      write_more: writes further files into the directory before it is renamed.

    Raises:
      UserError: no family can express the model, `leaves` has other parameters, or `directory` is not empty.
    """
    family = families.family_of(model)
    tensors, targets, parameters = _written(family, config, model, peft.flatten(leaves))
    for module, arrays in (modules or {}).items():
        tensors |= {f"{module}.{name}": array for name, array in arrays.items()}
    declared = [
        Declared(_PREFIX + name, _CONTAINER_DTYPE[str(array.dtype)], array.shape) for name, array in tensors.items()
    ]
    theirs_config: dict[str, Any] = {
        "peft_type": "LORA",
        "task_type": task_type,
        "base_model_name_or_path": base,
        "inference_mode": True,
        "r": config.rank,
        "lora_alpha": _as_int(config.alpha),
        "lora_dropout": config.dropout,
        "target_modules": _shortened(family, targets, model.num_layers),
        "fan_in_fan_out": not family.transposed,
        "bias": "none",
    }
    if parameters:
        theirs_config["target_parameters"] = _shortened(family, list(parameters), model.num_layers)
    if fused := [name for name, rank in parameters.items() if rank != config.rank]:
        names, times = _shortened(family, fused, model.num_layers), parameters[fused[0]] // config.rank
        theirs_config["rank_pattern"] = dict.fromkeys(names, times * config.rank)
        theirs_config["alpha_pattern"] = dict.fromkeys(names, _as_int(times * config.alpha))
    if modules:
        is_tied = task_type == "CAUSAL_LM" and model.tied_head
        theirs_config |= {"modules_to_save": list(modules), "ensure_weight_tying": is_tied}
    with new_directory(Path(directory).expanduser()) as unfinished:
        (unfinished / CONFIG_FILE).write_text(json.dumps(theirs_config, indent=2) + "\n")
        safetensors_files.write(
            unfinished, declared, tensors.values(), max_file_bytes=sum(t.num_bytes for t in declared)
        )
        (unfinished / safetensors_files.SINGLE_FILE).rename(unfinished / WEIGHTS_FILE)
        write_more(unfinished)


def load_lora(directory: str | Path, model: GPTConfig) -> tuple[PeftConfig, dict[str, Any]]:
    """Loads the LoRA matrices of a PEFT directory, for a model from `load_pretrained`.

    Separate lora_A of queries, keys and values are concatenated if they differ: the rank is the sum of theirs, and
    lora_b is block diagonal. Kernels of a smaller rank are padded with zeros, which stay 0.

    Returns:
      A config with method, targets, rank, alpha and dropout, and defaults elsewhere; and the nested dict of lora_a and
      lora_b, to `join` to the model's parameters: numpy arrays of its param_dtype.

    Raises:
      UserError: a tensor is missing, damaged, superfluous or of a wrong shape, or is not LoRA on a layer's kernel.
    """
    directory = Path(directory).expanduser()
    settings = read_settings(directory / CONFIG_FILE)
    family = families.family_of(model)
    tensors = _read_headers(directory, family)
    shapes, period = _kernel_shapes(model), len(model.attention_pattern)
    places = {path: list(placements(family, period, path, shape)) for path, shape in shapes.items()}
    modules = _modules(family, places, settings)
    kernels: list[_Kernel] = []
    unused = dict.fromkeys(tensors)
    for path, shape in shapes.items():
        pairs: dict[tuple[int, int], Pair] = {}
        missing: list[Placement] = []
        for where in places[path]:
            keys = [(modules.get(where.name, ""), name) for name in "AB"]
            a, b = (tensors.get(key) for key in keys)
            if a is None and b is None:
                missing.append(where)
                continue
            assert where.row is not None  # a kernel of a layer
            pairs[where.row, where.part or 0] = _read_pair(directory, family, where, (a, b), settings)
            for key in keys:
                unused.pop(key, None)
        if pairs:
            rows = {row for row, _ in pairs}
            if gaps := [where.name for where in missing if where.row not in rows]:
                raise UserError(f"{directory} has no LoRA for {gaps[0]}, but for the same kernel of other layers")
            inputs = len(model_axes(model)[path].having("input"))
            kernels.append(_Kernel(path, shape, inputs, len(places[path]) // shape[0], pairs))
    if unused:
        module, name = next(iter(unused))
        raise UserError(
            f"{directory / WEIGHTS_FILE} has {module}.lora_{name}, but the model has no such kernel that LoRA can "
            "adapt, or target_parameters does not name it"
        )
    if not kernels:
        raise UserError(f"{directory / WEIGHTS_FILE} has no tensors")
    width = max(kernel.width for kernel in kernels)
    leaves: dict[str, Any] = {}
    for kernel in kernels:
        for name, leaf in zip(peft.LORA, kernel.to_ours(width), strict=True):
            leaves[kernel.path.removesuffix("kernel") + name] = leaf.astype(jnp.dtype(model.param_dtype))
    targets = tuple(kernel.path for kernel in kernels)  # regular expressions of themselves
    config = settings.config
    alpha = config.alpha / config.rank * width
    return dataclasses.replace(config, targets=targets, rank=width, alpha=alpha), peft.unflatten(leaves)


def _kernel_shapes(model: GPTConfig) -> dict[str, tuple[int, ...]]:
    """Returns the shapes of the layers' kernels, by path."""
    abstract = jax.eval_shape(lambda: nn.unbox(GPT(model).init(jax.random.key(0), jnp.zeros((1, 1), jnp.int32))))
    leaves = peft.flatten(abstract["params"]["layers"])
    return {f"layers/{path}": leaf.shape for path, leaf in leaves.items() if path.endswith("/kernel")}


# --- writing ----------------------------------------------------------------------------------------------------------


def _written(
    family: Family, config: PeftConfig, model: GPTConfig, arrays: dict[str, Any]
) -> tuple[dict[str, np.ndarray], list[str], dict[str, int]]:
    """Returns the tensors by name, the modules that they adapt, and the rank of each parameter that they adapt.

    Args:
      arrays: lora_a and lora_b, by path.
    """
    if others := [path for path in arrays if not path.startswith("layers/") or not path.endswith(peft.LORA)]:
        raise UserError(f"{others[0]} is not a LoRA matrix of a layer, and PEFT's format cannot express it")
    if config.dropout > 0 and (others := [path for path in arrays if is_parameter(path)]):
        raise UserError(
            f"peft.dropout={config.dropout} applies to {others[0]}, a parameter of transformers that is no linear "
            "layer, for which PEFT has no dropout: export the whole model with --to_hf"
        )
    tensors: dict[str, np.ndarray] = {}
    modules: list[str] = []
    pieces: dict[str, list[Piece]] = {}
    for path, shape in _kernel_shapes(model).items():
        a, b = (arrays.pop(path.removesuffix("kernel") + name, None) for name in peft.LORA)
        if a is None and b is None:
            continue
        assert a is not None
        assert b is not None
        rank_axis = 2 if "/experts/" in path else 1
        assert (*a.shape[:-1], *b.shape[rank_axis + 1 :]) == shape
        assert a.shape[-1] == b.shape[rank_axis] == config.rank
        a, b = np.asarray(a), np.asarray(b)
        for where in placements(family, len(model.attention_pattern), path, shape):
            if is_parameter(path):
                pieces.setdefault(where.name, []).append(Piece(where, a[where.row], b[where.row]))
                continue
            modules.append(where.name.removesuffix(".weight"))
            for name, theirs in zip("AB", _to_theirs(where, a, b), strict=True):
                tensors[f"{family.full_name(modules[-1])}.lora_{name}.weight"] = theirs
    names, parameters = file_names(list(pieces)), {}
    for parameter in map(joined, pieces.values()):
        parameters[parameter.name] = parameter.rank
        for name, theirs in (("A", parameter.a), ("B", parameter.b)):
            tensors[f"{family.full_name(names[parameter.name])}.lora_{name}.weight"] = theirs
    if arrays or not tensors:
        raise UserError(f"{next(iter(arrays), 'the empty tree')} is not a LoRA matrix of a kernel of the model")
    return tensors, modules, parameters


def _as_int(number: float) -> int | float:
    """Returns an int if the number is whole."""
    return int(number) if number == int(number) else number


def _to_theirs(where: Placement, a: np.ndarray, b: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Returns lora_A (r, inputs) and lora_B (outputs, r) of one matrix of transformers."""
    rank = a.shape[-1]
    part = b[where.row] if where.part is None else b[where.row][:, where.part]
    return a[where.row].reshape(-1, rank).T, part.reshape(rank, -1).T


def _shortened(family: Family, modules: list[str], num_layers: int) -> list[str]:
    """Returns PEFT's names of modules or parameters: without the layer if all layers are among them."""
    kinds: dict[str, list[str]] = {}
    for module in modules:
        kinds.setdefault(re.sub(r"^(h|layers)\.\d+\.", "", module), []).append(module)
    names: list[str] = []
    for kind, same in kinds.items():
        names += [kind] if len(same) == num_layers else [family.full_name(module) for module in same]
    return names


# --- reading ----------------------------------------------------------------------------------------------------------


def _modules(family: Family, places: Mapping[str, list[Placement]], settings: LoraSettings) -> dict[str, str]:
    """The module to which the files assign the matrices of a tensor of transformers, by its name."""
    linear = {where.name for path, own in places.items() if not is_parameter(path) for where in own}
    parameters = dict.fromkeys(where.name for path, own in places.items() if is_parameter(path) for where in own)
    adapted = file_names([name for name in parameters if settings.adapts(family.full_name(name))])
    return {name: name.removesuffix(".weight") for name in linear} | adapted


def _read_headers(directory: Path, family: Family) -> dict[tuple[str, str], Tensor]:
    """Reads the headers of a directory's tensors, by module without prefixes, and "A" or "B"."""
    path = directory / WEIGHTS_FILE
    if not path.is_file():
        found = f"{PICKLE_FILE} is" if (directory / PICKLE_FILE).is_file() else "pickled weights are"
        raise UserError(
            f"{directory} has no {WEIGHTS_FILE}, and {found} not read, as a pickle can run any code: if you trust it, "
            "load it with PEFT and save it again with safe_serialization=True"
        )
    tensors: dict[tuple[str, str], Tensor] = {}
    for name, tensor in safetensors_files.read_header(path).items():
        match = _NAME.fullmatch(name)
        if match is None:
            raise UserError(
                f"{path} has the tensor {name}, which is not LoRA on a kernel: other PEFT methods are not supported"
            )
        key = (match[1].removeprefix(_PREFIX).removeprefix(family.prefix), match[2])
        if key in tensors:
            raise UserError(f"{path} has {match[1]} twice, with and without {family.prefix!r}")
        if tensor.dtype not in DTYPES:
            raise UserError(
                f"{path}: the tensor {name} is of dtype {tensor.dtype}: save it as one of {', '.join(DTYPES)}"
            )
        tensors[key] = tensor
    return tensors


def _read_pair(
    directory: Path, family: Family, where: Placement, pair: tuple[Tensor | None, Tensor | None], settings: LoraSettings
) -> Pair:
    name = family.full_name(where.name if is_parameter(where.path) else where.name.removesuffix(".weight"))
    rank, experts = settings.rank(name), where.shape[0] if where.stacked else 1
    inputs, outputs = where.shape[-2:][::-1] if where.transposed else where.shape[-2:]
    arrays = []
    for matrix, tensor, shape in zip("AB", pair, ((rank * experts, inputs), (outputs, rank * experts)), strict=True):
        full_name = f"{where.name.removesuffix('weight').removesuffix('.')}.lora_{matrix}.weight"
        if tensor is None:
            raise UserError(f"{directory / WEIGHTS_FILE} lacks the tensor {full_name} {list(shape)}")
        if tensor.shape != shape:
            raise UserError(
                f"{tensor.file}: the tensor {full_name} has shape {list(tensor.shape)}, but r={rank} and the model "
                f"require {list(shape)}"
            )
        array = safetensors_files.read(tensor).astype(np.float32)
        if not np.isfinite(array).all():
            raise UserError(f"{tensor.file}: the tensor {full_name} has values that are not finite numbers")
        arrays.append(array)
    a, b = of_kernel(where, arrays[0], arrays[1], rank)
    return a, b * np.float32(settings.factor(name))


@dataclasses.dataclass(frozen=True)
class _Kernel:
    """The LoRA matrices of one gptjax kernel.

    Attributes:
      path: path of the kernel.
      shape: shape of the kernel, (L, inputs, outputs) or (L, experts, inputs, outputs).
      num_inputs: number of input axes of the kernel.
      num_parts: number of matrices of transformers that make up a layer's kernel.
      pairs: pairs of matrices by layer and part; parts may be missing.
    """

    path: str
    shape: tuple[int, ...]
    num_inputs: int
    num_parts: int
    pairs: dict[tuple[int, int], Pair]

    def _rows(self) -> Iterator[tuple[int, dict[int, Pair], bool]]:
        """Yields each layer with its pairs by part, and whether all have the same A."""
        for row in range(self.shape[0]):
            pairs = {part: pair for (other, part), pair in self.pairs.items() if other == row}
            first = next(iter(pairs.values()))
            yield row, pairs, all(np.array_equal(pair[0], first[0]) for pair in pairs.values())

    @property
    def width(self) -> int:
        """The rank of the joined matrices."""
        ranks = ((shared, [a.shape[-1] for a, _ in pairs.values()]) for _, pairs, shared in self._rows())
        return max(max(each) if shared else sum(each) for shared, each in ranks)

    def to_ours(self, width: int) -> Pair:
        """Returns lora_a (L, inputs, width) and lora_b (L, width, outputs); with the experts after the layers."""
        stacked = self.shape[: 2 if "/experts/" in self.path else 1]
        outputs = len(stacked) + self.num_inputs
        a = np.zeros((*stacked, math.prod(self.shape[len(stacked) : outputs]), width), np.float32)
        # The parts are on the first axis of the outputs.
        part_size = math.prod(self.shape[outputs:]) // self.num_parts
        b = np.zeros((*stacked, width, self.num_parts, part_size), np.float32)
        for row, pairs, shared in self._rows():
            start = 0
            for part, (own_a, own_b) in pairs.items():
                ranks = slice(start, start + own_a.shape[-1])
                a[row, ..., ranks], b[row, ..., ranks, part, :] = own_a, own_b
                start += 0 if shared else own_a.shape[-1]
        return a.reshape(*self.shape[:outputs], width), b.reshape(*stacked, width, *self.shape[outputs:])
