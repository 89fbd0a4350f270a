"""A server in a thread of this process, for notebooks: a second process could not use the same accelerator."""

import threading
from pathlib import Path
from types import TracebackType
from typing import Self

from gptjax.config import MeshConfig, read_config
from gptjax.inference.retrieval import Documents
from gptjax.parallel.mesh import make_mesh
from gptjax.serving.answering import Serving, ServingOptions
from gptjax.serving.application import create_application
from gptjax.serving.engine_thread import EngineThread
from gptjax.serving.http_server import DrainingServer, bound_socket, server_config
from gptjax.serving.model_loading import create_engine, generative_model, is_classifier, load_base, load_classifier
from gptjax.serving.served_models import ServedModels
from gptjax.serving.server_metrics import ServerMetrics
from gptjax.serving.text_embedding import embedder

MAX_QUEUE = 256
DRAIN_SECONDS = 10.0


class BackgroundServer:
    """A server that runs until `close`, or until the end of its `with` block.

    Attributes:
      url: such as "http://127.0.0.1:8000"; OpenAI's clients take `url + "/v1"`.
      model: the name of the model in requests.
    """

    def __init__(self, serving: Serving, model: str, host: str, port: int) -> None:
        listening = bound_socket(host, port)
        self.model = model
        self.url = f"http://{host}:{listening.getsockname()[1]}"
        self._serving = serving
        self._server = DrainingServer(server_config(create_application(serving)), serving, DRAIN_SECONDS)
        serving.thread.start()
        self._runner = threading.Thread(target=lambda: self._server.run(sockets=[listening]), daemon=True)
        self._runner.start()

    def close(self) -> None:
        """Ends the server and frees its port; does nothing if it has ended."""
        if not self._runner.is_alive():
            return
        self._server.should_exit = True
        self._runner.join()
        self._serving.thread.stop()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()


def open_workdir(workdir: Path, name: str, rows: int, documents: Path | None) -> Serving:
    """Loads the newest weights of a workdir to be served, or the best ones of a fine-tuned task.

    Args:
      name: of the model in requests.
      rows: completions that are generated at a time.
      documents: folder of .txt and .md files, for retrieval in chats.

    Raises:
      UserError: as `load_base`, `load_classifier` and `Documents`.
    """
    metrics = ServerMetrics()
    found = None if documents is None else Documents(documents)
    if is_classifier(read_config(workdir)):
        classifier = load_classifier(name, workdir, make_mesh(MeshConfig()), {})
        thread = EngineThread(None, metrics, max_queue=MAX_QUEUE)
        return Serving(ServedModels([classifier]), thread, metrics, ServingOptions(), found)
    base = load_base(workdir, MeshConfig(), None, None, best=False, step=None)
    engine = create_engine(base, {}, rows, "as_given", None, deterministic=False)
    thread = EngineThread(engine, metrics, max_queue=MAX_QUEUE)
    embed = embedder(engine.model, engine.params, engine.mesh)
    models = ServedModels([generative_model(name, base, base.form)])
    return Serving(models, thread, metrics, ServingOptions(), found, embed)
