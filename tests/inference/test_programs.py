"""Decoding many tokens in one call equals one call per token, and samples no more tokens than requested."""

import jax
import numpy as np
import pytest

from gptjax.inference import programs
from gptjax.inference.engine import Engine
from gptjax.inference.programs import MOST_TOKENS
from gptjax.inference.sampling import Sampling

GREEDY = Sampling(temperature=0)
NEW = 12


def drawn(engine: Engine, prompts, number: int, sampling: Sampling, **kwargs) -> tuple[np.ndarray, np.ndarray]:
    """(N, B) both: tokens and log-probabilities."""
    seeds = range(7, 7 + len(prompts))
    pairs = list(engine.stream(prompts, number, sampling, seeds=seeds, **kwargs))
    return np.array([tokens for tokens, _ in pairs]), np.array([logprobs for _, logprobs in pairs])


@pytest.mark.slow
@pytest.mark.parametrize("name", ["dense", "banded"])
@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize(
    "sampling",
    [GREEDY, Sampling(1.3, top_p=0.9, repetition_penalty=1.4)],
    ids=["greedy", "sampled"],
)
def test_many_tokens_in_a_call_are_one_at_a_time(engine_of, prompts, name, rows, sampling):
    """Bit for bit, through a context that slides: its windows end within a call."""
    number = 40
    one_NB, one_logprobs_NB = drawn(engine_of(name), prompts[:rows], number, sampling, overflow="slide", at_once=1)
    assert one_NB.shape == (number, rows)
    for at_once in (5, MOST_TOKENS):
        many_NB, logprobs_NB = drawn(
            engine_of(name), prompts[:rows], number, sampling, overflow="slide", at_once=at_once
        )
        np.testing.assert_array_equal(many_NB, one_NB)
        np.testing.assert_array_equal(logprobs_NB, one_logprobs_NB)


def test_rows_that_have_all_ended_stop_the_loop(engine_of, prompts):
    """What comes after the last end was never drawn: it is zeros."""
    engine = engine_of("banded")
    whole_NB, _ = drawn(engine, prompts[1:], NEW, GREEDY)
    ends = [int(whole_NB[4, 0]), int(whole_NB[6, 1])]
    first_B = [next(i for i, token in enumerate(row) if token in ends) for row in whole_NB.T]
    last = max(first_B)
    assert 0 < last < NEW - 3, "nothing is left to be saved"
    assert np.all(whole_NB[last + 1 :] != 0, axis=1).any(), "zeros would show nothing"
    tokens_NB, logprobs_NB = drawn(engine, prompts[1:], NEW, GREEDY, ends=ends)
    np.testing.assert_array_equal(tokens_NB[: last + 1], whole_NB[: last + 1])
    assert not tokens_NB[last + 1 :].any()
    assert not logprobs_NB[last + 1 :].any()
    # One row's end alone stops nothing.
    tokens_NB, _ = drawn(engine, prompts[1:], NEW, GREEDY, ends=ends[:1])
    if ends[0] not in whole_NB[:, 1]:
        np.testing.assert_array_equal(tokens_NB, whole_NB)


def test_an_end_at_the_first_token_stops_the_loop(engine_of, prompts):
    engine = engine_of("dense")
    whole_NB, _ = drawn(engine, prompts[:1], NEW, GREEDY)
    tokens_NB, _ = drawn(engine, prompts[:1], NEW, GREEDY, ends=[int(whole_NB[0, 0])])
    assert tokens_NB[0, 0] == whole_NB[0, 0]
    assert not tokens_NB[1:].any()


@pytest.mark.parametrize("number", [MOST_TOKENS - 5, 2 * MOST_TOKENS + 3])
def test_as_few_calls_as_can_be(engine_of, prompts, monkeypatch, number):
    """The host waits for the device once a call."""
    calls = []
    decode_tokens = programs.decode_tokens

    def counted(*args):
        calls.append(int(args[4]))
        return decode_tokens(*args)

    monkeypatch.setattr("gptjax.inference.engine.decode_tokens", counted)
    window = 16  # that a context of 32 slides by
    tokens_NB, _ = drawn(engine_of("dense"), [np.arange(1, window)], number, GREEDY, overflow="slide")
    assert len(tokens_NB) == number
    assert len(calls) <= -(-number // window) + 1
    assert sum(calls) <= number


def test_new_parameters_of_a_new_engine_compile_nothing(engine_of, model_of, prompts):
    """As in reinforcement learning: an engine for each batch, on weights that stay where they are."""
    model, params = model_of("banded")
    tokenizer = engine_of("banded").tokenizer

    def generate(factor: float) -> list[list[int]]:
        engine = Engine(model, jax.tree.map(lambda leaf: factor * leaf, params), tokenizer, weights="stacked")
        completions = engine.generate(prompts, NEW, Sampling(1.0), end_tokens=[4], ignore_end_of_text=True)
        return [completion.tokens.tolist() for completion in completions]

    first = generate(1.0)
    sizes = [program._cache_size() for program in (programs.prefill_prompts, programs.decode_tokens)]
    assert generate(1.5) != first
    assert generate(1.0) == first
    assert [program._cache_size() for program in (programs.prefill_prompts, programs.decode_tokens)] == sizes
