"""The members of a sweep: the runs that the `sweep()` functions of a config file describe."""

import dataclasses
import hashlib
import json
import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

from gptjax.comparison.sweep_record import SWEEP_FILE, read_record
from gptjax.config import (
    Config,
    UserError,
    differences,
    is_saved,
    load_config,
    nearest,
    read_config,
    read_config_file,
    split_argument,
    to_json,
    with_absolute_paths,
)
from gptjax.files import write_whole
from gptjax.launch import grid
from gptjax.launch.grid import Overrides

LOG_FILE = "log.txt"
CONFIG = "config"  # the key of a sweep's dict that replaces --config, such as {"config": "configs/gpt2.py:size=355m"}
MAX_NAME = 150  # characters of a member's name, which is that of a directory


@dataclasses.dataclass(frozen=True)
class Member:
    """One run of a sweep.

    Attributes:
      name: made of its overrides, such as "peak_lr=0.001-seed=0"; the name of its workdir.
      flags: --config, --config.KEY=VALUE of `python -m gptjax.main`.
      overrides: the values that the sweep sets.
      config: the resolved config.
      workdir: an ordinary workdir, which has the log of the run's processes too.
    """

    name: str
    flags: tuple[str, ...]
    overrides: Overrides
    config: Config
    workdir: Path

    @property
    def log(self) -> Path:
        return self.workdir / LOG_FILE


# --- reading a config file --------------------------------------------------------------------------------------------


def read_sweep(path: str, names: Sequence[str]) -> list[Overrides]:
    """Returns the overrides of every member: the product of the sweep functions `sweep_NAME()` of a config file.

    Args:
      path: as of --config.
      names: of the functions; none: `sweep()`.

    Raises:
      UserError: there is no such function, it fails, or it yields nothing, or something other than dicts by config key.
    """
    lists = [
        _checked_list(path, function, list(_call(path, function)))
        for function in ([f"sweep_{name}" for name in names] or ["sweep"])
    ]
    return grid.product(*lists)


def read_space(path: str, name: str) -> dict[str, grid.Distribution]:
    """Returns the search space of a config file: what `search()` or `search_NAME()` returns.

    Raises:
      UserError: there is no such function, it fails, or it returns something other than distributions by config key.
    """
    function = f"search_{name}" if name else "search"
    space = _call(path, function)
    if not isinstance(space, Mapping) or not space or not all(isinstance(d, grid.Distribution) for d in space.values()):
        raise UserError(
            f"{split_argument(path)[0]}: {function}() returns {space!r}: return distributions by config key, such as "
            '{"optimizer.peak_lr": grid.LogUniform(1e-4, 1e-2)}'
        )
    return dict(space)


def _call(path: str, name: str) -> Any:
    """Calls a function of a config file without arguments, and runs a generator to its end."""
    if is_saved(path):
        raise UserError(f"--config={path} is a saved config: a sweep needs the config file that defines {name}()")

    def call(module: ModuleType, _: str | None) -> Any:
        function: Callable[[], Any] | None = getattr(module, name, None)
        if function is None:
            kind = name.partition("_")[0]
            known = [other for other in vars(module) if other == kind or other.startswith(f"{kind}_")]
            hint = nearest(name, known) if known else f": write one that returns {_EXAMPLES[kind]}"
            raise UserError(f"{split_argument(path)[0]} defines no {name}(){hint}")
        found = function()
        return found if isinstance(found, Mapping) or not isinstance(found, Iterable) else list(found)

    return read_config_file(path, call)


_EXAMPLES = {
    "sweep": 'dicts of overrides, such as {"optimizer.peak_lr": 1e-3, "seed": 0}',
    "search": 'distributions by config key, such as {"optimizer.peak_lr": grid.LogUniform(1e-4, 1e-2)}',
}


def _checked_list(path: str, function: str, found: list[Any]) -> list[Overrides]:
    file = split_argument(path)[0]
    if not found:
        raise UserError(f"{file}: {function}() is empty: yield at least one dict of overrides")
    for overrides in found:
        if not isinstance(overrides, Mapping) or not all(isinstance(key, str) for key in overrides):
            raise UserError(f"{file}: {function}() yields {overrides!r}: yield {_EXAMPLES['sweep']}")
    return [dict(overrides) for overrides in found]


# --- from overrides to members ----------------------------------------------------------------------------------------


def make_members(
    path: str,
    given: Mapping[str, str],
    sweep: Sequence[Overrides],
    workdir: Path,
    names: Sequence[str] | None = None,
) -> list[Member]:
    """Returns the members of a sweep, in its order, with their configs checked.

    Args:
      path: as of --config.
      given: values by config key of the command line, for all members.
      sweep: overrides of each member.
      workdir: of the sweep.
      names: of the members; None: made of their overrides.

    Raises:
      UserError: an unknown key, a value of another type or out of range, a key that the command line sets too, or two
        members that are the same run.
    """
    members: list[Member] = []
    known: dict[str, str] = {}
    for overrides, name in zip(sweep, names or member_names(sweep), strict=True):
        if repeated := given.keys() & overrides.keys():
            key = min(repeated)
            raise UserError(f"the sweep sets {key}, and so does --config.{key}={given[key]}: drop one of them")
        swept = {key: value for key, value in overrides.items() if key != CONFIG}
        own_path = str(overrides.get(CONFIG, path))
        try:
            config = with_absolute_paths(load_config(own_path, {**given, **swept}))
        except UserError as error:
            raise UserError(f"run {name} of the sweep: {error}") from None
        if (other := known.get(to_json(config))) is not None:
            raise UserError(f"the runs {other} and {name} of the sweep have the same config: remove one of them")
        known[to_json(config)] = name
        flags = [
            f"--config={own_path}",
            *(f"--config.{key}={_text(value)}" for key, value in {**given, **swept}.items()),
        ]
        members.append(Member(name, tuple(flags), dict(overrides), config, workdir.absolute() / name))
    return members


def _text(value: Any) -> str:
    """A value as the command line takes it."""
    return value if isinstance(value, str) else repr(value)


def member_names(sweep: Sequence[Overrides]) -> list[str]:
    """Returns a name for each member, unique unless the overrides are equal; a legal name of a directory.

    It has the last part of every key that the member sets; the whole key where two keys of the sweep share that part.
    """
    keys = {key for overrides in sweep for key in overrides}
    parts = Counter(key.rpartition(".")[2] for key in keys)

    def name(overrides: Overrides) -> str:
        pairs = []
        for key, value in overrides.items():
            short = key.rpartition(".")[2]
            pairs.append(f"{short if parts[short] == 1 else key}={_plain(_text(value))}")
        return "-".join(pairs) or "default"

    names = [name(overrides) for overrides in sweep]
    count = Counter(names)
    return [
        _with_hash(name, overrides) if len(name) > MAX_NAME or _is_ambiguous(name, count, names, sweep) else name
        for name, overrides in zip(names, sweep, strict=True)
    ]


def _plain(text: str) -> str:
    """Replaces what a shell, a file system or a config argument gives a meaning to."""
    return re.sub(r"[^\w.+-]+", "-", text, flags=re.ASCII).strip("-.") or "-"


def _is_ambiguous(name: str, count: Counter[str], names: Sequence[str], sweep: Sequence[Overrides]) -> bool:
    """Whether members with other overrides have the same name."""
    if count[name] == 1:
        return False
    return len({repr(overrides) for other, overrides in zip(names, sweep, strict=True) if other == name}) > 1


def _with_hash(name: str, overrides: Overrides) -> str:
    return f"{name[: MAX_NAME - 9]}-{hashlib.sha256(repr(overrides).encode()).hexdigest()[:8]}"


# --- the directory of a sweep -----------------------------------------------------------------------------------------


def claim(workdir: Path, members: Sequence[Member], search: Mapping[str, Any] | None = None) -> None:
    """Writes sweep.json, which names the members; a sweep that is already there may get more members.

    Args:
      search: the settings of a search, which must not change; None: an ordinary sweep. Members of a search that are
        recorded and not given yet stay in the record.

    Raises:
      UserError: the directory holds another sweep, or something else, or cannot be written.
    """
    path = workdir / SWEEP_FILE
    try:
        if (record := read_record(workdir)) is not None:
            _check_same_sweep(workdir, record, members, search)
        elif any(entry.name != "run.lock" for entry in workdir.iterdir()):
            raise UserError(f"{workdir} holds something other than a sweep: use another --workdir")
        recorded = record["members"] if record is not None and search is not None else {}
        named = recorded | {member.name: member.overrides for member in members}
        write_whole(path, json.dumps({"search": search, "members": named}, indent=2, default=repr) + "\n")
    except OSError as error:
        raise UserError(f"cannot write in --workdir={workdir}: {error.strerror}") from None


def _check_same_sweep(
    workdir: Path, record: dict[str, Any], members: Sequence[Member], search: Mapping[str, Any] | None
) -> None:
    """Raises UserError unless all members of a recorded sweep are in the new one, with the same configs."""
    if record.get("search") != search:
        raise UserError(
            f"{workdir} holds another sweep (search: {record.get('search')} -> {search}): use another --workdir"
        )
    missing = sorted(record["members"].keys() - {member.name for member in members})
    if missing and search is None:
        raise UserError(f"{workdir} holds another sweep, with the run {missing[0]}: use another --workdir")
    for member in members:
        if (member.workdir / "config.json").exists():
            changed = differences(with_absolute_paths(read_config(member.workdir)), member.config)
            if changed:
                raise UserError(
                    f"{workdir} holds a sweep whose run {member.name} has another config ({'; '.join(changed)}): use "
                    "another --workdir"
                )
