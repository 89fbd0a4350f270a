"""Scores equal a direct computation from full logits, in batches of any composition."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from gptjax.config import UserError
from gptjax.data.tokenizers import BytesTokenizer
from gptjax.evaluation.scoring import Scorer, ScoringRequest, encode_pair, windows

from .conftest import WithoutEndOfText


def random_requests(number: int, longest: int = 40) -> list[ScoringRequest]:
    """Requests of every length, some longer than the context of 24."""
    rng = np.random.default_rng(1)
    requests = []
    for _ in range(number):
        length = int(rng.integers(2, longest + 1))
        scored = int(rng.integers(1, min(length - 1, 24) + 1))
        requests.append(ScoringRequest(rng.integers(0, 257, length).astype(np.int32), scored))
    return requests


def test_scores_equal_those_by_hand(tiny):
    requests = random_requests(30)
    scorer = Scorer(tiny.model, tiny.params, batch_size=2)
    assert any(map(scorer.is_truncated, requests))
    assert not all(map(scorer.is_truncated, requests))
    for request, score in zip(requests, scorer.scores(requests), strict=True):
        logprob, greedy = tiny.by_hand(request)
        assert score.logprob == pytest.approx(logprob, rel=1e-5)
        assert score.num_tokens == request.scored
        assert score.is_greedy == greedy


def test_greedy_is_every_token_the_likeliest(tiny):
    tokens = [5]
    for _ in range(6):
        tokens.append(int(tiny.logits(np.array(tokens))[-1].argmax()))
    whole = np.array(tokens, np.int32)
    wrong = whole.copy()
    wrong[3] = (wrong[3] + 1) % 257
    scores = Scorer(tiny.model, tiny.params).scores(
        [ScoringRequest(whole, 6), ScoringRequest(wrong, 6), ScoringRequest(whole[:3], 1)]
    )
    assert [score.is_greedy for score in scores] == [True, False, True]


@pytest.mark.parametrize("batch_size", [1, 3, 8])
def test_scores_do_not_depend_on_the_batch(tiny, batch_size):
    requests = random_requests(17)
    scorer = Scorer(tiny.model, tiny.params, batch_size=batch_size)
    alone = [scorer.scores([request])[0] for request in requests]
    together = scorer.scores(requests)
    backwards = scorer.scores(requests[::-1])[::-1]
    for scores in (together, backwards):
        assert [s.logprob for s in scores] == pytest.approx([s.logprob for s in alone], rel=1e-5)
        assert [s.is_greedy for s in scores] == [s.is_greedy for s in alone]


def test_the_plan_has_every_request_once_in_few_shapes(tiny):
    requests = random_requests(200)
    batches = Scorer(tiny.model, tiny.params, batch_size=4).plan(requests)
    assert sorted(index for batch in batches for index in batch.indices) == list(range(200))
    shapes = {(batch.length, batch.scored, batch.rows) for batch in batches}
    assert shapes == {(24, 24, 4), (24, 16, 4), (16, 16, 4)}
    for batch in batches:
        assert len(batch.indices) <= batch.rows
        assert all(requests[i].scored <= batch.scored for i in batch.indices)
        assert all(min(len(requests[i].tokens) - 1, 24) <= batch.length for i in batch.indices)


def test_shorter_requests_share_a_batch_of_as_many_positions(tiny):
    scorer = Scorer(tiny.model, tiny.params, batch_size=2)
    scorer.context_length = 128
    (batch,) = scorer.plan([ScoringRequest(np.zeros(9, np.int32), 1)] * 16)
    assert (batch.rows, batch.length) == (16, 16)


def test_a_continuation_longer_than_the_context_is_an_error(tiny):
    scorer = Scorer(tiny.model, tiny.params)
    scorer.plan([ScoringRequest(np.zeros(25, np.int32), 24)])
    with pytest.raises(UserError, match="continuation of 25 tokens is longer than the model's context of 24"):
        scorer.plan([ScoringRequest(np.zeros(26, np.int32), 25)])


def test_the_fingerprint_is_that_of_the_weights(tiny):
    print_ = Scorer(tiny.model, tiny.params).fingerprint()
    assert Scorer(tiny.model, tiny.params, batch_size=3).fingerprint() == print_
    changed = {**tiny.params, "final_norm": {**tiny.params["final_norm"]}}
    changed["final_norm"]["scale"] = changed["final_norm"]["scale"].at[3].add(1e-6)
    assert Scorer(tiny.model, changed).fingerprint() != print_


# --- windows ----------------------------------------------------------------------------------------------------------


@given(length=st.integers(0, 70), context=st.integers(1, 20), data=st.data())
def test_every_token_is_scored_once_with_the_context_promised(length, context, data):
    stride = data.draw(st.integers(1, context))
    text = np.arange(length, dtype=np.int32)
    found = list(windows(text, context, stride))
    scored = [int(token) for window in found for token in window.tokens[-window.scored :]]
    assert scored == list(range(1, length))
    for number, (tokens, count) in enumerate(found):
        first = int(tokens[-count])
        seen = len(tokens) - count  # before the first scored token, and no more than the model has positions for
        assert len(tokens) - 1 <= context
        assert list(tokens) == list(range(first - seen, first + count))
        assert seen >= min(first, context - stride + 1)
        assert count == min(context if number == 0 else stride, length - first)


@pytest.mark.parametrize("stride", [1, 7, 12, 24])
def test_windows_give_the_likelihoods_by_hand(tiny, stride):
    text = np.random.default_rng(2).integers(0, 257, 61).astype(np.int32)
    expected = tiny.by_hand(ScoringRequest(text[:25], 24))[0]
    for i in range(25, 61):  # one at a time, each after the text from where the window that scores it begins
        end = min(25 + -(-(i - 24) // stride) * stride, 61)
        expected += tiny.by_hand(ScoringRequest(text[end - 25 : i + 1], 1))[0]
    scores = Scorer(tiny.model, tiny.params).scores(list(windows(text, 24, stride)))
    assert sum(score.num_tokens for score in scores) == 60
    assert sum(score.logprob for score in scores) == pytest.approx(expected, rel=1e-5)


# --- text to requests -------------------------------------------------------------------------------------------------


def pair(context: str, continuation: str) -> tuple[str, str]:
    tokenizer = BytesTokenizer()
    tokens, scored = encode_pair(tokenizer, context, continuation)
    return tokenizer.decode(tokens[:-scored]), tokenizer.decode(tokens[-scored:])


def test_white_space_goes_to_the_continuation():
    assert pair("Bob went", " home") == ("Bob went", " home")
    assert pair("Bob went ", "home") == ("Bob went", " home")
    assert pair("Q: who?\nA: ", "me") == ("Q: who?\nA:", " me")


def test_an_empty_context_is_end_of_text():
    assert pair("", "home") == ("<|endoftext|>", "home")
    assert pair(" ", "home") == ("<|endoftext|>", " home")
    with pytest.raises(UserError, match="no end-of-text"):
        encode_pair(WithoutEndOfText(), "", "home")
    assert encode_pair(WithoutEndOfText(), "a", "b").scored == 1


def test_an_empty_continuation_is_an_error():
    with pytest.raises(UserError, match=r"nothing to score after 'Bob'"):
        encode_pair(BytesTokenizer(), "Bob", "")


class Merging(BytesTokenizer):
    """Has a token, 256, for "ab"."""

    def encode(self, text):
        merged = []
        for byte in text.encode():
            if byte == ord("b") and merged[-1:] == [ord("a")]:
                merged[-1] = 256
            else:
                merged.append(byte)
        return np.array(merged, np.int32)


def test_tokens_are_those_of_the_whole_text():
    """A token may cover the border: then it is the continuation's, for the context alone does not end in it."""
    tokens, scored = encode_pair(Merging(), "xa", "b")
    assert (tokens.tolist(), scored) == ([ord("x"), 256], 1)
