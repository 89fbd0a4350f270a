"""Ring attention on eight simulated devices equals attention on one, without needless transfers and tiles."""

from pathlib import Path
from typing import Any

import pytest

# Chunks are of 24, 16, 12 and 6 positions with context=2, 3, 4 and 8; 0: dense.
QUICK = [
    "context=8:1:whole:float32",  # a position attends to itself only
    "context=4:6:whole:float32",  # half a chunk
    "context=8:6:whole:float32",  # a chunk
    "context=2,tensor=2,fsdp=2:0:whole:float32",
    "context=3,tensor=2:16:segments:float32",
]
EXHAUSTIVE = [
    "context=2:0:segments:float32",
    "context=4:0:segments:float32",
    "context=8:0:segments:float32",
    "context=8:13:segments:float32",  # two neighbours on each side
    "context=8:40:segments:float32",  # all the way round
    "context=4,expert=2:20:segments:float32",
    "context=4:0:segments:bfloat16",
]
CASES = [*QUICK, *(pytest.param(case, marks=pytest.mark.slow) for case in EXHAUSTIVE)]
SCRIPT = Path(__file__).with_name("ring_on_meshes.py")


@pytest.fixture(scope="module")
def results(run_script) -> dict[str, Any]:
    return run_script(SCRIPT, "order", "poison", *QUICK)


@pytest.fixture(scope="module")
def exhaustive(run_script) -> dict[str, Any]:
    return run_script(SCRIPT, *EXHAUSTIVE)


@pytest.fixture
def compared(request: pytest.FixtureRequest, case: str) -> dict[str, Any]:
    """The results of a case, from the script that computes it."""
    return request.getfixturevalue("results" if case in QUICK else "exhaustive")["cases"][case]


@pytest.mark.parametrize("case", CASES)
def test_values_and_gradients_are_those_of_one_device(compared, case):
    # Another order of float32 sums, or the last bit of bfloat16 values between 2 and 4.
    tolerance = 5e-6 if case.endswith("float32") else 0.02
    assert compared["differences"] == pytest.approx([0, 0, 0, 0], abs=tolerance)


@pytest.mark.parametrize("mesh", ["context=2,tensor=2,fsdp=2", "context=3,data=2", "context=8"])
def test_balanced_order_takes_two_permutes_in_each_direction(results, mesh):
    expected = {"right": True, "sent": {"collective-permute": 2}}
    assert results["order"][mesh] == dict.fromkeys(("balance", "restore", "gradient"), expected)


@pytest.mark.parametrize("case", CASES)
def test_keys_and_values_are_permuted_and_never_gathered(compared, case):
    """A band of 1 needs no communication."""
    sent = {"collective-permute"} if ":1:" not in case else set()
    assert set(compared["sent"]) == sent


def test_communication_of_a_banded_layer_does_not_grow_with_the_devices(results):
    assert (
        results["cases"]["context=8:6:whole:float32"]["sent"] == results["cases"]["context=4:6:whole:float32"]["sent"]
    )


@pytest.mark.parametrize("array", ["out", "dq"])
def test_fully_masked_tiles_are_not_computed(results, array):
    """With tiles of 4 and a band of 6: queries 32 to 35 are the first that need no tile before position 24."""
    assert results["poison"]["dense"][array] == list(range(48))
    assert results["poison"]["banded"][array] == list(range(32, 96))
