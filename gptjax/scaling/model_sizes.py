"""Models of other sizes than a given one, in its proportions."""

import dataclasses
import math
from collections.abc import Callable, Iterator

from gptjax.config import GPTConfig, UserError
from gptjax.scaling.parameters import active_parameter_count, non_embedding_parameter_count, parameter_count

# What N of a law counts. Hoffmann et al. 2022 count all parameters, Kaplan et al. 2020 all but embeddings.
COUNTS: dict[str, Callable[[GPTConfig], int]] = {
    "total": parameter_count,
    "non_embedding": non_embedding_parameter_count,
    "active": active_parameter_count,
}
MAX_LAYERS = 200
ASPECTS = (0.8, 1.0, 1.25)  # of width / layers, relative to the given model


def resized(model: GPTConfig, *, width: int | None = None, layers: int | None = None) -> GPTConfig:
    """Returns `model` with another width or number of layers, for transfer from a base model.

    Heads keep their width and grow in number, and the feed-forward width is in proportion; with
    `model.base_head_width` set, heads keep their number and grow in width instead.

    Raises:
      UserError: the heads or the feed-forward layers of that width are no whole numbers.
    """
    model = dataclasses.replace(model, num_layers=layers or model.num_layers)
    if width is None:
        return model
    wider_heads = model.base_head_width is not None

    def proportional(name: str, value: int) -> int:
        if value * width % model.embed_dim:
            raise UserError(
                f"a width of {width} is {width / model.embed_dim:.4g} times model.embed_dim={model.embed_dim}, which "
                f"makes model.{name}={value} no whole number: choose other widths"
            )
        return value * width // model.embed_dim

    def head_count(name: str, value: int) -> int:
        return value if wider_heads else proportional(name, value)

    return dataclasses.replace(
        model,
        embed_dim=width,
        num_heads=head_count("num_heads", model.num_heads),
        num_kv_heads=None if model.num_kv_heads is None else head_count("num_kv_heads", model.num_kv_heads),
        head_width=proportional("head_width", model.head_dim) if wider_heads else model.head_width,
        ffw_dim=None if model.ffw_dim is None else proportional("ffw_dim", model.ffw_dim),
    )


def scaled_models(model: GPTConfig) -> Iterator[GPTConfig]:
    """Yields models of all sizes with about the proportions of `model`, narrow ones first.

    The width of a head, the number of query heads for each head of keys and values, and the ratios of width and
    feed-forward width to the number of heads are kept. The ratio of width to layers is kept up to ASPECTS. The number
    of heads is a multiple of a power of two that grows with it, so that the mesh axis "tensor" can divide it.
    """
    aspect = model.embed_dim / model.num_layers
    width, group = model.embed_dim / model.num_heads, model.num_heads // model.kv_heads
    feed_forward = None if model.ffw_dim is None else model.ffw_dim / model.embed_dim
    for heads in _head_counts(group):
        embed_dim = round(width * heads)
        for layers in sorted({max(1, round(embed_dim / (aspect * ratio))) for ratio in ASPECTS}):
            if layers > MAX_LAYERS:
                continue
            yield dataclasses.replace(
                model,
                num_layers=layers,
                num_heads=heads,
                num_kv_heads=None if model.num_kv_heads is None else heads // group,
                embed_dim=embed_dim,
                ffw_dim=None if feed_forward is None else 64 * max(1, round(feed_forward * embed_dim / 64)),
            )


def _head_counts(group: int) -> Iterator[int]:
    heads = group
    while heads <= 512 * group:
        yield heads
        heads += group * max(1, 2 ** (int(math.log2(heads / group)) - 2))


def nearest_model(model: GPTConfig, count: str, parameters: float) -> GPTConfig:
    """Returns the one of `scaled_models` whose count of parameters is nearest, by ratio."""
    return min(scaled_models(model), key=lambda other: abs(math.log(COUNTS[count](other) / parameters)))
