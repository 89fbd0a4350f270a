"""Retrieval of passages by BM25 (Robertson and Zaragoza 2009), computed by bm25s."""

import dataclasses
import importlib.util
import itertools
import logging
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from gptjax.config import UserError
from gptjax.data.file_patterns import files_below
from gptjax.data.text_files import read_lines
from gptjax.data.words import WORD, is_written_without_blanks, words

SUFFIXES = (".txt", ".md")
_HEADING = re.compile(r"#{1,6}(\s|$)")  # CommonMark, section 4.2
_FENCE = re.compile(r" {0,3}(```+|~~~+)")  # fenced code block, section 4.5, where a # does not begin a heading


@dataclasses.dataclass(frozen=True)
class Passage:
    """A part of a document.

    Attributes:
      text: its text.
      place: file, relative to the folder, and first line: "returns.md:12".
    """

    text: str
    place: str


class Documents:
    """A BM25 index of the documents of a folder. Words are compared without stemming.

    Args:
      directory: folder whose .txt and .md files are read recursively; hidden files are skipped.
      max_words: maximum words of a passage. Consecutive paragraphs share a passage up to that length; a heading begins
        a new passage, and a longer paragraph is cut.

    Raises:
      UserError: the folder does not exist or has no text, a file is not UTF-8, or bm25s is not installed.
    """

    def __init__(self, directory: Path, max_words: int = 80) -> None:
        check(directory)
        import bm25s

        logging.getLogger("bm25s").setLevel(logging.WARNING)  # it logs every step
        files = files_below(directory, SUFFIXES)
        found = (passage for path in files for passage in _passages(directory, path, max_words))
        self.passages = [passage for passage in found if words(passage.text)]
        if not self.passages:
            raise UserError(f"{directory} has no text in {' or '.join(SUFFIXES)} files")
        self._index: Any = bm25s.BM25()
        self._index.index([words(passage.text) for passage in self.passages], show_progress=False)

    def find(self, question: str, most: int = 3) -> list[Passage]:
        """Returns the `most` passages of the highest BM25 score, best first, without those of score 0."""
        return [passage for passage, _ in self.scored(question, most)]

    def scored(self, question: str, most: int = 3) -> list[tuple[Passage, float]]:
        """Returns what `find` does, each passage with its BM25 score."""
        asked = words(question)
        if not asked:
            return []
        scores_N = np.asarray(self._index.get_scores(asked))
        order = np.argsort(-scores_N, kind="stable")[:most]
        return [(self.passages[i], float(scores_N[i])) for i in order if scores_N[i] > 0]


def check(directory: Path) -> None:
    """Raises UserError if the folder does not exist or bm25s is not installed; reads no file."""
    if not directory.is_dir():
        raise UserError(f"there is no folder {directory}")
    if importlib.util.find_spec("bm25s") is None:
        raise UserError("retrieval from documents needs the package bm25s: pip install 'gptjax[retrieval]'")


def with_passages(question: str, passages: Sequence[Passage]) -> str:
    """Returns a user's message: the numbered passages, then the question."""
    numbered = [f"[{number}] {passage.text}\n\n" for number, passage in enumerate(passages, start=1)]
    return "".join(numbered) + question


def citations(passages: Sequence[Passage]) -> str:
    """Returns the sources of the passages, one a line, numbered as in `with_passages`."""
    return "\n".join(f"[{number}] {passage.place}" for number, passage in enumerate(passages, start=1))


def _passages(directory: Path, path: Path, max_words: int) -> Iterator[Passage]:
    lines = [line for _, line in read_lines(path)]
    parts: list[str] = []  # paragraphs of the current passage
    first = size = 0
    for number, text in [part for paragraph in _paragraphs(lines) for part in _cut(*paragraph, max_words)]:
        count = len(words(text))
        if not all(map(_is_heading, parts)) and (size + count > max_words or _is_heading(text)):
            yield Passage("\n\n".join(parts), f"{path.relative_to(directory).as_posix()}:{first}")
            parts, size = [], 0
        if not parts:
            first = number
        parts.append(text)
        size += count
    if parts:
        yield Passage("\n\n".join(parts), f"{path.relative_to(directory).as_posix()}:{first}")


def _paragraphs(lines: Sequence[str]) -> Iterator[tuple[int, str]]:
    """Yields the first line number, from 1, and the text of each paragraph: a heading, or the lines between headings
    and empty lines."""
    paragraph: list[str] = []
    fence = ""
    for number, line in enumerate([*lines, ""], start=1):
        is_heading = not fence and _is_heading(line)
        if is_heading or not line.strip():
            if paragraph:
                yield number - len(paragraph), "\n".join(paragraph).strip()
            paragraph = []
            if is_heading:
                yield number, line.strip()
            continue
        paragraph.append(line)
        if (match := _FENCE.match(line)) and (not fence or match[1].startswith(fence)):
            fence = "" if fence else match[1]


def _is_heading(paragraph: str) -> bool:
    return _HEADING.match(paragraph) is not None and "\n" not in paragraph


def _cut(number: int, text: str, max_words: int) -> Iterator[tuple[int, str]]:
    """Cuts a paragraph into parts of at most `max_words` words, each with the number of its first line."""
    # Cuts are at words after white space, and at words of scripts without blanks, but not within "12.50".
    starts = [
        word.start()
        for word in WORD.finditer(text)
        if word.start() > 0 and (text[word.start() - 1].isspace() or is_written_without_blanks([word[0]]))
    ]
    for begin, end in itertools.pairwise([0, *starts[max_words - 1 :: max_words], len(text)]):
        yield number + text.count("\n", 0, begin), text[begin:end].rstrip()
