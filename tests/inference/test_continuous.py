"""Continuous batching of many prompts gives the completions of the engine of whole batches, in their order."""

import numpy as np
import pytest

from gptjax.config import UserError
from gptjax.inference.batching import BatchedEngine
from gptjax.inference.continuous import complete_prompts
from gptjax.inference.sampling import Sampling

NEW = 12


@pytest.fixture(scope="module")
def batched(engine_of) -> BatchedEngine:
    engine = engine_of("dense")
    return BatchedEngine(
        engine.model, engine.params, engine.tokenizer, weights="stacked", rows=2, chunk=8, deterministic=True
    )


def test_completions_are_those_of_whole_batches(engine_of, batched, prompts):
    """With stop strings and end-of-text, which end some completions early."""
    engine, sampling = engine_of("dense"), Sampling(1.5)
    repeated = [prompt for prompt in prompts for _ in range(3)]
    plain = engine.generate(repeated, NEW, sampling, seeds=3)
    stop = [plain[4].text[4:7], "zz"]
    expected = engine.generate(repeated, NEW, sampling, seeds=3, stop=stop)
    assert {completion.finish_reason for completion in expected} >= {"stop", "length"}
    found = list(complete_prompts(batched, repeated, NEW, sampling, seeds=3, stop=stop))
    for one, other in zip(found, expected, strict=True):
        assert (one.text, one.finish_reason, one.end) == (other.text, other.finish_reason, other.end)
        assert one.tokens.tolist() == other.tokens.tolist()
        np.testing.assert_allclose(one.logprobs, other.logprobs, atol=1e-5)
    assert batched.is_idle
    assert batched.free_rows == 2


def test_a_prompt_that_is_too_long_is_an_error_before_anything_runs(batched, prompts):
    with pytest.raises(UserError, match="a prompt of 17 tokens and max_new_tokens=20 exceed"):
        next(complete_prompts(batched, prompts, 20, Sampling()))
    assert batched.is_idle


def test_the_log_probability_of_an_end_token(engine_of, batched, prompts):
    """It is that of the token where it ends nothing."""
    engine, sampling = engine_of("dense"), Sampling(1.0)
    plain = engine.generate(prompts, NEW, sampling, seeds=3)
    end = int(plain[0].tokens[4])
    place = plain[0].tokens.tolist().index(end)
    both = (
        engine.generate(prompts, NEW, sampling, seeds=3, end_tokens=[end]),
        list(complete_prompts(batched, prompts, NEW, sampling, seeds=3, end_tokens=[end])),
    )
    for found in both:
        assert (found[0].end, len(found[0].logprobs)) == (end, place)
        assert found[0].end_logprob == pytest.approx(float(plain[0].logprobs[place]), abs=1e-5)
        assert [one.end_logprob is None for one in found] == [one.end is None for one in found]
        assert any(one.end is None for one in found)
