"""Checkpoints of a workdir, and where a run starts from.

A run starts from the first of these that there is:
  1. the newest checkpoint of its own workdir: it goes on as if it had never stopped;
  2. the weights of the workdir that `init_from` names: a new run with a fresh optimizer;
  3. its seed.
"""

import dataclasses
import re
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from logging import LogRecord
from pathlib import Path
from types import TracebackType
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from absl import logging
from jax.sharding import Mesh
from orbax.checkpoint.checkpoint_managers import AnyPreservationPolicy, BestN, LatestN

from gptjax.config import CheckpointConfig, Config, UserError, differences, read_config
from gptjax.data import tokenizers
from gptjax.parallel import distributed
from gptjax.training.state import TrainState, abstract_state, create_state

# Fields of the model that weights do not depend on once they are there: training that starts from them may choose.
_FREE_FIELDS = (
    *("embedding_dropout", "attention_dropout", "residual_dropout"),
    *("token_init_std", "position_init_std", "kernel_init_std", "scale_residual_init"),
    *("layer_loop", "remat", "attention_backend", "dtype", "param_dtype"),
)


class Checkpoints:
    """The checkpoints in `<workdir>/checkpoints/`, written in the background, each device its own shards.

    One checkpoint has the items `params`, `ema` (where there is one), `train` (step, optimizer state and random key)
    and `position` (JSON: the examples consumed); imported weights are `params` alone. Kept are the newest `keep_last`
    and the one of the lowest validation loss.
    """

    def __init__(self, workdir: Path, config: CheckpointConfig, read_only: bool = False):
        self._directory = workdir.absolute() / "checkpoints"
        if read_only and not self._directory.is_dir():
            raise UserError(f"{workdir} has no checkpoint: there is no {self._directory.name}/ in it")
        policy = AnyPreservationPolicy(
            [LatestN(config.keep_last), BestN(get_metric_fn=lambda metrics: -metrics["loss"], n=1)]
        )
        logging.get_absl_handler().addFilter(_not_from_orbax)
        with self._errors_named():
            self._manager = ocp.CheckpointManager(
                self._directory,
                options=ocp.CheckpointManagerOptions(
                    preservation_policy=policy, create=not read_only, read_only=read_only
                ),
            )

    def latest_step(self) -> int | None:
        return self._manager.latest_step()

    def save(self, step: int, state: TrainState, examples: int, validation_loss: float) -> None:
        """Starts saving; returns once the arrays are copied off the devices.

        Raises:
          UserError: the disk has no room for it, or the save before this one failed. Earlier checkpoints are whole.
        """
        self._check_room(state)
        with self._errors_named():
            self._manager.save(
                step,
                args=ocp.args.Composite(
                    position=ocp.args.JsonSave({"examples": examples}),
                    **{name: ocp.args.StandardSave(item) for name, item in _items(state).items()},
                ),
                metrics={"loss": validation_loss},
            )

    def save_params(self, params: Any) -> None:
        """Saves weights that no training here has made, as step 0: commands can use them, no run can go on from them.

        Raises:
          UserError: the disk has no room for them, or the save failed.
        """
        self._check_room(params)
        # Compressing, which saves a tenth, takes a second copy of all weights in memory.
        handlers = {"params": ocp.PyTreeCheckpointHandler(use_compression=False)}
        with self._errors_named(), ocp.CheckpointManager(self._directory, item_handlers=handlers) as manager:
            manager.save(0, args=ocp.args.Composite(params=ocp.args.PyTreeSave(params)))

    def _check_room(self, arrays: Any) -> None:
        size = sum(leaf.nbytes for leaf in jax.tree.leaves(arrays))
        free = shutil.disk_usage(self._directory).free
        if 1.1 * size > free:  # indices and metadata come on top
            raise UserError(
                f"no room for a checkpoint of {size / 1e9:.1f} GB in {self._directory} ({free / 1e9:.1f} GB free): "
                f"{self._last_good()}; free some space and run the same command again"
            )

    def restore(self, abstract: TrainState) -> tuple[TrainState, int]:
        """The newest state, placed as `abstract`'s shardings say, and the number of examples it has consumed."""
        restored = self._manager.restore(
            self.latest_step(),
            args=ocp.args.Composite(
                position=ocp.args.JsonRestore(),
                **{name: ocp.args.StandardRestore(item) for name, item in _items(abstract).items()},
            ),
        )
        state = TrainState(params=restored.params, ema=restored.get("ema"), **restored.train)
        return state, restored.position["examples"]

    def restore_params(self, abstract_params: Any) -> Any:
        """The newest weights: their moving average where the run kept one."""
        name = self._weights()
        return self._manager.restore(
            self.latest_step(), args=ocp.args.Composite(**{name: ocp.args.StandardRestore(abstract_params)})
        )[name]

    def stream_params(self, abstract_params: Any) -> Iterator[np.ndarray]:
        """The leaves of `restore_params`, in the tree's order, each read into host memory when it is asked for."""
        leaves, structure = jax.tree.flatten(abstract_params)
        name = self._weights()
        for i, leaf in enumerate(leaves):
            others = [ocp.PLACEHOLDER] * len(leaves)
            one = jax.tree.unflatten(structure, [*others[:i], leaf, *others[i + 1 :]])
            args = [ocp.RestoreArgs(restore_type=np.ndarray, dtype=leaf.dtype)] * len(leaves)
            restore = ocp.args.PyTreeRestore(one, restore_args=jax.tree.unflatten(structure, args))
            restored = self._manager.restore(self.latest_step(), args=ocp.args.Composite(**{name: restore}))[name]
            yield jax.tree.leaves(restored)[i]

    def _weights(self) -> str:
        """The newest checkpoint's item of the weights to use."""
        return "ema" if (self._directory / str(self.latest_step()) / "ema").is_dir() else "params"

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
        steps = sorted(int(path.name) for path in self._directory.glob("*") if path.name.isdigit())
        return f"the last good checkpoint is step {steps[-1]}" if steps else "there is no checkpoint yet"


def _items(state: TrainState) -> dict[str, Any]:
    """The arrays of a state, by the item of a checkpoint that holds them."""
    items = {
        "params": state.params,
        "train": {"step": state.step, "opt_state": state.opt_state, "rng": state.rng},
    }
    return items if state.ema is None else items | {"ema": state.ema}


def _not_from_orbax(record: LogRecord) -> bool:
    """A log filter: what fails in orbax's threads is logged there, at length, and raised here, where it is one line."""
    return "/orbax/" not in record.pathname


def start_state(
    config: Config, init_params: Callable[[jax.Array], Any], mesh: Mesh, checkpoints: Checkpoints
) -> tuple[TrainState, int]:
    """The state a run starts from, by the precedence above, and the number of examples already consumed.

    Raises:
      UserError: `init_from` has no weights, or those of another model.
    """
    newest = checkpoints.latest_step()
    distributed.check_same({"newest checkpoint": newest}, "give all processes the same --workdir, on a shared disk")
    if newest is not None:
        return checkpoints.restore(abstract_state(config, init_params, mesh))
    state = create_state(config, init_params, mesh)
    if config.init_from is None:
        return state, 0
    other = Path(config.init_from).expanduser()
    other_model = read_config(other).model.with_vocabulary(tokenizers.load(other / "tokenizer").vocab_size)
    free = {name: getattr(config.model, name) for name in _FREE_FIELDS}
    if changed := differences(dataclasses.replace(other_model, **free), config.model, "model."):
        raise UserError(f"init_from={config.init_from} has another model: {'; '.join(changed)}")
    with Checkpoints(other, config.checkpoint) as source:
        if source.latest_step() is None:
            raise UserError(f"init_from={config.init_from} has no checkpoint")
        params = source.restore_params(abstract_state(config, init_params, mesh).params)
    # The average starts at the weights; a copy, as the step donates both.
    ema = None if state.ema is None else jax.tree.map(lambda p: p.copy(), params)
    return state.replace(params=params, ema=ema), 0
