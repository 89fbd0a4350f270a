"""The chunked cross entropy equals the plain one in value and gradient, without the batch's logits in memory."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gptjax.config import GPTConfig
from gptjax.losses.cross_entropy import cross_entropy, logits_dtype, positions_per_chunk
from gptjax.parallel.platforms import PLATFORM_DEFAULTS, override_defaults

B, T, D, V = 3, 10, 8, 17


def plain(x_BTD, embedding_VD, targets_BT, weights_BT):
    log_probs_BTV = jax.nn.log_softmax(jnp.einsum("BTD,VD->BTV", x_BTD, embedding_VD).astype(jnp.float32))
    return -jnp.sum(weights_BT * jnp.take_along_axis(log_probs_BTV, targets_BT[..., None], axis=-1)[..., 0])


def inputs(dtype=jnp.float32):
    keys = jax.random.split(jax.random.key(0), 4)
    return (
        jax.random.normal(keys[0], (B, T, D), dtype),
        jax.random.normal(keys[1], (V, D)),
        jax.random.randint(keys[2], (B, T), 0, V),
        jax.random.uniform(keys[3], (B, T)),
    )


@pytest.mark.parametrize("chunk", [1, 3, 5, 10, 64])
def test_equals_the_plain_loss(chunk):
    x, embedding, targets, weights = inputs()
    actual = jax.value_and_grad(lambda x, e: 3 * cross_entropy(x, e, targets, weights, chunk), (0, 1))(x, embedding)
    expected = jax.value_and_grad(lambda x, e: 3 * plain(x, e, targets, weights), (0, 1))(x, embedding)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5), actual, expected)
    np.testing.assert_allclose(3 * cross_entropy(x, embedding, targets, weights, chunk), expected[0], rtol=1e-5)


@pytest.mark.parametrize(("one_pass", "by_index"), [(False, False), (True, False), (True, True)])
@pytest.mark.parametrize("multiple", [1, 16])
def test_gpu_defaults_equal_the_plain_loss(one_pass, by_index, multiple):
    """A padded head, a log-sum-exp in one pass and gathered target logits, also with logits that exp would overflow."""
    x, embedding, targets, weights = inputs()
    for scale, tolerance in ((1, 1e-5), (100, 1e-3)):
        with override_defaults(
            "cpu", logsumexp_in_one_pass=one_pass, gather_target_logits=by_index, head_row_multiple=multiple
        ):
            loss_and_gradients = jax.value_and_grad(lambda x, e: cross_entropy(x, e, targets, weights, 4), (0, 1))
            actual = loss_and_gradients(scale * x, embedding)
        expected = jax.value_and_grad(lambda x, e: plain(x, e, targets, weights), (0, 1))(scale * x, embedding)
        for a, b in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
            np.testing.assert_allclose(a, b, rtol=tolerance, atol=1e-5 * scale)


def test_bfloat16_logits_lose_only_bfloat16_precision():
    x, embedding, targets, weights = inputs(jnp.bfloat16)

    def loss(x, embedding, dtype):
        return cross_entropy(x, embedding, targets, weights, 4, None, dtype)

    actual, expected = (jax.value_and_grad(loss, (0, 1))(x, embedding, dtype) for dtype in ("bfloat16", "float32"))
    assert actual[0] != expected[0]
    np.testing.assert_allclose(actual[0], expected[0], rtol=2e-3)  # B x T roundings to 8 bits
    for a, b in zip(actual[1], expected[1], strict=True):
        a, b = (np.asarray(leaf, np.float32) for leaf in (a, b))
        assert np.linalg.norm(a - b) < 1e-2 * np.linalg.norm(b)


def test_auto_logits_dtype_is_the_platforms():
    assert [logits_dtype(GPTConfig(dtype="bfloat16"), on) for on in ("cpu", "gpu", "tpu")] == [
        "float32",
        "bfloat16",
        "bfloat16",
    ]
    assert logits_dtype(GPTConfig(dtype="bfloat16", logits_dtype="bfloat16"), "cpu") == "bfloat16"
    assert logits_dtype(GPTConfig(dtype="float32"), "gpu") == "float32"
    assert logits_dtype(GPTConfig(dtype="bfloat16", logits_dtype="float32"), "gpu") == "float32"


def test_bfloat16_states_lose_only_bfloat16_precision():
    x, embedding, targets, weights = inputs(jnp.bfloat16)
    embedding = embedding.astype(jnp.bfloat16).astype(jnp.float32)
    actual = cross_entropy(x, embedding, targets, weights, 4)
    assert actual.dtype == jnp.float32
    np.testing.assert_allclose(actual, plain(x.astype(jnp.float32), embedding, targets, weights), rtol=1e-5)


def test_targets_of_weight_0_are_ignored():
    x, embedding, targets, weights = inputs()
    weights = weights.at[:, 4:].set(0.0)
    moved = x.at[:, 4:].add(1.0)
    gradient = jax.grad(cross_entropy)(moved, embedding, targets, weights, 3)
    assert cross_entropy(moved, embedding, targets, weights, 3) == cross_entropy(x, embedding, targets, weights, 3)
    assert not np.any(gradient[:, 4:])


def test_never_holds_the_logits_of_a_batch():
    """By the memory analysis of the compiled program; the plain loss holds several arrays of them."""
    batch, length, width, vocab = 8, 1024, 16, 4096
    shapes = (
        jax.ShapeDtypeStruct((batch, length, width), jnp.float32),
        jax.ShapeDtypeStruct((vocab, width), jnp.float32),
        jax.ShapeDtypeStruct((batch, length), jnp.int32),
        jax.ShapeDtypeStruct((batch, length), jnp.float32),
    )

    def temporaries(loss) -> int:
        return jax.jit(jax.grad(loss, (0, 1))).lower(*shapes).compile().memory_analysis().temp_size_in_bytes

    logits_bytes = 4 * batch * length * vocab
    chunk = positions_per_chunk(batch)
    assert temporaries(lambda *args: plain(*args)) > logits_bytes
    # A few arrays of one chunk's logits, far below the batch's.
    assert temporaries(lambda *args: cross_entropy(*args, chunk)) < 3.5 * 4 * batch * chunk * vocab < logits_bytes


def test_chunks_have_a_bounded_number_of_tokens():
    assert positions_per_chunk(1) == PLATFORM_DEFAULTS["cpu"].loss_chunk_tokens
    assert positions_per_chunk(8) * 8 == PLATFORM_DEFAULTS["cpu"].loss_chunk_tokens
    assert positions_per_chunk(10 * PLATFORM_DEFAULTS["cpu"].loss_chunk_tokens) == 1
