"""Dense layers whose kernels are stored output-major, for products with few rows.

A CPU multiplies a few rows by a matrix in about the time of reading the matrix, if it reads the weights of an output
consecutively. Kernels as layers initialise them, (inputs, outputs), have them a row apart: products with those take
XLA's CPU backend longer (`benchmarks/LOG.md`).

XLA's CPU backend copies the right operand of a product into the order that its inner loop reads, in every call. For few
rows that takes as long as the product if the weights are the right operand, so `few_rows_product` makes them the left.
"""

import contextlib
import math
from collections.abc import Callable, Iterator
from typing import Any, ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax import struct

from gptjax.parallel.mesh import is_one_device
from gptjax.parallel.platforms import platform_defaults

MOST_FEW_ROWS = 64  # above, copying the weights costs less than it gains


def is_output_major() -> bool:
    """Whether decoding multiplies by output-major matrices here: on one device of a platform where that is faster."""
    return platform_defaults().output_major_kernels and is_one_device()


class StoredKernel(nn.meta.AxisMetadata):
    """A kernel of one layer in a form for decoding, which Flax unboxes where it is read; it is read-only.

    Attributes:
      kind: what it is called in messages.
    """

    kind: ClassVar[str]

    def replace_boxed(self, val: Any) -> Any:
        raise NotImplementedError(f"{self.kind} is read-only")

    def add_axis(self, index: int, params: dict[Any, Any]) -> Any:
        raise NotImplementedError(f"{self.kind} belongs to one layer")

    remove_axis = add_axis


class OutputMajor(struct.PyTreeNode, StoredKernel):
    """A kernel stored as a matrix (outputs, inputs).

    `dense_products` multiplies by it as it is stored; elsewhere Flax unboxes it to the shape that the layer declared.

    Attributes:
      values_YX: the weights of each output.
      shape: of the kernel; its first `inputs` axes are those that the product sums over.
    """

    kind: ClassVar[str] = "an output-major kernel"
    values_YX: jax.Array
    shape: tuple[int, ...] = struct.field(pytree_node=False)
    inputs: int = struct.field(pytree_node=False)

    @classmethod
    def of(cls, kernel: jax.Array, inputs: int) -> "OutputMajor":
        """Stores a kernel whose first `inputs` axes are its inputs and whose others are its outputs."""
        return cls(kernel.reshape(math.prod(kernel.shape[:inputs]), -1).T, kernel.shape, inputs)

    def unbox(self) -> jax.Array:
        return self.values_YX.T.reshape(self.shape)


def product(x: jax.Array, kernel: OutputMajor, precision: Any = None) -> jax.Array:
    """The product over the last axes of `x`, (..., inputs), with a kernel: (..., outputs), each of several axes."""
    leading = x.shape[: x.ndim - kernel.inputs]
    x_NX = x.reshape(-1, kernel.values_YX.shape[1])
    y_NY = few_rows_product(x_NX, kernel.values_YX, precision)
    return y_NY.reshape(*leading, *kernel.shape[kernel.inputs :])


def few_rows_product(
    x_NX: jax.Array, values_YX: jax.Array, precision: Any = None, dtype: jnp.dtype | None = None
) -> jax.Array:
    """The product of rows with an output-major matrix, (N, Y).

    Args:
      dtype: in which it is accumulated and returned; None: that of the operands.
    """
    over_last_axes = ((1,), (1,)), ((), ())
    if not 1 < len(x_NX) <= MOST_FEW_ROWS:
        return jax.lax.dot_general(x_NX, values_YX, over_last_axes, precision=precision, preferred_element_type=dtype)
    y_YN = jax.lax.dot_general(values_YX, x_NX, over_last_axes, precision=precision, preferred_element_type=dtype)
    # Without the barrier XLA replaces the transposition by the product with exchanged operands.
    return jax.lax.optimization_barrier(y_YN).T


@contextlib.contextmanager
def dense_products() -> Iterator[None]:
    """Context in which dense layers whose kernel is `OutputMajor` multiply by it as it is stored.

    XLA folds the transposition of an unboxed kernel into most products, but not into those of one row.
    """

    def multiply(
        call: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any], context: nn.module.InterceptorContext
    ) -> Any:
        module = context.module
        if context.method_name != "__call__" or not isinstance(module, nn.Dense | nn.DenseGeneral):
            return call(*args, **kwargs)
        kernel = module.variables["params"]["kernel"]
        if not isinstance(kernel, OutputMajor):
            return call(*args, **kwargs)
        x, weights, bias = nn.dtypes.promote_dtype(
            args[0],
            kernel.values_YX,
            module.get_variable("params", "bias") if module.use_bias else None,
            dtype=module.dtype,
        )
        y = product(x, kernel.replace(values_YX=weights), module.precision)
        return y if bias is None else y + jnp.expand_dims(bias, range(y.ndim - bias.ndim))

    with nn.intercept_methods(multiply):
        yield
