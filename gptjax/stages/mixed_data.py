"""What stage "pretrain" prints about its sources: at the start, and while it reads them."""

from collections.abc import Iterator

from gptjax.data.mixture import Mixture
from gptjax.data.pipeline import Microbatch
from gptjax.training.stage import Run, describe_data


def describe(mixture: Mixture, total_tokens: int, context_length: int) -> dict[str, str]:
    """Returns documents, tokens, epochs and held-out documents of a run, for a mixture a line for each source.

    Args:
      total_tokens: length of training.
      context_length: T, tokens of a row.
    """
    train, held_out = (
        [getattr(corpus, name).split.num_documents for corpus in mixture.corpora] for name in ("train", "validation")
    )
    if len(mixture.parts) == 1:
        return describe_data("documents", train[0], held_out[0], mixture.num_tokens, total_tokens)
    rows = -(-total_tokens // context_length)
    counts, epochs = mixture.interleaving.counts(rows), mixture.epochs(rows)
    table = [("source", "of run", "documents", "tokens", "epochs", "held out", "")]
    for i, part in enumerate(mixture.parts):
        table.append(
            (
                part.name,
                f"{100 * counts[i] / rows:.2f} %",
                f"{train[i]:,}",
                f"{mixture.corpora[i].train.split.num_tokens:,}",
                f"{epochs[part.name]:.3g}",
                f"{held_out[i]:,}",
                f"({100 * held_out[i] / (train[i] + held_out[i]):.2g} %)",
            )
        )
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    lines = [
        "  ".join(
            [row[0].ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True))]
        )
        for row in table
    ]
    return {"data": "\n            ".join(line.rstrip() for line in lines)}


def announcing_repeats(
    microbatches: Iterator[Microbatch], mixture: Mixture, start: int, size: int, run: Run
) -> Iterator[Microbatch]:
    """Yields the microbatches; prints a line when a source has been read once, and repeats.

    Args:
      microbatches: of the run, from row `start` on.
      size: rows of a microbatch over all processes.
    """
    for microbatch in microbatches:
        for name in mixture.repeated_in(start, start + size):
            run.say(f"all training documents of {name} have been read once: they repeat, in another order")
        start += size
        yield microbatch
