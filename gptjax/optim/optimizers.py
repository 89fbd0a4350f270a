"""The optimizer, and the schedules of a run: learning rate, batch size, AdaLoRA's budget.

Schedules are functions of the tokens seen, computed on the host in exact integers.
"""

import math
import re
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from gptjax.config import BatchConfig, Config, OptimizerConfig, UserError
from gptjax.models.axis_roles import ParameterAxes, layer_numbers
from gptjax.models.heads import VALUE
from gptjax.models.parametrization import gradient_factor, is_base_size
from gptjax.optim import adalora
from gptjax.optim.transformations import scale_by_path, scale_by_rule
from gptjax.parallel.mesh import LogicalAxes


def schedule(config: Config, step: int, tokens: int, total_tokens: int, num_matrices: int = 0) -> dict[str, np.generic]:
    """The scheduled values of step number `step`, after which `tokens` tokens have been seen.

    Args:
      num_matrices: number of matrices that AdaLoRA adapts.

    Returns:
      lr: float32.
      rank_budget: int32, with peft.method="adalora" only: number of singular values kept in all matrices together.
    """
    values: dict[str, np.generic] = {"lr": np.float32(learning_rate(config.optimizer, tokens, total_tokens))}
    if config.peft.method == "adalora":
        values["rank_budget"] = np.int32(adalora.budget_of_step(config.peft, step, tokens, total_tokens, num_matrices))
    return values


def learning_rate(config: OptimizerConfig, tokens: int, total_tokens: int) -> float:
    """The learning rate of the step after which `tokens` of `total_tokens` tokens have been seen.

    Linear warm-up from `warmup_start_fraction` of the peak, then: "cosine" (GPT-1, GPT-2 and GPT-3) or "linear" from
    the peak to the floor, reached at `decay_tokens` and kept; "wsd" (warm-up, stable, decay: Hu et al. 2024, section 4)
    linear decay over the last `decay_tokens`; "constant". `decay_fraction` gives the same as a fraction of training.
    """
    floor = config.peak_lr * config.floor_lr_fraction
    warmup = config.warmup_tokens if config.warmup_fraction is None else round(config.warmup_fraction * total_tokens)
    if tokens < warmup:
        first = config.warmup_start_fraction
        return config.peak_lr * (first + (1 - first) * tokens / warmup)
    if config.schedule == "constant":
        return config.peak_lr
    decay = config.decay_tokens
    if config.decay_fraction is not None:
        decay = round(config.decay_fraction * total_tokens)
    if config.schedule == "wsd":
        descent = math.ceil(total_tokens / 10) if decay is None else decay
        start, end = max(warmup, total_tokens - descent), total_tokens
    else:
        start, end = warmup, total_tokens if decay is None else decay
    progress = min(1.0, max(0.0, (tokens - start) / max(1, end - start)))
    if config.schedule == "cosine":
        progress = (1 - math.cos(math.pi * progress)) / 2
    return config.peak_lr + (floor - config.peak_lr) * progress


def num_microbatches(config: BatchConfig, context_length: int, tokens: int) -> int:
    """Microbatches in the batch of a step that starts when `tokens` have been seen (Brown et al. 2020, appendix B)."""
    if config.microbatch_size is None:
        return 1
    full = config.tokens_per_batch
    if config.ramp_start_tokens is not None and config.ramp_tokens is not None and tokens < config.ramp_tokens:
        first = config.ramp_start_tokens
        full = first + (full - first) * tokens // config.ramp_tokens
    return max(1, full // (config.microbatch_size * context_length))


def make_optimizer(
    config: Config, axes: Mapping[str, ParameterAxes], lr_factors: Mapping[str, float] | None = None
) -> optax.GradientTransformation:
    """Gradient clipping, the update rule, and decoupled weight decay.

    The training step multiplies the updates by -learning_rate. The factors of muP and CompleteP, where the model is not
    of the base size, are those of `models.parametrization`.

    Args:
      axes: the roles of the axes of all parameters, by path.
      lr_factors: top-level keys of networks whose learning rate is a multiple of `peak_lr`, with the factor.
    """
    optimizer = config.optimizer
    transforms = [scale_by_rule(config, axes)]
    if not is_base_size(config.model):
        transforms.insert(0, scale_by_path(lambda path, shape: gradient_factor(config.model, axes[path])))
    if optimizer.clip_norm is not None:
        transforms.insert(0, _clip_by_network(optimizer.clip_norm))
    if config.peft.method == "adalora":
        transforms.insert(0, adalora.track(config.peft))  # sees the raw gradients
    whole = config.peft.method == "none"
    if optimizer.weight_decay > 0:
        transforms.append(_add_weight_decay(optimizer, whole))
    if optimizer.lr_rules:
        transforms.append(_scale_by_rules(optimizer, whole))
    if optimizer.layer_lr_decay < 1:
        transforms.append(scale_by_path(lambda path, shape: layer_factor(config, path, axes[path], shape)))
    if lr_factors:
        transforms.append(_scale_networks(lr_factors))
    rule = optax.chain(*transforms)
    if not any("balance" in parameter.roles for parameter in axes.values()):
        return rule
    balance = _balance_rule(config.model.balance_bias_rate / optimizer.peak_lr)
    return optax.partition({"rule": rule, "balance": balance}, lambda params: _label_balance(params, axes))


def _balance_rule(rate: float) -> optax.GradientTransformation:
    """Changes biases by `rate` against the sign of each expert's excess load (Wang et al. 2024, algorithm 1)."""
    return optax.stateless(lambda updates, params: jax.tree.map(lambda excess: rate * jnp.sign(excess), updates))


def _label_balance(params: Any, axes: Mapping[str, ParameterAxes]) -> Any:
    """Labels the balance biases of experts "balance", and all other parameters "rule"."""

    def label(path: tuple[Any, ...], _: Any) -> str:
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        return "balance" if "balance" in axes[name].roles else "rule"

    return jax.tree_util.tree_map_with_path(label, params, is_leaf=lambda leaf: isinstance(leaf, LogicalAxes))


def gradient_norm(gradients: Any, axes: Mapping[str, ParameterAxes]) -> jax.Array:
    """Global norm of the gradient, except that of experts' balance biases, which is no gradient of the loss."""
    leaves = jax.tree_util.tree_leaves_with_path(gradients)
    names = {jax.tree_util.keystr(path, simple=True, separator="/"): leaf for path, leaf in leaves}
    return optax.tree.norm([leaf for name, leaf in names.items() if "balance" not in axes[name].roles])


def _clip_by_network(clip_norm: float) -> optax.GradientTransformation:
    """Clips the gradient by its global norm, and that of a value function, which has its own loss, by its own norm."""
    clip = optax.clip_by_global_norm(clip_norm)

    def update(updates: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
        own = {name: part for name, part in updates.items() if name != VALUE}
        models = [own] if len(own) == len(updates) else [own, {VALUE: updates[VALUE]}]
        clipped: dict[str, Any] = {}
        for model in models:
            clipped |= clip.update(model, state)[0]
        return {name: clipped[name] for name in updates}, state

    return optax.GradientTransformation(clip.init, update)


def _scale_networks(factors: Mapping[str, float]) -> optax.GradientTransformation:
    """Multiplies the updates of each network under a top-level key of `factors` by its factor."""

    def update(updates: Any, state: optax.EmptyState, params: Any = None) -> tuple[Any, optax.EmptyState]:
        scaled = {name: jax.tree.map(lambda u, f=f: u * f, updates[name]) for name, f in factors.items()}
        return updates | scaled, state

    return optax.GradientTransformation(lambda params: optax.EmptyState(), update)


def layer_factor(config: Config, path: str, axes: ParameterAxes, shape: tuple[int, ...]) -> float | np.ndarray:
    """The learning rate of a parameter relative to that of the head (Howard & Ruder 2018, section 3.2).

    With L layers, layer l (counted from 0) has decay^(L - l), and the embeddings have decay^(L + 1). A parameter of
    stacked layers, (rows, ...), may consist of the last layers only.
    """
    decay, model = config.optimizer.layer_lr_decay, config.model
    period = len(model.attention_pattern)
    if (numbers := layer_numbers(path, shape[0], model.num_layers // period, period)) is not None:
        factors = decay ** (model.num_layers - np.array(numbers))
        return factors.astype(np.float32).reshape(-1, *[1] * (len(shape) - 1))
    return decay ** (model.num_layers + 1) if axes.is_embedding else 1.0


def _add_weight_decay(config: OptimizerConfig, whole: bool) -> optax.GradientTransformation:
    """Adds weight_decay x the factor of `decay_rules` x the parameter to each update.

    With `cautious_decay`, to entries that the update alone would reduce (Chen et al. 2025, algorithm 1).
    """

    def decayed(update: jax.Array, param: jax.Array, factor: float) -> jax.Array:
        decay = config.weight_decay * factor * param
        return update + (jnp.where(update * param > 0, decay, 0) if config.cautious_decay else decay)

    def update(updates: Any, state: optax.EmptyState, params: Any = None) -> tuple[Any, optax.EmptyState]:
        return jax.tree.map(decayed, updates, params, decay_factors(config, params, whole)), state

    return optax.GradientTransformation(lambda params: optax.EmptyState(), update)


def decay_factors(config: OptimizerConfig, params: Any, whole: bool = True) -> Any:
    """The factor of weight_decay for every parameter, from `decay_rules`: a tree of floats like `params`.

    Args:
      whole: `params` are all parameters of the model. Otherwise rules may match nothing.

    Raises:
      UserError: no rule matches a parameter, a rule matches nothing, or a regex does not parse.
    """
    default = {pattern for pattern, _ in OptimizerConfig().decay_rules}  # a model may have no biases
    return _rule_factors("optimizer.decay_rules", config.decay_rules, params, whole, may_match_nothing=default)


def _scale_by_rules(config: OptimizerConfig, whole: bool) -> optax.GradientTransformation:
    """Multiplies each update by the factor of `lr_rules`."""

    def update(updates: Any, params: Any) -> Any:
        rules = (*config.lr_rules, (".*", 1.0))
        factors = _rule_factors("optimizer.lr_rules", rules, updates, whole, may_match_nothing={".*"})
        return jax.tree.map(lambda u, factor: u * factor, updates, factors)

    return optax.stateless(update)


def _rule_factors(
    setting: str, rules: tuple[tuple[str, float], ...], params: Any, whole: bool, may_match_nothing: set[str]
) -> Any:
    """The factor of the first rule whose regex matches the path of a parameter, for every parameter.

    Raises:
      UserError: as `decay_factors`.
    """
    try:
        compiled = [(pattern, re.compile(pattern), factor) for pattern, factor in rules]
    except re.error as error:
        raise UserError(f"{setting}: {error.pattern!r} is not a regular expression: {error}") from None
    used = set()

    def factor(path: tuple[Any, ...], _: Any) -> float:
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        for pattern, regex, value in compiled:
            if regex.fullmatch(name):
                used.add(pattern)
                return value
        raise UserError(f"{setting}: no rule matches the parameter {name}: add ('.*', 1.0) at the end")

    factors = jax.tree_util.tree_map_with_path(factor, params)
    for pattern, _ in rules:
        if whole and pattern not in used | may_match_nothing:
            raise UserError(f"{setting}: {pattern!r} is the first match of no parameter: remove or correct it")
    return factors
