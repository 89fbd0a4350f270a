"""Initial state of a run.

A run starts from the first of these that exists:
  1. the newest checkpoint of its own workdir: the run resumes as if it had never stopped;
  2. the weights of the workdir named by `init_from`: a new run with a fresh optimizer;
  3. a random initialisation from its seed.
"""

from typing import Any

import flax.linen as nn
import jax
from jax.sharding import Mesh

from gptjax.checkpoint.manager import Checkpoints
from gptjax.checkpoint.position import Position
from gptjax.checkpoint.restore import resumed_state
from gptjax.checkpoint.saved_trees import ConfigChanges
from gptjax.checkpoint.state import ParameterSpec, TrainState, abstract_state, create_state, fresh_params
from gptjax.config import GPTConfig
from gptjax.distributed import processes
from gptjax.files import expand
from gptjax.models import peft
from gptjax.models.axis_roles import layer_numbers
from gptjax.stages.saved_weights import check_model, first_rows, given_base, load_given, load_reward_weights


def start_state(
    parameters: ParameterSpec, mesh: Mesh, checkpoints: Checkpoints, changes: ConfigChanges | None = None
) -> tuple[TrainState, Position]:
    """Returns the state a run starts from, by the precedence above, and its position in the data; `mesh` is in use.

    Args:
      changes: as in `resumed_state`.

    Raises:
      UserError: `init_from` has no weights, or its model does not match, or its weights have changed since the run
        started from them; or as in `resumed_state`.
    """
    newest = checkpoints.latest_step()
    processes.check_same({"newest checkpoint": newest}, "give all processes the same --workdir, on a shared disk")
    if newest is not None:
        state, position = resumed_state(parameters, mesh, checkpoints, changes)
        if parameters.has_base:
            state = state.replace(base=whole_base(parameters, load_given(parameters, mesh), mesh))
            checkpoints.check_base(int(state.step), state.base)
        return state, position
    if parameters.config.init_from is None:
        return create_state(parameters, mesh), Position()
    state = create_state(parameters, mesh, without_params=True)
    base, params = given_params(parameters, mesh)
    if parameters.sources:
        policy = parameters.merge(parameters.join(base, params))
        params |= {name: _started(parameters, name, policy, mesh) for name in parameters.sources}
    # The moving average starts at the weights. It is a copy because the training step donates both.
    averages = parameters.config.optimizer.ema_decay is not None
    ema = jax.tree.map(lambda p: p.copy(), params) if averages else None
    return state.replace(base=base, params=params, ema=ema), Position()


def whole_base(parameters: ParameterSpec, given: Any, mesh: Mesh) -> Any:
    """Returns `given_base` with the frozen models: copies of `given`; parameters that it lacks are initialised."""
    base = given_base(parameters, given, mesh)
    if not parameters.frozen:
        return base
    abstract = {name: abstract_state(parameters, mesh).base[name] for name in parameters.frozen}

    def copies(given: Any) -> dict[str, Any]:
        fresh = nn.unbox(fresh_params(parameters))
        return {name: _graft(fresh[name], given) for name in parameters.frozen}

    models = jax.jit(copies, out_shardings=jax.tree.map(lambda leaf: leaf.sharding, abstract))(given)
    return {**(base or {}), **models}


def given_params(parameters: ParameterSpec, mesh: Mesh) -> tuple[Any, Any]:
    """Returns the frozen base and the trained parameters from `init_from`; `mesh` is in use.

    Parameters that `init_from` lacks are initialised from the seed.
    """
    given = load_given(parameters, mesh)
    if parameters.config.init_layers is not None:
        given = first_layers(given, parameters.config.init_layers, parameters.config.model)
    base, abstract = whole_base(parameters, given, mesh), abstract_state(parameters, mesh)

    def trained(donated: Any, kept: Any) -> Any:
        return parameters.split(_graft(nn.unbox(fresh_params(parameters)), peft.join(donated, kept)))[1]

    placement = jax.tree.map(lambda leaf: leaf.sharding, abstract.params)
    if parameters.given is not None:
        return base, jax.jit(trained, out_shardings=placement)(given, {})
    # XLA can reuse a donated buffer only for an output of the same shape and dtype.
    wanted, leaves = peft.flatten(abstract.params), peft.flatten(given)
    fitting = {
        path for path, leaf in leaves.items() if (leaf.shape, leaf.dtype) == (wanted[path].shape, wanted[path].dtype)
    }
    donated, kept = ({p: leaf for p, leaf in leaves.items() if (p in fitting) == fits} for fits in (True, False))
    make = jax.jit(trained, donate_argnums=0, out_shardings=placement)
    return base, make(peft.unflatten(donated), peft.unflatten(kept))


def first_layers(given: Any, count: int, model: GPTConfig) -> Any:
    """Selects the embeddings and the first `count` layers of a model's parameters, and with all layers the rest."""
    if count == model.num_layers:
        return given
    period = len(model.attention_pattern)
    chosen = {}
    for path, leaf in peft.flatten(given).items():
        if (numbers := layer_numbers(path, len(leaf), len(leaf), period)) is not None:
            chosen[path] = leaf[: sum(number < count for number in numbers)]
        elif not path.startswith("final_norm/"):
            chosen[path] = leaf
    return peft.unflatten(chosen)


def _started(parameters: ParameterSpec, name: str, params: Any, mesh: Mesh) -> Any:
    """Returns the initial parameters of the model `name` of `parameters.sources`."""
    wanted, workdir = abstract_state(parameters, mesh).params[name], parameters.sources[name]
    if workdir is None:
        placement = jax.tree.map(lambda leaf: leaf.sharding, wanted)
        own = {key: part for key, part in params.items() if key in wanted}
        return jax.jit(lambda fresh, given: _graft(fresh, given), out_shardings=placement)(params[name], own)
    weights = load_reward_weights(expand(workdir), mesh)
    check_model(parameters.config, weights.config, f"the reward model {workdir}")
    return first_rows({**weights.gpt, "head": weights.head}, wanted)


def _graft(fresh: Any, given: Any) -> Any:
    """Returns `fresh` with its leaves overwritten by those of `given`; rows beyond those of `given` are kept."""
    if not isinstance(given, dict):
        return fresh.at[: len(given)].set(given.astype(fresh.dtype))
    return fresh | {name: _graft(fresh[name], part) for name, part in given.items()}
