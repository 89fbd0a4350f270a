"""Files of token ids without text, as nanoGPT, nanochat, llm.c and modded-nanogpt write them."""

from collections.abc import Iterator

import numpy as np
import numpy.typing as npt

from gptjax.config import UserError
from gptjax.data.file_patterns import matching_files
from gptjax.data.remote_files import DataFile, RemoteFile, open_binary
from gptjax.data.source import FileSource
from gptjax.data.text_files import InvalidUtf8
from gptjax.data.tokenizers import Tokenizer

DTYPES = ("uint8", "uint16", "uint32", "int32", "int64")
MAX_TOKENS = 2**28  # of a document
_CHUNK_BYTES = 2**22
# llm.c: files may begin with 256 int32: one of these magic numbers, a version, and the number of tokens.
_HEADER_BYTES = 1024
_MAGIC = {20240520: "uint16", 20240801: "uint32"}


class TokenFiles(FileSource):
    """Token ids of the tokenizer that data.tokenizer names, little-endian, one after the other.

    All files, in sorted order, are one sequence, as a document may continue in the next file. It is split into
    documents at the tokenizer's end-of-text tokens, whether these precede or follow a document. The header that llm.c
    writes is recognised and skipped.

    Args:
      spec, invalid_utf8: see `open_source`.
      pattern: of the files.
      dtype: one of DTYPES.

    Raises:
      UserError: the dtype is unknown, or the size of a file is not a multiple of it.
    """

    def __init__(self, spec: str, invalid_utf8: InvalidUtf8, pattern: str, dtype: str) -> None:
        if dtype not in DTYPES:
            raise UserError(f"{spec}: unknown dtype {dtype!r}, choose one of {', '.join(DTYPES)}")
        super().__init__(spec, invalid_utf8, lambda: matching_files(pattern, binary=True))
        self._dtype = np.dtype(dtype).newbyteorder("<")
        self._layout = ("tokens", dtype)
        self.size_bytes = None  # of the files, and progress is counted in bytes of text
        for path in self._paths:
            size = path.size if isinstance(path, RemoteFile) else path.stat().st_size
            if size is not None:
                self._check_size(path, size)

    def documents_for(self, tokenizer: Tokenizer) -> Iterator[npt.NDArray[np.int32]]:
        yield from self._checked(self._token_documents(tokenizer))

    def _file_documents(self, path: DataFile) -> Iterator[str]:
        raise UserError(
            f"{self.spec} has token ids, not text: set data.tokenizer to the tokenizer that made them, which cannot be "
            "one to train; where text is read, name a source of text"
        )

    def _token_documents(self, tokenizer: Tokenizer) -> Iterator[npt.NDArray[np.int32]]:
        parts: list[npt.NDArray[np.int32]] = []  # of the current document
        for path in self._paths:
            try:
                for ids in self._ids(path, tokenizer.vocab_size):
                    begin = 0
                    for end in np.flatnonzero(ids == tokenizer.end_of_text).tolist():
                        yield np.concatenate([*parts, ids[begin:end]])
                        parts, begin = [], end + 1
                    parts.append(ids[begin:])
                    if sum(map(len, parts)) > MAX_TOKENS:
                        raise UserError(
                            f"{path} has more than {MAX_TOKENS:,} tokens without the end-of-text token "
                            f"{tokenizer.end_of_text}: is data.tokenizer the one that made it?"
                        )
            except UserError as error:
                self._skip(error)
                parts = []  # the next file does not continue the document
        if parts:
            yield np.concatenate(parts)

    def _ids(self, path: DataFile, vocab_size: int) -> Iterator[npt.NDArray[np.int32]]:
        """Yields the ids of a file, checked, in chunks."""
        position = 0
        try:
            with open_binary(path) as file:
                head = file.read(_HEADER_BYTES)
                declared = self._declared_tokens(path, head)
                chunk = head if declared is None else file.read(_CHUNK_BYTES)
                while chunk:
                    self._check_size(path, len(chunk))
                    ids = np.frombuffer(chunk, self._dtype)
                    wrong = np.flatnonzero((ids < 0) | (ids >= vocab_size))
                    if len(wrong):
                        raise UserError(
                            f"{path}: token {position + int(wrong[0]):,} is {ids[wrong[0]]}, but the tokenizer has only"
                            f" {vocab_size:,} ids: set data.tokenizer to the one that made the file, or correct @DTYPE"
                        )
                    yield ids.astype(np.int32)
                    position += len(ids)
                    chunk = file.read(_CHUNK_BYTES)
        except OSError as error:
            raise UserError(f"cannot read {path}: {error.strerror or error}") from None
        if declared is not None and position != declared:
            raise UserError(f"{path} has {position:,} tokens, but its header declares {declared:,}: copy it again")

    def _declared_tokens(self, path: DataFile, head: bytes) -> int | None:
        """Returns the number of tokens in the header of a file; None if it has no header."""
        if len(head) < _HEADER_BYTES:
            return None
        magic, _, count = np.frombuffer(head, "<i4", 3).tolist()
        if magic not in _MAGIC:
            return None
        if _MAGIC[magic] != self._dtype.name:
            raise UserError(
                f"{path} declares tokens of {_MAGIC[magic]}, not {self._dtype.name}: write @{_MAGIC[magic]}"
            )
        return int(count)

    def _check_size(self, path: DataFile, size: int) -> None:
        if size % self._dtype.itemsize:
            raise UserError(
                f"{path} does not have a whole number of tokens of {self._dtype.name}, {self._dtype.itemsize} bytes "
                "each: it is truncated, or @DTYPE is another"
            )
