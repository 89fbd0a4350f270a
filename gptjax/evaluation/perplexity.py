"""Sliding-window perplexity of text.

Metrics:
  nats_per_token    mean over the model's tokens
  perplexity        exp(nats_per_token)
  bits_per_byte     per UTF-8 byte of the source text, comparable between tokenizers
  word_perplexity   for de-tokenised benchmarks: exp(nats / benchmark tokens, line ends included), as reported by
                    Radford et al. 2019, table 3
"""

import dataclasses
import itertools
import math
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from gptjax.config import UserError
from gptjax.data.tokenizers import Tokenizer
from gptjax.evaluation.detokenizers import get_detokenizer, original_tokens
from gptjax.evaluation.scoring import ScoringRequest, ScoringResult, start_of_text, windows
from gptjax.evaluation.tasks import identity
from gptjax.metrics.measurement import Measurement, exponential, ratio, scaled, weighted_mean


@dataclasses.dataclass(frozen=True)
class EncodedText:
    """A document, or the stream of several, and the sizes that its nats are divided by.

    Attributes:
      tokens: int32 (T,), the first of which is only context.
      size_bytes: UTF-8 bytes of the source text.
      original_tokens: number of the benchmark's tokens.
      identity: hash of the source text.
    """

    tokens: np.ndarray
    size_bytes: int
    original_tokens: int
    identity: str


@dataclasses.dataclass(frozen=True)
class PerplexityTask:
    """Encoded texts and their windows.

    Attributes:
      texts: the documents, or their concatenation.
      requests: the windows of all texts, in order.
      windows_per_text: number of windows of each text.
      detokenized: whether the texts were de-tokenised.
      settings: what the metrics depend on other than the model, for the report.
    """

    texts: list[EncodedText]
    requests: list[ScoringRequest]
    windows_per_text: list[int]
    detokenized: bool
    settings: dict[str, Any]

    @property
    def identities(self) -> list[str]:
        """A hash of each text, equal for equal text whatever the tokenizer."""
        return [text.identity for text in self.texts]

    def metrics(self, scores: Sequence[ScoringResult]) -> dict[str, Measurement]:
        """Computes the metrics above, with standard errors over documents."""
        ends = np.cumsum([0, *self.windows_per_text])
        nats = [-math.fsum(s.logprob for s in scores[a:b]) for a, b in itertools.pairwise(ends)]
        per_token = ratio(nats, [len(text.tokens) - 1 for text in self.texts])
        per_byte = ratio(nats, [text.size_bytes for text in self.texts])
        metrics = {
            "perplexity": exponential(per_token),
            "nats_per_token": per_token,
            "bits_per_byte": scaled(per_byte, 1 / math.log(2)),
        }
        if self.detokenized:
            metrics["word_perplexity"] = exponential(ratio(nats, [text.original_tokens for text in self.texts]))
        return metrics


@dataclasses.dataclass(frozen=True)
class MixedPerplexityTask:
    """The texts of the sources of a mixture.

    Attributes:
      parts: name of a source -> its texts.
      weights: share of each source in the tokens; they sum to 1.
    """

    parts: dict[str, PerplexityTask]
    weights: Sequence[float]

    @property
    def requests(self) -> list[ScoringRequest]:
        """The windows of all texts, in order."""
        return [request for task in self.parts.values() for request in task.requests]

    @property
    def identities(self) -> list[str]:
        """A hash of each text."""
        return [each for task in self.parts.values() for each in task.identities]

    @property
    def settings(self) -> dict[str, Any]:
        """Those of the sources, which are the same but for sums over them."""
        settings = [task.settings for task in self.parts.values()]
        common = {name: value for name, value in settings[0].items() if name != "detokenizer_restored_lines"}
        summed = ("documents", "tokens", "bytes", "original_tokens")
        sums = {name: sum(each[name] for each in settings) for name in summed if name in common}
        return common | sums | {"weights": dict(zip(self.parts, self.weights, strict=True))}

    def metrics(self, scores: Sequence[ScoringResult]) -> dict[str, Measurement]:
        """Computes the metrics of text that has the sources by their weights, and as "METRIC/NAME" those of each.

        In the standard error of bits per byte of the mixture, the bytes per token are constants.
        """
        remaining = iter(scores)
        of_parts = {
            name: task.metrics(list(itertools.islice(remaining, len(task.requests))))
            for name, task in self.parts.items()
        }
        nats = weighted_mean([metrics["nats_per_token"] for metrics in of_parts.values()], self.weights)
        bytes_per_token = math.fsum(
            weight * task.settings["bytes"] / task.settings["tokens"]
            for task, weight in zip(self.parts.values(), self.weights, strict=True)
        )
        mixed = {
            "perplexity": exponential(nats),
            "nats_per_token": nats,
            "bits_per_byte": scaled(nats, 1 / (math.log(2) * bytes_per_token)),
        }
        return mixed | {f"{key}/{name}": of[key] for name, of in of_parts.items() for key in of}


def perplexity_task(
    documents: Iterable[str],
    tokenizer: Tokenizer,
    context_length: int,
    *,
    limit: int | None = None,
    stride: int | None = None,
    detokenizer: str | None = None,
    concatenate: bool = False,
) -> PerplexityTask:
    """Encodes `documents` for their perplexity.

    Each document is scored separately, its first token predicted from end-of-text. With a tokenizer without end-of-text
    the first token is not scored, but its bytes count.

    Args:
      limit: number of documents to use, from the first; None: all.
      stride: tokens scored by a window; None: half of the context. See `windows`.
      detokenizer: a name in `DETOKENIZERS`; None: the documents are plain text.
      concatenate: scores the documents as one stream with end-of-text, which is scored too, after each, as in training.

    Raises:
      UserError: `stride` exceeds the context, the detokenizer is unknown, there is nothing to score, or `concatenate`
        is used with a tokenizer without end-of-text.
    """
    stride = max(1, context_length // 2) if stride is None else stride
    if not 1 <= stride <= context_length:
        raise UserError(f"stride={stride} must be between 1 and the model's context of {context_length} tokens")
    undo = None if detokenizer is None else get_detokenizer(detokenizer)
    texts, restored, lines = [], 0.0, 0
    for document in itertools.islice(documents, limit):
        if undo is not None:
            count = document.removesuffix("\n").count("\n") + 1
            restored, lines = restored + undo.restored_lines(document) * count, lines + count
        ids = tokenizer.encode(document if undo is None else undo.to_plain(document))
        texts.append(EncodedText(ids, len(document.encode()), original_tokens(document), identity(document)))
    num_documents = len(texts)
    if concatenate:
        end = start_of_text(tokenizer)
        stream = np.concatenate([np.array(end, np.int32), *(part for text in texts for part in (text.tokens, end))])
        size_bytes, originals = (sum(text.size_bytes for text in texts), sum(text.original_tokens for text in texts))
        whole = identity([text.identity for text in texts])
        texts = [EncodedText(stream.astype(np.int32), size_bytes, originals, whole)]
    elif tokenizer.end_of_text is not None:
        start = np.array([tokenizer.end_of_text], np.int32)
        texts = [dataclasses.replace(text, tokens=np.concatenate([start, text.tokens])) for text in texts]
    texts = [text for text in texts if len(text.tokens) > 1]
    if not texts:
        raise UserError("the text has no token to score: give at least two tokens")
    windowed = [list(windows(text.tokens, context_length, stride)) for text in texts]
    settings: dict[str, Any] = {
        "stride": stride,
        "context_length": context_length,
        "documents": num_documents,
        "concatenated": concatenate,
        "first_token_scored": tokenizer.end_of_text is not None,
        "tokens": sum(len(text.tokens) - 1 for text in texts),
        "bytes": sum(text.size_bytes for text in texts),
    }
    if undo is not None:
        settings |= {
            "detokenizer": detokenizer,
            "original_tokens": sum(text.original_tokens for text in texts),
            "detokenizer_restored_lines": restored / lines,
        }
    requests = list(itertools.chain.from_iterable(windowed))
    return PerplexityTask(texts, requests, [len(part) for part in windowed], undo is not None, settings)
