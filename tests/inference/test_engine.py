"""The engine equals slow, plain generation: one prompt at a time, with the whole forward pass for every token."""

import numpy as np
import pytest

from gptjax.config import UserError
from gptjax.inference import programs as programs_module
from gptjax.inference.sampling import Sampling
from gptjax.parallel.platforms import override_defaults

CONTEXT = 32
GREEDY = Sampling(temperature=0)
MODELS = ["dense", "banded", "post", "gpt_neo"]
NEW = 12  # tokens


@pytest.fixture
def engine(engine_of):
    return engine_of("banded")


@pytest.fixture(scope="module")
def greedy(engine_of, prompts) -> list[list[int]]:
    """Tokens of the prompts' greedy completions, the end of the document ignored."""
    return tokens_of(engine_of("banded").generate(prompts, NEW, GREEDY, ignore_end_of_text=True))


def tokens_of(completions) -> list[list[int]]:
    return [completion.tokens.tolist() for completion in completions]


def log_softmax(logits_TV: np.ndarray) -> np.ndarray:
    shifted_TV = logits_TV.astype(np.float64) - logits_TV.max(axis=-1, keepdims=True)
    return shifted_TV - np.log(np.exp(shifted_TV).sum(axis=-1, keepdims=True))


# --- tokens -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", MODELS)
def test_greedy_tokens_are_the_likeliest_of_the_whole_forward_pass(engine_of, logits_of, prompts, name):
    """To the last position of the context."""
    new = CONTEXT - max(map(len, prompts))
    for prompt, completion in zip(
        prompts, engine_of(name).generate(prompts, new, GREEDY, ignore_end_of_text=True), strict=True
    ):
        # Each token is the likeliest after those before it, which are then what slow generation would have given.
        logprob_TV = log_softmax(logits_of(name, [*prompt, *completion.tokens]))[len(prompt) - 1 : -1]
        assert completion.tokens.tolist() == logprob_TV.argmax(axis=-1).tolist()
        assert len(set(completion.tokens.tolist())) > 4, "a text that repeats itself shows little"
        np.testing.assert_allclose(completion.logprobs, logprob_TV.max(axis=-1), atol=1e-4)
        assert completion.finish_reason == "length"
        assert (completion.tokens.dtype, completion.logprobs.dtype) == (np.int32, np.float32)


def test_logprobs_are_of_the_model_itself_whatever_draws_the_tokens(engine, logits_of, prompts):
    sampling = Sampling(temperature=1.7, top_k=20, top_p=0.95, min_p=0.01, repetition_penalty=1.3)
    completions = engine.generate(prompts, NEW, sampling, ignore_end_of_text=True)
    for prompt, completion in zip(prompts, completions, strict=True):
        logprob_TV = log_softmax(logits_of("banded", [*prompt, *completion.tokens]))[len(prompt) - 1 : -1]
        np.testing.assert_allclose(completion.logprobs, logprob_TV[np.arange(NEW), completion.tokens], atol=1e-4)


def test_a_completion_does_not_depend_on_the_prompts_beside_it(engine, prompts):
    sampling = Sampling(temperature=3.0)
    together = tokens_of(engine.generate(prompts, NEW, sampling, seeds=[3, 4, 5]))
    assert tokens_of(engine.generate(prompts[::-1], NEW, sampling, seeds=[5, 4, 3])) == together[::-1]
    assert tokens_of(engine.generate([prompts[1]], NEW, sampling, seeds=4)) == [together[1]]


def test_one_row_decoded_as_two_gives_the_same_tokens(engine_of, prompts):
    """As on a GPU, in bfloat16."""
    engine, float32 = engine_of("banded", "bfloat16"), engine_of("banded")
    (alone,) = engine.generate(prompts[:1], NEW, seeds=5)
    assert engine.rows(1) == 1
    with override_defaults("cpu", min_decode_rows=2):
        assert (engine.rows(1), engine.rows(2), float32.rows(1)) == (2, 2, 1)
        (as_two,) = engine.generate(prompts[:1], NEW, seeds=5)
    np.testing.assert_array_equal(as_two.tokens, alone.tokens)
    np.testing.assert_allclose(as_two.logprobs, alone.logprobs, atol=0.05)


def test_seeds(engine, prompts):
    sampling = Sampling(temperature=3.0)
    first = tokens_of(engine.generate(prompts, NEW, sampling, seeds=7))
    assert tokens_of(engine.generate(prompts, NEW, sampling, seeds=[7, 8, 9])) == first
    others = tokens_of(engine.generate(prompts, NEW, sampling, seeds=8))
    assert all(one != other for one, other in zip(first, others, strict=True))
    same = tokens_of(engine.generate([prompts[1]] * 3, NEW, sampling, seeds=[1, 1, 2]))
    assert same[0] == same[1] != same[2]


def test_a_seed_draws_anew_at_every_step(engine, prompts):
    """Keys that forgot the token's number would draw the same of equally likely tokens again and again."""
    completions = engine.generate(prompts, NEW, Sampling(temperature=1e6), ignore_end_of_text=True)
    assert min(len(set(tokens)) for tokens in tokens_of(completions)) > NEW // 2


# --- where a completion ends ------------------------------------------------------------------------------------------


def test_end_of_text_ends_a_completion_and_is_no_part_of_it(engine, greedy, prompts, monkeypatch):
    end = greedy[1][5]
    monkeypatch.setattr(engine.tokenizer, "end_of_text", end)
    assert any(end not in tokens for tokens in greedy), "all end: nothing shows that the others go on"
    for tokens, completion in zip(greedy, engine.generate(prompts, NEW, GREEDY), strict=True):
        ends = end in tokens
        tokens = tokens[: tokens.index(end)] if ends else tokens
        assert completion.tokens.tolist() == tokens
        assert len(completion.logprobs) == len(tokens)
        assert completion.text == engine.tokenizer.decode(tokens)
        assert completion.finish_reason == ("end_of_text" if ends else "length")
    assert tokens_of(engine.generate(prompts, NEW, GREEDY, ignore_end_of_text=True)) == greedy


def test_end_tokens_end_a_completion_and_are_no_part_of_it(engine, greedy, prompts, monkeypatch):
    """As they come first, be they end-of-text too, or an end of text that is ignored."""
    one = next(token for token in greedy[1][2:] if token not in greedy[2])
    other = next(token for token in greedy[2][2:] if token not in greedy[1])
    for end_of_text, ignored in ((60, True), (one, False), (one, True)):
        monkeypatch.setattr(engine.tokenizer, "end_of_text", end_of_text)
        pieces: list[str] = []
        completions = engine.generate(
            prompts[1:],
            NEW,
            GREEDY,
            end_tokens=[other, np.int32(one)],
            ignore_end_of_text=ignored,
            on_text=lambda i, piece: pieces.append(piece) if i == 0 else None,  # noqa: B023
        )
        for tokens, completion in zip(greedy[1:], completions, strict=True):
            tokens = tokens[: min(tokens.index(end) for end in (one, other) if end in tokens)]
            assert completion.tokens.tolist() == tokens
            assert len(completion.logprobs) == len(tokens)
            assert completion.text == engine.tokenizer.decode(tokens)
            assert completion.finish_reason == "end_of_turn"
        assert "".join(pieces) == completions[0].text
    completions = engine.generate(prompts[1:], NEW, GREEDY, end_tokens=[other])
    assert {completion.finish_reason for completion in completions} == {"end_of_text", "end_of_turn"}


@pytest.mark.parametrize("token", [-1, 61])
def test_an_end_token_that_the_model_does_not_have_is_an_error(engine, token):
    with pytest.raises(UserError, match=rf"end token {token} is outside of the model's vocabulary of 61"):
        engine.generate([[3]], 1, end_tokens=[4, token])


def test_tokens_behind_the_tokenizers_vocabulary_have_no_text(engine, greedy, prompts, pieces, monkeypatch):
    """A model may have some: for special tokens, or to round up."""
    behind = sorted(set(greedy[1]))[len(set(greedy[1])) // 2]
    letters = pieces([bytes([65 + i]) for i in range(behind)])
    monkeypatch.setattr(engine, "tokenizer", letters)
    streamed: list[str] = []
    for on_text in (None, lambda _, piece: streamed.append(piece)):
        (completion,) = engine.generate([prompts[1]], NEW, GREEDY, on_text=on_text)
        assert completion.tokens.tolist() == greedy[1]
        assert completion.text == "".join(chr(65 + token) for token in greedy[1] if token < behind)
    assert 0 < len(completion.text) < NEW
    assert "".join(streamed) == completion.text


def test_stop_strings_end_the_text(engine, greedy, prompts):
    texts = [engine.tokenizer.decode(tokens) for tokens in greedy]
    stop = texts[1][5:10]  # of more than one token
    completions = engine.generate(prompts, NEW, GREEDY, stop=["zz", stop], ignore_end_of_text=True)
    assert completions[1].finish_reason == "stop"
    for text, tokens, completion in zip(texts, greedy, completions, strict=True):
        assert completion.text == text.partition(stop)[0]
        assert completion.finish_reason == ("stop" if stop in text else "length")
        assert completion.tokens.tolist() == tokens[: len(completion.tokens)]
        assert len(completion.logprobs) == len(completion.tokens)
        if stop in text:  # with the token that completed it, and no more
            assert stop in engine.tokenizer.decode(completion.tokens)
            assert stop not in engine.tokenizer.decode(completion.tokens[:-1])
        else:
            assert len(completion.tokens) == NEW


@pytest.mark.parametrize("stop", [(), ("a", "zz")], ids=["no stop", "stop"])
def test_pieces_of_text_join_to_the_text(engine, prompts, stop):
    pieces: list[list[str]] = [[] for _ in prompts]
    completions = engine.generate(
        prompts, NEW, Sampling(temperature=3.0), stop=stop, on_text=lambda i, piece: pieces[i].append(piece)
    )
    assert ["".join(joined) for joined in pieces] == [completion.text for completion in completions]
    assert all(all(joined) for joined in pieces), "an empty piece is no news"
    assert max(map(len, pieces)) > 1, "it came all at once"


def test_max_new_tokens(engine, greedy, prompts):
    for number in (1, 2, 7):
        completions = engine.generate(prompts, number, GREEDY, ignore_end_of_text=True)
        assert tokens_of(completions) == [tokens[:number] for tokens in greedy]


# --- the context ------------------------------------------------------------------------------------------------------


def test_more_than_the_context_is_an_error(engine, prompts):
    with pytest.raises(UserError, match=r"a prompt of 17 tokens and max_new_tokens=16 exceed .* context of 32 tokens"):
        engine.generate(prompts, CONTEXT - 16, GREEDY)


def test_a_context_that_slides_goes_on_from_its_last_half(engine, logits_of, prompts):
    """Under a repetition penalty, which still counts what has left the context."""
    penalty, new = 1.5, 40
    rng = np.random.default_rng(1)
    texts = [*prompts, rng.integers(0, 60, CONTEXT - 1), rng.integers(0, 60, 2 * CONTEXT)]
    sampling = Sampling(temperature=0, repetition_penalty=penalty)
    completions = engine.generate(texts, new, sampling, overflow="slide", ignore_end_of_text=True)
    for text, completion in zip(texts, completions, strict=True):
        window, seen = text.tolist(), text.tolist()
        for token in completion.tokens.tolist():
            if len(window) > CONTEXT:
                window = window[-CONTEXT // 2 :]
            logits_V = logits_of("banded", window)[-1].copy()
            logits_V[seen] *= np.where(logits_V[seen] > 0, 1 / penalty, penalty)
            assert token == logits_V.argmax()
            window.append(token)
            seen.append(token)


# --- odd prompts ------------------------------------------------------------------------------------------------------


def test_an_empty_prompt_begins_a_document(engine, prompts, monkeypatch):
    start = engine.tokenizer.end_of_text
    by_hand = engine.generate([[start], [start], prompts[1]], NEW, GREEDY)
    assert tokens_of(engine.generate([[], "", prompts[1]], NEW, GREEDY)) == tokens_of(by_hand)
    monkeypatch.setattr(engine.tokenizer, "end_of_text", None)
    with pytest.raises(UserError, match="no end-of-text token to start from"):
        engine.generate([""], 1)


@pytest.mark.parametrize("token", [-1, 61, 2**32 + 5])
def test_a_token_outside_of_the_vocabulary_is_an_error(engine, token):
    with pytest.raises(UserError, match="outside of the model's vocabulary of 61"):
        engine.generate([[3, token]], 1)


def test_no_prompts(engine):
    assert engine.generate([], 5) == []


def test_a_text_and_its_tokens_are_one_prompt(engine, prompts, pieces, monkeypatch):
    monkeypatch.setattr(engine, "tokenizer", pieces([bytes([65 + i]) for i in range(61)]))
    tokens = tokens_of(engine.generate(["CAB", [2, 0, 1], prompts[1]], NEW, GREEDY))
    assert tokens[0] == tokens[1]


# --- compilations -----------------------------------------------------------------------------------------------------


def test_what_compiles_again_and_what_does_not(engine_of):
    def compiles(length: int, number: int, sampling: Sampling, prompts: int = 3) -> tuple[int, int]:
        programs = programs_module.prefill_prompts, programs_module.decode_tokens
        before = [program._cache_size() for program in programs]
        engine_of("smallest").generate([np.zeros(length, int)] * prompts, number, sampling, ignore_end_of_text=True)
        return tuple(program._cache_size() - size for program, size in zip(programs, before, strict=True))

    base = Sampling(0.8, top_k=7, top_p=0.9, min_p=0.05, repetition_penalty=1.1)
    assert compiles(3, 9, base) == (1, 1)
    for length in (1, 2, 4, 7):  # of one bucket, as is a cache of up to 16 positions
        assert compiles(length, 9, base) == (0, 0)
    assert compiles(3, 13, base) == (0, 0)
    assert compiles(3, 9, base, prompts=4) == (0, 0)  # as many rows as for 3
    assert compiles(3, 9, Sampling(1.3, top_k=7, top_p=0.5, min_p=0.2, repetition_penalty=1.5)) == (0, 0)
    assert compiles(3, 14, base) == (1, 1)
    assert compiles(3, 9, Sampling(0.8, top_k=8, top_p=0.9, min_p=0.05, repetition_penalty=1.1)) == (1, 1)


def test_seeds_are_as_many_as_prompts(engine, prompts):
    with pytest.raises(UserError, match="3 seeds for 2 prompts"):
        engine.generate(prompts[:2], 1, seeds=[1, 2, 3])
    counted_up = engine.generate([prompts[0]] * 2, 4, Sampling(1.5), seeds=np.int64(5), ignore_end_of_text=True)
    given = engine.generate([prompts[0]] * 2, 4, Sampling(1.5), seeds=[5, 6], ignore_end_of_text=True)
    assert tokens_of(counted_up) == tokens_of(given)
    assert tokens_of(given)[0] != tokens_of(given)[1]


@pytest.mark.parametrize(
    ("setting", "value"), [("frequency_penalty", 0.5), ("presence_penalty", 1.0), ("logit_bias", ((3, 1.0),))]
)
def test_a_setting_of_continuous_batching_is_refused(engine, prompts, setting, value):
    with pytest.raises(UserError, match=f"{setting} is a setting of gptjax.inference.batching"):
        engine.generate(prompts, 1, Sampling(**{setting: value}))
    bad = ((3, float("inf")),) if setting == "logit_bias" else float("nan")
    with pytest.raises(UserError, match=f"{setting}=.* must be finite"):
        Sampling(**{setting: bad})
