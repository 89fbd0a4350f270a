"""Compiles programs for simulated CPU devices and writes counts of their collectives as JSON to the given file."""

import dataclasses
import json
import sys
from collections import Counter
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from gptjax.checkpoint.state import create_state, state_shardings
from gptjax.config import BatchConfig, Config, GPTConfig, MeshConfig
from gptjax.planning import compile as planning
from gptjax.planning.program_text import Collective, collectives
from gptjax.planning.topology import lay_out, parse_topology
from gptjax.stages import registry
from gptjax.training.step import make_train_step

MODEL = GPTConfig(vocab_size=128, context_length=32, num_layers=4, num_heads=4, embed_dim=32, dtype="float32")


def count_by_kind(found: list[Collective]) -> Counter[str]:
    """Returns the number of executions of each kind of collective in a run."""
    counts: Counter[str] = Counter()
    for collective in found:
        counts[collective.kind] += collective.count
    return counts


def loop(trips: int) -> dict[str, Any]:
    """A loop with one all-reduce per iteration, over two devices of a 2 x 4 mesh."""
    mesh = jax.make_mesh((2, 4), ("data", "tensor"), axis_types=(AxisType.Auto,) * 2)
    spread = NamedSharding(mesh, PartitionSpec(None, "data"))
    whole = NamedSharding(mesh, PartitionSpec())

    @partial(jax.jit, in_shardings=(spread, spread), out_shardings=whole)
    def program(x_NN: jax.Array, y_NN: jax.Array) -> jax.Array:
        def step(z_NN: jax.Array, _: None) -> tuple[jax.Array, None]:
            product_NN = x_NN @ (y_NN + z_NN).T
            return jax.lax.with_sharding_constraint(jnp.sin(product_NN), whole), None

        return jax.lax.scan(step, jnp.zeros((16, 16)), length=trips)[0]

    array = jax.ShapeDtypeStruct((16, 16), jnp.float32)
    found = collectives(program.lower(array, array).compile().as_text())
    return {"counts": count_by_kind(found), "collectives": [dataclasses.asdict(item) for item in found]}


def step(mesh: MeshConfig, microbatch: int) -> dict[str, Any]:
    """The planner's numbers for a training step, and those of the step that a run compiles with real arrays."""
    batch = BatchConfig(total_tokens=1024, tokens_per_batch=16 * 32, microbatch_size=microbatch)
    config = Config(model=MODEL, batch=batch, mesh=mesh)
    laid_out = lay_out(config.mesh, parse_topology("cpu:8"))
    planned = planning.compile_training_step(config, laid_out)
    assert isinstance(planned, planning.CompiledProgram)
    with jax.set_mesh(laid_out):
        objective = registry.objective(config)
        state = create_state(objective.parameters, laid_out)
        shape = (16 // microbatch, microbatch, 32)
        rows = {"tokens": np.zeros(shape, np.int32), "targets": np.zeros(shape, np.int32), "weights": np.ones(shape)}
        sharding = planning.batch_sharding(laid_out, None)
        arrays = {name: jax.device_put(jnp.asarray(array), sharding) for name, array in rows.items()}
        arrays["weights"] = arrays["weights"].astype(np.float32)
        train_step = make_train_step(objective, state_shardings(objective.parameters, laid_out))
        real = train_step.lower(state, arrays, np.int32(shape[0]), {"lr": np.float32(0.1)}).compile()
    analysis = real.memory_analysis()
    device = jax.devices()[0]

    def live(tree: Any) -> int:
        """Bytes of the shards on the first device."""
        shards = [shard for leaf in jax.tree.leaves(tree) for shard in leaf.addressable_shards]
        return sum(shard.data.nbytes for shard in shards if shard.device == device)

    return {
        "planned": dataclasses.asdict(planned.memory),
        "state": dataclasses.asdict(planning.state_bytes(config, laid_out)),
        "counts": count_by_kind(planned.collectives),
        "real": {
            "arguments": analysis.argument_size_in_bytes,
            "temporaries": analysis.temp_size_in_bytes + analysis.output_size_in_bytes - analysis.alias_size_in_bytes,
        },
        "real_counts": count_by_kind(collectives(real.as_text(), shape[0])),
        "live": {"parameters": live(state.params), "optimizer": live(state.opt_state)},
        "live_arguments": live(state) + live(arrays),
    }


results = {
    "loop of 3": loop(3),
    "loop of 9": loop(9),
    "fsdp": step(MeshConfig(data=2, fsdp=4), 16),
    "fsdp, two microbatches": step(MeshConfig(data=2, fsdp=4), 8),
    "tensor": step(MeshConfig(data=2, tensor=4), 16),
}
Path(sys.argv[1]).write_text(json.dumps(results))
