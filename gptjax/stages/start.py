"""Where a run starts from, and the weights that it leaves.

A run starts from the first of these that there is:
  1. the newest checkpoint of its own workdir: it resumes as if it had never stopped;
  2. the weights of the workdir that `init_from` names: a new run with a fresh optimizer;
  3. its seed.
"""

import dataclasses
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
from jax.sharding import Mesh

from gptjax.checkpoint.manager import Checkpoints
from gptjax.checkpoint.position import Position
from gptjax.checkpoint.restore import resumed_state
from gptjax.checkpoint.saved_trees import ConfigChanges
from gptjax.checkpoint.state import ParameterSpec, TrainState, abstract_state, create_state, fresh_params
from gptjax.config import Config, UserError, differences, read_config
from gptjax.data.tokenizers import Tokenizer
from gptjax.distributed import processes
from gptjax.files import read_json
from gptjax.models import peft
from gptjax.models.heads import VALUE
from gptjax.parallel.mesh import check_model_fit
from gptjax.stages import registry
from gptjax.stages.preference.reward_model import SCALE_FILE
from gptjax.stages.registry import completed_config

# Fields of the model that weights do not depend on once they are there: training that starts from them may choose.
_FREE_FIELDS = (
    *("embedding_dropout", "attention_dropout", "residual_dropout"),
    *("token_init_std", "position_init_std", "kernel_init_std", "scale_residual_init"),
    *("layer_loop", "remat", "attention_backend", "dtype", "param_dtype", "logits_dtype", "matmul_dtype"),
)


def start_state(
    parameters: ParameterSpec, mesh: Mesh, checkpoints: Checkpoints, changes: ConfigChanges | None = None
) -> tuple[TrainState, Position]:
    """The state a run starts from, by the precedence above, and its position in the data; `mesh` in use.

    Args:
      changes: as of `resumed_state`.

    Raises:
      UserError: `init_from` has no weights, or those of another model; or they have changed since the run started from
        them; or as `resumed_state`.
    """
    newest = checkpoints.latest_step()
    processes.check_same({"newest checkpoint": newest}, "give all processes the same --workdir, on a shared disk")
    if newest is not None:
        state, position = resumed_state(parameters, mesh, checkpoints, changes)
        if parameters.has_base:
            state = state.replace(base=whole_base(parameters, load_given(parameters, mesh), mesh))
            checkpoints.check_base(int(state.step), state.base)
        return state, position
    state = create_state(parameters, mesh)
    if parameters.config.init_from is None:
        return state, Position()
    base, params = given_params(parameters, mesh)
    if parameters.sources:
        policy = parameters.merge(parameters.join(base, params))
        params |= {name: _started(parameters, name, policy, mesh) for name in parameters.sources}
    # The average starts at the weights; a copy, as the step donates both.
    ema = None if state.ema is None else jax.tree.map(lambda p: p.copy(), params)
    return state.replace(base=base, params=params, ema=ema), Position()


def load_given(parameters: ParameterSpec, mesh: Mesh, loaded: dict[Path, Any] | None = None) -> Any:
    """The weights that `init_from` names; UserError when they are of another model.

    Args:
      loaded: those that are there already, by workdir; these are added.
    """
    loaded = {} if loaded is None else loaded
    assert parameters.config.init_from is not None
    source = Path(parameters.config.init_from).expanduser().resolve()
    _check_model(parameters.config, completed_config(source)[0], f"init_from={parameters.config.init_from}")
    if source not in loaded:
        loaded[source] = load_weights(source, mesh).gpt
    return loaded[source]


def given_base(parameters: ParameterSpec, given: Any, mesh: Mesh) -> Any:
    """What stays as it is of the weights `given`, whose memory it shares, frozen models apart; None: nothing does."""
    if parameters.given is None:
        return None
    wanted = abstract_state(parameters, mesh).base
    return _first_rows(given, {name: part for name, part in wanted.items() if name not in parameters.frozen})


def whole_base(parameters: ParameterSpec, given: Any, mesh: Mesh) -> Any:
    """`given_base`, and the frozen models: copies of `given`, of which what it lacks is as the seed makes it."""
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
    """Base and trained parameters as `init_from` has them, and what it lacks from the seed; `mesh` in use."""
    given = load_given(parameters, mesh)
    base, abstract = whole_base(parameters, given, mesh), abstract_state(parameters, mesh)

    def trained(given: Any, longer: Any) -> Any:
        return parameters.split(_graft(nn.unbox(fresh_params(parameters)), peft.join(given, longer)))[1]

    placement = jax.tree.map(lambda leaf: leaf.sharding, abstract.params)
    if parameters.given is not None:
        return base, jax.jit(trained, out_shardings=placement)(given, {})
    # Memory of one size can be given back for another's, and no other.
    wanted, leaves = peft.flatten(abstract.params), peft.flatten(given)
    whole = {
        path for path, leaf in leaves.items() if (leaf.shape, leaf.dtype) == (wanted[path].shape, wanted[path].dtype)
    }
    same, longer = ({p: leaf for p, leaf in leaves.items() if (p in whole) == kept} for kept in (True, False))
    make = jax.jit(trained, donate_argnums=0, out_shardings=placement)
    return base, make(peft.unflatten(same), peft.unflatten(longer))


def _started(parameters: ParameterSpec, name: str, params: Any, mesh: Mesh) -> Any:
    """The parameters that the model `name` of `parameters.sources` starts from."""
    wanted, workdir = abstract_state(parameters, mesh).params[name], parameters.sources[name]
    if workdir is None:
        placement = jax.tree.map(lambda leaf: leaf.sharding, wanted)
        own = {key: part for key, part in params.items() if key in wanted}
        return jax.jit(lambda fresh, given: _graft(fresh, given), out_shardings=placement)(params[name], own)
    weights = load_reward_weights(Path(workdir).expanduser(), mesh)
    _check_model(parameters.config, weights.config, f"the reward model {workdir}")
    return _first_rows({**weights.gpt, "head": weights.head}, wanted)


def _check_model(config: Config, given: Config, name: str) -> None:
    """Raises UserError when the weights of a run `given`, called `name`, do not fit the model of `config`."""
    free: dict[str, Any] = {name: getattr(config.model, name) for name in _FREE_FIELDS}
    if given.model.adapter_dim is None:
        free["adapter_dim"] = config.model.adapter_dim
    adds_tokens = registry.definition(config).adds_tokens
    if adds_tokens and (given.model.vocab_size or 0) <= (config.model.vocab_size or 0):
        free["vocab_size"] = config.model.vocab_size  # special tokens are new
    if changed := differences(dataclasses.replace(given.model, **free), config.model, "model."):
        raise UserError(f"{name} has another model: {'; '.join(changed)}")


def _graft(fresh: Any, given: Any) -> Any:
    """`fresh` with the leaves of `given` in their places; a longer leaf keeps what it has behind them."""
    if not isinstance(given, dict):
        return fresh.at[: len(given)].set(given.astype(fresh.dtype))
    return fresh | {name: _graft(fresh[name], part) for name, part in given.items()}


def _first_rows(given: Any, wanted: Any) -> Any:
    """Of the leaves of `given` those that `wanted` has, and of each as many rows; whole ones are not copied."""
    if isinstance(wanted, dict):
        return {name: _first_rows(given[name], part) for name, part in wanted.items()}
    rows = given if given.shape == wanted.shape else given[: len(wanted)]
    return jax.device_put(rows.astype(wanted.dtype), wanted.sharding)


@dataclasses.dataclass(frozen=True)
class Parts:
    """What a workdir holds, what is trained apart from what it started from.

    Attributes:
      step: of the checkpoint.
    """

    parameters: ParameterSpec
    tokenizer: Tokenizer
    base: Any
    trained: Any
    step: int

    def join(self, base_and_trained: tuple[Any, Any]) -> Any:
        """All parameters, low-rank matrices folded in."""
        return self.parameters.merge(self.parameters.join(*base_and_trained))


def load_parts(
    workdir: Path, mesh: Mesh, *, best: bool = False, step: int | None = None, given: dict[Path, Any] | None = None
) -> Parts:
    """The newest weights of a workdir, their moving average where the run kept one; `mesh` is in use.

    Args:
      best: those of the best checkpoint instead.
      step: those of the checkpoint of this step instead.
      given: weights that others started from, by workdir, which this one may share; its own is added.

    Raises:
      UserError: not a workdir, no checkpoint in it or none of that step, or a mesh that does not fit.
    """
    _check_bases(workdir)
    config, tokenizer = completed_config(workdir)
    check_model_fit(config.model, mesh)
    parameters = registry.parameters(config)
    with Checkpoints(workdir, config.checkpoint, read_only=True) as checkpoints:
        # A run in progress may save and delete meanwhile, so only whether there is one must be the same.
        any_saved = checkpoints.latest_step() is not None
        processes.check_same({"a checkpoint": any_saved}, "give all processes the same --workdir, on a shared disk")
        if not any_saved:
            raise UserError(f"{workdir} has no checkpoint yet")
        trained, step = checkpoints.restore_params(abstract_state(parameters, mesh).params, step, best=best)
        base = None
        if parameters.given is not None:
            base = given_base(parameters, load_given(parameters, mesh, given), mesh)
            checkpoints.check_base(step, base)
    return Parts(parameters, tokenizer, base, trained, step)


def _check_bases(workdir: Path) -> None:
    """Raises UserError when weights that PEFT was trained over, named by init_from, are in the end its own result."""
    seen, place = [], workdir.expanduser().resolve()
    while (config := read_config(place)).peft.method != "none":
        assert config.init_from is not None  # config.check
        seen.append(place)
        place = Path(config.init_from).expanduser().resolve()
        if place in seen:
            raise UserError(f"{workdir} has no base weights: init_from leads from {seen[-1]} back to {place}")


@dataclasses.dataclass(frozen=True)
class Weights:
    """What a workdir holds.

    Attributes:
      config: complete.
      gpt: parameters of its GPT, low-rank matrices folded in.
      head: of its head; None where the stage has none.
      step: of the checkpoint.
    """

    config: Config
    tokenizer: Tokenizer
    gpt: Any
    head: Any
    step: int


def load_weights(workdir: Path, mesh: Mesh, *, best: bool = False, step: int | None = None) -> Weights:
    """As `load_parts`, all in one."""
    parts = load_parts(workdir, mesh, best=best, step=step)
    params = dict(parts.join((parts.base, parts.trained)))
    head = params.pop("head", None)
    params.pop(VALUE, None)  # of use in training alone
    return Weights(parts.parameters.config, parts.tokenizer, params, head, parts.step)


def load_reward_weights(workdir: Path, mesh: Mesh) -> Weights:
    """The best weights of a run of stage "reward", shifted so that the best answers of its data score 0 on average.

    The run measures that mean at its end, and records it with the step of the checkpoint it was measured on
    (`SCALE_FILE`); before, the mean counts as 0. A file without a step is of the best checkpoint.

    Raises:
      UserError: as of `load_parts`; the run is of another stage; or the checkpoint of the recorded step is gone.
    """
    config = read_config(workdir)
    if config.stage != "reward":
        raise UserError(f"{workdir} is of stage {config.stage}: rewards are what a run of stage reward has learned")
    path = workdir / SCALE_FILE
    try:
        scale = read_json(path)
        mean, step = float(scale["mean"]), scale.get("step")
        if not (step is None or type(step) is int):
            raise ValueError(f"step {step!r} is not a whole number")
    except FileNotFoundError:  # the run has not ended yet
        mean, step = 0.0, None
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"cannot read {path}: {error}") from None
    if step is not None and not (workdir / "checkpoints" / str(step)).is_dir():
        raise UserError(
            f"{path} was measured on checkpoint {step}, which is gone: "
            f"run the command that trained {workdir} again, to its end"
        )
    weights = load_weights(workdir, mesh, best=True, step=step)
    linear = weights.head["linear"]
    return dataclasses.replace(weights, head={"linear": linear | {"bias": linear["bias"] - mean}})
