"""Scaling laws: fits them, predicts losses before training, plans runs for a budget, verifies
predictions, and checks how activations scale with the size of a model.

python -m gptjax.scaling fit --csv=runs.csv --law=chinchilla --output=laws/chinchilla
python -m gptjax.scaling predict --law=laws/chinchilla/fit.json --config=configs/gpt2.py:size=1558m --output=large.json
python -m gptjax.scaling plan --budget=1e21 --law=laws/chinchilla/fit.json
python -m gptjax.scaling verify --prediction=large.json --workdir=runs/large
python -m gptjax.scaling coordinates --config=configs/transfer.py --parametrizations=mup --widths=16,64 --output=mup

`python -m gptjax.scaling COMMAND --help` lists the flags of a command.
"""

import importlib
import sys

from gptjax import cli

COMMANDS = {
    "fit": "gptjax.scaling_fit",
    "predict": "gptjax.scaling_predict",
    "plan": "gptjax.scaling_plan",
    "verify": "gptjax.scaling_verify",
    "coordinates": "gptjax.scaling_coordinates",
}


def main() -> None:
    name = sys.argv.pop(1) if len(sys.argv) > 1 else "--help"
    if name in ("--help", "-h", "-help", "--helpshort"):
        print((__doc__ or "").strip())
    elif name in COMMANDS:
        cli.run(importlib.import_module(COMMANDS[name]).main)
    else:
        print(f"error: unknown command {name!r}: one of {', '.join(COMMANDS)}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
