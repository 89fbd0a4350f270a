"""Perplexity of text, by windows that slide over it.

The numbers: nats_per_token (mean over the model's tokens), perplexity (its exponential), bits_per_byte (of the UTF-8
bytes of the source's text, so that tokenizers compare) and, of a de-tokenised benchmark, word_perplexity: exp(nats /
tokens of the benchmark, ends of lines included), as Radford et al. 2019, table 3, report it.
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
from gptjax.evaluation.scoring import Request, Score, start_of_text, windows
from gptjax.metrics.measurement import Measurement, exponential, ratio, scaled


@dataclasses.dataclass(frozen=True)
class Text:
    """A document, or several in one stream, and what its nats are divided by.

    Attributes:
      tokens: int32 [N], the first only context.
      size_bytes: of the source's text.
      original_tokens: the benchmark's, where the text was de-tokenised.
    """

    tokens: np.ndarray
    size_bytes: int
    original_tokens: int


@dataclasses.dataclass(frozen=True)
class PerplexityTask:
    """Texts to score, ready for the model.

    Attributes:
      texts: documents, or the one stream they make.
      requests: the windows of all texts, one text after the other.
      windows_per_text: how many of the requests are each text's.
      settings: what the numbers depend on besides the model, for the report.
    """

    texts: list[Text]
    requests: list[Request]
    windows_per_text: list[int]
    detokenized: bool
    settings: dict[str, Any]

    def metrics(self, scores: Sequence[Score]) -> dict[str, Measurement]:
        """The numbers above; standard errors over documents."""
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
    """Prepares the perplexity of `documents`.

    Each document is scored on its own, its first token predicted from end-of-text. Of a tokenizer without one the
    first token is not predicted, but its bytes count. Concatenated, the documents are one stream, end-of-text after
    each, predicted too: what training reads, and its loss measures.

    Args:
      limit: only the first so many documents; None: all.
      stride: tokens that a window scores; None: half of the context. See `windows`.
      detokenizer: a name in `DETOKENIZERS`.

    Raises:
      UserError: a stride that the context has no room for, an unknown detokenizer, nothing to score, or
        `concatenate` and a tokenizer without end-of-text.
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
        texts.append(Text(ids, len(document.encode()), original_tokens(document)))
    num_documents = len(texts)
    if concatenate:
        end = start_of_text(tokenizer)
        stream = np.concatenate([np.array(end, np.int32), *(part for text in texts for part in (text.tokens, end))])
        sizes = (sum(getattr(text, name) for text in texts) for name in ("size_bytes", "original_tokens"))
        texts = [Text(stream.astype(np.int32), *sizes)]
    elif tokenizer.end_of_text is not None:
        start = np.array([tokenizer.end_of_text], np.int32)
        texts = [dataclasses.replace(text, tokens=np.concatenate([start, text.tokens])) for text in texts]
    texts = [text for text in texts if len(text.tokens) > 1]
    if not texts:
        raise UserError("there is no token to score in the text")
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
