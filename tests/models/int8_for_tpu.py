"""Compiles a product of int8 and its gradients for a TPU v5e that need not be there: `int8_for_tpu.py OUT.json`.

Writes the result's dtype of each product in the program, forward and backward.
"""

import json
import re
import sys
from pathlib import Path
from typing import Any

import jax
from jax.experimental import topologies
from jax.sharding import SingleDeviceSharding

from gptjax.models.low_precision import int8_product


def forward_and_backward(x: jax.Array, kernel: jax.Array) -> Any:
    y, pull_back = jax.vjp(lambda x, kernel: int8_product(x, kernel, 1), x, kernel)
    return y, pull_back(y)


def main() -> None:
    device = topologies.get_topology_desc(platform="tpu", topology_name="v5e:2x2").devices[0]
    arrays = (
        jax.ShapeDtypeStruct(shape, "bfloat16", sharding=SingleDeviceSharding(device))
        for shape in ((1024, 256), (256, 1024))
    )
    text = jax.jit(forward_and_backward).lower(*arrays).compile().as_text()
    products = re.findall(r"= (\w+)\[[^=]*? convolution\([^\n]*op_name=\"([^\"]*)\"", text)
    results = {"backward": [], "forward": []}
    for dtype, name in products:
        results["backward" if "transpose(jvp" in name else "forward"].append(dtype)
    Path(sys.argv[1]).write_text(json.dumps(results))


if __name__ == "__main__":
    main()
