"""Memory traffic of each kernel of a program compiled for an H100, without an H100.

    python -m benchmarks.gpu_traffic [--size=124m] [--sequences=64] [--variant=NAME,KEY=VALUE,...] [--decode_rows=N]

Compiles the training step, or with --decode_rows a bfloat16 decoding step of that many rows, with XLA's compiler for
NVIDIA GPUs, and prints the bytes that its kernels read and write, grouped by origin, with their time at --bandwidth.
A kernel that reads only part of an array counts all of it. Autotuning needs a GPU and is off: matrix products are
XLA's first choice.
Needs `pip install 'jax[cuda13]'`, on any machine.
"""

import re
from collections import Counter
from collections.abc import Iterator
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from absl import flags
from jax.experimental import topologies

from benchmarks.decode import SIZES as DECODED_SIZES
from benchmarks.decode import VOCABULARY
from benchmarks.train_step import make_config
from benchmarks.variants import Variant, batch_shape, parse_variant
from gptjax import cli
from gptjax import config as c
from gptjax.checkpoint.state import create_state, state_shardings
from gptjax.config import UserError
from gptjax.inference.programs import DecodingSettings, SamplingInputs, decode_tokens, prefill_prompts
from gptjax.inference.sampling import Sampling
from gptjax.inference.weights import prepare
from gptjax.models import attention_backends
from gptjax.models.gpt import GPT
from gptjax.parallel import compiler
from gptjax.parallel.mesh import make_mesh, use_mesh
from gptjax.parallel.platforms import override_defaults
from gptjax.planning.program_text import INSTRUCTION, array_bytes, calls, computations_of
from gptjax.stages import registry
from gptjax.training.step import make_train_step

# NVIDIA's data sheet of the H100 SXM and CUDA's tables of compute capability 9.0.
H100 = """
gpu_device_info {
  threads_per_block_limit: 1024 threads_per_warp: 32 threads_per_core_limit: 2048
  shared_memory_per_block: 49152 shared_memory_per_block_optin: 232448 shared_memory_per_core: 233472
  registers_per_core_limit: 65536 registers_per_block_limit: 65536
  core_count: 132 fpus_per_core: 128 clock_rate_ghz: 1.98
  block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
  memory_bandwidth: 3352320000000 l2_cache_size: 52428800 device_memory_size: 84929347584
  cuda_compute_capability { major: 9 }
}
platform_name: "CUDA"
dnn_version_info { major: 9 minor: 10 }
runtime_version { major: 13 }
device_description_str: "NVIDIA H100 80GB HBM3"
"""
COMPUTE_CAPABILITY = 9.0
RUN = ("fusion", "custom-call", "copy", "dot", "scatter", "sort")  # operations that are kernels
_TARGET = re.compile(r'custom_call_target="([^"]*)"')
_ORIGIN = re.compile(r'op_name="([^"]*)"')


def device() -> jax.Device:
    """Returns the description of an H100, which programs can be compiled for."""
    try:
        return topologies.get_topology_desc("", "cuda", target_config=H100, topology="1x1x1").devices[0]
    except Exception as error:  # JAX raises several kinds
        raise UserError(f"there is no compiler for NVIDIA GPUs: pip install 'jax[cuda13]' ({error})") from None


def compile_step(variant: Variant) -> jax.stages.Compiled:
    """Compiles the training step."""
    config = variant.config
    objective, mesh = registry.objective(config), make_mesh(config.mesh, [device()])
    shape_MBT = batch_shape(config)
    integers = jax.ShapeDtypeStruct(shape_MBT, jnp.int32)
    batch = {"tokens": integers, "targets": integers, "weights": jax.ShapeDtypeStruct(shape_MBT, jnp.float32)}
    with use_mesh(mesh), override_defaults("gpu", **variant.defaults):
        step = make_train_step(objective, state_shardings(objective.parameters, mesh))
        state = jax.eval_shape(lambda: create_state(objective.parameters, mesh))
        lowered = step.lower(state, batch, np.int32(shape_MBT[0]), {"lr": np.float32(0)})
        return _compiled(lowered, config.compiler_options)


def compile_token(size: str, rows: int) -> jax.stages.Compiled:
    """Compiles the decoding loop."""
    layers, width, heads = DECODED_SIZES[size]
    model = GPT(c.GPTConfig(vocab_size=VOCABULARY, num_layers=layers, embed_dim=width, num_heads=heads))
    greedy = Sampling(temperature=0.0)
    program = DecodingSettings(model, greedy.static, slots=128)
    draw = SamplingInputs(np.zeros(rows, np.uint32), np.int32(0), greedy.values, np.full(4, -1, np.int32))

    def start() -> tuple[Any, Any]:
        params = nn.unbox(model.init(jax.random.key(0), jnp.zeros((1, 1), jnp.int32)))["params"]
        params = prepare(model, params, "bfloat16")[1]
        prompts_BT, length_B = jnp.zeros((rows, 32), jnp.int32), jnp.full(rows, 32)
        return params, prefill_prompts(program, params, prompts_BT, length_B, jnp.zeros(rows, bool), None, draw)[0]

    with use_mesh(make_mesh(c.MeshConfig(), [device()])):
        params, memory = jax.eval_shape(start)
        position_B = jax.ShapeDtypeStruct((rows,), jnp.int32)
        return _compiled(decode_tokens.lower(program, params, memory, position_B, np.int32(32), draw))


def _compiled(lowered: jax.stages.Lowered, options: tuple[tuple[str, str], ...] = ()) -> jax.stages.Compiled:
    return compiler.compile(lowered, (*options, ("xla_gpu_autotune_level", "0")))  # autotuning would need a GPU


def kernels(text: str) -> Iterator[tuple[str, int, int]]:
    """Yields (origin, bytes read and written, executions) for each kernel of a compiled program.

    The origin is the end of the traced operation's path, without layer numbers and with the prefix "transpose" in the
    backward pass; "product" for matrix products, and the target for custom calls.
    """
    computations, entry = computations_of(text)
    fused = set(re.findall(r"(?:calls|to_apply)=%?([\w.\-]+)", text))
    for name, times in calls(computations, entry, 1).items():
        if name in fused:
            continue
        shapes: dict[str, str] = {}
        for line in computations[name]:
            if (match := INSTRUCTION.match(line)) is None:
                continue
            defined, shape, operation = match.groups()
            shapes[defined] = shape
            if operation in RUN:
                operands = re.findall(r"%([\w.\-]+)", line[match.end() :].split(")")[0])
                moved = [shape, *(shapes.get(operand, "") for operand in operands)]
                yield _origin(defined, line), sum(sum(array_bytes(array)) for array in moved), times


def _origin(name: str, line: str) -> str:
    target = match[1] if (match := _TARGET.search(line)) else ""
    if name.startswith("gemm_fusion") or target.startswith("__cublas"):
        return "product"
    if target:
        return target
    path = match[1] if (match := _ORIGIN.search(line)) else ""
    end = "/".join(re.sub(r"block_\d+", "block", path).split("/")[-3:])
    return ("transpose " if "transpose(" in path else "") + end


def main() -> None:
    attention_backends.compute_capability = lambda: COMPUTE_CAPABILITY  # it would ask the devices that are there
    if DECODE_ROWS.value:
        compiled = compile_token(SIZE.value, DECODE_ROWS.value)
    else:
        base = make_config(SIZE.value, SEQUENCES.value, None, "gpu")
        compiled = compile_step(parse_variant(VARIANT.value, base))
    moved, runs = Counter[str](), Counter[str]()
    for origin, size, times in kernels(compiled.as_text() or ""):
        moved[origin] += size * times
        runs[origin] += times
    print(f"{'ms':>9} {'GB':>8} {'kernels':>8}")
    for origin, size in moved.most_common(SHOWN.value):
        print(f"{size / BANDWIDTH.value * 1e3:9.3f} {size / 1e9:8.3f} {runs[origin]:8} {origin}")
    for what, origins in {
        "all": list(moved),
        "all but products and attention": [o for o in moved if o != "product" and not o.startswith("__")],
    }.items():
        size, number = sum(moved[origin] for origin in origins), sum(runs[origin] for origin in origins)
        print(f"{size / BANDWIDTH.value * 1e3:9.3f} {size / 1e9:8.3f} {number:8} {what}")


if __name__ == "__main__":
    SIZE = flags.DEFINE_enum("size", "124m", list(DECODED_SIZES), "Model.")
    SEQUENCES = flags.DEFINE_integer("sequences", 64, "Sequences of a step, 1,024 tokens each.", lower_bound=1)
    VARIANT = flags.DEFINE_string("variant", "gptjax", "NAME,KEY=VALUE,...: as in benchmarks.train_step.")
    DECODE_ROWS = flags.DEFINE_integer(
        "decode_rows", 0, "Compile a decoding step of this many rows instead.", lower_bound=0
    )
    BANDWIDTH = flags.DEFINE_float("bandwidth", 3e12, "Memory bandwidth in bytes per second.")
    SHOWN = flags.DEFINE_integer("shown", 40, "Number of origins to print.")
    cli.run(main)
