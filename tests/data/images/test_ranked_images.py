"""Images of ranked completions: their rows, and prompts with damaged ones."""

import json

import numpy as np
import pytest
from PIL import Image

from gptjax import config as c
from gptjax.config import UserError
from gptjax.data.chat_batches import PackedRankings, RankedSequences
from gptjax.data.conversations import read_rankings
from gptjax.data.images.image_files import ImageFiles
from gptjax.data.images.image_references import ImageReference
from gptjax.data.templates import EncodedConversation

VISION = c.VisionConfig(encoder="patches", image_size=1, patch_size=1)


def grey(folder, value: int) -> ImageReference:
    path = folder / f"{value}.png"
    Image.new("RGB", (1, 1), (value,) * 3).save(path)
    return ImageReference(str(path))


def prompt(images, lengths, first_token) -> RankedSequences:
    sequences = [
        EncodedConversation(np.full(length, first_token + i, np.int32), np.ones(length, bool), tuple(images))
        for i, length in enumerate(lengths)
    ]
    return RankedSequences(sequences, range(1, len(lengths) + 1))


@pytest.mark.parametrize("pack", [True, False])
def test_the_images_of_a_row_are_those_of_its_sequences_in_their_order(pack, tmp_path):
    images = {10: [grey(tmp_path, 1), grey(tmp_path, 2)], 20: [], 30: [grey(tmp_path, 3)], 40: [grey(tmp_path, 4)]}
    lengths = {10: (20, 16), 20: (4, 6, 8), 30: (12, 11), 40: (9, 8)}
    prompts = [prompt(images[first], lengths[first], first) for first in images]
    files = ImageFiles(VISION, c.DataConfig())
    elements = PackedRankings(prompts, 64, pack=pack, seed=None, images=files)
    seen = 0
    for index in range(len(elements)):
        element = elements[index]
        for tokens, segments, of_row_NX in zip(*(element[k] for k in ("tokens", "segments", "images")), strict=True):
            firsts = [int(tokens[segments == segment][0]) for segment in sorted(set(segments[segments > 0].tolist()))]
            expected = [int(r.source.split("/")[-1][:-4]) for first in firsts for r in images[first // 10 * 10]]
            assert of_row_NX[:, 0].tolist() == expected + [0] * (len(of_row_NX) - len(expected))
            seen += len(expected)
    assert seen == 2 * 2 + 2 + 2


def test_prompts_without_images_have_no_array_of_them():
    files = ImageFiles(VISION, c.DataConfig())
    assert "images" not in PackedRankings([prompt([], (4, 5), 10)], 64, pack=True, seed=None, images=files)[0]


def test_a_prompt_with_a_damaged_image_has_no_ranks(tmp_path):
    damaged = tmp_path / "damaged.png"
    damaged.write_bytes(b"\x89PNG")
    prompts = [prompt([ImageReference(str(damaged))], (4, 5), 10), prompt([grey(tmp_path, 7)], (4, 5), 20)]
    files = ImageFiles(VISION, c.DataConfig(on_corrupt="skip"))
    (element,) = (PackedRankings(prompts, 64, pack=True, seed=None, images=files)[i] for i in range(1))
    assert element["ranks"].tolist() == [[0, 0], [1, 2]]
    assert files.skipped == 1
    assert sorted(element["images"][:, :, 0].ravel().tolist()) == [0, 0, 7, 7]


def test_the_completions_of_a_prompt_see_the_same_shifted_image(tmp_path):
    Image.fromarray(np.arange(48, dtype=np.uint8).reshape(4, 4, 3)).save(tmp_path / "a.png")
    shifting = ImageFiles(c.VisionConfig(encoder="patches", image_size=4, patch_size=2), c.DataConfig(image_shift=0.5))
    image = ImageReference(str(tmp_path / "a.png"))
    elements = PackedRankings([prompt([image], (4, 5), 10)], 64, pack=False, seed=0, images=shifting)
    first, later = elements[0]["images"], elements[1]["images"]
    np.testing.assert_array_equal(first[0], first[1])
    assert not np.array_equal(first, later)


def test_rankings_of_conversations_name_their_images_once_each(tmp_path):
    def conversation(completion, source="a.png"):
        content = [{"type": "image_url", "image_url": {"url": source}}, {"type": "text", "text": "q"}]
        return [{"role": "user", "content": content}, {"role": "assistant", "content": completion}]

    path = tmp_path / "rankings.jsonl"
    path.write_text(json.dumps({"chosen": conversation("a"), "rejected": conversation("b")}) + "\n")
    (found,) = read_rankings(f"jsonl:{path}")
    assert found.prompt[0].content == "<image>q"
    assert found.prompt[0].images == (ImageReference("a.png", f"{path}:1"),)
    assert found.completions == ("a", "b")
    path.write_text(json.dumps({"chosen": conversation("a"), "rejected": conversation("b", "other.png")}) + "\n")
    with pytest.raises(UserError, match="the conversations must differ only in the last completion"):
        read_rankings(f"jsonl:{path}")
