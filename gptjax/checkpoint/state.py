"""The training state and the one pure step that changes it."""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh, NamedSharding

from gptjax.config import Config
from gptjax.models import peft
from gptjax.optim import adalora
from gptjax.optim.optimizers import make_optimizer
from gptjax.parallel.mesh import abstract_arrays, shardings

Batch = dict[str, jax.Array]
Measures = dict[str, jax.Array]
# (params, microbatch, dropout key or None) -> sum of the loss over targets, sum of their weights, and sums of what else
# is told of them while training, by name; all float32 scalars
Loss = Callable[[Any, Batch, jax.Array | None], tuple[jax.Array, jax.Array, Measures]]


@dataclasses.dataclass(frozen=True)
class Program:
    """What is learned, but for data.

    Attributes:
      config: complete, as `Config.completed` makes it.
      init_params: key -> all parameters, boxed with their logical axes.
      loss: pure, of all parameters.
      given: the shapes, by path, of the weights that the run starts from, where a part of them stays as it is; None:
        all parameters are trained.
      frozen: keys of the parameters under which whole models lie that stay as they are, such as the reference.
      starts: keys of the parameters under which whole models lie that are trained, and the workdir of the run of stage
        reward whose weights each starts from; None: it starts as the policy does.
    """

    config: Config
    init_params: Callable[[jax.Array], Any]
    loss: Loss
    given: Mapping[str, tuple[int, ...]] | None = None
    frozen: tuple[str, ...] = ()
    starts: Mapping[str, str | None] = dataclasses.field(default_factory=dict)

    @property
    def has_base(self) -> bool:
        """Whether a part of the parameters stays as it is."""
        return self.given is not None or bool(self.frozen)

    def split(self, params: Any) -> tuple[Any, Any]:
        """All parameters as those that stay as they are (None: there are none), and those that are trained."""
        models = {name: params[name] for name in self.frozen}
        rest = {name: part for name, part in params.items() if name not in models}
        base, trained = (None, rest) if self.given is None else peft.split(self.config.peft, rest, self.given)
        return ({**(base or {}), **models} if models else base), trained

    def join(self, base: Any, trained: Any) -> Any:
        """What `split` has split."""
        return trained if base is None else peft.join(base, trained)

    @functools.cached_property
    def boxed_state(self) -> "TrainState":
        """The shapes and dtypes of a fresh state, boxed; kept, since a run asks often and tracing takes a moment."""
        return jax.eval_shape(lambda: init_state(self))


class TrainState(flax.struct.PyTreeNode):
    """All that a step changes, and `base`. Tokens seen are not here: they overflow int32, so the host counts them."""

    step: jax.Array  # int32 (): steps done
    params: Any  # that are trained
    opt_state: optax.OptState
    ema: Any  # a tree like params, or None without an average
    rng: jax.Array  # uint32: key data that every step's dropout key is folded from
    base: Any = None  # the parameters that stay as they are; None: there are none


def fresh_params(program: Program) -> Any:
    """All parameters that the seed makes, boxed."""
    init_rng, _ = jax.random.split(jax.random.key(program.config.seed))
    return program.init_params(init_rng)


def init_state(program: Program) -> TrainState:
    """A fresh state; its leaves are boxed with their logical axes, as `init_params` returns them."""
    config = program.config
    _, train_rng = jax.random.split(jax.random.key(config.seed))
    base, params = program.split(fresh_params(program))
    return TrainState(
        step=jnp.zeros((), jnp.int32),
        params=params,
        opt_state=make_optimizer(config).init(params),
        ema=None if config.optimizer.ema_decay is None else params,
        rng=jax.random.key_data(train_rng),
        base=base,
    )


def state_shardings(program: Program, mesh: Mesh) -> TrainState:
    """The NamedSharding of every leaf of the state: the optimizer's moments lie where their parameters lie.

    With `optimizer.offload` they do so in the memory of the hosts.
    """
    boxed = program.boxed_state
    placement = shardings(mesh, boxed)
    if not program.config.optimizer.offload:
        return placement

    def in_host(leaf: jax.ShapeDtypeStruct, sharding: NamedSharding) -> NamedSharding:
        return sharding.with_memory_kind("pinned_host") if leaf.ndim > 0 else sharding

    return placement.replace(opt_state=jax.tree.map(in_host, nn.unbox(boxed).opt_state, placement.opt_state))


def abstract_state(program: Program, mesh: Mesh) -> TrainState:
    """Shapes, dtypes and shardings of the state, unboxed: a tree of ShapeDtypeStructs."""
    return abstract_arrays(nn.unbox(program.boxed_state), state_shardings(program, mesh))


def create_state(program: Program, mesh: Mesh) -> TrainState:
    """A fresh state on the mesh: every device makes its own shards, none ever holds the whole."""
    placement = state_shardings(program, mesh)
    return jax.jit(lambda: nn.unbox(init_state(program)), out_shardings=placement)()


def fresh_optimizer_state(program: Program, mesh: Mesh) -> optax.OptState:
    """The optimizer state before the first step, laid out as in `create_state`."""
    placement = state_shardings(program, mesh).opt_state
    return jax.jit(lambda: nn.unbox(init_state(program)).opt_state, out_shardings=placement)()


def dropout_rng(rng: jax.Array, step: jax.Array | int, microbatch: jax.Array | int) -> jax.Array:
    """The key of a step's microbatch, from the key data of the state."""
    return jax.random.fold_in(jax.random.fold_in(jax.random.wrap_key_data(rng), step), microbatch)


def loss_and_gradient(program: Program, base: Any, trained: Any, batch: Batch, rng: jax.Array) -> tuple[Any, Any]:
    """(sum of the loss, (sum of the weights, what is measured)) of a microbatch, and the sum's gradient."""

    def loss(trained: Any) -> tuple[jax.Array, tuple[jax.Array, Measures]]:
        total, weight, measures = program.loss(program.join(base, trained), batch, rng)
        return total, (weight, measures)

    return jax.value_and_grad(loss, has_aux=True)(trained)


def make_train_step(program: Program, placement: TrainState) -> jax.stages.Wrapped:
    """The jitted step: `step(state, batch, num_microbatches, schedule)` to `(state, metrics)`.

    `batch` holds (M, B, ...) arrays: room for the largest batch in M microbatches, of which `num_microbatches` (int32)
    count. So a batch ramp changes a number and never recompiles. `schedule` is what `optimizers.schedule` returns. The
    gradient is that of the mean loss over the whole batch's weights, however it is cut. `state` is donated. Metrics are
    float32 scalars: loss (nats a target), grad_norm (before clipping), skipped (0 or 1), and the means of what the loss
    measures besides.
    """
    config = program.config
    optimizer, ema_decay = make_optimizer(config), config.optimizer.ema_decay
    on_device = jax.tree.map(lambda sharding: sharding.with_memory_kind("device"), placement.opt_state)

    def accumulate(state: TrainState, batch: Batch, count: jax.Array) -> tuple[jax.Array, jax.Array, Measures, Any]:
        """Sums over the microbatches: loss, weight, what is measured, gradient."""

        def microbatch(i: jax.Array | int) -> tuple[jax.Array, jax.Array, Measures, Any]:
            rows = jax.tree.map(lambda a_MBT: a_MBT[i], batch)
            rng = dropout_rng(state.rng, state.step, i)

            (loss_sum, (weight, measures)), grads = loss_and_gradient(program, state.base, state.params, rows, rng)
            # Laid out as the parameters: what each device sums up is its own part.
            return loss_sum, weight, measures, jax.lax.with_sharding_constraint(grads, placement.params)

        if next(iter(batch.values())).shape[0] == 1:
            return microbatch(0)
        zeros = jax.tree.map(lambda a: jnp.zeros(a.shape, a.dtype), jax.eval_shape(microbatch, 0))
        return jax.lax.fori_loop(0, count, lambda i, sums: jax.tree.map(jnp.add, sums, microbatch(i)), zeros)

    def step(
        state: TrainState, batch: Batch, num_microbatches: jax.Array, schedule: dict[str, jax.Array]
    ) -> tuple[TrainState, dict[str, jax.Array]]:
        loss_sum, weight, measures, grads = accumulate(state, batch, num_microbatches)
        grads = jax.tree.map(lambda g: g / weight.astype(g.dtype), grads)
        if config.optimizer.offload:
            state = state.replace(opt_state=jax.device_put(state.opt_state, on_device))
        updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
        params = jax.tree.map(lambda p, u: (p - schedule["lr"] * u).astype(p.dtype), state.params, updates)
        if config.peft.method == "adalora":
            params = adalora.prune(config.peft, params, opt_state, schedule["rank_budget"])
        ema = state.ema
        if ema_decay is not None:
            ema = jax.tree.map(lambda e, p: ema_decay * e + (1 - ema_decay) * p, ema, params)
        loss, grad_norm = loss_sum / weight, optax.tree.norm(grads)
        finite = jnp.isfinite(loss) & jnp.isfinite(grad_norm)
        metrics = {"loss": loss, "grad_norm": grad_norm, "skipped": 1.0 - finite}
        metrics |= {name: total / weight for name, total in measures.items()}
        new, old = (params, opt_state, ema), (state.params, state.opt_state, state.ema)
        params, opt_state, ema = jax.tree.map(lambda new, old: jnp.where(finite, new, old), new, old)
        return state.replace(step=state.step + 1, params=params, opt_state=opt_state, ema=ema), metrics

    return jax.jit(
        step,
        donate_argnums=0,
        in_shardings=(placement, None, None, None),  # a batch lies as `batch_sharding` has laid it
        out_shardings=(placement, None),
    )
