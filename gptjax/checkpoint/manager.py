"""Checkpoints of a workdir: saving, verified reading, and quarantine of damaged ones."""

import dataclasses
import functools
import itertools
import re
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any, TypeVar

import jax
import numpy as np
import orbax.checkpoint as ocp
from absl import logging
from orbax.checkpoint import checkpoint_managers as policies

from gptjax.checkpoint import read_errors
from gptjax.checkpoint.position import Position
from gptjax.checkpoint.read_errors import DamageError, ReadError, VanishedError
from gptjax.checkpoint.saved_trees import ConfigChanges, named_leaves, restorable
from gptjax.checkpoint.state import TrainState
from gptjax.checkpoint.stored_checkpoint import (
    Contents,
    StoredCheckpoint,
    make_manifest,
    position_of,
    step_directories,
    verify,
    weights_item,
)
from gptjax.config import CheckpointConfig, UserError
from gptjax.distributed import processes
from gptjax.files import free_bytes, is_in_bucket

T = TypeVar("T")


class Checkpoints:
    """The checkpoints in `<workdir>/checkpoints/`, written asynchronously, each device its own shards.

    A checkpoint has the items `params`, `ema` (if the run keeps a moving average), `train` (step, optimizer state and
    random key) and `manifest` (JSON: the `Position`, the score, and dtype, shape and checksum of each array); imported
    weights have only `params` and `manifest`. Frozen parameters of another workdir are not stored, but their checksums
    are. The newest `keep_last` checkpoints and the one of the highest score are kept.

    Restoring first compares names, shapes and dtypes with the expected ones, then verifies the checksum of every array.
    A damaged checkpoint is reported, moved to `<workdir>/damaged/` unless `read_only`, and the one before it is
    restored. An error of the machine (`read_errors`) never moves a checkpoint.
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
        self._manager = self._listed(lambda: _open_manager(self._directory, options))

    def _listed(self, function: Callable[[], T]) -> T:
        """Calls `function`, which lists the directory, again if a checkpoint is deleted meanwhile."""
        for delay in (*read_errors.RETRY_DELAYS, None):
            try:
                return function()
            except OSError as error:
                if delay is None or not self._directory.parent.is_dir():
                    raise UserError(f"cannot open {self._directory}: {error.strerror}") from None
            time.sleep(delay)
        raise AssertionError("unreachable")

    def latest_step(self) -> int | None:
        return self._manager.latest_step()

    def best_step(self) -> int | None:
        """Returns the step of the highest score; the newest step if there are no scores."""
        return _best(self._known_scores(), self._manager.all_steps(), self.latest_step())

    def _known_scores(self) -> dict[int, float | None]:
        """Returns the scores by step; read on demand, when all processes have agreed on the steps."""
        new = [step for step in self._manager.all_steps() if step not in self._scores]
        self._scores.update({step: self._saved_score(step) for step in new})
        return self._scores

    def _saved_score(self, step: int) -> float | None:
        """Returns the score in a manifest; None if there is none or the checkpoint is damaged (reported on restore)."""
        stored = self._stored(step)
        try:
            score: float | None = stored.retried(stored.manifest).get("score")
        except (DamageError, VanishedError):
            return None
        except ReadError as error:
            raise stored.unreadable(error) from None
        return score

    def save(self, step: int, state: TrainState, position: Position, score: float | None) -> None:
        """Starts saving; returns once the arrays are copied off the devices.

        Args:
          score: validation score, the higher the better; None: unknown, never the best.

        Raises:
          UserError: the disk is full, or the previous save failed. Earlier checkpoints are intact.
        """
        items = _items(state)
        self._check_room(items)
        fixed = {} if state.base is None else {"base": state.base}
        self._known_scores()[step] = score
        with self._errors_named():
            self._manager.save(
                step,
                args=ocp.args.Composite(
                    manifest=ocp.args.JsonSave(make_manifest(position, items | fixed, score)),
                    **{name: ocp.args.StandardSave(item) for name, item in items.items()},
                ),
            )

    def wait(self) -> None:
        """Waits until all saves are written to disk; raises as `save`."""
        with self._errors_named():
            self._manager.wait_until_finished()

    def save_params(self, params: Any, base: Any = None) -> None:
        """Saves imported weights as step 0, without training state: no run can resume from them.

        Args:
          base: frozen parameters of another workdir, of which only checksums are stored; None: there are none.

        Raises:
          UserError: the disk is full, or the save failed.
        """
        self._check_room(params)
        # Compression saves only a tenth, and needs a second copy of all weights in memory.
        handlers = {
            "params": ocp.PyTreeCheckpointHandler(use_compression=False),
            "manifest": ocp.JsonCheckpointHandler(),
        }
        fixed = {} if base is None else {"base": base}
        with self._errors_named(), ocp.CheckpointManager(self._directory, item_handlers=handlers) as manager:
            manager.save(
                0,
                args=ocp.args.Composite(
                    manifest=ocp.args.JsonSave(make_manifest(Position(), {"params": params} | fixed)),
                    params=ocp.args.PyTreeSave(params),
                ),
            )

    def _check_room(self, arrays: Any) -> None:
        size = sum(leaf.nbytes for leaf in jax.tree.leaves(arrays))
        try:
            free = free_bytes(self._directory)
        except FileNotFoundError:
            raise UserError(
                f"cannot save: {self._directory} was deleted during the run, and its checkpoints are lost; "
                "the same command starts again"
            ) from None
        if 1.1 * size > free:  # leaves room for indices and metadata
            raise UserError(
                f"no room for a checkpoint of {size / 1e9:.1f} GB in {self._directory} ({free / 1e9:.1f} GB free): "
                f"{self._last_good()}; free some space and run the same command again"
            )

    def restore(
        self, abstract: TrainState, step: int | None = None, changes: ConfigChanges | None = None
    ) -> tuple[TrainState, Position]:
        """Restores the newest undamaged state, or that of `step`, with `abstract`'s shardings and without its `base`.

        Args:
          changes: config changes since the checkpoint was saved. If they are allowed, an optimizer state that does not
            fit is None in the result, and so is a moving average that is missing or does not fit.

        Raises:
          UserError: all checkpoints are damaged, one cannot be read, or it does not fit `abstract`.
        """
        items, why = _items(abstract), ConfigChanges() if changes is None else changes

        def read(stored: StoredCheckpoint) -> Contents:
            manifest, saved = stored.described()
            position_of(manifest)
            return stored.read(manifest, items, restorable(saved, items, str(stored), why))

        _, contents = self._first_whole(lambda: self._newest_first(step), read)
        train = {name: contents.filled(f"train/{name}", leaf) for name, leaf in items["train"].items()}
        ema = None if abstract.ema is None else contents.filled("ema", abstract.ema)
        state = TrainState(params=contents.filled("params", abstract.params), ema=ema, **train)
        return state, position_of(contents.manifest)

    def check_base(self, step: int, base: Any) -> None:
        """Raises UserError unless `base` has the checksums of the base of the state saved at `step`."""
        stored = self._stored(step)
        manifest = stored.required(stored.manifest)
        try:
            verify({"base": base}, manifest["checksums"])
        except DamageError as error:
            raise UserError(
                f"the weights that {self._directory.parent} started from have changed ({error}): restore its init_from"
            ) from None

    def restore_params(self, abstract_params: Any, step: int | None = None, *, best: bool = False) -> tuple[Any, int]:
        """Restores the newest undamaged weights, or their moving average if the run kept one; returns also their step.

        Args:
          step: restores the checkpoint of this step instead.
          best: restores the best checkpoint instead, unless `step` is given.

        Raises:
          UserError: as in `restore`.
        """

        def read(stored: StoredCheckpoint) -> Contents:
            manifest, saved = stored.described()
            items = {weights_item(saved): abstract_params}
            return stored.read(manifest, items, restorable(saved, items, str(stored), ConfigChanges()))

        def choose() -> list[int]:
            steps = self._newest_first(step)
            return sorted(steps, key=lambda each: each != self.best_step()) if best and step is None else steps

        found, contents = self._first_whole(choose, read)
        return contents.filled(weights_item(contents.manifest["checksums"]), abstract_params), found

    def stream_params(self, abstract_params: Any) -> Iterator[np.ndarray]:
        """Yields the newest weights, leaf by leaf in the tree's order, each read into host memory on demand.

        Raises:
          UserError: at the first leaf that is damaged or cannot be read.
        """
        step = self.latest_step()
        assert step is not None, self._directory
        stored = self._stored(step)
        manifest, saved = stored.required(stored.described)
        items = {weights_item(saved): abstract_params}
        sources = restorable(saved, items, str(stored), ConfigChanges())
        for name, leaf in named_leaves(items).items():
            yield stored.required(functools.partial(stored.read_one, manifest, sources[name], leaf))

    def _first_whole(
        self, choose: Callable[[], list[int]], read: Callable[[StoredCheckpoint], Contents]
    ) -> tuple[int, Contents]:
        """Returns the first step listed by `choose` whose contents are undamaged; all processes agree on it."""
        damaged: set[int] = set()
        while steps := processes.of_first(lambda: [step for step in choose() if step not in damaged]):
            stored = self._stored(steps[0])
            try:
                contents = read_errors.agreed(functools.partial(stored.retried, functools.partial(read, stored)))
                verify(contents.arrays, contents.manifest["checksums"])
                return stored.step, contents
            except VanishedError:  # read-only: lists the checkpoints of the run in progress again
                if not self._read_only:
                    raise UserError(f"{stored} was deleted while it was read: is --workdir in use?") from None
            except ReadError as error:
                raise stored.unreadable(error) from None
            except DamageError as error:
                if self._read_only and processes.of_first(functools.partial(_is_deleted_soon, stored)):
                    continue
                damaged.add(stored.step)
                self._report(stored, error)
        raise UserError(
            f"all checkpoints in {self._directory} are damaged: use another --workdir, or start again in this one with "
            "--start_over, which keeps its files"
        )

    def _newest_first(self, only: int | None) -> list[int]:
        self._listed(self._manager.reload)
        steps = sorted(self._manager.all_steps(), reverse=True)
        if only is not None and only not in steps:
            raise UserError(f"there is no checkpoint {only} in {self._directory}: there are {steps}")
        return steps if only is None else [only]

    def _report(self, stored: StoredCheckpoint, error: DamageError) -> None:
        """Reports a damaged checkpoint, and moves it away so that its step can be saved again."""
        reason = f"{stored} is damaged ({error})"
        if not self._read_only:
            reason += f" and was moved to {processes.of_first(lambda: str(_set_aside(stored)))}"
            self._listed(self._manager.reload)
        if processes.is_first():
            print(f"{reason}: the checkpoint before it is used", file=sys.stderr)

    def _stored(self, step: int) -> StoredCheckpoint:
        return StoredCheckpoint(self._directory, step)

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        """Waits for pending saves; raises UserError if one of them failed."""
        if error is not None and jax.process_count() > 1:
            return  # the other processes may never reach the barrier of the save
        with self._errors_named():
            self._manager.wait_until_finished()
            self._manager.close()

    @contextmanager
    def _errors_named(self) -> Iterator[None]:
        """Converts a failure to write into a UserError; Orbax writes atomically, so earlier checkpoints are intact."""
        try:
            yield
        except (OSError, ValueError) as error:  # tensorstore's are ValueErrors that name the file they fail to write
            lines = str(error).splitlines()
            if isinstance(error, ValueError) and "writing" not in lines[0] and read_errors.refusal(error) is None:
                raise
            reason = re.search(r": ([^:]+) \[(?:os_error|http_response|curl)_", lines[0])
            fix = "" if is_in_bucket(self._directory) else "free or repair the disk, and "
            raise UserError(
                f"cannot save in {self._directory}: {reason[1] if reason else lines[0]}; {self._last_good()}; "
                f"{fix}run the same command again"
            ) from None

    def _last_good(self) -> str:
        steps = sorted(int(path.name) for path in step_directories(self._directory))
        return f"the last good checkpoint is step {steps[-1]}" if steps else "there is no checkpoint yet"


def _open_manager(directory: Path, options: ocp.CheckpointManagerOptions) -> ocp.CheckpointManager:
    """Opens Orbax's manager; UserError if a _CHECKPOINT_METADATA file (timestamps) of a step is damaged."""
    try:
        return ocp.CheckpointManager(directory, options=options)
    except OSError:
        raise
    except Exception as error:  # its parsers raise ValueError, TypeError, RecursionError, ...
        raise UserError(
            f"a _CHECKPOINT_METADATA in {directory} is damaged ({read_errors.first_line(error)}): remove that file, "
            "which is not needed to restore the checkpoint"
        ) from None


def _items(state: TrainState) -> dict[str, Any]:
    """Returns the arrays of a state, by item of the checkpoint."""
    items = {
        "params": state.params,
        "train": {"step": state.step, "opt_state": state.opt_state, "rng": state.rng},
    }
    return items if state.ema is None else items | {"ema": state.ema}


@dataclasses.dataclass(frozen=True)
class _KeepBest(policies.PreservationPolicy):
    """Preserves the best checkpoint; Orbax's own policy knows only the scores saved by this process."""

    scores: dict[int, float | None]

    def should_preserve(
        self, checkpoints: Sequence[policies.PolicyCheckpointInfo], *, context: policies.PreservationContext
    ) -> Sequence[bool]:
        best = _best(self.scores, [checkpoint.step for checkpoint in checkpoints], None)
        return [checkpoint.step == best for checkpoint in checkpoints]


def _best(scores: dict[int, float | None], steps: Sequence[int], default: int | None) -> int | None:
    return max(((score, s) for s in steps if (score := scores.get(s)) is not None), default=(0, default))[1]


def _set_aside(stored: StoredCheckpoint) -> Path:
    """Moves a damaged checkpoint to `<workdir>/damaged/`; returns its new path."""
    damaged = stored.directory.parent / "damaged"
    try:
        damaged.mkdir(exist_ok=True)
        place = next(path for i in itertools.count() if not (path := damaged / f"{stored.step}.{i}").exists())
        stored.path.rename(place)
    except OSError as error:
        raise UserError(f"cannot move the damaged {stored} to {damaged}: {error.strerror}") from None
    return place


def _is_deleted_soon(stored: StoredCheckpoint) -> bool:
    """Whether the checkpoint disappears within the time of all retries."""
    for delay in (0.0, *read_errors.RETRY_DELAYS):
        time.sleep(delay)
        if not stored.exists():
            return True
    return False


@functools.cache
def _silence_threads() -> None:
    """Suppresses messages about errors in threads of Orbax and TensorStore, which are raised here as one line.

    The libraries log them, print them as unhandled exceptions, and report that their event loop is closed.
    """
    absl_handler = logging.get_absl_handler()
    absl_handler.addFilter(lambda record: "/orbax/" not in record.pathname and record.name != "asyncio")
    show, show_unraisable = sys.excepthook, sys.unraisablehook

    def theirs(error: BaseException | None) -> bool:
        text = "" if error is None else str(error)
        return "TensorStore" in text or text == "Event loop is closed"

    sys.excepthook = lambda kind, error, at: None if theirs(error) else show(kind, error, at)
    sys.unraisablehook = lambda seen: None if theirs(seen.exc_value) else show_unraisable(seen)
