"""Perplexity: denominators, and the tokens that are scored."""

import math

import numpy as np
import pytest

from gptjax.config import UserError
from gptjax.data.tokenizers import BytesTokenizer
from gptjax.evaluation.perplexity import perplexity_task
from gptjax.evaluation.scoring import Scorer, ScoringResult

from .conftest import WithoutEndOfText

DOCUMENTS = ["Friends, Romans, countrymen: lend me your ears.", "Naïve café", "x"]
SIZES = [47, 12, 1]  # bytes, which are the tokens of this tokenizer


def test_documents_are_scored_each_on_its_own(tiny):
    task = perplexity_task(DOCUMENTS, tiny.tokenizer, 24, stride=8)
    assert [text.tokens[0] for text in task.texts] == [256] * 3
    assert [len(text.tokens) - 1 for text in task.texts] == SIZES
    scores = Scorer(tiny.model, tiny.params).scores(task.requests)
    metrics = task.metrics(scores)
    nats = -sum(tiny.by_hand(request)[0] for request in task.requests)
    assert metrics["nats_per_token"].value == pytest.approx(nats / 60, rel=1e-5)
    assert metrics["perplexity"].value == pytest.approx(math.exp(nats / 60), rel=1e-4)
    assert metrics["bits_per_byte"].value == pytest.approx(nats / 60 / math.log(2), rel=1e-5)
    assert task.settings["tokens"] == task.settings["bytes"] == 60
    assert "word_perplexity" not in metrics


def test_the_default_stride_is_half_of_the_context():
    assert perplexity_task(DOCUMENTS, BytesTokenizer(), 24).settings["stride"] == 12


def test_concatenated_documents_are_one_stream_as_in_training():
    task = perplexity_task(DOCUMENTS[1:], BytesTokenizer(), 24, stride=24, concatenate=True)
    (text,) = task.texts
    assert text.tokens.tolist() == [256, *"Naïve café".encode(), 256, ord("x"), 256]
    assert task.settings["tokens"] == 15
    assert task.settings["bytes"] == 13
    assert task.settings["documents"] == 2
    assert task.metrics([ScoringResult(-30.0, 15, False)])["nats_per_token"][:3] == (2.0, None, 1)


def test_without_end_of_text_the_first_token_is_not_predicted():
    task = perplexity_task(["abc", "de", "f"], WithoutEndOfText(), 24)
    assert [request.tokens.tolist() for request in task.requests] == [[97, 98, 99], [100, 101]]
    assert task.settings["tokens"] == 3
    assert task.settings["first_token_scored"] is False
    with pytest.raises(UserError, match="no end-of-text"):
        perplexity_task(["abc"], WithoutEndOfText(), 24, concatenate=True)


def test_words_of_the_benchmark_are_those_before_the_detokenizer():
    """Two lines of 5 + 1 and 2 + 1 tokens, 27 bytes; the model reads less."""
    text = " a b @-@ c . \n d <unk> \n"
    task = perplexity_task([text], BytesTokenizer(), 24, detokenizer="wikitext")
    assert BytesTokenizer().decode(task.texts[0].tokens[1:]) == "a b-c.\nd <unk>\n"
    assert task.settings["original_tokens"] == 9
    assert task.settings["bytes"] == len(text)
    assert task.settings["detokenizer_restored_lines"] == 1.0
    metrics = task.metrics([ScoringResult(-18.0, 15, False)])
    assert metrics["word_perplexity"].value == pytest.approx(math.exp(18 / 9))
    assert metrics["bits_per_byte"].value == pytest.approx(18 / math.log(2) / len(text))
    assert metrics["perplexity"].value == pytest.approx(math.exp(18 / 15))


def test_standard_errors_are_those_of_many_draws():
    """The standard error matches the spread of estimates over documents sampled repeatedly from one distribution."""
    rng = np.random.default_rng(0)
    estimates, errors = [], []
    for _ in range(300):
        lengths = rng.integers(5, 30, 40)
        task = perplexity_task(["x" * int(n) for n in lengths], BytesTokenizer(), 32)
        nats = [float(rng.normal(2.0, 0.5) * n) for n in lengths]
        measured = task.metrics([ScoringResult(-v, int(n), False) for v, n in zip(nats, lengths, strict=True)])
        estimates.append(measured["nats_per_token"].value)
        errors.append(measured["nats_per_token"].stderr)
    assert np.mean(errors) == pytest.approx(np.std(estimates), rel=0.15)


@pytest.mark.parametrize("stride", [0, 25])
def test_a_stride_that_does_not_fit_is_an_error(stride):
    with pytest.raises(UserError, match=f"stride={stride} must be between 1 and the model's context of 24"):
        perplexity_task(DOCUMENTS, BytesTokenizer(), 24, stride=stride)


def test_limit_is_of_documents():
    assert perplexity_task(DOCUMENTS, BytesTokenizer(), 24, limit=2).settings["bytes"] == 59


def test_nothing_to_score_is_an_error():
    with pytest.raises(UserError, match="no token to score"):
        perplexity_task(["a"], WithoutEndOfText(), 24)
