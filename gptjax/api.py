"""Python API for notebooks and scripts: config, training, generation, chat, scores, serving. No flags are parsed.

import gptjax

config = gptjax.load_config("configs/gpt2.py:runlocal", {"batch.total_tokens": 100_000})
report = gptjax.train(config, "runs/demo", callbacks=[lambda record: print(record["step"], record.get("loss"))])
model = gptjax.load("runs/demo")
print(model.generate("The Congress", max_new_tokens=40, temperature=0.8))
"""

import os
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import numpy.typing as npt

from gptjax.config import Config, UserError
from gptjax.data.templates import chat_format
from gptjax.data.tokenizers import Tokenizer
from gptjax.evaluation.scoring import Scorer, encode_pair
from gptjax.files import expand
from gptjax.inference.chatting import ChatSession
from gptjax.inference.engine import Engine, Overflow
from gptjax.inference.retrieval import Documents
from gptjax.inference.sampling import Sampling
from gptjax.run import run
from gptjax.stages import registry
from gptjax.stages.trained_model import TrainedModel, load_model, parse_mesh
from gptjax.training.loop import RunReport
from gptjax.training.metrics_file import read_metrics

if TYPE_CHECKING:
    from gptjax.serving.background import BackgroundServer

DEFAULT_NEW_TOKENS = 128
_PLACE = ("step", "tokens", "seconds")  # of a record, next to its values


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


def curves(workdir: str | os.PathLike[str], split: str = "train") -> dict[str, npt.NDArray[np.float64]]:
    """Reads the measurements of a run, which may still be running, as arrays of one length.

    Args:
      split: "train", "validation", "test", or "rollout" of a policy.

    Returns:
      "step", "tokens", "seconds" and every value of the split by name, such as "loss" (nats per token), each float64
      (N,) for N records; NaN where a record lacks the value.

    Raises:
      UserError: there is no metrics.jsonl, or it has no record of the split.
    """
    _, records = read_metrics(expand(os.fspath(workdir)))
    found = [record for record in records if record["split"] == split]
    if not found:
        known = ", ".join(dict.fromkeys(record["split"] for record in records)) or "none yet"
        raise UserError(f"{workdir} has no records of split {split!r}: it has {known}")
    names = dict.fromkeys([*_PLACE, *(name for record in found for name in record if name != "split")])
    return {
        name: np.array([np.nan if (value := record.get(name)) is None else value for record in found], np.float64)
        for name in names
    }


def import_huggingface(
    source: str, workdir: str | os.PathLike[str], *, dtype: Literal["float32", "bfloat16"] = "float32"
) -> None:
    """Creates a workdir from the weights and the tokenizer of a Hugging Face model, to load or to fine-tune.

    Args:
      source: a directory, or OWNER/NAME on the Hub.
      workdir: must not exist, or be empty.
      dtype: of activations.

    Raises:
      UserError: there is no such model, its family is unknown, or the workdir is not empty.
    """
    from gptjax.interop.huggingface import import_workdir

    import_workdir(source, expand(os.fspath(workdir)), dtype)


def open_server(
    workdir: str | os.PathLike[str],
    *,
    name: str | None = None,
    rows: int = 8,
    documents: str | os.PathLike[str] | None = None,
    host: str = "127.0.0.1",
    port: int = 0,
) -> "BackgroundServer":
    """Serves the newest weights of a workdir over HTTP in this process, with OpenAI's API, until `close`.

        with gptjax.open_server("runs/sft") as server:
            client = openai.OpenAI(base_url=server.url + "/v1", api_key="none")

    A run of a task is served at /v1/classify, with its best weights. There is no API key: `python -m gptjax.serve` has
    those, and all other options of a server.

    Args:
      name: of the model in requests; None: that of the directory.
      rows: completions that are generated at a time.
      documents: folder of .txt and .md files whose passages are put before the messages that they match.
      host: address to listen on; another one than 127.0.0.1 serves everyone who reaches it.
      port: 0: a free one.

    Raises:
      UserError: not a workdir, a folder without documents, a port in use, or a package of gptjax[serve] is missing.
    """
    import importlib.util

    if missing := [module for module in ("starlette", "uvicorn") if importlib.util.find_spec(module) is None]:
        raise UserError(f"serving needs the package {missing[0]}: pip install 'gptjax[serve]'")
    from gptjax.serving.background import BackgroundServer, open_workdir

    place = expand(os.fspath(workdir))
    name = place.resolve().name if name is None else name
    serving = open_workdir(place, name, rows, None if documents is None else expand(os.fspath(documents)))
    return BackgroundServer(serving, name, host, port)


class LoadedModel:
    """A model with its weights and tokenizer, ready to generate, to chat and to score texts.

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
        self._scorer = Scorer(trained.model, trained.params, trained.mesh)

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

    def score(self, contexts: Sequence[str], continuations: Sequence[str]) -> npt.NDArray[np.float64]:
        """Computes the log-probability of each continuation after its context.

        Args:
          contexts: texts; "": the continuation starts a document. Contexts that are too long lose their beginning.
          continuations: as many texts, none empty.

        Returns:
          float64 (N,), nats, summed over the tokens of a continuation.

        Raises:
          UserError: an empty continuation, or one that is longer than the model's context.
        """
        pairs = zip(contexts, continuations, strict=True)
        requests = [encode_pair(self.tokenizer, context, continuation) for context, continuation in pairs]
        return np.array([result.logprob for result in self._scorer.scores(requests)], np.float64)

    def chat(
        self,
        *,
        system: str | None = None,
        documents: str | os.PathLike[str] | None = None,
        max_new_tokens: int | None = None,
        temperature: float = 0.8,
        top_k: int | None = 50,
        top_p: float | None = None,
        seed: int = 0,
    ) -> ChatSession:
        """Starts a conversation: `.reply(text)` returns the completion of the user's next message.

        Args:
          system: system message; None: no such message.
          documents: folder of .txt and .md files. The passages that match a message best are put before it, and
            `.sources` has them afterwards.
          max_new_tokens: of a completion; None: a fourth of the context.
          temperature, top_k, top_p: as of `generate`.
          seed: sampling seed of the first completion, and counts up.

        Raises:
          UserError: no chat stage trained the model, or a folder without documents.
        """
        if not registry.definition(self.config).conversational:
            raise UserError(
                f"stage {self.config.stage} trains no chat model: fine-tune it with configs/chatgpt.py:stage=sft"
            )
        found = None if documents is None else Documents(expand(os.fspath(documents)))
        form = chat_format(self.config.chat, self.tokenizer, self.config.model.vision)
        room = self._engine.model.config.context_length // 4 if max_new_tokens is None else max_new_tokens
        sampling = Sampling(temperature, top_k, top_p)
        return ChatSession(self._engine, form, sampling, system=system, max_new_tokens=room, seed=seed, documents=found)


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
