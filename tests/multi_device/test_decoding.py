"""Eight simulated devices generate what one does, however they are arranged."""

import itertools
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytestmark = pytest.mark.slow

MESHES = ["data=8", "fsdp=2,tensor=4", "context=2,fsdp=2,tensor=2"]


@pytest.fixture(scope="module")
def results(run_script) -> dict[str, Any]:
    return run_script(Path(__file__).with_name("decode_on_meshes.py"), *MESHES)


@pytest.mark.parametrize("mesh", ["one", *MESHES])
def test_decoding_is_the_whole_forward_pass_at_every_position(results, mesh):
    assert 0 < results[mesh]["error"] < 5e-5


@pytest.mark.parametrize("mesh", MESHES)
def test_every_mesh_generates_what_one_device_does(results, mesh):
    one, spread = results["one"], results[mesh]
    for drawn in ("tokens", "sampled", "beams"):
        assert spread[drawn] == one[drawn], drawn
    for number in ("logprobs", "scores"):
        np.testing.assert_allclose(np.hstack(spread[number]), np.hstack(one[number]), atol=1e-4)


@pytest.mark.parametrize("mesh", ["one", *MESHES])
def test_continuous_batching_generates_the_same(results, mesh):
    """With one program: its results have the shardings of its arguments."""
    assert results[mesh]["batched"] == results["one"]["tokens"]
    assert results[mesh]["programs"] == 1


def test_what_is_compared_differs_from_prompt_to_prompt_and_from_way_to_way(results):
    one = results["one"]
    texts = [*one["tokens"], *one["sampled"], *one["beams"]]
    assert min(len(set(tokens)) for tokens in texts) > 3
    assert all(text != other for text, other in itertools.combinations(one["tokens"] + one["sampled"], 2))
    assert all(best != second for best, second in zip(one["beams"][::2], one["beams"][1::2], strict=True))


def test_the_cache_is_spread(results):
    """The equality above would hold for a cache that every device keeps whole."""
    assert [results[mesh]["share"] for mesh in ["one", *MESHES]] == [1, 1 / 8, 1 / 8, 1 / 4]
    assert [results[mesh]["pages_share"] for mesh in ["one", *MESHES]] == [1, 1, 1 / 4, 1 / 2]  # over "tensor" only
