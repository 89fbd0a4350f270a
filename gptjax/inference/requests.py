"""Requests to the engine of continuous batching, and what it reports of them."""

import dataclasses
from typing import Literal, Protocol

import numpy as np
import numpy.typing as npt

from gptjax.config import UserError
from gptjax.inference.row_sampling import MOST_TOP_LOGPROBS
from gptjax.inference.sampling import Sampling

EndReason = Literal["end_of_text", "end_of_turn", "length"]
MOST_ENDS = 16  # tokens that end a completion

TopLogprobs = tuple[tuple[int, float], ...]  # tokens and log-probabilities, the most probable first


class TokenConstraint(Protocol):
    """What a completion may consist of, such as a grammar; it belongs to one request and has its own state."""

    def allowed(self) -> npt.NDArray[np.bool_]:
        """The tokens that may come next, (V,); at least one. An end token is allowed where the text may end."""
        ...

    def accept(self, token: int) -> None:
        """Continues after a sampled token that is not an end token."""
        ...


@dataclasses.dataclass(frozen=True)
class GenerationRequest:
    """One completion to generate.

    Attributes:
      tokens: the prompt, at least one token.
      max_new_tokens: at least 1.
      sampling: sampling settings.
      seed: sampling seed, modulo 2**32.
      end_tokens: tokens that end the completion, at most MOST_ENDS.
      top_logprobs: the most probable tokens to report with each sampled token, 0 to 20.
      prompt_logprobs: the log-probabilities of the prompt's tokens are computed, and `top_logprobs` of each.
      constraint: restricts the tokens; None: all are allowed.
      adapter: name of a LoRA adapter of the engine; None: the base model.
      images: uint8 (X,) each, as the vision encoder reads them, in the order of the prompt's image tokens.
    """

    tokens: tuple[int, ...]
    max_new_tokens: int
    sampling: Sampling = dataclasses.field(default_factory=Sampling)
    seed: int = 0
    end_tokens: tuple[int, ...] = ()
    top_logprobs: int = 0
    prompt_logprobs: bool = False
    constraint: TokenConstraint | None = None
    adapter: str | None = None
    images: tuple[npt.NDArray[np.uint8], ...] = dataclasses.field(default=(), compare=False)

    def check(self, vocab_size: int, context: int) -> None:
        """Raises UserError for a request that a model of this vocabulary and context can never complete."""
        if not self.tokens:
            raise UserError("the prompt is empty: give it at least one token")
        if self.max_new_tokens < 1:
            raise UserError(f"max_new_tokens={self.max_new_tokens} must be at least 1")
        if len(self.tokens) + self.max_new_tokens > context:
            raise UserError(
                f"a prompt of {len(self.tokens)} tokens and max_new_tokens={self.max_new_tokens} exceed the model's "
                f"context of {context} tokens: shorten one"
            )
        if not 0 <= self.top_logprobs <= min(MOST_TOP_LOGPROBS, vocab_size):
            raise UserError(f"top_logprobs={self.top_logprobs} must be in 0 to {min(MOST_TOP_LOGPROBS, vocab_size)}")
        if len(self.end_tokens) > MOST_ENDS:
            raise UserError(f"there are {len(self.end_tokens)} end tokens, more than {MOST_ENDS}")
        biased = tuple(token for token, _ in self.sampling.logit_bias)
        for name, tokens in (("a prompt", self.tokens), ("end_tokens", self.end_tokens), ("logit_bias", biased)):
            if outside := [token for token in tokens if not 0 <= token < vocab_size]:
                raise UserError(f"{name} has token {outside[0]}, outside of the model's vocabulary of {vocab_size}")


@dataclasses.dataclass(frozen=True)
class SampledToken:
    """One token of a completion, as `BatchedEngine.step` reports it.

    Attributes:
      request: the number that `insert` returned.
      token: also the end token, which ends the completion.
      logprob: its log-probability under the model, before temperature, penalties, filters and constraints.
      top: the most probable tokens, as many as the request's `top_logprobs`.
      finish_reason: with the last token: "end_of_text" or "end_of_turn" (`token` is an end token), or "length".
    """

    request: int
    token: int
    logprob: float
    top: TopLogprobs = ()
    finish_reason: EndReason | None = None


@dataclasses.dataclass(frozen=True)
class PromptLogprobs:
    """Log-probabilities of the tokens of a prompt but the first, each given those before it.

    Attributes:
      logprobs: float32 (N - 1,) for a prompt of N tokens.
      top: for each of them the most probable tokens, as many as the request's `top_logprobs`.
    """

    logprobs: npt.NDArray[np.float32]
    top: tuple[TopLogprobs, ...]


@dataclasses.dataclass
class EngineStats:
    """Counters and gauges of an engine.

    Attributes:
      rows_in_use: rows that read a prompt or decode.
      waiting: requests without a row.
      pages_in_use, pages_cached, pages_total: pages that requests use, that only the prefix cache keeps, and all.
      prefix_queries, prefix_hits: whole pages of prompts that were looked up in the prefix cache, and found.
      tokens_prefilled, tokens_decoded: prompt tokens read, without those found; tokens of completions.
      tokens_proposed, tokens_accepted: tokens that speculative decoding proposed; those that completions have.
      programs: programs compiled or loaded.
    """

    rows_in_use: int = 0
    waiting: int = 0
    pages_in_use: int = 0
    pages_cached: int = 0
    pages_total: int = 0
    prefix_queries: int = 0
    prefix_hits: int = 0
    tokens_prefilled: int = 0
    tokens_decoded: int = 0
    tokens_proposed: int = 0
    tokens_accepted: int = 0
    programs: int = 0
