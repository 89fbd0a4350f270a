"""A model family of Hugging Face transformers: its config.json and the names of its tensors."""

import dataclasses
import json
import math
import re
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

from gptjax.config import GPTConfig, UserError
from gptjax.config.model import Architecture

HEAD = "lm_head.weight"  # of all families, and without their prefix

# --- config.json ------------------------------------------------------------------------------------------------------


class Key(NamedTuple):
    """The key of config.json that holds a field of GPTConfig.

    Attributes:
      name: name of the key.
      default: transformers' default where the key is absent; its type is that of the value, int for None.
      alias: another name that transformers reads the value from; None: there is none.
      nullable: whether null is a value; it is if the default is None.
    """

    name: str
    default: Any
    alias: str | None = None
    nullable: bool = False


Json = dict[str, Any]


def nothing_read(theirs: Json, fields: dict[str, Any]) -> dict[str, Any]:
    """`Family.read` of a family whose config has no fields beyond its table."""
    return {}


def nothing_written(model: GPTConfig) -> Json:
    """`Family.write` of a family whose config has no fields beyond its table."""
    return {}


@dataclasses.dataclass(frozen=True)
class Family:
    """A model type of transformers.

    Attributes:
      model_type: `model_type` of config.json.
      architecture: class of transformers.
      names: names of the tensors, by path of the gptjax parameter.
      keys: keys of config.json, by field of GPTConfig. Fields of the same key have the same value.
      activations: activations, by name in transformers. Export uses the first match.
      fixed: fields of GPTConfig that are the same for all models of the family.
      read: (config.json, the fields read from `keys`) to fields that depend on several keys.
      write: the inverse of `read`.
      derived: fields that `read` and `write` convert, whatever their values.
      prefix: of the names of all tensors but the head's. Files may lack it.
      transposed: whether matrices are stored as (outputs, inputs); those of gptjax are (inputs, outputs).
      quantisations: values of quant_method of quantization_config whose tensors can be decoded.
    """

    model_type: str
    architecture: str
    names: "Names"
    keys: dict[str, Key]
    activations: dict[str, str]
    fixed: dict[str, Any]
    read: Callable[[Json, dict[str, Any]], dict[str, Any]] = nothing_read
    write: Callable[[GPTConfig], Json] = nothing_written
    derived: frozenset[str] = frozenset()
    prefix: str = "transformer."
    transposed: bool = False
    quantisations: tuple[str, ...] = ()

    def full_name(self, name: str) -> str:
        """The name of a tensor or a module in transformers' class, with the prefix."""
        return name if HEAD.startswith(name) else self.prefix + name


def read_keys(family: Family, theirs: Json) -> dict[str, Any]:
    """The fields of GPTConfig that the keys of a config.json express.

    Raises:
      UserError: a value has a wrong type, or is one that GPTConfig cannot express.
    """
    fields = dict(family.fixed)
    for field, (key, default, alias, nullable) in family.keys.items():
        name = alias if alias in theirs and key not in theirs else key
        value = theirs.get(name, default)
        # An int is accepted for a float.
        kinds = (float, int) if isinstance(default, float) else (int if default is None else type(default),)
        if not isinstance(value, kinds) or (isinstance(value, bool) and bool not in kinds):
            if not (value is None and (nullable or default is None)):
                raise UserError(f"{name}={json.dumps(value)} is not of type {kinds[0].__name__}")
        elif isinstance(default, float):
            value = as_float(name, value)
        if field == "activation":
            if value not in family.activations:
                raise UserError(f"{name}={value!r} is not supported: one of {', '.join(family.activations)}")
            value = family.activations[value]
        fields[field] = value
    return fields | family.read(theirs, fields)


def as_float(name: str, value: Any) -> float:
    """A number of a config.json as a finite float; UserError if it is another value."""
    try:
        number = float(value) if isinstance(value, (int, float)) and not isinstance(value, bool) else math.nan
    except OverflowError:
        number = math.inf
    if not math.isfinite(number):
        raise UserError(f"{name}={json.dumps(value)} is not a finite number")
    return number


# Properties of GPTConfig that have the value of a field which may be None.
_RESOLVED = {"num_kv_heads": "kv_heads", "head_width": "head_dim", "ffw_dim": "feed_forward_dim"}


def write_keys(family: Family, model: GPTConfig) -> Json:
    """The keys of config.json that express the fields of a resolved `model`."""
    theirs: Json = {}
    for field, key in family.keys.items():
        value = getattr(model, field)
        if field == "activation":
            value = next(name for name, ours in family.activations.items() if ours == value)
        elif field in _RESOLVED and (key.default is not None or field != "ffw_dim"):
            value = getattr(model, _RESOLVED[field])
        theirs[key.name] = value
    return theirs | family.write(model)


def inexpressible(family: Family, model: GPTConfig) -> list[str]:
    """The fields of `model`, with their values, that determine its function and that the family cannot express."""
    model = _canonical(model)
    default, by_key = Architecture(), dict[str, list[str]]()
    wrong: list[str] = []
    for field in (field.name for field in dataclasses.fields(Architecture)):
        value = getattr(model, field)
        if field == "activation":
            expressible = value in family.activations.values()
        elif field in family.keys:
            key = family.keys[field]
            by_key.setdefault(key.name, []).append(field)
            expressible = value is not None or key.default is None or key.nullable or field in _RESOLVED
        elif field == "ffw_dim":
            expressible = model.feed_forward_dim == 4 * model.embed_dim
        elif field in family.derived:
            expressible = True
        else:
            expressible = value == family.fixed.get(field, getattr(default, field))
        if not expressible:
            wrong.append(f"{field}={value!r}")
    for fields in by_key.values():
        if len({getattr(model, field) for field in fields}) > 1:
            wrong += [f"{field}={getattr(model, field)!r}" for field in fields]
    return wrong


def _canonical(model: GPTConfig) -> GPTConfig:
    """The same model, with the defaults for fields that have no effect on it."""
    changes: dict[str, Any] = {"attention_pattern": shortest_period(model.attention_pattern)}
    if model.kv_heads == model.num_heads:
        changes["num_kv_heads"] = None
    if model.head_dim * model.num_heads == model.embed_dim:
        changes["head_width"] = None
    unused = {
        "band_width": "banded" not in model.attention_pattern,
        "rope_": model.positions != "rotary",
        "yarn_": model.positions != "rotary" or model.yarn_factor is None,
        "llama3_": model.positions != "rotary" or model.llama3_factor is None,
        "qk_norm_": not model.qk_norm,
        "gate_limit": not model.gated,
        "up_offset": not model.gated,
        "swish_beta": model.activation != "silu",
        "experts_": model.num_experts is None,
        "router_": model.num_experts is None,
        "balance_bias": model.num_experts is None,
        "expert_capacity": model.num_experts is None,
    }
    for field in dataclasses.fields(Architecture):
        if any(is_unused and field.name.startswith(prefix) for prefix, is_unused in unused.items()):
            changes[field.name] = field.default
    return dataclasses.replace(model, **changes)


def shortest_period(kinds: tuple[str, ...]) -> tuple[str, ...]:
    """The shortest tuple whose repetition is `kinds`."""
    length = len(kinds)
    periods = (kinds[:period] for period in range(1, length) if length % period == 0)
    return next((period for period in periods if kinds == period * (length // len(period))), kinds)


# --- tensors ----------------------------------------------------------------------------------------------------------


class Interleaved(NamedTuple):
    """Every second column of a tensor, from column `first` on."""

    name: str
    first: int


# Path of a gptjax parameter, with `layers/` for `layers/block_i/`: Hugging Face tensor of layer {i}; several tensors
# where queries, keys and values are separate. Without the family's prefix.
Names = dict[str, tuple[str | Interleaved, ...]]


@dataclasses.dataclass(frozen=True)
class Placement:
    """The slice of a gptjax parameter that corresponds to a Hugging Face tensor, or to every second column of it.

    Attributes:
      name: name of the tensor, without the family's prefix.
      shape: shape of the tensor.
      path: path of the parameter.
      row: index on its leading axis, the layers; None if it has no such axis.
      part: index on its axis of queries, keys and values, where the tensors are separate.
      part_axis: that axis, in a layer.
      view: shape of the slice.
      transposed: whether the tensor is (outputs, inputs).
      first: first of the columns; None: all of them.
      stacked: whether the leading axis of the slice and of the tensor is that of the experts.
    """

    name: str
    shape: tuple[int, ...]
    path: str
    row: int | None
    part: int | None
    part_axis: int
    view: tuple[int, ...]
    transposed: bool
    first: int | None
    stacked: bool

    @property
    def selection(self) -> tuple[slice | int, ...]:
        """The index of the slice in a layer of the parameter."""
        return () if self.part is None else (*(slice(None),) * self.part_axis, self.part)

    def to_ours(self, theirs: Any, expert: int | None = None) -> Any:
        """Converts the tensor, or one expert's, to an array of shape `view`, without copying if the layout allows."""
        if self.first is not None:
            theirs = theirs[..., self.first :: 2]
        view = self.view if expert is None else self.view[1:]
        return (theirs.T if self.transposed else theirs).reshape(view)

    def to_theirs(self, ours: Any) -> Any:
        """Converts a row of the parameter to the tensor, or to every second column of it."""
        place = ours[self.selection]
        if self.first is not None:
            return place
        return place.reshape(self.shape[::-1]).T if self.transposed else place.reshape(self.shape)


def placements(family: Family, period: int, path: str, shape: tuple[int, ...]) -> Iterator[Placement]:
    """Yields the placements of all tensors that make up the parameter of this path and shape, layer by layer.

    The parameter at `layers/block_b/...` holds the layers b, b + period, b + 2 * period, ...
    """
    block = re.match(r"layers/block_(\d+)/", path)
    entries = family.names[re.sub(r"block_\d+/", "", path)]
    rows: list[int | None] = list(range(shape[0])) if block else [None]
    view = shape[1:] if block else shape
    is_kernel, stacked = path.endswith("/kernel"), "/experts/" in path
    transposed = family.transposed and is_kernel and not stacked
    part_axis = 1 if is_kernel else 0  # after the inputs
    if len(entries) > 1:
        view = view[:part_axis] + view[part_axis + 1 :]
    theirs = view
    if is_kernel and not stacked:  # a matrix; the gptjax parameter has separate axes for the heads
        inputs = 2 if path.endswith("attention/out/kernel") else 1
        theirs = (math.prod(view[:inputs]), math.prod(view[inputs:]))
        theirs = theirs[::-1] if transposed else theirs
    elif path.endswith("/bias") and not stacked:
        theirs = (math.prod(view),)
    for row in rows:
        layer = None if block is None or row is None else row * period + int(block[1])
        for part, entry in enumerate(entries):
            name, first = entry if isinstance(entry, Interleaved) else (entry, None)
            yield Placement(
                name=name.format(i=layer),
                shape=theirs if first is None else (*theirs[:-1], 2 * theirs[-1]),
                path=path,
                row=row,
                part=part if len(entries) > 1 else None,
                part_axis=part_axis,
                view=view,
                transposed=transposed,
                first=first,
                stacked=stacked,
            )
