"""A config as what a command line edits, and back to the typed, checked, frozen value."""

import dataclasses
import types
import typing
from typing import Any, Literal

import ml_collections
from ml_collections import config_dict as mlc

from gptjax.config.checks import check
from gptjax.config.errors import UserError, nearest
from gptjax.config.sections import Config


def replace(config: Config, changes: dict[str, dict[str, Any]]) -> Config:
    """`config` with {section: {key: value}} changed."""
    sections = {name: dataclasses.replace(getattr(config, name), **values) for name, values in changes.items()}
    return dataclasses.replace(config, **sections)


def config_dict(config: Config) -> ml_collections.ConfigDict:
    """The editable form of a config: locked, each field of the type that its dataclass declares."""
    return ml_collections.ConfigDict(_fields_to_dict(config)).lock()


def check_key(key: str) -> None:
    """Raises UserError unless `key`, such as "optimizer.peak_lr", is a config key that takes a value."""
    section: Any = Config
    for i, part in enumerate(parts := key.split(".")):
        hints = typing.get_type_hints(section) if dataclasses.is_dataclass(section) else {}
        if part not in hints:
            raise UserError(f"unknown config key {key!r}{nearest(part, hints, '.'.join(parts[:i]))}")
        section = hints[part]
    if dataclasses.is_dataclass(section):
        raise UserError(f"config key {key!r} is a group: set one of {', '.join(typing.get_type_hints(section))}")


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
    """The frozen config of an edited dict (or of a workdir's config.json).

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
    """`value` as type `hint`; an int counts as a float and JSON's list as a tuple, nothing else is converted."""
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
