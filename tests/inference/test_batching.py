"""Continuous batching samples what the engine of whole batches samples, whatever else is in the batch."""

import dataclasses

import numpy as np
import pytest

from gptjax.config import UserError
from gptjax.inference.batching import BatchedEngine
from gptjax.inference.engine import Engine
from gptjax.inference.requests import GenerationRequest, SampledToken
from gptjax.inference.sampling import Sampling
from gptjax.models.gpt import GPT
from tests.inference.conftest import CONFIGS, END_OF_TEXT, params_of

NEW = 12
CHUNK = 4
GREEDY = Sampling(temperature=0)
MIXED = [
    GREEDY,
    Sampling(1.0),
    Sampling(0.8, top_k=7, top_p=0.9, min_p=0.05, repetition_penalty=1.2),
    Sampling(1.3, top_p=0.8),
    Sampling(0.0, repetition_penalty=1.5),
    Sampling(2.0, top_k=1000),
]


def batched(name: str, tokenizer, **options) -> BatchedEngine:
    options = {"rows": 4, "chunk": CHUNK} | options
    return BatchedEngine(GPT(CONFIGS[name]), params_of(name), tokenizer, **options)


def request(prompt, sampling: Sampling = GREEDY, **settings) -> GenerationRequest:
    settings = {"max_new_tokens": NEW} | settings
    return GenerationRequest(tuple(int(token) for token in prompt), sampling=sampling, **settings)


def run(engine: BatchedEngine, requests: list[GenerationRequest]) -> list[list[SampledToken]]:
    """The events of all requests, inserted at once."""
    events: dict[int, list[SampledToken]] = {engine.insert(one): [] for one in requests}
    while not engine.is_idle:
        for event in engine.step():
            events[event.request].append(event)
    assert engine.stats.pages_in_use == 0
    assert engine.free_rows == engine.rows
    return list(events.values())


def tokens_of(events: list[SampledToken]) -> list[int]:
    return [event.token for event in events]


@pytest.fixture(scope="session")
def texts() -> list[np.ndarray]:
    """Of one token, of whole chunks, of less and more."""
    rng = np.random.default_rng(0)
    return [rng.integers(0, END_OF_TEXT, length) for length in (1, 17, 4, 9, 8, 3)]


@pytest.mark.parametrize("name", ["banded", "post", "modern", "experts", "prefix"])
def test_each_row_is_sampled_with_its_own_settings(name, tokenizer, texts):
    """More requests than rows, each with other settings: the tokens of the engine that knows one sampling a batch."""
    model = GPT(dataclasses.replace(CONFIGS[name], expert_capacity=None))
    engine = Engine(model, params_of(name), tokenizer)
    requests = [request(p, s, seed=5 + i) for i, (p, s) in enumerate(zip(texts, MIXED, strict=True))]
    settings = MIXED if name == "banded" else MIXED[:1]
    if name != "banded":
        requests = [dataclasses.replace(one, sampling=GREEDY) for one in requests]
    found = run(batched(name, tokenizer), requests)
    for sampling in settings:
        expected = engine.generate(texts, NEW, sampling, seeds=5, ignore_end_of_text=True)
        for one, events, completion in zip(requests, found, expected, strict=True):
            if one.sampling == sampling:
                assert tokens_of(events) == completion.tokens.tolist()
                logprobs = [event.logprob for event in events]
                np.testing.assert_allclose(logprobs, completion.logprobs, atol=1e-5)
                assert [event.finish_reason for event in events] == [None] * (NEW - 1) + ["length"]


@pytest.mark.parametrize("token", [-1, 61])
def test_a_request_that_can_never_run_is_an_error(tokenizer, token):
    engine = batched("banded", tokenizer)
    for changes, message in (
        ({"prompt": []}, "prompt is empty"),
        ({"max_new_tokens": 0}, "max_new_tokens=0 must be at least 1"),
        ({"max_new_tokens": 32}, r"a prompt of 1 tokens and max_new_tokens=32 exceed .* context of 32"),
        ({"prompt": [token]}, rf"a prompt has token {token}, outside of the model's vocabulary of 61"),
        ({"end_tokens": (token,)}, f"end_tokens has token {token}, outside"),
        ({"sampling": Sampling(logit_bias=((token, 1.0),))}, f"logit_bias has token {token}, outside"),
        ({"top_logprobs": 21}, "top_logprobs=21 must be in 0 to 20"),
        ({"end_tokens": (1,) * 17}, "17 end tokens, more than 16"),
    ):
        with pytest.raises(UserError, match=message):
            engine.insert(request(**{"prompt": [3]} | changes))
    small = batched("banded", tokenizer, cache_bytes=4 * engine.page_bytes)
    with pytest.raises(UserError, match="need 6 pages of the cache, which has 3"):
        small.insert(request(range(10), max_new_tokens=12))
    assert engine.is_idle
    assert small.is_idle
