"""Plans a run for a budget of compute: model size, tokens, batch size, learning rate, and layouts with their cost."""

import dataclasses
import math
from collections.abc import Iterator
from typing import Any

from gptjax import config as c
from gptjax.config import Config, UserError
from gptjax.planning.estimate import estimate_training
from gptjax.planning.formula_plan import CHIPS, FILLED, training_layout
from gptjax.planning.report import columns, mesh_text
from gptjax.planning.search import override_flags
from gptjax.planning.topology import Topology, all_topologies
from gptjax.scaling.fit_files import FittedLaw
from gptjax.scaling.flops import flops_per_token
from gptjax.scaling.hyperparameters import RULES
from gptjax.scaling.law_fits import Fit
from gptjax.scaling.model_sizes import COUNTS, nearest_model, scaled_models
from gptjax.scaling.parameters import non_embedding_parameter_count, parameter_count


@dataclasses.dataclass(frozen=True)
class BudgetPlan:
    """A run that spends a budget.

    Attributes:
      config: model, tokens, batch and learning rate set.
      parameters: N as the law counts it.
      flops: of the run by formula: `flops_per_token` times the tokens.
      loss, interval: expected; None: the law has no loss, or no interval.
      by_law: N and D of the law's own optimum, with C = 6 N D.
      rule: of the batch size and the learning rate.
    """

    config: Config
    law: FittedLaw
    parameters: int
    flops: float
    loss: float | None
    interval: list[float] | None
    by_law: tuple[float, float]
    rule: str

    @property
    def tokens(self) -> int:
        assert self.config.batch.total_tokens is not None
        return self.config.batch.total_tokens


def plan_budget(config: Config, law: FittedLaw, flops: float, rule: str) -> BudgetPlan:
    """Chooses the model and the tokens of the lowest expected loss for a budget, and the rates of a rule.

    Models have the proportions of the config's. Their FLOPs are counted by formula, with attention and head, where the
    law's own optimum counts 6 N D.

    Args:
      config: with model.vocab_size set.
      flops: the budget.
      rule: a name of `RULES`.

    Raises:
      UserError: the law has no optimum, or the budget is too small or too large for any model.
    """
    by_law = law.optimum(flops)
    count = COUNTS[law.count]
    models = list(scaled_models(config.model))
    smallest, largest = count(models[0]), max(map(count, models))
    if not smallest / 2 < by_law[0] < 2 * largest:
        raise UserError(
            f"--budget={flops:g}: the law {law.law} wants {by_law[0]:.3g} parameters, and models of this shape have "
            f"{smallest:,} to {largest:,}"
        )
    if isinstance(law.fit, Fit):
        inputs = {
            "parameters": [count(other) for other in models],
            "tokens": [flops / flops_per_token(other) for other in models],
        }
        model = models[int(law.fit.law.value(law.fit.theta, inputs).argmin())]
    else:
        model = nearest_model(config.model, law.count, by_law[0])
    tokens = max(1, round(flops / flops_per_token(model)))
    loss, interval = _expected(law, {"parameters": count(model), "tokens": tokens, "flops": flops})
    peak_lr, batch = RULES[rule](non_embedding_parameter_count(model), tokens, 3.0 if loss is None else loss)
    context = model.context_length
    sequences = 2 ** max(0, round(math.log2(batch / context)))
    sequences = min(sequences, 2 ** max(0, int(math.log2(max(1, tokens / context)))))
    warmup = {"warmup_fraction": None, "warmup_tokens": round(0.01 * tokens), "decay_tokens": None}
    ramp = {"ramp_start_tokens": None, "ramp_tokens": None, "microbatch_size": None}
    changed = c.replace(
        dataclasses.replace(config, model=model),
        {
            "batch": {"total_tokens": tokens, "epochs": None, "tokens_per_batch": sequences * context, **ramp},
            "optimizer": {"peak_lr": float(f"{peak_lr:.3g}"), **warmup},
        },
    )
    return BudgetPlan(changed, law, count(model), tokens * flops_per_token(model), loss, interval, by_law, rule)


def _expected(law: FittedLaw, inputs: dict[str, float]) -> tuple[float | None, list[float] | None]:
    try:
        return law.predict(inputs)
    except UserError:  # an isoFLOP fit of few budgets has no law of the loss
        return None, None


@dataclasses.dataclass(frozen=True)
class Cost:
    """Cost of a plan on some devices; a lower bound where it is by formula at data-sheet peaks.

    Attributes:
      layout: mesh, microbatch and rematerialisation as text, with their flags.
    """

    devices: str
    count: int
    mfu: float
    days: float
    chip_hours: float
    layout: str = ""
    flags: str = ""


def costs(plan: BudgetPlan, topologies: list[Topology]) -> Iterator[Cost]:
    """Yields the cost on each topology where a layout fits by formula (`formula_plan`)."""
    for topology in topologies:
        assert topology.chip is not None
        layout = training_layout(plan.config, topology, FILLED * topology.chip.program_memory)
        if layout is None:
            continue
        seconds = layout.estimate.serial
        run = estimate_training(layout.config, layout.estimate, seconds)
        assert run is not None, "the plan sets tokens"
        text = (
            f"{mesh_text(dataclasses.asdict(layout.config.mesh))}, microbatch {layout.config.sequences_per_microbatch}"
        )
        flags = " ".join(override_flags(plan.config, layout.config))
        mfu = layout.estimate.mfu(seconds)
        yield Cost(topology.name, topology.num_devices, mfu, run.days, run.chip_hours, text, flags)


def default_topologies() -> list[Topology]:
    """The slices that `python -m gptjax.plan` tries without --topology."""
    return list(all_topologies(CHIPS))


def cost_at(plan: BudgetPlan, name: str, peak: float, devices: int, mfu: float) -> Cost:
    """Returns the cost on `devices` devices of `peak` FLOP/s at an assumed MFU."""
    hours = plan.flops / (peak * mfu) / 3600
    return Cost(name, devices, mfu, hours / devices / 24, hours)


def plan_flags(base: Config, plan: BudgetPlan) -> str:
    """The flags that turn the config that was planned for, with its vocabulary, into the plan's."""
    return " ".join(f"--config.{name}={after}" for name, (_, after) in c.changes(base, plan.config).items())


def plan_table(plan: BudgetPlan, found: list[Cost]) -> str:
    """Formats the plan and its costs."""
    config, model = plan.config, plan.config.model
    interval = "" if plan.interval is None else " [{:.4f}, {:.4f}]".format(*plan.interval)
    loss = "not predicted by this law" if plan.loss is None else f"{plan.loss:.4f}{interval} nats per token"
    lines = [
        f"law            {plan.law.law} of {plan.law.name}: its optimum has {plan.by_law[0]:.4g} parameters and "
        f"{plan.by_law[1]:.4g} tokens",
        f"model          {model.num_layers} layers, width {model.embed_dim}, {model.num_heads} heads: "
        f"{parameter_count(model):,} parameters, {non_embedding_parameter_count(model):,} without embeddings",
        f"tokens         {plan.tokens:,}, {plan.tokens / plan.parameters:.1f} per parameter",
        f"compute        {plan.flops:.4g} FLOPs by formula",
        f"batch          {config.batch.tokens_per_batch:,} tokens, {config.sequences_per_batch:,} rows ({plan.rule})",
        f"learning rate  {config.optimizer.peak_lr:g} ({plan.rule}: a start for a sweep)",
        f"expected loss  {loss}",
    ]
    rows = [("devices", "chips", "MFU", "days", "chip-hours", "layout")]
    rows += [
        (each.devices, str(each.count), f"{each.mfu:.1%}", f"{each.days:,.2f}", f"{each.chip_hours:,.0f}", each.layout)
        for each in found
    ]
    return "\n".join(lines) + "\n\n" + columns(rows)


def plan_json(plan: BudgetPlan, found: list[Cost], base: Config) -> dict[str, Any]:
    """Returns the plan for JSON, with the flags that set it on the config it was made from."""
    return {
        "law": {"name": plan.law.name, "law": plan.law.law, "count": plan.law.count, "sha256": plan.law.sha256},
        "optimum": {"parameters": plan.by_law[0], "tokens": plan.by_law[1]},
        "parameters": plan.parameters,
        "tokens": plan.tokens,
        "flops": plan.flops,
        "loss": plan.loss,
        "interval": plan.interval,
        "rule": plan.rule,
        "flags": plan_flags(base, plan),
        "costs": [dataclasses.asdict(each) for each in found],
    }
