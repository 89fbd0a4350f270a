"""The gap between the log-probabilities of sampler and trainer, and its correction by truncated importance weights."""

import dataclasses
import math
from types import SimpleNamespace

import jax.numpy as jnp
import numpy as np
import pytest

from gptjax import config as c
from gptjax.config import UserError
from gptjax.inference.engine import Completion
from gptjax.losses import policy_gradient
from gptjax.stages import registry
from gptjax.stages.rl import grpo, ppo
from gptjax.stages.rl.completions import Completions, CompletionSampler
from tests.stages.rl.test_completions import PROMPT, sampled
from tests.tiny_chats import rl_config

# pi_old / pi_sampler is 2, 1/2, 1 and e^3.
OLD = np.log([0.5, 0.1, 0.3, 0.2])
SAMPLER = np.log([0.25, 0.2, 0.3, 0.2]) - [0, 0, 0, 3]


def test_truncated_weights_by_hand():
    found = policy_gradient.truncated_importance_weights(jnp.asarray(OLD), jnp.asarray(SAMPLER), 1.5)
    assert found.dtype == jnp.float32
    np.testing.assert_allclose(found, [1.5, 0.5, 1, 1.5], rtol=1e-6)
    loose = policy_gradient.truncated_importance_weights(jnp.asarray(OLD), jnp.asarray(SAMPLER), 100.0)
    np.testing.assert_allclose(loose, [2, 0.5, 1, math.exp(3)], rtol=1e-6)


def with_sampler(completions: Completions) -> Completions:
    """Adds the log-probabilities of a sampler, whose ratios to the trainer's are 1.25 and 2 by turns."""
    old_NT = completions.arrays["old_logprobs"]
    ratio_NT = np.resize([1.25, 2], old_NT.shape)
    sampler_NT = np.where(completions.mask_NT, old_NT - np.log(ratio_NT), 0).astype(np.float32)
    return dataclasses.replace(completions, arrays=completions.arrays | {"sampler_logprobs": sampler_NT})


@pytest.mark.parametrize("stage", [grpo, ppo])
def test_the_policy_loss_of_each_token_is_multiplied(stage):
    config = c.Config(rl=c.RLConfig(responses_per_prompt=2, response_tokens=4))
    completions = with_sampler(sampled([True] * 4))
    plain, _ = stage.loss_arrays(config, completions)
    corrected, _ = stage.loss_arrays(c.replace(config, {"rl": {"importance_sampling_cap": 1.5}}), completions)
    weights_NT = np.where(completions.mask_NT, np.resize([1.25, 1.5], completions.mask_NT.shape), 1)
    others = [name for name in plain if name != "advantages"]
    for name in others:
        np.testing.assert_array_equal(corrected[name], plain[name])
    # Whatever the advantage's sign, and whether the ratio is clipped or not.
    logprobs_NT = plain["old_logprobs"] + np.resize([0.5, -0.5, 0.1], plain["old_logprobs"].shape).astype(np.float32)
    losses = [
        policy_gradient.policy_loss(logprobs_NT, arrays["old_logprobs"], arrays["advantages"], 0.2)
        for arrays in (plain, corrected)
    ]
    np.testing.assert_allclose(losses[1][0], weights_NT * losses[0][0], rtol=1e-5)
    np.testing.assert_array_equal(losses[1][1], losses[0][1])
    assert np.any(losses[0][1] > 0)
    assert {1.25, 1.5} == set(weights_NT[completions.mask_NT & (plain["advantages"] != 0)])


def test_metrics_by_hand():
    completions = with_sampler(sampled([True] * 4))
    arrays = dict(completions.arrays)
    completions = dataclasses.replace(completions, arrays=arrays)
    gaps = np.resize([math.log(1.25), math.log(2)], completions.mask_NT.shape)[completions.mask_NT]
    summary = completions.summary()
    assert summary["sampling_logp_difference_mean"] == pytest.approx(gaps.mean(), rel=1e-5)
    assert summary["sampling_logp_difference_max"] == pytest.approx(math.log(2), rel=1e-5)
    assert summary["importance_sampling_ratio_mean"] == pytest.approx(np.exp(gaps).mean(), rel=1e-5)
    assert summary["importance_sampling_ratio_min"] == pytest.approx(1.25, rel=1e-5)
    assert summary["importance_sampling_ratio_max"] == pytest.approx(2, rel=1e-5)


def test_the_sampler_recorded_the_tokens_and_the_token_that_ended_them(monkeypatch):
    sampler = object.__new__(CompletionSampler)
    sampler.__dict__ |= {"_config": c.Config(), "row_length": 8, "_images": None}
    ended = Completion(np.array([1, 5], np.int32), np.array([-1.0, -2.0], np.float32), "a?", "end_of_turn", 9, -3.0)
    cut = Completion(np.array([1], np.int32), np.array([-4.0], np.float32), "a", "length")
    monkeypatch.setattr(sampler, "_generate", lambda *_: ([ended, cut], np.zeros(2)), raising=False)
    monkeypatch.setattr(sampler, "_measured", lambda *_: {}, raising=False)
    prompt = SimpleNamespace(prompt=PROMPT, tokens=np.array([3, 4], np.int32), images=())
    arrays = sampler.sample({}, [prompt], 2, [0, 1]).arrays
    # A position has the log-probability of the token after it.
    expected = [[0, -1, -2, -3, 0, 0, 0, 0], [0, -4, 0, 0, 0, 0, 0, 0]]
    assert arrays["sampler_logprobs"].tolist() == expected
    assert arrays["targets"].tolist() == [[4, 1, 5, 9, 0, 0, 0, 0], [4, 1, 0, 0, 0, 0, 0, 0]]


@pytest.mark.parametrize("stage", ["ppo", "grpo"])
def test_a_cap_that_has_no_effect_is_refused(stage, tmp_path):
    config = rl_config(stage, tmp_path, tmp_path)
    assert config.model.dtype == "float32"

    def check(cap: float, **model: object) -> None:
        changed = c.replace(config, {"rl": {"importance_sampling_cap": cap}, "model": model})
        registry.check(c.resolve(c.config_dict(changed)))

    with pytest.raises(UserError, match=r"rl.importance_sampling_cap=2.0 has no effect with model.dtype=float32"):
        check(2.0)
    with pytest.raises(UserError, match=r"rl.importance_sampling_cap=0.5 must be at least 1"):
        check(0.5, dtype="bfloat16")
    check(1.0, dtype="bfloat16")
    check(2.0, num_experts=4, experts_per_token=2, expert_capacity=1.0)
