"""Loads the config of a run: from a Python file, or from the config.json that a run saved, with overrides."""

import importlib.util
import sys
import traceback
from collections.abc import Callable, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any, TypeVar

import ml_collections

from gptjax.config.edited import overridden, resolve
from gptjax.config.errors import UserError
from gptjax.config.saved import read_tree, to_tree
from gptjax.config.sections import Config
from gptjax.files import expand

T = TypeVar("T")


def load_config(path: str, overrides: Mapping[str, Any] | None = None) -> Config:
    """Loads and checks a config.

    Args:
      path: a Python file with `get_config`, its argument after a colon, such as "configs/gpt2.py:size=355m,runlocal";
        or a workdir, or its config.json.
      overrides: values by key, such as {"optimizer.peak_lr": 3e-4}. Text is read as on the command line.

    Raises:
      UserError: no such file, an exception in it, an unknown key, values of another type or that contradict each
        other; or a saved config that names code to run, which `overrides` does not repeat.
    """
    overrides = {} if overrides is None else overrides
    if not is_saved(path):
        return resolve(overridden(_tree_of_file(path), overrides))
    place = expand(path)
    config = resolve(overridden(read_tree(place / "config.json" if place.is_dir() else place), overrides))
    _refuse_code(config, path, overrides)
    return config


def is_saved(path: str) -> bool:
    """Whether a --config is a workdir or a saved config.json, not a Python file."""
    return path.endswith(".json") or expand(path).is_dir()


def split_argument(path: str) -> tuple[Path, str | None]:
    """The file of a --config, and the argument after its colon."""
    if expand(path).is_file():
        return expand(path), None
    file, colon, argument = path.partition(":")
    if not expand(file).is_file():
        raise UserError(f"there is no config file {file!r}")
    return expand(file), argument if colon else None


def _refuse_code(config: Config, path: str, overrides: Mapping[str, Any]) -> None:
    """Raises UserError where a saved config, which may be someone else's, names code to run or files to write."""
    if config.rl.reward.startswith("python:") and "rl.reward" not in overrides:
        raise UserError(
            f"the config in {path} runs code of its own, rl.reward={config.rl.reward}: to allow it, add "
            f"--config.rl.reward={config.rl.reward}"
        )
    if config.compiler_options and "compiler_options" not in overrides:
        raise UserError(
            f"the config in {path} sets XLA flags, which may write files: to allow them, add "
            f'--config.compiler_options="{config.compiler_options!r}"'
        )


def read_config_file(path: str, read: Callable[[ModuleType, str | None], T]) -> T:
    """Executes the Python file that a --config names; returns `read(module, argument)`, `argument` as after the colon.

    Raises:
      UserError: no such file, or an exception in it, with its line.
    """
    file, argument = split_argument(path)
    spec = importlib.util.spec_from_file_location("gptjax_config_file", file)
    if spec is None or spec.loader is None:
        raise UserError(f"--config={path} is not a Python file, a workdir or a config.json")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up there
    try:
        spec.loader.exec_module(module)
        return read(module, argument)
    except UserError:
        raise
    except SyntaxError as error:
        raise UserError(f"{error.filename}:{error.lineno}: {error.msg}") from None
    except Exception as error:
        lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == str(file)]
        raise UserError(f"{file}:{lines[-1] if lines else 1}: {_on_one_line(error)}") from None


def _tree_of_file(path: str) -> dict[str, Any]:
    """The nested dict of a config file's `get_config`."""
    file, _ = split_argument(path)

    def get_config(module: ModuleType, argument: str | None) -> Any:
        if not hasattr(module, "get_config"):
            raise UserError(f"{file} defines no function get_config")
        return module.get_config() if argument is None else module.get_config(argument)

    found = read_config_file(path, get_config)
    if isinstance(found, Config):
        return to_tree(found)
    if isinstance(found, ml_collections.ConfigDict):
        tree: dict[str, Any] = found.to_dict()
        return tree
    raise UserError(f"{file}: get_config returns {type(found).__name__}: return gptjax.config.config_dict(Config(...))")


def _on_one_line(error: Exception) -> str:
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text}" if text else type(error).__name__
