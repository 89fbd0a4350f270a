"""Resuming a run from the newest undamaged checkpoint of its workdir."""

import sys

import jax
from jax.sharding import Mesh

from gptjax.checkpoint.manager import Checkpoints
from gptjax.checkpoint.position import Position
from gptjax.checkpoint.saved_trees import ConfigChanges
from gptjax.checkpoint.state import ParameterSpec, TrainState, abstract_state, fresh_optimizer_state
from gptjax.distributed import processes


def resumed_state(
    parameters: ParameterSpec, mesh: Mesh, checkpoints: Checkpoints, changes: ConfigChanges | None = None
) -> tuple[TrainState, Position]:
    """Restores the state of the newest undamaged checkpoint, without its base, and its position.

    Args:
      changes: config changes since that checkpoint. If they are allowed, an optimizer state that does not fit the
        config is replaced by a fresh one, and a missing moving average starts at the parameters.

    Raises:
      UserError: as in `Checkpoints.restore`.
    """
    changes = ConfigChanges() if changes is None else changes
    abstract = abstract_state(parameters, mesh)
    state, position = checkpoints.restore(abstract, changes=changes)
    notes = []
    if state.opt_state is None:
        state = state.replace(opt_state=fresh_optimizer_state(parameters, mesh))
        notes.append(f"a fresh optimizer state: the saved one does not fit ({changes.named('optimizer')})")
    if abstract.ema is not None and state.ema is None:
        state = state.replace(ema=jax.tree.map(lambda p: p.copy(), state.params))  # the training step donates both
        notes.append("a moving average that starts at the parameters: the saved one is missing or does not fit")
    for note in notes if processes.is_first() else ():
        print(f"step {int(state.step)} resumes with {note}", file=sys.stderr)
    return state, position
