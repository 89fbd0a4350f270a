"""Plans generation: cache size by formula, and the engine's programs compiled for a mesh that need not exist."""

import dataclasses
import math
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from gptjax.config import Config, GPTConfig, UserError
from gptjax.inference import programs
from gptjax.inference.sampling import Sampling
from gptjax.inference.weights import WeightFormat, prepare
from gptjax.models.gpt import GPT, abstract_params
from gptjax.parallel.mesh import BATCH_AXES, batch_shards, check_model_fit, partition_spec
from gptjax.planning.compile import CompiledProgram, CompileResult, OutOfMemory, compile_lowered, compile_or_refuse
from gptjax.planning.topology import Topology
from gptjax.scaling.flops import forward_flops_per_token, seen_positions
from gptjax.scaling.parameters import expert_parameter_count, parameter_count

CACHE_FRACTION = 0.98  # of the free memory, for a first batch size: programs need temporaries too
TRIES = 3  # batch sizes to compile at most


@dataclasses.dataclass(frozen=True)
class DecodingPlan:
    """A plan for generation at full context length.

    Attributes:
      cache_bytes: key-value cache of one sequence, over all devices, by formula.
      weight_bytes: weights on one device.
      batch: the largest batch of sequences that can be decoded.
      decode: the compiled decoding step of that batch.
      prefill: the compiled prefill of one prompt of full length per batch shard; None: it does not fit.
      prefill_batch: prompts of full length that one prefill can take.
      token_seconds: lower bound of the time of a decoding step: all weights and the cache are read once, and matrix
        products run at peak FLOP/s. None on a CPU.
    """

    cache_bytes: int
    weight_bytes: int
    batch: int
    decode: CompiledProgram
    prefill: CompiledProgram | None
    prefill_batch: int
    token_seconds: float | None

    @property
    def tokens_per_second(self) -> float | None:
        return None if self.token_seconds is None else self.batch / self.token_seconds


def cache_bytes(model: GPTConfig) -> int:
    """Computes the size of one sequence's key-value cache at full context; a banded layer caches only its band."""
    slots = sum(seen_positions(model, layer) for layer in range(model.num_layers))
    return 2 * slots * model.kv_heads * model.head_dim * jnp.dtype(model.dtype).itemsize


def cache_shards(model: GPTConfig, mesh: Mapping[str, int]) -> int:
    """Devices that the cache of a sequence is sharded over: those of tensor, if they divide the key-value heads."""
    return mesh["tensor"] if model.kv_heads % mesh["tensor"] == 0 else 1


def plan_decoding(
    config: Config,
    mesh: Mesh,
    topology: Topology,
    capacity: int,
    weights: WeightFormat,
    compile: Callable[[str, Callable[[], CompileResult]], CompileResult],
) -> DecodingPlan:
    """Finds the largest batch at full context and compiles its programs.

    Args:
      config: with model.vocab_size set.
      capacity: bytes of a device.
      weights: as in `gptjax.inference.engine.Engine`.
      compile: (program name, function that compiles it) -> the compiled program, possibly from a cache.

    Raises:
      UserError: the model's sizes are not divisible by the mesh axes, or one sequence per batch shard does not fit.
    """
    check_model_fit(config.model, mesh)
    model, params = abstract_weights(config.model, mesh, weights)
    weight_bytes = sum(
        math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize for leaf in jax.tree.leaves(params)
    )
    shards, each = batch_shards(mesh), cache_bytes(model.config)
    per_shard = -(-each // cache_shards(model.config, mesh.shape))

    def compiled(program: str, rows: int) -> CompileResult:
        make = {"decode": _lower_decode, "prefill": _lower_prefill}[program]
        name = f"{program} {rows} rows, weights {weights}"
        return compile(name, lambda: compile_lowered(lambda: make(model, params, rows), mesh))

    rows = int(CACHE_FRACTION * (capacity - weight_bytes) // per_shard)
    decode = None
    for _ in range(TRIES):
        if rows < 1:
            break
        result = compiled("decode", rows * shards)
        if isinstance(result, CompiledProgram):
            decode = result
            break
        share = (result.capacity - weight_bytes) / (result.needed - weight_bytes)
        rows = min(rows - 1, int(CACHE_FRACTION * rows * share))
    if decode is None:
        raise UserError(
            f"decoding does not fit {topology.name}: weights take {weight_bytes / 2**30:.2f} GiB and the cache of a "
            f"sequence {per_shard / 2**30:.2f} GiB of a device's {capacity / 2**30:.2f}: shard them with "
            "--config.mesh.tensor or --config.mesh.fsdp, or try --weights=int8"
        )
    prefill = compiled("prefill", shards)
    prefill_batch = 0
    if isinstance(prefill, CompiledProgram):
        growing = max(1, prefill.memory.total - weight_bytes)
        prefill_batch = shards * min(rows, max(1, (capacity - weight_bytes) // growing))
    return DecodingPlan(
        cache_bytes=each,
        weight_bytes=weight_bytes,
        batch=rows * shards,
        decode=decode,
        prefill=prefill if isinstance(prefill, CompiledProgram) else None,
        prefill_batch=prefill_batch,
        token_seconds=step_seconds(model.config, topology, mesh.shape, weight_bytes, rows, rows * per_shard),
    )


def abstract_weights(model: GPTConfig, mesh: Mesh, weights: WeightFormat) -> tuple[GPT, Any]:
    """Returns the engine's model, and its weights as `jax.ShapeDtypeStruct`s with the engine's shardings.

    Raises:
      UserError: the conversion of the weights does not fit the devices.
    """
    converted: list[GPT] = []

    def convert(params: Any) -> Any:
        new_model, new_params = prepare(GPT(model), params, weights)
        converted.append(new_model)
        return new_params

    with jax.set_mesh(mesh):
        given = abstract_params(GPT(model), mesh)
        shapes = jax.eval_shape(convert, given)
        compiled = compile_or_refuse(jax.jit(convert).lower(given))
    if isinstance(compiled, OutOfMemory):
        raise UserError(
            f"converting the weights from {model.param_dtype} to {weights} needs {compiled.needed / 2**30:.2f} GiB "
            f"of a device's {compiled.capacity / 2**30:.2f}: set --config.model.param_dtype=bfloat16, or shard them "
            "with --config.mesh.tensor or --config.mesh.fsdp"
        )
    return converted[0], jax.tree.map(
        lambda shape, sharding: jax.ShapeDtypeStruct(shape.shape, shape.dtype, sharding=sharding),
        shapes,
        compiled.output_shardings,
    )


def _program(model: GPT) -> programs.DecodingSettings:
    return programs.DecodingSettings(model, Sampling().static, model.config.context_length)


def _prompts(model: GPT, rows: int) -> tuple[Any, ...]:
    """Returns arguments of the engine's prefill for prompts of full context length."""
    length = model.config.context_length
    tokens_BT, lengths_B = np.zeros((rows, length), np.int32), np.full(rows, length, np.int32)
    return tokens_BT, lengths_B, np.zeros(rows, bool), None, _draw(rows)


def _draw(rows: int) -> programs.SamplingInputs:
    return programs.SamplingInputs(np.zeros(rows, np.uint32), np.int32(0), Sampling().values, np.array([-1], np.int32))


def _lower_prefill(model: GPT, params: Any, rows: int) -> jax.stages.Lowered:
    return programs.prefill_prompts.lower(_program(model), params, *_prompts(model, rows))


def _lower_decode(model: GPT, params: Any, rows: int) -> jax.stages.Lowered:
    row_B = np.zeros(rows, np.int32)
    memory = abstract_memory(model, params, rows)
    return programs.decode_tokens.lower(_program(model), params, memory, row_B, np.int32(0), _draw(rows))


def abstract_memory(model: GPT, params: Any, rows: int) -> programs.DecodingCache:
    """Returns the abstract decoding state in prefill's layout: sharded over batch and heads, not over slots."""
    mesh = jax.tree.leaves(params)[0].sharding.mesh
    heads = "kv_heads" if cache_shards(model.config, mesh.shape) == mesh.shape["tensor"] else None
    sharding = NamedSharding(mesh, partition_spec(("batch", heads, None, None)))
    prefill = partial(programs.prefill_prompts, _program(model))
    memory, _ = jax.eval_shape(prefill, params, *_prompts(model, rows))

    def placed(tree: Any, sharding: NamedSharding) -> Any:
        return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding), tree)

    rest = placed(memory, NamedSharding(mesh, PartitionSpec()))
    return cast(programs.DecodingCache, rest._replace(cache=placed(memory.cache, sharding)))


def step_seconds(
    model: GPTConfig,
    topology: Topology,
    mesh: Mapping[str, int],
    weight_bytes: float,
    rows: int,
    cache: float,
) -> float | None:
    """A lower bound of the time of a decoding step at full context; None: the device's peaks are not published.

    The weights and the cache are read once, and matrix products run at peak FLOP/s. Experts that no token has chosen
    are not read: if all are equally likely, the expected share of them.

    Args:
      weight_bytes: of a device.
      rows: sequences of a batch shard.
      cache: bytes of their cache on a device.
    """
    peak = topology.peak
    flops = None if peak is None else getattr(peak, model.dtype)
    if peak is None or flops is None:
        return None
    unread = 0.0
    if model.num_experts is not None:
        tokens = rows * mesh["expert"]  # those of the batch shards whose experts a device has
        unread = (1 - model.experts_per_token / model.num_experts) ** tokens * _expert_share(model, mesh)
    batch = rows * math.prod(mesh[axis] for axis in BATCH_AXES)
    compute = batch * forward_flops_per_token(model) / (topology.num_devices * flops)
    return max((weight_bytes * (1 - unread) + cache) / peak.bandwidth, compute)


def _expert_share(model: GPTConfig, mesh: Mapping[str, int]) -> float:
    """The share of experts in the weights of a device."""
    experts = expert_parameter_count(model) / mesh["expert"]
    return experts / (experts + parameter_count(model) - expert_parameter_count(model))
