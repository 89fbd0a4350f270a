"""Continuous batching samples what the engine of whole batches samples, whatever else is in the batch."""

import dataclasses
from functools import cache

import flax.linen as nn
import jax
import numpy as np
import pytest

from gptjax.config import PeftConfig, UserError
from gptjax.inference.batching import BatchedEngine
from gptjax.inference.engine import Engine
from gptjax.inference.page_pool import PagePool, page_digests
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


PAGES = 12  # so few that requests wait for pages, and the prefix cache gives some away


def batched(tokenizer, name: str = "modern", **options) -> BatchedEngine:
    """An engine of few shapes, so that most tests share compiled programs."""
    model = GPT(CONFIGS[name])
    page_bytes = 2 * model.config.num_layers * model.config.kv_heads * CHUNK * model.config.head_dim * 4
    options = {"rows": 3, "cache_bytes": (PAGES + 1) * page_bytes, "deterministic": True} | options
    return BatchedEngine(model, params_of(name), tokenizer, chunk=CHUNK, adapters=adapters_of(name), **options)


@cache
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
    return some_texts()


def some_texts() -> list[np.ndarray]:
    """Of one token, of whole chunks, of less and more."""
    rng = np.random.default_rng(0)
    return [rng.integers(0, END_OF_TEXT, length) for length in (1, 17, 4, 9, 8, 3)]


@pytest.mark.parametrize(
    "name",
    ["modern", *(pytest.param(name, marks=pytest.mark.slow) for name in ("banded", "post", "experts", "prefix"))],
)
def test_each_row_is_sampled_with_its_own_settings(name, tokenizer, texts):
    """More requests than rows, each with other settings: the tokens of the engine that knows one sampling a batch."""
    model = GPT(dataclasses.replace(CONFIGS[name], expert_capacity=None))
    engine = Engine(model, params_of(name), tokenizer)
    requests = [request(p, s, seed=5 + i) for i, (p, s) in enumerate(zip(texts, MIXED, strict=True))]
    found = run(batched(tokenizer, name), requests)
    for i in range(len(MIXED)) if name == "banded" else (2, 4):
        (expected,) = engine.generate([texts[i]], NEW, MIXED[i], seeds=5 + i, ignore_end_of_text=True)
        assert tokens_of(found[i]) == expected.tokens.tolist()
        np.testing.assert_allclose([event.logprob for event in found[i]], expected.logprobs, atol=1e-5)
        assert [event.finish_reason for event in found[i]] == [None] * (NEW - 1) + ["length"]


@pytest.mark.slow
def test_few_rows_are_decoded_by_smaller_programs(tokenizer, texts):
    """Without determinism; the tokens are the same, up to rounding."""
    requests = [request(text) for text in texts]
    found = run(batched(tokenizer, deterministic=False, rows=4), requests)
    expected = run(batched(tokenizer), requests)
    assert [tokens_of(events) for events in found] == [tokens_of(events) for events in expected]


@pytest.mark.parametrize("token", [-1, 61])
def test_a_request_that_can_never_run_is_an_error(tokenizer, token):
    engine = batched(tokenizer)
    for changes, message in (
        ({"prompt": []}, "prompt is empty"),
        ({"max_new_tokens": 0}, "max_new_tokens=0 must be at least 1"),
        ({"max_new_tokens": 32}, r"a prompt of 1 tokens and max_new_tokens=32 exceed .* context of 32"),
        ({"prompt": [token]}, rf"a prompt has token {token}, outside of the model's vocabulary of 61"),
        ({"end_tokens": (token,)}, f"end_tokens has token {token}, outside"),
        ({"sampling": Sampling(logit_bias=((token, 1.0),))}, f"logit_bias has token {token}, outside"),
        ({"top_logprobs": 21}, "top_logprobs=21 must be in 0 to 20"),
        ({"end_tokens": (1,) * 17}, "17 end tokens, more than 16"),
        ({"adapter": "three"}, "no adapter 'three': the adapters are one, two"),
    ):
        with pytest.raises(UserError, match=message):
            engine.insert(request(**{"prompt": [3]} | changes))
    small = batched(tokenizer, cache_bytes=4 * engine.page_bytes)
    with pytest.raises(UserError, match="need 6 pages of the cache, which has 3"):
        small.insert(request(range(10), max_new_tokens=12))
    assert engine.is_idle
    assert small.is_idle
    with pytest.raises(UserError, match="attends to a whole prompt in both directions"):
        batched(tokenizer, "prefix").insert(request([3, 4], prompt_logprobs=True))


# --- determinism ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="session")
def varied(texts) -> list[GenerationRequest]:
    return varied_requests(texts)


def varied_requests(texts: list[np.ndarray]) -> list[GenerationRequest]:
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


def differing(
    name: str, tokenizer, requests: list[GenerationRequest], number: int, proposer_of=lambda known: None, **options
) -> list[int]:
    """Runs requests in random orders, at random times, with others evicted.

    Args:
      proposer_of: returns the proposer of a new engine; `known` has the tokens of each request.

    Returns:
      The requests whose events differ from those of the request alone, with deterministic decoding.
    """
    differ = []
    alone = [run(batched(tokenizer, name, prefix_cache=False), [one])[0] for one in requests]
    known = {one: tokens_of(events) for one, events in zip(requests, alone, strict=True)}
    rng = np.random.default_rng(7)
    for schedule in range(number):
        if schedule % 5 == 0:  # otherwise the prefix cache is that of the schedules before
            engine = batched(tokenizer, name, proposer=proposer_of(known), **options)
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
            if found[number_] != alone[which]:
                differ.append(which)
        assert engine.stats.pages_in_use == 0
    return differ


def test_a_request_does_not_depend_on_other_requests(tokenizer, varied):
    assert differing("modern", tokenizer, varied, 40) == []


@pytest.mark.slow
@pytest.mark.parametrize("name", ["wide", "banded", "modern", "experts", "prefix", "bfloat16"])
def test_requests_are_deterministic_under_many_schedules(name, tokenizer, varied):
    if name == "prefix":  # a prompt that is read in both directions has no log-probabilities
        varied = [dataclasses.replace(one, prompt_logprobs=False) for one in varied]
    assert differing(name, tokenizer, varied, 500) == []


@pytest.mark.slow
def test_rounding_depends_on_other_requests_without_determinism(tokenizer, varied):
    """Otherwise the tests above would show nothing of the shapes of programs."""
    assert differing("wide", tokenizer, varied, 5, deterministic=False)


def test_adapters_are_those_merged_into_the_weights(tokenizer, texts):
    """In one batch with the base model and with each other."""
    adapters = adapters_of("modern")
    requests = [request(text, adapter=adapter) for text in texts[:3] for adapter in (None, "one", "two")]
    found = run(batched(tokenizer), requests)
    for adapter, (settings, tree) in {None: (None, None), **adapters}.items():
        params = params_of("modern")
        if settings is not None:
            params = merge(settings, join(params, tree))
        expected = Engine(GPT(CONFIGS["modern"]), params, tokenizer).generate(
            texts[:3], NEW, GREEDY, ignore_end_of_text=True
        )
        events = [events for one, events in zip(requests, found, strict=True) if one.adapter == adapter]
        assert [tokens_of(one) for one in events] == [completion.tokens.tolist() for completion in expected]


# --- pages ------------------------------------------------------------------------------------------------------------


def test_prompts_that_begin_alike_share_pages(tokenizer, texts):
    engine = batched(tokenizer, deterministic=True)
    long = texts[1]
    first = run(engine, [request(long)])
    assert (engine.stats.prefix_hits, engine.stats.tokens_prefilled) == (0, 16)
    assert engine.stats.pages_cached == 4
    assert run(engine, [request(long)]) == [[dataclasses.replace(event, request=1) for event in first[0]]]
    assert (engine.stats.prefix_hits, engine.stats.tokens_prefilled) == (4, 16)
    changed = long.copy()
    changed[6] = (changed[6] + 1) % END_OF_TEXT
    run(engine, [request(changed)])
    assert (engine.stats.prefix_hits, engine.stats.prefix_queries) == (5, 12)
    run(engine, [request(long, adapter="one")])
    assert engine.stats.prefix_hits == 5
    other = batched(tokenizer, prefix_cache=False)
    run(other, [request(long), request(long)])
    assert other.stats.pages_cached == other.stats.prefix_queries == 0


def test_an_evicted_request_frees_its_row_and_pages(tokenizer, texts):
    engine = batched(tokenizer)
    numbers = [engine.insert(request(text)) for text in (texts[0], texts[1], texts[0], texts[0])]
    engine.step()
    assert engine.stats.rows_in_use == 2
    assert engine.stats.waiting == 2, "the prompt of 17 tokens leaves no pages"
    for number in numbers:  # some read, decode and wait
        engine.evict(number)
        engine.evict(number)
    assert engine.is_idle
    assert engine.free_rows == 3
    assert engine.stats.pages_in_use == 0
    assert engine.step() == []


def test_a_long_prompt_does_not_stall_rows_that_decode(tokenizer, texts):
    engine = batched(tokenizer)
    short = engine.insert(request(texts[0], max_new_tokens=20))
    engine.step()
    long = engine.insert(request(texts[1], max_new_tokens=2))
    steps = [{event.request for event in engine.step()}]
    while long not in steps[-1]:
        steps.append({event.request for event in engine.step()})
    assert all(short in step for step in steps)
    assert len(steps) == 4, "16 tokens are read by 4"


def test_a_first_token_does_not_wait_for_later_ones(tokenizer, texts):
    engine = batched(tokenizer, steps=4)
    engine.insert(request(texts[0], max_new_tokens=8))
    counts = []
    while not engine.is_idle:
        counts.append(len(engine.step()))
    assert [count for count in counts if count] == [1, 4, 3]


def test_pages_that_requests_no_longer_use_are_given_away_the_oldest_first():
    pool = PagePool(4)
    digests = page_digests(range(9), 2, None)
    assert len(digests) == len(set(digests)) == 4
    assert digests[:2] == page_digests(range(4), 2, None) != page_digests(range(4), 2, "one")
    first = pool.allocate(2)
    for page, digest in zip(first, digests, strict=False):
        pool.publish(page, digest)
    pool.release(first)
    assert (pool.in_use, pool.cached, pool.available) == (0, 2, 4)
    found = pool.find(digests)
    assert found == first
    pool.share(found)
    pool.share(found[:1])
    pool.release(found)
    assert (pool.in_use, pool.cached, pool.available) == (1, 1, 3)
    pages = pool.allocate(3)
    assert pool.find(digests) == found[:1], "the page after it was given away"
    assert pool.evictions == 1
    pool.release(pages)
    pool.release(found[:1])
    assert (pool.in_use, pool.cached) == (0, 1)


# --- log-probabilities and constraints --------------------------------------------------------------------------------


def test_log_probabilities_of_prompt_and_completion(tokenizer, texts, logits_of):
    engine = batched(tokenizer)
    number = engine.insert(request(texts[1], max_new_tokens=4, top_logprobs=3, prompt_logprobs=True))
    assert engine.prompt_logprobs(number) is None
    events = []
    while not engine.is_idle:
        events += engine.step()
    text = [*texts[1].tolist(), *tokens_of(events)]
    logits_TV = logits_of("modern", text)
    logprob_TV = logits_TV - np.log(np.sum(np.exp(logits_TV), axis=-1, keepdims=True))
    prompt = engine.prompt_logprobs(number)
    assert prompt is not None
    assert engine.prompt_logprobs(number) is None
    logprobs = [*prompt.logprobs, *(event.logprob for event in events)]
    np.testing.assert_allclose(logprobs, logprob_TV[np.arange(len(text) - 1), text[1:]], atol=1e-5)
    for top, logprob_V in zip([*prompt.top, *(event.top for event in events)], logprob_TV, strict=False):
        best = np.argsort(-logprob_V)[:3]
        assert [token for token, _ in top] == best.tolist()
        np.testing.assert_allclose([logprob for _, logprob in top], logprob_V[best], atol=1e-5)


class Alternating:
    """Allows tokens of alternating parity."""

    def __init__(self) -> None:
        self.accepted: list[int] = []

    def allowed(self) -> np.ndarray:
        return np.arange(END_OF_TEXT + 1) % 2 == len(self.accepted) % 2

    def accept(self, token: int) -> None:
        self.accepted.append(token)


def test_a_constraint_holds_for_its_own_row(tokenizer, texts):
    free = [request(texts[1]), request(texts[2], Sampling(1.0), seed=3)]
    constrained = request(texts[2], Sampling(1.0), seed=4, constraint=Alternating())
    found = run(batched(tokenizer), [free[0], constrained, free[1]])
    assert [token % 2 for token in tokens_of(found[1])] == [0, 1] * (NEW // 2)
    alone = run(batched(tokenizer), free)
    assert [tokens_of(events) for events in (found[0], found[2])] == [tokens_of(events) for events in alone]


def test_penalties_and_biases(tokenizer, texts, logits_of):
    frequency, presence, bias = 0.7, 0.4, ((3, 1.5), (9, -50.0))
    sampling = Sampling(0.0, frequency_penalty=frequency, presence_penalty=presence, logit_bias=bias)
    (events,) = run(batched(tokenizer), [request(texts[2], sampling, max_new_tokens=20)])
    sampled: list[int] = []
    for token in tokens_of(events):
        logits_V = logits_of("modern", [*texts[2], *sampled])[-1].copy()
        counts = np.bincount(sampled, minlength=len(logits_V))
        logits_V -= frequency * counts + presence * (counts > 0)
        for biased, value in bias:
            logits_V[biased] += value
        assert token == logits_V.argmax()
        sampled.append(token)
    plain = run(batched(tokenizer), [request(texts[2], max_new_tokens=20)])[0]
    assert tokens_of(plain) != sampled


def test_end_tokens_end_a_request(tokenizer, texts):
    (plain,) = run(batched(tokenizer), [request(texts[1])])
    end = plain[5].token
    first = tokens_of(plain).index(end)
    (events,) = run(batched(tokenizer), [request(texts[1], end_tokens=(end, END_OF_TEXT))])
    assert tokens_of(events) == tokens_of(plain)[: first + 1]
    assert events[-1].finish_reason == "end_of_turn"
