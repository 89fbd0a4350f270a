"""Plans a run for a budget of compute: model, tokens, batch size, learning rate, expected loss and chip-hours.

python -m gptjax.scaling plan --budget=1e21
python -m gptjax.scaling plan --budget=1e21 --law=laws/chinchilla/fit.json --topology=v5p:4x4x4
python -m gptjax.scaling plan --budget=1e21 --config=configs/gpt_modern.py --device='H100 80GB HBM3' --devices=64

--law is a fit.json of `python -m gptjax.scaling fit`, or the name of published parameters: epoch, hoffmann. The model
has the proportions of --config, GPT-2's without one. On TPUs the cost is a lower bound, by the formulas of `python -m
gptjax.plan`; on other devices it is that of an assumed MFU.
"""

import json
import math

from absl import flags

from gptjax import cli
from gptjax.config import Config, UserError, replace
from gptjax.files import write_whole

CONFIG = cli.ConfigFlag()
BUDGET = flags.DEFINE_float("budget", None, "Training FLOPs, such as 1e21.")
LAW = flags.DEFINE_string("law", "epoch", "A fit.json, or the name of published parameters.")
RULE = flags.DEFINE_enum(
    "rule",
    "deepseek",
    ["deepseek", "step", "kaplan"],
    "Rule of batch size and learning rate (scaling/hyperparameters.py).",
)
TOPOLOGY = flags.DEFINE_string("topology", None, "CHIP:SHAPE, such as v5p:4x4x4. Default: slices of v5e, v5p and v6e.")
DEVICE = flags.DEFINE_string(
    "device", None, "Instead of TPUs: a device by its name in scaling/devices.py, such as H200."
)
DEVICES = flags.DEFINE_integer("devices", 8, "With --device: the number of devices.", lower_bound=1)
MFU = flags.DEFINE_float("mfu", 0.4, "With --device: the model FLOPs utilisation to assume.")
OUTPUT = flags.DEFINE_string("output", None, "Write the plan to this JSON file too.")


def main() -> None:
    if BUDGET.value is None or not (math.isfinite(BUDGET.value) and BUDGET.value > 0):
        raise UserError("needs --budget=FLOPS, a positive number such as --budget=1e21")
    if TOPOLOGY.value is not None and DEVICE.value is not None:
        raise UserError("--topology and --device exclude each other: give one")
    if not 0 < MFU.value <= 1:
        raise UserError(f"--mfu={MFU.value} is not between 0 and 1")
    output = None if OUTPUT.value is None else cli.output_file("output", OUTPUT.value)
    base = CONFIG.load() or Config()
    if base.model.dtype == "float32" and DEVICE.value is None:
        raise UserError("TPUs have no published peak for model.dtype=float32: add --config.model.dtype=bfloat16")
    from gptjax.planning.budget_plan import (
        cost_at,
        costs,
        default_topologies,
        plan_budget,
        plan_flags,
        plan_json,
        plan_table,
    )
    from gptjax.planning.topology import parse_topology
    from gptjax.scaling.devices import DEVICE_PEAKS, device_peak
    from gptjax.scaling.fit_files import load_law

    topologies = default_topologies() if TOPOLOGY.value is None else [parse_topology(TOPOLOGY.value)]
    if any(topology.chip is None for topology in topologies):
        raise UserError("--topology=cpu:N has no published peak: name a TPU, or a device by --device")
    law = load_law(LAW.value)
    config = with_vocabulary(base)
    plan = plan_budget(config, law, BUDGET.value, RULE.value)
    if DEVICE.value is None:
        found = list(costs(plan, topologies))
        if not found:
            raise UserError(
                f"the model of {plan.parameters:,} parameters fits none of the slices: name a larger --topology"
            )
    else:
        peak = device_peak(DEVICE.value)
        if peak is None:
            names = ", ".join(known.name for known in DEVICE_PEAKS)
            raise UserError(f"--device={DEVICE.value} is unknown: one of {names}")
        found = [cost_at(plan, peak.name, peak.bfloat16, DEVICES.value, MFU.value)]
    print(plan_table(plan, found))
    print(f"\n{plan_flags(config, plan)}")
    if output is not None:
        try:
            write_whole(output, json.dumps(plan_json(plan, found, config), indent=2) + "\n")
        except OSError as error:
            raise UserError(f"cannot write --output={output}: {error.strerror}") from None


def with_vocabulary(config: Config) -> Config:
    from gptjax.data.tokenizers import vocab_size

    model = config.model.with_vocabulary(vocab_size(config.data.tokenizer))
    return replace(config, {"model": {"vocab_size": model.vocab_size}})


if __name__ == "__main__":
    cli.run(main)
