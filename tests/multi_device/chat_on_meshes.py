"""Trains each stage of chat on several meshes: `chat_on_meshes.py OUT.json one data=2,fsdp=2,tensor=2 ...`.

Writes {mesh: {stage: {"losses": [...], "validation": {...}}}}.
"""

import dataclasses
import json
import sys
import tempfile
from pathlib import Path

import jax

from gptjax import config as c
from gptjax.parallel.mesh import make_mesh
from tests.multi_device.finetune_on_meshes import train
from tests.tiny_chats import STAGES_OF_CHAT, config_of
from tests.tiny_tasks import MODEL, save_pretrained


def main() -> None:
    out, *names = sys.argv[1:]
    results = {}
    with tempfile.TemporaryDirectory() as directory:
        # The byte tokenizer's 257, and 2 special tokens more, rounded up to divide over the tensor axis.
        pretrained = save_pretrained(
            Path(directory) / "pretrained", settings=dataclasses.replace(MODEL, vocab_size=258)
        )
        for name in names:
            sizes = {} if name == "one" else {axis: int(n) for axis, n in (part.split("=") for part in name.split(","))}
            for stage in STAGES_OF_CHAT:
                config = config_of(stage, Path(directory), pretrained)
                config = c.replace(config, {"model": {"vocab_size": 260}, "mesh": sizes})
                mesh = make_mesh(config.mesh, jax.devices()[: 1 if name == "one" else None])
                found = train(config, mesh, Path(directory) / f"{name}_{stage}")
                results.setdefault(name, {})[stage] = {key: found[key] for key in ("losses", "validation")}
    Path(out).write_text(json.dumps(results))


if __name__ == "__main__":
    main()
