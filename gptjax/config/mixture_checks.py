"""Validates `data.mixture` and `data.mixture_schedule`."""

import itertools

from gptjax.config.errors import require
from gptjax.config.sections import Config, DataConfig


def check_mixture(config: Config) -> None:
    """Raises UserError if the mixture has invalid weights, or is combined with keys that a mixture replaces."""
    data = config.data
    if not data.mixture:
        require(
            not data.mixture_schedule,
            "data.mixture_schedule changes the weights of data.mixture, which is empty: set it, or unset the schedule",
        )
        return
    require(
        data.source == DataConfig.source,
        f"data.source={data.source} and data.mixture exclude each other: add the source to the mixture, or leave "
        f"data.source at {DataConfig.source}",
    )
    require(
        data.validation_source is None,
        f"data.validation_source={data.validation_source} is for data.source, and each source of data.mixture has a "
        "validation split of its own: unset it",
    )
    sources = [source for source, _ in data.mixture]
    for source, weight in data.mixture:
        require(weight > 0, f"data.mixture has the weight {weight} for {source!r}: weights must be positive")
        require(sources.count(source) == 1, f"data.mixture has {source!r} twice: add up its weights in one pair")
    _check_schedule(data)
    for name, value in (
        ("batch.epochs", config.batch.epochs),
        ("evaluation.every_epochs", config.evaluation.every_epochs),
        ("checkpoint.every_epochs", config.checkpoint.every_epochs),
    ):
        in_tokens = name.replace("every_epochs", "every_tokens").replace("batch.epochs", "batch.total_tokens")
        require(
            value is None,
            f"{name}={value}: the sources of data.mixture have epochs of different lengths: unset it, and set "
            f"{in_tokens} instead",
        )


def _check_schedule(data: DataConfig) -> None:
    for tokens, weights in data.mixture_schedule:
        place = f"data.mixture_schedule at {tokens} tokens"
        require(tokens >= 0, f"{place}: the number of tokens must not be negative")
        require(
            len(weights) == len(data.mixture),
            f"{place} has {len(weights)} weights, and data.mixture {len(data.mixture)} sources: give a weight for each",
        )
        require(
            min(weights) >= 0 and max(weights) > 0,
            f"{place}: the weights {weights} must not be negative, and one must be positive",
        )
    for (first, _), (second, _) in itertools.pairwise(data.mixture_schedule):
        require(
            first < second,
            f"data.mixture_schedule has {second} tokens after {first}: sort its pairs by tokens, each once",
        )
