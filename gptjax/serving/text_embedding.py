"""Embeddings of texts: the final hidden states of the model, pooled over the tokens."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import numpy.typing as npt
from jax.sharding import Mesh

from gptjax.inference.engine import bucket
from gptjax.models import decoding
from gptjax.models.gpt import GPT
from gptjax.parallel.mesh import use_mesh


def embedder(model: GPT, params: Any, mesh: Mesh | None) -> Callable[[Sequence[int], str], npt.NDArray[np.float32]]:
    """Returns a function from tokens and a pooling, "mean" or "last", to an embedding, float32 (D,).

    A text is computed alone, so that its embedding does not depend on others. Lengths are rounded up to powers of two,
    for which programs are compiled once.

    Args:
      params: unstacked, as the engine has them.
    """

    def embed(tokens: Sequence[int], pooling: str) -> npt.NDArray[np.float32]:
        length = min(bucket(len(tokens)), model.config.context_length)
        tokens_BT = np.zeros((1, length), np.int32)
        tokens_BT[0, : len(tokens)] = tokens
        with use_mesh(mesh):
            pooled_D = _pooled(model, params, tokens_BT, np.int32(len(tokens)), pooling)
        return np.asarray(pooled_D)

    return embed


@partial(jax.jit, static_argnames=("model", "pooling"))
def _pooled(model: GPT, params: Any, tokens_BT: jax.Array, length: jax.Array, pooling: str) -> jax.Array:
    segments_BT = None
    is_text_T = jnp.arange(tokens_BT.shape[1]) < length
    if "prefix" in model.config.attention_pattern:
        segments_BT = jnp.where(is_text_T, -1, 0)[None]
    x_BTD, _ = decoding.forward(model, decoding.unstack(model.config, params), tokens_BT, segments_BT)
    x_TD = model.apply({"params": params}, x_BTD, method="normalise")[0].astype(jnp.float32)
    if pooling == "last":
        return x_TD[length - 1]
    return jnp.sum(jnp.where(is_text_T[:, None], x_TD, 0.0), axis=0) / length
