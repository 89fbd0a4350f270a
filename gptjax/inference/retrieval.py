"""Passages of a folder of texts that may answer a question: BM25 (Robertson and Zaragoza 2009), computed by bm25s."""

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
_FENCE = re.compile(r" {0,3}(```+|~~~+)")  # of code, section 4.5, in which a # is no heading


@dataclasses.dataclass(frozen=True)
class Passage:
    """A part of a text.

    Attributes:
      place: where it begins: "returns.md:12", below the folder.
    """

    text: str
    place: str


class Documents:
    """The texts of a folder, and what of them is about a question. Words are compared as they are written.

    Args:
      directory: all .txt and .md files in it and below it are read; hidden ones are not.
      max_words: of a passage. Paragraphs that follow each other share one as far as that allows; a heading begins a new
        one, whether an empty line follows it or not, and a paragraph that is longer is cut.

    Raises:
      UserError: there is no such folder or nothing to read in it, a file is not UTF-8, or bm25s is not installed.
    """

    def __init__(self, directory: Path, max_words: int = 80) -> None:
        check(directory)
        import bm25s

        logging.getLogger("bm25s").setLevel(logging.WARNING)  # it would tell of every step
        files = files_below(directory, SUFFIXES)
        found = (passage for path in files for passage in _passages(directory, path, max_words))
        self.passages = [passage for passage in found if words(passage.text)]
        if not self.passages:
            raise UserError(f"{directory} has no text in {' or '.join(SUFFIXES)} files")
        self._index: Any = bm25s.BM25()
        self._index.index([words(passage.text) for passage in self.passages], show_progress=False)

    def find(self, question: str, most: int = 3) -> list[Passage]:
        """The passages that fit best, best first; none that has no word of the question."""
        asked = words(question)
        if not asked:
            return []
        scores_N = np.asarray(self._index.get_scores(asked))
        order = np.argsort(-scores_N, kind="stable")[:most]
        return [self.passages[i] for i in order if scores_N[i] > 0]


def check(directory: Path) -> None:
    """Raises UserError where there is no such folder, or bm25s is not installed; reads nothing."""
    if not directory.is_dir():
        raise UserError(f"there is no folder {directory}")
    if importlib.util.find_spec("bm25s") is None:
        raise UserError("answers from documents need the package bm25s: pip install 'gptjax[retrieval]'")


def with_passages(question: str, passages: Sequence[Passage]) -> str:
    """A user's message: the passages, numbered, and then the question."""
    numbered = [f"[{number}] {passage.text}\n\n" for number, passage in enumerate(passages, start=1)]
    return "".join(numbered) + question


def citations(passages: Sequence[Passage]) -> str:
    """Where the passages are from, a line each, as `with_passages` numbers them."""
    return "\n".join(f"[{number}] {passage.place}" for number, passage in enumerate(passages, start=1))


def _passages(directory: Path, path: Path, max_words: int) -> Iterator[Passage]:
    lines = [line for _, line in read_lines(path)]
    parts: list[str] = []  # paragraphs of the passage that is being made
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
    """The number of its first line, from 1, and the text of each: a heading, or what stands between empty lines and
    headings."""
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
    """A paragraph in parts of so many words, each with the number of its line."""
    # Where a word begins behind a blank, or is one of those that are written without: not within "12.50".
    starts = [
        word.start()
        for word in WORD.finditer(text)
        if word.start() > 0 and (text[word.start() - 1].isspace() or is_written_without_blanks([word[0]]))
    ]
    for begin, end in itertools.pairwise([0, *starts[max_words - 1 :: max_words], len(text)]):
        yield number + text.count("\n", 0, begin), text[begin:end].rstrip()
