"""The role of each axis of a parameter: input, output, layer, vocabulary, ...

Roles come from the metadata that `parallel.mesh.partitioned` records where a layer declares a parameter. Code that
treats parameters by their structure (low-rank matrices, Muon, layer-wise learning rates, int8 quantisation, FLOPs)
reads roles, so that a new kind of layer needs no change there.
"""

import dataclasses
import re
from collections.abc import Mapping
from typing import Any, Literal

from flax import traverse_util

from gptjax.parallel.mesh import LogicalAxes

# layer: stacked layers. input, output: of a kernel. part: independent matrices within a kernel, such as queries, keys
# and values. expert: independent matrices, each read by some of the tokens. balance: a bias that is updated by the load
# of experts, not by the loss. vocabulary, position: rows of an embedding table, whose columns are outputs. rank: of a
# low-rank matrix.
AxisRole = Literal["layer", "input", "output", "part", "expert", "balance", "vocabulary", "position", "rank"]

# Logical axes with the same role in every parameter. All others are inputs or outputs, by `LogicalAxes.inputs`.
AXIS_ROLES: dict[str | None, AxisRole] = {
    "layers": "layer",
    "qkv": "part",
    "experts": "expert",
    "balance": "balance",
    "vocab": "vocabulary",
    "vocab_part": "vocabulary",
    "position": "position",
    "rank": "rank",
}

# Logical axes whose size is proportional to the width of the model. Inputs and outputs along others, such as the
# router's, have a size of their own.
WIDTH_AXES = ("embed", "norm", "heads", "kv_heads", "head_dim", "ffw")


@dataclasses.dataclass(frozen=True)
class ParameterAxes:
    """The roles of a parameter's axes, in their order.

    Attributes:
      is_width: whether each axis grows with the width of the model; (): none does.
    """

    roles: tuple[AxisRole, ...]
    is_width: tuple[bool, ...] = ()

    def having(self, *roles: AxisRole) -> tuple[int, ...]:
        """The axes that have one of these roles, in ascending order."""
        return tuple(axis for axis, role in enumerate(self.roles) if role in roles)

    def grows(self, role: AxisRole) -> bool:
        """Whether an axis of this role grows with the width of the model."""
        return any(own == role and grows for own, grows in zip(self.roles, self.is_width, strict=False))

    @property
    def is_stacked(self) -> bool:
        """Whether the first axis is that of stacked layers."""
        return "layer" in self.roles

    @property
    def is_kernel(self) -> bool:
        """Whether the parameter is multiplied: vectors and embedding tables are not kernels."""
        return "input" in self.roles and "output" in self.roles

    @property
    def is_embedding(self) -> bool:
        """Whether rows of the parameter are looked up, by token or position."""
        return "vocabulary" in self.roles or "position" in self.roles


def parameter_axes(leaf: LogicalAxes) -> ParameterAxes:
    """The roles of the axes of one boxed parameter."""
    roles: list[AxisRole] = []
    num_inputs = 0
    for name in leaf.names:
        role = AXIS_ROLES.get(name)
        if role is None:
            role = "input" if num_inputs < leaf.inputs else "output"
            num_inputs += role == "input"
        roles.append(role)
    return ParameterAxes(tuple(roles), tuple(name in WIDTH_AXES for name in leaf.names))


def tree_axes(params: Any) -> dict[str, ParameterAxes]:
    """The axes of every parameter of a boxed tree (nested dicts), by path such as "layers/block_0/mlp/up/kernel"."""
    leaves: Mapping[str, LogicalAxes] = traverse_util.flatten_dict(params, sep="/")
    return {path: parameter_axes(leaf) for path, leaf in leaves.items()}


def layer_numbers(path: str, rows: int, total_rows: int, period: int) -> range | None:
    """The numbers, from 0, of the layers in the last `rows` rows of a stacked parameter; None: it is not stacked.

    Row r of `layers/block_i` is layer r * period + i, where `period` is the length of the attention pattern.

    Args:
      total_rows: rows of the whole parameter, num_layers / period.
    """
    block = re.search(r"(?:^|/)layers/block_(\d+)/", path)
    if block is None:
        return None
    first = (total_rows - rows) * period + int(block[1])
    return range(first, first + rows * period, period)
