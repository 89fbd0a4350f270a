"""Tiny random models that are far from uniform, a slow reference, and a tokenizer of arbitrary pieces."""

import dataclasses
from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gptjax.config import GPTConfig
from gptjax.data.tokenizers import Tokenizer
from gptjax.inference.engine import Engine
from gptjax.models.gpt import GPT

END_OF_TEXT = 60
BANDED = GPTConfig(
    vocab_size=END_OF_TEXT + 1,
    context_length=32,
    num_layers=2,
    num_heads=2,
    embed_dim=16,
    attention_pattern=("dense", "banded"),
    band_width=5,
    dtype="float32",
)
CONFIGS = {
    "dense": dataclasses.replace(BANDED, attention_pattern=("dense",)),
    "banded": BANDED,
    "post": dataclasses.replace(BANDED, norm_position="post"),
    "gpt_neo": dataclasses.replace(BANDED, scale_attention=False, qkv_bias=False),
    "modern": dataclasses.replace(
        BANDED,
        positions="rotary",
        norm="rms",
        num_kv_heads=1,
        attention_sinks=True,
        qk_norm=True,
        value_embeddings="alternate",
        gated=True,
        residual_scalars=True,
    ),
    "experts": dataclasses.replace(BANDED, num_experts=4, expert_capacity=1.0),
    "prefix": dataclasses.replace(BANDED, attention_pattern=("prefix", "dense")),
    # So wide that XLA's CPU backend computes one row by another program than several, with other rounding.
    "wide": dataclasses.replace(BANDED, attention_pattern=("dense",), num_layers=1, embed_dim=128),
    "bfloat16": dataclasses.replace(BANDED, positions="rotary", dtype="bfloat16"),
    "smallest": dataclasses.replace(BANDED, attention_pattern=("dense",), num_layers=1, embed_dim=4),
}


@cache
def params_of(name: str):
    """Random parameters, all of them: so large that the likeliest tokens differ from position to position."""
    model = GPT(CONFIGS[name])
    shapes = nn.unbox(jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, 4), jnp.int32)))["params"]
    rng = np.random.default_rng(3)

    def draw(path: tuple, leaf: jax.ShapeDtypeStruct) -> jax.Array:
        table, name = path[0].key, path[-1].key
        std = {"kernel": 0.5, "embedding": 1.0 if table == "position_embedding" else 0.3, "scale": 0.1, "bias": 0.1}[
            name
        ]
        return jnp.asarray(rng.normal(name == "scale", std, leaf.shape), jnp.float32)

    return jax.tree_util.tree_map_with_path(draw, shapes)


@pytest.fixture(scope="session")
def model_of() -> Callable[[str], tuple[GPT, Any]]:
    """A new model of CONFIGS, equal to all others of its name, and its parameters."""
    return lambda name: (GPT(dataclasses.replace(CONFIGS[name])), params_of(name))


@pytest.fixture(scope="session")
def engine_of(tokenizer) -> Callable[..., Engine]:
    """The engine of a model of CONFIGS, and of some `weights`."""

    @cache
    def engine(name: str, weights: str = "as_given") -> Engine:
        return Engine(GPT(CONFIGS[name]), params_of(name), tokenizer, weights=weights)

    return engine


@cache
def forward(name: str):
    return jax.jit(lambda tokens_1T: GPT(CONFIGS[name]).apply({"params": params_of(name)}, tokens_1T)[0])


@pytest.fixture(scope="session")
def logits_of() -> Callable[[str, Sequence[int]], np.ndarray]:
    """The whole forward pass of a model of CONFIGS: logits (T, V) of what comes after each token of a text.

    What is behind the text cannot change it, so one compiled shape does for all lengths.
    """

    def logits(name: str, tokens: Sequence[int]) -> np.ndarray:
        tokens_1T = np.zeros((1, CONFIGS[name].context_length), np.int32)
        tokens_1T[0, : len(tokens)] = tokens
        return np.asarray(forward(name)(tokens_1T))[: len(tokens)]

    return logits


class Pieces(Tokenizer):
    """A token for each of some byte strings, whole characters or not; texts are encoded letter by letter."""

    def __init__(self, pieces: Sequence[bytes], end_of_text: int | None = None) -> None:
        self.pieces = list(pieces)
        self.vocab_size = len(self.pieces)
        self.end_of_text = end_of_text

    def encode(self, text: str) -> np.ndarray:
        return np.array([self.pieces.index(letter.encode()) for letter in text], np.int32)

    def _decode(self, ids: list[int]) -> str:
        return b"".join(self.pieces[i] for i in ids).decode(errors="replace")

    def _spec(self) -> dict[str, str]:
        return {"kind": "pieces"}


@pytest.fixture(scope="session")
def pieces() -> type[Pieces]:
    return Pieces


@pytest.fixture(scope="session")
def tokenizer() -> Pieces:
    """The tokenizer of the models: syllables, but for two tokens that are one character together, and end-of-text."""
    syllables = [(a + b).encode() for a in "bdfghklmnprs" for b in "aeiou"][2:]
    return Pieces([b"\xe4\xb8", b"\xad", *syllables, b"<|endoftext|>"], END_OF_TEXT)


@pytest.fixture(scope="session")
def prompts() -> list[np.ndarray]:
    """Shorter than the band, longer, in between."""
    rng = np.random.default_rng(0)
    return [rng.integers(0, END_OF_TEXT, length) for length in (1, 17, 4)]
