"""Beam search equals a plain implementation that recomputes every beam for every token."""

import itertools
from functools import cache

import numpy as np
import pytest

from gptjax.config import UserError
from gptjax.inference import beam as beam_module
from gptjax.inference.beam import beam_search
from gptjax.inference.sampling import Sampling

BEAMS, NEW = 3, 12


@pytest.fixture
def engine(engine_of):
    return engine_of("banded")


@pytest.fixture(scope="module")
def logprobs_after(logits_of):
    """Log-probabilities (V,) of what comes after a text, a tuple of tokens."""

    @cache
    def logprobs(text: tuple[int, ...]) -> np.ndarray:
        logits_V = logits_of("banded", text)[-1].astype(np.float64)
        return logits_V - logits_V.max() - np.log(np.exp(logits_V - logits_V.max()).sum())

    return logprobs


def plain_search(logprobs_after, prompt, ends=(), length_penalty=1.0, early_stopping=False):
    """[(score, tokens)] of the BEAMS best, best first; tokens with the end-of-text."""
    prompt, going_on, finished = tuple(map(int, prompt)), [(0.0, ())], []
    for length in range(1, NEW + 1):
        extended = [
            (total + logprob, (*tokens, token))
            for total, tokens in going_on
            for token, logprob in enumerate(logprobs_after(prompt + tokens))
        ]
        extended.sort(reverse=True)
        for total, tokens in extended[:BEAMS]:
            if tokens[-1] in ends or length == NEW:
                finished.append((total / length**length_penalty, tokens))
        finished = sorted(finished, reverse=True)[:BEAMS]
        going_on = [(total, tokens) for total, tokens in extended if tokens[-1] not in ends][:BEAMS]
        if len(finished) == BEAMS:
            expected_length = NEW if early_stopping == "never" and length_penalty > 0 else length
            if early_stopping is True or going_on[0][0] / expected_length**length_penalty <= finished[-1][0]:
                break
    return finished


def found_by(beams) -> list[tuple[int, ...]]:
    return [tuple(beam.completion.tokens.tolist()) for beam in beams]


def test_a_search_to_the_end_finds_what_a_plain_one_finds(engine, logprobs_after, prompts):
    found = beam_search(engine, prompts, NEW, num_beams=BEAMS, num_return=BEAMS, ignore_end_of_text=True)
    for prompt, beams in zip(prompts, found, strict=True):
        plain = plain_search(logprobs_after, prompt)
        assert found_by(beams) == [tokens for _, tokens in plain]
        np.testing.assert_allclose([beam.score for beam in beams], [score for score, _ in plain], atol=1e-4)
        for beam in beams:
            completion = beam.completion
            assert completion.finish_reason == "length"
            assert completion.text == engine.tokenizer.decode(completion.tokens)
            text = tuple(prompt.tolist()) + tuple(completion.tokens.tolist())
            logprobs = [logprobs_after(text[: len(prompt) + i])[token] for i, token in enumerate(completion.tokens)]
            np.testing.assert_allclose(completion.logprobs, logprobs, atol=1e-4)


def test_searches_that_end_find_what_plain_ones_find(engine, logprobs_after, prompts, monkeypatch):
    seen = set()
    for end, penalty in itertools.product(ends_within(prompts, logprobs_after), (1.0, 0.0, 3.0, -1.0)):
        monkeypatch.setattr(engine.tokenizer, "end_of_text", end)
        found = {}
        for early in (False, True, "never"):
            found[early] = beam_search(
                engine, prompts, NEW, num_beams=BEAMS, num_return=BEAMS, length_penalty=penalty, early_stopping=early
            )
            for prompt, beams in zip(prompts, found[early], strict=True):
                plain = plain_search(logprobs_after, prompt, (end,), penalty, early)
                for (score, tokens), beam in zip(plain, beams, strict=True):
                    ended = tokens[-1] == end
                    assert tuple(beam.completion.tokens.tolist()) == (tokens[:-1] if ended else tokens)
                    assert beam.completion.finish_reason == ("end_of_text" if ended else "length")
                    assert len(beam.completion.logprobs) == len(beam.completion.tokens)
                    assert beam.score == pytest.approx(score, abs=1e-4)
                    seen.add(beam.completion.finish_reason)
        plainly = {early: [found_by(beams) for beams in searches] for early, searches in found.items()}
        seen |= {early for early in (True, "never") if plainly[early] != plainly[False]}
    assert seen == {"end_of_text", "length", True, "never"}, "no case in which the rules of stopping differ"


def test_any_of_several_tokens_ends_a_search(engine, logprobs_after, prompts, monkeypatch):
    ends = tuple(ends_within(prompts, logprobs_after)[:4])
    monkeypatch.setattr(engine.tokenizer, "_ends", ends, raising=False)
    seen = set()
    for prompt, beams in zip(
        prompts, beam_search(engine, prompts, NEW, num_beams=BEAMS, num_return=BEAMS), strict=True
    ):
        for (_, tokens), beam in zip(plain_search(logprobs_after, prompt, ends), beams, strict=True):
            completion = beam.completion
            assert (*completion.tokens.tolist(), *([] if completion.end is None else [completion.end])) == tokens
            seen.add(completion.end)
    assert len(seen) > 2
    greedy = engine.generate(prompts, NEW, Sampling(temperature=0))
    assert {completion.end for completion in greedy} <= {*ends, None}
    assert all(set(completion.tokens.tolist()).isdisjoint(ends) for completion in greedy)


def ends_within(prompts, logprobs_after) -> list[int]:
    """Tokens of the best completions: made the end of a document, they end some of the beams."""
    best = [plain_search(logprobs_after, prompt)[0][1] for prompt in prompts]
    return sorted({token for tokens in best for token in tokens[2:6]})


def test_one_beam_is_greedy(engine, prompts, monkeypatch):
    greedy = engine.generate(prompts, NEW, Sampling(temperature=0), ignore_end_of_text=True)
    for end in (None, int(greedy[1].tokens[5])):
        monkeypatch.setattr(engine.tokenizer, "end_of_text", end)
        one = beam_search(engine, prompts, NEW, num_beams=1, length_penalty=3.0, early_stopping="never")
        for expected, [beam] in zip(engine.generate(prompts, NEW, Sampling(temperature=0)), one, strict=True):
            assert beam.completion.tokens.tolist() == expected.tokens.tolist()
            assert beam.completion.finish_reason == expected.finish_reason
            np.testing.assert_allclose(beam.completion.logprobs, expected.logprobs, atol=1e-5)


def test_a_search_does_not_depend_on_the_prompts_beside_it(engine, prompts):
    together = beam_search(engine, prompts, NEW, num_beams=BEAMS)
    swapped = beam_search(engine, prompts[::-1], NEW, num_beams=BEAMS)
    assert [found_by(beams) for beams in together] == [found_by(beams) for beams in swapped[::-1]]
    same = beam_search(engine, [prompts[1]] * 3, NEW, num_beams=BEAMS, num_return=2)
    assert [found_by(beams)[:1] for beams in same] == [found_by(together[1])] * 3
    assert [len(beams) for beams in same] == [2, 2, 2]


def test_a_prompt_alone_of_any_length_compiles_nothing_new(engine_of):
    def compiles(length: int, number: int) -> list[int]:
        programs = beam_module._prefill, beam_module._decode
        before = [program._cache_size() for program in programs]
        beam_search(engine_of("smallest"), [np.zeros(length, int)], number, num_beams=2, ignore_end_of_text=number > 8)
        return [program._cache_size() - size for program, size in zip(programs, before, strict=True)]

    assert compiles(3, 6) == [1, 1]
    assert compiles(5, 9) == [0, 0]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"num_beams": 0}, "num_beams=0 must be at least 1 and at most 30"),
        ({"num_beams": 31}, "num_beams=31 must be at least 1 and at most 30"),
        ({"num_return": 5}, "num_return=5 must be at least 1 and at most 4"),
        ({"num_return": 0}, "num_return=0 must be at least 1 and at most 4"),
        ({"max_new_tokens": 0}, "max_new_tokens=0 must be at least 1"),
        ({"max_new_tokens": 16}, "a prompt of 17 tokens and max_new_tokens=16 exceed the model's context of 32 tokens"),
        ({"prompts": [[61]]}, "a prompt has a token outside of the model's vocabulary of 61"),
    ],
)
def test_a_mistake_is_one_clear_line(engine, prompts, settings, message):
    with pytest.raises(UserError) as error:
        beam_search(engine, **{"prompts": prompts, "max_new_tokens": NEW, **settings})
    assert str(error.value).startswith(message)


def test_no_prompts(engine):
    assert beam_search(engine, [], NEW) == []
