"""The training state: everything that a step changes and a checkpoint holds, and which parameters are trained.

Trained parameters, their gradients, their moving average and, unless `optimizer.first_moment_dtype` says otherwise, the
optimizer's moments are float32 whatever `model.param_dtype` is: bfloat16 has a spacing of 1/256, and loses updates,
decays and sums that are smaller than half of it. `model.param_dtype` is the dtype of frozen parameters, which are those
of a reference model or of a model adapted by PEFT, and of weights that are imported.
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any, Literal

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh, NamedSharding

from gptjax.config import Config, computation
from gptjax.models import peft
from gptjax.models.axis_roles import ParameterAxes, layer_numbers, tree_axes
from gptjax.optim.optimizers import make_optimizer
from gptjax.parallel.mesh import abstract_arrays, shardings
from gptjax.scaling import flops

SHARED_PROGRAMS = 4  # of each kind that a process keeps for the runs that follow


@dataclasses.dataclass(frozen=True, eq=False)
class ParameterSpec:
    """The parameters of a run: how they are initialised, and which of them are trained.

    Two are equal if the programs of their runs are: their configs may differ in what `computation` leaves out.

    Attributes:
      config: complete.
      init: random key -> all parameters, boxed with their logical axes.
      given: with parameter-efficient fine-tuning, the shapes by path of the pretrained weights, which are frozen; None:
        every parameter is trained.
      frozen: top-level keys of whole networks that stay frozen, such as the reference policy. They are copies of the
        weights that the run starts from.
      sources: top-level keys of whole networks that are trained, each with the workdir of the reward model whose
        weights it starts from; None: it starts from the policy's.
      lr_factors: top-level keys of networks whose learning rate is a multiple of the policy's, with the factor.
      frozen_passes: forward passes through each frozen network for every token of a training step; a fraction where one
        pass serves several steps.
    """

    config: Config
    init: Callable[[jax.Array], Any]
    given: Mapping[str, tuple[int, ...]] | None = None
    frozen: tuple[str, ...] = ()
    sources: Mapping[str, str | None] = dataclasses.field(default_factory=dict)
    lr_factors: Mapping[str, float] = dataclasses.field(default_factory=dict)
    frozen_passes: float = 1.0

    @functools.cached_property
    def _identity(self) -> tuple[Any, ...]:
        mappings = (self.given or {}, self.sources, self.lr_factors)
        items = tuple(tuple(mapping.items()) for mapping in mappings)
        return computation(self.config), self.init, self.given is None, self.frozen, self.frozen_passes, items

    def __eq__(self, other: object) -> bool:
        return isinstance(other, ParameterSpec) and self._identity == other._identity

    def __hash__(self) -> int:
        return hash(self._identity)

    @property
    def has_base(self) -> bool:
        """Whether some parameters are frozen."""
        return self.given is not None or bool(self.frozen)

    def split(self, params: Any) -> tuple[Any, Any]:
        """Splits all parameters into the frozen ones (None: there are none) and the trained ones.

        Frozen parameters have `model.param_dtype`.
        """
        networks = {name: params[name] for name in self.frozen}
        rest = {name: part for name, part in params.items() if name not in networks}
        base, trained = (None, rest) if self.given is None else peft.split(self.config.peft, rest, self.given)
        frozen = {**(base or {}), **networks} if networks else base
        return _cast(frozen, self.config.model.param_dtype), trained

    def join(self, base: Any, trained: Any) -> Any:
        """Undoes `split`: all parameters."""
        return trained if base is None else peft.join(base, trained)

    def merge(self, params: Any) -> Any:
        """All parameters with low-rank matrices folded into the kernels, as inference reads them."""
        return peft.merge(self.config.peft, params)

    @functools.cached_property
    def boxed_params(self) -> Any:
        """Shapes and dtypes of all parameters, boxed."""
        return _boxed_params(self)

    @functools.cached_property
    def boxed_state(self) -> "TrainState":
        """Shapes and dtypes of a fresh state, boxed."""
        return _boxed_state(self)

    @functools.cached_property
    def axes(self) -> dict[str, ParameterAxes]:
        """The roles of the axes of all parameters, by path."""
        return tree_axes(self.boxed_params)

    @property
    def flops_per_token(self) -> float:
        """Model FLOPs of a training step per token: the numerator of model FLOPs utilisation (MFU).

        Counts the training of the policy or model, the training of each further network of `sources`, and the forward
        passes of frozen networks. Gradients of frozen weights are not computed, and not counted.
        """
        model = self.config.model
        own = flops.flops_per_token(model)
        if self.given is not None:
            own = flops.partial_flops_per_token(model, self._trained_part())
        passes = self.frozen_passes * len(self.frozen) * flops.forward_flops_per_token(model)
        return own + len(self.sources) * flops.flops_per_token(model) + passes

    @property
    def flops_per_image(self) -> float:
        """Model FLOPs of a training step per image, in addition to those of its tokens; 0 for a model of text."""
        model, trained = self.config.model, flops.image_step_flops(self.config.model, "all")
        own, passes = float(trained), self.frozen_passes * len(self.frozen) * flops.image_flops(model)
        if self.given is not None:
            params = {name: part for name, part in self.boxed_state.params.items() if name not in self.sources}
            paths = [path for path in peft.flatten(nn.unbox(params)) if path.startswith("vision/")]
            of_projector = all(path.startswith("vision/projector_") for path in paths)
            part: Literal["all", "projector", "none"] = "projector" if of_projector else "all"
            own = flops.image_step_flops(model, part if paths else "none")
        return own + len(self.sources) * trained + passes

    def _trained_part(self) -> flops.TrainedPart:
        """The part of the adapted model that PEFT trains."""
        model = self.config.model
        period = len(model.attention_pattern)
        weights = low_rank = 0
        lowest = model.num_layers
        trained = {name: part for name, part in self.boxed_state.params.items() if name not in self.sources}
        for path, leaf in peft.flatten(nn.unbox(trained)).items():
            axes, numbers = self.axes[path], layer_numbers(path, leaf.shape[0], model.num_layers // period, period)
            is_head = path.startswith("token_embedding" if model.tied_head else "head_embedding")
            if numbers is not None:
                lowest = min(lowest, numbers[0])
            elif axes.is_embedding and not path.startswith("head_embedding"):
                lowest = 0
            size = leaf.size
            if "expert" in axes.roles and model.num_experts is not None:  # a token is computed by its own experts only
                size = size // model.num_experts * model.experts_per_token
            if "rank" in axes.roles:
                low_rank += size if axes.having("input", "output") else 0
            elif is_head or (axes.is_kernel and axes.is_stacked):
                weights += size
        return flops.TrainedPart(weights, low_rank, lowest)

    def optimizer(self) -> optax.GradientTransformation:
        """The optimizer of the trained parameters."""
        return make_optimizer(self.config, self.axes, self.lr_factors)


class TrainState(flax.struct.PyTreeNode):
    """Everything that a step changes, and the frozen parameters.

    The host counts the tokens seen, which would overflow int32.
    """

    step: jax.Array  # int32 (): steps done
    params: Any  # the trained parameters, float32
    opt_state: optax.OptState
    ema: Any  # exponential moving average of params, or None
    rng: jax.Array  # uint32: key data from which the dropout key of every step is folded
    base: Any = None  # the frozen parameters, of model.param_dtype; None: there are none


def fresh_params(parameters: ParameterSpec) -> Any:
    """Initialises all parameters from `config.seed`, boxed: float32, except the frozen networks."""
    init_rng, _ = jax.random.split(jax.random.key(parameters.config.seed))
    params = parameters.init(init_rng)
    return {name: part if name in parameters.frozen else _cast(part, "float32") for name, part in params.items()}


def _cast(tree: Any, dtype: str) -> Any:
    """Casts the arrays of a tree to `dtype`; boxes stay."""
    return jax.tree.map(lambda leaf: leaf.astype(dtype), tree)


@functools.lru_cache(maxsize=SHARED_PROGRAMS)
def _boxed_params(parameters: ParameterSpec) -> Any:
    return jax.eval_shape(lambda: fresh_params(parameters))


@functools.lru_cache(maxsize=SHARED_PROGRAMS)
def _boxed_state(parameters: ParameterSpec) -> TrainState:
    return jax.eval_shape(functools.partial(_state_of, parameters), parameters.boxed_params)


def init_state(parameters: ParameterSpec) -> TrainState:
    """A fresh state; its leaves are boxed with their logical axes, as `init` returns them."""
    return _state_of(parameters, fresh_params(parameters))


def _state_of(parameters: ParameterSpec, fresh: Any) -> TrainState:
    """The state before the first step, from all parameters."""
    config = parameters.config
    _, train_rng = jax.random.split(jax.random.key(config.seed))
    base, params = parameters.split(fresh)
    return TrainState(
        step=jnp.zeros((), jnp.int32),
        params=params,
        opt_state=parameters.optimizer().init(params),
        ema=None if config.optimizer.ema_decay is None else params,
        rng=jax.random.key_data(train_rng),
        base=base,
    )


def state_shardings(parameters: ParameterSpec, mesh: Mesh) -> TrainState:
    """The NamedSharding of every leaf of the state; the optimizer's moments are sharded as their parameters.

    With `optimizer.offload` they are kept in host memory.
    """
    boxed = parameters.boxed_state
    placement = shardings(mesh, boxed)
    if not parameters.config.optimizer.offload:
        return placement

    def in_host(leaf: jax.ShapeDtypeStruct, sharding: NamedSharding) -> NamedSharding:
        return sharding.with_memory_kind("pinned_host") if leaf.ndim > 0 else sharding

    return placement.replace(opt_state=jax.tree.map(in_host, nn.unbox(boxed).opt_state, placement.opt_state))


def abstract_state(parameters: ParameterSpec, mesh: Mesh) -> TrainState:
    """Shapes, dtypes and shardings of the state, unboxed: a tree of ShapeDtypeStructs."""
    return abstract_arrays(nn.unbox(parameters.boxed_state), state_shardings(parameters, mesh))


def abstract_weights(parameters: ParameterSpec, mesh: Mesh) -> Any:
    """Shapes, dtypes and shardings of the trained parameters as commands read them, in `model.param_dtype`."""
    dtype = parameters.config.model.param_dtype
    trained = abstract_state(parameters, mesh).params
    return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, dtype, sharding=leaf.sharding), trained)


def create_state(parameters: ParameterSpec, mesh: Mesh, *, without_params: bool = False) -> TrainState:
    """Initialises a state on the mesh: every device computes its own shards, and none ever holds the whole.

    Args:
      without_params: leave `params`, `ema` and `base` None, for a run that starts from given weights.
    """
    return _creation(parameters, mesh, without_params)()


@functools.lru_cache(maxsize=SHARED_PROGRAMS)
def _creation(parameters: ParameterSpec, mesh: Mesh, without_params: bool) -> jax.stages.Wrapped:
    placement = state_shardings(parameters, mesh)
    left_out = {"params": None, "ema": None, "base": None} if without_params else {}

    def init() -> TrainState:
        return nn.unbox(init_state(parameters)).replace(**left_out)

    return jax.jit(init, out_shardings=placement.replace(**left_out))


def fresh_optimizer_state(parameters: ParameterSpec, mesh: Mesh) -> optax.OptState:
    """The optimizer state before the first step, sharded as in `create_state`."""
    placement = state_shardings(parameters, mesh).opt_state
    return jax.jit(lambda: nn.unbox(init_state(parameters)).opt_state, out_shardings=placement)()
