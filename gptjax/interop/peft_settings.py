"""Reading of PEFT's adapter_config.json, for LoRA."""

import dataclasses
import json
import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

from gptjax.config import PeftConfig, UserError
from gptjax.files import read_json

CONFIG_FILE = "adapter_config.json"
# Keys of an adapter_config.json that are read below, and keys without effect on trained matrices.
_READ = (
    *("peft_type", "r", "lora_alpha", "lora_dropout", "use_rslora", "init_lora_weights", "bias"),
    *("rank_pattern", "alpha_pattern", "target_parameters"),
)
_WITHOUT_EFFECT = (
    *("auto_mapping", "base_model_name_or_path", "ensure_weight_tying", "exclude_modules", "fan_in_fan_out"),
    *("inference_mode", "layers_pattern", "layers_to_transform", "megatron_core", "peft_version", "qalora_group_size"),
    *("revision", "target_modules", "task_type"),
)
# Other initialisations, such as pissa, change the base weights.
_INITS = (True, False, "gaussian", "orthogonal")
_PLAIN_NAME = re.compile(r"[\w.]+")

Number = TypeVar("Number", int, float)


@dataclasses.dataclass(frozen=True)
class LoraSettings:
    """The settings of an adapter_config.json.

    Attributes:
      config: method, rank, alpha and dropout of matrices that no pattern names.
      alpha: lora_alpha; that of `config` differs with use_rslora.
      is_rank_stabilised: use_rslora: updates are scaled by alpha / sqrt(r) instead of alpha / r (Kalajdzievski 2023).
      ranks, alphas: the rank and alpha of the modules and parameters of these names, or names that end in these.
      parameters: names, or their ends, of the parameters that are adapted other than linear layers.
    """

    config: PeftConfig
    alpha: float
    is_rank_stabilised: bool
    ranks: Mapping[str, int]
    alphas: Mapping[str, float]
    parameters: tuple[str, ...]

    def rank(self, name: str) -> int:
        """The rank of the matrices of a module or parameter."""
        return _of_name(self.ranks, name, self.config.rank)

    def factor(self, name: str) -> float:
        """The factor of lora_B by which updates that are scaled as by `config` are those of a module or parameter."""
        rank, alpha = self.rank(name), _of_name(self.alphas, name, self.alpha)
        if (rank, alpha) == (self.config.rank, self.alpha):
            return 1.0
        scale = alpha / (math.sqrt(rank) if self.is_rank_stabilised else rank)
        return scale / (self.config.alpha / self.config.rank)

    def adapts(self, parameter: str) -> bool:
        return any(_ends_in(parameter, name) for name in self.parameters)


def _of_name(values: Mapping[str, Number], name: str, default: Number) -> Number:
    return next((value for end, value in values.items() if _ends_in(name, end)), default)


def _ends_in(name: str, end: str) -> bool:
    return f".{name}".endswith(f".{end}")


def read_settings(path: Path) -> LoraSettings:
    """Reads an adapter_config.json; raises UserError if it is damaged or not plain LoRA."""
    try:
        theirs = read_json(path)
    except FileNotFoundError:
        raise UserError(f"{path.parent} is not a PEFT directory: it has no {CONFIG_FILE}") from None
    except (OSError, ValueError) as error:
        raise UserError(f"cannot read {path}: {error}") from None
    if not isinstance(theirs, dict) or theirs.get("peft_type") != "LORA":
        kind = theirs.get("peft_type") if isinstance(theirs, dict) else None
        raise UserError(f"{path}: peft_type={json.dumps(kind)} is not supported: only LORA")
    for key, value in theirs.items():
        known = key in _WITHOUT_EFFECT or key in _READ
        if not known and value not in (None, False, {}, []):
            raise UserError(f"{path}: {key}={json.dumps(value)} is not supported: only plain LoRA is")
    for key, allowed in (("bias", ("none",)), ("init_lora_weights", _INITS), ("use_rslora", (False, True))):
        if (value := theirs.get(key, allowed[0])) not in allowed:
            raise UserError(f"{path}: {key}={json.dumps(value)} is not supported: one of {json.dumps(allowed)}")
    rank, alpha, dropout = theirs.get("r", 8), theirs.get("lora_alpha", 8), theirs.get("lora_dropout", 0.0)
    if not (_is_rank(rank) and _is_alpha(alpha) and _is_number(dropout) and 0 <= dropout < 1):
        raise UserError(f"{path}: r={rank!r}, lora_alpha={alpha!r} and lora_dropout={dropout!r} are out of range")
    ranks, alphas = theirs.get("rank_pattern") or {}, theirs.get("alpha_pattern") or {}
    parameters = theirs.get("target_parameters") or []
    for key, value, is_valid in (
        ("rank_pattern", ranks, isinstance(ranks, dict) and all(map(_is_rank, ranks.values()))),
        ("alpha_pattern", alphas, isinstance(alphas, dict) and all(map(_is_alpha, alphas.values()))),
        ("target_parameters", parameters, isinstance(parameters, list)),
    ):
        if not is_valid or not all(isinstance(name, str) and _PLAIN_NAME.fullmatch(name) for name in value):
            raise UserError(f"{path}: {key}={json.dumps(value)} is not supported: plain names of modules are")
    is_rank_stabilised = theirs.get("use_rslora", False)
    of_rank = alpha * math.sqrt(rank) if is_rank_stabilised else alpha
    config = PeftConfig(method="lora", rank=rank, alpha=float(of_rank), dropout=float(dropout))
    return LoraSettings(config, float(alpha), is_rank_stabilised, ranks, alphas, tuple(parameters))


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _is_rank(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 1


def _is_alpha(value: Any) -> bool:
    return _is_number(value) and value > 0
