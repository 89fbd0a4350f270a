"""Keys of config.json for rotary positions and for windows of attention, which several families share.

transformers 4 writes rope_theta and rope_scaling, transformers 5 both in rope_parameters.
"""

import json
import math
from collections.abc import Callable
from typing import Any

from gptjax.config import GPTConfig, UserError
from gptjax.interop.family import Json, as_float, shortest_period

ROTARY_FIELDS = frozenset(
    {
        *("rope_theta", "yarn_factor", "yarn_original_context", "yarn_beta_fast", "yarn_beta_slow", "yarn_truncate"),
        *("yarn_attention_factor", "llama3_factor", "llama3_original_context"),
        *("llama3_low_rotations", "llama3_high_rotations"),
    }
)
_EVERY_TYPE = ("rope_type", "type", "rope_theta", "partial_rotary_factor")
_KNOWN = {
    "default": _EVERY_TYPE,
    "yarn": (
        *_EVERY_TYPE,
        *("factor", "original_max_position_embeddings", "beta_fast", "beta_slow", "truncate", "attention_factor"),
        *("mscale", "mscale_all_dim"),
        "finetuned",  # has no effect
    ),
    "llama3": (*_EVERY_TYPE, "original_max_position_embeddings", "factor", "low_freq_factor", "high_freq_factor"),
}
_NEEDED = ("factor", "low_freq_factor", "high_freq_factor")  # with llama3; transformers has no defaults

# --- rotary positions -------------------------------------------------------------------------------------------------


def read_rotary(theirs: Json, context_length: int, theta: float, absent: Json | None = None) -> dict[str, Any]:
    """Reads the fields of rotary positions.

    Args:
      context_length: the value of max_position_embeddings, where YaRN's original context is absent.
      theta: the family's default of rope_theta.
      absent: the family's default of rope_parameters.

    Raises:
      UserError: the positions are of another kind, or the keys of transformers 4 and 5 contradict each other.
    """
    if theirs.get("rope_theta") is not None:
        theta = as_float("rope_theta", theirs["rope_theta"])
    given = [name for name in ("rope_parameters", "rope_scaling") if theirs.get(name)]
    if not given and absent is not None and "rope_scaling" in theirs:
        raise UserError(
            "rope_scaling=null is read as no scaling by transformers 4, but as the default of the family by "
            "transformers 5: give rope_parameters"
        )
    if not given:
        return _read_parameters("rope_parameters", absent or {}, theirs, context_length, theta)
    found = [_read_parameters(name, theirs[name], theirs, context_length, theta) for name in given]
    if found[0] != found[-1]:
        raise UserError("rope_scaling and rope_parameters contradict each other: remove one of them")
    return found[0]


def _read_parameters(key: str, given: Any, theirs: Json, context_length: int, theta: float) -> dict[str, Any]:
    if not isinstance(given, dict):
        raise UserError(f"{key}={json.dumps(given)} is not an object")
    kind = given.get("rope_type", given.get("type", "default"))
    if not isinstance(kind, str) or kind not in _KNOWN:
        raise UserError(f"{key}: rope_type={json.dumps(kind)} is not supported: one of {', '.join(_KNOWN)}")
    if unknown := [name for name in given if name not in _KNOWN[kind]]:
        raise UserError(
            f"{key}: {unknown[0]}={json.dumps(given[unknown[0]])} is not supported with rope_type={json.dumps(kind)}"
        )
    for place, values in ((f"{key}: ", given), ("", theirs)):
        if (share := values.get("partial_rotary_factor")) not in (None, 1):
            raise UserError(f"{place}partial_rotary_factor={json.dumps(share)} is not supported: only 1.0")

    def number(name: str, default: float | None) -> float | None:
        value = given.get(name)
        return default if value is None else as_float(f"{key}: {name}", value)

    fields: dict[str, Any] = {"rope_theta": number("rope_theta", theta)}
    if fields["rope_theta"] <= 1:
        raise UserError(f"{key}: rope_theta={fields['rope_theta']} is not above 1")
    if kind == "default":
        return fields
    if kind == "llama3" and (absent := [name for name in _NEEDED if given.get(name) is None]):
        raise UserError(f'{key} has no {absent[0]}, which rope_type="llama3" needs')
    original = theirs.get("original_max_position_embeddings", given.get("original_max_position_embeddings"))
    original = context_length if original is None else original
    truncate = given.get("truncate", True)
    for name, value, type_ in (
        ("original_max_position_embeddings", original, int),
        ("truncate", truncate, bool),
    ):
        if type(value) is not type_:
            raise UserError(f"{key}: {name}={json.dumps(value)} is not of type {type_.__name__}")
    if original < 1:
        raise UserError(f"{key}: original_max_position_embeddings={original} must be positive")
    factor = number("factor", context_length / original)
    assert factor is not None
    if factor < 1:
        raise UserError(f"{key}: factor={factor} is less than 1")
    if kind == "llama3":
        return fields | {
            "llama3_factor": factor,
            "llama3_original_context": original,
            "llama3_low_rotations": number("low_freq_factor", None),
            "llama3_high_rotations": number("high_freq_factor", None),
        }
    attention_factor = number("attention_factor", None)
    scale, all_scale = number("mscale", None), number("mscale_all_dim", None)
    if attention_factor is None and scale and all_scale and factor > 1:
        attention_factor = (0.1 * scale * math.log(factor) + 1) / (0.1 * all_scale * math.log(factor) + 1)
    return fields | {
        "yarn_factor": factor,
        "yarn_original_context": original,
        "yarn_beta_fast": number("beta_fast", None) or 32.0,
        "yarn_beta_slow": number("beta_slow", None) or 1.0,
        "yarn_truncate": truncate,
        "yarn_attention_factor": attention_factor,
    }


def write_rotary(model: GPTConfig) -> Json:
    """The keys of transformers 5 and of transformers 4, which both read."""
    parameters: Json = {"rope_type": "default", "rope_theta": model.rope_theta}
    if model.yarn_factor is not None:
        parameters |= {
            "rope_type": "yarn",
            "factor": model.yarn_factor,
            "original_max_position_embeddings": model.yarn_original_context,
            "beta_fast": model.yarn_beta_fast,
            "beta_slow": model.yarn_beta_slow,
            "truncate": model.yarn_truncate,
        }
        if model.yarn_attention_factor is not None:
            parameters["attention_factor"] = model.yarn_attention_factor
    if model.llama3_factor is not None:
        parameters |= {
            "rope_type": "llama3",
            "factor": model.llama3_factor,
            "original_max_position_embeddings": model.llama3_original_context,
            "low_freq_factor": model.llama3_low_rotations,
            "high_freq_factor": model.llama3_high_rotations,
        }
    scaling = {name: value for name, value in parameters.items() if name != "rope_theta"}
    return {
        "rope_parameters": parameters,
        "rope_theta": model.rope_theta,
        "rope_scaling": None if parameters["rope_type"] == "default" else scaling,
    }


# --- windows ----------------------------------------------------------------------------------------------------------

_MAX_LAYERS = 100_000  # far above any model's
_LAYER_TYPES = {"full_attention": "dense", "sliding_attention": "banded"}


def read_layer_types(theirs: Json, num_layers: int, is_windowed: Callable[[int], bool], window: Any) -> dict[str, Any]:
    """Reads the attention pattern of layer_types, and the width of its bands.

    Args:
      is_windowed: whether a layer has a window, where layer_types is absent.
      window: value of sliding_window.
    """
    kinds = theirs.get("layer_types")
    if kinds is None:
        if num_layers > _MAX_LAYERS:
            raise UserError(f"num_hidden_layers={num_layers} is more than {_MAX_LAYERS}")
        kinds = ["sliding_attention" if is_windowed(layer) else "full_attention" for layer in range(num_layers)]
    if not isinstance(kinds, list) or not all(isinstance(kind, str) and kind in _LAYER_TYPES for kind in kinds):
        raise UserError(f"layer_types={json.dumps(kinds)} is not a list of {', '.join(_LAYER_TYPES)}")
    if len(kinds) != num_layers:
        raise UserError(f"layer_types is for {len(kinds)} layers, but num_hidden_layers={num_layers}")
    pattern = shortest_period(tuple(_LAYER_TYPES[kind] for kind in kinds))
    return {"attention_pattern": pattern} | (read_window(window) if "banded" in pattern else {})


def read_window(window: Any) -> dict[str, Any]:
    """Reads a window, which has the position itself and the ones before it."""
    if type(window) is not int or window < 1:
        raise UserError(f"sliding_window={json.dumps(window)} is not a positive integer, but layers have a window")
    return {"band_width": window}


def write_layer_types(model: GPTConfig) -> list[str]:
    """The kind of each layer."""
    kinds = {ours: name for name, ours in _LAYER_TYPES.items()}
    pattern = [kinds[kind] for kind in model.attention_pattern]
    return pattern * (model.num_layers // len(pattern))
