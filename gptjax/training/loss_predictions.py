"""Predictions of a run's held-out loss, written before it starts, and their comparison with the run.

A prediction is a JSON object with "sha256", the hash of all its other fields. The hash shows that a file was changed
carelessly. That it is older than the run can be proved to others only by what they hold: publish the hash, or commit
the file, before the run starts.
"""

import datetime
import hashlib
import json
from pathlib import Path
from typing import Any

from gptjax.config import UserError, differences, resolve
from gptjax.config.saved import to_tree
from gptjax.files import read_json, write_whole
from gptjax.training.measured_runs import MeasuredRun

FORMAT = 1
# Sections and keys of a config that do not change the loss, or that the run fills in.
IRRELEVANT = ("mesh.", "checkpoint.", "logging.", "model.vocab_size", "data.cache_dir", "compiler_options", "seed")
NEAR = 1e-3  # relative difference of parameters and tokens between a prediction and its run


def content_hash(content: dict[str, Any]) -> str:
    """The SHA-256 of a prediction's fields except "sha256", as canonical JSON."""
    rest = {name: value for name, value in content.items() if name != "sha256"}
    return hashlib.sha256(json.dumps(rest, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def write_prediction(path: Path, fields: dict[str, Any]) -> dict[str, Any]:
    """Writes a prediction with its time and hash; returns it.

    Raises:
      UserError: the file exists: a prediction is never replaced.
    """
    if path.exists():
        raise UserError(f"{path} exists, and predictions are not replaced: name another file by --output")
    written = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    content = {"format": FORMAT, "written": written, **fields}
    content["sha256"] = content_hash(content)
    try:
        write_whole(path, json.dumps(content, indent=2) + "\n")
    except OSError as error:
        raise UserError(f"cannot write --output={path}: {error.strerror}") from None
    return content


def read_prediction(path: Path) -> dict[str, Any]:
    """Reads a prediction; UserError if it is missing, something else, or does not match its hash."""
    try:
        content = read_json(path)
    except FileNotFoundError:
        raise UserError(f"there is no file {path}") from None
    except (OSError, ValueError) as error:
        raise UserError(f"cannot read {path}: {error}") from None
    if not isinstance(content, dict) or content.get("format") != FORMAT or "sha256" not in content:
        raise UserError(f"{path} is not a prediction that python -m gptjax.scaling predict wrote")
    if content["sha256"] != content_hash(content):
        raise UserError(f"{path} does not match its hash: it was changed after it was written")
    return content


def compare(prediction: dict[str, Any], run: MeasuredRun, path: Path) -> dict[str, Any]:
    """Compares a prediction with a finished run.

    Returns:
      The predicted and measured loss, the relative error, whether the loss lies within the interval (None: no
      interval), and the config keys that differ.

    Raises:
      UserError: the run started before the prediction was written, or has other parameters or tokens; or it is a
        prediction of pass rates.
    """
    if "loss" not in prediction:
        raise UserError(f"{path} predicts pass rates, which a training run does not measure")
    try:
        written = datetime.datetime.fromisoformat(prediction["written"])
        started = datetime.datetime.fromisoformat(run.started)
        late = started < written
    except (ValueError, TypeError):
        raise UserError(
            f"{run.workdir} or {path} has no valid time: it cannot be shown that the prediction is older"
        ) from None
    if late:
        raise UserError(
            f"{path} was written at {prediction['written']}, after the start of {run.workdir} at {run.started}: it is "
            "no prediction"
        )
    for name, measured in (("parameters", run.parameters), ("tokens", run.tokens[-1])):
        expected = prediction[name]
        if expected is not None and abs(measured / expected - 1) > NEAR:
            raise UserError(f"{path} predicts a run of {expected:,.0f} {name}, but {run.workdir} has {measured:,.0f}")
    changed = []
    if prediction["config"] is not None:
        changed = [
            line for line in differences(resolve(prediction["config"]), run.config) if not line.startswith(IRRELEVANT)
        ]
    predicted, loss, bounds = prediction["loss"], run.losses[-1], prediction["interval"]
    return {
        "predicted": predicted,
        "interval": bounds,
        "measured": loss,
        "relative_error": predicted / loss - 1,
        "within_interval": None if bounds is None else bounds[0] <= loss <= bounds[1],
        "differences": changed,
        "written": prediction["written"],
        "started": run.started,
        "sha256": prediction["sha256"],
    }


def config_tree(config: Any) -> dict[str, Any]:
    """The config of a prediction for JSON: lists in place of tuples, so that the hash does not depend on the reader."""
    tree: dict[str, Any] = json.loads(json.dumps(to_tree(config)))
    return tree
