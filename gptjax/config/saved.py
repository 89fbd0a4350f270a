"""Saved configs: the config.json of a workdir."""

import dataclasses
import hashlib
import json
import os
from pathlib import Path
from typing import Any

from gptjax.config.edited import resolve
from gptjax.config.errors import UserError
from gptjax.config.sections import Config
from gptjax.files import read_json


def to_tree(config: Config) -> dict[str, Any]:
    """The config as nested dicts."""
    return dataclasses.asdict(config)


def to_json(config: Config) -> str:
    return json.dumps(to_tree(config), indent=2) + "\n"


def with_absolute_paths(config: Config) -> Config:
    """Makes the paths of the workdirs that a config names absolute, so that it can be read from any directory.

    They are init_from and the WORKDIR of rl.reward=model:WORKDIR.
    """
    rl, init_from = config.rl, config.init_from
    if init_from is not None:
        init_from = _absolute(init_from)
    kind, _, path = rl.reward.partition(":")
    if kind == "model" and path:
        rl = dataclasses.replace(rl, reward=f"model:{_absolute(path)}")
    return dataclasses.replace(config, init_from=init_from, rl=rl)


def _absolute(path: str) -> str:
    return path if "://" in path else os.path.abspath(Path(path).expanduser())  # symbolic links stay


def read_config(workdir: Path) -> Config:
    """Reads the config of a workdir.

    A key that is missing, because the workdir is older than the key, takes its default: what the program did before.

    Raises:
      UserError: there is none, or it is damaged.
    """
    return resolve(read_tree(workdir / "config.json"))


def read_tree(path: Path) -> dict[str, Any]:
    """The nested dict of a saved config.json, unchecked, missing keys filled with their defaults; raises UserError."""
    try:
        tree: dict[str, Any] = _merge(to_tree(Config()), read_json(path))
        return tree
    except FileNotFoundError:
        raise UserError(f"{path.parent} is not a workdir: it has no {path.name}") from None
    except (OSError, ValueError) as error:
        raise UserError(f"cannot read {path}: {error}") from None


def _merge(defaults: Any, tree: Any) -> Any:
    if not (isinstance(defaults, dict) and isinstance(tree, dict)):
        return tree
    return tree | {key: _merge(value, tree[key]) if key in tree else value for key, value in defaults.items()}


def config_hash(config: Config) -> str:
    """The first 12 hex digits of the config's SHA-256 hash."""
    return hashlib.sha256(to_json(config).encode()).hexdigest()[:12]


def differences(old: Any, new: Any, prefix: str = "") -> list[str]:
    """The keys whose values differ between two configs, or two sections of one class, each as "key: old -> new"."""
    return [f"{name}: {before!r} -> {after!r}" for name, (before, after) in changes(old, new, prefix).items()]


def changes(old: Any, new: Any, prefix: str = "") -> dict[str, tuple[Any, Any]]:
    """Key -> (old value, new value) of the keys whose values differ between two configs, or sections of one class."""
    found: dict[str, tuple[Any, Any]] = {}
    for field in dataclasses.fields(new):
        name, before, after = prefix + field.name, getattr(old, field.name), getattr(new, field.name)
        if dataclasses.is_dataclass(after):
            found |= changes(before, after, name + ".")
        elif before != after:
            found[name] = (before, after)
    return found
