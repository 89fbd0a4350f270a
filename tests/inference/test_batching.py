"""Continuous batching samples what the engine of whole batches samples, whatever else is in the batch."""

import dataclasses

import flax.linen as nn
import jax
import numpy as np
import pytest

from gptjax.config import PeftConfig, UserError
from gptjax.inference.batching import BatchedEngine
from gptjax.inference.engine import Engine
from gptjax.inference.requests import GenerationRequest, SampledToken
from gptjax.inference.sampling import Sampling
from gptjax.models.gpt import GPT, init_params
from gptjax.models.peft import join, low_rank, merge
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


# --- determinism ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="session")
def varied(texts) -> list[GenerationRequest]:
    """Requests of all kinds; some prompts begin with the same tokens."""
    long = np.random.default_rng(1).integers(0, END_OF_TEXT, 19)
    prompts = [*texts, long[:13], long[:9], long, np.append(long[:14], 3)]
    requests = [
        request(prompt, MIXED[i % len(MIXED)], seed=i, max_new_tokens=3 + i, top_logprobs=i % 3)
        for i, prompt in enumerate(prompts)
    ]
    requests[3] = dataclasses.replace(requests[3], end_tokens=tuple(range(0, 60, 4)))
    requests[6] = dataclasses.replace(requests[6], adapter="one")
    requests[7] = dataclasses.replace(requests[7], adapter="two", prompt_logprobs=True)
    penalties = Sampling(1.0, frequency_penalty=0.5, presence_penalty=-0.5, logit_bias=((3, 2.0), (4, -9.0)))
    requests[8] = dataclasses.replace(requests[8], sampling=penalties)
    return requests


def check_schedules(name: str, tokenizer, requests: list[GenerationRequest], number: int) -> None:
    """Runs requests in random orders, at random times, with others evicted: the events are those of each alone."""
    pages = 12  # so few that requests wait for pages, and the prefix cache gives some away
    cache_bytes = pages * batched(name, tokenizer).page_bytes
    options = {"adapters": adapters_of(name), "rows": 3, "deterministic": True, "cache_bytes": cache_bytes}
    alone = [run(batched(name, tokenizer, prefix_cache=False, **options), [one])[0] for one in requests]
    rng = np.random.default_rng(7)
    for schedule in range(number):
        if schedule % 5 == 0:  # otherwise the prefix cache is that of the schedules before
            engine = batched(name, tokenizer, **options)
            engine.steps = int(rng.integers(1, 9))
        due = list(rng.permutation(len(requests)))[: rng.integers(1, len(requests) + 1)]
        numbers: dict[int, int] = {}
        found: dict[int, list[SampledToken]] = {}
        while due or not engine.is_idle:
            while due and rng.random() < 0.5:
                which = int(due.pop())
                numbers[engine.insert(requests[which])] = which
            for event in engine.step():
                found.setdefault(event.request, []).append(dataclasses.replace(event, request=0))
            if numbers and rng.random() < 0.1:
                evicted = list(numbers)[rng.integers(len(numbers))]
                engine.evict(evicted)
                numbers.pop(evicted)
        for number_, which in numbers.items():
            assert found[number_] == alone[which], (schedule, which)
        assert engine.stats.pages_in_use == 0


def adapters_of(name: str) -> dict[str, tuple[PeftConfig, dict]]:
    """Two random adapters of different ranks and targets."""
    config, found = CONFIGS[name], {}
    for seed, (adapter, targets) in enumerate((("one", ".*/attention/.*/kernel"), ("two", ".*/(out|up|down)/kernel"))):
        if config.num_experts is not None:
            targets = ".*/out/kernel"
        settings = PeftConfig(method="lora", targets=(targets,), rank=1 + seed)
        boxed = jax.eval_shape(lambda: init_params(GPT(config), jax.random.key(0)))
        shapes = jax.eval_shape(lambda: low_rank(settings, boxed, jax.random.key(0)))  # noqa: B023
        rng = np.random.default_rng(seed)
        tree = jax.tree.map(lambda leaf: rng.normal(0, 0.5, leaf.shape).astype(np.float32), nn.unbox(shapes))  # noqa: B023
        found[adapter] = settings, tree
    return found


def test_a_request_does_not_depend_on_other_requests(tokenizer, varied):
    check_schedules("modern", tokenizer, varied, 40)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["banded", "modern", "experts", "prefix"])
def test_requests_are_deterministic_under_many_schedules(name, tokenizer, varied):
    check_schedules(name, tokenizer, varied, 500)


def test_adapters_are_those_merged_into_the_weights(tokenizer, texts):
    """In one batch with the base model and with each other."""
    adapters = adapters_of("modern")
    requests = [request(text, adapter=adapter) for text in texts[:3] for adapter in (None, "one", "two")]
    found = run(batched("modern", tokenizer, rows=3, adapters=adapters), requests)
    for adapter, (settings, tree) in {None: (None, None), **adapters}.items():
        params = params_of("modern")
        if settings is not None:
            params = merge(settings, join(params, tree))
        expected = Engine(GPT(CONFIGS["modern"]), params, tokenizer).generate(
            texts[:3], NEW, GREEDY, ignore_end_of_text=True
        )
        events = [events for one, events in zip(requests, found, strict=True) if one.adapter == adapter]
        assert [tokens_of(one) for one in events] == [completion.tokens.tolist() for completion in expected]
