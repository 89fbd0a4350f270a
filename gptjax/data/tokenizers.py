"""Tokenizers: OpenAI's published vocabularies, bytes, tokenizer.json files, or a BPE trained on the corpus.

The algorithms are those of tiktoken and Hugging Face tokenizers. This module defines a common interface, and opens,
trains, saves, loads and fingerprints tokenizers.
"""

import abc
import copy
import hashlib
import json
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, Self

import numpy as np
import numpy.typing as npt
import tiktoken
import tokenizers
from tokenizers import models

from gptjax import files
from gptjax.config import DataConfig, UserError
from gptjax.data import tokenizer_check
from gptjax.data.prepared_directories import save_whole
from gptjax.data.tokenizer_check import LibraryErrors
from gptjax.data.vocabularies import END_OF_TEXT, VOCABULARIES, openai_encoding, train_bpe, train_gpt1_bpe
from gptjax.files import expand, local_directory, write_whole

_FORMS = "gpt2, cl100k_base, o200k_base, o200k_harmony, bytes, bpe:SIZE, gpt1_bpe:SIZE, json:PATH"
_ALIASES = {"cl100k": "cl100k_base"}
_MIN_TRAINED_SIZE = 300  # the 256 bytes, end-of-text, and some merges
# Names of the end-of-text token in tokenizer.json files, the most likely first.
_END_OF_TEXT_NAMES = (END_OF_TEXT, "</s>", "<eos>", "<|end_of_text|>", "<|im_end|>", "[SEP]")

_VOCABULARY_SIZES = {
    "gpt2": 50_257,
    "cl100k_base": 100_277,
    "o200k_base": 200_019,
    "o200k_harmony": 201_088,
    "bytes": 257,
}


class Tokenizer(abc.ABC):
    """Encodes text to ids in [0, vocab_size), and decodes it.

    Attributes:
      vocab_size: exclusive upper bound of ids; a few ids may be unassigned.
      end_of_text: id of the token that separates documents. No text encodes to it: "<|endoftext|>" in a corpus is plain
        text. None: there is no such token, as in GPT-1's original vocabulary; training then is not possible.
      ends: ids that end a generated text, `end_of_text` first; more than one only for some imported models.
      added: names of special tokens appended to the vocabulary, the last ids of it. They decode to no text.
    """

    vocab_size: int
    end_of_text: int | None
    added: tuple[str, ...] = ()
    _ends: tuple[int, ...] = ()  # set if the ends are given and are not end_of_text alone

    @property
    def ends(self) -> tuple[int, ...]:
        return self._ends or (() if self.end_of_text is None else (self.end_of_text,))

    def with_ends(self, ends: Sequence[int]) -> "Tokenizer":
        """Returns a copy in which each token of `ends` ends a text; the first becomes `end_of_text`.

        Raises:
          UserError: an id is not that of a token.
        """
        if tuple(ends) == self.ends:
            return self
        if missing := [token for token in ends if not self.has_token(token)]:
            raise UserError(f"no token has the id {missing[0]}, which is declared as an end of text")
        found = copy.copy(self)
        found.end_of_text, found._ends = ends[0], tuple(ends)
        return found

    def with_added(self, names: Sequence[str]) -> Self:
        """Returns a copy with special tokens appended to the vocabulary, and to `added`."""
        found = copy.copy(self)
        found.vocab_size, found.added = self.vocab_size + len(names), (*self.added, *names)
        return found

    def id_of(self, name: str) -> int | None:
        """Returns the id of the token `name`, special tokens included; None if there is none."""
        return self.vocab_size - len(self.added) + self.added.index(name) if name in self.added else None

    def has_token(self, token: int) -> bool:
        """Whether `token` is an id of the vocabulary."""
        return 0 <= token < self.vocab_size

    @abc.abstractmethod
    def encode(self, text: str) -> npt.NDArray[np.int32]:
        """Encodes `text` to ids, int32 (T,). Thread-safe."""

    def decode(self, ids: npt.ArrayLike) -> str:
        """Decodes integer `ids` of any shape; invalid UTF-8 becomes U+FFFD, unknown ids are skipped."""
        array = np.asarray(ids, dtype=np.int64).ravel()
        return self._decode(array[(array >= 0) & (array < self.vocab_size - len(self.added))].tolist())

    @abc.abstractmethod
    def _decode(self, ids: list[int]) -> str: ...

    @abc.abstractmethod
    def _spec(self) -> dict[str, str]:
        """Returns what `load` needs to find the vocabulary."""

    @property
    def _whole_spec(self) -> dict[str, Any]:
        """Content of spec.json; has "ends" only if they differ from those of the vocabulary, and "added" if any."""
        lists = {"ends": list(self._ends), "added": list(self.added)}
        return self._spec() | {name: value for name, value in lists.items() if value}

    @property
    def fingerprint(self) -> str:
        """Hash of the tokenizer, 16 hex digits, unchanged by `save` and `load`."""
        return _hash(self._whole_spec)

    @property
    def encoding_fingerprint(self) -> str:
        """Hash of all that determines the ids of a text, 16 hex digits: the fingerprint without `added`."""
        return _hash({name: value for name, value in self._whole_spec.items() if name != "added"})

    def save(self, directory: Path) -> None:
        """Writes the files that `load` reads into `directory`, creating it if necessary."""
        directory.mkdir(parents=True, exist_ok=True)
        write_whole(directory / "spec.json", json.dumps(self._whole_spec) + "\n")


class BytesTokenizer(Tokenizer):
    """One token per byte of UTF-8, and end-of-text."""

    vocab_size = 257
    end_of_text = 256

    def encode(self, text: str) -> npt.NDArray[np.int32]:
        return np.frombuffer(_encodable(text).encode(), dtype=np.uint8).astype(np.int32)

    def _decode(self, ids: list[int]) -> str:
        return b"".join(bytes([i]) if i < 256 else END_OF_TEXT.encode() for i in ids).decode(errors="replace")

    def _spec(self) -> dict[str, str]:
        return {"kind": "bytes"}


class TiktokenTokenizer(Tokenizer):
    """Byte-level BPE published by OpenAI: gpt2, cl100k_base (GPT-3.5, GPT-4), o200k_base (GPT-4o) or o200k_harmony
    (gpt-oss).
    """

    def __init__(self, encoding: tiktoken.Encoding) -> None:
        self.encoding = encoding
        self.vocab_size = encoding.n_vocab
        self.end_of_text = encoding.eot_token

    def encode(self, text: str) -> npt.NDArray[np.int32]:
        return np.array(self.encoding.encode_ordinary(text), dtype=np.int32)

    def _decode(self, ids: list[int]) -> str:
        try:
            raw = self.encoding.decode_bytes(ids)
        except KeyError:
            raw = b"".join(map(self._piece, ids))
        return raw.decode(errors="replace")

    def id_of(self, name: str) -> int | None:
        special = self.encoding.encode_single_token(name) if name in self.encoding.special_tokens_set else None
        return super().id_of(name) if special is None else special

    def _piece(self, token: int) -> bytes:
        try:
            return self.encoding.decode_single_token_bytes(token)
        except KeyError:  # cl100k_base and o200k_base leave ids between their special tokens unassigned
            return b""

    def _spec(self) -> dict[str, str]:
        return {"kind": "tiktoken", "name": self.encoding.name}


class HuggingFaceTokenizer(Tokenizer):
    """Tokenizer of a tokenizer.json file.

    Args:
      content: of the file.
      ends: ids that end a text, as in `with_ends`. Empty: the first token with a usual name, if there is one.

    Raises:
      UserError: the content is damaged, its vocabulary is empty or has too large an id, or an id of `ends` is not that
        of a token.
    """

    def __init__(self, content: str, ends: Sequence[int] = ()) -> None:
        with LibraryErrors("not a tokenizer.json"):
            tokenizer = tokenizers.Tokenizer.from_str(content)
        vocabulary = tokenizer.get_vocab()
        guess = next((name for name in _END_OF_TEXT_NAMES if name in vocabulary), None)
        name_of = {token: name for name, token in vocabulary.items()}
        if missing := [token for token in ends if token not in name_of]:
            raise UserError(f"no token has the id {missing[0]}, which is declared as an end of text")
        names = [name_of[token] for token in ends] or ([] if guess is None else [guess])
        # Special tokens are encoded as plain text, so the ends must be special tokens, which not every file declares.
        tokenizer.add_special_tokens(names)
        tokenizer.encode_special_tokens = True
        # Encoding must be deterministic and complete.
        tokenizer.no_truncation()
        tokenizer.no_padding()
        if isinstance(tokenizer.model, models.BPE):
            tokenizer.model.dropout = None
        self.content = content
        self._tokenizer = tokenizer
        self.vocab_size = tokenizer_check.vocab_size(vocabulary)
        self.end_of_text = vocabulary[names[0]] if names else None
        self._ends = () if not ends or names == [guess] else tuple(ends)

    def with_ends(self, ends: Sequence[int]) -> "HuggingFaceTokenizer":
        return HuggingFaceTokenizer(self.content, ends).with_added(self.added)

    def has_token(self, token: int) -> bool:
        return super().has_token(token) and self._tokenizer.id_to_token(token) is not None

    def id_of(self, name: str) -> int | None:
        return super().id_of(name) if name in self.added else self._tokenizer.token_to_id(name)

    def encode(self, text: str) -> npt.NDArray[np.int32]:
        # Only the batch function skips the offsets of tokens in the text, which would take a third longer.
        with LibraryErrors("the tokenizer cannot encode a text"):
            (encoding,) = self._tokenizer.encode_batch_fast([_encodable(text)], add_special_tokens=False)
        return np.array(encoding.ids, dtype=np.int32)

    def _decode(self, ids: list[int]) -> str:
        with LibraryErrors("the tokenizer cannot decode its ids"):
            return self._tokenizer.decode(ids, skip_special_tokens=False)

    def _spec(self) -> dict[str, str]:
        return {"kind": "huggingface", "sha256": hashlib.sha256(self.content.encode()).hexdigest()}

    def save(self, directory: Path) -> None:
        super().save(directory)
        write_whole(directory / "tokenizer.json", self.content)


def _encodable(text: str) -> str:
    """Replaces unpaired surrogates, which a Python string may hold but UTF-8 cannot, by U+FFFD."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    return text


# --- by name, by training, from a directory ---------------------------------------------------------------------------


def check_spec(spec: str) -> None:
    """Raises UserError if `spec` is not in a form of `get_tokenizer`, or names a file that does not exist."""
    kind, _, argument = _ALIASES.get(spec, spec).partition(":")
    if kind in ("bpe", "gpt1_bpe"):
        if not argument.isdecimal() or int(argument) < _MIN_TRAINED_SIZE:
            raise UserError(f"tokenizer {spec!r}: SIZE must be a whole number of at least {_MIN_TRAINED_SIZE}")
    elif kind == "json":
        if not expand(argument).is_file():
            raise UserError(f"tokenizer {spec!r}: there is no such file; PATH is that of a tokenizer.json")
    elif kind not in (*VOCABULARIES, "bytes") or argument:
        raise UserError(f"unknown tokenizer {spec!r}: known tokenizers are {_FORMS}")


def vocab_size(spec: str) -> int:
    """Returns the (for trained ones maximum) vocabulary size; raises as `check_spec` and `read_json` do."""
    check_spec(spec)
    kind, _, argument = _ALIASES.get(spec, spec).partition(":")
    if kind == "json":
        return read_json(expand(argument)).vocab_size
    return _VOCABULARY_SIZES[kind] if kind in _VOCABULARY_SIZES else int(argument)


def get_tokenizer(
    spec: str, *, train_documents: Callable[[], Iterable[str]], corpus_fingerprint: str, cache_dir: Path
) -> Tokenizer:
    """Opens the tokenizer of `DataConfig.tokenizer`, training it if necessary.

    Args:
      spec: gpt2 | cl100k_base | o200k_base | o200k_harmony | bytes | bpe:SIZE (byte-level, as in GPT-2) |
        gpt1_bpe:SIZE (as in GPT-1: lower-cased words, so decoding loses case and spacing) | json:PATH (a
        tokenizer.json).
      train_documents: returns the corpus; called only to train bpe or gpt1_bpe that are not in `cache_dir`.
      corpus_fingerprint: identifies the corpus; with `spec` it is the key of the trained tokenizer.
      cache_dir: directory of trained tokenizers and OpenAI's vocabularies.

    Raises:
      UserError: see `check_spec`; or a file is damaged or has no end-of-text token, or a vocabulary is neither
        installed nor can be downloaded.
    """
    check_spec(spec)
    kind, _, argument = _ALIASES.get(spec, spec).partition(":")
    if kind == "bytes":
        return BytesTokenizer()
    if kind == "json":
        tokenizer = read_json(path := expand(argument))
        if tokenizer.end_of_text is None:
            raise UserError(
                f"cannot load the tokenizer {path}: the tokenizer has no end-of-text token: add one of "
                f"{', '.join(_END_OF_TEXT_NAMES)}"
            )
        return tokenizer
    if kind in VOCABULARIES:
        return TiktokenTokenizer(openai_encoding(kind, local_directory(cache_dir)))
    directory = cache_dir / "tokenizers" / _hash([spec, corpus_fingerprint])
    if not (directory / "spec.json").exists():
        print(f"training the tokenizer {spec}, to be cached in {directory}", file=sys.stderr)
        train = train_gpt1_bpe if kind == "gpt1_bpe" else train_bpe
        tokenizer = HuggingFaceTokenizer(train(train_documents(), int(argument)).to_str())
        save_whole(tokenizer.save, directory)
    return load(directory, cache_dir)


def load(directory: Path, cache_dir: Path | None = None) -> Tokenizer:
    """Loads the tokenizer that `save` wrote into `directory`.

    Args:
      directory: has spec.json, and for some kinds tokenizer.json.
      cache_dir: directory of OpenAI's vocabularies; None: the default of `DataConfig`.

    Raises:
      UserError: files are missing or damaged, or a vocabulary is neither installed nor can be downloaded.
    """
    try:
        spec = files.read_json(directory / "spec.json")
        kind, name = str(spec["kind"]), str(spec.get("name"))
        ends, added = _ends_in(spec), list(map(str, spec.get("added", ())))
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise UserError(f"no tokenizer in {directory}: spec.json is missing or damaged ({error!r})") from None
    if kind == "bytes":
        return (BytesTokenizer().with_ends(ends) if ends else BytesTokenizer()).with_added(added)
    if kind == "tiktoken" and name in VOCABULARIES:
        found = TiktokenTokenizer(openai_encoding(name, local_directory(cache_dir or expand(DataConfig.cache_dir))))
        return (found.with_ends(ends) if ends else found).with_added(added)
    if kind == "huggingface":
        tokenizer = read_json(directory / "tokenizer.json", ends).with_added(added)
        if tokenizer.fingerprint != _hash(spec):
            raise UserError(f"{directory}/tokenizer.json does not match the hash in spec.json: restore it")
        return tokenizer
    raise UserError(f"{directory}/spec.json names an unknown tokenizer: {spec}")


def read_json(path: Path, ends: Sequence[int] | None = None) -> HuggingFaceTokenizer:
    """Reads a tokenizer.json, with or without an end-of-text token.

    Args:
      path: of the file.
      ends: as in `HuggingFaceTokenizer`. None: for a file called tokenizer.json, those declared by a spec.json from
        `save` or a tokenizer_config.json in its directory.

    Raises:
      UserError: the file is damaged.
    """
    try:
        tokenizer = HuggingFaceTokenizer(tokenizer_check.read(path), ends or ())
    except (UserError, OSError, ValueError) as error:
        raise UserError(f"cannot load the tokenizer {path}: {error}") from None
    if ends is not None or path.name != "tokenizer.json":
        return tokenizer
    saved = _json_object(path.parent / "spec.json")
    if saved.get("kind") == "huggingface":
        try:
            return read_json(path, _ends_in(saved))
        except (TypeError, ValueError):
            raise UserError(f"cannot load the tokenizer {path}: spec.json in its directory is damaged") from None
    return with_declared_end(tokenizer, path.parent)


def _ends_in(spec: dict[str, Any]) -> tuple[int, ...]:
    return tuple(int(token) for token in spec.get("ends", ()))


def with_declared_end(tokenizer: HuggingFaceTokenizer, directory: Path) -> HuggingFaceTokenizer:
    """Sets the end of text to the eos_token of tokenizer_config.json in `directory`, if the tokenizer has it."""
    declared = _json_object(directory / "tokenizer_config.json").get("eos_token")
    name = declared.get("content") if isinstance(declared, dict) else declared  # a dict: the token and its properties
    token = tokenizer.id_of(name) if isinstance(name, str) else None
    return tokenizer if token is None else tokenizer.with_ends([token])


def _json_object(path: Path) -> dict[str, Any]:
    """Reads a JSON object from a file, {} if there is none; raises UserError if it is damaged."""
    try:
        found = files.read_json(path)
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        raise UserError(f"cannot read {path}: {error}") from None
    if not isinstance(found, dict):
        raise UserError(f"{path} is not a JSON object")
    return found


def _hash(value: object) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:16]
