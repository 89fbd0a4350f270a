"""Generation of the completions of an iteration, by static or by continuous batching (`rl.batching`).

Static batching decodes `rl.generate_batch` completions until the longest of them has ended. Continuous batching gives
the place of a completion that has ended to the next prompt (Yu et al. 2022, Orca). A completion has its sampling seed,
so both sample the same completions but for rounding, and an iteration that is sampled again has the same ones.
"""

from collections.abc import Iterator, Sequence
from itertools import islice
from typing import Any

import numpy as np
import numpy.typing as npt
from jax.sharding import Mesh

from gptjax.config import Config, require
from gptjax.data.tokenizers import Tokenizer
from gptjax.distributed import preemption
from gptjax.inference.batch_programs import MOST_STEPS
from gptjax.inference.batching import DEFAULT_CHUNK, BatchedEngine
from gptjax.inference.continuous import complete_prompts
from gptjax.inference.engine import Completion, Engine, Images
from gptjax.inference.page_pool import page_bytes
from gptjax.inference.sampling import Sampling
from gptjax.models import peft
from gptjax.models.gpt import GPT
from gptjax.models.heads import VALUE
from gptjax.parallel.mesh import batch_shards, use_mesh
from gptjax.parallel.platforms import platform_defaults
from gptjax.stages.policy import REFERENCE


class CompletionGenerator:
    """Generates completions of at most rl.response_tokens tokens at temperature 1.

    Args:
      config: complete.
      end_tokens: tokens that end a completion, in addition to end-of-text.
      longest: tokens of the longest prompt.

    Raises:
      UserError: rl.batching=continuous on a mesh that shards the rows of a batch.
    """

    def __init__(
        self, config: Config, mesh: Mesh, tokenizer: Tokenizer, end_tokens: Sequence[int], longest: int
    ) -> None:
        self._config, self._mesh, self._tokenizer = config, mesh, tokenizer
        self._end_tokens, self._longest = end_tokens, longest
        shards, batching = batch_shards(mesh), config.rl.batching
        if batching == "auto":
            batching = "continuous" if shards == 1 and _is_continuous_faster(mesh) else "static"
        self._is_continuous = batching == "continuous"
        require(
            batching == "static" or shards == 1,
            f"rl.batching=continuous has one cache for all rows, so each of the {shards} shards of a batch "
            "(mesh.data, mesh.fsdp, mesh.expert) would decode all of them: set rl.batching=static",
        )

    def generate(
        self,
        params: Any,
        prompts: Sequence[npt.NDArray[np.int32]],
        seeds: Sequence[int],
        images: Sequence[Images] | None,
    ) -> Iterator[list[Completion]]:
        """Yields the completions in the order of the prompts, rl.generate_batch of them at a time.

        Args:
          params: all parameters of the stage, of which the policy is used.
          prompts: the tokens of each prompt.
          seeds: the sampling seed of each completion.
          images: of each prompt; None: no prompt has images.

        Raises:
          PreemptedError: the run was asked to stop.
        """
        policy = {name: part for name, part in params.items() if name not in (REFERENCE, VALUE)}
        policy = peft.merge(self._config.peft, policy)
        batches = self._continuous if self._is_continuous else self._static
        yield from batches(GPT(self._config.model), policy, prompts, seeds, images)

    def _static(
        self,
        gpt: GPT,
        policy: Any,
        prompts: Sequence[npt.NDArray[np.int32]],
        seeds: Sequence[int],
        images: Sequence[Images] | None,
    ) -> Iterator[list[Completion]]:
        # Stacked: no second copy of the weights.
        engine = Engine(gpt, policy, self._tokenizer, self._mesh, weights="stacked")
        for first in range(0, len(prompts), self._config.rl.generate_batch):
            preemption.check()
            batch = slice(first, first + self._config.rl.generate_batch)
            yield engine.generate(
                prompts[batch],
                self._config.rl.response_tokens,
                seeds=seeds[batch],
                end_tokens=self._end_tokens,
                separate_text=True,
                images=None if images is None else images[batch],
            )

    def _continuous(
        self,
        gpt: GPT,
        policy: Any,
        prompts: Sequence[npt.NDArray[np.int32]],
        seeds: Sequence[int],
        images: Sequence[Images] | None,
    ) -> Iterator[list[Completion]]:
        """As `_static`. The engine is a new one: the prefix cache of the last one is of other weights."""
        rows, new = self._config.rl.generate_batch, self._config.rl.response_tokens
        page = min(DEFAULT_CHUNK, gpt.config.context_length)
        # A prefix is read by a program whose length is rounded up, at most to the context.
        length = gpt.config.context_length if "prefix" in gpt.config.attention_pattern else self._longest + new
        pages = rows * -(-length // page) + 1  # one is scratch space
        engine = BatchedEngine(
            gpt,
            policy,
            self._tokenizer,
            self._mesh,
            "stacked",
            rows=rows,
            chunk=page,
            cache_bytes=pages * page_bytes(gpt.config, page),
            steps=MOST_STEPS,
        )
        completions = complete_prompts(
            engine,
            [prompt.tolist() for prompt in prompts],
            new,
            Sampling(),
            seeds=seeds,
            end_tokens=self._end_tokens,
            separate_text=True,
            images=images,
        )
        while True:
            preemption.check()
            batch = list(islice(completions, rows))
            if not batch:
                return
            yield batch


def _is_continuous_faster(mesh: Mesh) -> bool:
    with use_mesh(mesh):
        return platform_defaults().continuous_completions
