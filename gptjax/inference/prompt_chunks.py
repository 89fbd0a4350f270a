"""The parts in which continuous batching reads a prompt, with its images."""

import dataclasses
from typing import Any

import numpy as np
import numpy.typing as npt

from gptjax.config import GPTConfig, UserError
from gptjax.data.images.square_images import padded
from gptjax.inference.batch_programs import ChunkImages, encode_images
from gptjax.inference.engine import MIN_BUCKET, power_of_two
from gptjax.inference.requests import GenerationRequest
from gptjax.inference.sequences import Sequence, padded_tokens
from gptjax.models.gpt import GPT


@dataclasses.dataclass(frozen=True)
class Chunk:
    """The tokens of a prompt that one call reads.

    Attributes:
      tokens_1T: int32, `count` tokens of the prompt, then padding.
      start: the position of the first.
      prefix: positions that attend to each other in both directions.
      is_last: whether the rest of the prompt is read by the decoding program.
    """

    tokens_1T: npt.NDArray[np.int32]
    start: int
    count: int
    prefix: int
    is_last: bool


def next_chunk(sequence: Sequence, most: int) -> Chunk:
    """The next tokens of a prompt, at most `most`, without its last token, which is read when it is decoded."""
    tokens, start = sequence.request.tokens, sequence.read
    end = len(tokens) - 1
    step = max(MIN_BUCKET, most // 4)  # four programs of a chunk are compiled at most
    length = min(most, -(-(end - start) // step) * step)
    count = min(length, end - start)
    return Chunk(padded_tokens(tokens[start : start + count], length), start, count, 0, start + count == end)


def whole_prompt(sequence: Sequence, length: int) -> Chunk:
    """All tokens of a prompt whose positions attend to later ones, padded to `length`."""
    tokens = sequence.request.tokens
    return Chunk(padded_tokens(tokens, length), 0, len(tokens), len(tokens), True)


def check_images(config: GPTConfig, request: GenerationRequest) -> None:
    """Raises UserError unless the image tokens of the prompt are those of its images, and the model can read them."""
    if not config.reads_images:
        if request.images:
            raise UserError("the request has images, but the model reads text alone")
        return
    given, places = len(request.images), request.tokens.count(config.vision.image_token)
    if given * config.vision.tokens_per_image != places:
        raise UserError(
            f"the request has {given} images of {config.vision.tokens_per_image} tokens, but its prompt has {places} "
            "image tokens"
        )
    if request.tokens[-1] == config.vision.image_token:
        raise UserError("the prompt ends with an image: add a token after it")


def chunk_images(model: GPT, params: Any, sequence: Sequence, chunk: Chunk) -> ChunkImages | None:
    """The images of a prompt for the program that reads `chunk`; None: it has none. The first call encodes them."""
    images = sequence.request.images
    if not images:
        return None
    if sequence.image_tokens is None:
        images_1NX = padded([images], power_of_two(len(images)), model.config.vision)
        sequence.image_tokens = encode_images(model, params, images_1NX)
    before = sequence.request.tokens[: chunk.start].count(model.config.vision.image_token)
    return ChunkImages(sequence.image_tokens, np.int32(before))
