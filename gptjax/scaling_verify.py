"""Compares a prediction with the finished run.

python -m gptjax.scaling verify --prediction=large.json --workdir=runs/large

It is refused where the prediction does not match its hash, was written after the run started, or is of a run with other
parameters or tokens. Other differences of the configs are listed.
"""

import json

from absl import flags

from gptjax import cli
from gptjax.config import UserError
from gptjax.files import expand, write_whole

PREDICTION = flags.DEFINE_string("prediction", None, "The file that predict wrote.")
WORKDIR = flags.DEFINE_string("workdir", None, "Workdir of the finished run.")
OUTPUT = flags.DEFINE_string("output", None, "Write the comparison to this JSON file too.")


def main() -> None:
    if PREDICTION.value is None or WORKDIR.value is None:
        raise UserError("needs --prediction=FILE and --workdir=DIR")
    output = None if OUTPUT.value is None else cli.output_file("output", OUTPUT.value)
    from gptjax.training.loss_predictions import compare, read_prediction
    from gptjax.training.measured_runs import measured_run

    path = expand(PREDICTION.value)
    prediction = read_prediction(path)
    run = measured_run(expand(WORKDIR.value), prediction["law"]["count"])
    result = compare(prediction, run, path)
    bounds, inside = result["interval"], result["within_interval"]
    if bounds is None:
        verdict = "no interval was predicted"
    else:
        verdict = f"{'within' if inside else 'OUTSIDE'} the interval {bounds[0]:.4f} to {bounds[1]:.4f}"
    error = f"{result['relative_error']:+.2%}"
    print(f"predicted {result['predicted']:.4f}, measured {result['measured']:.4f}: {error}, {verdict}")
    print(f"prediction written {result['written']}, run started {result['started']}; sha256 {result['sha256']} matches")
    for line in result["differences"]:
        print(f"the run differs from the predicted config in {line}")
    if output is not None:
        try:
            write_whole(output, json.dumps(result, indent=2) + "\n")
        except OSError as error:
            raise UserError(f"cannot write --output={output}: {error.strerror}") from None


if __name__ == "__main__":
    cli.run(main)
