"""Predicts the held-out loss of a run before it starts, and writes the prediction with its hash.

python -m gptjax.scaling predict --law=laws/ladder/fit.json --config=configs/gpt2.py:size=1558m --output=large.json
python -m gptjax.scaling predict --law=epoch --parameters=70e9 --tokens=1.4e12 --output=chinchilla.json

--law is a fit.json of `python -m gptjax.scaling fit`, or the name of published parameters: hoffmann, epoch. The file
has the expected loss and its interval, the config, the time, the git commit and a SHA-256 hash of all that. Commit it,
or publish the hash, before the run starts; `python -m gptjax.scaling verify` compares it with the run.
"""

import math
import shlex
import sys
from typing import Any

from absl import flags

from gptjax import cli
from gptjax.config import Config, UserError, replace
from gptjax.scaling.fit_files import FittedLaw, load_law
from gptjax.scaling.law_fits import LEVEL
from gptjax.scaling.model_sizes import COUNTS

CONFIG = cli.ConfigFlag()
LAW = flags.DEFINE_string("law", None, "A fit.json, or the name of published parameters, such as epoch.")
PARAMETERS = flags.DEFINE_float("parameters", None, "Instead of --config: parameters of the model.")
TOKENS = flags.DEFINE_float("tokens", None, "With --parameters: training tokens.")
FLOPS = flags.DEFINE_float("flops", None, "Training FLOPs, for laws of compute. Default with --parameters: 6 N D.")
OUTPUT = flags.DEFINE_string("output", None, "JSON file for the prediction; an existing one is not replaced.")


def main() -> None:
    if LAW.value is None:
        raise UserError("needs --law=FILE, a fit.json, or --law=epoch")
    if OUTPUT.value is None:
        raise UserError("needs --output=FILE: a prediction is written before the run starts")
    output = cli.output_file("output", OUTPUT.value)
    law = load_law(LAW.value)
    config = CONFIG.load()
    inputs, config = inputs_of_flags() if config is None else inputs_of_config(config, law)
    value, interval = law.predict(inputs)
    from gptjax.training.loss_predictions import config_tree, write_prediction
    from gptjax.training.provenance import git_commit

    fields: dict[str, Any] = {
        law.measured: value,
        "interval": interval,
        "level": LEVEL,
        **inputs,
        "law": {"name": law.name, "law": law.law, "count": law.count, "sha256": law.sha256},
        "config": None if config is None else config_tree(config),
        "command": shlex.join(["python", "-m", "gptjax.scaling", "predict", *sys.argv[1:]]),
        "git_commit": git_commit(),
    }
    written = write_prediction(output, fields)
    bounds = (
        "no interval: the law has no bootstrap samples" if interval is None else "{:.4f} to {:.4f}".format(*interval)
    )
    if law.measured == "loss":
        print(f"expected held-out loss {value:.4f} nats per token ({bounds})")
    else:
        print(f"expected mean of -log(pass rate) {value:.4f} ({bounds})")
    print(f"wrote {output}\nsha256 {written['sha256']}")


def inputs_of_flags() -> tuple[dict[str, float | None], None]:
    """Parameters, tokens and FLOPs by the flags; UserError if one is not positive, or none is given."""
    given = {"parameters": PARAMETERS.value, "tokens": TOKENS.value, "flops": FLOPS.value}
    if all(value is None for value in given.values()):
        raise UserError("needs --config=FILE, or --parameters and --tokens, or --flops for a law of compute")
    for name, value in given.items():
        if value is not None and not (math.isfinite(value) and value > 0):
            raise UserError(f"--{name}={value} is not a positive number")
    if given["flops"] is None and given["parameters"] is not None and given["tokens"] is not None:
        given["flops"] = 6 * given["parameters"] * given["tokens"]
    return given, None


def inputs_of_config(config: Config, law: FittedLaw) -> tuple[dict[str, float | None], Config]:
    """Parameters, tokens and FLOPs of a config, and the config with its vocabulary."""
    if any(value is not None for value in (PARAMETERS.value, TOKENS.value, FLOPS.value)):
        raise UserError("--config gives parameters, tokens and FLOPs: leave out --parameters, --tokens and --flops")
    total, batch = config.batch.total_tokens, config.batch.tokens_per_batch
    if total is None:
        raise UserError(
            "the config sets epochs: set its tokens by --config.batch.epochs=None --config.batch.total_tokens=N"
        )
    from gptjax.data.tokenizers import vocab_size
    from gptjax.scaling.flops import flops_per_token

    model = config.model.with_vocabulary(vocab_size(config.data.tokenizer))
    config = replace(config, {"model": {"vocab_size": model.vocab_size}})
    # The last batch is a whole one.
    tokens = total if config.batch.ramp_tokens else math.ceil(total / batch) * batch
    flops = float(flops_per_token(model) * tokens)
    return {"parameters": COUNTS[law.count](model), "tokens": tokens, "flops": flops}, config


if __name__ == "__main__":
    cli.run(main)
