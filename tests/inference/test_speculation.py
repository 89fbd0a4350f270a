"""Speculative decoding generates what is generated without it, bit for bit with deterministic programs."""

import dataclasses

import flax.linen as nn
import jax
import numpy as np
import pytest

from gptjax.config import UserError
from gptjax.data.tokenizers import BytesTokenizer
from gptjax.inference.continuous import complete_prompts
from gptjax.inference.draft_model import DraftProposer
from gptjax.inference.requests import GenerationRequest
from gptjax.inference.sampling import Sampling
from gptjax.inference.sequences import Run, Sequence
from gptjax.inference.speculation import NgramProposer, Proposer, Speculation, continuation, shares
from gptjax.models.gpt import GPT, init_params
from tests.inference.conftest import CONFIGS, END_OF_TEXT, params_of
from tests.inference.test_batching import (
    CHUNK,
    GREEDY,
    MIXED,
    Alternating,
    batched,
    differing,
    request,
    run,
    some_texts,
    tokens_of,
    varied_requests,
)

PROMPT = [3, 9, 4, 3, 9, 4, 3, 9]
ROOM = {"rows": 6, "cache_bytes": None}  # so that there are free rows


class Guessing(Proposer):
    """Proposes the tokens that are known to follow, and arbitrary ones after the last; each is wrong at random."""

    def __init__(self, known: dict[GenerationRequest, list[int]], wrong: float = 0.0) -> None:
        self.known, self.wrong, self.rng, self.proposed = known, wrong, np.random.default_rng(0), 0

    def propose(self, sequences, most, history) -> list[list[int]]:
        proposals = []
        for sequence, number in zip(sequences, most, strict=True):
            tokens = [*self.known[sequence.request], *range(20)][len(sequence.sampled) :][:number]
            proposals.append([token if self.rng.random() >= self.wrong else 7 for token in tokens])
            self.proposed += number
        return proposals


def drafter(tokenizer, name: str) -> DraftProposer:
    return DraftProposer(GPT(CONFIGS[name]), params_of(name), tokenizer)


@pytest.mark.parametrize(
    ("tokens", "expected"),
    [
        ([1, 2, 3, 4, 1, 2], [3, 4, 1]),
        ([1, 2, 3, 9, 1, 2, 4, 9, 1, 2], [4, 9, 1]),  # the last occurrence
        ([5, 1, 2, 3, 0, 6, 1, 2, 4, 0, 5, 1, 2], [3, 0, 6]),  # the longest n-gram
        ([1, 2, 1, 2], [1, 2, 1]),  # what followed is repeated
        ([5, 5, 5], [5, 5, 5]),
        ([1, 256, 1, 1 << 16, 256], []),  # the bytes of two tokens occur between others
        ([1, 2], []),
        ([], []),
    ],
)
def test_what_followed_the_last_tokens_where_they_occurred_before(tokens, expected):
    assert continuation(np.array(tokens, np.int32).tobytes(), 3) == expected


def test_all_requests_get_a_proposal_before_any_gets_two():
    assert shares([4, 0, 1, 2], 5) == [2, 0, 1, 2]
    assert shares([4, 0, 1, 2], 2) == [1, 0, 1, 0]
    assert shares([4], 9) == [4]


def test_a_request_whose_proposals_are_rejected_gets_fewer():
    """Unless they are free."""
    for free, expected in ((False, [4, 1, 1, 2, 4, 3]), (True, [4] * 6)):
        sequence = Sequence(0, request([1, 2], max_new_tokens=20), [])
        speculation = Speculation(Guessing({sequence.request: [0] * 20}), 4, free=free)
        sizes = []
        for accepted in (0, 0, 1, 2, 3, 0):
            (run,) = speculation.runs([sequence], 10, None)
            sizes.append(len(run.proposals))
            speculation.note(run, accepted)
        assert sizes == expected
        assert (speculation.proposed, speculation.accepted) == (sum(expected), 6)
        speculation.note(Run(sequence), 0)
        assert speculation.runs([sequence], 0, None) == [Run(sequence)]


def test_proposals_change_no_request(tokenizer):
    """Random schedules with and without free rows, as in the test without proposals; bitwise."""
    proposers = []

    def proposer_of(known):
        proposers.append(Guessing(known, 0.2))
        return proposers[-1]

    requests = varied_requests(some_texts())
    assert differing("modern", tokenizer, requests, 40, proposer_of) == []
    assert sum(proposer.proposed for proposer in proposers) > 500


@pytest.mark.slow
@pytest.mark.parametrize("name", ["wide", "banded", "experts", "prefix", "bfloat16"])
def test_proposals_change_no_request_under_many_schedules(name, tokenizer):
    requests = varied_requests(some_texts())
    if name == "prefix":
        requests = [dataclasses.replace(one, prompt_logprobs=False) for one in requests]
    assert differing(name, tokenizer, requests, 300, lambda known: Guessing(known, 0.2)) == []
    # The pages of the draft model need memory, too.
    assert differing(name, tokenizer, requests, 100, lambda known: drafter(tokenizer, "dense"), cache_bytes=None) == []


def test_right_proposals_are_accepted_up_to_the_end_of_the_request(tokenizer):
    """An end token, and the maximum of tokens, among proposals that are all right."""
    plain = [request(PROMPT, sampling, seed=3, max_new_tokens=18, top_logprobs=2) for sampling in MIXED]
    expected = [run(batched(tokenizer, **ROOM), [one])[0] for one in plain]
    known = {one: tokens_of(events) for one, events in zip(plain, expected, strict=True)}
    for one, events in zip(plain, expected, strict=True):
        engine = batched(tokenizer, proposer=Guessing(known), **ROOM)
        assert run(engine, [one]) == [events]
        assert (engine.stats.tokens_proposed, engine.stats.tokens_accepted) == (14, 14)  # 5, 5, 5 and 3 tokens
        assert engine.stats.tokens_decoded == 18
    ended = dataclasses.replace(plain[0], end_tokens=(tokens_of(expected[0])[7],))
    end = tokens_of(expected[0]).index(ended.end_tokens[0])
    known[ended] = known[plain[0]]
    engine = batched(tokenizer, proposer=Guessing(known), **ROOM)
    (events,) = run(engine, [ended])
    assert tokens_of(events) == tokens_of(expected[0])[: end + 1]
    assert events[-1].finish_reason == "end_of_turn"
    assert engine.stats.tokens_accepted < engine.stats.tokens_proposed


def test_ngrams_are_accepted_where_a_text_repeats(tokenizer):
    """A bias makes it repeat; a penalty of frequency changes the token of each cycle."""
    requests = [
        request(
            PROMPT, Sampling(0.7, logit_bias=((5, 90.0), (6, 88.0)), frequency_penalty=0.2), seed=1, max_new_tokens=24
        ),
        request(PROMPT[:3], GREEDY, seed=2, max_new_tokens=24),
    ]
    expected = run(batched(tokenizer, **ROOM), requests)
    engine = batched(tokenizer, proposer=NgramProposer(), **ROOM)
    assert run(engine, requests) == expected
    assert {5, 6} == set(tokens_of(expected[0]))
    assert 0 < engine.stats.tokens_accepted < engine.stats.tokens_proposed


def test_a_stop_string_among_accepted_tokens(tokenizer):
    """It ends the completion, and evicts a request in whose rows there are further tokens."""
    plain = list(complete_prompts(batched(tokenizer, **ROOM), [PROMPT, PROMPT[:5]], 18, Sampling(1.0), seeds=3))
    stop = [plain[0].text[9:11], "zz"]
    expected = list(
        complete_prompts(batched(tokenizer, **ROOM), [PROMPT, PROMPT[:5]], 18, Sampling(1.0), seeds=3, stop=stop)
    )
    assert expected[0].finish_reason == "stop"
    known = {
        request(prompt, Sampling(1.0), seed=3 + i, max_new_tokens=18, end_tokens=(END_OF_TEXT,)): one.tokens.tolist()
        for i, (prompt, one) in enumerate(zip((PROMPT, PROMPT[:5]), plain, strict=True))
    }
    engine = batched(tokenizer, proposer=Guessing(known), **ROOM)
    found = list(complete_prompts(engine, [PROMPT, PROMPT[:5]], 18, Sampling(1.0), seeds=3, stop=stop))
    assert engine.stats.tokens_accepted > 0
    assert engine.stats.pages_in_use == 0
    for one, other in zip(found, expected, strict=True):
        assert (one.text, one.finish_reason, one.tokens.tolist()) == (
            other.text,
            other.finish_reason,
            other.tokens.tolist(),
        )
        assert one.logprobs.tolist() == other.logprobs.tolist()


def test_requests_under_a_constraint_get_no_proposals(tokenizer):
    def requests():
        constrained = request(PROMPT, Sampling(1.0), seed=4, constraint=Alternating())
        return [request(PROMPT, GREEDY), constrained]

    expected = run(batched(tokenizer, **ROOM), requests())
    found = requests()
    known = {one: tokens_of(events) for one, events in zip(found, expected, strict=True)}
    engine = batched(tokenizer, proposer=Guessing(known), **ROOM)
    assert run(engine, found) == expected
    assert engine.stats.tokens_accepted == 9  # the first request has 12 tokens: 5, 5 and 2


def test_without_determinism_the_tokens_are_the_same(tokenizer):
    """The sizes of the programs differ, and so do roundings."""
    requests = [request(PROMPT, sampling, seed=3) for sampling in MIXED[:2]]
    options = {"rows": 2, "cache_bytes": None}
    expected = run(batched(tokenizer, "smallest", **options), requests)
    known = {one: tokens_of(events) for one, events in zip(requests, expected, strict=True)}
    options |= {"deterministic": False, "proposer": Guessing(known, 0.2), "speculative_tokens": 1}
    engine = batched(tokenizer, "smallest", **options)
    engine.compile()
    assert engine.stats.programs == 3  # 1, 2 and 4 rows
    found = run(engine, requests)
    assert [tokens_of(events) for events in found] == [tokens_of(events) for events in expected]
    for one, other in zip(found, expected, strict=True):
        np.testing.assert_allclose([e.logprob for e in one], [e.logprob for e in other], atol=1e-5)
    assert engine.stats.tokens_accepted > 0
    assert engine.stats.programs == 3 + 1  # and one that reads


# --- draft models -----------------------------------------------------------------------------------------------------


def test_a_draft_model_that_is_the_model_is_always_right(tokenizer):
    """With all settings, where prompts share pages, and after steps without a draft."""
    requests = [request(PROMPT, sampling, seed=i, max_new_tokens=18) for i, sampling in enumerate(MIXED)]
    expected = [run(batched(tokenizer, **ROOM), [one])[0] for one in requests]
    engine = batched(tokenizer, proposer=drafter(tokenizer, "modern"), **ROOM)
    for one, events in zip(requests, expected, strict=True):
        assert [tokens_of(found) for found in run(engine, [one])] == [tokens_of(events)]
    assert engine.stats.prefix_hits > 0
    assert engine.stats.tokens_proposed == engine.stats.tokens_accepted == 14 * len(MIXED)
    full = batched(tokenizer, proposer=drafter(tokenizer, "modern"), rows=2, cache_bytes=None)
    run(full, [dataclasses.replace(requests[0], max_new_tokens=6), requests[1]])
    assert full.stats.tokens_proposed == full.stats.tokens_accepted > 0


def test_a_draft_model_reads_the_prompts_that_are_read_together(tokenizer):
    requests = [request([*PROMPT, i], seed=i, max_new_tokens=6) for i in range(3)]
    options = {"rows": 4, "cache_bytes": None, "deterministic": False}
    engine = batched(tokenizer, proposer=drafter(tokenizer, "modern"), **options)
    found = run(engine, requests)
    assert engine.stats.tokens_proposed == engine.stats.tokens_accepted > 0
    assert [tokens_of(one) for one in found] == [tokens_of(one) for one in run(batched(tokenizer, **options), requests)]


def test_a_draft_model_of_another_vocabulary_size_and_context(tokenizer):
    """Padded vocabularies differ; what exceeds its context is decoded without it."""
    config = dataclasses.replace(CONFIGS["smallest"], context_length=16, vocab_size=END_OF_TEXT + 3)
    model = GPT(config)
    params = nn.unbox(init_params(model, jax.random.key(0)))
    requests = [request(PROMPT, sampling, seed=i, max_new_tokens=20) for i, sampling in enumerate(MIXED[:4])]
    expected = run(batched(tokenizer, **ROOM), requests)
    engine = batched(tokenizer, proposer=DraftProposer(model, params, tokenizer), **ROOM)
    assert run(engine, requests) == expected
    assert engine.stats.tokens_proposed > 0


def test_what_cannot_speculate_is_an_error(tokenizer):
    for number in (0, 8):
        with pytest.raises(UserError, match=f"speculative_tokens={number} must be in 1 to 7"):
            batched(tokenizer, proposer=NgramProposer(), speculative_tokens=number)
    with pytest.raises(UserError, match=r"draft model has another tokenizer \(257 tokens\) .* \(61\)"):
        batched(tokenizer, proposer=drafter(BytesTokenizer(), "dense"))
    with pytest.raises(UserError, match="attends to prompts in both directions"):
        drafter(tokenizer, "prefix")
    assert batched(tokenizer, proposer=drafter(tokenizer, "dense")).page_bytes == 2 * CHUNK * 4 * (2 * 8 + 2 * 16)
