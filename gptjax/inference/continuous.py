"""Completions of many prompts by continuous batching: as soon as one ends, the next prompt takes its place."""

from collections.abc import Iterator, Sequence

import numpy as np

from gptjax.inference.batching import BatchedEngine
from gptjax.inference.engine import Completion, FinishReason, Images, prompt_seeds
from gptjax.inference.requests import GenerationRequest, SampledToken
from gptjax.inference.sampling import Sampling
from gptjax.inference.text_stream import TextStream


class _Text:
    """The text of a completion in progress."""

    def __init__(self, stream: TextStream) -> None:
        self.stream = stream
        self.logprobs: list[float] = []
        self.reason: FinishReason | None = None
        self.end: int | None = None
        self.end_logprob: float | None = None

    def completion(self) -> Completion:
        self.stream.flush()
        tokens, logprobs = np.array(self.stream.tokens, np.int32), np.array(self.logprobs, np.float32)
        return Completion(tokens, logprobs, self.stream.text, self.reason or "length", self.end, self.end_logprob)


def complete_prompts(
    engine: BatchedEngine,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int,
    sampling: Sampling,
    *,
    seeds: int | Sequence[int] = 0,
    stop: Sequence[str] = (),
    end_tokens: Sequence[int] = (),
    ignore_end_of_text: bool = False,
    separate_text: bool = False,
    images: Sequence[Images] | None = None,
) -> Iterator[Completion]:
    """Yields the completions in the order of the prompts; the arguments are those of `Engine.generate`.

    Raises:
      UserError: as `BatchedEngine.insert`, or the numbers of seeds and prompts differ; before anything runs.
    """
    ends = tuple(dict.fromkeys([*end_tokens, *(() if ignore_end_of_text else engine.tokenizer.ends)]))
    requests = [
        GenerationRequest(
            tuple(map(int, prompt)),
            max_new_tokens,
            sampling,
            seed,
            end_tokens=ends,
            images=() if images is None else tuple(images[i]),
        )
        for i, (prompt, seed) in enumerate(zip(prompts, prompt_seeds(seeds, len(prompts)), strict=True))
    ]
    for request in requests:
        engine.check(request)
    texts = {
        engine.insert(request): _Text(TextStream(engine.tokenizer, stop, () if separate_text else request.tokens))
        for request in requests
    }
    for text in texts.values():
        while text.reason is None:
            for event in engine.step():
                _add(engine, texts[event.request], event, stop)
        yield text.completion()


def _add(engine: BatchedEngine, text: _Text, event: SampledToken, stop: Sequence[str]) -> None:
    """Appends a sampled token to its text, which a stop string may end."""
    if text.reason is not None:
        return  # sampled in the same step as the end of a stop string
    text.reason = event.finish_reason
    if event.finish_reason not in (None, "length"):
        text.end, text.end_logprob = event.token, event.logprob
        return
    text.logprobs.append(event.logprob)
    text.stream.push(event.token, decode=bool(stop))
    if text.stream.stopped:
        text.reason = "stop"
        engine.evict(event.request)
