"""Compares the tokens per second of greedy generation by gptjax and by transformers' `generate`.

    python -m benchmarks.decode [--size=124m|355m|774m|1558m|tiny] [--batch_sizes=1,8,32] [--rounds=5]
        [--weights=as_given,bfloat16,int8] [--kernels=20] [--output=decode.json]

Both sides run the same random GPT-2 on the same prompts, in float32, on JAX's default device (PyTorch always on the
CPU; --notransformers leaves it out). Rounds alternate between the sides, and the median is reported. On a CPU, with
float32 weights, both must agree on every token: exit code 1 if not. GPUs and TPUs round the factors of float32
products, so some tokens may differ.

Decoding a token takes at least as long as reading all weights, which gives the share of the memory bandwidth that
decoding reaches. The bandwidth is the data sheet's; on a CPU it is that of a program that only sums the float32
weights, measured between the rounds. The processor time per token over all cores is reported too: it depends less than
the wall-clock time on other load.
Needs `pip install torch transformers`, except with --notransformers.
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

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from absl import flags

from benchmarks.loss_parity import import_torch
from benchmarks.measuring import device_kernels, print_kernels
from gptjax import cli
from gptjax.config import GPTConfig, UserError
from gptjax.data.tokenizers import BytesTokenizer
from gptjax.inference.engine import Engine
from gptjax.inference.sampling import Sampling
from gptjax.inference.weights import WeightFormat
from gptjax.interop.huggingface import load_pretrained
from gptjax.models.gpt import GPT
from gptjax.scaling.devices import device_peak

PROMPT_TOKENS, NEW_TOKENS = 32, 96
SIZES = {  # layers, width, heads
    "tiny": (2, 64, 4),
    "124m": (12, 768, 12),
    "355m": (24, 1024, 16),
    "774m": (36, 1280, 20),
    "1558m": (48, 1600, 25),
}
VOCABULARY = 50_257


class Side(NamedTuple):
    """An implementation of generation: its name, prompts (B, T) -> new tokens (B, N), and the bytes read per step."""

    name: str
    generate: Callable[[np.ndarray], np.ndarray]
    weight_bytes: int


def make_checkpoint(size: str, directory: Path) -> Any:
    """Saves a random GPT2LMHeadModel in `directory`."""
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

    return Side("transformers", generate, sum(p.nbytes for p in model.parameters()))


def our_side(model: Any, params: Any, weights: Any) -> Side:
    engine = Engine(model, params, BytesTokenizer(), weights=weights)

    def generate(prompts_BT: np.ndarray) -> np.ndarray:
        done = engine.generate(list(prompts_BT), NEW_TOKENS, Sampling(temperature=0.0), ignore_end_of_text=True)
        return np.stack([completion.tokens for completion in done])

    return Side(f"gptjax {weights}", generate, sum(leaf.nbytes for leaf in jax.tree.leaves(engine.params)))


def random_model(size: str) -> tuple[GPT, Any]:
    """Returns a model like that of `make_checkpoint`, with other random weights and without PyTorch."""
    layers, width, heads = SIZES[size]
    model = GPT(GPTConfig(vocab_size=VOCABULARY, num_layers=layers, embed_dim=width, num_heads=heads, dtype="float32"))
    return model, nn.unbox(jax.jit(model.init)(jax.random.key(0), jnp.zeros((1, 1), jnp.int32)))["params"]


def seconds(function: Callable[[], Any]) -> tuple[float, float]:
    """Measures wall-clock seconds and processor seconds over all cores."""
    start, work = time.perf_counter(), time.process_time()
    function()
    return time.perf_counter() - start, time.process_time() - work


class Times(NamedTuple):
    """Wall-clock and processor seconds of each round of each side, and seconds to sum the weights once."""

    sides: dict[str, list[float]]
    work: dict[str, list[float]]
    reads: list[float]


def measure(sides: list[Side], params: Any, prompts_BT: np.ndarray, rounds: int) -> Times:
    read_all = jax.jit(lambda params: sum(jnp.sum(leaf) for leaf in jax.tree.leaves(params)))
    tokens = {side.name: side.generate(prompts_BT) for side in sides}  # compiles, and warms up
    ours, theirs = tokens.get("gptjax as_given"), tokens.get("transformers")
    if ours is not None and theirs is not None and not np.array_equal(ours, theirs):
        print(f"the two sides agree on {np.mean(ours == theirs):.4f} of the tokens", file=sys.stderr)
        if jax.default_backend() == "cpu":
            sys.exit(1)
    read_all(params).block_until_ready()
    times = Times({side.name: [] for side in sides}, {side.name: [] for side in sides}, [])
    for _ in range(rounds):
        for side in sides:
            passed, worked = seconds(partial(side.generate, prompts_BT))
            times.sides[side.name].append(passed)
            times.work[side.name].append(worked)
            times.reads.append(min(seconds(lambda: read_all(params).block_until_ready())[0] for _ in range(5)))
    return times


def report(batch_size: int, sides: list[Side], times: Times, read_bytes: int) -> list[dict[str, Any]]:
    """Prints and returns a row for each side."""
    read = read_bytes / statistics.median(times.reads)
    peak = device_peak(jax.devices()[0].device_kind)
    bandwidth = read if peak is None else peak.bandwidth
    print(f"\nbatch {batch_size}: memory is read at {read / 1e9:.1f} GB/s, of {bandwidth / 1e9:.1f} GB/s")
    columns = ("tokens/s", "spread", "of transformers", "of bandwidth", "CPU ms/step")
    print(f"{'':20} {columns[0]:>9} {columns[1]:>15} " + " ".join(f"{column:>15}" for column in columns[2:]))
    rows = []
    for side in sides:
        name, values = side.name, times.sides[side.name]
        new = batch_size * NEW_TOKENS
        rate = new / statistics.median(values)
        ratio = None
        if "transformers" in times.sides:  # of adjacent rounds, so that slow changes of the machine's speed cancel
            ratio = statistics.median(t / v for t, v in zip(times.sides["transformers"], values, strict=True))
        share = side.weight_bytes * NEW_TOKENS / statistics.median(values) / bandwidth
        work = statistics.median(times.work[name]) / NEW_TOKENS
        spread = f"{new / max(values):.1f}-{new / min(values):.1f}"
        shown = "" if ratio is None else f"{ratio:.2f}"
        print(f"{name:20} {rate:9.1f} {spread:>15} {shown:>15} {share:15.2f} {work * 1e3:15.1f}")
        rows.append(
            {
                "batch_size": batch_size,
                "side": name,
                "tokens_per_second": rate,
                "seconds": values,
                "ratio_to_transformers": ratio,
                "weight_bytes": side.weight_bytes,
                "bandwidth": bandwidth,
                "bandwidth_share": share,
                "cpu_seconds_per_step": work,
                "read_seconds": times.reads,
            }
        )
    return rows


def main() -> None:
    forms = WEIGHTS.value
    if unknown := [form for form in forms if form not in get_args(WeightFormat)]:
        raise UserError(f"--weights={unknown[0]} is not one of {', '.join(get_args(WeightFormat))}")
    versions, theirs = {"jax": jax.__version__}, []
    if TRANSFORMERS.value:
        torch, transformers = import_torch()
        versions |= {"torch": torch.__version__, "transformers": transformers.__version__}
        with tempfile.TemporaryDirectory() as directory:
            theirs.append(transformers_side(make_checkpoint(SIZE.value, Path(directory))))
            model, params = load_pretrained(directory)
    else:
        model, params = random_model(SIZE.value)
    ours = [our_side(model, params, form) for form in forms]
    sides = theirs + ours
    device = jax.devices()[0]
    print(f"{SIZE.value}, {PROMPT_TOKENS} + {NEW_TOKENS} tokens, {device.device_kind}, {versions}")
    weight_bytes = sum(leaf.nbytes for leaf in jax.tree.leaves(params))
    rows = []
    for batch_size in map(int, BATCH_SIZES.value):
        prompts_BT = np.random.default_rng(0).integers(0, VOCABULARY, (batch_size, PROMPT_TOKENS))
        rows += report(batch_size, sides, measure(sides, params, prompts_BT, ROUNDS.value), weight_bytes)
        for side in ours if KERNELS.value > 0 else ():
            print(f"\n{side.name}, a token: ", end="")
            print_kernels(device_kernels(partial(side.generate, prompts_BT), NEW_TOKENS), KERNELS.value)
    if OUTPUT.value is not None:
        Path(OUTPUT.value).write_text(
            json.dumps({"size": SIZE.value, "device": device.device_kind, "versions": versions, "rows": rows}, indent=2)
        )


if __name__ == "__main__":
    SIZE = flags.DEFINE_enum("size", "124m", list(SIZES), "Model.")
    BATCH_SIZES = flags.DEFINE_list("batch_sizes", ["1", "8", "32"], "Prompts generated together.")
    ROUNDS = flags.DEFINE_integer("rounds", 5, "Alternations between the sides.", lower_bound=1)
    WEIGHTS = flags.DEFINE_list("weights", ["as_given"], "Weight formats of gptjax.")
    TRANSFORMERS = flags.DEFINE_bool("transformers", True, "Measure transformers too.")
    KERNELS = flags.DEFINE_integer("kernels", 0, "Number of gptjax kernels to print, for a token and its prompt.")
    OUTPUT = flags.DEFINE_string("output", None, "Write the measurements to this JSON file.")
    cli.run(main)
