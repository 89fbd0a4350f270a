"""Models that judge completions: of a workdir, or behind an OpenAI-compatible endpoint.

A judge is named by a workdir of a chat stage, or by URL#MODEL, such as http://localhost:8000/v1#gpt2, whose key is read
from the environment variable GPTJAX_JUDGE_KEY. Both answer with their most probable tokens.
"""

import dataclasses
import json
import os
import time
import urllib.error
import urllib.request
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Protocol
from urllib.parse import urlsplit

from gptjax.config import UserError
from gptjax.data.conversations import Message
from gptjax.data.templates import TooLongError, chat_format
from gptjax.distributed import processes
from gptjax.evaluation.scoring import Scorer
from gptjax.files import expand
from gptjax.inference.engine import Engine
from gptjax.inference.sampling import Sampling
from gptjax.stages import registry
from gptjax.stages.trained_model import TrainedModel, load_model, parse_mesh

KEY_VARIABLE = "GPTJAX_JUDGE_KEY"
THREADS = 8  # requests at a time
TIMEOUT = 300.0  # seconds of a request
TRIES = 5
MAX_BYTES = 10_000_000  # of a response


class Judge(Protocol):
    """A model that answers prompts.

    Attributes:
      identity: what its answers depend on, other than the prompts.
    """

    @property
    def identity(self) -> str: ...

    def answers(self, prompts: Sequence[str]) -> list[str]:
        """Returns the answer to each prompt; "" where the prompt is longer than the judge's context."""
        ...


def is_endpoint(spec: str) -> bool:
    """Whether --judge names an endpoint and not a workdir."""
    return spec.startswith(("http://", "https://"))


def check_judge(spec: str) -> None:
    """Raises UserError if --judge names neither an endpoint with its model nor an existing directory."""
    if is_endpoint(spec):
        if not urlsplit(spec).hostname or not urlsplit(spec).fragment:
            raise UserError(f"--judge={spec} names no model: write URL#MODEL, such as http://localhost:8000/v1#gpt2")
    elif not expand(spec).is_dir():
        raise UserError(f"--judge={spec} is neither a workdir nor an endpoint, such as http://localhost:8000/v1#gpt2")


def open_judge(spec: str, mesh: str, max_tokens: int) -> Judge:
    """Returns the judge that --judge names.

    Args:
      mesh: layout of a workdir's model over the devices, as --mesh.
      max_tokens: maximum length of an answer in tokens.

    Raises:
      UserError: see `check_judge`, `load_chat_model`.
    """
    check_judge(spec)
    if is_endpoint(spec):
        url, _, model = spec.partition("#")
        return EndpointJudge(url.rstrip("/"), model, max_tokens, os.environ.get(KEY_VARIABLE))
    trained = load_chat_model(expand(spec), mesh, "--judge")
    return WorkdirJudge(trained, max_tokens)


def load_chat_model(workdir: Path, mesh: str, flag: str) -> TrainedModel:
    """Loads the model of a workdir; raises UserError unless it is of a chat stage."""
    trained = load_model(workdir, parse_mesh(mesh))
    if not registry.definition(trained.config).chats:
        raise UserError(f"{flag}={workdir} is of stage {trained.config.stage}, not a chat model")
    return trained


class WorkdirJudge:
    """The chat model of a workdir."""

    def __init__(self, trained: TrainedModel, max_tokens: int) -> None:
        self._format = chat_format(trained.config.chat, trained.tokenizer, trained.config.model.vision)
        self._context, self._max_tokens = trained.model.config.context_length, max_tokens
        self._engine = Engine(trained.model, trained.params, trained.tokenizer, trained.mesh)
        fingerprint = Scorer(trained.model, trained.params, trained.mesh).fingerprint()
        self.identity = f"{trained.model.config} {trained.step} {fingerprint} {trained.config.chat} {max_tokens}"

    def answers(self, prompts: Sequence[str]) -> list[str]:
        """See `Judge`."""
        encoded = {}
        for index, prompt in enumerate(prompts):
            try:
                room = self._context - self._max_tokens
                encoded[index] = self._format.encode_prompt((Message("user", prompt),), room)
            except TooLongError:
                continue
        if not encoded:
            return [""] * len(prompts)
        completions = self._engine.generate(
            list(encoded.values()),
            self._max_tokens,
            Sampling(temperature=0),
            end_tokens=self._format.end_tokens,
            separate_text=True,
        )
        found = {i: self._format.decode(c.tokens) for i, c in zip(encoded, completions, strict=True)}
        return [found.get(index, "") for index in range(len(prompts))]


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    """Follows no redirect, which would send the key to another server."""

    def redirect_request(self, *_: Any) -> None:
        return None


@dataclasses.dataclass(frozen=True)
class EndpointJudge:
    """A model behind POST URL/chat/completions; the first of several processes asks it."""

    url: str
    model: str
    max_tokens: int
    key: str | None = dataclasses.field(default=None, repr=False)

    @property
    def identity(self) -> str:
        """See `Judge`."""
        return f"{self.url}#{self.model} {self.max_tokens}"

    def answers(self, prompts: Sequence[str]) -> list[str]:
        """See `Judge`; raises UserError if the endpoint refuses a request, or does not answer after TRIES tries."""

        def ask() -> list[str]:
            with ThreadPoolExecutor(THREADS) as threads:
                return list(threads.map(self._answer, prompts))

        return processes.of_first(ask)

    def _answer(self, prompt: str) -> str:
        body = {
            "model": self.model,
            "messages": [{"role": "user", "content": prompt}],
            "temperature": 0,
            "max_tokens": self.max_tokens,
        }
        headers = {"Content-Type": "application/json"}
        if self.key:
            headers["Authorization"] = f"Bearer {self.key}"
        request = urllib.request.Request(f"{self.url}/chat/completions", json.dumps(body).encode(), headers)
        opener = urllib.request.build_opener(_NoRedirect)
        for tries in range(1, TRIES + 1):
            try:
                with opener.open(request, timeout=TIMEOUT) as response:
                    return _content(response.read(MAX_BYTES))
            except urllib.error.HTTPError as error:
                said = error.read(300).decode(errors="replace").strip()
                problem = f"answered {error.code}: {' '.join(said.split())}"
                if error.code != 429 and error.code < 500:
                    raise UserError(f"--judge={self.url} {problem}") from None
            except (OSError, ValueError, KeyError, IndexError, TypeError) as error:
                problem = f"does not answer as an OpenAI-compatible endpoint: {error}"
            if tries < TRIES:
                time.sleep(2.0 ** (tries - 1))
        raise UserError(f"--judge={self.url} {problem} ({TRIES} tries): the same command resumes")


def _content(response: bytes) -> str:
    """Returns the text of a response; raises ValueError, KeyError, IndexError or TypeError if it has none."""
    message = json.loads(response)["choices"][0]["message"]
    return str(message["content"] or "")
