"""The tokenizer and the batches of stages other than pretraining, and a check for settings that only it has."""

import hashlib
from collections.abc import Callable, Iterator

from jax.sharding import Mesh

from gptjax.config import Config, UserError, naming
from gptjax.data import tokenizers
from gptjax.data.pipeline import ExampleSource, Microbatch, batches
from gptjax.data.tokenizers import Tokenizer
from gptjax.files import expand
from gptjax.parallel.rows import process_rows


def refuse_settings_of_pretraining(config: Config, mesh: Mesh, record: str) -> None:
    """Raises UserError when `config` has settings that only stage "pretrain" supports.

    Args:
      record: the stage's name of an item of its data, for messages.
    """
    if config.batch.ramp_start_tokens is not None:
        raise UserError("batch.ramp_start_tokens is for stage pretrain: unset it")
    if config.data.objective != "causal":
        raise UserError(f"data.objective={config.data.objective} is for stage pretrain: set it to causal")
    if config.data.mixture:
        raise UserError(f"data.mixture is for stage pretrain: unset it, and name the {record}s by data.source")
    if config.data.on_corrupt == "skip" and not config.model.reads_images:  # damaged images can be skipped
        raise UserError(
            f"data.on_corrupt=skip is for stage pretrain: set it to error, and correct any damaged {record}"
        )
    if mesh.shape["context"] > 1:
        raise UserError(f"mesh.context={mesh.shape['context']} is for stage pretrain: set it to 1")


def find_tokenizer(config: Config, texts: list[str]) -> Tokenizer:
    """Returns the tokenizer of `init_from`; if that is unset, the one that data.tokenizer names, trained on `texts`."""
    if config.init_from is not None:
        return tokenizers.load(expand(config.init_from) / "tokenizer")
    with naming("data.tokenizer"):
        tokenizers.check_spec(config.data.tokenizer)
    return tokenizers.get_tokenizer(
        config.data.tokenizer,
        train_documents=lambda: iter(texts),
        corpus_fingerprint=hashlib.sha256("\0".join(texts).encode()).hexdigest()[:16],
        cache_dir=expand(config.data.cache_dir),
    )


def reader(config: Config, mesh: Mesh) -> Callable[[ExampleSource, int], Iterator[Microbatch]]:
    """Returns (examples, number of them consumed before) -> this process's rows of the microbatches that follow."""
    size = config.sequences_per_microbatch
    rows, prefetch = process_rows(mesh, size), config.data.prefetch_batches
    return lambda examples, start: batches(examples, start=start, batch_size=size, rows=rows, prefetch=prefetch)
