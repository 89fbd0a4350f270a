"""Plans for TPUs by formula alone, without compiling: layouts for training and for generation on each topology."""

import dataclasses
from collections.abc import Iterator
from typing import Any

from gptjax import config as c
from gptjax.config import Config
from gptjax.inference.weights import WeightFormat
from gptjax.planning.compile import microbatches
from gptjax.planning.decode_search import DecodingLayout, decoding_layouts
from gptjax.planning.estimate import estimate_training
from gptjax.planning.report import columns, gib, mesh_text
from gptjax.planning.search import Candidate, candidates, override_flags
from gptjax.planning.topology import Topology, all_topologies

CHIPS = ("v5e", "v5p", "v6e")
FILLED = 0.85  # of the memory, at most: a formula is no compiler
MIN_CONTEXT = 1024


@dataclasses.dataclass(frozen=True)
class FormulaPlan:
    """The fastest layouts for a topology that fit by formula; None: there is none."""

    topology: Topology
    training: Candidate | None
    decoding: DecodingLayout | None


def plan_topologies(config: Config, weights: WeightFormat, training: bool = True) -> Iterator[FormulaPlan]:
    """Yields a plan for each topology, smallest first.

    Args:
      config: with model.vocab_size set.
      weights: dtype of the weights in generation.
      training: whether training is planned too.
    """
    for topology in all_topologies(CHIPS):
        assert topology.chip is not None
        capacity = FILLED * topology.chip.program_memory
        layouts = decoding_layouts(config, topology, capacity, weights)
        layout = training_layout(config, topology, capacity) if training else None
        yield FormulaPlan(topology, layout, layouts[0] if layouts else None)


def training_layout(config: Config, topology: Topology, capacity: float) -> Candidate | None:
    """The fastest layout that fits, by formula.

    Where none fits at the full context and positions are rotary, shorter contexts are tried, at the same number of
    tokens a batch: parameters do not depend on the context.
    """
    for context in _contexts(config):
        shorter = c.replace(config, {"model": {"context_length": context}})
        if found := candidates(shorter, topology, capacity, slack=1.0):
            return found[0]
    return None


def _contexts(config: Config) -> Iterator[int]:
    context = config.model.context_length
    yield context
    while config.model.positions == "rotary" and context % 2 == 0 and context // 2 >= MIN_CONTEXT:
        context //= 2
        yield context


def formula_table(config: Config, plans: list[FormulaPlan]) -> str:
    """Formats one line per topology for training and for generation, and the flags of each layout."""
    training, decoding, flags = _training_rows(plans), _decoding_rows(plans), _flags(config, plans)
    parts = [
        f"by formula, at most {FILLED:.0%} of the memory, at data-sheet peaks. Times and MFU overlap no communication; "
        "overlapped: the MFU with all of it overlapped; bound: the largest part of a step. --topology=NAME --search "
        "compiles layouts",
        *(["training\n" + columns(training)] if len(training) > 1 else []),
        f"generation at a context of {config.model.context_length:,}\n" + columns(decoding),
        "\n".join(f"{name}: {line}" for name, line in flags.items()),
    ]
    return "\n\n".join(parts)


def _training_rows(plans: list[FormulaPlan]) -> list[tuple[str, ...]]:
    sizes = ("topology", "chips", "memory", "mesh", "context", "microbatch", "remat")
    header = (*sizes, "step, s", "MFU", "overlapped", "bound", "days")
    rows: list[tuple[str, ...]] = [header]
    if all(plan.training is None for plan in plans):
        return rows
    for plan in plans:
        if (found := plan.training) is None:
            rows.append((plan.topology.name, "", "does not fit", *("",) * (len(header) - 3)))
            continue
        config, estimate = found.config, found.estimate
        run = estimate_training(config, estimate, estimate.serial)
        rows.append(
            (
                plan.topology.name,
                str(plan.topology.num_devices),
                gib(found.memory),
                mesh_text(dataclasses.asdict(config.mesh)),
                f"{config.model.context_length:,}",
                f"{config.sequences_per_microbatch} x {microbatches(config)}",
                config.model.remat,
                f"{estimate.serial:.3f}",
                f"{estimate.mfu(estimate.serial):.1%}",
                f"{estimate.mfu(estimate.overlapped):.1%}",
                estimate.bound,
                "" if run is None else f"{run.days:,.1f}",
            )
        )
    return rows


def _decoding_rows(plans: list[FormulaPlan]) -> list[tuple[str, ...]]:
    header = ("topology", "chips", "memory", "mesh", "sequences", "step, ms", "links, ms", "tokens/s")
    rows: list[tuple[str, ...]] = [header]
    for plan in plans:
        if (found := plan.decoding) is None:
            rows.append((plan.topology.name, "", "does not fit", *("",) * (len(header) - 3)))
            continue
        rows.append(
            (
                plan.topology.name,
                str(plan.topology.num_devices),
                gib(found.memory),
                mesh_text(dataclasses.asdict(found.config.mesh)),
                f"{found.batch:,}",
                f"{found.step_seconds * 1e3:.2f}",
                f"{found.link_seconds * 1e3:.2f}",
                f"{found.tokens_per_second:,.0f}",
            )
        )
    return rows


def _flags(config: Config, plans: list[FormulaPlan]) -> dict[str, str]:
    found: dict[str, str] = {}
    for plan in plans:
        for name, layout in (("training", plan.training), ("generation", plan.decoding)):
            if layout is not None:
                found[f"{name} on {plan.topology.name}"] = " ".join(override_flags(config, layout.config))
    return found


def formula_json(config: Config, plans: list[FormulaPlan]) -> dict[str, Any]:
    """Returns all numbers: bytes, seconds."""
    flags, tree = _flags(config, plans), {}
    for plan in plans:
        name = plan.topology.name
        tree[name] = {
            "training": None
            if plan.training is None
            else {
                "memory": plan.training.memory,
                "mesh": dataclasses.asdict(plan.training.config.mesh),
                "context_length": plan.training.config.model.context_length,
                "estimate": dataclasses.asdict(plan.training.estimate),
                "flags": flags[f"training on {name}"],
            },
            "generation": None
            if plan.decoding is None
            else {
                "memory": plan.decoding.memory,
                "mesh": dataclasses.asdict(plan.decoding.config.mesh),
                "weight_bytes": plan.decoding.weight_bytes,
                "cache_bytes_per_sequence": plan.decoding.cache_bytes,
                "batch": plan.decoding.batch,
                "token_seconds": plan.decoding.step_seconds,
                "tokens_per_second": plan.decoding.tokens_per_second,
                "flags": flags[f"generation on {name}"],
            },
        }
    return tree
