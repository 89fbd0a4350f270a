"""Servers of tiny random models, in this process, on real sockets."""

import contextlib
import dataclasses
import io
import json
import threading
import time
from collections.abc import Callable, Iterator
from functools import cache
from typing import Any

import flax.linen as nn
import httpx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import uvicorn

from gptjax.config import ChatConfig, DataConfig, GPTConfig
from gptjax.data.images.image_files import ImageFiles
from gptjax.data.templates import chat_format
from gptjax.data.tokenizers import BytesTokenizer
from gptjax.inference.batching import BatchedEngine
from gptjax.models.gpt import GPT, init_params
from gptjax.serving.answering import Serving, ServingOptions
from gptjax.serving.application import create_application
from gptjax.serving.engine_thread import EngineThread
from gptjax.serving.http_server import DrainingServer, TimedProtocol, bound_socket
from gptjax.serving.served_models import GenerativeModel, ServedModels
from gptjax.serving.server_metrics import ServerMetrics
from gptjax.serving.text_embedding import embedder

LIMIT = 1000  # seconds, in which what hangs is found out; a busy machine is slow
CONTEXT = 1024
CONFIG = GPTConfig(
    vocab_size=264, context_length=CONTEXT, num_layers=1, num_heads=2, embed_dim=16, positions="rotary", dtype="float32"
)


@cache
def tiny_params(config: GPTConfig = CONFIG) -> Any:
    """Random parameters, far from uniform, so that different prompts have different completions."""
    params = nn.unbox(init_params(GPT(config), jax.random.key(0)))
    rng = np.random.default_rng(0)
    return jax.tree.map(lambda p: jnp.asarray(p + rng.normal(0, 0.1, p.shape), jnp.float32), params)


@dataclasses.dataclass
class RunningServer:
    """A server, and what its tests look at."""

    url: str
    serving: Serving
    engine: BatchedEngine
    log: io.StringIO

    @property
    def address(self) -> tuple[str, int]:
        host, port = self.url.removeprefix("http://").split(":")
        return host, int(port)

    def client(self, **kwargs: Any) -> httpx.Client:
        # Unverified, as reading the certificates takes longer than a request.
        return httpx.Client(base_url=self.url, timeout=LIMIT, verify=False, **kwargs)

    def post(self, path: str, **body: Any) -> httpx.Response:
        with self.client() as client:
            return client.post(path, json={"model": "tiny", **body})

    def chat(self, **body: Any) -> dict[str, Any]:
        body = {"messages": [{"role": "user", "content": "Hi"}], "max_tokens": 8, "seed": 1, **body}
        response = self.post("/v1/chat/completions", **body)
        assert response.status_code == 200, response.text
        return response.json()

    def events(self, path: str, **body: Any) -> list[Any]:
        """The events of a stream: JSON, and [DONE]."""
        response = self.post(path, stream=True, **body)
        assert response.headers["content-type"].startswith("text/event-stream"), response.text
        data = [line.removeprefix("data: ") for line in response.text.splitlines() if line.startswith("data: ")]
        return [line if line == "[DONE]" else json.loads(line) for line in data]

    def log_lines(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in self.log.getvalue().splitlines()]


@contextlib.contextmanager
def running(
    template: str = "chatml",
    *,
    config: GPTConfig = CONFIG,
    rows: int = 4,
    max_queue: int = 64,
    documents: Any = None,
    **options: Any,
) -> Iterator[RunningServer]:
    """Serves the model "tiny" until the block ends."""
    tokenizer = BytesTokenizer()
    form = chat_format(ChatConfig(template=template), tokenizer, config.vision)  # type: ignore[arg-type]
    engine = BatchedEngine(GPT(config), tiny_params(config), tokenizer, rows=rows, deterministic=True)
    images = ImageFiles(config.vision, DataConfig()) if config.reads_images else None
    model = GenerativeModel("tiny", tokenizer, vocab_size=264, context_length=CONTEXT, form=form, images=images)
    metrics, log = ServerMetrics(), io.StringIO()
    thread = EngineThread(engine, metrics, max_queue=max_queue)
    found = ServingOptions(**{"log": log, **options})
    embed = embedder(engine.model, engine.params, engine.mesh)
    serving = Serving(ServedModels([model]), thread, metrics, found, documents, embed)
    listening = bound_socket("127.0.0.1", 0)
    app = create_application(serving)
    settings = uvicorn.Config(app, http=TimedProtocol, ws="none", lifespan="off", log_level="error", access_log=False)
    server = DrainingServer(settings, serving, 5.0)
    thread.start()
    runner = threading.Thread(target=lambda: server.run(sockets=[listening]), daemon=True)
    runner.start()
    try:
        yield RunningServer(f"http://127.0.0.1:{listening.getsockname()[1]}", serving, engine, log)
    finally:
        server.should_exit = True
        runner.join(LIMIT)
        thread.stop()


def wait_until(condition: Callable[[], object]) -> None:
    """Waits for what another thread does."""
    end = time.monotonic() + LIMIT
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.01)


def slow_down(monkeypatch: pytest.MonkeyPatch, engine: BatchedEngine) -> None:
    """Makes each step of an engine take so much longer that a completion of 900 tokens does not end in a test."""
    step = engine.step
    monkeypatch.setattr(engine, "step", lambda: (time.sleep(0.1), step())[1])
