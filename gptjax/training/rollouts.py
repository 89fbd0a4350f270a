"""Answers that a policy writes, rewarded and laid out as batches for it to learn from.

An iteration: the policy as it is answers `rl.prompts_per_iteration` prompts, the answers are rewarded and measured, and
steps learn from them, `rl.inner_epochs` times. All processes hold all answers. What was written is kept in
`<workdir>/rollouts/` as long as there is a checkpoint within the iteration, so that a run that goes on in the middle of
one learns from the same answers.
"""

import dataclasses
import zipfile
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jax
import numpy as np
import numpy.typing as npt
from jax.sharding import Mesh

from gptjax.config import Config, UserError
from gptjax.data.chat_batches import Epochs, lay_out
from gptjax.data.conversations import Prompt
from gptjax.data.pipeline import Example, Microbatch
from gptjax.data.templates import Encoded
from gptjax.data.tokenizers import Tokenizer
from gptjax.inference.engine import Completion, Engine
from gptjax.models.gpt import GPT
from gptjax.models.heads import VALUE
from gptjax.parallel import distributed, preemption
from gptjax.parallel.mesh import constrain
from gptjax.parallel.rows import process_rows
from gptjax.training.policies import answer_measurer
from gptjax.training.preferences import REFERENCE
from gptjax.training.programs import plain
from gptjax.training.reward_sources import RewardSource
from gptjax.training.stage import Learner

ROW_MULTIPLE = 16  # positions: rows are no longer than the longest prompt needs, rounded up
SHOWN = 8  # answers of an iteration in samples/
KL = "kl"  # of a record of split "rollout": nats an answer, policy against reference

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
      arrays: (N, T) each: those of `lay_out`, an answer a row, and those of `answer_measurer`.
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
            KL: float(log_ratio_NT.sum(axis=1, dtype=np.float64).mean()),
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
        measure = answer_measurer(config)

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
        gpt, params = GPT(self._config.model), plain(self._config, policy)
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
                )
                judged = [prompt.prompt for prompt in asked[chunk]], [answer.text for answer in answers[chunk]]
                if self._reward.on_host and distributed.is_first():
                    pending.append(host.submit(self._reward.rewards, *judged))
            if self._reward.on_host:  # by one process: what a function says need not be the same twice
                rewards = distributed.of_first(lambda: np.concatenate([of.result() for of in pending]).tolist())
                return answers, np.array(rewards)
        return answers, self._reward.rewards([prompt.prompt for prompt in asked], [answer.text for answer in answers])

    def _encoded(self, prompt: EncodedPrompt, answer: Completion) -> Encoded:
        """Prompt and answer; the token that ended it is one of its own, and learned as the others are."""
        ends = {"end_of_turn": self._end_of_turn, "end_of_text": self._tokenizer.end_of_text}
        end = ends.get(answer.finish_reason)
        parts = [prompt.tokens, answer.tokens, np.array([] if end is None else [end], np.int32)]
        tokens = np.concatenate(parts).astype(np.int32)
        return Encoded(tokens, np.arange(len(tokens)) >= len(prompt.tokens))

    def _measured(self, params: Any, arrays: Arrays, group: int) -> Arrays:
        """Of `answer_measurer`, (N, T), batch after batch of as many rows as a microbatch of training has."""
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


class Rollouts:
    """The batches of a stage whose policy writes its own data, iteration after iteration.

    Args:
      config: complete.
      prompts: to learn from.
      learn: answers -> what the loss reads of each token besides `lay_out`'s arrays, (N, T) each, `weights` among them;
        and more numbers for metrics.jsonl.
      text: how many prompts were learned from before, and how many follow -> arrays that come with these besides, by
        prompt; their `text_weights` sum to 1 over the prompts. None: there are none.
    """

    def __init__(
        self,
        config: Config,
        mesh: Mesh,
        writer: AnswerWriter,
        prompts: Sequence[EncodedPrompt],
        learn: Callable[[Answers], tuple[Arrays, dict[str, float]]],
        text: Callable[[int, int], Example] | None = None,
    ) -> None:
        self._config, self._mesh, self._writer, self._prompts = config, mesh, writer, prompts
        self._learn, self._text = learn, text
        self._order = Epochs(len(prompts), len(prompts), config.seed)
        self._learner: Learner | None = None

    @property
    def tokens_per_prompt(self) -> int:
        """Positions of an element of a batch, whether a token is there or not."""
        return self._config.rl.responses_per_prompt * self._writer.row_length

    def attach(self, learner: Learner) -> None:
        """Tells whose policy writes; before anything is read."""
        self._learner = learner

    def batches(self, start: int) -> Iterator[Microbatch]:
        """What follows when `start` prompts have been learned from, each counted as often as it was."""
        rl, size, whole = self._config.rl, self._config.sequences_per_microbatch, self._config.sequences_per_batch
        iteration, done = divmod(start, rl.prompts_per_iteration * rl.inner_epochs)
        rows = process_rows(self._mesh, size)
        while True:
            arrays = (self._kept(iteration) if done else None) or self._written(iteration)
            for first in range(done, rl.prompts_per_iteration * rl.inner_epochs, whole):
                epoch, offset = divmod(first, rl.prompts_per_iteration)
                chosen = self._shuffled(iteration, epoch)[offset : offset + whole]
                batch = {name: a_PGT[chosen] for name, a_PGT in arrays.items()}
                if self._text is not None:
                    before = iteration * rl.prompts_per_iteration * rl.inner_epochs + first
                    text = self._text(before, whole)
                    # The step divides by the sum of `weights`, and the loss of the text is a mean already.
                    weights = text["text_weights"] * batch["weights"].sum(dtype=np.float64)
                    batch |= text | {"text_weights": weights.astype(np.float32)}
                for microbatch in range(0, whole, size):
                    local = [microbatch + row for row in rows]
                    yield Microbatch({name: a[local] for name, a in batch.items()}, size * self.tokens_per_prompt)
            iteration, done = iteration + 1, 0

    def _shuffled(self, iteration: int, epoch: int) -> npt.NDArray[np.intp]:
        """The order in which an inner epoch takes the prompts of its iteration."""
        return self._generator(iteration, 1 + epoch).permutation(self._config.rl.prompts_per_iteration)

    def _generator(self, *numbers: int) -> np.random.Generator:
        return np.random.Generator(np.random.Philox(np.random.SeedSequence([self._config.seed % 2**64, *numbers])))

    def _written(self, iteration: int) -> Arrays:
        """Has the policy answer the prompts of an iteration: (P, G, T) arrays."""
        rl, learner = self._config.rl, self._learner
        assert learner is not None
        first = iteration * rl.prompts_per_iteration
        prompts = [self._prompts[self._order.place(first + i)] for i in range(rl.prompts_per_iteration)]
        count = rl.prompts_per_iteration * rl.responses_per_prompt
        seeds = self._generator(iteration, 0).integers(2**32, size=count).tolist()
        answers = self._writer.write(learner.policy, prompts, rl.responses_per_prompt, seeds)
        learned, told = self._learn(answers)
        shape = (rl.prompts_per_iteration, rl.responses_per_prompt, self._writer.row_length)
        known = ("tokens", "targets", "segments", "positions")
        arrays = {name: answers.arrays[name].reshape(shape) for name in known}
        arrays |= {name: np.asarray(a_NT).reshape(shape) for name, a_NT in learned.items()}
        summary = answers.summary() | told
        learner.record("rollout", answers.shown(), iteration=iteration, **summary)
        learner.say(
            f"iteration {iteration}: reward {summary['reward']:.3f}, KL {summary[KL]:.3f}, "
            f"{summary['response_tokens']:.1f} tokens"
        )
        if distributed.is_first():
            self._keep(learner.workdir, iteration, arrays)
        return arrays

    # --- what a run that goes on in the middle of an iteration reads --------------------------------------------------

    def _keep(self, workdir: Path, iteration: int, arrays: Arrays) -> None:
        """Writes the arrays of an iteration, whole or not at all, and removes those that no checkpoint needs."""
        path = _path(workdir, iteration)
        try:
            path.parent.mkdir(exist_ok=True)
            with (part := path.with_suffix(".part")).open("wb") as file:
                np.savez(file, **arrays)  # type: ignore[arg-type]
            part.replace(path)
            oldest = min((*self._iterations_of_checkpoints(workdir), iteration))
            for other in path.parent.glob("*.npz"):
                if other.stem.isdecimal() and int(other.stem) < oldest:
                    other.unlink(missing_ok=True)
        except OSError as error:
            raise UserError(f"cannot write {path}: {error.strerror}") from None

    def _iterations_of_checkpoints(self, workdir: Path) -> list[int]:
        """Those that the checkpoints lie in."""
        rl = self._config.rl
        steps = rl.prompts_per_iteration * rl.inner_epochs // self._config.sequences_per_batch
        saved = (workdir / "checkpoints").glob("*")
        return [int(directory.name) // steps for directory in saved if directory.name.isdecimal()]

    def _kept(self, iteration: int) -> Arrays | None:
        """The arrays of an iteration that has begun; None, and a word about it, where they are gone."""
        assert self._learner is not None
        path = _path(self._learner.workdir, iteration)
        try:
            with np.load(path) as file:
                return dict(file)
        except (OSError, ValueError, zipfile.BadZipFile):
            self._learner.say(f"cannot read {path}: the policy answers the prompts of the iteration anew")
            return None


def _path(workdir: Path, iteration: int) -> Path:
    return workdir / "rollouts" / f"{iteration:08d}.npz"
