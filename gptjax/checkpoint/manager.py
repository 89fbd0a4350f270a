"""Checkpoints of a workdir, and what is done about damaged ones."""

import dataclasses
import functools
import itertools
import json
import re
import shutil
import sys
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from types import TracebackType
from typing import Any, TypeVar

import jax
import numpy as np
import orbax.checkpoint as ocp
from absl import logging
from jax.tree_util import keystr
from orbax.checkpoint import checkpoint_managers as policies

from gptjax.checkpoint.checksums import checksums
from gptjax.checkpoint.position import Best, Position
from gptjax.checkpoint.state import TrainState
from gptjax.config import CheckpointConfig, UserError

T = TypeVar("T")


class Checkpoints:
    """The checkpoints in `<workdir>/checkpoints/`, written in the background, each device its own shards.

    One checkpoint has the items `params`, `ema` (where there is one), `train` (step, optimizer state and random key)
    and `manifest` (JSON: the `Position`, the score, and the checksum of each array); imported weights are `params` and
    `manifest`. Parameters that stay as another workdir has them are not in it, but their checksums are. Kept are the
    newest `keep_last` and the one of the highest score.

    What is read is checked. A checkpoint that fails is reported, moved to `<workdir>/damaged/` unless `read_only`, and
    the one before it is read.
    """

    def __init__(self, workdir: Path, config: CheckpointConfig, read_only: bool = False):
        self._directory = workdir.absolute() / "checkpoints"
        self._read_only = read_only
        if read_only and not self._directory.is_dir():
            raise UserError(f"{workdir} has no checkpoint: there is no {self._directory.name}/ in it")
        self._scores: dict[int, float | None] = {}  # by step
        policy = policies.AnyPreservationPolicy([policies.LatestN(config.keep_last), _KeepBest(self._scores)])
        _silence_threads()
        options = ocp.CheckpointManagerOptions(preservation_policy=policy, create=not read_only, read_only=read_only)
        with self._errors_named():
            self._manager = _open_manager(self._directory, options)

    def latest_step(self) -> int | None:
        return self._manager.latest_step()

    def best_step(self) -> int | None:
        """The step of the highest score; the newest where none has one."""
        return _best(self._known_scores(), self._manager.all_steps(), self.latest_step())

    def _known_scores(self) -> dict[int, float | None]:
        """By step; read only when they are needed, as by then several processes have agreed on the steps."""
        new = [step for step in self._manager.all_steps() if step not in self._scores]
        self._scores.update({step: self._saved_score(step) for step in new})
        return self._scores

    def _saved_score(self, step: int) -> float | None:
        """Of a checkpoint; None: it has none, or is damaged, which is for those to say who read it."""
        try:
            score: float | None = self._manifest(step).get("score")
        except Exception as error:
            if _is_damage(error):
                return None
            raise
        return score

    def save(self, step: int, state: TrainState, position: Position, score: float | None) -> None:
        """Starts saving; returns once the arrays are copied off the devices.

        Args:
          score: of the validation, the higher the better; None: not known, and never the best.

        Raises:
          UserError: the disk has no room for it, or the save before this one failed. Earlier checkpoints are whole.
        """
        items = _items(state)
        self._check_room(items)
        fixed = {} if state.base is None else {"base": state.base}
        self._known_scores()[step] = score
        with self._errors_named():
            self._manager.save(
                step,
                args=ocp.args.Composite(
                    manifest=ocp.args.JsonSave(_make_manifest(position, items | fixed, score)),
                    **{name: ocp.args.StandardSave(item) for name, item in items.items()},
                ),
            )

    def wait(self) -> None:
        """Returns once what is being saved is on the disk; raises as `save`."""
        with self._errors_named():
            self._manager.wait_until_finished()

    def save_params(self, params: Any, base: Any = None) -> None:
        """Saves weights that no training here has made, as step 0: commands can use them, no run can go on from them.

        Args:
          base: parameters beside them that stay as another workdir has them; None: there are none.

        Raises:
          UserError: the disk has no room for them, or the save failed.
        """
        self._check_room(params)
        # Compressing, which saves a tenth, takes a second copy of all weights in memory.
        handlers = {
            "params": ocp.PyTreeCheckpointHandler(use_compression=False),
            "manifest": ocp.JsonCheckpointHandler(),
        }
        fixed = {} if base is None else {"base": base}
        with self._errors_named(), ocp.CheckpointManager(self._directory, item_handlers=handlers) as manager:
            manager.save(
                0,
                args=ocp.args.Composite(
                    manifest=ocp.args.JsonSave(_make_manifest(Position(), {"params": params} | fixed)),
                    params=ocp.args.PyTreeSave(params),
                ),
            )

    def _check_room(self, arrays: Any) -> None:
        size = sum(leaf.nbytes for leaf in jax.tree.leaves(arrays))
        free = shutil.disk_usage(self._directory).free
        if 1.1 * size > free:  # indices and metadata come on top
            raise UserError(
                f"no room for a checkpoint of {size / 1e9:.1f} GB in {self._directory} ({free / 1e9:.1f} GB free): "
                f"{self._last_good()}; free some space and run the same command again"
            )

    def restore(self, abstract: TrainState, step: int | None = None) -> tuple[TrainState, Position]:
        """The newest whole state, or that of `step`, placed as `abstract`'s shardings say; it lacks its `base`.

        Raises:
          UserError: there is no whole checkpoint, or it lacks what `abstract` has.
        """

        def read(step: int) -> tuple[TrainState, Position]:
            items, position = self._read(step, _items(abstract))
            return TrainState(params=items["params"], ema=items.get("ema"), **items["train"]), position

        return self._newest_whole(read, step)

    def check_base(self, step: int, base: Any) -> None:
        """Raises UserError unless `base` holds what the state saved at `step` had."""
        try:
            _check({"base": base}, self._manifest(step)["checksums"])
        except _DamageError as error:
            raise UserError(
                f"the weights that {self._directory.parent} started from are not what they were ({error}): "
                "put its init_from back"
            ) from None

    def restore_params(self, abstract_params: Any, step: int | None = None) -> tuple[Any, int]:
        """The newest whole weights, or those of `step`, and their step: their average where the run kept one.

        Raises:
          UserError: as `restore`.
        """

        def read(step: int) -> tuple[Any, int]:
            name = self._weights(step)
            return self._read(step, {name: abstract_params})[0][name], step

        return self._newest_whole(read, step)

    def stream_params(self, abstract_params: Any) -> Iterator[np.ndarray]:
        """The newest weights, leaf by leaf in the tree's order, each read into host memory when it is asked for.

        Raises:
          UserError: at the first that is damaged.
        """
        named, structure = jax.tree_util.tree_flatten_with_path(abstract_params)
        step = self.latest_step()
        assert step is not None, self._directory
        try:
            expected, name = self._manifest(step)["checksums"], self._weights(step)
            for i, (path, leaf) in enumerate(named):
                others = [ocp.PLACEHOLDER] * len(named)
                one = jax.tree.unflatten(structure, [*others[:i], leaf, *others[i + 1 :]])
                args = [ocp.RestoreArgs(restore_type=np.ndarray, dtype=leaf.dtype)] * len(named)
                restore = ocp.args.PyTreeRestore(one, restore_args=jax.tree.unflatten(structure, args))
                restored = self._manager.restore(step, args=ocp.args.Composite(**{name: restore}))[name]
                array = jax.tree.leaves(restored)[i]
                _check({f"{name}/{keystr(path, simple=True, separator='/')}": array}, expected)
                yield array
        except Exception as error:
            if not _is_damage(error):
                raise
            raise UserError(
                f"checkpoint {step} in {self._directory} is damaged ({_first_line(error)}): move it away, and the one "
                "before it is read"
            ) from None

    def _newest_whole(self, read: Callable[[int], T], only: int | None = None) -> T:
        """What `read` makes of the newest step that it finds undamaged, or of `only`."""
        steps = sorted(self._manager.all_steps(), reverse=True)
        if only is not None and only not in steps:
            raise UserError(f"there is no checkpoint {only} in {self._directory}: there are {steps}")
        for step in steps if only is None else [only]:
            try:
                return read(step)
            except Exception as error:
                if not _is_damage(error):
                    raise
                reason = f"checkpoint {step} in {self._directory} is damaged ({_first_line(error)})"
            if self._read_only:
                print(f"{reason}: the one before it is read", file=sys.stderr)
            else:
                reason += f" and now in {self._set_aside(step)}"
                print(f"{reason}: the one before it is read", file=sys.stderr)
            if jax.process_count() > 1:  # the others may have read it, and wait for this one
                raise UserError(f"{reason}: run the same command again, and it goes on from the one before")
        raise UserError(f"no checkpoint in {self._directory} is whole: start again with another --workdir")

    def _set_aside(self, step: int) -> Path:
        """Moves a damaged checkpoint out of the way of the one that will be saved at its step, and keeps it."""
        damaged = self._directory.parent / "damaged"
        damaged.mkdir(exist_ok=True)
        place = next(path for i in itertools.count() if not (path := damaged / f"{step}.{i}").exists())
        with suppress(FileNotFoundError):  # another process was faster
            (self._directory / str(step)).rename(place)
        self._manager.reload()
        return place

    def _read(self, step: int, abstract: dict[str, Any]) -> tuple[dict[str, Any], Position]:
        """Items of a checkpoint, checked: an error for which `_is_damage` holds if they are not as they were saved."""
        manifest = self._manifest(step)
        if "ema" in abstract and not any(name.startswith("ema/") for name in manifest["checksums"]):
            raise UserError(f"{self._directory.parent} keeps no moving average: leave optimizer.ema_decay unset")
        args = {name: ocp.args.StandardRestore(item) for name, item in abstract.items()}
        restored = self._manager.restore(step, args=ocp.args.Composite(**args))
        items = {name: restored[name] for name in abstract}
        _check(items, manifest["checksums"])
        position = Position(**manifest["position"] | {"best": Best(**manifest["position"]["best"])})
        if [type(value) for value in vars(position).values()] != [type(value) for value in vars(Position()).values()]:
            raise _DamageError("its manifest is not one of a run")
        return items, position

    def _manifest(self, step: int) -> dict[str, Any]:
        args = ocp.args.Composite(manifest=ocp.args.JsonRestore())
        manifest = self._manager.restore(step, args=args)["manifest"]
        if manifest.pop("crc32") != _crc32(manifest):
            raise _DamageError("its manifest is not what was saved")
        return manifest

    def _weights(self, step: int) -> str:
        """A checkpoint's item of the weights to use."""
        return "ema" if any(name.startswith("ema/") for name in self._manifest(step)["checksums"]) else "params"

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        """Waits for the saves under way; raises UserError when one of them failed."""
        if error is not None and jax.process_count() > 1:
            return  # the other processes may never come to where a save waits for them
        with self._errors_named():
            self._manager.wait_until_finished()
            self._manager.close()

    @contextmanager
    def _errors_named(self) -> Iterator[None]:
        """Turns a failure to write into one line; orbax's own checkpoints are atomic, so earlier ones are whole."""
        try:
            yield
        except (OSError, ValueError) as error:  # tensorstore's are ValueErrors that name the file they fail to write
            lines = str(error).splitlines()
            if isinstance(error, ValueError) and "writing" not in lines[0]:
                raise
            reason = re.search(r": ([^:]+) \[os_error_code", lines[0])
            raise UserError(
                f"cannot save in {self._directory}: {reason[1] if reason else lines[0]}; {self._last_good()}; "
                "mend the disk and run the same command again"
            ) from None

    def _last_good(self) -> str:
        steps = sorted(int(path.name) for path in self._directory.glob("*") if path.name.isdecimal())
        return f"the last good checkpoint is step {steps[-1]}" if steps else "there is no checkpoint yet"


def _open_manager(directory: Path, options: ocp.CheckpointManagerOptions) -> ocp.CheckpointManager:
    """Orbax's manager, which reads _CHECKPOINT_METADATA, a file of times, of every step; UserError when one is bad."""
    try:
        return ocp.CheckpointManager(directory, options=options)
    except OSError:
        raise
    except Exception as error:  # its parsers raise ValueError, TypeError, RecursionError, ...
        raise UserError(
            f"a _CHECKPOINT_METADATA in {directory} is damaged ({_first_line(error)}): remove that file, and the "
            "checkpoint is read without it"
        ) from None


def _items(state: TrainState) -> dict[str, Any]:
    """The arrays of a state, by the item of a checkpoint that holds them."""
    items = {
        "params": state.params,
        "train": {"step": state.step, "opt_state": state.opt_state, "rng": state.rng},
    }
    return items if state.ema is None else items | {"ema": state.ema}


def _make_manifest(position: Position, items: dict[str, Any], score: float | None = None) -> dict[str, Any]:
    """What `Checkpoints._manifest` reads again, its own checksum in it."""
    manifest = {"position": dataclasses.asdict(position), "score": score, "checksums": checksums(items)}
    return manifest | {"crc32": _crc32(manifest)}


def _crc32(manifest: dict[str, Any]) -> int:
    return zlib.crc32(json.dumps(manifest, sort_keys=True).encode())


@dataclasses.dataclass(frozen=True)
class _KeepBest(policies.PreservationPolicy):
    """Orbax's own policy knows only the scores that it was told in this process."""

    scores: dict[int, float | None]

    def should_preserve(
        self, checkpoints: Sequence[policies.PolicyCheckpointInfo], *, context: policies.PreservationContext
    ) -> Sequence[bool]:
        best = _best(self.scores, [checkpoint.step for checkpoint in checkpoints], None)
        return [checkpoint.step == best for checkpoint in checkpoints]


def _best(scores: dict[int, float | None], steps: Sequence[int], default: int | None) -> int | None:
    return max(((score, s) for s in steps if (score := scores.get(s)) is not None), default=(0, default))[1]


class _DamageError(Exception):
    """What was read is not what was saved."""


def _check(items: dict[str, Any], expected: dict[str, int]) -> None:
    """Raises _DamageError unless the arrays of `items` have the checksums expected."""
    for name, checksum in checksums(items).items():
        if checksum != expected.get(name):
            raise _DamageError(f"{name} is not what was saved")


def _is_damage(error: Exception) -> bool:
    """Whether an error in reading a checkpoint means that its files are at fault.

    Nearly all do: what the libraries raise depends on the byte that changed.
    """
    return not isinstance(error, (UserError, MemoryError)) and "RESOURCE_EXHAUSTED" not in str(error)


def _first_line(error: Exception) -> str:
    line = next(iter(str(error).splitlines()), "").partition(". See full")[0] or type(error).__name__
    return line if len(line) <= 120 else f"{line[:117]}..."


@functools.cache
def _silence_threads() -> None:
    """Keeps what fails in threads of orbax and tensorstore from being shown there: it is raised here, and one line.

    They log it, print it as an exception that nobody awaits, and print that a loop has ended before their answers came.
    """
    absl_handler = logging.get_absl_handler()
    absl_handler.addFilter(lambda record: "/orbax/" not in record.pathname and record.name != "asyncio")
    show, show_unraisable = sys.excepthook, sys.unraisablehook

    def theirs(error: BaseException | None) -> bool:
        text = "" if error is None else str(error)
        return "TensorStore" in text or text == "Event loop is closed"

    sys.excepthook = lambda kind, error, at: None if theirs(error) else show(kind, error, at)
    sys.unraisablehook = lambda seen: None if theirs(seen.exc_value) else show_unraisable(seen)
