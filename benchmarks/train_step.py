"""The training step here and in compiled PyTorch, in one run.

    python -m benchmarks.train_step [--size=124m] [--sequences=8] [--context=128] [--rounds=5] [--steps=4] [--notorch]
        [--variant=NAME,KEY=VALUE,...]... [--seconds=100] [--kernels=20] [--output=train_step.json]

The other side is transformers' GPT2LMHeadModel with torch.compile, fused AdamW, clipping and, on a GPU, bfloat16
autocast and flash attention. Both sides train GPT-2s of one shape on random tokens, without dropout: in float32 on a
CPU, in bfloat16 elsewhere. Rounds of --steps steps alternate between all of them; the median counts, and a ratio is the
median over rounds. MFU is of the data sheet's peak (on a CPU of the measured one), for the model's own arithmetic.

On a CPU the table also has the bound of the matrix products: the time of a step whose products ran at the rate of one
large product in the same run, and nothing else took any.

Each --variant is one more program of ours; KEY is a config key such as model.layer_loop, `sequences` of a microbatch,
`microbatches` of a step, xla.FLAG for the compiler, or what a module of gptjax chooses by platform:
losses.CHUNK_TOKENS, losses.HEAD_ROWS, losses.ONE_PASS, attention.SEPARATE_QKV. --seconds leaves out the variants whose
turn to compile comes later. --kernels prints where a device spends a step of the first and the fastest of ours.
Needs `pip install torch transformers`.
"""

import ast
import dataclasses
import statistics
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import jax
import numpy as np
from absl import flags

from benchmarks.measuring import alternate, measured_on, product_flops, ratio, write_json
from gptjax import cli
from gptjax import config as c
from gptjax.config import UserError
from gptjax.models import attention
from gptjax.parallel.compiler import compiler_options
from gptjax.parallel.mesh import make_mesh
from gptjax.scaling import flops
from gptjax.training import losses
from gptjax.training.programs import make_program
from gptjax.training.state import TrainState, create_state, make_train_step, state_shardings

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
MODULES: dict[str, Any] = {"losses": losses, "attention": attention}
PRODUCT_SIZE = {"cpu": 2048, "gpu": 8192, "tpu": 8192}


@dataclasses.dataclass(frozen=True)
class Variant:
    """One program of ours."""

    name: str
    config: c.Config
    options: dict[str, str | bool]  # of the compiler
    constants: dict[tuple[str, str], Any]  # (module, name): what it chooses for the platform


def parse_variant(text: str, base: c.Config, platform: str) -> Variant:
    """`base` changed as NAME,KEY=VALUE,... says; UserError for a key that is not there."""
    name, *changes = text.split(",")
    edited, flags_of_xla, constants = c.config_dict(base), [], {}
    sequences, microbatches = base.sequences_per_microbatch, 1
    for change in changes:
        key, has_value, value = change.partition("=")
        section, _, field = key.partition(".")
        if not has_value:
            raise UserError(f"--variant={text}: {change!r} is not KEY=VALUE")
        if key == "sequences":
            sequences = int(value)
        elif key == "microbatches":
            microbatches = int(value)
        elif section == "xla":
            flags_of_xla.append((field, value))
        elif section in MODULES:
            if not isinstance(getattr(MODULES[section], field, None), dict):
                raise UserError(f"--variant={text}: {section} has no {field} by platform")
            constants[section, field] = _literal(value)
        else:
            c.check_key(key)
            edited.update_from_flattened_dict({key: _literal(value)})
    edited.batch.microbatch_size = sequences
    edited.batch.tokens_per_batch = microbatches * sequences * base.model.context_length
    config = c.resolve(edited)
    options = compiler_options(platform, (*config.compiler_options, *flags_of_xla))
    return Variant(name, config, options, constants)


def _literal(value: str) -> Any:
    try:
        return ast.literal_eval(value)
    except (ValueError, SyntaxError):
        return value


@contextmanager
def changed(constants: dict[tuple[str, str], Any], platform: str) -> Iterator[None]:
    """In which modules choose other values for the platform."""
    before = {}
    for (module, name), value in constants.items():
        table = getattr(MODULES[module], name)
        before[module, name], table[platform] = table[platform], value
    try:
        yield
    finally:
        for (module, name), value in before.items():
            getattr(MODULES[module], name)[platform] = value


class Trainer:
    """The real training step of several variants, on one state that goes from one to the other.

    The learning rate is 0, which no program knows: so all variants have one loss and one gradient, and show it.

    Attributes:
      compile_seconds, memory_bytes: by variant; memory is what the compiler says a step needs.
      numbers: by variant, the loss and the norm of the gradient.
    """

    def __init__(self, base: c.Config):
        self._base, self._mesh = base, make_mesh(base.mesh, jax.devices()[:1])
        self._steps: dict[str, Any] = {}
        self.compile_seconds: dict[str, float] = {}
        self.memory_bytes: dict[str, int] = {}
        self.numbers: dict[str, tuple[float, float]] = {}
        self._state: TrainState | None = None

    def add(self, variant: Variant) -> None:
        """Compiles a variant, and takes its first step."""
        config, mesh = variant.config, self._mesh
        program = make_program(config)
        rows, context = config.sequences_per_microbatch, config.model.context_length
        shape_MBT = (config.batch.tokens_per_batch // (rows * context), rows, context)
        tokens = np.random.default_rng(0).integers(0, config.model.vocab_size or 0, shape_MBT[1:], np.int32)
        tokens_MBT = jax.device_put(np.broadcast_to(tokens, shape_MBT))
        batch = {"tokens": tokens_MBT, "targets": tokens_MBT, "weights": jax.numpy.ones(tokens_MBT.shape)}
        with jax.set_mesh(mesh), changed(variant.constants, jax.devices()[0].platform):
            step = make_train_step(program, state_shardings(program, mesh))
            state = jax.eval_shape(lambda: create_state(program, mesh))
            arguments = (batch, np.int32(shape_MBT[0]), {"lr": np.float32(0)})
            start = time.perf_counter()
            compiled = step.lower(state, *arguments).compile(variant.options)
            self.compile_seconds[variant.name] = time.perf_counter() - start
        memory = compiled.memory_analysis()
        if memory is not None:
            self.memory_bytes[variant.name] = memory.argument_size_in_bytes + memory.temp_size_in_bytes
        self._steps[variant.name] = (compiled, arguments)
        try:
            if self._state is None:
                self._state = create_state(program, mesh)
            metrics = self._advance(variant.name)
            self.numbers[variant.name] = float(metrics["loss"]), float(metrics["grad_norm"])
        except Exception:
            del self._steps[variant.name]
            self._state = None  # it may have been given away
            raise

    def _advance(self, name: str) -> dict[str, jax.Array]:
        compiled, arguments = self._steps[name]
        self._state, metrics = compiled(self._state, *arguments)
        return metrics

    def train(self, name: str, steps: int) -> float:
        """Seconds of a step."""
        self._advance(name)["loss"].block_until_ready()  # another variant ran before
        start = time.perf_counter()
        for _ in range(steps):
            metrics = self._advance(name)
        metrics["loss"].block_until_ready()
        return (time.perf_counter() - start) / steps

    def kernels(self, name: str, steps: int = 3) -> list[tuple[str, float, int]]:
        """(kernel, milliseconds of a step, launches of a step) of the device, the longest first."""
        with tempfile.TemporaryDirectory() as directory:
            with jax.profiler.trace(directory):
                self.train(name, steps)
            (path,) = Path(directory).rglob("*.xplane.pb")
            data = jax.profiler.ProfileData.from_file(str(path))
            total: dict[str, float] = defaultdict(float)
            count: dict[str, int] = defaultdict(int)
            for plane in data.planes:
                for line in plane.lines if plane.name.startswith("/device:") else ():
                    for event in line.events if (line.name or "").startswith("Stream") else ():
                        total[event.name] += event.duration_ns / 1e6 / (steps + 1)
                        count[event.name] += 1
        return sorted(((name, ms, count[name] // (steps + 1)) for name, ms in total.items()), key=lambda row: -row[1])


def make_config(platform: str) -> c.Config:
    layers, width, heads, vocabulary = SIZES[SIZE.value]
    model = c.GPTConfig(
        vocab_size=vocabulary,
        context_length=CONTEXT.value or (128 if platform == "cpu" else 1024),
        num_layers=layers,
        embed_dim=width,
        num_heads=heads,
        dtype="float32" if platform == "cpu" else "bfloat16",
    )
    tokens = SEQUENCES.value * model.context_length
    batch = c.BatchConfig(total_tokens=1, tokens_per_batch=tokens, microbatch_size=SEQUENCES.value)
    config = c.Config(model=model, batch=batch)
    c.check(config)
    return config


def attempt(what: str, function: Any, failures: dict[str, str]) -> Any:
    """What `function` returns; None, and a line in `failures`, where it raises: the other sides go on."""
    try:
        return function()
    except UserError:
        raise
    except Exception as error:
        failures[what] = f"{type(error).__name__}: {str(error)[:500]}"
        print(f"{what} failed: {failures[what]}", file=sys.stderr, flush=True)
        return None


def report(
    times: dict[str, list[float]], trainer: Trainer, theirs: Any, variants: dict[str, Variant], peak: float | None
) -> list[dict[str, Any]]:
    """Prints and returns a row for each side."""
    heads = ("tokens/s", 10), ("spread", 19), ("of torch", 9), ("MFU", 6), ("ms", 8), ("GB", 6), ("compile s", 9)
    print(f"\n{'':28} " + " ".join(f"{head:>{width}}" for head, width in (*heads, ("loss", 8), ("|grad|", 7))))
    rows = []
    for name, values in times.items():
        torch = name == "torch"
        config = next(iter(variants.values())).config if torch else variants[name].config
        tokens = SEQUENCES.value * config.model.context_length if torch else config.batch.tokens_per_batch
        rate, step = tokens / statistics.median(values), statistics.median(values)
        per_token = [value / tokens for value in values]
        of_torch = None
        if theirs is not None:
            of_torch = ratio(per_token, [t / (SEQUENCES.value * config.model.context_length) for t in times["torch"]])
        loss, grad_norm = (theirs.first_loss, None) if torch else trainer.numbers[name]
        row = {
            "side": name,
            "tokens_per_step": tokens,
            "tokens_per_second": rate,
            "seconds": values,
            "ratio_to_torch": of_torch,
            "mfu": None if peak is None else rate * flops.flops_per_token(config.model) / peak,
            "bytes": theirs.peak_bytes if torch else trainer.memory_bytes.get(name),
            "compile_seconds": theirs.compile_seconds if torch else trainer.compile_seconds[name],
            "loss": loss,
            "grad_norm": grad_norm,
        }
        rows.append(row)
        spread = f"{tokens / max(values):,.0f}-{tokens / min(values):,.0f}"
        print(
            f"{name[:28]:28} {rate:10,.0f} {spread:>19} {_number(of_torch, '9.3f')} {_number(row['mfu'], '6.3f')} "
            f"{step * 1e3:8.1f} {_number((row['bytes'] or 0) / 1e9, '6.1f')} {row['compile_seconds']:9.1f} "
            f"{loss:8.4f} {_number(grad_norm, '7.4f')}"
        )
    return rows


def _number(value: float | None, form: str) -> str:
    return " " * int(form.split(".")[0]) if value is None else f"{value:{form}}"


def main() -> None:
    start, device = time.perf_counter(), jax.devices()[0]
    platform = "gpu" if device.platform in ("gpu", "cuda") else device.platform
    base = make_config(platform)
    texts = ["gptjax", *VARIANT.value] if DEFAULT.value else VARIANT.value
    variants = {v.name: v for v in (parse_variant(text, base, platform) for text in texts)}
    tokens = base.batch.tokens_per_batch
    size, dtype = PRODUCT_SIZE[platform], base.model.dtype
    products: list[float] = [product_flops(size, dtype)]
    result: dict[str, Any] = {**measured_on(), "size": SIZE.value, "context": base.model.context_length}
    result |= {"tokens_per_step": tokens, "variants": VARIANT.value, "product_flops": products, "rows": []}
    print(f"{SIZE.value}, {tokens:,} tokens a step, {device.device_kind}, {result['versions']}", flush=True)
    failures: dict[str, str] = {}
    result["failures"] = failures
    trainer, theirs = Trainer(base), None
    sides: dict[str, Any] = {}
    if TORCH.value:
        from benchmarks.torch_training import TorchTrainer

        theirs = attempt("torch", lambda: TorchTrainer(base, SEQUENCES.value), failures)
        if theirs is not None:
            sides["torch"] = lambda: theirs.train(STEPS.value)
            rate = tokens / sides["torch"]()
            print(f"torch: compiled in {theirs.compile_seconds:.1f} s, {rate:,.0f} tokens/s at first", flush=True)
            result["rows"].append({"side": "torch", "tokens_per_second": rate, "first": True})
    for name, variant in variants.items():
        if SECONDS.value is not None and time.perf_counter() - start > SECONDS.value:
            failures[name] = "left out: no time"
            continue
        attempt(name, lambda v=variant: trainer.add(v), failures)
        if name in trainer.numbers:
            sides[name] = lambda name=name: trainer.train(name, STEPS.value)
            once = sides[name]()
            rate = variant.config.batch.tokens_per_batch / once
            print(
                f"{name}: compiled in {trainer.compile_seconds[name]:.1f} s, at first {rate:,.0f} tokens/s", flush=True
            )
            result["rows"].append({"side": name, "tokens_per_second": rate, "first": True})
            write_json(OUTPUT.value, result)
    sides["product"] = lambda: products.append(product_flops(size, dtype)) or 0.0  # type: ignore[func-returns-value]
    times = alternate(sides, ROUNDS.value)
    del times["product"]
    fastest = statistics.median(products)
    peak = fastest if platform == "cpu" else flops.peak_flops(device, dtype)
    result["rows"] = report(times, trainer, theirs, variants, peak)
    write_json(OUTPUT.value, result)
    bound = tokens * flops.flops_per_token(base.model) / fastest
    result["product_bound_seconds"] = bound
    print(
        f"a product of {size} x {size} matrices: {fastest / 1e12:.3f} TFLOP/s; all products of a step at that rate: ",
        end="",
    )
    print(f"{bound * 1e3:.1f} ms, {tokens / bound:,.0f} tokens/s", flush=True)
    if KERNELS.value > 0:
        result["kernels"] = {}
        ours = [row for row in result["rows"] if row["side"] != "torch"]
        fastest_side = max(ours, key=lambda row: row["tokens_per_second"])["side"]
        for name in dict.fromkeys([ours[0]["side"], fastest_side]):
            rows = attempt(f"kernels of {name}", lambda name=name: trainer.kernels(name), failures) or []
            result["kernels"][name] = rows[:100]
            print(f"\n{name}: {sum(ms for _, ms, _ in rows):.2f} ms on the device")
            for kernel, ms, count in rows[: KERNELS.value]:
                print(f"{ms:9.3f} ms {count:5} x {kernel[:100]}")
    write_json(OUTPUT.value, result)


if __name__ == "__main__":
    SIZE = flags.DEFINE_enum("size", "124m", list(SIZES), "Model.")
    SEQUENCES = flags.DEFINE_integer("sequences", 8, "Of a microbatch.", lower_bound=1)
    CONTEXT = flags.DEFINE_integer("context", None, "Tokens of a sequence; default: 128 on a CPU, 1024 elsewhere.")
    ROUNDS = flags.DEFINE_integer("rounds", 5, "Alternations between the sides.", lower_bound=1)
    STEPS = flags.DEFINE_integer("steps", 4, "Of a round.", lower_bound=1)
    TORCH = flags.DEFINE_bool("torch", True, "Measure PyTorch too.")
    DEFAULT = flags.DEFINE_bool("default", True, "Measure the config's defaults too, as gptjax.")
    VARIANT = flags.DEFINE_multi_string("variant", [], "NAME,KEY=VALUE,...: another program of ours.")
    SECONDS = flags.DEFINE_float("seconds", None, "From the start; no variant is compiled later.")
    KERNELS = flags.DEFINE_integer("kernels", 0, "Print so many kernels of each program of ours.")
    OUTPUT = flags.DEFINE_string("output", None, "Write the measurements to this JSON file.")
    cli.run(main)
