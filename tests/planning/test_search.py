import dataclasses
from typing import Any

import pytest
from jax.sharding import Mesh

from gptjax import config as c
from gptjax.config import BatchConfig, Config, GPTConfig, MeshConfig, UserError
from gptjax.parallel.mesh import make_mesh
from gptjax.planning import search as searching
from gptjax.planning import topology as topologies
from gptjax.planning.compile import CompiledProgram, CompileResult, DeviceMemory, OutOfMemory
from gptjax.planning.formulas import expected_memory
from gptjax.planning.search import Trial, candidates, override_flags, search, with_layout
from gptjax.planning.topology import Topology, listed_chips
from gptjax.scaling.devices import TPU_CHIPS

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
    monkeypatch.setattr(topologies, "devices", listed_chips)


def lay_out(mesh: MeshConfig) -> Mesh:
    return make_mesh(mesh, listed_chips(FOUR))


def test_candidates_are_valid_and_distinct_configs() -> None:
    found = candidates(CONFIG, FOUR, GiB)
    for candidate in found:
        c.check(candidate.config)
        assert c.resolve(c.config_dict(candidate.config)) == candidate.config
    assert len({repr(candidate.config) for candidate in found}) == len(found) > 50
    axes = {tuple(dataclasses.asdict(candidate.config.mesh).values()) for candidate in found}
    assert {(4, 1, 1, 1, 1), (1, 4, 1, 1, 1), (1, 1, 4, 1, 1), (1, 1, 1, 4, 1), (2, 1, 1, 2, 1)} <= axes


def test_candidates_are_sorted_by_time_without_those_far_too_large() -> None:
    found = candidates(CONFIG, FOUR, GiB)
    times = [candidate.estimate.serial for candidate in found]
    assert times == sorted(times)
    least = min(expected_memory(other.config, lay_out(other.config.mesh).shape).total for other in found)
    assert candidates(CONFIG, FOUR, least // 4) == []


def test_slices_are_joined_by_data_alone() -> None:
    two = dataclasses.replace(FOUR, num_slices=2)
    assert {mesh.data % 2 for mesh in searching.meshes(CONFIG, two)} == {0}


def fits(config: Config, need: int, capacity: int) -> CompileResult:
    return CompiledProgram(DeviceMemory(need, 0, need, 0), [], 1.0) if need <= capacity else OutOfMemory(need, capacity)


def trials(capacity: int, factor: dict[str, float]) -> list[Trial]:
    """A search whose programs need `factor` times the expected memory, by rematerialisation policy."""

    def compile(config: Config, mesh: Mesh) -> CompileResult:
        need = int(factor[config.model.remat] * expected_memory(config, mesh.shape).total)
        return fits(config, need, capacity)

    return list(search(CONFIG, FOUR, capacity, compile))


def test_only_candidates_expected_to_fit_are_compiled() -> None:
    exact = trials(capacity := 4 * 2**20, dict.fromkeys(searching.REMATS, 1.0))
    assert exact
    assert all(isinstance(trial.compiled, CompiledProgram) for trial in exact)
    everything = candidates(CONFIG, FOUR, capacity)
    fastest = next(candidate for candidate in everything if candidate.memory <= capacity)
    assert exact[0].candidate == fastest


def test_a_rejected_program_corrects_the_expectation_of_its_kind() -> None:
    fastest = candidates(CONFIG, FOUR, GiB)[0]
    kind = fastest.config.model.remat
    found = trials(2 * fastest.memory, dict.fromkeys(searching.REMATS, 1.0) | {kind: 3.0})
    refused = [trial.candidate for trial in found if isinstance(trial.compiled, OutOfMemory)]
    assert refused == [fastest]
    assert any(isinstance(trial.compiled, CompiledProgram) for trial in found)


def test_no_slower_candidate_of_a_mesh_that_fits_is_compiled() -> None:
    found = trials(GiB, dict.fromkeys(searching.REMATS, 1.0))
    assert len({trial.candidate.config.mesh for trial in found}) == len(found)


def test_the_vocabulary_is_padded_only_where_the_mesh_does_not_divide_it() -> None:
    assert with_layout(CONFIG, MeshConfig(data=4), 4, "none").model.vocab_size == 1001
    assert with_layout(CONFIG, MeshConfig(data=1, tensor=4), 4, "none").model.vocab_size == 1024


@pytest.mark.parametrize(("microbatch", "start"), [(2, 256), (4, 512), (16, None)])
def test_a_ramp_starts_at_a_microbatch_or_not_at_all(microbatch: int, start: int | None) -> None:
    changed = with_layout(CONFIG, MeshConfig(), microbatch, "none")
    assert changed.batch.ramp_start_tokens == start
    c.check(changed)


def test_the_flags_turn_the_config_into_the_plan() -> None:
    new = with_layout(CONFIG, MeshConfig(data=1, tensor=4), 16, "full")
    assert override_flags(CONFIG, new) == [
        "--config.model.vocab_size=1024",
        "--config.model.remat=full",
        "--config.batch.microbatch_size=16",
        "--config.batch.ramp_start_tokens=None",
        "--config.batch.ramp_tokens=None",
        "--config.mesh.data=1",
        "--config.mesh.tensor=4",
    ]
    edited = c.config_dict(CONFIG)
    for flag in override_flags(CONFIG, new):
        key, _, text = flag.removeprefix("--config.").partition("=")
        value: Any = None if text == "None" else int(text) if text.isdecimal() else text
        edited.update_from_flattened_dict({key: value})
    assert c.resolve(edited) == new


def test_a_mesh_that_cannot_be_mapped_is_a_user_error(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any) -> Mesh:
        raise NotImplementedError("no assignment\nof axes")

    monkeypatch.setattr(topologies, "make_mesh", fail)
    with pytest.raises(UserError, match="this mesh cannot be mapped onto v5e:2x2: no assignment of axes"):
        topologies.lay_out(MeshConfig(), FOUR)
