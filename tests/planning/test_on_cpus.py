"""The planner's numbers for eight simulated CPU devices are those of a run's compiled step and arrays."""

from pathlib import Path
from typing import Any

import pytest

STEPS = ["fsdp", "fsdp, two microbatches", "tensor"]


@pytest.fixture(scope="module")
def results(run_script) -> dict[str, Any]:
    return run_script(Path(__file__).with_name("count_on_cpus.py"))


@pytest.mark.slow
@pytest.mark.parametrize("trips", [3, 9])
def test_a_collective_in_a_loop_counts_once_per_iteration(results, trips):
    found = [item for item in results[f"loop of {trips}"]["collectives"] if item["kind"] == "all-reduce"]
    assert [(item["payload"], item["count"]) for item in found] == [(16 * 16 * 4, trips)]
    assert found[0]["members"] == [0, 4]


@pytest.mark.parametrize("name", STEPS)
def test_planned_memory_is_that_of_a_runs_step(results, name):
    step = results[name]
    assert {kind: step["planned"][kind] for kind in step["real"]} == step["real"]
    assert step["counts"] == step["real_counts"]


@pytest.mark.parametrize("name", STEPS)
def test_planned_state_is_that_of_a_device(results, name):
    step = results[name]
    assert step["state"]["parameters"] == step["live"]["parameters"]
    assert step["state"]["optimizer"] == step["live"]["optimizer"]
    # The two scalar arguments are the number of microbatches and the learning rate.
    assert step["planned"]["arguments"] == pytest.approx(step["live_arguments"] + 8, abs=256)


def test_all_gathers_double_with_the_microbatches(results):
    once, twice = (results[name]["counts"]["all-gather"] for name in STEPS[:2])
    assert once < twice <= 2 * once
