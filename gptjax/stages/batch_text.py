"""What the batches of a run hold, as text: decoded tokens with their segments and loss masks, and lengths."""

import itertools
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from gptjax.config import Config
from gptjax.data import task_inputs
from gptjax.data.mixture import open_mixture
from gptjax.data.pipeline import Microbatch
from gptjax.data.templates import chat_format
from gptjax.data.tokenizers import Tokenizer
from gptjax.parallel.mesh import make_mesh
from gptjax.stages import builders, registry
from gptjax.stages.chat_data import open_chat, prompts_of
from gptjax.stages.rl.policy_stage import encoded_prompts
from gptjax.training.stage import Stage

MAX_CHARACTERS = 400  # of a part of a row; longer ones lose their middle
MEASURED = 2000  # sequences whose lengths are counted, where the data have no table of lengths
BAR = 40  # characters of the longest bar of the histogram

_SHOWN_BY_ROW = ("tokens", "targets", "weights", "segments", "positions", "ends", "examples")


def show(config: Config, rows: int = 2) -> str:
    """Renders the first rows of a run's first microbatch, and a histogram of the lengths of its documents.

    A row is shown in parts, a line each: its segment, whether its tokens are predicted and so in the loss, their
    number, and their text. Special tokens are shown by name. The policy stages sample their own completions, so that
    their prompts are shown.

    Args:
      config: of the run; the data are prepared unless they are in the cache.
      rows: number of rows, or of elements with several rows, at most those of a microbatch.

    Raises:
      UserError: as in the stage's `build`.
    """
    registry.check(config)
    mesh = make_mesh(config.mesh)
    definition = registry.definition(config)
    if "rl" in definition.sections:
        data = open_chat(config, mesh, None, prompts_of)
        prompts = encoded_prompts(data, data.train)
        text = _Text(data.tokenizer, data.chat_format.special_tokens)
        parts = [f"prompt {i}, {p.prompt.place}\n{_line(1, False, p.tokens, text)}" for i, p in enumerate(prompts)][
            :rows
        ]
        return "\n\n".join([*parts, _histogram([len(p.tokens) for p in prompts], "prompts")])
    stage = builders.build(config, mesh, None)
    text = _Text(stage.tokenizer, _special_tokens(stage))
    batches = stage.batches(0, None)
    first = next(batches)
    shown = [_example(stage.config, first, row, text) for row in range(min(rows, len(first.arrays["tokens"])))]
    if definition.conversational or definition.head is not None:
        lengths = list(itertools.islice(_lengths(itertools.chain([first], batches)), MEASURED))
        measured = _histogram(lengths, "sequences, in the order of training")
    else:
        mixture = open_mixture(
            config.data, context_length=config.model.context_length, seed=config.seed, tokenizer=stage.tokenizer
        )
        of_sources = [f" of {part.name}" if len(mixture.parts) > 1 else "" for part in mixture.parts]
        measured = "\n\n".join(
            _histogram(corpus.train.split.lengths, f"training documents{of_source}, with end-of-text")
            for of_source, corpus in zip(of_sources, mixture.corpora, strict=True)
        )
    sizes = ", ".join(f"{name} {'x'.join(map(str, array.shape))}" for name, array in first.arrays.items())
    return "\n\n".join([f"microbatch: {sizes}", *shown, measured])


def _special_tokens(stage: Stage) -> dict[str, int]:
    """Returns the ids of the special tokens that the stage appends to the tokenizer's vocabulary, by name."""
    definition = registry.definition(stage.config)
    if definition.conversational:
        return chat_format(stage.config.chat, stage.tokenizer, stage.config.model.vision).special_tokens
    if definition.head is not None:
        return {f"<{name}>": token for name, token in task_inputs.special_tokens(stage.tokenizer)._asdict().items()}
    return {}


class _Text:
    """Decodes token ids, with special tokens by their names."""

    def __init__(self, tokenizer: Tokenizer, special: Mapping[str, int]) -> None:
        self._tokenizer = tokenizer
        first = tokenizer.vocab_size - len(tokenizer.added)
        self._names = {first + i: name for i, name in enumerate(tokenizer.added)}
        self._names |= {token: name for name, token in special.items()}

    def __call__(self, ids: Iterable[int]) -> str:
        runs = itertools.groupby(ids, key=self._names.get)
        return "".join(
            self._tokenizer.decode(list(run)) if name is None else name * len(list(run)) for name, run in runs
        )


def _example(config: Config, batch: Microbatch, row: int, text: _Text) -> str:
    """Renders a row of a microbatch, or an element with several rows."""
    arrays = {name: array[row] for name, array in batch.arrays.items()}
    tokens = arrays["tokens"]
    if "targets" not in arrays:
        return "\n".join([f"row {row}", *_labelled_lines(config, arrays, text)])
    whole = {name: array for name, array in arrays.items() if array.shape == tokens.shape}
    parts = [whole] if tokens.ndim == 1 else [{n: a[i] for n, a in whole.items()} for i in range(len(tokens))]
    lines = []
    for i, part in enumerate(parts):
        lines.append(f"row {row}" if tokens.ndim == 1 else f"element {row}, row {i}")
        lines += _masked_lines(part, text) if config.data.objective == "masked" else _lines(part, text)
    if "ranks" in arrays:
        lines.append(f"  ranks of the sequences, for each prompt: {arrays['ranks'].tolist()} (0: none)")
    return "\n".join(lines)


def _lines(part: Mapping[str, npt.NDArray[Any]], text: _Text) -> Iterator[str]:
    """Yields a line for each run of tokens in the same segment that are all predicted, or all not."""
    length = len(part["tokens"])
    segments_T = part.get("segments", np.ones(length, np.int32))
    # Position t predicts the token at t + 1; the last target is the only one that is not an input.
    tokens = [*part["tokens"].tolist(), int(part["targets"][-1])]
    predicted = [False, *(part["weights"] > 0).tolist()]
    segments = [*segments_T.tolist(), int(segments_T[-1])]
    if not predicted[-1]:
        tokens, predicted, segments = tokens[:-1], predicted[:-1], segments[:-1]
    keys = zip(segments, predicted, strict=True)
    for (segment, in_loss), run in itertools.groupby(zip(tokens, keys, strict=True), key=lambda pair: pair[1]):
        yield _line(segment, in_loss, [token for token, _ in run], text)


def _masked_lines(part: Mapping[str, npt.NDArray[Any]], text: _Text) -> Iterator[str]:
    """Yields a line for each run of inputs, or of predicted positions, of a masked language model."""
    segments_T = part.get("segments", np.ones(len(part["tokens"]), np.int32))
    keys = zip(segments_T.tolist(), (part["weights"] > 0).tolist(), strict=True)
    positions = zip(part["tokens"].tolist(), part["targets"].tolist(), keys, strict=True)
    for (segment, in_loss), run in itertools.groupby(positions, key=lambda position: position[2]):
        inputs, targets, _ = zip(*run, strict=True)
        line = _line(segment, in_loss, inputs, text)
        yield f"{line}, to predict {_quoted(text(targets))}" if in_loss else line


def _line(segment: int, in_loss: bool, tokens: Sequence[int] | npt.NDArray[np.int32], text: _Text) -> str:
    if segment == 0:
        return f"  padding               {len(tokens):>6} positions"
    ids = [int(token) for token in tokens]
    what = "in loss" if in_loss else "prefix" if segment < 0 else "-"  # the sign marks attention in both directions
    return f"  segment {abs(segment):<4} {what:<9} {len(ids):>4} tokens  {_quoted(text(ids))}"


def _labelled_lines(config: Config, arrays: Mapping[str, npt.NDArray[Any]], text: _Text) -> Iterator[str]:
    """Yields the sequences of a labelled example, and its targets."""
    if arrays["weights"] == 0:
        yield "  padding"
        return
    tokens = np.atleast_2d(arrays["tokens"])
    for sequence, end in zip(tokens, np.atleast_1d(arrays["ends"]).tolist(), strict=True):
        padding = len(sequence) - end - 1
        yield f"  {end + 1:>6} tokens  {_quoted(text(sequence[: end + 1].tolist()))}, then {padding} of padding"
    names = config.task.labels

    def named(label: Any) -> str:
        return names[label] if names and isinstance(label, int) else str(label)

    for name in sorted(arrays.keys() - set(_SHOWN_BY_ROW)):
        array = arrays[name]
        if array.ndim == 0:
            yield f"  {name}: {named(array.item())}"
        else:  # of tagging: one for each position
            values = [f"{i}: {named(value)}" for i, value in enumerate(array.tolist()) if value >= 0]
            yield f"  {name} (position: value): {', '.join(values)}"


def _quoted(text: str) -> str:
    if len(text) > MAX_CHARACTERS:
        half = MAX_CHARACTERS // 2
        text = f"{text[:half]} [... {len(text) - 2 * half:,} characters ...] {text[-half:]}"
    return json.dumps(text, ensure_ascii=False)


def _lengths(batches: Iterable[Microbatch]) -> Iterator[int]:
    """Yields the number of tokens of each sequence."""
    for batch in batches:
        arrays = batch.arrays
        if "segments" in arrays:
            for row in arrays["segments"].reshape(-1, arrays["segments"].shape[-1]):
                yield from np.unique(row[row > 0], return_counts=True)[1].tolist()
        else:
            yield from (arrays["ends"][arrays["weights"] > 0] + 1).ravel().tolist()


def _histogram(lengths: Sequence[int] | npt.NDArray[np.int64], what: str) -> str:
    """Renders a histogram of lengths in tokens, with bins whose bounds are powers of two."""
    lengths_N = np.asarray(lengths, np.int64)
    bins_N = np.ceil(np.log2(np.maximum(lengths_N, 1))).astype(int)
    counts = np.bincount(bins_N)
    lines = [
        f"lengths of {len(lengths_N):,} {what}: mean {lengths_N.mean():,.1f}, median {np.median(lengths_N):,.0f}, "
        f"longest {lengths_N.max():,} tokens"
    ]
    for i in range(int(bins_N.min()), len(counts)):
        low = 2 ** (i - 1) + 1 if i else 0
        bar = "#" * -(-BAR * int(counts[i]) // int(counts.max()))
        lines.append(f"  {low:>11,} to {2**i:>11,} {counts[i]:>12,}  {bar}".rstrip())
    return "\n".join(lines)
