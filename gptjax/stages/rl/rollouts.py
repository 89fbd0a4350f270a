"""The batches of a policy that is trained on its own completions, iteration after iteration.

In an iteration the policy completes `rl.prompts_per_iteration` prompts, the completions are rewarded and measured, and
the policy is trained on them for `rl.inner_epochs` epochs. The arrays are kept in `<workdir>/rollouts/` while a
checkpoint lies within the iteration, so that a run that resumes in the middle of one trains on the same completions. A
file that is missing, empty or damaged is discarded, and the policy of the checkpoint samples the completions again.
Images of the prompts are not kept: they are read again from their files.
"""

import hashlib
import io
import math
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
from jax.sharding import Mesh

from gptjax import files
from gptjax.checkpoint.stored_checkpoint import step_directories
from gptjax.config import Config, UserError
from gptjax.data.chat_batches import Epochs
from gptjax.data.pipeline import ExampleArrays, Microbatch
from gptjax.distributed import processes
from gptjax.parallel.rows import process_rows
from gptjax.stages.rl.completions import Arrays, Completions, CompletionSampler, EncodedPrompt
from gptjax.training.stage import Run

MAX_ARRAYS = 32  # in a file of an iteration; the losses read fewer


class Rollouts:
    """The batches of a stage whose policy samples its own data, iteration after iteration.

    Args:
      config: complete.
      prompts: the training prompts.
      loss_arrays: completions -> what the loss reads of each token in addition to the arrays of `lay_out`, (N, T) each,
        with `weights`; and further metrics.
      text: number of prompts trained on before, number of prompts that follow -> further arrays of the latter, with the
        prompts as leading axis; their `text_weights` sum to 1 over the prompts. None: there are none.
    """

    def __init__(
        self,
        config: Config,
        mesh: Mesh,
        sampler: CompletionSampler,
        prompts: Sequence[EncodedPrompt],
        loss_arrays: Callable[[Completions], tuple[Arrays, dict[str, float]]],
        text: Callable[[int, int], ExampleArrays] | None = None,
    ) -> None:
        self._config, self._mesh, self._sampler, self._prompts = config, mesh, sampler, prompts
        self._loss_arrays, self._text = loss_arrays, text
        self._order = Epochs(len(prompts), len(prompts), config.seed)

    @property
    def tokens_per_prompt(self) -> int:
        """Positions of an element of a batch, padding included."""
        return self._config.rl.responses_per_prompt * self._sampler.row_length

    @property
    def _shape(self) -> tuple[int, int, int]:
        """(P, G, T) of the arrays of an iteration."""
        return self._config.rl.prompts_per_iteration, self._config.rl.responses_per_prompt, self._sampler.row_length

    def batches(self, start: int, run: Run | None) -> Iterator[Microbatch]:
        """Yields the microbatches that follow the first `start` prompts; a prompt counts once in each inner epoch.

        Args:
          run: the run whose policy samples the completions.
        """
        assert run is not None, "completions are sampled from the policy of a run"
        rl, size, whole = self._config.rl, self._config.sequences_per_microbatch, self._config.sequences_per_batch
        iteration, done = divmod(start, rl.prompts_per_iteration * rl.inner_epochs)
        rows = process_rows(self._mesh, size)
        done -= done % whole  # a run that resumes with larger batches repeats a part of one
        while True:
            prompts = self._prompts_of(iteration)
            arrays = (self._kept(run, iteration) if done else None) or self._sampled(run, iteration, prompts)
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
                    here = {name: a[local] for name, a in batch.items()}
                    for name, a_PNX in self._sampler.images_of([prompts[i] for i in chosen[local]]).items():
                        here[name] = np.repeat(a_PNX[:, None], rl.responses_per_prompt, axis=1)
                    yield Microbatch(here, size * self.tokens_per_prompt)
            iteration, done = iteration + 1, 0

    def _shuffled(self, iteration: int, epoch: int) -> npt.NDArray[np.intp]:
        """Returns the order of an iteration's prompts in an inner epoch."""
        return self._generator(iteration, 1 + epoch).permutation(self._config.rl.prompts_per_iteration)

    def _prompts_of(self, iteration: int) -> list[EncodedPrompt]:
        count = self._config.rl.prompts_per_iteration
        return [self._prompts[self._order.place(iteration * count + i)] for i in range(count)]

    def _generator(self, *numbers: int) -> np.random.Generator:
        return np.random.Generator(np.random.Philox(np.random.SeedSequence([self._config.seed % 2**64, *numbers])))

    def _sampled(self, run: Run, iteration: int, prompts: Sequence[EncodedPrompt]) -> Arrays:
        """Samples the completions of an iteration from the policy; returns (P, G, T) arrays."""
        rl = self._config.rl
        count = rl.prompts_per_iteration * rl.responses_per_prompt
        seeds = self._generator(iteration, 0).integers(2**32, size=count).tolist()
        completions = self._sampler.sample(run.policy, prompts, rl.responses_per_prompt, seeds)
        loss_arrays, metrics = self._loss_arrays(completions)
        laid_out = ("tokens", "targets", "segments", "positions")
        arrays = {name: completions.arrays[name].reshape(self._shape) for name in laid_out}
        arrays |= {name: np.asarray(a_NT).reshape(self._shape) for name, a_NT in loss_arrays.items()}
        summary = completions.summary() | metrics
        run.record("rollout", completions.shown(), iteration=iteration, **summary)
        run.say(
            f"iteration {iteration}: reward {summary['reward']:.3f}, KL {summary['kl']:.3f}, "
            f"{summary['response_tokens']:.1f} tokens"
        )
        if processes.is_first():
            self._keep(run.workdir, iteration, arrays)
        return arrays

    # --- files for a run that resumes in the middle of an iteration ---------------------------------------------------

    def _keep(self, workdir: Path, iteration: int, arrays: Arrays) -> None:
        """Writes the arrays of an iteration, and removes those that no checkpoint needs and unfinished files."""
        path = _path(workdir, iteration)
        try:
            path.parent.mkdir(exist_ok=True)
            write_arrays(path, arrays)
            oldest = min((*self._iterations_of_checkpoints(workdir), iteration))
            for other in path.parent.glob("*.npz"):
                if other.stem.isdecimal() and int(other.stem) < oldest:
                    other.unlink(missing_ok=True)
            for other in path.parent.glob("*.part"):  # of a run that was killed
                other.unlink(missing_ok=True)
        except OSError as error:
            raise UserError(f"cannot write {path}: {error.strerror}") from None

    def _iterations_of_checkpoints(self, workdir: Path) -> list[int]:
        """Returns the iterations of the checkpoints."""
        rl = self._config.rl
        steps = rl.prompts_per_iteration * rl.inner_epochs // self._config.sequences_per_batch
        return [int(directory.name) // steps for directory in step_directories(workdir / "checkpoints")]

    def _kept(self, run: Run, iteration: int) -> Arrays | None:
        """Reads the arrays of an iteration that has begun; None unless all processes read the same undamaged file.

        After None the policy samples the iteration again, with the same sampling seeds: a pure function of the
        checkpoint that the run resumes from, but not what an uninterrupted run would have trained on.
        """
        path = _path(run.workdir, iteration)
        arrays, digest, problem = None, None, ""
        try:
            arrays, digest = read_arrays(path, self._shape)
        except OSError as error:
            problem = error.strerror or str(error)
        except ValueError as error:
            problem = str(error)
        # One process may fail to read what the others can, and all must compute the same.
        found = processes.gather([digest, problem])
        if digest is not None and all(other == digest for other, _ in found):
            return arrays
        reason = next((why for _, why in found if why), "the processes read different files")
        run.say(f"cannot use {path} ({reason}): the policy samples the completions of the iteration again")
        return None


def write_arrays(path: Path, arrays: Arrays) -> None:
    """Writes the arrays of an iteration to the disk, whole or not at all; OSError when that fails."""
    files.write_arrays(path, {"names": np.array(sorted(arrays))} | arrays)


def read_arrays(path: Path, shape: tuple[int, ...]) -> tuple[Arrays, str]:
    """Reads what `write_arrays` wrote, from a file that may contain anything.

    Args:
      shape: of each array.

    Returns:
      The arrays, and the SHA-256 of the file.

    Raises:
      OSError: the file cannot be read.
      ValueError: it is empty or damaged, its arrays have other shapes, or it is too large for them.
    """
    largest = 16 * math.prod(shape) + 4096  # bytes: more than any array with its header
    content = files.read_bytes(path, MAX_ARRAYS * largest)
    try:
        arrays = files.read_arrays(io.BytesIO(content), MAX_ARRAYS * largest)  # compares checksums
        names = arrays.pop("names").tolist()
    except Exception as error:  # on arbitrary bytes zipfile and numpy raise exceptions of many types
        raise ValueError(f"it is damaged: {type(error).__name__}") from None
    if sorted(arrays) != names or any(array.dtype.kind not in "biuf" for array in arrays.values()):
        raise ValueError("it is damaged: its arrays are not those that were written")
    if any(array.shape != shape for array in arrays.values()):
        raise ValueError("its iteration has other sizes")
    return arrays, hashlib.sha256(content).hexdigest()


def _path(workdir: Path, iteration: int) -> Path:
    return workdir / "rollouts" / f"{iteration:08d}.npz"
