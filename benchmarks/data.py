"""Measures the input pipeline: tokenisation, reading compared with the training step, and the time runs wait for data.

    python -m benchmarks.data [--config=configs/gpt2.py:runlocal] [--tokenizers=gpt2,bpe:4096] [--rounds=5]
        [--batches=400] [--steps=20] [--run_steps=100] [--output=data.json]

Tokenisation is measured on the config's source: with one thread, and with all cores from documents to a prepared corpus
on disk, in a new directory. The pipeline reads a prepared corpus as a run does, with either packing, and a mixture of
five files that the documents are divided among, with GPT-3's weights; its rounds alternate with training steps on
tokens that are in memory, and the ratio is the median over rounds. So do rounds in which shards of the same text are
read and prepared from a server in this process, through every kind of file over HTTP and, where s3fs is installed, over
S3; "read" is without tokenising. The waiting time is measured in a run of --run_steps steps of the training loop: the
share of its time, without the first two steps, in which it waits for the next microbatch.
"""

import dataclasses
import gzip
import importlib.util
import io
import itertools
import json
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Literal

import jax
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from absl import flags

from benchmarks.checkpoint import Trainer, loaded_config
from benchmarks.measuring import alternate, measured_on, ratio, seconds, write_json
from gptjax import cli
from gptjax import config as c
from gptjax.data import sources, tokenizers
from gptjax.data.mixture import open_mixture
from gptjax.data.pipeline import ExampleSource, Microbatch, batches, open_corpus
from gptjax.data.preparation import prepare
from gptjax.data.tokenizers import Tokenizer
from gptjax.parallel.mesh import make_mesh
from gptjax.run import train_stage
from gptjax.stages.builders import build
from gptjax.training.stage import Run
from tests.file_servers import FileServer, serving

WEIGHTS = (60.0, 22.0, 8.0, 8.0, 3.0)  # Brown et al. 2020, table 2.2
PACKINGS: tuple[Literal["concatenate", "segment"], ...] = ("concatenate", "segment")
SEPARATOR = "----"  # of documents in a text file


def tokenising(spec: str, data: c.DataConfig, directory: Path, rounds: int) -> dict[str, Any]:
    """Measures the tokenisation rate in MB/s of UTF-8 text."""
    source = sources.open_source(data.source, document_separator=data.document_separator)
    documents = list(source.documents())
    megabytes = sum(len(document.encode()) for document in documents) / 1e6
    start = time.perf_counter()
    tokenizer = tokenizers.get_tokenizer(
        spec, train_documents=lambda: documents, corpus_fingerprint="benchmark", cache_dir=directory
    )
    made = time.perf_counter() - start

    def one_thread() -> float:
        return seconds(lambda: [tokenizer.encode(document) for document in documents])

    def prepared() -> float:
        with tempfile.TemporaryDirectory(dir=directory) as new:
            return seconds(lambda: prepare(source, tokenizer, Path(new), validation_fraction=data.validation_fraction))

    times = alternate({"one_thread": one_thread, "prepared": prepared}, rounds)
    rates = {name: megabytes / statistics.median(values) for name, values in times.items()}
    trained = spec.startswith(("bpe:", "gpt1_bpe:"))
    print(
        f"{spec:14} {megabytes:8.2f} {rates['one_thread']:12.2f} {rates['prepared']:12.2f} "
        + (f"{made:12.1f}" if trained else ""),
        flush=True,
    )
    return {"tokenizer": spec, "megabytes": megabytes, "megabytes_per_second": rates, "seconds": times} | (
        {"training_seconds": made} if trained else {}
    )


def five_sources(data: c.DataConfig, directory: Path) -> c.DataConfig:
    """Divides the documents of the source among five files; returns the config of their mixture."""
    documents = list(sources.open_source(data.source, document_separator=data.document_separator).documents())
    paths = [directory / f"source{i}.jsonl" for i in range(len(WEIGHTS))]
    for i, path in enumerate(paths):
        path.write_text("".join(json.dumps({"text": text}) + "\n" for text in documents[i :: len(paths)]))
    mixture = tuple((f"jsonl:{path}", weight) for path, weight in zip(paths, WEIGHTS, strict=True))
    return dataclasses.replace(data, source=c.DataConfig.source, validation_source=None, mixture=mixture)


def pipeline_seconds(examples: ExampleSource, rows: int, count: int, prefetch: int) -> float:
    """Measures the seconds to read `count` microbatches of training examples."""
    read = batches(examples, start=0, batch_size=rows, prefetch=prefetch)
    return seconds(lambda: [next(read) for _ in range(count)])


def put_shards(documents: Sequence[str], tokenizer: Tokenizer, server: FileServer) -> dict[str, str]:
    """Puts four shards of each kind of file on a server; returns their sources, with BASE for the URL of the folder."""
    end = np.array([tokenizer.end_of_text], np.int32)
    for i in range(4):
        texts = documents[i::4]
        table, ids = io.BytesIO(), [part for text in texts for part in (tokenizer.encode(text), end)]
        pq.write_table(pa.table({"text": texts}), table, row_group_size=1000)
        server.files[f"b/{i}.jsonl"] = "".join(json.dumps({"text": text}) + "\n" for text in texts).encode()
        server.files[f"b/{i}.txt.gz"] = gzip.compress(f"\n{SEPARATOR}\n".join(texts).encode())
        server.files[f"b/{i}.parquet"] = table.getvalue()
        server.files[f"b/{i}.bin"] = np.concatenate(ids).astype("<u4").tobytes()
    return {
        "jsonl": "jsonl:BASE/*.jsonl",
        "text.gz": "text:BASE/*.txt.gz",
        "parquet": "parquet:BASE/*.parquet",
        "tokens": "tokens:BASE/*.bin@uint32",
    }


def remote_sides(
    config: c.Config, tokenizer: Tokenizer, server: FileServer, directory: Path
) -> tuple[dict[str, Callable[[], float]], int]:
    """Returns measurements of reading and of preparing each kind of remote file, and the tokens of the text."""
    documents = list(sources.open_source(config.data.source).documents())
    kinds = put_shards(documents, tokenizer, server)
    bases = {"http": f"{server.url}/web/b"}
    if importlib.util.find_spec("s3fs") is not None:
        os.environ |= {
            "AWS_ENDPOINT_URL": f"{server.url}/s3",
            "AWS_ACCESS_KEY_ID": "id",
            "AWS_SECRET_ACCESS_KEY": "key",
        }
        bases["s3"] = "s3://b"

    def read(spec: str) -> float:
        source = sources.open_source(spec, document_separator=SEPARATOR)
        return seconds(lambda: [len(document) for document in source.documents_for(tokenizer)])

    def prepared(spec: str) -> float:
        with tempfile.TemporaryDirectory(dir=directory) as new:
            source = sources.open_source(spec, document_separator=SEPARATOR)
            return seconds(lambda: prepare(source, tokenizer, Path(new), validation_fraction=0.01))

    sides: dict[str, Callable[[], float]] = {}
    for protocol, base in bases.items():
        for kind, spec in kinds.items():
            named = spec.replace("BASE", base)
            sides |= {f"{protocol} {kind} read": partial(read, named), f"{protocol} {kind}": partial(prepared, named)}
    return sides, sum(len(tokenizer.encode(document)) + 1 for document in documents)


def pipeline_and_step(
    config: c.Config, directory: Path, rounds: int, count: int, steps: int, server: FileServer
) -> list[dict[str, Any]]:
    """Measures tokens per second of the pipeline with each packing, a mixture, remote shards, and the training step."""
    rows, context = config.sequences_per_microbatch, config.model.context_length
    sides: dict[str, Callable[[], float]] = {}
    tokens: dict[str, int] = {}
    for packing in PACKINGS:
        data = dataclasses.replace(config.data, packing=packing)
        corpus = open_corpus(data, context_length=context, seed=config.seed)
        tokens[packing] = count * rows * context
        sides[packing] = partial(pipeline_seconds, corpus.train, rows, count, data.prefetch_batches)
    mixture = open_mixture(
        five_sources(config.data, directory), context_length=context, seed=config.seed, tokenizer=corpus.tokenizer
    )
    tokens["mixture"] = count * rows * context
    sides["mixture"] = partial(pipeline_seconds, mixture.train, rows, count, config.data.prefetch_batches)
    remote, num_tokens = remote_sides(config, corpus.tokenizer, server, directory)
    sides |= remote
    tokens |= dict.fromkeys(remote, num_tokens)
    with jax.set_mesh(make_mesh(config.mesh)):
        trainer = Trainer(config.completed(corpus.tokenizer.vocab_size))
        tokens["step"] = steps * trainer.tokens_per_step
        sides["step"] = lambda: seconds(lambda: trainer.train(steps))
        for measure in sides.values():
            measure()
        times = alternate(sides, rounds)
    per_token = {name: [value / tokens[name] for value in values] for name, values in times.items()}
    found = []
    for name, values in per_token.items():
        rate, of_step = 1 / statistics.median(values), ratio(values, per_token["step"])
        spread = f"{1 / max(values):,.0f}-{1 / min(values):,.0f}"
        print(f"{name:18} {rate:12,.0f} {spread:>24} {of_step:10.1f}", flush=True)
        found.append({"side": name, "tokens_per_second": rate, "ratio_to_step": of_step, "seconds": times[name]})
    return found


def waiting(config: c.Config, steps: int) -> dict[str, float]:
    """Measures the share of the time that the training loop waits for data, and its tokens per second."""
    config = c.replace(
        config,
        {
            "batch": {"total_tokens": steps * config.batch.tokens_per_batch, "epochs": None},
            "evaluation": {"every_tokens": None, "every_epochs": None, "max_tokens": 1, "sample_tokens": 0},
            "checkpoint": {"every_tokens": None, "every_epochs": None},
            "logging": {"tensorboard": False},
        },
    )
    mesh = make_mesh(config.mesh)
    stage = build(config, mesh, None)
    asked: list[tuple[float, float]] = []

    def timed(start: int, run: Run | None) -> Iterator[Microbatch]:
        read = stage.batches(start, run)
        for _ in itertools.count():
            before = time.perf_counter()
            microbatch = next(read)
            asked.append((before, time.perf_counter()))
            yield microbatch

    with tempfile.TemporaryDirectory() as directory:
        train_stage(dataclasses.replace(stage, batches=timed), mesh, Path(directory))
    per_step = len(asked) // steps  # microbatches; the first step compiles, the second fills queues
    rest = asked[2 * per_step :]
    whole = rest[-1][0] - rest[0][0]
    waited = sum(after - before for before, after in rest[:-1])
    trained = (steps - 3) * config.batch.tokens_per_batch
    return {"share": waited / whole, "tokens_per_second": trained / whole, "seconds": whole}


def main() -> None:
    config = loaded_config()
    if config.data.mixture:
        raise c.UserError("needs a config with one source: the benchmark makes a mixture of its documents itself")
    result: dict[str, Any] = {**measured_on(), "config": config.data.source, "tokenising": []}
    print(f"{jax.device_count()} x {jax.devices()[0].device_kind}, {result['versions']}, {config.data.source}\n")
    print(f"{'tokenising':14} {'MB':>8} {'MB/s, 1 core':>12} {'to disk':>12} {'training s':>12}")
    with tempfile.TemporaryDirectory(dir=flags.FLAGS.directory) as directory:
        for spec in flags.FLAGS.tokenizers:
            result["tokenising"].append(tokenising(spec, config.data, Path(directory), flags.FLAGS.rounds))
            write_json(flags.FLAGS.output, result)
    print(f"\n{'':18} {'tokens/s':>12} {'spread':>24} {'of step':>10}")
    with serving() as server, tempfile.TemporaryDirectory(dir=flags.FLAGS.directory) as directory:
        counts = (flags.FLAGS.rounds, flags.FLAGS.batches, flags.FLAGS.steps)
        result["pipeline"] = pipeline_and_step(config, Path(directory), *counts, server)
    write_json(flags.FLAGS.output, result)
    found = result["waiting"] = waiting(config, flags.FLAGS.run_steps)
    write_json(flags.FLAGS.output, result)
    print(f"\na run of {flags.FLAGS.run_steps} steps waited {found['share']:.3%} of its time for data")


if __name__ == "__main__":
    flags.DEFINE_list("tokenizers", ["gpt2", "bpe:4096"], "As in data.tokenizer.")
    flags.DEFINE_integer("rounds", 5, "Alternations between the sides.", lower_bound=1)
    flags.DEFINE_integer("batches", 400, "Microbatches that the pipeline reads in a round.", lower_bound=1)
    flags.DEFINE_integer("steps", 20, "Steps of a round.", lower_bound=1)
    flags.DEFINE_integer("run_steps", 100, "Steps of the run whose waiting time is measured.", lower_bound=4)
    flags.DEFINE_string("directory", None, "Directory for prepared corpora; default: the system's temporary directory.")
    flags.DEFINE_string("output", None, "Write the measurements to this JSON file.")
    cli.run(main)
