"""The losses of rankings: by hand, and independent of how the completions are laid out."""

import dataclasses
import itertools
import math

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gptjax import config as c
from gptjax.data.chat_batches import PackedRankings, RankedSequences
from gptjax.data.templates import EncodedConversation
from gptjax.losses.cross_entropy import cross_entropy, target_logprobs
from gptjax.models.gpt import GPT, head_embedding, hidden_states
from gptjax.stages.policy import REFERENCE
from gptjax.stages.preference.dpo import completion_logprobs, dpo_loss
from gptjax.stages.preference.reward_model import RewardModel
from tests.tiny_tasks import CONTEXT, MODEL

VOCAB = 40
CONFIG = c.Config(stage="reward", model=MODEL.with_vocabulary(VOCAB), dpo=c.DPOConfig(beta=0.5))
GENERATOR = np.random.default_rng(0)


def completions(*lengths: int) -> list[EncodedConversation]:
    """Completions of one prompt of three tokens."""
    prompt = GENERATOR.integers(0, VOCAB, 3)
    made = []
    for length in lengths:
        tokens = np.concatenate([prompt, GENERATOR.integers(0, VOCAB, length)]).astype(np.int32)
        made.append(EncodedConversation(tokens, np.arange(len(tokens)) >= 3))
    return made


# The completions of each prompt, and their ranks.
PROMPTS = [
    (completions(5, 2, 7), (1, 2, 3)),
    (completions(4, 9), (1, 2)),
    (completions(1, 3, 2), (1, 2, 2)),
    (completions(1, 1), (1, 2)),
]
# Fills an element; all the others fit into another.
LARGE = (completions(28, 29, 27), (1, 2, 3))


def batch(
    prompts: list[tuple[list[EncodedConversation], tuple[int, ...]]], *, pack: bool, full: int | None = None
) -> dict:
    """All prompts in one batch; `full` elements, the rest filled up with zeros."""
    elements = PackedRankings([RankedSequences(*prompt) for prompt in prompts], CONTEXT, pack=pack, seed=None)
    laid = [elements[i] for i in range(len(elements))]
    laid += [{name: np.zeros_like(a) for name, a in laid[0].items()}] * ((full or len(laid)) - len(laid))
    return {name: jnp.asarray(np.stack([arrays[name] for arrays in laid])) for name in laid[0]}


def right_pairs(ranks: tuple[int, ...]) -> list[tuple[int, int]]:
    return [(i, j) for i, j in itertools.combinations(range(len(ranks)), 2) if ranks[i] < ranks[j]]


@pytest.fixture(scope="module")
def params():
    shapes = nn.unbox(jax.eval_shape(RewardModel(CONFIG).init, jax.random.key(0)))
    sampled = jax.tree.map(lambda a: jnp.asarray(GENERATOR.normal(0, 0.3, a.shape), a.dtype), shapes)
    reference = {name: part for name, part in sampled.items() if name != "head"}
    moved = jax.tree.map(lambda a: a + jnp.asarray(GENERATOR.normal(0, 0.05, a.shape), a.dtype), reference)
    return {**moved, "head": sampled["head"], REFERENCE: reference}


def alone(params, sequence: EncodedConversation) -> tuple[float, float]:
    """The score of a sequence, and the log-probability of its completion, computed without any layout."""
    gpt, tokens_1T = GPT(CONFIG.model), jnp.asarray(sequence.tokens)[None]
    x_1TD = hidden_states(gpt, params, tokens_1T, deterministic=True)
    score = (
        x_1TD[0, -1] @ params["head"]["linear"]["kernel"] + params["head"]["linear"]["bias"] if "head" in params else 0
    )
    logprobs_TV = jax.nn.log_softmax(x_1TD[0] @ head_embedding(params).T, axis=-1)
    picked = logprobs_TV[np.arange(len(sequence) - 1), sequence.tokens[1:]]
    return float(np.ravel(score)[0]), float(jnp.sum(picked * sequence.loss_mask[1:]))


def test_target_logprobs_sum_up_to_the_cross_entropy():
    x_BTD, head_VD = (jnp.asarray(GENERATOR.normal(0, 1, shape), jnp.float32) for shape in ((2, 301, 16), (VOCAB, 16)))
    targets_BT = jnp.asarray(GENERATOR.integers(0, VOCAB, (2, 301)))
    weights_BT = jnp.asarray(GENERATOR.random((2, 301)), jnp.float32)

    def summed(x_BTD, head_VD):
        return -jnp.sum(weights_BT * target_logprobs(x_BTD, head_VD, targets_BT, "highest"))

    def reference(x_BTD, head_VD):
        return cross_entropy(x_BTD, head_VD, targets_BT, weights_BT, None, "highest")

    for ours, theirs in zip(
        jax.tree.leaves(jax.value_and_grad(summed, (0, 1))(x_BTD, head_VD)),
        jax.tree.leaves(jax.value_and_grad(reference, (0, 1))(x_BTD, head_VD)),
        strict=True,
    ):
        np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("pack", [True, False])
def test_scores_and_logprobs_are_those_of_each_sequence_alone(params, pack):
    prompts = [LARGE, *PROMPTS]
    whole = batch(prompts, pack=pack, full=6)
    assert whole["ends"].shape == ((6, 4, 3) if pack else (6, 1, 3))
    scores = jax.jit(RewardModel(CONFIG).scores)(params, whole)
    logprobs = jax.jit(lambda p, b: completion_logprobs(GPT(CONFIG.model), p, b, None))(params, whole)
    there = whole["ranks"] > 0
    found = [tuple(map(float, pair)) for pair in zip(scores[there], logprobs[there], strict=True)]
    for sequence, pair in zip((s for sequences, _ in prompts for s in sequences), found, strict=True):
        assert pair == pytest.approx(alone(params, sequence), rel=1e-4, abs=1e-4)


@pytest.mark.parametrize("stage", ["reward", "dpo"])
def test_packing_changes_neither_loss_nor_gradient(params, stage):
    loss = RewardModel(CONFIG).loss if stage == "reward" else dpo_loss(CONFIG)

    def total(params, whole):
        loss_sum, weight, measures = loss(params, whole, None)
        return loss_sum, (weight, measures)

    found = [
        jax.jit(jax.value_and_grad(total, has_aux=True))(params, batch([*PROMPTS, LARGE], pack=pack))
        for pack in (True, False)
    ]
    for packed, padded in zip(*map(jax.tree.leaves, found), strict=True):
        np.testing.assert_allclose(packed, padded, rtol=1e-4, atol=1e-5)
    assert sum(float(jnp.abs(leaf).sum()) for leaf in jax.tree.leaves(found[0][1])) > 0


def test_the_reward_loss_is_the_mean_over_a_prompts_pairs(params):
    whole = batch(PROMPTS, pack=True, full=5)
    loss, weight, measures = jax.jit(lambda p, b: RewardModel(CONFIG).loss(p, b, None))(params, whole)
    losses, accuracies = [], []
    for element, ranks in PROMPTS:
        scores = [alone(params, sequence)[0] for sequence in element]
        margins = [scores[better] - scores[worse] for better, worse in right_pairs(ranks)]
        losses.append(np.mean([math.log(1 + math.exp(-margin)) for margin in margins]))
        accuracies.append(np.mean([margin > 0 for margin in margins]))
    assert float(loss) == pytest.approx(sum(losses), rel=1e-4)
    assert float(measures["accuracy"]) == pytest.approx(sum(accuracies), abs=1e-6)
    assert float(weight) == 4.0


def test_the_dpo_loss_by_hand(params):
    config = dataclasses.replace(CONFIG, dpo=c.DPOConfig(beta=0.5, label_smoothing=0.1))
    whole = batch(PROMPTS, pack=True, full=4)
    loss, weight, measures = jax.jit(lambda p, b: dpo_loss(config)(p, b, None))(params, whole)
    losses, all_margins = [], []
    for element, ranks in PROMPTS:
        ratios = [alone(params, sequence)[1] - alone(params[REFERENCE], sequence)[1] for sequence in element]
        margins = [0.5 * (ratios[better] - ratios[worse]) for better, worse in right_pairs(ranks)]
        all_margins.append(np.mean(margins))
        losses.append(np.mean([0.9 * math.log(1 + math.exp(-m)) + 0.1 * math.log(1 + math.exp(m)) for m in margins]))
    assert float(loss) == pytest.approx(sum(losses), rel=1e-3)
    assert float(measures["margin"]) == pytest.approx(sum(all_margins), rel=1e-2, abs=1e-3)
    assert float(weight) == 4.0


def test_policy_and_reference_are_the_same_computation_in_training(params):
    """With equal weights the margin is 0 with a dropout key too; dropout itself is refused by the stage's check."""
    config = c.replace(CONFIG, {"model": {"residual_dropout": 0.2}})
    same = {**params[REFERENCE], REFERENCE: params[REFERENCE]}
    _, _, measures = dpo_loss(config)(same, batch(PROMPTS, pack=True), jax.random.key(0))
    assert float(measures["margin"]) == 0


def test_at_the_reference_dpo_is_log_2_and_the_reference_gets_no_gradient(params):
    same = {**params[REFERENCE], REFERENCE: params[REFERENCE]}
    whole = batch(PROMPTS, pack=True)
    gradients, (weight, measures) = jax.grad(
        lambda p: (lambda total, *rest: (total, rest))(*dpo_loss(CONFIG)(p, whole, None)), has_aux=True
    )(same)
    loss = dpo_loss(CONFIG)(same, whole, None)[0]
    assert float(loss / weight) == pytest.approx(math.log(2), rel=1e-6)
    assert float(measures["margin"]) == 0
    assert all(not jnp.any(leaf) for leaf in jax.tree.leaves(gradients[REFERENCE]))
    assert any(jnp.any(leaf) for leaf in jax.tree.leaves(gradients["layers"]))
