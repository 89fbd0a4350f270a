"""Tokens per second of greedy generation, here and by transformers' `generate`, in one run.

    python -m benchmarks.decode [--size=124m|tiny] [--batch_sizes=1,8] [--rounds=5] [--weights=as_given,int8]
        [--output=decode.json]

Both sides get the same random GPT-2 and the same prompts, in float32, on the CPU unless JAX finds something faster
(PyTorch stays on the CPU, and is left out by --notransformers). Rounds alternate between the sides; the median counts.
With float32 weights they must agree on every token: exit code 1 if not.

A token cannot take less time than reading all weights does, so the time of a program that only sums them up, measured
between the rounds, gives the share of the memory bandwidth that decoding reaches.
Needs `pip install torch transformers`.
"""

import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, get_args

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags

from benchmarks.loss_parity import import_torch
from gptjax import cli
from gptjax.config import UserError
from gptjax.data.tokenizers import BytesTokenizer
from gptjax.inference.engine import Engine
from gptjax.inference.sampling import Sampling
from gptjax.inference.weights import Weights
from gptjax.interop.huggingface import load_pretrained

PROMPT_TOKENS, NEW_TOKENS = 32, 96
SIZES = {"tiny": (2, 64, 4), "124m": (12, 768, 12)}  # layers, width, heads


class Side(NamedTuple):
    """One way of generating: a name, and prompts (B, T) to new tokens (B, N)."""

    name: str
    generate: Callable[[np.ndarray], np.ndarray]


def make_checkpoint(size: str, directory: Path) -> Any:
    """A random GPT2LMHeadModel, saved in `directory`."""
    torch, transformers = import_torch()
    torch.manual_seed(0)
    layers, width, heads = SIZES[size]
    model = transformers.GPT2LMHeadModel(transformers.GPT2Config(n_layer=layers, n_embd=width, n_head=heads)).eval()
    model.save_pretrained(directory)
    return model


def transformers_side(model: Any) -> Side:
    torch, _ = import_torch()

    def generate(prompts_BT: np.ndarray) -> np.ndarray:
        tokens = torch.tensor(prompts_BT, dtype=torch.int64)
        with torch.inference_mode():
            out = model.generate(
                tokens,
                attention_mask=torch.ones_like(tokens),
                max_new_tokens=NEW_TOKENS,
                min_new_tokens=NEW_TOKENS,
                do_sample=False,
                pad_token_id=0,
            )
        return out[:, prompts_BT.shape[1] :].numpy()

    return Side("transformers", generate)


def our_side(model: Any, params: Any, weights: Any) -> Side:
    engine = Engine(model, params, BytesTokenizer(), weights=weights)

    def generate(prompts_BT: np.ndarray) -> np.ndarray:
        done = engine.generate(list(prompts_BT), NEW_TOKENS, Sampling(temperature=0.0), ignore_end_of_text=True)
        return np.stack([completion.tokens for completion in done])

    return Side(f"gptjax {weights}", generate)


def seconds(function: Callable[[], Any]) -> float:
    start = time.perf_counter()
    function()
    return time.perf_counter() - start


def measure(sides: list[Side], params: Any, batch_size: int, rounds: int) -> tuple[dict[str, list[float]], list[float]]:
    """Seconds of each round of each side, and of summing up the weights once."""
    prompts_BT = np.random.default_rng(0).integers(0, 50_257, (batch_size, PROMPT_TOKENS))
    read_all = jax.jit(lambda params: sum(jnp.sum(leaf) for leaf in jax.tree.leaves(params)))
    tokens = {side.name: side.generate(prompts_BT) for side in sides}  # compiles, and warms up
    ours, theirs = tokens.get("gptjax as_given"), tokens.get("transformers")
    if ours is not None and theirs is not None and not np.array_equal(ours, theirs):
        print("the two sides generate different tokens", file=sys.stderr)
        sys.exit(1)
    read_all(params).block_until_ready()
    times: dict[str, list[float]] = {side.name: [] for side in sides}
    reads = []
    for _ in range(rounds):
        for side in sides:
            times[side.name].append(seconds(partial(side.generate, prompts_BT)))
            reads.append(min(seconds(lambda: read_all(params).block_until_ready()) for _ in range(5)))
    return times, reads


def report(
    batch_size: int, times: dict[str, list[float]], reads: list[float], weight_bytes: int
) -> list[dict[str, Any]]:
    """Prints and returns a row for each side."""
    read = statistics.median(reads)
    print(f"\nbatch {batch_size}: reading {weight_bytes / 1e9:.2f} GB of weights takes {read * 1e3:.1f} ms, ", end="")
    print(f"{weight_bytes / read / 1e9:.1f} GB/s")
    print(f"{'':20} {'tokens/s':>9} {'spread':>13} {'of transformers':>16} {'of bandwidth':>13}")
    rows = []
    for name, values in times.items():
        new = batch_size * NEW_TOKENS
        rate = new / statistics.median(values)
        ratio = None
        if "transformers" in times:  # of rounds beside each other: the machine's mood cancels out
            ratio = statistics.median(t / v for t, v in zip(times["transformers"], values, strict=True))
        share = read * NEW_TOKENS / statistics.median(values)
        spread = f"{new / max(values):.1f}-{new / min(values):.1f}"
        print(f"{name:20} {rate:9.1f} {spread:>13} {'' if ratio is None else f'{ratio:.2f}':>16} {share:13.2f}")
        rows.append(
            {
                "batch_size": batch_size,
                "side": name,
                "tokens_per_second": rate,
                "seconds": values,
                "ratio_to_transformers": ratio,
                "bandwidth_share": share,
                "read_seconds": reads,
            }
        )
    return rows


def main() -> None:
    forms = WEIGHTS.value
    if unknown := [form for form in forms if form not in get_args(Weights)]:
        raise UserError(f"--weights={unknown[0]} is not one of {', '.join(get_args(Weights))}")
    with tempfile.TemporaryDirectory() as directory:
        theirs = make_checkpoint(SIZE.value, Path(directory))
        model, params = load_pretrained(directory)
    sides = [our_side(model, params, form) for form in forms]
    if TRANSFORMERS.value:
        sides.insert(0, transformers_side(theirs))
    del theirs
    torch, transformers = import_torch()
    device = jax.devices()[0]
    versions = {"jax": jax.__version__, "torch": torch.__version__, "transformers": transformers.__version__}
    print(f"{SIZE.value}, {PROMPT_TOKENS} + {NEW_TOKENS} tokens, {device.device_kind}, {versions}")
    weight_bytes = sum(leaf.nbytes for leaf in jax.tree.leaves(params))
    rows = []
    for batch_size in map(int, BATCH_SIZES.value):
        rows += report(batch_size, *measure(sides, params, batch_size, ROUNDS.value), weight_bytes)
    if OUTPUT.value is not None:
        Path(OUTPUT.value).write_text(
            json.dumps({"size": SIZE.value, "device": device.device_kind, "versions": versions, "rows": rows}, indent=2)
        )


if __name__ == "__main__":
    SIZE = flags.DEFINE_enum("size", "124m", list(SIZES), "Model.")
    BATCH_SIZES = flags.DEFINE_list("batch_sizes", ["1", "8"], "Prompts generated together.")
    ROUNDS = flags.DEFINE_integer("rounds", 5, "Alternations between the sides.", lower_bound=1)
    WEIGHTS = flags.DEFINE_list("weights", ["as_given"], "Forms of our weights.")
    TRANSFORMERS = flags.DEFINE_bool("transformers", True, "Measure transformers too.")
    OUTPUT = flags.DEFINE_string("output", None, "Write the measurements to this JSON file.")
    cli.run(main)
