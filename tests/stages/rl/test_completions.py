"""Completions that were cut off: their rewards, the finish reason of a user's function, and their part in the loss."""

from types import SimpleNamespace

import numpy as np
import pytest

from gptjax import config as c
from gptjax.config import UserError
from gptjax.data.conversations import Message, Prompt
from gptjax.inference.engine import Completion
from gptjax.losses import policy_gradient
from gptjax.parallel.mesh import make_mesh
from gptjax.stages.rl import grpo, ppo
from gptjax.stages.rl.completions import Completions, CompletionSampler
from gptjax.stages.rl.reward_functions import open_reward

PROMPT = Prompt((Message("user", "q"),), None, "here")
HERE = "python:tests.stages.rl.test_completions"


def completion(reason: str) -> Completion:
    end = 9 if reason == "end_of_turn" else None
    return Completion(np.array([1], np.int32), np.zeros(1, np.float32), "a?", reason, end, None if end is None else 0.0)


def three_arguments(messages, answer, reference) -> float:
    return 1.0


def by_name(messages, answer, reference, finish_reason="none") -> float:
    return {"end_of_turn": 1.0, "length": -1.0}[finish_reason]


def any_keyword(messages, answer, reference, **known) -> float:
    return by_name(messages, answer, reference, known["finish_reason"])


def other_default(messages, answer, reference, scale=3.0) -> float:
    return scale


@pytest.mark.parametrize(
    ("name", "rewards"),
    [("three_arguments", [1, 1]), ("by_name", [1, -1]), ("any_keyword", [1, -1]), ("other_default", [3, 3])],
)
def test_a_function_gets_the_finish_reason_if_it_has_the_parameter(name, rewards):
    source = open_reward(f"{HERE}.{name}", make_mesh(c.MeshConfig()), [PROMPT])
    assert source.rewards([PROMPT] * 2, [completion("end_of_turn"), completion("length")]).tolist() == rewards


def test_the_example_of_a_reward_with_a_finish_reason():
    source = open_reward("python:examples.rewards.is_finished_question", make_mesh(c.MeshConfig()), [PROMPT])
    assert source.rewards([PROMPT] * 2, [completion("end_of_turn"), completion("length")]).tolist() == [1, 0]


def test_an_error_of_a_function_names_the_completion():
    source = open_reward(f"{HERE}.by_name", make_mesh(c.MeshConfig()), [PROMPT])
    with pytest.raises(UserError, match=r"by_name failed on the completion 'a\?': KeyError\('stop'\)"):
        source.rewards([PROMPT], [completion("stop")])


@pytest.mark.parametrize(("penalty", "rewards"), [(None, [2, 2]), (0.5, [2, 1.5])])
def test_the_penalty_of_a_missing_end(penalty, rewards, monkeypatch):
    config = c.Config(rl=c.RLConfig(missing_eos_penalty=penalty))
    sampler = object.__new__(CompletionSampler)
    sampler.__dict__ |= {"_config": config, "_end_of_turn": 9, "row_length": 8, "_images": None}
    sampler._tokenizer = SimpleNamespace(end_of_text=8)
    found = [completion("end_of_turn"), completion("length")]
    monkeypatch.setattr(sampler, "_generate", lambda *_: (found, np.array([2.0, 2.0])), raising=False)
    monkeypatch.setattr(sampler, "_measured", lambda *_: {}, raising=False)
    prompt = SimpleNamespace(prompt=PROMPT, tokens=np.array([3, 4], np.int32), images=())
    completions = sampler.sample({}, [prompt], 2, [0, 1])
    assert completions.rewards_N.tolist() == rewards
    assert completions.ended_N.tolist() == [True, False]
    assert completions.arrays["weights"].sum(axis=1).tolist() == [2, 1]  # the end is a token of its own
    assert completions.shown().count("cut off") == 1


def sampled(ended: list[bool]) -> Completions:
    """Two completions, of 2 and 3 tokens, of each of two prompts."""
    generator = np.random.default_rng(0)
    weights = np.array([[0, 1, 1, 0, 0], [0, 1, 1, 1, 0]] * 2, np.float32)
    names = ("old_logprobs", "reference_logprobs", "old_values", "entropy")
    arrays = {name: generator.normal(size=weights.shape).astype(np.float32) for name in names}
    rewards = np.array([1.0, 0, 3, 1])
    return Completions([PROMPT] * 2, ["a"] * 4, rewards, arrays | {"weights": weights}, np.array(ended))


@pytest.mark.parametrize("stage", [grpo, ppo])
def test_truncated_completions_are_excluded_from_the_loss_if_asked(stage):
    config = c.Config(rl=c.RLConfig(responses_per_prompt=2, response_tokens=4))
    masked = c.replace(config, {"rl": {"mask_truncated_completions": True}})
    completions = sampled([True, False, True, True])
    plain, _ = stage.loss_arrays(config, completions)
    arrays, metrics = stage.loss_arrays(masked, completions)
    assert (plain["weights"] > 0).sum() == 10
    assert (arrays["weights"] > 0).any(axis=1).tolist() == [True, False, True, True]
    assert not arrays["advantages"][1].any()
    if stage is grpo:  # the reward of the excluded one is still a part of its group's mean
        np.testing.assert_array_equal(arrays["advantages"][0], plain["advantages"][0])
    none, metrics = stage.loss_arrays(masked, sampled([False] * 4))
    assert not none["weights"].any()
    assert all(np.isfinite(array).all() for array in none.values())
    assert all(np.isfinite(value) for value in metrics.values())


def test_weights_of_the_losses():
    mask = np.array([[0, 1, 1, 0, 0], [0, 1, 1, 1, 1], [0, 0, 0, 0, 0]], bool)
    expected = {"grpo": [0.5, 0.25], "dr_grpo": [0.125, 0.125], "dapo": [1, 1]}
    for name, weights in expected.items():
        found = policy_gradient.token_weights(mask, name, 8)
        assert found.dtype == np.float32
        np.testing.assert_allclose(found, mask * np.array([*weights, 0])[:, None])
    with pytest.raises(ValueError, match="bnpo"):
        policy_gradient.token_weights(mask, "bnpo", 8)
