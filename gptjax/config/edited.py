"""Editable forms of a config: ConfigDict, overrides by key, and back to the typed, checked, frozen value."""

import ast
import copy
import dataclasses
import types
import typing
from collections.abc import Mapping
from typing import Any, Literal

import ml_collections
from ml_collections import config_dict as mlc

from gptjax.config.arguments import parse_value
from gptjax.config.checks import check
from gptjax.config.errors import UserError, nearest
from gptjax.config.sections import Config


def replace(config: Config, changes: dict[str, dict[str, Any]]) -> Config:
    """Returns `config` with the values of {section: {key: value}} replaced."""
    sections = {name: dataclasses.replace(getattr(config, name), **values) for name, values in changes.items()}
    return dataclasses.replace(config, **sections)


def config_dict(config: Config) -> ml_collections.ConfigDict:
    """Returns the config as a locked ConfigDict, whose fields have the types that the dataclasses declare."""
    return ml_collections.ConfigDict(_fields_to_dict(config)).lock()


# Names of options in other programs -> their key here.
SYNONYMS = {
    **dict.fromkeys(("lr", "learning_rate", "max_lr"), "optimizer.peak_lr"),
    **dict.fromkeys(("batch_size", "per_device_train_batch_size", "global_batch_size"), "batch.tokens_per_batch"),
    **dict.fromkeys(("steps", "max_steps", "num_steps", "train_steps", "max_iters", "tokens"), "batch.total_tokens"),
    **dict.fromkeys(("num_epochs", "num_train_epochs"), "batch.epochs"),
    **dict.fromkeys(("gradient_accumulation_steps", "micro_batch_size"), "batch.microbatch_size"),
    **dict.fromkeys(("warmup", "warmup_steps", "warmup_iters"), "optimizer.warmup_tokens"),
    **dict.fromkeys(("warmup_ratio",), "optimizer.warmup_fraction"),
    **dict.fromkeys(("wd", "decay"), "optimizer.weight_decay"),
    **dict.fromkeys(("grad_clip", "max_grad_norm", "clip"), "optimizer.clip_norm"),
    **dict.fromkeys(("optimizer_name", "optim"), "optimizer.name"),
    **dict.fromkeys(("lr_schedule", "lr_scheduler_type", "scheduler"), "optimizer.schedule"),
    **dict.fromkeys(("layers", "n_layer", "n_layers", "depth"), "model.num_layers"),
    **dict.fromkeys(("heads", "n_head", "n_heads"), "model.num_heads"),
    **dict.fromkeys(("width", "d_model", "n_embd", "hidden_size", "dim"), "model.embed_dim"),
    **dict.fromkeys(("d_ff", "ffn_dim", "intermediate_size"), "model.ffw_dim"),
    **dict.fromkeys(("block_size", "seq_len", "seq_length", "max_length", "n_ctx"), "model.context_length"),
    **dict.fromkeys(("dropout_rate",), "model.residual_dropout"),
    **dict.fromkeys(("gradient_checkpointing", "rematerialisation"), "model.remat"),
    **dict.fromkeys(("dataset", "train_file", "corpus"), "data.source"),
    **dict.fromkeys(("eval_every", "eval_interval", "eval_steps"), "evaluation.every_tokens"),
    **dict.fromkeys(("save_every", "save_steps", "checkpoint_every"), "checkpoint.every_tokens"),
    **dict.fromkeys(("log_every", "log_interval", "logging_steps"), "logging.every_steps"),
    **dict.fromkeys(("lora_rank", "lora_r"), "peft.rank"),
}


def check_key(key: str) -> None:
    """Raises UserError unless `key`, such as "optimizer.peak_lr", is a config key that takes a value."""
    hint = _hint(key)
    if dataclasses.is_dataclass(hint):
        raise UserError(f"config key {key!r} is a group: set one of {', '.join(typing.get_type_hints(hint))}")


def _hint(key: str) -> Any:
    """The declared type of a config key; UserError suggests what an unknown one may mean."""
    section: Any = Config
    for i, part in enumerate(parts := key.split(".")):
        hints = typing.get_type_hints(section) if dataclasses.is_dataclass(section) else {}
        if part not in hints:
            raise UserError(f"unknown config key {key!r}{_meant(key, part, hints, '.'.join(parts[:i]))}")
        section = hints[part]
    return section


def _meant(key: str, part: str, hints: dict[str, Any], group: str) -> str:
    """Ends the message about an unknown key: the key of the same name in another section, a synonym, or similar."""
    name = key.rpartition(".")[2]
    sections = {name: hint for name, hint in typing.get_type_hints(Config).items() if dataclasses.is_dataclass(hint)}
    same = [f"{section}.{name}" for section, hint in sections.items() if name in typing.get_type_hints(hint)]
    if name in SYNONYMS:
        same.append(SYNONYMS[name])
    whole_section_unknown = "." in key and not group
    if same and not whole_section_unknown:
        return f": did you mean {' or '.join(map(repr, same))}?"
    return nearest(part, hints, group)


def overridden(tree: dict[str, Any], overrides: Mapping[str, Any]) -> dict[str, Any]:
    """The nested dict of a config with values replaced.

    Args:
      overrides: values by key, such as {"optimizer.peak_lr": "3e-4"}; text is read as the type that the key has.

    Raises:
      UserError: an unknown key, or text that is not of the key's type.
    """
    tree = copy.deepcopy(tree)
    for key, value in overrides.items():
        check_key(key)
        *groups, name = key.split(".")
        section = tree
        for group in groups:
            section = section.get(group)  # type: ignore[assignment]
            if not isinstance(section, dict):
                raise UserError(f"config key {group!r} is a group of keys, not {section!r}")
        section[name] = _parse(value, _hint(key), key) if isinstance(value, str) else value
    return tree


def _parse(text: str, hint: Any, name: str) -> Any:
    """The value that `text` gives a key of type `hint`; "None" unsets any key, and `resolve` refuses where it may not.

    A tuple is a Python literal, or words separated by commas.
    """
    if text == "None":
        return None
    kinds = [kind for kind in _union(hint) if kind is not type(None)]
    (kind,) = kinds
    if typing.get_origin(kind) is Literal:
        return text
    if typing.get_origin(kind) is not tuple:
        return parse_value(text, kind, name)
    try:
        value = ast.literal_eval(text)
    except (ValueError, SyntaxError, RecursionError, MemoryError):
        value = tuple(part.strip() for part in text.split(",") if part.strip())
    return value if isinstance(value, (tuple, list)) else (value,)


def _fields_to_dict(section: Any) -> dict[str, Any]:
    hints = typing.get_type_hints(type(section))
    tree: dict[str, Any] = {}
    for field in dataclasses.fields(section):
        value, kinds = getattr(section, field.name), _union(hints[field.name])
        if dataclasses.is_dataclass(value):
            tree[field.name] = _fields_to_dict(value)
        elif type(None) in kinds:  # an optional field takes a value of its type from the command line
            kind = next(kind for kind in kinds if kind is not type(None))
            tree[field.name] = mlc.placeholder(kind) if value is None else _set(mlc.placeholder(kind), value)
        else:
            tree[field.name] = value
    return tree


def _set(reference: Any, value: Any) -> Any:
    reference.set(value)
    return reference


def _union(hint: Any) -> tuple[Any, ...]:
    return typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)


def resolve(edited: ml_collections.ConfigDict | dict[str, Any]) -> Config:
    """Returns the typed, checked, frozen config of a nested dict.

    Raises:
      UserError: an unknown or missing key, a value of another type, or values that contradict each other.
    """
    tree = edited.to_dict() if isinstance(edited, ml_collections.ConfigDict) else edited
    config = _build(Config, tree, "")
    check(config)
    return config


def _build(section: Any, tree: Any, prefix: str) -> Any:
    if not isinstance(tree, dict):
        raise UserError(f"config key {prefix.rstrip('.')!r} is a group of keys, not {tree!r}")
    hints = typing.get_type_hints(section)
    for key in tree:
        if key not in hints:
            raise UserError(f"unknown config key {prefix + key!r}{nearest(key, hints, prefix.rstrip('.'))}")
    if missing := [key for key in hints if key not in tree]:
        raise UserError(f"config lacks the key {prefix + missing[0]!r}")
    values = {}
    for key, hint in hints.items():
        if dataclasses.is_dataclass(hint):
            values[key] = _build(hint, tree[key], f"{prefix}{key}.")
        else:
            values[key] = _typed(tree[key], hint, prefix + key)
    return section(**values)


def _typed(value: Any, hint: Any, name: str) -> Any:
    """Checks that `value` is of type `hint`; converts an int to a float and a list to a tuple, and nothing else."""
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if isinstance(hint, types.UnionType):
        return None if value is None else _typed(value, next(arg for arg in args if arg is not type(None)), name)
    if origin is Literal:
        if value not in args:
            raise UserError(f"{name}={value!r} is not one of {', '.join(map(str, args))}")
        return value
    if origin is tuple:
        if not isinstance(value, (tuple, list)):
            raise UserError(f"{name}={value!r} is not a tuple")
        kinds = [args[0]] * len(value) if args[-1] is Ellipsis else args
        if len(kinds) != len(value):
            raise UserError(f"{name}={value!r} does not have {len(kinds)} parts")
        return tuple(
            _typed(part, kind, f"{name}[{i}]") for i, (part, kind) in enumerate(zip(value, kinds, strict=True))
        )
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        try:
            return float(value)
        except OverflowError:
            raise UserError(f"{name} is too large a number") from None
    if type(value) is not hint:
        raise UserError(f"{name}={value!r} is not of type {hint.__name__}")
    return value
