"""Hyperparameter transfer across model sizes: muP on the width, CompleteP on width and depth.

muP (maximal update parametrization: Yang et al. 2022, "Tensor Programs V") keeps the size of every activation, and of
its change in a step, independent of the width. CompleteP (Dey et al. 2025, "Don't be lazy", with alpha = 1) also keeps
the share of each layer in the residual stream inversely proportional to the depth. The best learning rate of a small
base model is then about that of a large one.

With m_N the width and m_L the depth as multiples of the base model's (`GPTConfig.width_factor` and `depth_factor`), a
parameter is classified by which of its axes grow with the width (`models.axis_roles`), not by its name:

| parameter | inputs grow | outputs grow | init std | lr: Adam, Adafactor | lr: Muon | gradient |
|---|---|---|---|---|---|---|
| kernel of a layer | yes | yes | m_N^-1/2 | 1 / m_N | 1 / sqrt(m_N) | m_N m_L |
| kernel with few outputs: router, label head | yes | no | 1 / m_N | 1 / m_N | 1 / m_N | m_L |
| kernel with few inputs; bias, gain | no | yes | 1 | 1 | 1 | m_N m_L |
| embedding, head of the vocabulary | no | yes | 1 | 1 | - | m_N |
| scalar of the residual stream | no | no | 1 | 1 / m_L | - | 1 |

Gradients of a larger model are smaller by the last column. Multiplied by it, they have the size of the base model's
when the update rule adds its epsilon, which is the same as an epsilon of eps / (m_N m_L). m_L is for parameters of
layers only. Muon's updates are orthogonal matrices times sqrt(max(inputs, outputs)), see `optim.transformations`;
divided by sqrt(m_N), their spectral norm is that of the base model (Yang, Simon and Bernstein 2023, condition 1).

Decoupled weight decay is not multiplied by the factors of the learning rate: the share of a kernel that decays in a
step is the base model's, which is what decay x m_N with a learning rate / m_N means in the papers.

The model itself has three factors: logits are divided by m_N (`GPT.normalise`), branches of the residual stream by m_L
(`gpt.Block`), and attention scores by the width of a head (`attention_backends.score_scale`).
"""

import math
from typing import Any

import jax

from gptjax.config import GPTConfig
from gptjax.models.axis_roles import ParameterAxes, parameter_axes
from gptjax.parallel.mesh import LogicalAxes


def is_base_size(config: GPTConfig) -> bool:
    """Whether all factors are 1: the model has the base model's size, or the standard parametrization."""
    return config.width_factor == config.depth_factor == 1


def init_factor(config: GPTConfig, axes: ParameterAxes) -> float:
    """The standard deviation of a parameter's initialisation, as a multiple of the base model's."""
    if not axes.grows("input"):
        return 1.0
    return config.width_factor ** (-0.5 if axes.grows("output") else -1)


def lr_factor(config: GPTConfig, axes: ParameterAxes) -> float:
    """The learning rate of a parameter as a multiple of the base model's, with updates whose entries have size 1.

    Such are those of Adam and Adafactor. Each scalar of the residual stream multiplies it once a layer.
    """
    if _is_layer_scalar(axes):
        return 1 / config.depth_factor
    return 1 / config.width_factor if axes.grows("input") else 1.0


def orthogonal_factor(config: GPTConfig, axes: ParameterAxes, inputs: int, outputs: int) -> float:
    """As `lr_factor`, with updates that are orthogonal matrices times sqrt(max(inputs, outputs)).

    The spectral norm of the update is that of the base model's times the square root of the growth of the outputs over
    that of the inputs.
    """
    inputs_growth, outputs_growth = (config.width_factor if axes.grows(role) else 1.0 for role in ("input", "output"))
    base = max(inputs / inputs_growth, outputs / outputs_growth)
    return math.sqrt(outputs_growth / inputs_growth * base / max(inputs, outputs))


def gradient_factor(config: GPTConfig, axes: ParameterAxes) -> float:
    """The factor that gives the gradient of a parameter the size of the base model's."""
    depth = config.depth_factor if axes.is_stacked and not _is_layer_scalar(axes) else 1.0
    return depth * (config.width_factor if axes.grows("output") else 1.0)


def scaled_initialisation(config: GPTConfig, params: Any) -> Any:
    """Scales freshly initialised parameters, boxed, by `init_factor`."""
    if config.width_factor == 1:
        return params

    def scaled(leaf: LogicalAxes) -> LogicalAxes:
        return leaf.replace(value=leaf.value * init_factor(config, parameter_axes(leaf)))

    return jax.tree.map(scaled, params, is_leaf=lambda leaf: isinstance(leaf, LogicalAxes))


def _is_layer_scalar(axes: ParameterAxes) -> bool:
    return axes.roles == ("layer",)
