"""Cross entropy, log-probabilities and entropies of a language model, without the logits of a whole batch in memory.

Shapes: B sequences of T positions, model width D, vocabulary V; the T positions are processed in N chunks of C.
"""

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

MASKED = -1e30  # logit of probability 0; finite, so that differences are not NaN


def logits_dtype(config: GPTConfig, platform: str) -> str:
    """Returns the dtype of a training step's logits: model.logits_dtype, with auto resolved for the platform."""
    if config.logits_dtype == "auto":
        return PLATFORM_DEFAULTS[platform].logits_dtype if config.dtype == "bfloat16" else "float32"
    return config.logits_dtype


def positions_per_chunk(sequences: int) -> int:
    """Returns the positions of a chunk of `sequences` sequences: about `loss_chunk_tokens` tokens in all."""
    return max(1, platform_defaults().loss_chunk_tokens // sequences)


@partial(jax.custom_vjp, nondiff_argnums=(4, 5, 6, 7, 8))
def cross_entropy(
    x_BTD: jax.Array,
    embedding_VD: jax.Array,
    targets_BT: jax.Array,
    weights_BT: jax.Array,
    chunk: int | None = None,
    precision: str | None = None,
    logits_dtype: str = "float32",
    soft_cap: float | None = None,
    z_loss: float = 0.0,
) -> jax.Array:
    """Weighted sum of the cross entropy, in nats: a float32 scalar.

        loss = sum_{b,t} weight_{b,t} (-log softmax(z_{b,t})[target_{b,t}] + z_loss log(sum_v exp(z_{b,t,v}))^2)

    with logits z = x embedding^T, capped as `unembed` does.

    Logits are materialised for `chunk` positions of each sequence at a time. Under differentiation the forward pass
    computes each chunk's gradient together with its loss, so that the backward pass only scales it by the scalar
    cotangent and recomputes nothing.

    Args:
      x_BTD: final hidden states. With a mesh in use, B, T and V must be divisible by its axes.
      embedding_VD: output head matrix.
      targets_BT: int, token ids.
      weights_BT: float32; 0 ignores a target. Not differentiated.
      chunk: C, positions per chunk; the last chunk may be shorter. None: `positions_per_chunk`.
      precision: of the matrix products, as in `jax.lax.Precision`.
      logits_dtype: dtype that logits are stored in.
      soft_cap: `model.logit_soft_cap`.
      z_loss: coefficient of the squared log-normaliser (Chowdhery et al. 2022, section 5).
    """
    arrays = x_BTD, embedding_VD, targets_BT, weights_BT
    settings = _Settings(chunk, precision, logits_dtype, soft_cap, z_loss, with_gradients=False)
    return _sharded(*arrays, settings=settings)[0]


def target_logprobs(
    x_BTD: jax.Array,
    embedding_VD: jax.Array,
    targets_BT: jax.Array,
    precision: str | None = None,
    soft_cap: float | None = None,
) -> jax.Array:
    """Log-probabilities of the targets, in nats: float32 (B, T).

        log softmax(x embedding^T)[target]

    For losses that are not a weighted sum of them, such as DPO's and PPO's. Logits are materialised for one chunk of
    positions at a time, and recomputed in the backward pass. Arguments as in `cross_entropy`.
    """

    def logprob(logits_BCV: jax.Array, targets_BC: jax.Array) -> jax.Array:
        picked_BC = jnp.take_along_axis(logits_BCV, targets_BC[..., None], axis=-1)[..., 0]
        return picked_BC - jax.nn.logsumexp(logits_BCV, axis=-1)

    return _map_logits(logprob, x_BTD, embedding_VD, targets_BT, precision, soft_cap)


def entropies(
    x_BTD: jax.Array, embedding_VD: jax.Array, precision: str | None = None, soft_cap: float | None = None
) -> jax.Array:
    """Entropies of softmax(x embedding^T), in nats: float32 (B, T). Arguments as in `cross_entropy`."""

    def entropy(logits_BCV: jax.Array, _: jax.Array) -> jax.Array:
        return policy_gradient.entropy(logits_BCV)

    unused_BT = jnp.zeros(x_BTD.shape[:2], jnp.int32)
    return _map_logits(entropy, x_BTD, embedding_VD, unused_BT, precision, soft_cap)


def _map_logits(
    function: Callable[[jax.Array, jax.Array], jax.Array],
    x_BTD: jax.Array,
    embedding_VD: jax.Array,
    targets_BT: jax.Array,
    precision: str | None,
    soft_cap: float | None,
) -> jax.Array:
    """Applies `function`, (logits (B, C, V), targets (B, C)) -> (B, C), to every chunk; returns (B, T)."""
    batch, length, _ = x_BTD.shape
    chunk = min(positions_per_chunk(batch), length)
    head_VD = embedding_VD.astype(x_BTD.dtype)

    @jax.checkpoint
    def apply(inputs: tuple[jax.Array, jax.Array]) -> jax.Array:
        x_BCD, targets_BC = inputs
        return function(unembed(x_BCD, head_VD, precision, soft_cap=soft_cap), targets_BC)

    chunks = (_chunks(x_BTD, chunk), _chunks(targets_BT, chunk))
    return jnp.moveaxis(jax.lax.map(apply, chunks), 0, 1).reshape(batch, -1)[:, :length]


def _chunks(x_BT: jax.Array, chunk: int) -> jax.Array:
    """Splits (B, T, ...) into (N, B, C, ...), padded with zeros."""
    x_BT = jnp.pad(x_BT, [(0, 0), (0, -x_BT.shape[1] % chunk)] + [(0, 0)] * (x_BT.ndim - 2))
    return jnp.moveaxis(x_BT.reshape(len(x_BT), -1, chunk, *x_BT.shape[2:]), 1, 0)


def _forward(
    x_BTD: jax.Array,
    embedding_VD: jax.Array,
    targets_BT: jax.Array,
    weights_BT: jax.Array,
    *settings: Any,
) -> tuple[jax.Array, Any]:
    arrays = x_BTD, embedding_VD, targets_BT, weights_BT
    return _sharded(*arrays, settings=_Settings(*settings, with_gradients=True))


def _backward(*settings_and_arrays: Any) -> tuple[jax.Array, jax.Array, None, None]:
    *_, (dx_BTD, dembedding_VD), cotangent = settings_and_arrays
    return (
        (dx_BTD * cotangent).astype(dx_BTD.dtype),
        (dembedding_VD * cotangent).astype(dembedding_VD.dtype),
        None,
        None,
    )


cross_entropy.defvjp(_forward, _backward)


class _Settings(NamedTuple):
    """Arguments of `cross_entropy`, and whether to compute the gradients together with the loss."""

    chunk: int | None
    precision: str | None
    logits_dtype: str
    soft_cap: float | None
    z_loss: float
    with_gradients: bool


def _sharded(*arrays: jax.Array, settings: _Settings) -> tuple[jax.Array, Any]:
    """Computes the loss over the mesh in use, and its gradients for x and the embedding (None without gradients).

    Each device computes its shard of sequences, positions and vocabulary rows. `shard_map` sums the embedding's
    gradient over devices once, at the end; the automatic partitioner would do so for every chunk.
    """
    on_device = partial(_scan_chunks, settings=settings)
    if jax.sharding.get_abstract_mesh().empty:
        return on_device(*arrays)
    batch, embedding = partition_spec(("batch", "length")), partition_spec(("vocab", "embed"))
    gradients = (partition_spec(("batch", "sequence")), embedding) if settings.with_gradients else (None, None)
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
    settings: _Settings,
) -> tuple[jax.Array, Any]:
    """Computes what `_sharded` returns on one device: x is (B, T, D), the embedding (V / tensor, D / fsdp)."""
    batch, length, width = x_BTD.shape
    chunk = min(positions_per_chunk(batch) if settings.chunk is None else settings.chunk, length)
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
        stored_BCV = unembed(x_BCD, head_VD, settings.precision, settings.logits_dtype, settings.soft_cap)
        row_11V = jnp.arange(len(head_VD))[None, None]
        logits_BCV = stored_BCV.astype(jnp.float32)
        if len(head_VD) > rows:
            logits_BCV = jnp.where(row_11V < rows, logits_BCV, MASKED)
        log_z_BC = _logsumexp(logits_BCV)
        # Padding rows are never targets: with a sharded vocabulary, their indices are rows of the next device.
        row_BC = targets_BC - first_row
        hit_BCV = (row_11V == row_BC[..., None]) & (row_11V < rows)
        picked_BC = _sum(_picked(stored_BCV, logits_BCV, hit_BCV, row_BC, rows), "tensor")
        losses_BC = log_z_BC - picked_BC
        if settings.z_loss > 0:
            losses_BC += settings.z_loss * jnp.square(log_z_BC)
        loss += jnp.sum(weights_BC * losses_BC)
        if not settings.with_gradients:
            return (loss, dhead_VD), jnp.zeros((), x_BCD.dtype)
        probs_BCV = jnp.exp(logits_BCV - log_z_BC[..., None])
        if settings.z_loss > 0:
            probs_BCV *= (1 + 2 * settings.z_loss * log_z_BC)[..., None]
        dlogits_BCV = (probs_BCV - hit_BCV) * weights_BC[..., None]
        if settings.soft_cap is not None:  # the derivative of cap * tanh(z / cap)
            dlogits_BCV *= 1 - jnp.square(stored_BCV.astype(jnp.float32) / settings.soft_cap)
        dlogits_BCV = dlogits_BCV.astype(x_BCD.dtype)
        dx_BCD = jnp.einsum("BCV,VD->BCD", dlogits_BCV, head_VD, precision=settings.precision)
        # One contracted axis: with two, XLA's CPU compiler copies the logits' gradient.
        dlogits_XV, x_XD = dlogits_BCV.reshape(-1, len(head_VD)), x_BCD.reshape(-1, width)
        dhead_VD += jnp.einsum(
            "XV,XD->VD", dlogits_XV, x_XD, precision=settings.precision, preferred_element_type=jnp.float32
        )
        return (loss, dhead_VD), dx_BCD

    chunks = (_chunks(x_BTD, chunk), _chunks(targets_BT, chunk), _chunks(weights_BT, chunk))
    start = (jnp.zeros((), jnp.float32), jnp.zeros(head_VD.shape if settings.with_gradients else (), jnp.float32))
    (loss, dhead_VD), dx_NBCD = jax.lax.scan(step, start, chunks)
    loss = _sum(loss, *BATCH_AXES, "context")
    if not settings.with_gradients:
        return loss, (None, None)
    dx_BTD = jnp.moveaxis(dx_NBCD, 0, 1).reshape(batch, -1, width)[:, :length]
    dx_BTD = _sum_and_split(dx_BTD, "tensor", axis=1)
    dhead_VD = _sum_and_split(_sum(dhead_VD[:rows], "data", "expert", "context"), "fsdp", axis=1)
    return loss, (dx_BTD, dhead_VD.astype(embedding_VD.dtype))


def _picked(
    stored_BCV: jax.Array, logits_BCV: jax.Array, hit_BCV: jax.Array, row_BC: jax.Array, rows: int
) -> jax.Array:
    """Returns the logits of the targets within a device's `rows` of the vocabulary, float32; 0 for the others."""
    if not platform_defaults().gather_target_logits:
        return jnp.sum(jnp.where(hit_BCV, logits_BCV, 0), axis=-1)
    picked_BC = jnp.take_along_axis(stored_BCV, jnp.clip(row_BC, 0, rows - 1)[..., None], axis=-1)[..., 0]
    return jnp.where((row_BC >= 0) & (row_BC < rows), picked_BC.astype(jnp.float32), 0)


def _logsumexp(logits_BCV: jax.Array) -> jax.Array:
    """Log-sum-exp over the whole vocabulary, (B, C), from one device's shard of the logits."""
    log_z_BC = (
        _one_pass(logits_BCV) if platform_defaults().logsumexp_in_one_pass else jax.nn.logsumexp(logits_BCV, axis=-1)
    )
    if axis_size("tensor") == 1:
        return log_z_BC
    largest_BC = jax.lax.pmax(log_z_BC, "tensor")
    return largest_BC + jnp.log(_sum(jnp.exp(log_z_BC - largest_BC), "tensor"))


def _one_pass(logits_BCV: jax.Array) -> jax.Array:
    """Log-sum-exp over the last axis in one reduction over pairs (maximum, sum of exp(logit - maximum)).

    Online softmax normaliser (Milakov and Gimelshein 2018, section 3).
    """
    Pair = tuple[jax.Array, jax.Array]

    def merge(a: Pair, b: Pair) -> Pair:
        smaller = jnp.exp(-jnp.abs(a[0] - b[0]))  # the larger one has exp(0) = 1
        summed = jnp.where(a[0] >= b[0], a[1] + b[1] * smaller, a[1] * smaller + b[1])
        return jnp.maximum(a[0], b[0]), summed

    pairs = (logits_BCV, jnp.ones_like(logits_BCV))
    identity = (jnp.float32(MASKED), jnp.float32(0))
    largest_BC, sum_BC = jax.lax.reduce(pairs, identity, merge, (logits_BCV.ndim - 1,))
    return largest_BC + jnp.log(sum_BC)


def _sum(x: jax.Array, *axes: str) -> jax.Array:
    """Sums over the devices along mesh axes."""
    used = [axis for axis in axes if axis_size(axis) > 1]
    return jax.lax.psum(x, used) if used else x


def _sum_and_split(x: jax.Array, mesh_axis: str, axis: int) -> jax.Array:
    """Reduce-scatter: sums over the devices along a mesh axis, each of which keeps its shard of `axis`."""
    if axis_size(mesh_axis) == 1:
        return x
    return jax.lax.psum_scatter(x, mesh_axis, scatter_dimension=axis, tiled=True)
