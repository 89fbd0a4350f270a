"""LoRA on parameters of a mixture of experts in Hugging Face PEFT's format, where they are `target_parameters`.

transformers holds the kernels of all experts in one parameter, and the router's in a parameter of a module that is no
linear layer. PEFT stores (experts * r, inputs) and (outputs, r * experts) for the former, with the experts on the slow
axis of lora_A and on the fast one of lora_B; for the router, as for a linear layer, (r, inputs) and (outputs, r).
"""

import re
from typing import NamedTuple

import numpy as np

from gptjax.interop.family import Placement

_PARAMETER = re.compile(r"/mlp/(experts|router)/")
# PEFT wraps a module once for each of its targeted parameters, in the order of transformers' class, the last outermost.
_WRAPPED = ("weight", "gate_up_proj", "down_proj")


class ParameterLora(NamedTuple):
    """The LoRA matrices of a parameter of transformers.

    Attributes:
      name: of the parameter, without the family's prefix.
      a: lora_A, of a rank that may be a multiple of that of the kernels.
      b: lora_B.
      rank: the rank.
    """

    name: str
    a: np.ndarray
    b: np.ndarray
    rank: int


class Piece(NamedTuple):
    """The LoRA matrices of a layer's kernel that becomes a parameter of transformers, or every second column of one.

    Attributes:
      where: the parameter.
      a: (inputs, r), or (experts, inputs, r).
      b: (r, outputs), or (experts, r, outputs).
    """

    where: Placement
    a: np.ndarray
    b: np.ndarray


def is_parameter(path: str) -> bool:
    """Whether a kernel of gptjax is a parameter for PEFT, rather than a linear layer."""
    return _PARAMETER.search(path) is not None


def joined(pieces: list[Piece]) -> ParameterLora:
    """Joins the matrices of the kernels that share a parameter: their ranks add up, and lora_B has 0 between them."""
    where, rank = pieces[0].where, pieces[0].a.shape[-1]
    ranks = rank * len(pieces)
    if not where.stacked:
        ((_, a_DA, b_AF),) = pieces
        return ParameterLora(where.name, a_DA.T, b_AF.T, rank)
    experts, _, outputs = where.shape
    a_EAD = np.concatenate([piece.a.swapaxes(1, 2) for piece in pieces], axis=1)
    b_EAF = np.zeros((experts, ranks, outputs), pieces[0].b.dtype)
    for i, piece in enumerate(pieces):
        columns = slice(None) if piece.where.first is None else slice(piece.where.first, None, 2)
        b_EAF[:, i * rank : (i + 1) * rank, columns] = piece.b
    return ParameterLora(
        where.name, a_EAD.reshape(experts * ranks, -1), b_EAF.transpose(2, 1, 0).reshape(outputs, -1), ranks
    )


def of_kernel(where: Placement, a: np.ndarray, b: np.ndarray, rank: int) -> tuple[np.ndarray, np.ndarray]:
    """The matrices of one kernel from lora_A and lora_B of a linear layer or parameter; for kernels, undoes `joined`.

    Where two kernels share a parameter, both have its whole lora_A, except if `joined` may have written it.

    Returns:
      (inputs, r) and (r, outputs), or (experts, inputs, r) and (experts, r, outputs).
    """
    if not where.stacked:
        return a.T, b.T
    experts = where.shape[0]
    a_EDA, b_EAF = a.reshape(experts, rank, -1).swapaxes(1, 2), b.reshape(-1, rank, experts).transpose(2, 1, 0)
    if where.first is None:
        return a_EDA, b_EAF
    own_EAF, half = b_EAF[..., where.first :: 2], rank // 2
    is_joined = rank % 2 == 0 and not b_EAF[:, half:, 0::2].any() and not b_EAF[:, :half, 1::2].any()
    if not (is_joined and b_EAF.any()):
        return a_EDA, own_EAF
    ranks = slice(where.first * half, (where.first + 1) * half)
    return a_EDA[..., ranks], own_EAF[:, ranks]


def file_names(parameters: list[str]) -> dict[str, str]:
    """The modules to which PEFT's files assign the matrices of these parameters, by parameter."""
    modules: dict[str, list[str]] = {}
    for name in sorted(parameters, key=lambda name: _WRAPPED.index(name.rpartition(".")[2])):
        modules.setdefault(name.rpartition(".")[0], []).append(name)
    return {
        name: module + ".base_layer" * (len(names) - 1 - i)
        for module, names in modules.items()
        for i, name in enumerate(names)
    }
