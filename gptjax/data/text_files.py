"""Reads text files, JSON lines and standard input, with their encodings and line ends.

Text is UTF-8; a byte order mark is removed, and UTF-16 and UTF-32 with a byte order mark are decoded. Lines end in
"\\n" or "\\r\\n" only, as JSON strings may contain U+2028, prompts form feeds, and so on.
"""

import codecs
import contextlib
import io
import json
import math
import re
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, Literal, cast

from gptjax.config import UserError
from gptjax.data.compression import LimitedReader, base_name, opened
from gptjax.data.remote_files import DataFile

InvalidUtf8 = Literal["replace", "error"]

_MARKS = (  # UTF-32 first, as its mark begins with that of UTF-16
    (codecs.BOM_UTF32_LE, "utf-32-le"),
    (codecs.BOM_UTF32_BE, "utf-32-be"),
    (codecs.BOM_UTF8, "utf-8-sig"),
    (codecs.BOM_UTF16_LE, "utf-16-le"),
    (codecs.BOM_UTF16_BE, "utf-16-be"),
)
_JSON_SPACE = " \t\r\n"


class Utf8:
    """UTF-8 decoder with a policy for invalid bytes.

    Args:
      policy: "replace" replaces them by U+FFFD and counts them; "error" raises UserError with the place and the byte.
      option: setting that replaces invalid bytes, for the error message; None: there is none.

    Attributes:
      replaced_bytes: invalid bytes replaced so far.
      replaced_texts: texts with invalid bytes so far.
    """

    def __init__(self, policy: InvalidUtf8 = "error", option: str | None = None) -> None:
        self._policy, self._option = policy, option
        self.replaced_bytes = self.replaced_texts = 0

    def decode(self, raw: bytes, place: object, offset: int = 0) -> str:
        """Decodes `raw`, which begins at byte `offset` of the file of `place`."""
        try:
            return raw.decode()
        except UnicodeDecodeError as error:
            if self._policy == "error":
                fix = "convert it" + ("" if self._option is None else f", or set {self._option}")
                raise UserError(f"{place} is not UTF-8 at byte {offset + error.start}: {fix}") from None
        # One U+FFFD may replace several bytes, so bytes are counted by Python's escapes, one for each byte.
        self.replaced_bytes += len(re.findall("[\udc80-\udcff]", raw.decode(errors="surrogateescape")))
        self.replaced_texts += 1
        return raw.decode(errors="replace")


class Utf8Reader:
    """Text of a file as UTF-8 bytes, without byte order mark.

    Attributes:
      encoding: of the file: utf-8, utf-8-sig, utf-16-le, utf-16-be, utf-32-le or utf-32-be.
    """

    def __init__(self, file: io.BufferedIOBase, name: str) -> None:
        # One byte first, as a terminal or pipe may have no more yet. In UTF-8 only a mark can begin with these bytes.
        head = file.read(1)
        if head in {mark[:1] for mark, _ in _MARKS}:
            head += file.read(3)
        mark, self.encoding = next(((mark, name) for mark, name in _MARKS if head.startswith(mark)), (b"", "utf-8"))
        self._start = len(mark)
        decoder = (
            codecs.getincrementaldecoder(self.encoding)() if self.encoding.startswith(("utf-16", "utf-32")) else None
        )
        self._file = LimitedReader(_Transcoded(head[len(mark) :], file, decoder, name, self._start))

    def read(self) -> bytes:
        return self._file.read()

    def __iter__(self) -> Iterator[tuple[int, int, bytes]]:
        """Yields (number of the line from 1, offset of its first byte in the file, line with its end)."""
        offset = self._start
        for number, line in enumerate(self._file, start=1):
            yield number, offset, line
            offset += len(line)

    @property
    def start(self) -> int:
        """Offset of the text in the file, in bytes."""
        return self._start


class _Transcoded(io.RawIOBase):
    """Raw stream of the bytes of `head` and then `file`, transcoded to UTF-8 if a decoder is given."""

    def __init__(
        self, head: bytes, file: io.BufferedIOBase, decoder: codecs.IncrementalDecoder | None, name: str, offset: int
    ) -> None:
        self._head, self._file, self._decoder = head, file, decoder
        self._name, self._offset = name, offset
        self._ready = memoryview(b"")

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while not self._ready:
            chunk, self._head = self._head or self._file.read1(1 << 16), b""
            if self._decoder is None:
                self._ready = memoryview(chunk)
            else:
                self._ready = memoryview(self._decode(chunk))
            if not chunk:
                break
        count = min(len(buffer), len(self._ready))
        buffer[:count] = self._ready[:count]
        self._ready = self._ready[count:]
        return count

    def _decode(self, chunk: bytes) -> bytes:
        assert self._decoder is not None
        pending = len(self._decoder.getstate()[0])
        try:
            text = self._decoder.decode(chunk, final=not chunk)
        except UnicodeDecodeError as error:
            encoding = "UTF-32" if error.encoding.startswith("utf-32") else "UTF-16"
            place = self._offset - pending + error.start
            raise UserError(f"{self._name} begins as {encoding}, but is invalid at byte {place}: convert it") from None
        self._offset += len(chunk)
        return text.encode()


@contextlib.contextmanager
def opened_text(path: DataFile | None) -> Iterator[Utf8Reader]:
    """Opens a file, decompressed, or standard input (None) as text.

    Raises:
      UserError: names the file when opening it, or reading it within the context, fails.
    """
    if path is None:
        yield Utf8Reader(cast(io.BufferedIOBase, sys.stdin.buffer), "standard input")
        return
    with opened(path) as file:
        yield Utf8Reader(file, str(path))


def read_text(path: DataFile | None, utf8: Utf8 | None = None) -> str:
    """Reads a file, or standard input (None), as text; line ends are kept.

    Raises:
      UserError: the file cannot be read, or is not UTF-8 (unless `utf8` replaces invalid bytes).
    """
    with opened_text(path) as text:
        return (utf8 or Utf8()).decode(text.read(), "standard input" if path is None else path, text.start)


def read_lines(
    path: DataFile | None, utf8: Utf8 | None = None, *, keep_ends: bool = False
) -> Iterator[tuple[str, str]]:
    """Yields (place, line) for each line of a file or of standard input (None); a place is "chats.jsonl:17".

    Raises:
      UserError: the file cannot be read, or is not UTF-8 (unless `utf8` replaces invalid bytes).
    """
    utf8 = utf8 or Utf8()
    name = "standard input" if path is None else str(path)
    with opened_text(path) as text:
        for number, offset, raw in text:
            place = f"{name}:{number}"
            line = utf8.decode(raw, place, offset)
            yield place, line if keep_ends else without_end(line)


def without_end(line: str) -> str:
    """Removes "\\n" or "\\r\\n" from the end of `line`."""
    return line[:-1].removesuffix("\r") if line.endswith("\n") else line


# --- JSON -------------------------------------------------------------------------------------------------------------


def parse_json(line: str, place: str) -> Any:
    """Parses a JSON text.

    Raises:
      UserError: it is not JSON, is nested too deeply, or holds NaN, Infinity or a number that is too large for a float.
    """
    try:
        return _DECODER.decode(line)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{place} is not JSON: {error}") from None


def json_objects(lines: Iterable[tuple[str, str]]) -> Iterator[tuple[dict[str, Any], str]]:
    """Yields (JSON object, place) for each line of `read_lines`; empty lines are skipped.

    Raises:
      UserError: a line is not a JSON object.
    """
    for place, line in lines:
        if not is_empty(line):
            record = parse_json(line, place)
            if not isinstance(record, dict):
                raise UserError(f"{place} is not a JSON object, as each line must be")
            yield record, place


def is_empty(line: str) -> bool:
    """Whether a line of JSON lines is empty or only white space, and so skipped."""
    return not line.strip(_JSON_SPACE)


def is_json_lines(name: str) -> bool:
    """Whether a file's name is that of JSON lines: .jsonl or .ndjson, optionally compressed."""
    return Path(base_name(name)).suffix.lower() in (".jsonl", ".ndjson")


def _no_constant(name: str) -> Any:
    raise ValueError(f"{name} is not a JSON value")


def _finite(number: str) -> float:
    value = float(number)
    if not math.isfinite(value):
        raise ValueError(f"{number} is out of the range of a float")
    return value


_DECODER = json.JSONDecoder(parse_constant=_no_constant, parse_float=_finite)
