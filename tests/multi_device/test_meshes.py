"""Eight simulated devices give the losses of one on any mesh, without needless communication."""

import json
from pathlib import Path
from typing import Any

import jax
import pytest

pytestmark = pytest.mark.slow

# What a step of two microbatches says, by the XLA of a version of JAX. To record another's, run the script with it.
COUNTS = json.loads(Path(__file__).with_name("collectives.json").read_text())
MESHES = [
    *("data=8", "fsdp=8", "data=2,tensor=4", "data=2,context=4", "fsdp=2,tensor=2,context=2"),
    *("data=2,fsdp=2,tensor=2+dropout+sample", "expert=2,fsdp=2,tensor=2+offload"),
]
OPTIMIZERS = ["muon", "adafactor"]
ACTIVATIONS = 16 * 32 * 32 * 4  # bytes of what a layer hands to the next, of all devices


def of_one_device(mesh: str) -> str:
    """What a mesh is compared with: dropout and samples change the numbers, and nothing else does."""
    return "one+dropout+sample" if "dropout" in mesh else "one"


@pytest.fixture(scope="module")
def results(run_script) -> dict[str, Any]:
    of_optimizers = [f"{mesh}+{name}" for name in OPTIMIZERS for mesh in ("one", "data=2,fsdp=2,tensor=2")]
    return run_script(
        Path(__file__).with_name("train_on_meshes.py"), "one", "one+dropout+sample", *MESHES, *of_optimizers
    )


@pytest.mark.parametrize("mesh", MESHES)
def test_every_mesh_gives_the_losses_of_one_device(results, mesh):
    # float32 sums in another order, through 10 steps at a high learning rate.
    assert results[mesh]["losses"] == pytest.approx(results[of_one_device(mesh)]["losses"], rel=3e-5)
    assert results[mesh]["sample"] == results[of_one_device(mesh)]["sample"]


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_every_optimizer_gives_the_losses_of_one_device(results, name):
    one, many = results[f"one+{name}"]["losses"], results[f"data=2,fsdp=2,tensor=2+{name}"]["losses"]
    # Adafactor has next to no eps: where a gradient is zero but for rounding, as that of the keys' bias, it steps too.
    assert many == pytest.approx(one, rel=3e-5 if name == "muon" else 2e-4)
    assert one[-1] < one[0] - 0.5
    assert one[-1] != pytest.approx(results["one"]["losses"][-1], rel=1e-3)


@pytest.mark.parametrize("objective", ["masked", "prefix", "fill_in_the_middle"])
def test_every_objective_gives_the_loss_and_the_gradient_of_one_device(results, objective):
    result = results["objectives"][objective]
    assert result["losses"][1] == pytest.approx(result["losses"][0], rel=1e-6)
    assert result["difference"] < 1e-6
    assert result["gradient"] > 1e-4


def test_every_layout_of_the_state_is_saved_and_resumed(results):
    """Each layout once: some runs differ in other ways than how the devices hold the state."""
    resumes = {mesh: result["resumes"] for mesh, result in results.items() if mesh != "objectives"}
    seen = {"one+dropout+sample", "data=2,context=4", "data=2,fsdp=2,tensor=2+dropout+sample"}
    assert resumes == {mesh: None if mesh in seen else True for mesh in resumes}


def test_the_runs_compared_learn_and_differ(results):
    plain, dropout = results["one"], results["one+dropout+sample"]
    assert plain["losses"][-1] < plain["losses"][0] - 0.5
    assert plain["losses"][-1] != pytest.approx(dropout["losses"][-1], rel=1e-3)
    assert dropout["sample"] is not None


def test_parameters_are_spread(results):
    """The equality above would hold for a table that shards nothing."""
    shares = {mesh: results[mesh]["share"] for mesh in MESHES}
    assert shares == dict(zip(MESHES, [1, 1 / 8, 1 / 4, 1, 1 / 4, 1 / 4, 1 / 4], strict=True))


@pytest.mark.parametrize("mesh", MESHES)
def test_no_device_gets_all_activations(results, mesh):
    assert results[mesh]["gathered"] < ACTIVATIONS


@pytest.mark.parametrize("mesh", MESHES)
def test_a_step_has_the_collectives_that_it_had(results, mesh):
    version = ".".join(jax.__version__.split(".")[:2])
    if version not in COUNTS:
        pytest.skip(f"no counts were recorded with JAX {version}")
    assert results[mesh]["counts"] == COUNTS[version][mesh]
