"""The parts in which continuous batching reads a prompt, with its images."""

import collections
import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from gptjax.data.images.square_images import padded
from gptjax.inference.batch_programs import ChunkImages, ChunkRows, encode_images
from gptjax.inference.engine import MIN_BUCKET, power_of_two
from gptjax.inference.sequences import Sequence, padded_tokens, page_table, top_tokens
from gptjax.models.gpt import GPT

PROMPTS_AT_ONCE = 4  # rows of the program that reads several prompts
FEWEST_AT_ONCE = 3  # below, a call for each takes less time than one with unused rows


@dataclasses.dataclass(frozen=True)
class Chunk:
    """The tokens of a prompt that one call reads.

    Attributes:
      start: the position of the first.
      length: positions of the program, of `count` tokens and padding.
      prefix: positions that attend to each other in both directions.
    """

    sequence: Sequence
    start: int
    count: int
    length: int
    prefix: int = 0

    @property
    def is_last(self) -> bool:
        """Whether the decoding program reads the rest of the prompt."""
        return self.start + self.count >= len(self.sequence.request.tokens) - 1

    @property
    def tokens(self) -> tuple[int, ...]:
        return self.sequence.request.tokens[self.start : self.start + self.count]


def next_chunk(sequence: Sequence, most: int) -> Chunk:
    """The next tokens of a prompt, at most `most`, without its last token, which is read when it is decoded."""
    left = len(sequence.request.tokens) - 1 - sequence.read
    step = max(MIN_BUCKET, most // 4)  # programs of four lengths are compiled at most
    length = min(most, -(-left // step) * step)
    return Chunk(sequence, sequence.read, min(length, left), length)


def whole_prompt(sequence: Sequence, length: int) -> Chunk:
    """All tokens of a prompt whose positions attend to later ones, padded to `length`."""
    number = len(sequence.request.tokens)
    return Chunk(sequence, 0, number, length, prefix=number)


def take_chunks(
    reading: collections.deque[Sequence], next_chunk_of: Callable[[Sequence], Chunk], most: int
) -> list[Chunk]:
    """Removes the prompts from `reading` that the next call reads, and returns their chunks.

    They are the first prompt and up to `most` - 1 others whose chunks have the same length; the first alone if the
    others are too few, or if it has images.
    """
    chunks: list[Chunk] = []
    for sequence in reading:
        chunk = next_chunk_of(sequence)
        if not chunks or (chunk.length == chunks[0].length and not sequence.request.images):
            chunks.append(chunk)
        if len(chunks) == most or chunks[0].sequence.request.images:
            break
    if len(chunks) < FEWEST_AT_ONCE:
        del chunks[1:]
    for chunk in chunks:
        reading.remove(chunk.sequence)
    return chunks


def chunk_rows(chunks: list[Chunk], rows: int, pages_of_row: int, adapters: Mapping[str | None, int]) -> ChunkRows:
    """The arguments of the call that reads chunks of one length; rows beyond them are unused."""

    def column(values: list[int]) -> npt.NDArray[np.int32]:
        return np.array(values + [0] * (rows - len(values)), np.int32)

    return ChunkRows(
        padded_tokens([chunk.tokens for chunk in chunks], rows, chunks[0].length),
        column([chunk.start for chunk in chunks]),
        column([chunk.count for chunk in chunks]),
        page_table([chunk.sequence for chunk in chunks], rows, pages_of_row),
        column([chunk.prefix for chunk in chunks]),
        column([adapters[chunk.sequence.request.adapter] for chunk in chunks]),
    )


def next_tokens(chunk: Chunk) -> npt.NDArray[np.int32]:
    """The tokens after those of a chunk, (T,); zeros follow them."""
    tokens = chunk.sequence.request.tokens
    return padded_tokens([tokens[chunk.start + 1 : chunk.start + 1 + chunk.count]], 1, chunk.length)[0]


def append_scores(
    chunk: Chunk,
    logprob_T: npt.NDArray[np.float32],
    top_logprob_TC: npt.NDArray[np.float32],
    top_token_TC: npt.NDArray[np.int32],
) -> None:
    """Appends what `score_chunk` returned for a chunk to the log-probabilities of its prompt."""
    sequence, wanted = chunk.sequence, chunk.sequence.request.top_logprobs
    sequence.prompt_logprobs += logprob_T[: chunk.count].tolist()
    sequence.prompt_top += [top_tokens(top_token_TC[t], top_logprob_TC[t], wanted) for t in range(chunk.count)]


def chunk_images(model: GPT, params: Any, chunk: Chunk) -> ChunkImages | None:
    """The images of a prompt for the program that reads a chunk; None: it has none. The first call encodes them."""
    sequence = chunk.sequence
    images = sequence.request.images
    if not images:
        return None
    if sequence.image_tokens is None:
        images_1NX = padded([images], power_of_two(len(images)), model.config.vision)
        sequence.image_tokens = encode_images(model, params, images_1NX)
    before = sequence.request.tokens[: chunk.start].count(model.config.vision.image_token)
    return ChunkImages(sequence.image_tokens, np.int32(before))
