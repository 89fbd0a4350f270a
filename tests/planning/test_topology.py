import pytest

from gptjax.config import UserError
from gptjax.planning.topology import Route, Topology, all_topologies, parse_bytes, parse_topology, route
from gptjax.scaling.devices import DEVICE_PEAKS, TPU_CHIPS, device_peak
from tests.planning.paper_tpu import mesh

V5P, V5E = TPU_CHIPS["v5p"], TPU_CHIPS["v5e"]


@pytest.mark.parametrize("name", ["v5e:1x1", "v5e:16x16", "v6e:2x4", "v4:2x2x1", "v5p:8x8x16", "v5p:16x16x24", "cpu:8"])
def test_slices_that_exist(name: str) -> None:
    assert parse_topology(name).name == name


@pytest.mark.parametrize(
    ("name", "slices", "message"),
    [
        ("v9:2x2", 1, r"--topology=v9:2x2: unknown chip 'v9', choose from v4, v5e, v5p, v6e \(or cpu:N\)"),
        ("", 1, "unknown chip ''"),
        (
            "v5p:7x9x3",
            1,
            "unknown slice shape of v5p, choose from 2x2x1, .*, or AxBxC of multiples of 4 with A <= B <= C",
        ),
        ("v5p:16x8x8", 1, "A <= B <= C"),
        ("v5p:16x16x28", 1, "at most 6144 chips"),
        ("v5p:4x4", 1, "unknown slice shape"),
        ("v5e:3x3", 1, "unknown slice shape of v5e, choose from 1x1, 2x2, 2x4, 4x4, 4x8, 8x8, 8x16, 16x16"),
        ("v5e:2x2x1", 1, "unknown slice shape"),
        ("v5e:", 1, "unknown slice shape"),
        ("v5e:0x2", 1, "unknown slice shape"),
        ("v5e:2x2; rm", 1, "unknown slice shape"),
        ("v5e:2x2", 0, "--num_slices=0 must be at least 1"),
        ("cpu:2x2", 1, "cpu:N takes one number of simulated devices"),
        ("cpu:8", 2, "in one slice"),
    ],
)
def test_unknown_slices_are_refused_with_the_choices(name: str, slices: int, message: str) -> None:
    with pytest.raises(UserError, match=message):
        parse_topology(name, slices)


def test_every_chip_has_its_peaks() -> None:
    assert all(device_peak(chip.device) in DEVICE_PEAKS for chip in TPU_CHIPS.values())


def test_all_links_of_a_chip_together_are_the_published_bandwidth() -> None:
    both_ways = {chip.name: 2 * 2 * chip.dimensions * chip.link / 1e9 for chip in TPU_CHIPS.values()}
    assert both_ways == {"v4": 600, "v5e": 400, "v5p": 1200, "v6e": 800}


def test_the_overview_names_slices_that_exist() -> None:
    assert all(parse_topology(topology.name) == topology for topology in all_topologies())


def test_sizes_in_libtpus_notation() -> None:
    assert parse_bytes("15.75G") == 15.75 * 2**30
    assert parse_bytes("3.0M") == 3 * 2**20
    assert parse_bytes("512") == 512


def test_a_closed_dimension_gives_two_links_and_an_open_one_gives_one() -> None:
    whole = Topology(V5P, (4, 4, 8))
    laid_out = mesh(whole, data=8, fsdp=4, tensor=4)
    assert route((0, 1, 2, 3), laid_out, whole) == Route(1, 2 * V5P.link, 4)  # along x, a ring of 4
    assert route((0, 1), laid_out, whole) == Route(1, V5P.link, 2)
    assert route((0, 3), laid_out, whole) == Route(1, V5P.link, 2)  # neighbours where the ring closes
    part = Topology(V5E, (4, 4))  # closes at 16 only
    assert route((0, 1, 2, 3), mesh(part, fsdp=4, tensor=4), part) == Route(1, V5E.link, 4)


def test_a_group_over_two_dimensions_uses_the_links_of_both() -> None:
    topology = Topology(V5P, (4, 4, 8))
    laid_out = mesh(topology, data=8, tensor=16)
    assert route(tuple(range(16)), laid_out, topology) == Route(1, 4 * V5P.link, 4)
    assert route((), laid_out, topology) == Route(1, 6 * V5P.link, 8)


def test_interleaved_groups_share_links() -> None:
    topology = Topology(V5E, (4, 4))
    assert route((0, 2), mesh(topology, fsdp=8, tensor=2), topology) == Route(1, V5E.link / 2, 2)


def test_a_group_knows_how_many_slices_it_crosses() -> None:
    topology = Topology(V5E, (2, 2), num_slices=2)
    laid_out = mesh(topology, data=2, fsdp=4)
    assert route((0, 4), laid_out, topology) == Route(2, 0, 1)
    assert route((0, 1, 2, 3), laid_out, topology) == Route(1, 2 * V5E.link, 2)
