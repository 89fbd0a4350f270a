"""Answers that a policy writes to prompts, rewarded and measured. All processes hold all of them."""

import dataclasses
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jax
import numpy as np
import numpy.typing as npt
from jax.sharding import Mesh

from gptjax.config import Config
from gptjax.data.chat_batches import lay_out
from gptjax.data.conversations import Prompt
from gptjax.data.templates import Encoded, answered
from gptjax.data.tokenizers import Tokenizer
from gptjax.distributed import preemption, processes
from gptjax.inference.engine import Completion, Engine
from gptjax.models import peft
from gptjax.models.gpt import GPT
from gptjax.models.heads import VALUE
from gptjax.parallel.mesh import constrain
from gptjax.stages.policy import REFERENCE
from gptjax.stages.rl.reward_functions import RewardSource
from gptjax.stages.rl.rl_objective import completion_measurer

ROW_MULTIPLE = 16  # positions: rows are no longer than the longest prompt needs, rounded up
SHOWN = 8  # answers of an iteration in samples/

Arrays = dict[str, npt.NDArray[Any]]


@dataclasses.dataclass(frozen=True)
class EncodedPrompt:
    """A prompt as the policy reads it: int32 tokens up to where its answer begins."""

    prompt: Prompt
    tokens: npt.NDArray[np.int32]


@dataclasses.dataclass(frozen=True)
class Answers:
    """What a policy wrote: G answers to each of P prompts, those to one side by side.

    Attributes:
      prompts: P.
      texts: P x G.
      rewards_N: float64, N = P x G.
      arrays: (N, T) each: those of `lay_out`, an answer a row, and those of `completion_measurer`.
      ended_N: bool, whether each came to an end by itself.
    """

    prompts: Sequence[Prompt]
    texts: list[str]
    rewards_N: npt.NDArray[np.float64]
    arrays: Arrays
    ended_N: npt.NDArray[np.bool_]

    @property
    def mask_NT(self) -> npt.NDArray[np.bool_]:
        """Where the target is a token of an answer."""
        return self.arrays["weights"] > 0

    def summary(self) -> dict[str, float]:
        """What metrics.jsonl tells of them: means over answers, but for entropy, which is one over tokens."""
        mask_NT, arrays = self.mask_NT, self.arrays
        log_ratio_NT = np.where(mask_NT, arrays["old_logprobs"] - arrays["reference_logprobs"], 0)
        return {
            "reward": float(self.rewards_N.mean()),
            "reward_std": float(self.rewards_N.std()),
            "kl": float(log_ratio_NT.sum(axis=1, dtype=np.float64).mean()),
            "entropy": float(arrays["entropy"][mask_NT].mean()),
            "response_tokens": float(mask_NT.sum(axis=1).mean()),
            "ended": float(self.ended_N.mean()),
        }

    def shown(self) -> str:
        """The first answers with their prompts and rewards, for people to read."""
        group = len(self.texts) // len(self.prompts)
        parts = []
        for i in range(min(SHOWN, len(self.texts))):
            said = [f"{m.role}: {m.content}" for m in self.prompts[i // group].messages]
            parts.append("\n".join([*said, f"assistant: {self.texts[i]}", f"(reward {self.rewards_N[i]:.3f})"]))
        return "\n\n".join(parts)


class AnswerWriter:
    """Has a policy answer prompts, and measures what it wrote.

    Args:
      config: complete.
      prompts: all that will be answered: the longest decides how long a row is.
      end_of_turn: the token that ends an answer.
    """

    def __init__(
        self,
        config: Config,
        mesh: Mesh,
        tokenizer: Tokenizer,
        reward: RewardSource,
        prompts: Sequence[EncodedPrompt],
        end_of_turn: int,
    ) -> None:
        self._config, self._mesh, self._tokenizer, self._reward = config, mesh, tokenizer, reward
        self._end_of_turn = end_of_turn
        need = max(len(prompt.tokens) for prompt in prompts) + config.rl.response_tokens
        self.row_length = min(-(-need // ROW_MULTIPLE) * ROW_MULTIPLE, config.model.context_length)
        measure = completion_measurer(config)

        def measured(params: Any, batch: dict[str, jax.Array]) -> dict[str, jax.Array]:
            batch = {name: constrain(array, "batch", None, None) for name, array in batch.items()}
            # Whole on every device: any process reads it.
            return {name: constrain(array, None, None, None) for name, array in measure(params, batch).items()}

        self._measure = jax.jit(measured)

    def write(self, params: Any, prompts: Sequence[EncodedPrompt], group: int, seeds: Sequence[int]) -> Answers:
        """`group` answers to each prompt, rewarded.

        Args:
          params: all parameters; a value function may be among them.
          seeds: of each answer.

        Raises:
          UserError: the source of the rewards fails.
          PreemptedError: the run was asked to stop.
        """
        asked = [prompt for prompt in prompts for _ in range(group)]
        answers, rewards_N = self._generate(params, asked, seeds)
        encoded = [self._encoded(prompt, answer) for prompt, answer in zip(asked, answers, strict=True)]
        rows = [lay_out([of_one], 1, self.row_length, pack=False) for of_one in encoded]
        arrays = {name: np.concatenate([row[name] for row in rows]) for name in rows[0] if name != "ends"}
        return Answers(
            prompts=[prompt.prompt for prompt in prompts],
            texts=[answer.text for answer in answers],
            rewards_N=rewards_N,
            arrays=arrays | self._measured(params, arrays, group),
            ended_N=np.array([answer.finish_reason != "length" for answer in answers]),
        )

    def _generate(
        self, params: Any, asked: Sequence[EncodedPrompt], seeds: Sequence[int]
    ) -> tuple[list[Completion], npt.NDArray[np.float64]]:
        """The answers, and their rewards: while some are written, the host judges those that are there."""
        settings = self._config.rl
        policy = {name: part for name, part in params.items() if name not in (REFERENCE, VALUE)}
        # No second copy of the weights.
        gpt, params = GPT(self._config.model), peft.merge(self._config.peft, policy)
        engine = Engine(gpt, params, self._tokenizer, self._mesh, weights="stacked")
        answers: list[Completion] = []
        with ThreadPoolExecutor(1) as host:
            pending = []
            for first in range(0, len(asked), settings.generate_batch):
                preemption.check()
                chunk = slice(first, first + settings.generate_batch)
                answers += engine.generate(
                    [prompt.tokens for prompt in asked[chunk]],
                    settings.response_tokens,
                    seeds=seeds[chunk],
                    end_tokens=(self._end_of_turn,),
                    separate_text=True,
                )
                judged = [prompt.prompt for prompt in asked[chunk]], [answer.text for answer in answers[chunk]]
                if self._reward.on_host and processes.is_first():
                    pending.append(host.submit(self._reward.rewards, *judged))
            if self._reward.on_host:  # by one process: what a function says need not be the same twice
                rewards = processes.of_first(lambda: np.concatenate([of.result() for of in pending]).tolist())
                return answers, np.array(rewards)
        return answers, self._reward.rewards([prompt.prompt for prompt in asked], [answer.text for answer in answers])

    def _encoded(self, prompt: EncodedPrompt, answer: Completion) -> Encoded:
        """Prompt and answer; the token that ended it is one of its own, and learned as the others are."""
        end = [] if answer.end is None else [answer.end]
        return answered(prompt.tokens, np.append(answer.tokens, end).astype(np.int32))

    def _measured(self, params: Any, arrays: Arrays, group: int) -> Arrays:
        """Of `completion_measurer`, (N, T), batch after batch of as many rows as a microbatch of training has."""
        size, found = self._config.sequences_per_microbatch * group, []
        for first in range(0, len(arrays["tokens"]), size):
            batch = {}
            for name, whole_NT in arrays.items():
                rows = whole_NT[first : first + size]
                filled = np.concatenate([rows, np.zeros((size - len(rows), *rows.shape[1:]), rows.dtype)])
                batch[name] = filled.reshape(-1, group, self.row_length)
            found.append(jax.device_get(self._measure(params, batch)))
        joined = {name: np.concatenate([of[name] for of in found]) for name in found[0]}
        return {name: a_BGT.reshape(-1, self.row_length)[: len(arrays["tokens"])] for name, a_BGT in joined.items()}
