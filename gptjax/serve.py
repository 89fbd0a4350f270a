"""Serves models over HTTP, compatible with OpenAI's API.

python -m gptjax.serve --workdir=runs/demo --port=8000
python -m gptjax.serve --from_hf=DIR --name=gpt2 --rows=32
python -m gptjax.serve --workdir=runs/sft --documents=examples/customer_service
python -m gptjax.serve --workdir=runs/sft --speculation=ngram
python -m gptjax.serve --workdir=runs/gpt2 --adapters=legal=runs/legal_lora --classifiers=tweets=runs/tweets
GPTJAX_API_KEYS=KEY python -m gptjax.serve --workdir=runs/sft --host=0.0.0.0

curl localhost:8000/v1/chat/completions -H 'Content-Type: application/json' \\
    -d '{"model": "sft", "messages": [{"role": "user", "content": "Hello"}], "max_completion_tokens": 64}'

Endpoints: /v1/models, /v1/chat/completions, /v1/completions, /v1/responses, /v1/embeddings, /v1/classify, /tokenize,
/health, /metrics (Prometheus), /docs and /openapi.json. SIGTERM ends the server when the requests in progress are
answered; new ones get status 503. See docs/serving.md.
"""

import importlib.util
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO, cast

from absl import flags

from gptjax import cli
from gptjax.config import UserError, read_config
from gptjax.data import text_files
from gptjax.files import expand
from gptjax.inference import retrieval
from gptjax.parallel import program_cache

if TYPE_CHECKING:
    from gptjax.inference.speculation import Proposer
    from gptjax.inference.weights import WeightFormat
    from gptjax.serving.answering import Serving, ServingOptions
    from gptjax.serving.model_loading import BaseModel
    from gptjax.serving.served_models import ClassificationModel, GenerativeModel

KEYS_VARIABLE = "GPTJAX_API_KEYS"
LOOPBACK = ("127.0.0.1", "localhost", "::1")

WORKDIR = flags.DEFINE_string("workdir", None, "Directory of a run, or of imported weights.")
FROM_HF = flags.DEFINE_string(
    "from_hf", None, "Instead of --workdir: Hugging Face directory, or OWNER/NAME on its Hub."
)
NAME = flags.DEFINE_string("name", None, "Name of the model in requests; default: that of the directory.")
ADAPTERS = flags.DEFINE_list(
    "adapters", [], "LoRA runs that started from --workdir, served as further models, as NAME=DIR, comma-separated."
)
CLASSIFIERS = flags.DEFINE_list(
    "classifiers", [], "Fine-tuned runs for /v1/classify, as NAME=DIR, comma-separated; they share base weights."
)
TEMPLATE = flags.DEFINE_enum(
    "template",
    None,
    ["plain", "harmony"],
    "Chat template of a model that no chat stage trained; default: plain.",
)
DOCUMENTS = flags.DEFINE_string("documents", None, "Folder of .txt and .md files, for retrieval in chats.")
HOST = flags.DEFINE_string("host", "127.0.0.1", "Address to listen on; 0.0.0.0: all of this machine.")
PORT = flags.DEFINE_integer("port", 8000, "Port to listen on; 0: a free one.", lower_bound=0, upper_bound=65535)
ROWS = flags.DEFINE_integer("rows", 8, "Completions that are generated at a time.", lower_bound=1)
CACHE_GIB = flags.DEFINE_float(
    "cache_gib", None, "Memory of the key-value cache; default: --rows texts of the whole context.", lower_bound=0.0
)
DETERMINISTIC = flags.DEFINE_bool(
    "deterministic", False, "Completions do not depend on other requests, bit for bit: programs of fixed shapes."
)
SPECULATION = flags.DEFINE_string(
    "speculation",
    None,
    "Speculative decoding, which changes no completion. ngram: proposes what followed the last tokens where they "
    "occurred before; or a draft model with the same tokenizer: a workdir or a Hugging Face directory.",
)
SPECULATIVE_TOKENS = flags.DEFINE_integer(
    "speculative_tokens",
    4,
    "With --speculation: the most proposals of a completion in a step.",
    lower_bound=1,
    upper_bound=7,
)
WEIGHTS = flags.DEFINE_enum(
    "weights", "as_given", ["as_given", "bfloat16", "int8", "stacked"], "Weight precision; stacked: no copy."
)
DTYPE = flags.DEFINE_enum("dtype", None, ["float32", "bfloat16"], "Dtype of activations; default: as in training.")
MESH = flags.DEFINE_string("mesh", "", "Layout over the devices, such as fsdp=2,tensor=4; default: all on data.")
MAX_QUEUE = flags.DEFINE_integer(
    "max_queue", 256, "Completions that may wait for a row; further ones get status 429.", lower_bound=1
)
REQUEST_SECONDS = flags.DEFINE_float("request_seconds", 600.0, "Deadline of a request.", lower_bound=0.1)
DRAIN_SECONDS = flags.DEFINE_float(
    "drain_seconds", 60.0, "After SIGTERM: time for the requests in progress.", lower_bound=0.0
)
MAX_BODY_MIB = flags.DEFINE_float("max_body_mib", 16.0, "Size limit of a request.", lower_bound=0.001)
API_KEYS_FILE = flags.DEFINE_string(
    "api_keys_file", None, f"File of API keys, one a line; default: those of ${KEYS_VARIABLE}, comma-separated."
)
ALLOWED_ORIGINS = flags.DEFINE_list(
    "allowed_origins", [], "Origins whose pages may send requests (CORS), comma-separated; default: none."
)
REQUEST_LOG = flags.DEFINE_string("request_log", "-", "File for a line of JSON a request; -: stderr; empty: none.")
LOG_PROMPTS = flags.DEFINE_bool("log_prompts", False, "The request log has the bodies of requests, with prompts.")
CHECKPOINT = cli.CheckpointFlags()
CACHE_DIR = cli.define_cache_dir()


def main() -> None:
    if (WORKDIR.value is None) == (FROM_HF.value is None):
        raise UserError("needs --workdir=DIR or --from_hf=DIR")
    if missing := [name for name in ("starlette", "uvicorn", "llguidance") if importlib.util.find_spec(name) is None]:
        raise UserError(f"serving needs the package {missing[0]}: pip install 'gptjax[serve]'")
    if FROM_HF.value is not None and (CHECKPOINT.best or CHECKPOINT.step is not None):
        raise UserError("--step and --best choose a checkpoint of a workdir, and --from_hf is none")
    classifiers = [named_directory("classifiers", entry) for entry in CLASSIFIERS.value]
    adapters = [named_directory("adapters", entry) for entry in ADAPTERS.value]
    if adapters and WORKDIR.value is None:
        raise UserError("--adapters needs --workdir: adapters are runs that started from it")
    if SPECULATIVE_TOKENS.present and SPECULATION.value is None:
        raise UserError("--speculative_tokens needs --speculation=ngram or --speculation=DIR of a draft model")
    draft = SPECULATION.value
    if draft not in (None, "ngram") and "/" not in draft and not expand(draft).is_dir():
        raise UserError(f"--speculation={draft} is neither ngram nor the directory of a draft model")
    if DOCUMENTS.value is not None:
        retrieval.check(expand(DOCUMENTS.value))
    keys = api_keys()
    log = request_log()
    from gptjax.serving.http_server import bound_socket  # after the checks: these take seconds to import

    listening = bound_socket(HOST.value, PORT.value)  # a port in use is an error before anything slow
    from gptjax.serving.answering import ServingOptions
    from gptjax.serving.application import create_application
    from gptjax.serving.http_server import serve

    options = ServingOptions(
        api_keys=keys,
        allowed_origins=tuple(ALLOWED_ORIGINS.value),
        max_body_bytes=int(MAX_BODY_MIB.value * 2**20),
        request_seconds=REQUEST_SECONDS.value,
        log=log,
        log_prompts=LOG_PROMPTS.value,
        page=Path(__file__).parent / "serving" / "page",
    )
    program_cache.use(expand(CACHE_DIR.value))
    serving = load(options, adapters, classifiers)
    if HOST.value not in LOOPBACK and not keys:
        print(f"warning: --host={HOST.value} serves everyone who reaches it: set ${KEYS_VARIABLE}", file=sys.stderr)
    host, port = listening.getsockname()[:2]
    names = ", ".join(card["id"] for card in serving.models.cards())
    print(f"serving {names} at http://{f'[{host}]' if ':' in host else host}:{port}", flush=True)
    serve(create_application(serving), serving, listening, DRAIN_SECONDS.value)


def named_directory(flag: str, entry: str) -> tuple[str, Path]:
    """Parses NAME=DIR."""
    name, found, directory = entry.partition("=")
    if not (name and found and directory):
        raise UserError(f"--{flag} has {entry!r}, which is not of the form NAME=DIR")
    return name, expand(directory)


def api_keys() -> tuple[str, ...]:
    """Returns the API keys of --api_keys_file or the environment; UserError if the file has none."""
    if API_KEYS_FILE.value is None:
        return tuple(key.strip() for key in os.environ.get(KEYS_VARIABLE, "").split(",") if key.strip())
    lines = [line.strip() for _, line in text_files.read_lines(expand(API_KEYS_FILE.value))]
    keys = tuple(line for line in lines if line and not line.startswith("#"))
    if not keys:
        raise UserError(f"--api_keys_file={API_KEYS_FILE.value} has no key")
    return keys


def request_log() -> TextIO | None:
    """Opens the request log; UserError where that is not possible."""
    if REQUEST_LOG.value == "-":
        return sys.stderr
    if not REQUEST_LOG.value:
        return None
    try:
        return cli.output_file("request_log", REQUEST_LOG.value).open("a", encoding="utf-8")
    except OSError as error:
        raise UserError(f"cannot write --request_log={REQUEST_LOG.value}: {error.strerror}") from None


def load(options: "ServingOptions", adapters: list[tuple[str, Path]], classifiers: list[tuple[str, Path]]) -> "Serving":
    """Loads the models of the flags."""
    from gptjax.parallel.mesh import make_mesh
    from gptjax.serving.answering import Serving
    from gptjax.serving.engine_thread import EngineThread
    from gptjax.serving.model_loading import (
        create_engine,
        generative_model,
        is_classifier,
        load_adapter,
        load_classifier,
    )
    from gptjax.serving.served_models import ServedModels
    from gptjax.serving.server_metrics import ServerMetrics
    from gptjax.serving.text_embedding import embedder
    from gptjax.stages.trained_model import parse_mesh

    place = WORKDIR.value or FROM_HF.value
    name = NAME.value or expand(str(place)).resolve().name
    models: list[GenerativeModel | ClassificationModel] = []
    engine, embed = None, None
    if WORKDIR.value is not None and is_classifier(read_config(expand(WORKDIR.value))):
        if adapters or SPECULATION.value is not None:
            flag = "adapters" if adapters else "speculation"
            raise UserError(f"--{flag} needs a model that generates text, and {WORKDIR.value} has the head of a task")
        classifiers = [(name, expand(WORKDIR.value)), *classifiers]
        mesh = make_mesh(parse_mesh(MESH.value))
    else:
        base = load_base_model()
        mesh = base.mesh
        loaded = {other: load_adapter(workdir, expand(str(WORKDIR.value)), base) for other, workdir in adapters}
        cache_bytes = None if CACHE_GIB.value is None else int(CACHE_GIB.value * 2**30)
        weights = cast(Any, WEIGHTS.value)
        engine = create_engine(
            base,
            loaded,
            ROWS.value,
            weights,
            cache_bytes,
            deterministic=DETERMINISTIC.value,
            proposer=load_proposer(weights),
            speculative_tokens=SPECULATIVE_TOKENS.value,
        )
        embed = embedder(engine.model, engine.params, engine.mesh)
        models.append(generative_model(name, base, base.form))
        models += [generative_model(other, base, found.form or base.form, other) for other, found in loaded.items()]
    given: dict[Path, Any] = {}
    models += [load_classifier(other, workdir, mesh, given) for other, workdir in classifiers]
    metrics = ServerMetrics()
    thread = EngineThread(engine, metrics, max_queue=MAX_QUEUE.value)
    documents = None if DOCUMENTS.value is None else retrieval.Documents(expand(DOCUMENTS.value))
    return Serving(ServedModels(models), thread, metrics, options, documents, embed)


def load_proposer(weights: "WeightFormat") -> "Proposer | None":
    """Returns what --speculation names; None: nothing."""
    if SPECULATION.value is None:
        return None
    if SPECULATION.value == "ngram":
        from gptjax.inference.speculation import NgramProposer

        return NgramProposer()
    from gptjax.serving.model_loading import load_draft
    from gptjax.stages.trained_model import parse_mesh

    return load_draft(SPECULATION.value, parse_mesh(MESH.value), cast(Any, DTYPE.value), weights)


def load_base_model() -> "BaseModel":
    from gptjax.serving.model_loading import load_base, load_huggingface
    from gptjax.stages.trained_model import parse_mesh

    mesh, dtype = parse_mesh(MESH.value), cast(Any, DTYPE.value)
    if FROM_HF.value is not None:
        return load_huggingface(FROM_HF.value, mesh, dtype, TEMPLATE.value)
    assert WORKDIR.value is not None
    best, step = CHECKPOINT.best, CHECKPOINT.step
    return load_base(expand(WORKDIR.value), mesh, dtype, TEMPLATE.value, best=best, step=step)


if __name__ == "__main__":
    cli.run(main)
