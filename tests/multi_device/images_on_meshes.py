"""Trains on images on several meshes: `images_on_meshes.py OUT.json one data=2,fsdp=2,tensor=2 ...`.

Writes {mesh: {"losses": [...], "validation": {...}}}.
"""

import json
import sys
import tempfile
from pathlib import Path

import jax

from gptjax import config as c
from gptjax.parallel.mesh import make_mesh
from tests.multi_device.finetune_on_meshes import train
from tests.tiny_chats import DIVISIBLE
from tests.tiny_images import image_config


def main() -> None:
    out, *names = sys.argv[1:]
    results = {}
    with tempfile.TemporaryDirectory() as directory:
        for name in names:
            sizes = {} if name == "one" else {axis: int(n) for axis, n in (part.split("=") for part in name.split(","))}
            config = c.replace(image_config(Path(directory)), {"model": DIVISIBLE, "mesh": sizes})
            mesh = make_mesh(config.mesh, jax.devices()[: 1 if name == "one" else None])
            found = train(config, mesh, Path(directory) / name)
            results[name] = {key: found[key] for key in ("losses", "validation")}
    Path(out).write_text(json.dumps(results))


if __name__ == "__main__":
    main()
