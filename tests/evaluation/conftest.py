"""A tiny model with random weights, and a workdir of it."""

import dataclasses
import functools
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gptjax import config as c
from gptjax.checkpoint.manager import Checkpoints
from gptjax.data.tokenizers import BytesTokenizer
from gptjax.evaluation.scoring import ScoringRequest
from gptjax.models.gpt import GPT, abstract_params
from gptjax.parallel.mesh import make_mesh

# The weights are large, so that likelihoods differ much from token to token. The context is no power of two.
CONFIG = c.GPTConfig(
    vocab_size=257,
    context_length=24,
    num_layers=2,
    num_heads=2,
    embed_dim=16,
    attention_pattern=("dense", "banded"),
    band_width=8,
    token_init_std=0.5,
    position_init_std=0.5,
    kernel_init_std=0.5,
    dtype="float32",
)


class WithoutEndOfText(BytesTokenizer):
    end_of_text = None


@dataclasses.dataclass(frozen=True)
class Tiny:
    model: GPT
    params: dict
    tokenizer: BytesTokenizer

    @functools.cached_property
    def _logits(self):
        return jax.jit(lambda tokens_BT: self.model.apply({"params": self.params}, tokens_BT))

    def logits(self, inputs: np.ndarray) -> np.ndarray:
        """(N, V), of up to 24 tokens; padded behind, which a causal model does not see, to compile once."""
        padded = np.pad(inputs, (0, CONFIG.context_length - len(inputs)))
        return np.asarray(self._logits(padded[None].astype(np.int32))[0, : len(inputs)], np.float64)

    def by_hand(self, request: ScoringRequest) -> tuple[float, bool]:
        """Log-probability of the scored tokens and greediness, from the logits of the request alone."""
        inputs = request.tokens[:-1][-CONFIG.context_length :]
        logits, targets = self.logits(inputs)[-request.scored :], request.tokens[-request.scored :]
        logprobs = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
        return float(logprobs[np.arange(len(targets)), targets].sum()), bool((logits.argmax(-1) == targets).all())


@pytest.fixture(scope="session")
def tiny() -> Tiny:
    model = GPT(CONFIG)
    abstract = abstract_params(model, make_mesh(c.MeshConfig(), jax.devices()[:1]))
    rng = np.random.default_rng(0)
    params = jax.tree.map(lambda leaf: jnp.asarray(rng.normal(0, 0.3, leaf.shape), leaf.dtype), abstract)
    return Tiny(model, params, BytesTokenizer())


@pytest.fixture(scope="session")
def workdir(tiny: Tiny, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("workdir")
    batch = c.BatchConfig(total_tokens=24, tokens_per_batch=24)
    config = c.Config(model=CONFIG, data=c.DataConfig(tokenizer="bytes"), batch=batch)
    (path / "config.json").write_text(c.to_json(config))
    tiny.tokenizer.save(path / "tokenizer")
    with Checkpoints(path, config.checkpoint) as checkpoints:
        checkpoints.save_params(tiny.params)
    return path
