"""Adapter of a workdir's model to lm-evaluation-harness (pip install 'gptjax[lm-eval]').

import lm_eval
from gptjax.evaluation.harness import harness_model

lm_eval.simple_evaluate(model=harness_model("runs/gpt2"), tasks=["lambada_openai", "hellaswag"], num_fewshot=0)
"""

import functools
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from gptjax.config import UserError
from gptjax.evaluation.scoring import Scorer, encode_pair, start_of_text, windows
from gptjax.files import expand
from gptjax.inference.engine import Engine
from gptjax.inference.sampling import Sampling
from gptjax.stages.trained_model import TrainedModel, load_model, parse_mesh

MAX_NEW_TOKENS = 256  # default for tasks without a setting, as in the harness


class _HarnessMethods:
    """The methods of `lm_eval.api.model.LM`. A request's `args` are its texts, and settings for generation."""

    def __init__(self, trained: TrainedModel, batch_size: int) -> None:
        super().__init__()
        self._tokenizer = trained.tokenizer
        self._scorer = Scorer(trained.model, trained.params, trained.mesh, batch_size)
        self._trained, self._batch_size = trained, batch_size

    @functools.cached_property
    def _engine(self) -> Engine:  # a second copy of the weights, for the tasks that generate
        return Engine(self._trained.model, self._trained.params, self._tokenizer, self._trained.mesh)

    def loglikelihood(self, requests: Sequence[Any]) -> list[tuple[float, bool]]:
        """Computes the log-probability of each (context, continuation), and whether greedy decoding gives it."""
        scores = self._scorer.scores([encode_pair(self._tokenizer, *request.args) for request in requests])
        return [(score.logprob, score.is_greedy) for score in scores]

    def loglikelihood_rolling(self, requests: Sequence[Any]) -> list[float]:
        """Computes the log-probability of each text after end-of-text, in disjoint windows."""
        start = np.array(start_of_text(self._tokenizer), np.int32)
        length = self._scorer.context_length
        parts = [
            list(windows(np.concatenate([start, self._tokenizer.encode(request.args[0])]), length, length))
            for request in requests
        ]
        scores = iter(self._scorer.scores([window for part in parts for window in part]))
        return [sum(next(scores).logprob for _ in part) for part in parts]

    def generate_until(self, requests: Sequence[Any]) -> list[str]:
        """Generates text after each context, up to one of the strings `until`; long contexts are cut on the left."""
        texts = []
        for start in range(0, len(requests), self._batch_size):
            batch = requests[start : start + self._batch_size]
            # The engine uses the same settings for a whole batch.
            for settings in {repr(sorted(request.args[1].items())): request.args[1] for request in batch}.values():
                same = [i for i, request in enumerate(batch, start) if request.args[1] == settings]
                texts += list(zip(same, self._generate([requests[i].args[0] for i in same], settings), strict=True))
        return [text for _, text in sorted(texts)]

    def _generate(self, contexts: list[str], settings: dict[str, Any]) -> list[str]:
        from lm_eval.models.utils import normalize_gen_kwargs

        known = normalize_gen_kwargs(settings, MAX_NEW_TOKENS)
        longest = self._scorer.context_length
        if known["max_gen_toks"] >= longest:
            raise UserError(
                f"the task generates {known['max_gen_toks']} tokens, but the model's context has {longest}: "
                "set gen_kwargs='max_gen_toks=...'"
            )
        prompts = [self._tokenizer.encode(context)[known["max_gen_toks"] - longest :] for context in contexts]
        # Tasks such as DROP set no temperature, which means greedy decoding.
        temperature = known.get("temperature", 0.0)
        sampling = Sampling(temperature=temperature, top_k=known.get("top_k"), top_p=known.get("top_p"))
        completions = self._engine.generate(prompts, known["max_gen_toks"], sampling, stop=known["until"])
        return [completion.text for completion in completions]


def harness_model(workdir: Path | str, *, batch_size: int = 8, mesh: str = "") -> Any:
    """Returns an `lm_eval.api.model.LM` of the newest weights of a workdir.

    Args:
      batch_size: batch size as in `Scorer`, also of generation.
      mesh: mesh such as "data=2,tensor=4"; empty: all devices on data.

    Raises:
      UserError: see `load_model`; or the harness is not installed.
    """
    try:
        from lm_eval.api.model import LM
    except ImportError:
        raise UserError("lm-evaluation-harness is not installed: pip install 'gptjax[lm-eval]'") from None
    kind = type("GptjaxLM", (_HarnessMethods, LM), {})  # not a class statement: the harness is imported only here
    return kind(load_model(expand(os.fspath(workdir)), parse_mesh(mesh)), batch_size)
