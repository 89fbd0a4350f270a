"""The config that a workdir keeps."""

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


def to_json(config: Config) -> str:
    return json.dumps(dataclasses.asdict(config), indent=2) + "\n"


def with_absolute_paths(config: Config) -> Config:
    """`config` with absolute paths to the workdirs that it names, so that it can be read from any directory.

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
    """The config of a workdir; UserError when there is none, or it is damaged.

    A key that the workdir is too old to have takes its default, which is what the program did before there was the key.
    """
    path = workdir / "config.json"
    try:
        return resolve(_merge(dataclasses.asdict(Config()), read_json(path)))
    except FileNotFoundError:
        raise UserError(f"{workdir} is not a workdir: it has no config.json") from None
    except (OSError, ValueError) as error:
        raise UserError(f"cannot read {path}: {error}") from None


def _merge(defaults: Any, tree: Any) -> Any:
    if not (isinstance(defaults, dict) and isinstance(tree, dict)):
        return tree
    return tree | {key: _merge(value, tree[key]) if key in tree else value for key, value in defaults.items()}


def config_hash(config: Config) -> str:
    """12 hex digits that name the config in metrics.jsonl."""
    return hashlib.sha256(to_json(config).encode()).hexdigest()[:12]


def differences(old: Any, new: Any, prefix: str = "") -> list[str]:
    """The keys in which two configs, or sections of one kind, differ; each as "key: old -> new"."""
    changed = []
    for field in dataclasses.fields(new):
        name, before, after = prefix + field.name, getattr(old, field.name), getattr(new, field.name)
        if dataclasses.is_dataclass(after):
            changed += differences(before, after, name + ".")
        elif before != after:
            changed.append(f"{name}: {before!r} -> {after!r}")
    return changed
