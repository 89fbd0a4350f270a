"""Images of tensorflow-datasets: read, still encoded, when they are needed."""

from collections.abc import Mapping
from typing import Any

from gptjax.config import UserError

SCHEME = "tfds:"  # of the source of an image: "tfds:NAME@SPLIT#INDEX/FIELD", or with /NUMBER behind it in a sequence
_OPENED: dict[str, Any] = {}  # examples by index of the datasets that this process reads


def image_decoders(features: Mapping[str, Any]) -> dict[str, Any] | None:
    """Decoders that leave the images of a dataset encoded, for `DatasetBuilder.as_data_source`; None: it has none."""
    import tensorflow_datasets as tfds

    class Encoded(tfds.decode.SkipDecoding):
        def decode_batch_example_np(self, example: Any) -> Any:  # of a sequence, which SkipDecoding lacks
            return example

    encoded = Encoded()
    return dict.fromkeys(image_fields(features), encoded) or None


def image_fields(features: Mapping[str, Any]) -> dict[str, bool]:
    """The features that are images, and whether each is a sequence of them."""
    return {
        name: hasattr(feature, "feature")
        for name, feature in features.items()
        if _is_image(getattr(feature, "feature", feature))
    }


def _is_image(feature: Any) -> bool:
    return any(kind.__name__ == "Image" for kind in type(feature).__mro__)


def opened(dataset: str, examples: Any) -> None:
    """Keeps the examples of a dataset, "NAME@SPLIT", for `read_image`."""
    _OPENED[dataset] = examples


def image_sources(dataset: str, index: int, field: str, count: int | None) -> str | list[str]:
    """The source of an image of an example; of `count` images where the field is a sequence."""
    source = f"{SCHEME}{dataset}#{index}/{field}"
    return source if count is None else [f"{source}/{number}" for number in range(count)]


def read_image(source: str) -> bytes:
    """Returns the encoded image of a source.

    Raises:
      UserError: the dataset is none that this process reads.
    """
    dataset, _, place = source.removeprefix(SCHEME).rpartition("#")
    if dataset not in _OPENED:
        raise UserError(f"there is no image {source}: name the dataset as the source of the data")
    index, field, *number = place.split("/")
    value = _OPENED[dataset][int(index)][field]
    return bytes(value[int(number[0])] if number else value)
