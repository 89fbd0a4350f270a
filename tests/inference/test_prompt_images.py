"""Continuous batching reads images as the engine of whole batches does, whatever else is in the batch."""

import dataclasses
from functools import cache

import flax.linen as nn
import jax
import numpy as np
import pytest

from gptjax.config import UserError, VisionConfig
from gptjax.inference.batching import BatchedEngine
from gptjax.inference.continuous import complete_prompts
from gptjax.inference.engine import Engine
from gptjax.inference.requests import GenerationRequest
from gptjax.inference.sampling import Sampling
from gptjax.models.gpt import GPT, init_params
from tests.inference.conftest import CONFIGS

IMAGE = 59
CONFIG = dataclasses.replace(
    CONFIGS["modern"],
    vision=VisionConfig(encoder="patches", image_size=8, patch_size=4, projector="linear", image_token=IMAGE),
)
TOKENS = CONFIG.vision.tokens_per_image
GREEDY = Sampling(temperature=0)


@cache
def params():
    rng = np.random.default_rng(3)
    zeros = jax.eval_shape(lambda: nn.unbox(init_params(GPT(CONFIG), jax.random.key(0))))
    return jax.tree.map(lambda leaf: rng.normal(0, 0.4, leaf.shape).astype(np.float32), zeros)


def batched(tokenizer, **options) -> BatchedEngine:
    return BatchedEngine(GPT(CONFIG), params(), tokenizer, rows=3, chunk=4, deterministic=True, **options)


def images(*seeds: int) -> tuple:
    return tuple(np.random.default_rng(s).integers(0, 256, CONFIG.vision.values_per_image, np.uint8) for s in seeds)


def request(prompt, *seeds: int) -> GenerationRequest:
    return GenerationRequest(tuple(prompt), 8, GREEDY, images=images(*seeds))


# Images at the start, after whole pages, across the border of pages, and several.
PROMPTS = [
    ([*[IMAGE] * TOKENS, 1, 2], (1,)),
    ([1, 2, 3, 4, *[IMAGE] * TOKENS, 5], (2,)),
    ([1, 2, *[IMAGE] * TOKENS, 3, *[IMAGE] * TOKENS, 4, 5, 6], (3, 4)),
    ([*[IMAGE] * (3 * TOKENS), 7], (5, 6, 7)),
    ([1, 2, 3, 4, 5], ()),
]


def completed(engine: BatchedEngine, requests) -> list[list]:
    found: dict[int, list] = {engine.insert(one): [] for one in requests}
    while not engine.is_idle:
        for event in engine.step():
            found[event.request].append((event.token, event.logprob))
    return list(found.values())


def test_it_generates_what_the_engine_of_whole_batches_does(tokenizer):
    events = completed(batched(tokenizer), [request(prompt, *seeds) for prompt, seeds in PROMPTS])
    engine = Engine(GPT(CONFIG), params(), tokenizer)
    given = [images(*seeds) for _, seeds in PROMPTS]
    whole = engine.generate(
        [np.array(p, np.int32) for p, _ in PROMPTS], 8, GREEDY, images=given, ignore_end_of_text=True
    )
    for one, other in zip(events, whole, strict=True):
        assert [token for token, _ in one] == list(other.tokens)
        np.testing.assert_allclose([logprob for _, logprob in one], other.logprobs, atol=1e-4)


def test_many_prompts_end_where_the_engine_of_whole_batches_ends_them(tokenizer):
    """At the end tokens given, in the order of the prompts."""
    prompts, given = [list(p) for p, _ in PROMPTS], [images(*seeds) for _, seeds in PROMPTS]
    whole = Engine(GPT(CONFIG), params(), tokenizer)
    settings = {
        "images": given,
        "end_tokens": (whole.generate([prompts[0]], 3, GREEDY, images=given[:1])[0].tokens[2],),
    }
    expected = whole.generate([np.array(p, np.int32) for p in prompts], 8, GREEDY, **settings)
    found = list(complete_prompts(batched(tokenizer), prompts, 8, GREEDY, **settings))
    assert expected[0].finish_reason == "end_of_turn"
    for one, other in zip(found, expected, strict=True):
        assert (list(one.tokens), one.text, one.finish_reason) == (list(other.tokens), other.text, other.finish_reason)


def test_a_completion_depends_on_its_own_images_only(tokenizer):
    """Bit for bit; and pages of a prompt are found again for the same images alone."""
    engine = batched(tokenizer)
    prompt = PROMPTS[2][0]
    requests = [request(prompt, *seeds) for seeds in ((3, 4), (4, 3), (3, 5))]
    alone = [completed(batched(tokenizer, prefix_cache=False), [one])[0] for one in requests]
    assert completed(engine, requests) == alone
    assert engine.stats.prefix_hits == 0
    assert completed(engine, requests) == alone
    assert engine.stats.prefix_hits > 0
    assert alone[0] != alone[1] != alone[2] != alone[0], "images and their order matter"


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (request([1, IMAGE, 2], 1), "a prompt has 1 image tokens for 1 images, which have 4 each"),
        (request(PROMPTS[0][0]), "a prompt has 4 image tokens for 0 images"),
        (request([1, *[IMAGE] * TOKENS], 1), "ends with an image"),
    ],
)
def test_image_tokens_without_their_images_are_refused(tokenizer, wrong, message):
    with pytest.raises(UserError, match=message):
        batched(tokenizer).insert(wrong)


def test_a_text_model_refuses_images(tokenizer):
    model = GPT(dataclasses.replace(CONFIG, vision=VisionConfig()))
    text_params = {name: part for name, part in params().items() if name != "vision"}
    engine = BatchedEngine(model, text_params, tokenizer, rows=1, chunk=4)
    with pytest.raises(UserError, match="this model reads text alone"):
        engine.insert(request(*PROMPTS[0][:1], 1))
