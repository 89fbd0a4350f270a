"""Interleaved documents: texts with images between their words, all of whose text is in the loss."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from gptjax import config as c
from gptjax.config import UserError
from gptjax.data.conversation_forms import Message, conversation_messages
from gptjax.data.conversations import hold_out, read_conversations, read_prompts, read_rankings
from gptjax.data.images.image_references import ImageReference
from gptjax.data.templates import TooLongError, chat_format
from gptjax.data.tokenizers import BytesTokenizer
from gptjax.parallel.mesh import make_mesh
from gptjax.run import run
from gptjax.stages.builders import build
from gptjax.training.metrics_file import read_metrics
from tests.tiny_images import VISION, image_config

END = BytesTokenizer().end_of_text
IMAGE_TOKEN = BytesTokenizer.vocab_size
TOKENS = VISION.tokens_per_image
CAT, DOG = ImageReference("cat.png", "a:1: images"), ImageReference("dog.png", "a:1: images")


def formatted(vision: c.VisionConfig = VISION):
    return chat_format(c.ChatConfig(template="none"), BytesTokenizer(), vision)


def documents(directory: Path, count: int = 12) -> str:
    """Writes documents of two digits, each behind its image, and one without images; returns the source."""
    lines: list[dict[str, Any]] = [{"text": "no image at all", "images": []}]
    lines += [{"text": f"a{i}<image>b<image>c", "images": [f"digits:{i}", f"digits:{i + 1}"]} for i in range(count)]
    (directory / "documents.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return f"jsonl:{directory}/documents.jsonl"


def test_a_text_with_places_of_images_is_a_document_and_another_one_a_caption():
    def parse(text, images):
        return conversation_messages({"text": text, "images": images}, "a:1")

    assert parse("x<image>y", ["cat.png"]) == (Message("document", "x<image>y", images=(CAT,)),)
    assert parse("x", []) == (Message("document", "x"),)
    user, assistant = parse("x", ["cat.png"])
    assert (user.content, assistant.content) == ("<image>", "x")
    with pytest.raises(UserError, match="a:1 names 2 images, but has 1 <image>"):
        parse("x<image>", ["cat.png", "dog.png"])
    with pytest.raises(UserError, match="a:1 has 2 <image>, but names 1 images"):
        parse("<image><image>", ["cat.png"])
    with pytest.raises(UserError, match="has neither messages"):
        parse("", [])


def test_all_text_is_in_the_loss_and_no_image(tmp_path):
    (found,) = formatted().encode_document(Message("document", "x<image>yz", images=(CAT,)), 100)
    image = [IMAGE_TOKEN] * TOKENS
    assert found.tokens.tolist() == [END, ord("x"), *image, ord("y"), ord("z"), END]
    assert found.loss_mask.tolist() == [False, True, *[False] * TOKENS, True, True, True]
    assert found.images == (CAT,)


@pytest.mark.parametrize("most", [TOKENS, TOKENS + 1, 2 * TOKENS + 3, 40])
def test_the_pieces_of_a_long_document_are_its_tokens_with_whole_images(most):
    document = Message("document", "abc<image>d<image><image>efghij", images=(CAT, DOG, CAT))
    (whole,) = formatted().encode_document(document, 1000)
    pieces = formatted().encode_document(document, most)
    assert max(map(len, pieces)) <= most
    if most > 2 * TOKENS:  # shorter ones leave out images that no text follows upon
        np.testing.assert_array_equal(np.concatenate([piece.tokens for piece in pieces]), whole.tokens)
        assert [image for piece in pieces for image in piece.images] == list(document.images)
    for piece in pieces:
        assert (piece.tokens == IMAGE_TOKEN).sum() == TOKENS * len(piece.images)
        assert piece.loss_mask[1:].any()
    with pytest.raises(TooLongError, match=f"has {TOKENS} tokens, but {TOKENS - 1} fit"):
        formatted().encode_document(document, TOKENS - 1)


def test_documents_are_held_out_but_no_prompts_or_rankings(tmp_path):
    spec = documents(tmp_path)
    items = read_conversations(spec)
    train, validation = hold_out(items, 0.2)
    assert len(train) + len(validation) == len(items) == 13
    assert validation
    with pytest.raises(UserError, match="has no prompts"):
        read_prompts(spec)
    with pytest.raises(UserError, match="neither a ranking"):
        read_rankings(spec)
    with pytest.raises(UserError, match="there is an image, but this model reads text alone"):
        formatted(c.VisionConfig()).encode_document(items[1].messages[0], 100, place="x")


def interleaved(directory: Path) -> c.Config:
    config = image_config(directory)
    spec = documents(directory)
    data = dataclasses.replace(config.data, source=spec, validation_source=spec, image_shift=0.0)
    chat = dataclasses.replace(config.chat, template="none")
    return dataclasses.replace(config, data=data, chat=chat)


def test_a_batch_has_the_documents_and_their_images(tmp_path):
    stage = build(interleaved(tmp_path), make_mesh(c.MeshConfig()), None)
    arrays = {name: np.asarray(array) for name, array in next(stage.batches(0, None)).arrays.items()}
    tokens, targets, weights = arrays["tokens"], arrays["targets"], arrays["weights"]
    assert not np.any(weights[targets == IMAGE_TOKEN])
    assert np.all(weights[(arrays["segments"] > 0) & (targets != IMAGE_TOKEN) & (targets != 0)] == 1)
    images_read = np.any(arrays["images"] > 0, axis=-1).sum()
    assert images_read == (tokens == IMAGE_TOKEN).sum() // TOKENS > 0


@pytest.mark.slow
def test_a_run_learns_documents(tmp_path):
    config = interleaved(tmp_path)
    run(dataclasses.replace(config, batch=dataclasses.replace(config.batch, epochs=8.0)), tmp_path / "run")
    losses = [r["loss"] for r in read_metrics(tmp_path / "run")[1] if r["split"] == "validation"]
    assert losses[-1] < losses[0] - 0.5
