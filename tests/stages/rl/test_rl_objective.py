"""The losses of PPO and GRPO: their terms, and their independence of how the completions are laid out."""

import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gptjax import config as c
from gptjax.data.chat_batches import lay_out, rows_needed
from gptjax.data.templates import EncodedConversation
from gptjax.losses import policy_gradient
from gptjax.models.gpt import GPT, head_embedding, hidden_states
from gptjax.models.heads import VALUE
from gptjax.stages.policy import REFERENCE
from gptjax.stages.preference.reward_model import RewardModel
from gptjax.stages.rl.rl_objective import completion_measurer, grpo_loss, ppo_loss
from tests.tiny_tasks import MODEL

VOCAB, LENGTH = 40, 32
CONFIG = c.Config(stage="ppo", model=MODEL.with_vocabulary(VOCAB), rl=c.RLConfig(clip=0.2, kl_weight=0.3))
LOSSES = {"ppo": ppo_loss, "grpo": grpo_loss}
GENERATOR = np.random.default_rng(0)
# Arrays of the tokens of completions, in addition to the weights.
PER_TOKEN = ("advantages", "returns", "old_logprobs", "reference_logprobs", "old_values")


def completion(length: int) -> tuple[EncodedConversation, dict[str, np.ndarray]]:
    """A prompt of three tokens with a completion, and random arrays of its tokens."""
    tokens = GENERATOR.integers(0, VOCAB, 3 + length).astype(np.int32)
    known = {name: GENERATOR.normal(0, 0.2, length).astype(np.float32) for name in PER_TOKEN}
    known["old_logprobs"] -= 3.5
    known["reference_logprobs"] -= 3.5
    known["weights"] = GENERATOR.random(length).astype(np.float32)
    return EncodedConversation(tokens, np.arange(len(tokens)) >= 3), known


ELEMENTS = [[completion(5), completion(2), completion(7)], [completion(4), completion(9), completion(1)]]


def batch(*, pack: bool, **changes: float) -> dict[str, jax.Array]:
    """The elements as one batch; `changes` are constants that replace the arrays of the same names."""
    rows = max(rows_needed([encoded for encoded, _ in element], LENGTH, pack=pack) for element in ELEMENTS)
    laid = []
    for element in ELEMENTS:
        arrays = lay_out([encoded for encoded, _ in element], rows, LENGTH, pack=pack)
        arrays.pop("ends")
        mask = arrays["weights"] > 0
        for name in (*PER_TOKEN, "weights"):
            arrays[name] = np.zeros(mask.shape, np.float32)
            for number, (_, known) in enumerate(element):
                values = np.full_like(known[name], changes[name]) if name in changes else known[name]
                arrays[name][mask & (arrays["segments"] == number + 1)] = values
        laid.append(arrays)
    return {name: jnp.asarray(np.stack([arrays[name] for arrays in laid])) for name in laid[0]}


@pytest.fixture(scope="module")
def params():
    shapes = nn.unbox(jax.eval_shape(RewardModel(CONFIG).init, jax.random.key(0)))
    value, policy = (
        jax.tree.map(lambda a: jnp.asarray(GENERATOR.normal(0, 0.3, a.shape), a.dtype), shapes) for _ in range(2)
    )
    del policy["head"]
    reference = jax.tree.map(lambda a: a + jnp.asarray(GENERATOR.normal(0, 0.05, a.shape), a.dtype), policy)
    return {**policy, VALUE: value, REFERENCE: reference}


def config_of(stage: str, **changes: dict) -> c.Config:
    return c.replace(dataclasses.replace(CONFIG, stage=stage), changes)


def evaluated(config: c.Config, params, arrays):
    """((loss, measures), gradient): of the mean over the weights."""
    loss = LOSSES[config.stage](config)

    def mean(params):
        total, weight, measures = loss(params, arrays, None)
        return total / weight, {name: value / weight for name, value in measures.items()}

    return jax.jit(jax.value_and_grad(mean, has_aux=True))(params)


@pytest.mark.parametrize("stage", LOSSES)
def test_packing_changes_neither_loss_nor_gradient(params, stage):
    found = [evaluated(config_of(stage), params, batch(pack=pack)) for pack in (True, False)]
    for packed, padded in zip(*map(jax.tree.leaves, found), strict=True):
        np.testing.assert_allclose(packed, padded, rtol=1e-4, atol=1e-5)
    assert float(found[0][0][1]["policy_kl"]) > 0


@pytest.mark.parametrize("stage", LOSSES)
def test_zero_advantages_move_no_policy(params, stage):
    config = config_of(stage, rl={"kl_weight": 0.0})
    _, gradient = evaluated(config, params, batch(pack=True, advantages=0.0))
    value = gradient.pop(VALUE)
    assert all(not np.any(leaf) for leaf in jax.tree.leaves(gradient))
    assert any(np.any(leaf) for leaf in jax.tree.leaves(value)) == (stage == "ppo")


@pytest.mark.parametrize("stage", LOSSES)
def test_at_the_old_policy_the_gradient_is_the_policy_gradient(params, stage):
    """It is -A grad log pi where the policy is that which sampled the completions, with a value function or without."""
    arrays = batch(pack=True)
    measured = jax.jit(completion_measurer(config_of("ppo")))(params, arrays)
    arrays["old_logprobs"] = measured["old_logprobs"]
    (_, measures), gradient = evaluated(config_of(stage, rl={"kl_weight": 0.0}), params, arrays)

    def reinforce(params):
        logprobs = jax.jit(completion_measurer(config_of("grpo")))(params, arrays)["old_logprobs"]
        weights = arrays["weights"]
        return -jnp.sum(weights * arrays["advantages"] * logprobs) / jnp.sum(weights)

    expected = jax.jit(jax.grad(reinforce))(params)
    for name in set(gradient) - {VALUE, REFERENCE}:
        for ours, theirs in zip(*map(jax.tree.leaves, (gradient[name], expected[name])), strict=True):
            np.testing.assert_allclose(ours, theirs, rtol=1e-3, atol=1e-5)
    assert float(measures["clip_fraction"]) == 0
    assert float(measures["policy_kl"]) == pytest.approx(0, abs=1e-6)


def test_the_kl_term_of_grpo(params):
    """Without advantages the loss is the k3 estimate of the KL divergence, 0 for equal policy and reference."""
    arrays = batch(pack=True, advantages=0.0)
    (loss, measures), _ = evaluated(config_of("grpo"), params, arrays)
    logprobs = jax.jit(completion_measurer(config_of("grpo")))(params, arrays)["old_logprobs"]
    k3 = policy_gradient.kl_k3(logprobs, arrays["reference_logprobs"])
    wanted = jnp.sum(arrays["weights"] * k3) / jnp.sum(arrays["weights"])
    assert float(measures["reference_kl"]) == pytest.approx(float(wanted), rel=1e-4)
    assert float(loss) == pytest.approx(0.3 * float(wanted), rel=1e-4)
    _, gradient = evaluated(config_of("grpo"), params, arrays | {"reference_logprobs": logprobs})
    assert max(float(jnp.abs(leaf).max()) for leaf in jax.tree.leaves(gradient)) < 1e-5


@pytest.mark.parametrize("pack", [True, False])
def test_dr_grpo_divides_by_the_number_of_completions(params, pack):
    """Six completions, however long they are; the metrics stay means over tokens."""
    arrays = batch(pack=pack)
    (grpo, metrics), gradient = evaluated(config_of("grpo"), params, arrays)
    (dr_grpo, same), scaled = evaluated(config_of("grpo", grpo={"loss_type": "dr_grpo"}), params, arrays)
    factor = float(jnp.sum(arrays["weights"])) / 6
    assert float(dr_grpo) == pytest.approx(factor * float(grpo), rel=1e-5)
    for name in ("clip_fraction", "policy_kl", "reference_kl"):
        assert float(same[name]) == pytest.approx(float(metrics[name]), rel=1e-5)
    for ours, theirs in zip(*map(jax.tree.leaves, (scaled, gradient)), strict=True):
        np.testing.assert_allclose(ours, factor * theirs, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("stage", LOSSES)
def test_a_batch_without_tokens_has_no_gradient(params, stage):
    """All completions may be excluded."""
    (loss, metrics), gradient = evaluated(config_of(stage), params, batch(pack=False, weights=0.0))
    assert loss == 0
    assert not any(np.any(leaf) for leaf in jax.tree.leaves(gradient))
    assert all(np.isfinite(value) for value in metrics.values())


def with_text(arrays: dict[str, jax.Array], weight: float) -> dict[str, jax.Array]:
    """Adds two rows of text to each element; their weights sum to those of the completions."""
    shape = (len(ELEMENTS), 2, 12)
    tokens, targets = (jnp.asarray(GENERATOR.integers(0, VOCAB, shape), jnp.int32) for _ in range(2))
    weights = jnp.full(shape, weight * jnp.sum(arrays["weights"]) / np.prod(shape), jnp.float32)
    return arrays | {"text_tokens": tokens, "text_targets": targets, "text_weights": weights}


def test_ptx_adds_the_mean_loss_of_the_text(params):
    plain = batch(pack=True)
    arrays = with_text(plain, 1.0)
    (ppo, _), gradient = evaluated(config_of("ppo"), params, plain)
    (ptx, measures), _ = evaluated(config_of("ppo", ppo={"pretraining_weight": 27.8}), params, arrays)
    gpt, tokens = GPT(CONFIG.model), arrays["text_tokens"].reshape(-1, 12)
    logits = hidden_states(gpt, params, tokens, deterministic=True) @ head_embedding(params).T
    logprobs = jax.nn.log_softmax(logits)
    nats = -jnp.mean(jnp.take_along_axis(logprobs, arrays["text_targets"].reshape(-1, 12)[..., None], axis=-1))
    assert float(measures["text_loss"]) == pytest.approx(float(nats), rel=1e-4)
    assert float(ptx) == pytest.approx(float(ppo) + 27.8 * float(nats), rel=1e-4)
    # Weight 0 is PPO, to the last bit, text or not.
    (none, _), gradient_of_none = evaluated(config_of("ppo", ppo={"pretraining_weight": 0.0}), params, arrays)
    assert float(none) == float(ppo)
    for ours, theirs in zip(*map(jax.tree.leaves, (gradient_of_none, gradient)), strict=True):
        np.testing.assert_array_equal(ours, theirs)


def test_the_measures_of_completions(params):
    """The log-probabilities of policy and reference, the entropy and the value of each token."""
    arrays = batch(pack=False)
    measured = jax.jit(completion_measurer(config_of("ppo")))(params, arrays)
    assert set(measured) == {"old_logprobs", "reference_logprobs", "entropy", "old_values"}
    assert "old_values" not in jax.eval_shape(
        completion_measurer(config_of("grpo")), {k: v for k, v in params.items() if k != VALUE}, arrays
    )
    gpt, place = GPT(CONFIG.model), (1, 1)  # an element, a row
    length = int((arrays["segments"][place] > 0).sum())
    tokens, targets = (arrays[name][place][:length] for name in ("tokens", "targets"))
    for name, of_whom in (("old_logprobs", params), ("reference_logprobs", params[REFERENCE])):
        x_1TD = hidden_states(gpt, of_whom, tokens[None], deterministic=True)
        logprobs = jax.nn.log_softmax(x_1TD[0] @ head_embedding(of_whom).T)
        picked = logprobs[jnp.arange(length), targets]
        np.testing.assert_allclose(measured[name][place][:length], picked, rtol=1e-4, atol=1e-4)
        if name == "old_logprobs":
            entropy = -(jnp.exp(logprobs) * logprobs).sum(axis=-1)
            np.testing.assert_allclose(measured["entropy"][place][:length], entropy, rtol=1e-4, atol=1e-4)
    head = params[VALUE]["head"]["linear"]
    states = hidden_states(gpt, params[VALUE], tokens[None], deterministic=True)[0]
    values = (states @ head["kernel"])[:, 0] + head["bias"][0]
    np.testing.assert_allclose(measured["old_values"][place][:length], values, rtol=1e-4, atol=1e-4)
