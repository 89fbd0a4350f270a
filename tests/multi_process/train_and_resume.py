"""Trains in the workdirs of a JSON file, one after the other: `train_and_resume.py FLAGS --runs=RUNS.json`.

RUNS.json is [{"like": the workdir of its config, "workdir": path, "mesh": {"fsdp": 2, ...}, "tokens": total}, ...].
"""

import json
from pathlib import Path

from absl import flags

from gptjax import cli
from gptjax.config import read_config, replace
from gptjax.run import run

RUNS = flags.DEFINE_string("runs", None, "File of the runs.")


def main() -> None:
    cli.join()
    for each in json.loads(Path(RUNS.value).read_text()):
        config = read_config(Path(each["like"]))
        config = replace(config, {"mesh": each["mesh"], "batch": {"total_tokens": each["tokens"]}})
        run(config, Path(each["workdir"]), allow_config_changes=True)


if __name__ == "__main__":
    cli.run(main, joins=True)
