"""Compares gptjax's training step with compiled PyTorch.

    python -m benchmarks.train_step [--size=124m] [--sequences=8] [--context=128] [--rounds=5] [--steps=4] [--notorch]
        [--variant=NAME,KEY=VALUE,...]... [--seconds=100] [--kernels=20] [--output=train_step.json]

The other side is transformers' GPT2LMHeadModel with torch.compile, fused AdamW, clipping and, on a GPU, bfloat16
autocast and flash attention. Both sides train GPT-2s of one shape on random tokens, without dropout: in float32 on a
CPU, in bfloat16 elsewhere. Rounds of --steps steps alternate between all programs; times and ratios are medians over
rounds. MFU is relative to the data sheet's peak (on a CPU the measured peak), without recomputation.

On a CPU the table also has a lower bound of the step time: matrix products at the rate of one large product measured in
the same run, and nothing else.

Each --variant is another gptjax program; KEY is a config key such as model.layer_loop, `sequences` of a microbatch,
`microbatches` of a step, xla.FLAG for the compiler, or platform.FIELD for a field of `PlatformDefaults`
(gptjax/parallel/platforms.py). Variants that would start compiling later than --seconds are skipped; --parallel
compiles several at once. --kernels prints the device kernels of the first and the fastest gptjax program.
Needs `pip install torch transformers`.
"""

import statistics
import sys
import time
from typing import Any

import jax
from absl import flags

from benchmarks.measuring import alternate, measured_on, print_kernels, product_flops, ratio, write_json
from benchmarks.variants import Trainer, Variant, parse_variant, platform
from gptjax import cli
from gptjax import config as c
from gptjax.config import UserError
from gptjax.scaling import devices, flops

# layers, width, heads, vocabulary
SIZES = {
    "tiny": (2, 64, 4, 257),
    "10m": (6, 256, 8, 20_480),
    "30m": (6, 384, 6, 50_257),
    "124m": (12, 768, 12, 50_257),
    "355m": (24, 1024, 16, 50_257),
    "774m": (36, 1280, 20, 50_257),
    "1558m": (48, 1600, 25, 50_257),
}
PRODUCT_SIZE = {"cpu": 2048, "gpu": 8192, "tpu": 8192}
HEADS = (
    *(("tokens/s", 10), ("spread", 19), ("of torch", 9), ("MFU", 6), ("ms", 8), ("GB", 6), ("compile s", 9)),
    *(("loss", 8), ("|grad|", 7)),
)


def make_config(size: str, sequences: int, context: int | None, platform: str) -> c.Config:
    """Returns the config of a step of one microbatch."""
    layers, width, heads, vocabulary = SIZES[size]
    model = c.GPTConfig(
        vocab_size=vocabulary,
        context_length=(128 if platform == "cpu" else 1024) if context is None else context,
        num_layers=layers,
        embed_dim=width,
        num_heads=heads,
        dtype="float32" if platform == "cpu" else "bfloat16",
    )
    tokens = sequences * model.context_length
    config = c.Config(model=model, batch=c.BatchConfig(1, tokens_per_batch=tokens, microbatch_size=sequences))
    c.check(config)
    return config


class Comparison:
    """The programs that are compared, and their measurements.

    Attributes:
      result: the measurements, for JSON.
    """

    def __init__(self, base: c.Config, variants: dict[str, Variant], workers: int):
        self._base, self._variants = base, variants
        self._trainer = Trainer(base, workers)
        self._theirs: Any = None  # TorchTrainer, where it works
        self._size, self._dtype = PRODUCT_SIZE[platform()], base.model.dtype
        self._products = [product_flops(self._size, self._dtype)]
        self._failures: dict[str, str] = {}
        self.result: dict[str, Any] = {
            **measured_on(),
            "size": SIZE.value,
            "context": base.model.context_length,
            "variants": VARIANT.value,
            "product_flops": self._products,
            "failures": self._failures,
            "rows": [],
        }

    def attempt(self, what: str, function: Any) -> Any:
        """Returns the result of `function`; if it raises, records the error and returns None."""
        try:
            return function()
        except UserError:
            raise
        except Exception as error:
            self._failures[what] = f"{type(error).__name__}: {str(error)[:500]}"
            print(f"{what} failed: {self._failures[what]}", file=sys.stderr, flush=True)
            return None

    def prepare(self, with_torch: bool, deadline: float | None) -> dict[str, Any]:
        """Compiles all sides; returns for each that works a function that measures the seconds of a step."""
        sides: dict[str, Any] = {}
        for name, variant in self._variants.items():
            if deadline is not None and time.perf_counter() > deadline:
                self._failures[name] = "left out: no time"
            else:
                self.attempt(name, lambda v=variant: self._trainer.start(v))
        if with_torch:
            from benchmarks.torch_training import TorchTrainer

            theirs = self.attempt("torch", lambda: TorchTrainer(self._base, self._base.sequences_per_microbatch))
            if theirs is not None:
                self._theirs, sides["torch"] = theirs, lambda: theirs.train(STEPS.value)
                self._at_first("torch", sides["torch"], self._base, theirs.compile_seconds)
        self._trainer.wait()
        for name, variant in self._variants.items():
            if name not in self._failures:
                self.attempt(name, lambda name=name: self._trainer.finish(name))
            if name in self._trainer.numbers:
                sides[name] = lambda name=name: self._trainer.train(name, STEPS.value)
                self._at_first(name, sides[name], variant.config, self._trainer.compile_seconds[name])
        return sides

    def _at_first(self, name: str, measure: Any, config: c.Config, compile_seconds: float) -> None:
        rate = config.batch.tokens_per_batch / measure()
        print(f"{name}: compiled in {compile_seconds:.1f} s, at first {rate:,.0f} tokens/s", flush=True)
        self.result["rows"].append({"side": name, "tokens_per_second": rate, "first": True})
        write_json(OUTPUT.value, self.result)

    def measure(self, sides: dict[str, Any]) -> None:
        """Measures all rounds and prints the table."""

        def product() -> float:
            self._products.append(product_flops(self._size, self._dtype))
            return 0.0

        times = alternate({**sides, "product": product}, ROUNDS.value)
        del times["product"]
        rate = statistics.median(self._products)
        peak = rate if platform() == "cpu" else devices.peak_flops(jax.devices()[0], self._dtype)
        print(f"\n{'':28} " + " ".join(f"{head:>{width}}" for head, width in HEADS))
        self.result["rows"] = [self._row(name, times, peak) for name in times]
        tokens = self._base.batch.tokens_per_batch
        bound = self.result["product_bound_seconds"] = tokens * flops.flops_per_token(self._base.model) / rate
        print(f"a product of {self._size} x {self._size} matrices: {rate / 1e12:.3f} TFLOP/s")
        print(f"all products of a step at that rate: {bound * 1e3:.1f} ms, {tokens / bound:,.0f} tokens/s", flush=True)
        write_json(OUTPUT.value, self.result)

    def _row(self, name: str, times: dict[str, list[float]], peak: float | None) -> dict[str, Any]:
        torch, trainer, theirs = name == "torch", self._trainer, self._theirs
        config, values = self._base if torch else self._variants[name].config, times[name]
        tokens, step = config.batch.tokens_per_batch, statistics.median(values)
        loss, grad_norm = trainer.numbers.get(name, (None, None))
        of_torch = None
        if theirs is not None:
            theirs_per_token = [value / self._base.batch.tokens_per_batch for value in times["torch"]]
            of_torch = ratio([value / tokens for value in values], theirs_per_token)
        row: dict[str, Any] = {
            "side": name,
            "tokens_per_step": tokens,
            "tokens_per_second": tokens / step,
            "seconds": values,
            "ratio_to_torch": of_torch,
            "mfu": None if peak is None else tokens / step * flops.flops_per_token(config.model) / peak,
            "bytes": theirs.peak_bytes if torch else trainer.memory_bytes.get(name),
            "compile_seconds": theirs.compile_seconds if torch else trainer.compile_seconds[name],
            "loss": theirs.first_loss if torch else loss,
            "grad_norm": grad_norm,
        }
        spread = f"{tokens / max(values):,.0f}-{tokens / min(values):,.0f}"
        print(
            f"{name[:28]:28} {tokens / step:10,.0f} {spread:>19} {_number(of_torch, '9.3f')} "
            f"{_number(row['mfu'], '6.3f')} {step * 1e3:8.1f} {_number((row['bytes'] or 0) / 1e9, '6.1f')} "
            f"{row['compile_seconds']:9.1f} {row['loss']:8.4f} {_number(grad_norm, '7.4f')}"
        )
        return row

    def kernels(self, shown: int) -> None:
        """Prints the device kernels of the first and the fastest gptjax program."""
        ours = [row for row in self.result["rows"] if row["side"] != "torch"]
        fastest = max(ours, key=lambda row: row["tokens_per_second"])["side"]
        self.result["kernels"] = {}
        for name in dict.fromkeys([ours[0]["side"], fastest]):
            rows = self.attempt(f"kernels of {name}", lambda name=name: self._trainer.kernels(name)) or []
            self.result["kernels"][name] = rows[:100]
            print(f"\n{name}: ", end="")
            print_kernels(rows, shown)
        write_json(OUTPUT.value, self.result)


def _number(value: float | None, form: str) -> str:
    return " " * int(form.split(".")[0]) if value is None else f"{value:{form}}"


def main() -> None:
    deadline = None if SECONDS.value is None else time.perf_counter() + SECONDS.value
    base = make_config(SIZE.value, SEQUENCES.value, CONTEXT.value, platform())
    texts = ["gptjax", *VARIANT.value] if DEFAULT.value else VARIANT.value
    comparison = Comparison(base, {v.name: v for v in (parse_variant(text, base) for text in texts)}, PARALLEL.value)
    on = comparison.result
    print(f"{SIZE.value}, {base.batch.tokens_per_batch:,} tokens a step, {on['device']}, {on['versions']}", flush=True)
    sides = comparison.prepare(TORCH.value, deadline)
    comparison.measure(sides)
    if KERNELS.value > 0:
        comparison.kernels(KERNELS.value)


if __name__ == "__main__":
    SIZE = flags.DEFINE_enum("size", "124m", list(SIZES), "Model.")
    SEQUENCES = flags.DEFINE_integer("sequences", 8, "Sequences of a step.", lower_bound=1)
    CONTEXT = flags.DEFINE_integer("context", None, "Tokens of a sequence; default: 128 on a CPU, 1024 elsewhere.")
    ROUNDS = flags.DEFINE_integer("rounds", 5, "Rounds, alternating between the programs.", lower_bound=1)
    STEPS = flags.DEFINE_integer("steps", 4, "Steps of a round.", lower_bound=1)
    TORCH = flags.DEFINE_bool("torch", True, "Measure PyTorch as well.")
    DEFAULT = flags.DEFINE_bool("default", True, "Measure the default config as well, as gptjax.")
    VARIANT = flags.DEFINE_multi_string("variant", [], "NAME,KEY=VALUE,...: another gptjax program.")
    SECONDS = flags.DEFINE_float("seconds", None, "Skip variants that would be traced later than this after the start.")
    PARALLEL = flags.DEFINE_integer("parallel", 1, "Programs to compile in parallel.", lower_bound=1)
    KERNELS = flags.DEFINE_integer("kernels", 0, "Number of kernels to print.")
    OUTPUT = flags.DEFINE_string("output", None, "Write the measurements to this JSON file.")
    cli.run(main)
