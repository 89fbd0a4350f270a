import dataclasses
from typing import Any

import pytest
from jax.sharding import Mesh

from gptjax import config as c
from gptjax.config import BatchConfig, Config, GPTConfig, MeshConfig, UserError
from gptjax.parallel.mesh import make_mesh
from gptjax.planning import search as searching
from gptjax.planning import topology as topologies
from gptjax.planning.compile import Compiled, Fits, Memory, TooBig
from gptjax.planning.formulas import expected_memory
from gptjax.planning.search import Trial, candidates, flags, search, with_layout
from gptjax.planning.topology import Topology
from gptjax.scaling.flops import TPU_CHIPS
from tests.planning.paper_tpu import chips

FOUR = Topology(TPU_CHIPS["v5e"], (2, 2))
MODEL = GPTConfig(vocab_size=1001, context_length=128, num_layers=4, num_heads=4, embed_dim=64)
BATCH = BatchConfig(
    total_tokens=10**6, tokens_per_batch=16 * 128, microbatch_size=2, ramp_start_tokens=256, ramp_tokens=10**5
)
CONFIG = Config(model=MODEL, batch=BATCH)
GiB = 2**30


@pytest.fixture(autouse=True)
def paper_devices(monkeypatch: pytest.MonkeyPatch) -> None:
    """Slices without libtpu."""
    monkeypatch.setattr(topologies, "devices", chips)


def lay_out(mesh: MeshConfig) -> Mesh:
    return make_mesh(mesh, chips(FOUR))


def test_all_that_is_proposed_holds_the_rules_of_configs_and_differs() -> None:
    found = candidates(CONFIG, FOUR, GiB)
    for candidate in found:
        c.check(candidate.config)
        assert c.resolve(c.config_dict(candidate.config)) == candidate.config
    assert len({repr(candidate.config) for candidate in found}) == len(found) > 50
    axes = {tuple(dataclasses.asdict(candidate.config.mesh).values()) for candidate in found}
    assert {(4, 1, 1, 1, 1), (1, 4, 1, 1, 1), (1, 1, 4, 1, 1), (1, 1, 1, 4, 1), (2, 1, 1, 2, 1)} <= axes


def test_the_quickest_by_formula_come_first_and_what_is_far_too_big_not_at_all() -> None:
    found = candidates(CONFIG, FOUR, GiB)
    times = [candidate.estimate.serial for candidate in found]
    assert times == sorted(times)
    least = min(expected_memory(other.config, lay_out(other.config.mesh).shape).total for other in found)
    assert candidates(CONFIG, FOUR, least // 4) == []


def test_slices_are_joined_by_data_alone() -> None:
    two = dataclasses.replace(FOUR, num_slices=2)
    assert {mesh.data % 2 for mesh in searching.meshes(CONFIG, two)} == {0}


def fits(config: Config, need: int, capacity: int) -> Compiled:
    return Fits(Memory(need, 0, need, 0), [], 1.0) if need <= capacity else TooBig(need, capacity)


def trials(capacity: int, factor: dict[str, float]) -> list[Trial]:
    """A search whose programs need `factor` times what the formula expects, by rematerialisation."""

    def compile(config: Config, mesh: Mesh) -> Compiled:
        need = int(factor[config.model.remat] * expected_memory(config, mesh.shape).total)
        return fits(config, need, capacity)

    return list(search(CONFIG, FOUR, capacity, compile))


def test_only_what_is_believed_to_fit_is_compiled() -> None:
    exact = trials(capacity := 4 * 2**20, dict.fromkeys(searching.REMATS, 1.0))
    assert exact
    assert all(isinstance(trial.compiled, Fits) for trial in exact)
    everything = candidates(CONFIG, FOUR, capacity)
    quickest = next(candidate for candidate in everything if candidate.memory <= capacity)
    assert exact[0].candidate == quickest


def test_a_refused_program_corrects_the_belief_in_its_kind() -> None:
    quickest = candidates(CONFIG, FOUR, GiB)[0]
    kind = quickest.config.model.remat
    found = trials(2 * quickest.memory, dict.fromkeys(searching.REMATS, 1.0) | {kind: 3.0})
    refused = [trial.candidate for trial in found if isinstance(trial.compiled, TooBig)]
    assert refused == [quickest]
    assert any(isinstance(trial.compiled, Fits) for trial in found)


def test_of_a_mesh_that_fits_nothing_slower_is_tried() -> None:
    found = trials(GiB, dict.fromkeys(searching.REMATS, 1.0))
    assert len({trial.candidate.config.mesh for trial in found}) == len(found)


def test_the_vocabulary_is_padded_only_where_the_mesh_asks_for_it() -> None:
    assert with_layout(CONFIG, MeshConfig(data=4), 4, "none").model.vocab_size == 1001
    assert with_layout(CONFIG, MeshConfig(data=1, tensor=4), 4, "none").model.vocab_size == 1024


@pytest.mark.parametrize(("microbatch", "start"), [(2, 256), (4, 512), (16, None)])
def test_a_ramp_starts_at_a_microbatch_or_not_at_all(microbatch: int, start: int | None) -> None:
    changed = with_layout(CONFIG, MeshConfig(), microbatch, "none")
    assert changed.batch.ramp_start_tokens == start
    c.check(changed)


def test_the_flags_make_the_plan_of_the_config() -> None:
    new = with_layout(CONFIG, MeshConfig(data=1, tensor=4), 16, "full")
    assert flags(CONFIG, new) == [
        "--config.model.vocab_size=1024",
        "--config.model.remat=full",
        "--config.batch.microbatch_size=16",
        "--config.batch.ramp_start_tokens=None",
        "--config.batch.ramp_tokens=None",
        "--config.mesh.data=1",
        "--config.mesh.tensor=4",
    ]
    edited = c.config_dict(CONFIG)
    for flag in flags(CONFIG, new):
        key, _, text = flag.removeprefix("--config.").partition("=")
        value: Any = None if text == "None" else int(text) if text.isdecimal() else text
        edited.update_from_flattened_dict({key: value})
    assert c.resolve(edited) == new


def test_a_mesh_that_cannot_be_laid_out_is_a_mistake_of_the_user(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any) -> Mesh:
        raise NotImplementedError("no assignment\nof axes")

    monkeypatch.setattr(topologies, "make_mesh", fail)
    with pytest.raises(UserError, match="this mesh cannot be laid over v5e:2x2: no assignment of axes"):
        topologies.lay_out(MeshConfig(), FOUR)
