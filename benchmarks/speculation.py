"""Compares the tokens per second of the serving engine with and without speculative decoding.

    python -m benchmarks.speculation --workdir=DIR --prompts=FILE.jsonl [--speculation=ngram,DRAFT_DIR]
    python -m benchmarks.speculation --size=124m [--temperature=1.0]
        [--speculative_tokens=4] [--rows=1,8] [--requests=8] [--max_tokens=96] [--rounds=5] [--deterministic]

Each round runs all requests without speculation and with each proposer, in turns, with --rows requests in progress. The
completions must be the same, token by token, or the exit code is 1; without --deterministic, programs of different
sizes may round differently, which is reported as a share of equal completions. The ratio is that of adjacent rounds.
The processor time depends less than the wall-clock time on other load.

A prompt is the field "text" of a line of --prompts. --size measures a random GPT-2 on prompts of random tokens: its
greedy completions soon repeat themselves, the best case of n-grams; with --temperature=1 they are noise, the worst.
"""

import json
import statistics
import sys
import time
from typing import Any

import numpy as np
from absl import flags

from benchmarks.decode import SIZES, VOCABULARY, random_model
from benchmarks.measuring import alternate, ratio
from gptjax import cli
from gptjax.config import MeshConfig, UserError
from gptjax.data import text_files
from gptjax.data.tokenizers import BytesTokenizer
from gptjax.files import expand
from gptjax.inference.batching import BatchedEngine
from gptjax.inference.requests import GenerationRequest
from gptjax.inference.sampling import Sampling
from gptjax.inference.speculation import NgramProposer, Proposer
from gptjax.serving.model_loading import load_draft
from gptjax.stages.trained_model import load_model

WORKDIR = flags.DEFINE_string("workdir", None, "Workdir of the model.")
PROMPTS = flags.DEFINE_string("prompts", None, "JSONL file; the field text of a line is a prompt.")
SIZE = flags.DEFINE_enum("size", None, list(SIZES), "Instead of --workdir: size of a random GPT-2.")
SPECULATION = flags.DEFINE_list(
    "speculation", ["ngram"], "Proposers to measure: ngram, or directories of draft models."
)
SPECULATIVE_TOKENS = flags.DEFINE_integer("speculative_tokens", 4, "The most proposed tokens of a step.", 1, 7)
ROWS = flags.DEFINE_multi_integer("rows", [1, 8], "Requests in progress; each is measured.")
REQUESTS = flags.DEFINE_integer("requests", 8, "Requests of a round.", lower_bound=1)
MAX_TOKENS = flags.DEFINE_integer("max_tokens", 96, "Tokens of a completion.", lower_bound=1)
TEMPERATURE = flags.DEFINE_float("temperature", 0.0, "Sampling temperature.", lower_bound=0.0)
ROUNDS = flags.DEFINE_integer("rounds", 5, "Rounds.", lower_bound=1)
DETERMINISTIC = flags.DEFINE_bool("deterministic", False, "Programs of fixed shapes, with room for 8 requests.")


class Side:
    """An engine with or without speculation, and what it measured."""

    def __init__(self, engine: BatchedEngine, requests: list[GenerationRequest], rows: int) -> None:
        self.engine, self.requests, self.rows = engine, requests, rows
        self.work: list[float] = []
        self.completions: list[list[int]] = []
        engine.compile()
        self.run()

    def run(self) -> float:
        """Completes the requests; returns seconds."""
        begun, worked = time.perf_counter(), time.process_time()
        waiting, events = list(self.requests), dict[int, list[int]]()
        while waiting or not self.engine.is_idle:
            while waiting and self.engine.stats.rows_in_use + self.engine.stats.waiting < self.rows:
                events[self.engine.insert(waiting.pop(0))] = []
            for event in self.engine.step():
                events[event.request].append(event.token)
        self.work.append(time.process_time() - worked)
        self.completions = list(events.values())
        return time.perf_counter() - begun


def load() -> tuple[Any, Any, Any, list[list[int]]]:
    """Returns model, parameters, tokenizer and prompts."""
    if (WORKDIR.value is None) == (SIZE.value is None) or (PROMPTS.value is None) != (WORKDIR.value is None):
        raise UserError("needs --workdir=DIR with --prompts=FILE.jsonl, or --size=SIZE")
    if SIZE.value is not None:
        model, params = random_model(SIZE.value)
        prompts = np.random.default_rng(0).integers(0, VOCABULARY, (REQUESTS.value, 64)).tolist()
        return model, params, BytesTokenizer(), prompts
    trained = load_model(expand(str(WORKDIR.value)), MeshConfig())
    lines = [json.loads(line) for _, line in text_files.read_lines(expand(str(PROMPTS.value)))][: REQUESTS.value]
    prompts = [trained.tokenizer.encode(line["text"]).tolist() for line in lines]
    return trained.model, trained.params, trained.tokenizer, prompts


def proposer(name: str | None) -> Proposer | None:
    if name is None:
        return None
    return NgramProposer() if name == "ngram" else load_draft(name, MeshConfig(), None, "as_given")


def main() -> None:
    model, params, tokenizer, prompts = load()
    sampling, most = Sampling(TEMPERATURE.value), MAX_TOKENS.value
    requests = [GenerationRequest(tuple(p), most, sampling, i, tuple(tokenizer.ends)) for i, p in enumerate(prompts)]
    differ = False
    for rows in ROWS.value:
        sides = {}
        for name in (None, *SPECULATION.value):
            engine = BatchedEngine(
                model,
                params,
                tokenizer,
                rows=8 if DETERMINISTIC.value else rows,
                deterministic=DETERMINISTIC.value,
                prefix_cache=False,
                proposer=proposer(name),
                speculative_tokens=SPECULATIVE_TOKENS.value,
            )
            sides[str(name)] = Side(engine, requests, rows)
        times = alternate({name: side.run for name, side in sides.items()}, ROUNDS.value)
        print(f"{rows} in progress, {len(requests)} requests")
        plain = sides["None"]
        for name, side in sides.items():
            stats, number = side.engine.stats, sum(map(len, side.completions))
            share = stats.tokens_accepted / max(1, stats.tokens_proposed)
            equal = np.mean([one == other for one, other in zip(side.completions, plain.completions, strict=True)])
            differ = differ or bool(DETERMINISTIC.value and equal < 1)
            speed, work = ratio(times[name], times["None"]), ratio(side.work[1:], plain.work[1:])
            print(
                f"  {name}: {number / statistics.median(times[name]):.1f} tokens/s, {speed:.2f} times; in processor "
                f"time {work:.2f} times; accepted {share:.2f} of {stats.tokens_proposed} proposals; completions equal: "
                f"{equal:.2f}"
            )
    if differ:
        sys.exit("completions differ")


if __name__ == "__main__":
    cli.run(main)
