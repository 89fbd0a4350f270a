import jax
import jax.numpy as jnp
import pytest

from gptjax.planning.program_text import Collective, bytes_sent, collectives, mesh_axes

SHAPE = {"data": 2, "fsdp": 4, "tensor": 1}  # of a mesh of eight devices

# Shortened XLA output: a loop of 3 in a loop of 5 in a loop whose trip count is an argument.
NESTED = """HloModule jit_step, is_scheduled=true

%add (x: f32[], y: f32[]) -> f32[] {
  %x = f32[] parameter(0)
  %y = f32[] parameter(1)
  ROOT %sum = f32[] add(%x, %y)
}

%inner_body (p: (s32[], f32[8,16])) -> (s32[], f32[8,16]) {
  %p = (s32[], f32[8,16]{1,0}) parameter(0)
  %x.1 = f32[8,16]{1,0} get-tuple-element(%p), index=1
  %all-reduce.1 = f32[8,16]{1,0:T(8,128)} all-reduce(%x.1), channel_id=1, replica_groups=[2,4]<=[8], to_apply=%add
  ROOT %t = (s32[], f32[8,16]{1,0}) tuple(%i, %all-reduce.1)
}

%inner_condition (p.1: (s32[], f32[8,16])) -> pred[] {
  %p.1 = (s32[], f32[8,16]{1,0}) parameter(0)
  %limit = s32[]{:T(128)} constant(3)
  %i.1 = s32[] get-tuple-element(%p.1), index=0
  ROOT %less = pred[] compare(%i.1, %limit), direction=LT
}

%outer_body (p.2: (s32[], f32[8,16])) -> (s32[], f32[8,16]) {
  %p.2 = (s32[], f32[8,16]{1,0}) parameter(0)
  ROOT %while.1 = (s32[], f32[8,16]{1,0}) while(%p.2), condition=%inner_condition, body=%inner_body
}

%outer_condition (p.3: (s32[], f32[8,16])) -> pred[] {
  %p.3 = (s32[], f32[8,16]{1,0}) parameter(0)
  ROOT %other = pred[] constant(true)
}

%accumulate_body (p.4: (s32[], f32[8,16])) -> (s32[], f32[8,16]) {
  %p.4 = (s32[], f32[8,16]{1,0}) parameter(0)
  ROOT %while.2 = (s32[], f32[8,16]{1,0}) while(%p.4), condition=%outer_condition, body=%outer_body, \
backend_config={"known_trip_count":{"n":"5"},"known_init_step":{"init":"0","step":"1"}}
}

%accumulate_condition (p.5: (s32[], f32[8,16])) -> pred[] {
  %p.5 = (s32[], f32[8,16]{1,0}) parameter(0)
  %i.2 = s32[] get-tuple-element(%p.5), index=0
  %count = s32[] get-tuple-element(%p.5), index=2
  ROOT %less.1 = pred[] compare(%i.2, %count), direction=LT
}

ENTRY %main (a: f32[8,16]) -> f32[8,16] {
  %a = f32[8,16]{1,0} parameter(0)
  %while.3 = (s32[], f32[8,16]{1,0}) while(%a), condition=%accumulate_condition, body=%accumulate_body
  ROOT %r = f32[8,16]{1,0} get-tuple-element(%while.3), index=1
}
"""


def program(*lines: str, computations: str = "") -> str:
    body = "\n".join(f"  %op.{i} = {line}" for i, line in enumerate(lines))
    return f"HloModule m\n\n{computations}ENTRY %main (a: f32[8]) -> f32[8] {{\n{body}\n}}\n"


def test_collectives_in_nested_loops_count_once_per_iteration() -> None:
    assert collectives(NESTED, unknown_trip_count=7) == [Collective("all-reduce", 512, (0, 1, 2, 3), 7 * 5 * 3)]


@pytest.mark.parametrize(
    ("groups", "members"),
    [
        ("replica_groups={{0,4},{1,5},{2,6},{3,7}}", (0, 4)),
        ("replica_groups=[4,2]<=[2,4]T(1,0)", (0, 4)),
        ("replica_groups=[2,4]<=[8]", (0, 1, 2, 3)),
        ("replica_groups=mesh['axis_0'=2,'axis_1'=4] {'axis_0'}", (0, 4)),
        ("replica_groups=mesh['x'=2,'y'=4] {'x','y'}", (0, 1, 2, 3, 4, 5, 6, 7)),
        ("replica_groups=mesh['x'=8] {'x':(2)2}", (0, 2)),
        ("replica_groups=mesh['x'=4,'y'=2], device_ids=([2,4]T(1,0)) {'y'}", (0, 4)),
        ("replica_groups={}", ()),
    ],
)
def test_every_form_of_groups_is_read(groups: str, members: tuple[int, ...]) -> None:
    text = program(f"bf16[4,8]{{1,0}} all-gather(%a), channel_id=3, {groups}, dimensions={{0}}")
    assert collectives(text) == [Collective("all-gather", 64, members, 1)]


def test_groups_name_the_mesh_axes_along_which_they_differ() -> None:
    assert mesh_axes((0, 4), SHAPE) == ("data",)
    assert mesh_axes((0, 2), SHAPE) == ("fsdp",)
    assert mesh_axes(tuple(range(8)), SHAPE) == mesh_axes((), SHAPE) == ("data", "fsdp")


def test_an_asynchronous_pair_counts_once_and_by_its_result() -> None:
    text = program(
        "(f32[8]{0}, f32[32]{0}) all-gather-start(%a), replica_groups=[2,4]<=[8], dimensions={0}",
        "f32[32]{0} all-gather-done(%op.0)",
        "(f32[8]{0}, f32[8]{0}, u32[]{:S(2)}, u32[]{:S(2)}) collective-permute-start(%a), "
        "source_target_pairs={{0,0},{1,2},{2,1}}",
        "f32[8]{0} collective-permute-done(%op.2)",
    )
    assert collectives(text) == [
        Collective("all-gather", 128, (0, 1, 2, 3), 1),
        Collective("collective-permute", 32, (1, 2), 1),
    ]


def test_a_collective_wrapped_in_an_asynchronous_computation_counts_once() -> None:
    wrapped = (
        "%async (p: f32[32]) -> f32[8] {\n  %p = f32[32]{0} parameter(0)\n"
        "  ROOT %rs = f32[8]{0} reduce-scatter(%p), replica_groups=[2,4]<=[8], dimensions={0}, to_apply=%add\n}\n\n"
    )
    text = program(
        "((f32[32]{0}), f32[8]{0}, u32[]) async-start(%a), calls=%async",
        "f32[8]{0} async-done(%op.0), calls=%async",
        computations=wrapped,
    )
    assert collectives(text) == [Collective("reduce-scatter", 128, (0, 1, 2, 3), 1)]


def test_a_fused_all_reduce_and_slice_is_a_reduce_scatter() -> None:
    fused = (
        "%all-reduce-scatter.1.clone (input: bf16[32]) -> bf16[8] {\n  %input = bf16[32]{0} parameter(0)\n"
        "  %all-reduce.9 = bf16[32]{0} all-reduce(%input), replica_groups=[2,4]<=[8], to_apply=%add\n"
        "  ROOT %slice = bf16[8]{0} dynamic-slice(%all-reduce.9, %i), dynamic_slice_sizes={8}\n}\n\n"
    )
    text = program("bf16[8]{0} fusion(%a), kind=kCustom, calls=%all-reduce-scatter.1.clone", computations=fused)
    assert collectives(text) == [Collective("reduce-scatter", 64, (0, 1, 2, 3), 1)]


@pytest.mark.parametrize(
    ("transfer", "expected"),
    [
        ("ALL_REDUCE", Collective("all-reduce", 32, (0, 4), 1)),
        ("REDUCE_SCATTER", Collective("reduce-scatter", 32, (0, 4), 1)),
        ("ALL_GATHER", Collective("all-gather", 64, (0, 4), 1)),
        ("ONE_TO_ONE", Collective("collective-permute", 32, (0, 4), 1)),
    ],
)
def test_what_is_sent_between_slices_is_part_of_a_collective(transfer: str, expected: Collective) -> None:
    attributes = f'_xla_megascale_target="{{1,2}}x{{0:3}}",_xla_megascale_transfer_type="{transfer}"'
    text = program(
        f"(f32[8]{{0}}, u32[], token[]) send(%a, %after-all), channel_id=2, frontend_attributes={{{attributes}}}",
        "token[] send-done(%op.0), channel_id=2",
        "(f32[8]{0}, u32[], token[]) send(%a, %after-all), channel_id=4, is_host_transfer=true",
    )
    assert collectives(text) == [expected]


def test_equal_collectives_are_merged_and_groups_of_one_left_out() -> None:
    line = "(f32[2]{0}, bf16[4]{0}) all-reduce(%a, %b), replica_groups=[2,4]<=[8], to_apply=%add"
    alone = "f32[8]{0} all-reduce(%a), replica_groups={{0},{1}}, to_apply=%add"
    assert collectives(program(line, line, alone)) == [Collective("all-reduce", 16, (0, 1, 2, 3), 2)]


def test_bytes_sent_are_those_of_ring_algorithms() -> None:
    members = (0, 1, 2, 3)
    sent = {
        kind: bytes_sent(Collective(kind, 400, members, 2), 8) for kind in ("all-gather", "all-reduce", "all-to-all")
    }
    assert sent == {"all-gather": 600, "all-reduce": 1200, "all-to-all": 600}
    assert bytes_sent(Collective("collective-permute", 400, (0, 1), 2), 8) == 800
    assert bytes_sent(Collective("all-gather", 400, (), 1), 8) == 350


def test_a_program_for_one_device_has_no_collectives() -> None:
    text = jax.jit(lambda x: x @ x).lower(jnp.ones((8, 8))).compile().as_text()
    assert collectives(text) == []
