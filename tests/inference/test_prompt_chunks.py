"""Prompts that wait are read together, and each as it is read alone."""

import collections
import dataclasses

import numpy as np

from gptjax.inference import batching
from gptjax.inference.batch_programs import read_chunks
from gptjax.inference.batching import BatchedEngine
from gptjax.inference.prompt_chunks import next_chunk, take_chunks
from gptjax.inference.requests import GenerationRequest
from gptjax.inference.sequences import Sequence
from tests.inference.conftest import END_OF_TEXT
from tests.inference.test_batching import MIXED, batched, request, run, tokens_of


def read_shapes(monkeypatch, engine: BatchedEngine, requests: list[GenerationRequest]) -> tuple[list, list]:
    """The events of requests, and the rows and positions of the calls that read their prompts."""
    shapes: list[tuple[int, int]] = []

    def recorded(model, params, cache, chunks, images):
        shapes.append(chunks.tokens_BT.shape)
        return read_chunks(model, params, cache, chunks, images)

    with monkeypatch.context() as patched:
        patched.setattr(batching, "read_chunks", recorded)
        return run(engine, requests), shapes


def test_prompts_that_wait_are_read_together(monkeypatch, tokenizer):
    """Those whose chunks have the same length, with their own positions, pages, adapters and log-probabilities."""
    rng = np.random.default_rng(4)
    prompts = [rng.integers(0, END_OF_TEXT, length) for length in (9, 6, 8, 9)]
    first = request(prompts[0][:5], max_new_tokens=1)  # the prefix cache then has four tokens
    requests = [request(prompt, MIXED[i], seed=i, max_new_tokens=4) for i, prompt in enumerate(prompts)]
    requests[1] = dataclasses.replace(requests[1], adapter="two")
    requests[2] = dataclasses.replace(requests[2], prompt_logprobs=True, top_logprobs=2)
    options = {"rows": 4, "cache_bytes": None}
    alone = batched(tokenizer, **options)
    run(alone, [first])
    expected, shapes = read_shapes(monkeypatch, alone, requests)
    assert {rows for rows, _ in shapes} == {1}
    assert len(shapes) == 1 + 2 + 2 + 2
    together = batched(tokenizer, deterministic=False, **options)
    run(together, [first])
    found, shapes = read_shapes(monkeypatch, together, requests)
    assert [rows for rows, _ in shapes] == [4, 4], "the second with an unused row"
    assert together.stats.tokens_prefilled == alone.stats.tokens_prefilled == 4 + 4 + 5 + 7 + 8
    for one, other in zip(found, expected, strict=True):
        assert tokens_of(one) == tokens_of(other)
        np.testing.assert_allclose([e.logprob for e in one], [e.logprob for e in other], atol=1e-5)
    prompt, reference = together.prompt_logprobs(3), alone.prompt_logprobs(3)
    np.testing.assert_allclose(prompt.logprobs, reference.logprobs, atol=1e-5)
    assert [[token for token, _ in top] for top in prompt.top] == [[token for token, _ in top] for top in reference.top]


def test_the_first_prompt_is_read_with_those_whose_chunks_have_its_length():
    def reading(*lengths: int, images: tuple[int, ...] = ()) -> collections.deque[Sequence]:
        return collections.deque(
            Sequence(i, request([1] * length, images=(np.zeros(1, np.uint8),) if i in images else ()), [])
            for i, length in enumerate(lengths)
        )

    def taken(waiting: collections.deque[Sequence]) -> list[int]:
        chunks = take_chunks(waiting, lambda sequence: next_chunk(sequence, 64), 4)
        assert not {chunk.sequence for chunk in chunks} & set(waiting)
        return [chunk.sequence.number for chunk in chunks]

    assert taken(reading(5, 40, 16, 17, 18, 9, 3)) == [0, 2, 3, 5], "up to 16 tokens, without the last"
    assert taken(reading(100, 66, 5)) == [0], "two are read one after the other"
    assert taken(reading(5, 6, 7, 8, images=(0,))) == [0]
    assert taken(reading(5, 6, 7, 8, images=(1,))) == [0, 2, 3]
