"""Images of tensorflow-datasets as a source of conversations."""

import io

import numpy as np
import pytest
import tensorflow_datasets as tfds
from PIL import Image

from gptjax import config as c
from gptjax.config import UserError
from gptjax.data.conversations import read_conversations
from gptjax.data.images.image_files import ImageFiles
from gptjax.data.images.image_references import ImageReference

VISION = c.VisionConfig(encoder="patches", image_size=2, patch_size=1)


def png(value: int) -> io.BytesIO:
    content = io.BytesIO()
    Image.new("RGB", (3, 2), (value,) * 3).save(content, "PNG")
    content.seek(0)
    return content


class TinyQuestions(tfds.core.GeneratorBasedBuilder):
    VERSION = tfds.core.Version("1.0.0")

    def _info(self):
        features = {
            "image": tfds.features.Image(encoding_format="png"),
            "question": tfds.features.Text(),
            "answer": tfds.features.ClassLabel(names=["dark", "bright"]),
        }
        return tfds.core.DatasetInfo(builder=self, features=tfds.features.FeaturesDict(features))

    def _split_generators(self, dl_manager):
        return {"train": self._generate_examples(range(3))}

    def _generate_examples(self, numbers):
        for i in numbers:
            yield i, {"image": png(100 * i), "question": f"q{i}", "answer": i // 2}


class TinyPairs(TinyQuestions):
    def _info(self):
        features = {
            "images": tfds.features.Sequence(tfds.features.Image(encoding_format="png")),
            "question": tfds.features.Text(),
            "answer": tfds.features.Text(),
        }
        return tfds.core.DatasetInfo(builder=self, features=tfds.features.FeaturesDict(features))

    def _generate_examples(self, numbers):
        for i in numbers:
            images = [png(10 * i), png(10 * i + 1)]
            yield i, {"images": images, "question": "<image> or <image>?", "answer": "the first"}


@pytest.fixture(autouse=True)
def tfds_dir(tmp_path, monkeypatch):
    monkeypatch.setenv("TFDS_DATA_DIR", str(tmp_path))


def values_of(images) -> list[int]:
    files = ImageFiles(VISION, c.DataConfig())
    return [int(files.read(image)[0]) for image in images]


def test_the_images_of_a_dataset_are_read_when_they_are_needed():
    found = read_conversations("tfds:tiny_questions")
    texts = {item.messages[0].content.removeprefix("<image>\n"): item for item in found}
    assert sorted(texts) == ["q0", "q1", "q2"]
    assert [texts[f"q{i}"].messages[1].content for i in range(3)] == ["dark", "dark", "bright"]
    for i in (2, 0, 1):
        assert values_of(texts[f"q{i}"].messages[0].images) == [100 * i]
        (image,) = texts[f"q{i}"].messages[0].images
        assert len(image.source) < 60  # no copy of the image


def test_a_sequence_of_images_has_them_in_its_order():
    for item in read_conversations("tfds:tiny_pairs@train"):
        first, second = values_of(item.messages[0].images)
        assert second == first + 1


def test_damaged_and_foreign_images(monkeypatch):
    (item, *_) = read_conversations("tfds:tiny_questions@train[:1]")
    (image,) = item.messages[0].images
    np.testing.assert_array_equal(values_of([image]), values_of([image]))
    with pytest.raises(UserError, match="there is no image tfds:other@train#0/image: name the dataset"):
        ImageFiles(VISION, c.DataConfig()).read(ImageReference("tfds:other@train#0/image"))
