"""Scikit-learn's handwritten digits as conversations: 1,797 grey images of 8 x 8 pixels, part of the package."""

import functools
from collections.abc import Iterator

import numpy as np
import numpy.typing as npt

from gptjax.config import UserError
from gptjax.data.conversation_forms import Message
from gptjax.data.images.image_references import IMAGE, ImageReference

SPLITS, FORMS = ("train", "test"), ("text", "captions", "documents")
OF_DOCUMENT = 8  # images
HELD_OUT = 360  # images of the test split, chosen at random: in their order, the digits repeat
PAIRS = 2  # questions about an image and a random other one, for each question about one image
READ = f"{IMAGE}\nWhich digit?"
COMPARE = f"{IMAGE}{IMAGE}\nWhich is larger?"
_SEED = 0  # of the splits and pairs: the same in every run


def parse(spec: str) -> tuple[str, str]:
    """The split and form of a source: train and captions of "digits:train:captions", train and "" of "digits:train".

    Raises:
      UserError: it is no such source.
    """
    split, _, form = spec.partition(":")[2].partition(":")
    if split not in SPLITS or form not in ("", *FORMS):
        raise UserError(
            f"{spec} is not digits:train or digits:test, nor one of them with :text (without the images), :captions "
            "(images without questions) or :documents (several of them)"
        )
    return split, form


def conversations(spec: str) -> Iterator[tuple[tuple[Message, ...], str]]:
    """Yields (messages, place): the digit of each image of the split, and which of two images has the larger digit.

    No pair has two equal digits, nor an image of the other split. Without the images, the questions cannot be answered
    but by chance: a baseline. As captions, the digit follows upon its image, and there are no pairs; documents have
    several of them, each in a line.
    """
    (split, form), (_, labels) = parse(spec), _digits()
    exchange = _without_images if form == "text" else _exchange
    order = _generator(len(SPLITS)).permutation(len(labels)).tolist()
    numbers = sorted(order[:HELD_OUT] if split == "test" else order[HELD_OUT:])
    generator = _generator(SPLITS.index(split))
    if form == "documents":
        for first in range(0, len(numbers), OF_DOCUMENT):
            yield _document(numbers[first : first + OF_DOCUMENT])
        return
    for number in numbers:
        if form == "captions":
            yield _exchange(IMAGE, str(labels[number]), number)
            continue
        yield exchange(READ, str(labels[number]), number)
        for _ in range(PAIRS):
            other = number
            while labels[other] == labels[number]:
                other = numbers[int(generator.integers(len(numbers)))]
            answer = "first" if labels[number] > labels[other] else "second"
            yield exchange(COMPARE, answer, number, other)


def _generator(number: int) -> np.random.Generator:
    return np.random.Generator(np.random.Philox(np.random.SeedSequence([_SEED, number])))


def _exchange(question: str, answer: str, *numbers: int) -> tuple[tuple[Message, ...], str]:
    place = f"digits {', '.join(map(str, numbers))}"
    images = tuple(ImageReference(f"digits:{number}", place) for number in numbers)
    return (Message("user", question, images=images), Message("assistant", answer)), place


def _document(numbers: list[int]) -> tuple[tuple[Message, ...], str]:
    labels, place = _digits()[1], f"digits {', '.join(map(str, numbers))}"
    text = "\n".join(f"{IMAGE}{labels[number]}" for number in numbers)
    images = tuple(ImageReference(f"digits:{number}", place) for number in numbers)
    return (Message("document", text, images=images),), place


def _without_images(question: str, answer: str, *numbers: int) -> tuple[tuple[Message, ...], str]:
    (user, assistant), place = _exchange(question, answer, *numbers)
    return (Message("user", user.content.replace(IMAGE, "").strip()), assistant), place


def image(source: str) -> npt.NDArray[np.uint8]:
    """The image of "digits:NUMBER", uint8 (8, 8, 3), white on black; raises UserError if there is none."""
    pixels, number = _digits()[0], source.partition(":")[2]
    if not number.isdecimal() or int(number) >= len(pixels):
        raise UserError(f"there is no image {source}: NUMBER is below {len(pixels)}")
    grey = np.rint(pixels[int(number)] * (255 / 16)).astype(np.uint8)
    return np.repeat(grey[:, :, None], 3, axis=2)


@functools.cache
def _digits() -> tuple[npt.NDArray[np.float64], npt.NDArray[np.int64]]:
    from sklearn.datasets import load_digits

    found = load_digits()
    return found.images, found.target
