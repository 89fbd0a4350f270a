"""Language-model loss that never holds float32 logits of a whole batch."""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from gptjax.config import GPTConfig
from gptjax.losses import policy_gradient
from gptjax.models.gpt import unembed
from gptjax.parallel.mesh import BATCH_AXES, axis_size, partition_spec
from gptjax.parallel.platforms import PLATFORM_DEFAULTS, platform_defaults

MASKED = -1e30  # a logit that counts for nothing, and does not make NaN of a difference


def logits_dtype(config: GPTConfig, platform: str) -> str:
    """Of the logits that a training step holds."""
    if config.logits_dtype == "auto":
        return PLATFORM_DEFAULTS[platform].logits_dtype if config.dtype == "bfloat16" else "float32"
    return config.logits_dtype


def positions_per_chunk(sequences: int) -> int:
    """How many positions make a chunk on a device that has so many sequences."""
    return max(1, platform_defaults().loss_chunk_tokens // sequences)


@partial(jax.custom_vjp, nondiff_argnums=(4, 5, 6))
def cross_entropy(
    x_BTD: jax.Array,
    embedding_VD: jax.Array,
    targets_BT: jax.Array,
    weights_BT: jax.Array,
    chunk: int | None = None,
    precision: str | None = None,
    logits_dtype: str = "float32",
) -> jax.Array:
    """Weighted sum of -log softmax(x embedding^T)[target] in nats, float32.

    The logits exist for `chunk` positions of each sequence at a time. Where a gradient is asked for, each chunk's
    gradient is computed beside its loss, while its logits are at hand: the loss is a scalar at the end of the
    computation, so its cotangent only scales them, and nothing is recomputed.

    Args:
      x_BTD: final hidden states. With a mesh in use, B, T and V divide over it.
      embedding_VD: head matrix.
      targets_BT: int, token ids.
      weights_BT: float32; 0 leaves a target out. Not differentiated.
      chunk: positions a chunk; the last one may be short. None: what suits the device.
      precision: of the matrix products.
      logits_dtype: of the logits in memory.
    """
    arrays = x_BTD, embedding_VD, targets_BT, weights_BT
    how = _How(chunk, precision, logits_dtype, with_gradients=False)
    return _spread(*arrays, how=how)[0]


def target_logprobs(
    x_BTD: jax.Array, embedding_VD: jax.Array, targets_BT: jax.Array, precision: str | None = None
) -> jax.Array:
    """log softmax(x embedding^T)[target] in nats, float32 (B, T), for losses that are not a sum over the targets.

    The logits exist for a chunk of positions at a time, and are computed again where a gradient is asked for.
    Arguments as of `cross_entropy`.
    """

    def logprob(logits_BCV: jax.Array, targets_BC: jax.Array) -> jax.Array:
        picked_BC = jnp.take_along_axis(logits_BCV, targets_BC[..., None], axis=-1)[..., 0]
        return picked_BC - jax.nn.logsumexp(logits_BCV, axis=-1)

    return _of_logits(logprob, x_BTD, embedding_VD, targets_BT, precision)


def entropies(x_BTD: jax.Array, embedding_VD: jax.Array, precision: str | None = None) -> jax.Array:
    """Entropy of softmax(x embedding^T) in nats, float32 (B, T); arguments as of `cross_entropy`."""
    none_BT = jnp.zeros(x_BTD.shape[:2], jnp.int32)
    return _of_logits(lambda logits, _: policy_gradient.entropy(logits), x_BTD, embedding_VD, none_BT, precision)


def _of_logits(
    function: Callable[[jax.Array, jax.Array], jax.Array],
    x_BTD: jax.Array,
    embedding_VD: jax.Array,
    targets_BT: jax.Array,
    precision: str | None,
) -> jax.Array:
    """`function` of the logits (B, C, V) and targets (B, C) of each chunk, (B, C), put together to (B, T)."""
    batch, length, _ = x_BTD.shape
    chunk = min(positions_per_chunk(batch), length)
    head_VD = embedding_VD.astype(x_BTD.dtype)

    @jax.checkpoint
    def of_chunk(inputs: tuple[jax.Array, jax.Array]) -> jax.Array:
        x_BCD, targets_BC = inputs
        return function(unembed(x_BCD, head_VD, precision), targets_BC)

    chunks = (_chunks(x_BTD, chunk), _chunks(targets_BT, chunk))
    return jnp.moveaxis(jax.lax.map(of_chunk, chunks), 0, 1).reshape(batch, -1)[:, :length]


def _chunks(a_BT: jax.Array, chunk: int) -> jax.Array:
    """(B, T, ...) to (N, B, C, ...), padded with zeros."""
    a_BT = jnp.pad(a_BT, [(0, 0), (0, -a_BT.shape[1] % chunk)] + [(0, 0)] * (a_BT.ndim - 2))
    return jnp.moveaxis(a_BT.reshape(len(a_BT), -1, chunk, *a_BT.shape[2:]), 1, 0)


def _forward(
    x_BTD: jax.Array,
    embedding_VD: jax.Array,
    targets_BT: jax.Array,
    weights_BT: jax.Array,
    chunk: int | None,
    precision: str | None,
    logits_dtype: str,
) -> tuple[jax.Array, Any]:
    arrays = x_BTD, embedding_VD, targets_BT, weights_BT
    return _spread(*arrays, how=_How(chunk, precision, logits_dtype, with_gradients=True))


def _backward(
    chunk: int | None,
    precision: str | None,
    logits_dtype: str,
    gradients: tuple[jax.Array, jax.Array],
    cotangent: jax.Array,
) -> tuple[jax.Array, jax.Array, None, None]:
    dx_BTD, dembedding_VD = gradients
    return (
        (dx_BTD * cotangent).astype(dx_BTD.dtype),
        (dembedding_VD * cotangent).astype(dembedding_VD.dtype),
        None,
        None,
    )


cross_entropy.defvjp(_forward, _backward)


class _How(NamedTuple):
    """Arguments as of `cross_entropy`, and whether the gradients are computed beside the loss."""

    chunk: int | None
    precision: str | None
    logits_dtype: str
    with_gradients: bool


def _spread(*arrays: jax.Array, how: _How) -> tuple[jax.Array, Any]:
    """The loss and its gradients with respect to x and the embedding (None unless asked for), over the mesh in use.

    Each device takes its own sequences, positions and rows of the vocabulary. Gradients of the embedding are summed
    over the devices once, at the end: the partitioner, left to itself, would do so for every chunk.
    """
    on_device = partial(_scan_chunks, how=how)
    if jax.sharding.get_abstract_mesh().empty:
        return on_device(*arrays)
    batch, embedding = partition_spec(("batch", "length")), partition_spec(("vocab", "embed"))
    gradients = (partition_spec(("batch", "sequence")), embedding) if how.with_gradients else (None, None)
    return jax.shard_map(
        on_device,
        in_specs=(batch, embedding, batch, batch),
        out_specs=(PartitionSpec(), gradients),
        check_vma=False,
    )(*arrays)


def _scan_chunks(
    x_BTD: jax.Array,
    embedding_VD: jax.Array,
    targets_BT: jax.Array,
    weights_BT: jax.Array,
    *,
    how: _How,
) -> tuple[jax.Array, Any]:
    """What `_spread` returns, of one device's arrays: x (B, T, D), V rows of the embedding of D / fsdp columns each."""
    batch, length, width = x_BTD.shape
    chunk = min(positions_per_chunk(batch) if how.chunk is None else how.chunk, length)
    head_VD = embedding_VD.astype(x_BTD.dtype)
    if axis_size("fsdp") > 1:
        head_VD = jax.lax.all_gather(head_VD, "fsdp", axis=1, tiled=True)
    rows = len(head_VD)
    head_VD = jnp.pad(head_VD, ((0, -rows % platform_defaults().head_row_multiple), (0, 0)))
    first_row = jax.lax.axis_index("tensor") * rows if axis_size("tensor") > 1 else 0

    def step(
        carry: tuple[jax.Array, jax.Array], inputs: tuple[jax.Array, jax.Array, jax.Array]
    ) -> tuple[tuple[jax.Array, jax.Array], jax.Array]:
        loss, dhead_VD = carry
        x_BCD, targets_BC, weights_BC = inputs
        stored_BCV = unembed(x_BCD, head_VD, how.precision, how.logits_dtype)
        row_11V = jnp.arange(len(head_VD))[None, None]
        logits_BCV = stored_BCV.astype(jnp.float32)
        if len(head_VD) > rows:
            logits_BCV = jnp.where(row_11V < rows, logits_BCV, MASKED)
        log_z_BC = _logsumexp(logits_BCV)
        # A row that only fills up is no target: with the rows spread over devices, its number is another device's row.
        row_BC = targets_BC - first_row
        hit_BCV = (row_11V == row_BC[..., None]) & (row_11V < rows)
        picked_BC = _sum(_picked(stored_BCV, logits_BCV, hit_BCV, row_BC, rows), "tensor")
        loss += jnp.sum(weights_BC * (log_z_BC - picked_BC))
        if not how.with_gradients:
            return (loss, dhead_VD), jnp.zeros((), x_BCD.dtype)
        dlogits_BCV = (jnp.exp(logits_BCV - log_z_BC[..., None]) - hit_BCV) * weights_BC[..., None]
        dlogits_BCV = dlogits_BCV.astype(x_BCD.dtype)
        dx_BCD = jnp.einsum("BCV,VD->BCD", dlogits_BCV, head_VD, precision=how.precision)
        # One axis to sum over: of two, XLA's CPU makes a copy of the logits' gradient.
        dlogits_NV, x_ND = dlogits_BCV.reshape(-1, len(head_VD)), x_BCD.reshape(-1, width)
        dhead_VD += jnp.einsum(
            "NV,ND->VD", dlogits_NV, x_ND, precision=how.precision, preferred_element_type=jnp.float32
        )
        return (loss, dhead_VD), dx_BCD

    chunks = (_chunks(x_BTD, chunk), _chunks(targets_BT, chunk), _chunks(weights_BT, chunk))
    start = (jnp.zeros((), jnp.float32), jnp.zeros(head_VD.shape if how.with_gradients else (), jnp.float32))
    (loss, dhead_VD), dx_NBCD = jax.lax.scan(step, start, chunks)
    loss = _sum(loss, *BATCH_AXES, "context")
    if not how.with_gradients:
        return loss, (None, None)
    dx_BTD = jnp.moveaxis(dx_NBCD, 0, 1).reshape(batch, -1, width)[:, :length]
    dx_BTD = _sum_and_split(dx_BTD, "tensor", axis=1)
    dhead_VD = _sum_and_split(_sum(dhead_VD[:rows], "data", "expert", "context"), "fsdp", axis=1)
    return loss, (dx_BTD, dhead_VD.astype(embedding_VD.dtype))


def _picked(
    stored_BCV: jax.Array, logits_BCV: jax.Array, hit_BCV: jax.Array, row_BC: jax.Array, rows: int
) -> jax.Array:
    """The logits of the targets that lie among a device's `rows`, float32; 0 for the others."""
    if not platform_defaults().gather_target_logits:
        return jnp.sum(jnp.where(hit_BCV, logits_BCV, 0), axis=-1)
    picked_BC = jnp.take_along_axis(stored_BCV, jnp.clip(row_BC, 0, rows - 1)[..., None], axis=-1)[..., 0]
    return jnp.where((row_BC >= 0) & (row_BC < rows), picked_BC.astype(jnp.float32), 0)


def _logsumexp(logits_BCV: jax.Array) -> jax.Array:
    """Over the whole vocabulary, of which a device has the rows V; (B, C)."""
    log_z_BC = (
        _one_pass(logits_BCV) if platform_defaults().logsumexp_in_one_pass else jax.nn.logsumexp(logits_BCV, axis=-1)
    )
    if axis_size("tensor") == 1:
        return log_z_BC
    largest_BC = jax.lax.pmax(log_z_BC, "tensor")
    return largest_BC + jnp.log(_sum(jnp.exp(log_z_BC - largest_BC), "tensor"))


def _one_pass(logits_BCV: jax.Array) -> jax.Array:
    """log sum exp over the last axis by one reduction of pairs: the largest so far, the sum of exp(logit - largest)."""
    Pair = tuple[jax.Array, jax.Array]

    def merge(a: Pair, b: Pair) -> Pair:
        smaller = jnp.exp(-jnp.abs(a[0] - b[0]))  # of the two, one exponential would be of 0
        summed = jnp.where(a[0] >= b[0], a[1] + b[1] * smaller, a[1] * smaller + b[1])
        return jnp.maximum(a[0], b[0]), summed

    pairs = (logits_BCV, jnp.ones_like(logits_BCV))
    nothing = (jnp.float32(MASKED), jnp.float32(0))
    largest_BC, sum_BC = jax.lax.reduce(pairs, nothing, merge, (logits_BCV.ndim - 1,))
    return largest_BC + jnp.log(sum_BC)


def _sum(x: jax.Array, *axes: str) -> jax.Array:
    """Over the devices along mesh axes."""
    spread = [axis for axis in axes if axis_size(axis) > 1]
    return jax.lax.psum(x, spread) if spread else x


def _sum_and_split(x: jax.Array, mesh_axis: str, axis: int) -> jax.Array:
    """`_sum`, of which each device keeps its part of `axis`."""
    if axis_size(mesh_axis) == 1:
        return x
    return jax.lax.psum_scatter(x, mesh_axis, scatter_dimension=axis, tiled=True)
