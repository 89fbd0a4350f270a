"""Text to token ids and back: OpenAI's published vocabularies, plain bytes, or a BPE trained on the corpus.

The algorithms are tiktoken's and Hugging Face tokenizers'; here are one interface over them, and how a tokenizer is
found, trained once, kept beside a model and recognised again.
"""

import abc
import copy
import hashlib
import json
import shutil
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import tiktoken
import tokenizers
from tokenizers import models

from gptjax import files
from gptjax.config import DataConfig, UserError
from gptjax.data import tokenizer_check
from gptjax.data.tokenizer_check import LibraryErrors
from gptjax.data.vocabularies import END_OF_TEXT, VOCABULARIES, openai_encoding, train_bpe, train_gpt1_bpe
from gptjax.files import unfinished_path, write_whole

_FORMS = "gpt2, cl100k_base, bytes, bpe:SIZE, gpt1_bpe:SIZE, json:PATH"
_ALIASES = {"cl100k": "cl100k_base"}
_MIN_TRAINED_SIZE = 300  # the 256 bytes, end of text, and some merges
# What a tokenizer.json may call the end of a document, the likeliest first.
_END_OF_TEXT_NAMES = (END_OF_TEXT, "</s>", "<eos>", "<|end_of_text|>", "<|im_end|>", "[SEP]")

_VOCABULARY_SIZES = {"gpt2": 50_257, "cl100k_base": 100_277, "bytes": 257}


class Tokenizer(abc.ABC):
    """Text to ids in [0, vocab_size) and back.

    Attributes:
      vocab_size: ids are below it; a few of them may stand for nothing.
      end_of_text: id that goes between documents. No text encodes to it: "<|endoftext|>" in a corpus is plain text.
        None: there is no such token, as in GPT-1's original vocabulary; nothing can then be trained with it.
      ends: ids that end a generated text, `end_of_text` first; others only for models imported with several.
    """

    vocab_size: int
    end_of_text: int | None
    _ends: tuple[int, ...] = ()  # where they are given, and not end_of_text alone

    @property
    def ends(self) -> tuple[int, ...]:
        return self._ends or (() if self.end_of_text is None else (self.end_of_text,))

    def with_ends(self, ends: Sequence[int]) -> "Tokenizer":
        """A copy in which each of the tokens `ends` ends a text, the first as `end_of_text`.

        Raises:
          UserError: an id of no token.
        """
        if tuple(ends) == self.ends:
            return self
        if missing := [token for token in ends if not self.has_token(token)]:
            raise UserError(f"no token has the id {missing[0]}, which is said to end a text")
        found = copy.copy(self)
        found.end_of_text, found._ends = ends[0], tuple(ends)
        return found

    def has_token(self, token: int) -> bool:
        """Whether `token` is an id of the vocabulary."""
        return 0 <= token < self.vocab_size

    @abc.abstractmethod
    def encode(self, text: str) -> npt.NDArray[np.int32]:
        """Ids of `text`, int32 [T]. Threads run it in parallel."""

    def decode(self, ids: npt.ArrayLike) -> str:
        """Text of integer `ids` of any shape, U+FFFD where their bytes are no UTF-8; ids of no token are skipped."""
        array = np.asarray(ids, dtype=np.int64).ravel()
        return self._decode(array[(array >= 0) & (array < self.vocab_size)].tolist())

    @abc.abstractmethod
    def _decode(self, ids: list[int]) -> str: ...

    @abc.abstractmethod
    def _spec(self) -> dict[str, str]:
        """What `load` needs to find the vocabulary again."""

    @property
    def _whole_spec(self) -> dict[str, str | list[int]]:
        """Content of spec.json; "ends" only where they are not those of the vocabulary by itself."""
        return {**self._spec(), **({"ends": list(self._ends)} if self._ends else {})}

    @property
    def fingerprint(self) -> str:
        """16 hex digits that change whenever the ids of a document may; `save` and `load` keep them."""
        return _hash(self._whole_spec)

    def save(self, directory: Path) -> None:
        """Writes into `directory`, made if need be, what `load` reads."""
        directory.mkdir(parents=True, exist_ok=True)
        write_whole(directory / "spec.json", json.dumps(self._whole_spec) + "\n")


class BytesTokenizer(Tokenizer):
    """A token for each byte of UTF-8, and end of text."""

    vocab_size = 257
    end_of_text = 256

    def encode(self, text: str) -> npt.NDArray[np.int32]:
        return np.frombuffer(_encodable(text).encode(), dtype=np.uint8).astype(np.int32)

    def _decode(self, ids: list[int]) -> str:
        return b"".join(bytes([i]) if i < 256 else END_OF_TEXT.encode() for i in ids).decode(errors="replace")

    def _spec(self) -> dict[str, str]:
        return {"kind": "bytes"}


class TiktokenTokenizer(Tokenizer):
    """A byte-level BPE that OpenAI published: gpt2, or cl100k_base (GPT-3.5 and GPT-4)."""

    def __init__(self, encoding: tiktoken.Encoding) -> None:
        self.encoding = encoding
        self.vocab_size = encoding.n_vocab
        self.end_of_text = encoding.eot_token

    def encode(self, text: str) -> npt.NDArray[np.int32]:
        return np.array(self.encoding.encode_ordinary(text), dtype=np.int32)

    def _decode(self, ids: list[int]) -> str:
        return b"".join(map(self._piece, ids)).decode(errors="replace")

    def _piece(self, token: int) -> bytes:
        try:
            return self.encoding.decode_single_token_bytes(token)
        except KeyError:  # cl100k_base leaves ids between its special tokens unassigned
            return b""

    def _spec(self) -> dict[str, str]:
        return {"kind": "tiktoken", "name": self.encoding.name}


class HuggingFaceTokenizer(Tokenizer):
    """Any tokenizer that the `content` of a tokenizer.json describes.

    Args:
      ends: ids that end a text, as for `with_ends`. Empty: the first token of a usual name, where there is one.

    Raises:
      UserError: the content is damaged, its vocabulary is empty or has too large an id, or `ends` has an
        id of no token.
    """

    def __init__(self, content: str, ends: Sequence[int] = ()) -> None:
        with LibraryErrors("not a tokenizer.json"):
            tokenizer = tokenizers.Tokenizer.from_str(content)
        vocabulary = tokenizer.get_vocab()
        guess = next((name for name in _END_OF_TEXT_NAMES if name in vocabulary), None)
        name_of = {token: name for name, token in vocabulary.items()}
        if missing := [token for token in ends if token not in name_of]:
            raise UserError(f"no token has the id {missing[0]}, which is said to end a text")
        names = [name_of[token] for token in ends] or ([] if guess is None else [guess])
        # Special tokens are encoded as plain text, so these have to be special, which not every file declares.
        tokenizer.add_special_tokens(names)
        tokenizer.encode_special_tokens = True
        # The same text must always give the same ids, and all of them.
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
        return HuggingFaceTokenizer(self.content, ends)

    def has_token(self, token: int) -> bool:
        return super().has_token(token) and self._tokenizer.id_to_token(token) is not None

    def id_of(self, name: str) -> int | None:
        """Id of the token of that name; None: there is none."""
        return self._tokenizer.token_to_id(name)

    def encode(self, text: str) -> npt.NDArray[np.int32]:
        # Only the form for batches skips each token's offsets in the text, which take a third longer.
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
    """`text` with U+FFFD for surrogates, which a Python string may hold but UTF-8 cannot."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    return text


# --- by name, by training, from a directory ---------------------------------------------------------------------------


def check_spec(spec: str) -> None:
    """Raises UserError when `spec` is not of a form that `get_tokenizer` knows, or names a file that does not exist."""
    kind, _, argument = _ALIASES.get(spec, spec).partition(":")
    if kind in ("bpe", "gpt1_bpe"):
        if not argument.isdecimal() or int(argument) < _MIN_TRAINED_SIZE:
            raise UserError(f"tokenizer {spec!r}: SIZE must be a whole number of at least {_MIN_TRAINED_SIZE}")
    elif kind == "json":
        if not Path(argument).expanduser().is_file():
            raise UserError(f"tokenizer {spec!r}: there is no such file; PATH is that of a tokenizer.json")
    elif kind not in (*VOCABULARIES, "bytes") or argument:
        raise UserError(f"unknown tokenizer {spec!r}: known are {_FORMS}")


def vocab_size(spec: str) -> int:
    """Of the tokenizer that `spec` names; a trained one may have fewer. Raises what `check_spec` and `read_json` do."""
    check_spec(spec)
    kind, _, argument = _ALIASES.get(spec, spec).partition(":")
    if kind == "json":
        return read_json(Path(argument).expanduser()).vocab_size
    return _VOCABULARY_SIZES[kind] if kind in _VOCABULARY_SIZES else int(argument)


def get_tokenizer(
    spec: str, *, train_documents: Callable[[], Iterable[str]], corpus_fingerprint: str, cache_dir: Path
) -> Tokenizer:
    """The tokenizer that `DataConfig.tokenizer` names.

    Args:
      spec: gpt2 | cl100k_base | bytes | bpe:SIZE (byte-level, GPT-2's form) | gpt1_bpe:SIZE (GPT-1's form: lower-cased
        words, so decoding loses case and spacing) | json:PATH (a tokenizer.json).
      train_documents: the corpus; called only to train bpe or gpt1_bpe when `cache_dir` does not have the result.
      corpus_fingerprint: names the corpus; with `spec` it is the key of the trained tokenizer.
      cache_dir: where trained tokenizers and OpenAI's vocabularies are kept.

    Raises:
      UserError: see `check_spec`; or a damaged file, one without an end-of-text token, or a vocabulary that is neither
        installed nor reachable.
    """
    check_spec(spec)
    kind, _, argument = _ALIASES.get(spec, spec).partition(":")
    if kind == "bytes":
        return BytesTokenizer()
    if kind == "json":
        tokenizer = read_json(path := Path(argument).expanduser())
        if tokenizer.end_of_text is None:
            raise UserError(
                f"cannot load the tokenizer {path}: the tokenizer has no end-of-text token: add one of "
                f"{', '.join(_END_OF_TEXT_NAMES)} to it"
            )
        return tokenizer
    if kind in VOCABULARIES:
        return TiktokenTokenizer(openai_encoding(kind, cache_dir))
    directory = cache_dir / "tokenizers" / _hash([spec, corpus_fingerprint])
    if not directory.exists():
        print(f"training the tokenizer {spec}; it will be kept in {directory}", file=sys.stderr)
        train = train_gpt1_bpe if kind == "gpt1_bpe" else train_bpe
        _save_whole(HuggingFaceTokenizer(train(train_documents(), int(argument)).to_str()), directory)
    return load(directory, cache_dir)


def load(directory: Path, cache_dir: Path | None = None) -> Tokenizer:
    """The tokenizer that `save` wrote into `directory`.

    Args:
      directory: holds spec.json, and tokenizer.json for some kinds.
      cache_dir: where OpenAI's vocabularies are kept; None: where `DataConfig` keeps them by default.

    Raises:
      UserError: files are missing or damaged, or a vocabulary is neither installed nor reachable.
    """
    try:
        spec = files.read_json(directory / "spec.json")
        kind, name = str(spec["kind"]), str(spec.get("name"))
        ends = _ends_in(spec)
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise UserError(f"no tokenizer in {directory}: spec.json is missing or damaged ({error!r})") from None
    if kind == "bytes":
        return BytesTokenizer().with_ends(ends) if ends else BytesTokenizer()
    if kind == "tiktoken" and name in VOCABULARIES:
        found = TiktokenTokenizer(openai_encoding(name, cache_dir or Path(DataConfig.cache_dir).expanduser()))
        return found.with_ends(ends) if ends else found
    if kind == "huggingface":
        tokenizer = read_json(directory / "tokenizer.json", ends)
        if tokenizer.fingerprint != _hash(spec):
            raise UserError(f"{directory}/tokenizer.json is not the one that spec.json was written for: restore it")
        return tokenizer
    raise UserError(f"{directory}/spec.json names an unknown tokenizer: {spec}")


def read_json(path: Path, ends: Sequence[int] | None = None) -> HuggingFaceTokenizer:
    """The tokenizer of a tokenizer.json, with an end of text or without.

    Args:
      ends: as for `HuggingFaceTokenizer`. None: what a spec.json of `save` or a tokenizer_config.json declares in the
        directory of a file that is called tokenizer.json.

    Raises:
      UserError: a damaged file.
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
    """`tokenizer` with the eos_token of the tokenizer_config.json in `directory`, if that names one of its tokens."""
    declared = _json_object(directory / "tokenizer_config.json").get("eos_token")
    name = declared.get("content") if isinstance(declared, dict) else declared  # a dict: the token and its properties
    token = tokenizer.id_of(name) if isinstance(name, str) else None
    return tokenizer if token is None else tokenizer.with_ends([token])


def _json_object(path: Path) -> dict[str, Any]:
    """Content of a JSON file, {} if there is none; UserError when it is damaged."""
    try:
        found = files.read_json(path)
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        raise UserError(f"cannot read {path}: {error}") from None
    if not isinstance(found, dict):
        raise UserError(f"{path} is not a JSON object")
    return found


def _save_whole(tokenizer: Tokenizer, directory: Path) -> None:
    """Saves so that `directory` exists either whole or not at all, whoever else is saving it."""
    unfinished = unfinished_path(directory)
    try:
        tokenizer.save(unfinished)
        unfinished.rename(directory)
    except OSError:
        if not directory.exists():  # else another process was first
            raise
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)


def _hash(value: object) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:16]
