"""Formats plans as tables and as JSON.

A table marks each number as exact, reported by the compiler, or computed by formula.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from jax.sharding import Mesh

from gptjax.config import Config
from gptjax.planning.compile import CompiledProgram, StateBytes, microbatches
from gptjax.planning.decode_plan import DecodingPlan
from gptjax.planning.estimate import AxisTraffic, StepEstimate, estimate_training
from gptjax.planning.topology import Topology
from gptjax.scaling.flops import flops_per_token, image_step_flops, most_images
from gptjax.scaling.memory import memory_summary
from gptjax.scaling.parameters import active_parameter_count, parameter_count

GiB, MiB = 2**30, 2**20
Rows = list[tuple[str, str, str]]  # quantity, value, remark


@dataclasses.dataclass(frozen=True)
class StepPlan:
    """A training step that fits its topology, with its compiled memory, collectives and estimated time."""

    config: Config
    topology: Topology
    mesh: Mesh
    state: StateBytes
    compiled: CompiledProgram
    communication: list[AxisTraffic]
    estimate: StepEstimate | None  # None on a CPU, whose peak FLOP/s is not published
    capacity: int | None  # bytes of a device

    @property
    def memory(self) -> int:
        """Upper bound of the memory that the step needs on a device, in bytes.

        At most the device's capacity, since the program compiled: the compiler's sum of temporaries can exceed it.
        """
        total = self.compiled.memory.total
        return total if self.capacity is None else min(total, self.capacity)

    @property
    def serial(self) -> float:
        """Step time in seconds without overlap; plans are ranked by it."""
        assert self.estimate is not None, "TPUs have published peaks"
        return self.estimate.serial


def step_json(step: StepPlan) -> dict[str, Any]:
    """Returns all numbers of a step plan: bytes, FLOPs, seconds."""
    config, memory, estimate = step.config, step.compiled.memory, step.estimate
    tree: dict[str, Any] = {
        "topology": step.topology.name,
        "devices": step.topology.num_devices,
        "mesh": dict(step.mesh.shape),
        "microbatch_size": config.sequences_per_microbatch,
        "microbatches": microbatches(config),
        "remat": config.model.remat,
        "vocab_size": config.model.vocab_size,
        "parameters": parameter_count(config.model),
        "active_parameters": active_parameter_count(config.model),
        "memory": dataclasses.asdict(step.state) | dataclasses.asdict(memory) | {"capacity": step.capacity},
        "flops_per_token": flops_per_token(config.model),
        "flops_per_image": image_step_flops(config.model, "all"),
        "images_per_row": most_images(config.model),
        "communication": [dataclasses.asdict(part) for part in step.communication],
        "compile_seconds": step.compiled.seconds,
    }
    if estimate is not None:
        tree["estimate"] = dataclasses.asdict(estimate)
        for name, seconds in bounds(estimate).items():
            run = estimate_training(config, estimate, seconds)
            tree["estimate"][name] = {
                "seconds": seconds,
                "mfu": estimate.mfu(seconds),
                "tokens_per_second": estimate.tokens / seconds,
                "training": None if run is None else dataclasses.asdict(run),
            }
    return tree


def bounds(estimate: StepEstimate) -> dict[str, float]:
    """Returns the two estimates of the step time, in seconds."""
    return {"overlapped": estimate.overlapped, "serial": estimate.serial}


def step_table(step: StepPlan) -> str:
    """Formats a step plan as a table."""
    config, mesh = step.config, step.mesh
    axes = " x ".join(f"{axis} {size}" for axis, size in mesh.shape.items() if size > 1) or "one device"
    whole = f"microbatch {config.sequences_per_microbatch} x {microbatches(config)}"
    model = config.model
    active = "" if model.num_experts is None else f" ({active_parameter_count(model):,} active)"
    images = ""
    if (count := most_images(model)) > 0:
        per_image = image_step_flops(model, "all") / 1e9
        images = f", {per_image:,.2f} per image; {count} images in each row, as many as fit"
    lines = [
        f"{step.topology.name}: {step.topology.num_devices} devices, mesh {axes}, {whole}, remat {config.model.remat}",
        f"{parameter_count(model):,} parameters{active}, {flops_per_token(model) / 1e9:,.2f} GFLOP per token{images}",
        "",
        *_table("memory per device", _memory_rows(step)),
        *_table("collectives per device and step, counted in the compiled program", _communication_rows(step)),
    ]
    if step.estimate is not None:
        title = f"time of a step of {step.estimate.tokens:,} tokens, estimated by formula at data-sheet peaks"
        lines += _table(title, _time_rows(step, step.estimate))
    cached = f"compiled in {step.compiled.seconds:.1f} s"
    return "\n".join([*lines, cached])


def _memory_rows(step: StepPlan) -> Rows:
    memory, state = step.compiled.memory, step.state
    shards = step.mesh.shape["fsdp"] * step.mesh.shape["tensor"]
    experts = step.mesh.shape["expert"]
    gradients = memory_summary(step.config.model, step.config.optimizer, shards, expert_shards=experts).gradients
    batch = memory.arguments - state.parameters - state.optimizer - state.average
    rows = [
        ("parameters", gib(state.parameters), "exact"),
        ("optimizer state", gib(state.optimizer), "exact"),
        *([("EMA of parameters", gib(state.average), "exact")] if state.average else []),
        ("batch and padding", gib(batch), "compiled: the remaining arguments"),
        ("temporaries", gib(memory.temporaries), f"compiled: activations and gradients ({gib(gradients)} by formula)"),
    ]
    if memory.host:
        rows.append(("host memory", gib(memory.host), "compiled: offloaded arrays"))
    if step.capacity is None:
        return [*rows, ("total", gib(memory.total), "compiled")]
    free = f"compiled; {gib(step.capacity - step.memory)} of {gib(step.capacity)} free"
    return [*rows, ("total", gib(step.memory), free)]


def _communication_rows(step: StepPlan) -> Rows:
    rows = []
    for part in step.communication:
        if part.bytes < 1e-4 * sum(other.bytes for other in step.communication):
            continue
        times = [
            f"{seconds:.3f} s on the {links}"
            for seconds, links in ((part.ici_seconds, "links"), (part.dcn_seconds, "network between slices"))
            if seconds
        ]
        what = f"{part.kind} over {', '.join(part.axes)}"
        rows.append((what, f"{part.bytes / 1e9:,.3f} GB", ", ".join([f"{part.count:,} times", *times])))
    return rows or [("none", "0 GB", "")]


def _time_rows(step: StepPlan, estimate: StepEstimate) -> Rows:
    ratio = estimate.executed_flops / estimate.model_flops
    executed = f"{estimate.executed_flops:.3g} FLOP, {ratio:.2f} times the model's because of recomputation"
    rows = [
        ("compute", f"{estimate.compute:.3f} s", executed),
        ("memory", f"{estimate.hbm:.3f} s", "approximate memory traffic"),
        ("links", f"{estimate.ici:.3f} s", f"the collectives above; {estimate.busiest:.3f} s over the busiest axes"),
    ]
    if step.topology.num_slices > 1:
        rows.append(("network", f"{estimate.dcn:.3f} s", "the same between slices"))
    remarks = {
        "overlapped": "the slowest of these (links: the busiest axes)",
        "serial": "communication overlaps with nothing",
    }
    for name, seconds in bounds(estimate).items():
        rate = f"MFU {estimate.mfu(seconds):.1%}, {estimate.tokens / seconds:,.0f} tokens/s; {remarks[name]}"
        rows.append((name, f"{seconds:.3f} s", rate))
    runs = [estimate_training(step.config, estimate, seconds) for seconds in bounds(estimate).values()]
    if (first := runs[0]) is not None and (last := runs[1]) is not None:
        days = (
            f"{first.days:,.2f} to {last.days:,.2f} days, {first.chip_hours:,.0f} to {last.chip_hours:,.0f} chip-hours"
        )
        rows.append(("training", f"{first.steps:,} steps", days))
    return rows


def decoding_json(decoding: DecodingPlan) -> dict[str, Any]:
    """Returns all numbers of a decoding plan: bytes, seconds."""
    return {
        "cache_bytes_per_sequence": decoding.cache_bytes,
        "weight_bytes": decoding.weight_bytes,
        "batch": decoding.batch,
        "decode_memory": dataclasses.asdict(decoding.decode.memory),
        "prefill_memory": None if decoding.prefill is None else dataclasses.asdict(decoding.prefill.memory),
        "prefill_batch": decoding.prefill_batch,
        "token_seconds": decoding.token_seconds,
        "tokens_per_second": decoding.tokens_per_second,
    }


def decoding_table(decoding: DecodingPlan, capacity: int) -> str:
    """Formats a decoding plan as a table."""
    used = f"compiled, of {gib(capacity)}"
    rows = [
        ("cache per sequence", gib(decoding.cache_bytes), "by formula, over all devices"),
        ("weights", gib(decoding.weight_bytes), "exact"),
        ("largest batch", f"{decoding.batch:,}", "sequences at full context length"),
        ("decoding", gib(decoding.decode.memory.total), used),
    ]
    if decoding.prefill is None:
        rows.append(("prefill", "none", "prompts of full context length do not fit: use shorter ones"))
    else:
        rows.append(("prefill", gib(decoding.prefill.memory.total), f"{used}: one full prompt per batch shard"))
        rows.append(("prefill batch", f"{decoding.prefill_batch:,}", "prompts of full length, from the line above"))
    if decoding.token_seconds is not None and decoding.tokens_per_second is not None:
        bound = f"{decoding.tokens_per_second:,.0f} tokens/s: upper bound by formula, reads weights and cache once"
        rows.append(("decoding step", f"{decoding.token_seconds * 1e3:.2f} ms", bound))
    return "\n".join(_table("generation, memory per device", rows))


def overview(rows: list[tuple[str, StepPlan | str]]) -> str:
    """Formats one line per topology: the fastest plan found, or why there is none."""
    header = ("topology", "chips", "memory", "mesh", "microbatch", "remat", "step, s", "MFU", "days", "chip-hours")
    cells = [header]
    for name, step in rows:
        if isinstance(step, str):
            cells.append((name, "", step, "", "", "", "", "", "", ""))
            continue
        estimate = step.estimate
        assert estimate is not None, "TPUs have published peaks"
        run = estimate_training(step.config, estimate, estimate.serial)
        time = ("", "") if run is None else (f"{run.days:,.2f}", f"{run.chip_hours:,.0f}")
        cells.append(
            (
                name,
                str(step.topology.num_devices),
                gib(step.memory),
                mesh_text(step.mesh.shape),
                f"{step.config.sequences_per_microbatch} x {microbatches(step.config)}",
                step.config.model.remat,
                f"{estimate.serial:.3f}",
                f"{estimate.mfu(estimate.serial):.1%}",
                *time,
            )
        )
    return columns(cells)


def columns(rows: Sequence[tuple[str, ...]]) -> str:
    """Aligns the cells of rows, the first of which is the header; a row without a second cell is a remark."""
    widths = [max(len(row[i]) for row in rows if row[1] or i == 0) for i in range(len(rows[0]))]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows
    )


def mesh_text(sizes: Mapping[str, int]) -> str:
    """Formats the sizes of mesh axes above 1, such as "fsdp=64,tensor=16"."""
    return ",".join(f"{axis}={size}" for axis, size in sizes.items() if size > 1) or "one device"


def gib(size: float) -> str:
    return f"{size / GiB:,.2f} GiB" if size >= 0.01 * GiB else f"{size / MiB:,.2f} MiB"


def _table(title: str, rows: Rows) -> list[str]:
    widths = [max(len(row[i]) for row in rows) for i in range(2)]
    return [title, *(f"  {a.ljust(widths[0])}  {b.rjust(widths[1])}  {c}".rstrip() for a, b, c in rows), ""]
