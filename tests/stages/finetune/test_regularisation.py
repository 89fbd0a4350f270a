"""Regularisers against the equations of their papers; all are inactive when off and in evaluation."""

import dataclasses
from functools import cache, partial

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gptjax.config import Config, RegularisationConfig, replace
from gptjax.stages.finetune.regularisation import (
    adversarial_perturbation,
    mixed,
    regularised,
    sample_mixup,
    smoothed,
    token_replacement,
    word_dropout,
)
from gptjax.stages.finetune.task_model import TaskModel, completed
from tests.tiny_tasks import LABELS, MODEL

START, DELIMITER, EXTRACT, BLANK = 257, 258, 259, 260
RNG = jax.random.key(0)


def config_of(lm_weight: float = 0.0, **regularisation: float | None) -> Config:
    task = {"labels": LABELS, "label_weights": (0.5, 2.0, 1.0), "head_dropout": 0.0, "lm_weight": lm_weight}
    base = Config(stage="finetune", model=MODEL)
    return completed(replace(base, {"task": task, "regularisation": regularisation}), 257, {})


ALL = RegularisationConfig(
    label_smoothing=0.1, word_dropout=0.2, token_replacement=0.1, mixup_alpha=0.4, adversarial_epsilon=0.5
)


@cache
def params():
    shapes = nn.unbox(jax.eval_shape(TaskModel(config_of()).init, RNG))
    rng = np.random.default_rng(1)
    return jax.tree.map(lambda leaf: jnp.asarray(rng.normal(0, 0.4, leaf.shape), leaf.dtype), shapes)


def make_batch() -> dict[str, np.ndarray]:
    """5 texts and a row of batch padding."""
    rng = np.random.default_rng(2)
    tokens, ends = np.zeros((6, 32), np.int32), np.array([9, 30, 20, 11, 15, 0], np.int32)
    for row, end in enumerate(ends[:5]):
        tokens[row, : end + 1] = [START, *rng.integers(0, 256, end - 1), EXTRACT]
    weights = np.array([1, 1, 1, 1, 1, 0], np.float32)
    return {"tokens": tokens, "ends": ends, "weights": weights, "labels": np.array([0, 2, 1, 0, 1, 0], np.int32)}


BATCH = make_batch()


@partial(jax.jit, static_argnums=0)
def loss_of(config: Config, params, batch, rng):
    return regularised(config, TaskModel(config).loss)(params, batch, rng)


def texts(length: int = 4000) -> np.ndarray:
    """A sequence of two texts, with padding."""
    text = np.random.default_rng(0).integers(0, 257, length)
    return np.array([[START, *text, DELIMITER, *text, EXTRACT, 0, 0]], np.int32)


# --- tokens -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(1, -1), (1, 2, -1)])
def test_word_dropout_blanks_a_share_of_the_text(shape):
    tokens = np.stack([texts()] * 2)[:, 0].reshape(shape) if len(shape) == 3 else texts()
    dropped = np.asarray(word_dropout(RNG, jnp.asarray(tokens), 0.3))
    changed = dropped != tokens
    assert np.all(dropped[changed] == BLANK)
    assert np.all(tokens[changed] < START)
    assert changed[tokens < START].mean() == pytest.approx(0.3, abs=0.03)
    np.testing.assert_array_equal(word_dropout(RNG, jnp.asarray(tokens), 0.0), tokens)
    everything = np.asarray(word_dropout(RNG, jnp.asarray(tokens), 1.0))
    np.testing.assert_array_equal(everything, np.where(tokens < START, BLANK, tokens))


def test_token_replacement_puts_any_token_in_the_place_of_a_share():
    tokens = texts()
    replaced = np.asarray(token_replacement(RNG, jnp.asarray(tokens), 0.3))
    changed = replaced != tokens
    assert np.all(tokens[changed] < START)
    assert changed[tokens < START].mean() == pytest.approx(0.3, abs=0.03)
    others = np.asarray(token_replacement(RNG, jnp.asarray(tokens), 1.0))[tokens < START]
    counts = np.bincount(others, minlength=257)
    assert len(counts) == 257  # text, and no special token
    assert counts.min() > 5
    assert counts.max() < 80  # 31 are expected of each
    np.testing.assert_array_equal(token_replacement(RNG, jnp.asarray(tokens), 0.0), tokens)


def test_inputs_are_corrupted_and_targets_are_not():
    seen = []

    def loss(params, batch, rng):
        seen.append((batch, rng))
        return jnp.zeros(()), jnp.ones(()), {}

    for settings in ({"word_dropout": 1.0}, {"token_replacement": 0.5}):
        regularised(config_of(**settings), loss)(None, BATCH, RNG)
        batch, rng = seen.pop()
        np.testing.assert_array_equal(batch["written_tokens"], BATCH["tokens"])
        assert np.any(batch["tokens"] != BATCH["tokens"])
        assert all(batch[name] is array for name, array in BATCH.items() if name != "tokens")
        assert np.any(jax.random.key_data(rng) != jax.random.key_data(RNG))  # dropout has a key of its own


def test_language_model_targets_are_the_original_text():
    """With all tokens blanked, the original tokens are still the targets."""
    blanked = BATCH | {"tokens": np.where(BATCH["tokens"] < START, BLANK, BATCH["tokens"])}
    found = loss_of(config_of(lm_weight=0.5, word_dropout=1.0), params(), BATCH, RNG)[0]
    plain = jax.jit(TaskModel(config_of(lm_weight=0.5)).loss)
    assert float(found) == pytest.approx(
        float(plain(params(), blanked | {"written_tokens": BATCH["tokens"]}, RNG)[0]), rel=1e-5
    )
    of_blanks = plain(params(), blanked | {"written_tokens": blanked["tokens"]}, RNG)[0]
    assert float(found) != pytest.approx(float(of_blanks), rel=1e-3)


# --- labels and pooled texts ------------------------------------------------------------------------------------------


def test_label_smoothing_is_the_cross_entropy_with_smooth_labels():
    """Szegedy et al. 2016, section 7: (1 - e) of the right label, and e / K of each."""
    logits = np.random.default_rng(0).normal(size=(4, 3))
    labels, share = np.array([0, 2, 1, 1]), 0.3
    log_probs = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    smooth = (1 - share) * np.eye(3)[labels] + share / 3
    found = smoothed(jnp.asarray(-log_probs), jnp.asarray(-log_probs[np.arange(4), labels]), share)
    np.testing.assert_allclose(found, -(smooth * log_probs).sum(-1), rtol=1e-5)


def test_mixup_samples_partners_and_coefficients():
    weights = jnp.array([1.0] * 900 + [0.0] * 100)
    share_B, partner_B = sample_mixup(RNG, 0.4, weights)
    assert sorted(partner_B.tolist()) == list(range(1000))
    fills_up = np.asarray(partner_B) >= 900
    assert np.all(np.asarray(share_B)[fills_up] == 1)
    drawn = np.asarray(share_B)[~fills_up]
    assert drawn.mean() == pytest.approx(0.5, abs=0.04)
    assert drawn.var() == pytest.approx(1 / (4 * (2 * 0.4 + 1)), abs=0.015)  # of Beta(a, a)


def test_mixed_is_a_share_of_each():
    own, other = jnp.ones((2, 3)), jnp.full((2, 3), 5.0)
    np.testing.assert_allclose(mixed(own, other, jnp.array([0.25, 1.0])), [[4.0] * 3, [1.0] * 3])


def test_mixup_and_smoothing_of_a_batch_by_hand(monkeypatch):
    """Guo et al. 2019, senMixup: the pooled texts and their labels are mixed alike."""
    config = config_of(mixup_alpha=0.4, label_smoothing=0.2)
    share_B = np.array([0.3, 0.9, 0.5, 0.75, 1.0, 0.6], np.float32)
    partner_B = np.array([1, 2, 3, 4, 5, 0], np.int32)

    def draw(rng, alpha, weights_B):
        assert alpha == 0.4
        np.testing.assert_array_equal(weights_B.shape, (6,))
        return jnp.asarray(share_B), jnp.asarray(partner_B)

    monkeypatch.setattr("gptjax.stages.finetune.task_model.sample_mixup", draw)
    loss, weight, _ = loss_of(config, params(), BATCH, RNG)
    predicted = jax.jit(TaskModel(config).predict)(params(), BATCH | {"examples": np.arange(6)})
    # A head is linear: its output for mixed texts is the mixture of its outputs for each. Logarithms of probabilities
    # are its logits but for a constant, which the softmax forgets.
    logits_BX = np.log(np.asarray(predicted["probabilities"], np.float64))
    x_BX = share_B[:, None] * logits_BX + (1 - share_B)[:, None] * logits_BX[partner_B]
    nats_BX = -(x_BX - np.log(np.exp(x_BX).sum(-1, keepdims=True)))
    of_label = np.array([0.5, 2.0, 1.0])
    labels = BATCH["labels"]

    def part(labels: np.ndarray) -> np.ndarray:
        return of_label[labels] * (0.8 * nats_BX[np.arange(6), labels] + 0.2 * nats_BX.mean(-1))

    expected_B = share_B * part(labels) + (1 - share_B) * part(labels[partner_B])
    weights_B = share_B * of_label[labels] + (1 - share_B) * of_label[labels[partner_B]]
    assert float(loss) == pytest.approx(float((BATCH["weights"] * expected_B).sum()), rel=1e-4)
    assert float(weight) == pytest.approx(float((BATCH["weights"] * weights_B).sum()), rel=1e-5)


# --- adversarial training ---------------------------------------------------------------------------------------------


def test_the_adversarial_perturbation_by_hand():
    """Miyato et al. 2017, equations 1 and 5: normalised embeddings move by epsilon along each example's gradient."""
    rng, epsilon = np.random.default_rng(0), 0.25
    table, slope = rng.normal(size=(7, 3)) * [0.1, 1.0, 10.0], rng.normal(size=(6, 4, 3))
    slope[2:4] *= 1e-25  # a confident example: the square of its gradient underflows
    slope[4:] = 0
    shape, std = slope.shape, table.std(axis=0)

    def perturbation(table):
        slope_NTD = jnp.asarray(slope, jnp.float32)
        return adversarial_perturbation(lambda r_NTD: jnp.sum(slope_NTD * r_NTD), shape, 3, table, epsilon)

    found = np.asarray(perturbation(jnp.asarray(table)))
    for example in (slice(0, 2), slice(2, 4)):
        direction = slope[example] * std / np.linalg.norm(slope[example] * std)
        np.testing.assert_allclose(found[example], epsilon * direction * std, rtol=1e-5)
        assert np.linalg.norm(found[example] / std) == pytest.approx(epsilon, rel=1e-5)
    assert np.all(found[4:] == 0)
    gradient = jax.grad(lambda table: jnp.sum(perturbation(table)))(jnp.asarray(table, jnp.float32))
    assert np.all(np.asarray(gradient) == 0)  # a constant


def test_the_adversarial_loss_does_not_depend_on_the_cut_into_microbatches():
    config, lengths = config_of(lm_weight=0.5, adversarial_epsilon=2.0), (1, 3)
    whole, weight, _ = loss_of(config, params(), BATCH, RNG)
    assert float(whole) > float(loss_of(config_of(lm_weight=0.5), params(), BATCH, RNG)[0]) * 1.01
    for length in lengths:
        parts = [
            loss_of(config, params(), {name: array[i : i + length] for name, array in BATCH.items()}, RNG)
            for i in range(0, 6, length)
        ]
        assert float(sum(loss for loss, *_ in parts)) == pytest.approx(float(whole), rel=1e-5)
        assert float(sum(weight for _, weight, _ in parts)) == pytest.approx(float(weight), rel=1e-6)


def test_the_adversarial_loss_to_first_order():
    """The mean of the clean and the perturbed loss, which is larger by epsilon times the norm of the gradient."""
    epsilon, config = 1e-2, config_of()
    plain = float(loss_of(config, params(), BATCH, RNG)[0])
    harder = float(loss_of(config_of(adversarial_epsilon=epsilon), params(), BATCH, RNG)[0])
    model, std_D = TaskModel(config), jnp.std(params()["token_embedding"]["embedding"], axis=0)
    of_moves = jax.jit(jax.grad(lambda r: model._task_loss(params(), BATCH, None, None, r)[0]))
    gradient = of_moves(jnp.zeros((6, 32, 16)))
    norms = np.linalg.norm((np.asarray(gradient) * np.asarray(std_D)).reshape(6, -1), axis=1)
    assert np.all(norms[:5] > 0)
    assert norms[5] == 0  # batch padding
    assert harder - plain == pytest.approx(epsilon * norms.sum() / 2, rel=0.05)


def test_the_scale_of_perturbations_is_that_of_the_token_embeddings_not_of_an_untied_head():
    config = replace(config_of(adversarial_epsilon=2.0), {"model": {"tied_head": False}})
    init = TaskModel(config).init
    untied = {**nn.unbox(jax.jit(init)(RNG)), **params()}
    losses = []
    for factor in (1.0, 100.0):
        untied["head_embedding"] = jax.tree.map(lambda leaf: leaf * factor, untied["head_embedding"])  # noqa: B023
        losses.append(float(loss_of(config, untied, BATCH, RNG)[0]))
    assert losses[0] == losses[1]


def test_the_language_model_loss_is_not_attacked():
    of_language = [
        float(loss_of(config_of(0.5, **settings), params(), BATCH, RNG)[0])
        - float(loss_of(config_of(0.0, **settings), params(), BATCH, RNG)[0])
        for settings in ({}, {"adversarial_epsilon": 2.0})
    ]
    assert of_language[1] == pytest.approx(of_language[0], rel=1e-5)


# --- off, or evaluating -----------------------------------------------------------------------------------------------


def lowered(config: Config, training: bool) -> str:
    """The lowered program of the loss."""
    rng = (lambda seed: jax.random.key(seed)) if training else (lambda seed: None)
    loss = regularised(config, TaskModel(config).loss)
    program = jax.jit(lambda params, batch, seed: loss(params, batch, rng(seed)))
    return program.lower(params(), BATCH, 0).as_text()


def test_nothing_is_active_in_evaluation():
    everything = replace(config_of(lm_weight=0.5), {"regularisation": dataclasses.asdict(ALL)})
    everything = replace(everything, {"task": {"head_dropout": 0.1}, "model": {"residual_dropout": 0.1}})
    assert lowered(everything, training=False) == lowered(config_of(lm_weight=0.5), training=False)


@pytest.mark.parametrize("name", [field.name for field in dataclasses.fields(ALL) if getattr(ALL, field.name)])
def test_each_one_is_active_in_training(name):
    assert lowered(config_of(**{name: getattr(ALL, name)}), training=True) != lowered(config_of(), training=True)


def test_all_off_is_the_plain_loss():
    config = config_of()
    loss = TaskModel(config).loss
    assert regularised(config, loss) == loss
