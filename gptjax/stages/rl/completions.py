"""Samples completions of prompts from a policy, and measures them. Every process holds all of them."""

import dataclasses
import functools
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import numpy.typing as npt
from jax.sharding import Mesh

from gptjax.checkpoint.state import SHARED_PROGRAMS
from gptjax.config import Config, computation
from gptjax.data.chat_batches import lay_out
from gptjax.data.conversations import Prompt
from gptjax.data.images.image_files import ImageFiles
from gptjax.data.images.image_references import ImageReference
from gptjax.data.images.square_images import padded
from gptjax.data.templates import ChatFormat, EncodedConversation, with_completion
from gptjax.data.tokenizers import Tokenizer
from gptjax.distributed import processes
from gptjax.inference.engine import Completion
from gptjax.losses import policy_gradient
from gptjax.parallel.mesh import constrain
from gptjax.stages.rl.generation import CompletionGenerator
from gptjax.stages.rl.reward_functions import RewardSource
from gptjax.stages.rl.rl_objective import completion_measurer

ROW_MULTIPLE = 16  # the length of a row is rounded up to a multiple of this
NUM_SHOWN = 8  # completions of an iteration in samples/

Arrays = dict[str, npt.NDArray[Any]]


@dataclasses.dataclass(frozen=True)
class EncodedPrompt:
    """A prompt, its int32 tokens up to where the completion begins, and the images of the messages that were kept."""

    prompt: Prompt
    tokens: npt.NDArray[np.int32]
    images: tuple[ImageReference, ...] = ()


@dataclasses.dataclass(frozen=True)
class Completions:
    """G completions of each of P prompts, sampled from a policy; those of one prompt are adjacent. N = P G.

    Attributes:
      prompts: P.
      texts: N.
      rewards_N: float64, less rl.missing_eos_penalty where a completion was cut off.
      arrays: (N, T) each: those of `lay_out`, with one completion a row, those of `completion_measurer`, and
        `sampler_logprobs`, float32: the log-probabilities that the tokens were drawn with, 0 outside the completions.
      ended_N: bool, False where a completion was cut off at rl.response_tokens.
    """

    prompts: Sequence[Prompt]
    texts: list[str]
    rewards_N: npt.NDArray[np.float64]
    arrays: Arrays
    ended_N: npt.NDArray[np.bool_]

    @property
    def mask_NT(self) -> npt.NDArray[np.bool_]:
        """True where the target is a token of a completion."""
        return self.arrays["weights"] > 0

    def loss_mask_NT(self, config: Config) -> npt.NDArray[np.bool_]:
        """`mask_NT`, without the completions that rl.mask_truncated_completions excludes from the loss."""
        return self.mask_NT & self.ended_N[:, None] if config.rl.mask_truncated_completions else self.mask_NT

    def importance_weights_NT(self, config: Config) -> npt.NDArray[np.float32]:
        """Weights of truncated importance sampling, with which rl.importance_sampling_cap multiplies policy losses.

        The policy loss is a maximum of two products with the advantage, so positive weights may multiply the advantage
        instead. They are 1 outside the completions, and everywhere without a cap.
        """
        if (cap := config.rl.importance_sampling_cap) is None:
            return np.ones_like(self.mask_NT, np.float32)
        old_NT, sampler_NT = (jnp.asarray(self.arrays[name]) for name in ("old_logprobs", "sampler_logprobs"))
        weights_NT = policy_gradient.truncated_importance_weights(old_NT, sampler_NT, cap)
        return np.where(self.mask_NT, np.asarray(weights_NT), np.float32(1))

    def summary(self) -> dict[str, float]:
        """Returns the metrics: means over completions; those of the entropy and of the sampler are over tokens."""
        mask_NT, arrays = self.mask_NT, self.arrays
        gaps = arrays["old_logprobs"][mask_NT].astype(np.float64) - arrays["sampler_logprobs"][mask_NT]
        log_ratio_NT = np.where(mask_NT, arrays["old_logprobs"] - arrays["reference_logprobs"], 0)
        return {
            "reward": float(self.rewards_N.mean()),
            "reward_std": float(self.rewards_N.std()),
            "kl": float(log_ratio_NT.sum(axis=1, dtype=np.float64).mean()),
            "entropy": float(arrays["entropy"][mask_NT].mean()),
            "response_tokens": float(mask_NT.sum(axis=1).mean()),
            "ended": float(self.ended_N.mean()),
            "sampling_logp_difference_mean": float(np.abs(gaps).mean()),
            "sampling_logp_difference_max": float(np.abs(gaps).max()),
            "importance_sampling_ratio_mean": float(np.exp(gaps).mean()),
            "importance_sampling_ratio_min": float(np.exp(gaps).min()),
            "importance_sampling_ratio_max": float(np.exp(gaps).max()),
        }

    def shown(self) -> str:
        """Returns the first completions with their prompts and rewards, as text."""
        group = len(self.texts) // len(self.prompts)
        parts = []
        for i in range(min(NUM_SHOWN, len(self.texts))):
            lines = [f"{m.role}: {m.content}" for m in self.prompts[i // group].messages]
            lines.append(f"assistant: {self.texts[i]}")
            lines.append(f"(reward {self.rewards_N[i]:.3f}{'' if self.ended_N[i] else ', cut off'})")
            parts.append("\n".join(lines))
        return "\n\n".join(parts)


@functools.lru_cache(maxsize=SHARED_PROGRAMS)
def _measuring(config: Config) -> jax.stages.Wrapped:
    """Returns the jitted `completion_measurer`, the same for all runs of a process that compute the same."""
    measure = completion_measurer(config)

    def measured(params: Any, batch: dict[str, jax.Array]) -> dict[str, jax.Array]:
        batch = {name: constrain(array, "batch", *[None] * (array.ndim - 1)) for name, array in batch.items()}
        # Replicated, so that any process can read it.
        return {name: constrain(array, None, None, None) for name, array in measure(params, batch).items()}

    return jax.jit(measured)


class CompletionSampler:
    """Samples completions from a policy, rewards and measures them.

    Args:
      config: complete.
      prompts: all prompts that will be used: the longest decides the length of a row.
      chat_format: format of the prompts and completions.
      images: reads the images of the prompts; None: they have none.

    Raises:
      UserError: as `CompletionGenerator`.
    """

    def __init__(
        self,
        config: Config,
        mesh: Mesh,
        tokenizer: Tokenizer,
        reward: RewardSource,
        prompts: Sequence[EncodedPrompt],
        chat_format: ChatFormat,
        images: ImageFiles | None = None,
    ) -> None:
        self._config, self._reward = config, reward
        self._format, self._images = chat_format, images
        self._images_per_prompt = 0 if images is None else max(len(prompt.images) for prompt in prompts)
        longest = max(len(prompt.tokens) for prompt in prompts)
        need = longest + config.rl.response_tokens
        self.row_length = min(-(-need // ROW_MULTIPLE) * ROW_MULTIPLE, config.model.context_length)
        self._generator = CompletionGenerator(config, mesh, tokenizer, chat_format.end_tokens, longest)
        self._measure = _measuring(computation(config))

    def images_of(self, prompts: Sequence[EncodedPrompt]) -> Arrays:
        """Reads the images of prompts, in the order of their tokens, then zeros: uint8 (P, N, X) by the name "images".

        It is empty where no prompt of the run has an image.

        Raises:
          UserError: an image is missing or damaged.
        """
        if self._images is None or self._images_per_prompt == 0:
            return {}
        read = [self._images.read_all(prompt.images) for prompt in prompts]
        return {"images": padded(read, self._images_per_prompt, self._images.vision)}

    def sample(self, params: Any, prompts: Sequence[EncodedPrompt], group: int, seeds: Sequence[int]) -> Completions:
        """Samples `group` completions of each prompt.

        Args:
          params: all parameters, with or without a value function.
          seeds: the sampling seed of each completion.

        Raises:
          UserError: the source of rewards fails, or an image cannot be read.
          PreemptedError: the run was asked to stop.
        """
        repeated = [prompt for prompt in prompts for _ in range(group)]
        images_PNX = self.images_of(prompts).get("images")
        completions, rewards_N = self._generate(params, repeated, seeds, images_PNX)
        ended_N = np.array([completion.finish_reason != "length" for completion in completions])
        if self._config.rl.missing_eos_penalty is not None:
            rewards_N = rewards_N - self._config.rl.missing_eos_penalty * ~ended_N
        encoded = [self._encoded(prompt, completion) for prompt, completion in zip(repeated, completions, strict=True)]
        rows = [lay_out([sequence], 1, self.row_length, pack=False) for sequence in encoded]
        arrays = {name: np.concatenate([row[name] for row in rows]) for name in rows[0] if name != "ends"}
        sampler_NT = np.zeros_like(arrays["weights"])
        sampler_NT[arrays["weights"] > 0] = np.concatenate([_logprobs(completion) for completion in completions])
        return Completions(
            prompts=[prompt.prompt for prompt in prompts],
            texts=[completion.text for completion in completions],
            rewards_N=rewards_N,
            arrays=arrays | self._measured(params, arrays, group, images_PNX) | {"sampler_logprobs": sampler_NT},
            ended_N=ended_N,
        )

    def _generate(
        self,
        params: Any,
        prompts: Sequence[EncodedPrompt],
        seeds: Sequence[int],
        images_PNX: npt.NDArray[np.uint8] | None,
    ) -> tuple[list[Completion], npt.NDArray[np.float64]]:
        """Returns a completion of each prompt, and the rewards, which the host computes while others are sampled.

        Args:
          images_PNX: of the P prompts, each of which is in `prompts` several times, one after another.
        """
        texts = [prompt.prompt for prompt in prompts]
        images = None
        if images_PNX is not None:
            group = len(prompts) // len(images_PNX)
            images = [list(images_PNX[i // group, : len(prompt.images)]) for i, prompt in enumerate(prompts)]
        completions: list[Completion] = []
        with ThreadPoolExecutor(1) as host:
            pending = []
            for found in self._generator.generate(params, [prompt.tokens for prompt in prompts], seeds, images):
                chunk = slice(len(completions), len(completions) + len(found))
                completions += [dataclasses.replace(c, text=self._format.decode(c.tokens)) for c in found]
                if self._reward.on_host and processes.is_first():
                    pending.append(host.submit(self._reward.rewards, texts[chunk], completions[chunk]))
            if self._reward.on_host:  # by one process: a user's function need not be deterministic
                rewards = processes.of_first(lambda: np.concatenate([future.result() for future in pending]).tolist())
                return completions, np.array(rewards)
        return completions, self._reward.rewards(texts, completions)

    def _encoded(self, prompt: EncodedPrompt, completion: Completion) -> EncodedConversation:
        """Returns prompt and completion; the token that ended the completion is trained on as the others are."""
        end = [] if completion.end is None else [completion.end]
        return with_completion(prompt.tokens, np.append(completion.tokens, end).astype(np.int32), prompt.images)

    def _measured(self, params: Any, arrays: Arrays, group: int, images_PNX: npt.NDArray[np.uint8] | None) -> Arrays:
        """Returns the (N, T) arrays of `completion_measurer`, computed in batches of a microbatch's rows."""
        size, found = self._config.sequences_per_microbatch * group, []
        for first in range(0, len(arrays["tokens"]), size):
            batch = {}
            for name, whole_NT in arrays.items():
                filled = _filled(whole_NT[first : first + size], size)
                batch[name] = filled.reshape(-1, group, self.row_length)
            if images_PNX is not None:
                prompts = slice(first // group, (first + size) // group)
                batch["images"] = np.repeat(_filled(images_PNX[prompts], size // group)[:, None], group, axis=1)
            found.append(jax.device_get(self._measure(params, batch)))
        joined = {name: np.concatenate([of[name] for of in found]) for name in found[0]}
        return {name: a_BGT.reshape(-1, self.row_length)[: len(arrays["tokens"])] for name, a_BGT in joined.items()}


def _logprobs(completion: Completion) -> npt.NDArray[np.float32]:
    """The log-probabilities of the tokens that are trained on: those of a completion, and the token that ended it."""
    end = [] if completion.end is None else [completion.end_logprob]
    return np.append(completion.logprobs, np.array(end, np.float32))


def _filled(rows: npt.NDArray[Any], size: int) -> npt.NDArray[Any]:
    """`size` rows, the last of which are zeros."""
    return np.concatenate([rows, np.zeros((size - len(rows), *rows.shape[1:]), rows.dtype)])
