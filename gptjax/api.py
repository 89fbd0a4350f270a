"""Python API for notebooks and scripts: `gptjax.load_config`, `gptjax.train`, `gptjax.load`. No flags are parsed.

import gptjax

config = gptjax.load_config("configs/gpt2.py:runlocal", {"batch.total_tokens": 100_000})
report = gptjax.train(config, "runs/demo", callbacks=[lambda record: print(record["step"], record.get("loss"))])
model = gptjax.load("runs/demo")
print(model.generate("The Congress", max_new_tokens=40, temperature=0.8))
"""

import os
from collections.abc import Callable, Sequence
from typing import Any, Literal

from gptjax.config import Config, UserError
from gptjax.data.tokenizers import Tokenizer
from gptjax.files import expand
from gptjax.inference.engine import Engine, Overflow
from gptjax.inference.sampling import Sampling
from gptjax.run import run
from gptjax.stages.trained_model import TrainedModel, load_model, parse_mesh
from gptjax.training.loop import RunReport

DEFAULT_NEW_TOKENS = 128


def train(
    config: Config,
    workdir: str | os.PathLike[str],
    *,
    callbacks: Sequence[Callable[[dict[str, Any]], None]] = (),
    allow_config_changes: bool = False,
    profile: bool = False,
) -> RunReport:
    """Trains `config` in `workdir`, or resumes the run found there.

    Args:
      config: what `gptjax.load_config` returns.
      workdir: created if it does not exist.
      callbacks: each is called with every record of metrics.jsonl: a dict with "step", "tokens", "split", "seconds" and
        values such as "loss" (nats per token).
      allow_config_changes: resume although the workdir's run was started with another config, of the same model.
      profile: write a trace of a few steps to `<workdir>/profile/`.

    Raises:
      UserError: any user error: bad data, a config that contradicts the workdir, a full disk.
    """
    place = expand(os.fspath(workdir))
    return run(config, place, profile=profile, allow_config_changes=allow_config_changes, callbacks=callbacks)


class LoadedModel:
    """A model with its weights and tokenizer, ready to generate.

    Attributes:
      config: of the run, complete.
      tokenizer: `encode` and `decode` convert between text and token ids.
      params: the parameters of the GPT.
      step: of the checkpoint.
    """

    def __init__(self, trained: TrainedModel) -> None:
        self.config: Config = trained.config
        self.tokenizer: Tokenizer = trained.tokenizer
        self.params: Any = trained.params
        self.step: int = trained.step
        self._engine = Engine(trained.model, trained.params, trained.tokenizer, trained.mesh)

    def generate(
        self,
        prompt: str | Sequence[str],
        max_new_tokens: int | None = None,
        *,
        temperature: float = 1.0,
        top_k: int | None = None,
        top_p: float | None = None,
        min_p: float | None = None,
        repetition_penalty: float | None = None,
        seed: int = 0,
        stop: Sequence[str] = (),
        overflow: Overflow = "error",
    ) -> Any:
        """Generates a completion of the prompt, or of each of several.

        Args:
          prompt: text; "" starts a document.
          max_new_tokens: None: DEFAULT_NEW_TOKENS, or fewer where the context has no room for them.
          temperature: divides the logits; 0: greedy decoding.
          top_k: sample from the k most probable tokens; None: from all.
          top_p: sample from the fewest tokens whose probabilities sum to this; None: from all.
          min_p: sample from tokens with at least this fraction of the highest probability; None: from all.
          repetition_penalty: above 1: makes tokens of the text so far less probable.
          seed: sampling seed of the first prompt; those of the others count up from it.
          stop: texts that end a completion, and are not part of it.
          overflow: "slide" continues from the last half of the context where the text outgrows it.

        Returns:
          The completion without its prompt, a str; for a sequence of prompts a list of str.

        Raises:
          UserError: a prompt without room for a completion, or options out of range.
        """
        prompts = [prompt] if isinstance(prompt, str) else list(prompt)
        ids = [self._engine.ids(text) for text in prompts]
        if max_new_tokens is None:
            room = self._engine.model.config.context_length - max(map(len, ids), default=0)
            max_new_tokens = DEFAULT_NEW_TOKENS if overflow == "slide" else max(1, min(DEFAULT_NEW_TOKENS, room))
        sampling = Sampling(temperature, top_k, top_p, min_p, repetition_penalty)
        completions = self._engine.generate(ids, max_new_tokens, sampling, seeds=seed, stop=stop, overflow=overflow)
        texts = [completion.text for completion in completions]
        return texts[0] if isinstance(prompt, str) else texts


def load(
    workdir: str | os.PathLike[str],
    *,
    step: int | None = None,
    best: bool = False,
    mesh: str = "",
    dtype: Literal["float32", "bfloat16"] | None = None,
) -> LoadedModel:
    """Loads the newest weights of a workdir: their moving average where the run kept one.

    Args:
      workdir: of a run, or of imported weights.
      step: load those of this step instead.
      best: load those of the best checkpoint instead.
      mesh: layout over the devices, such as "fsdp=2,tensor=4"; "": all on axis data.
      dtype: of activations; None: as trained.

    Raises:
      UserError: not a workdir, no such checkpoint in it, or a mesh that does not fit.
    """
    if step is not None and best:
        raise UserError(f"step={step} and best=True exclude each other")
    return LoadedModel(load_model(expand(os.fspath(workdir)), parse_mesh(mesh), dtype, best=best, step=step))
