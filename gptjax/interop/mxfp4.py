"""Decoding of MXFP4 (Open Compute Project, Microscaling Formats 1.0): 4-bit numbers with a scale for every 32.

A number is E2M1: a sign, two bits of exponent and one of mantissa. A scale is E8M0: a power of two. gpt-oss stores the
kernels of its experts in this format, as two tensors: `blocks` uint8 (E, outputs, inputs / 32, 16), whose bytes have an
even input in their low four bits and the next one in the others, and `scales` uint8 (E, outputs, inputs / 32).
"""

import dataclasses
import functools
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import numpy.typing as npt

from gptjax.config import UserError
from gptjax.interop import safetensors_files
from gptjax.interop.safetensors_files import Tensor

_MAGNITUDES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
_BLOCK_BYTES = 16
_SCALE_BIAS = 127
_CHUNK = 2**20  # bytes of blocks that are decoded at a time


@dataclasses.dataclass(frozen=True)
class PackedTensor:
    """A tensor (E, inputs, outputs) in a file, stored in MXFP4 and decoded to bfloat16.

    Attributes:
      blocks, scales: the stored tensors.
    """

    blocks: Tensor
    scales: Tensor

    @property
    def file(self) -> Path:
        return self.blocks.file

    @property
    def dtype(self) -> str:
        return "BF16"

    @property
    def shape(self) -> tuple[int, ...]:
        experts, outputs, groups, size = self.blocks.shape
        return experts, 2 * size * groups, outputs

    def read(self, expert: int) -> npt.NDArray[np.generic]:
        """The (inputs, outputs) kernel of an expert, bfloat16."""
        blocks, scales = (safetensors_files.read(tensor, expert) for tensor in (self.blocks, self.scales))
        return decode(blocks, scales).T


def joined(tensors: dict[str, Tensor]) -> dict[str, Tensor | PackedTensor]:
    """Replaces every pair NAME_blocks and NAME_scales by one tensor NAME.

    Raises:
      UserError: a pair is incomplete, or its shapes or dtypes are not those of MXFP4.
    """
    found: dict[str, Tensor | PackedTensor] = dict(tensors)
    for name in [name.removesuffix("_blocks") for name in tensors if name.endswith("_blocks")]:
        blocks = tensors[f"{name}_blocks"]
        scales = tensors.get(f"{name}_scales")
        if scales is None:
            raise UserError(f"{blocks.file} has the tensor {name}_blocks, but {name}_scales is missing")
        sound = len(blocks.shape) == 4 and blocks.shape[3] == _BLOCK_BYTES and blocks.shape[:3] == scales.shape
        if not sound or blocks.dtype != "U8" or scales.dtype != "U8":
            raise UserError(
                f"{blocks.file}: {name}_blocks {list(blocks.shape)} of {blocks.dtype} and {name}_scales "
                f"{list(scales.shape)} of {scales.dtype} are not MXFP4, which has U8 [experts, outputs, groups, "
                f"{_BLOCK_BYTES}] and U8 [experts, outputs, groups]"
            )
        if name in tensors:
            raise UserError(f"{blocks.file} has the tensor {name} twice, in MXFP4 and as it is")
        del found[f"{name}_blocks"], found[f"{name}_scales"]
        found[name] = PackedTensor(blocks, scales)
    return found


def decode(blocks: npt.NDArray[np.uint8], scales: npt.NDArray[np.uint8]) -> npt.NDArray[np.generic]:
    """Decodes (..., G, 16) bytes with the scales (..., G) to bfloat16 (..., 32 G).

    All numbers are exact, except that those of 2^128 or more are infinite. The scale 255 is NaN in the format; as in
    transformers, it is read as 2^128.
    """
    out = np.empty(blocks.shape, np.uint32)  # two numbers each
    flat, bytes_X16, scale_X = out.reshape(-1, _BLOCK_BYTES), blocks.reshape(-1, _BLOCK_BYTES), scales.reshape(-1)
    step = _CHUNK // _BLOCK_BYTES
    for start in range(0, len(flat), step):
        rows = slice(start, start + step)
        index = (scale_X[rows, None].astype(np.uint16) << 8) | bytes_X16[rows]
        np.take(_pairs(), index, out=flat[rows], mode="clip")  # no index is clipped; "raise" would buffer the output
    return out.view(jnp.bfloat16).reshape(*blocks.shape[:-2], -1)


@functools.cache
def _pairs() -> npt.NDArray[np.uint32]:
    """Pairs of bfloat16 numbers, the first in the low half, by 256 * scale + byte."""
    numbers = np.array([*_MAGNITUDES, *(-magnitude for magnitude in _MAGNITUDES)])
    powers = np.ldexp(1.0, np.arange(256) - _SCALE_BIAS)
    with np.errstate(over="ignore"):
        table = (powers[:, None] * numbers).astype(jnp.bfloat16).view(np.uint16).astype(np.uint32)
    byte = np.arange(256)
    return (table[:, byte & 15] | table[:, byte >> 4] << 16).reshape(-1)
