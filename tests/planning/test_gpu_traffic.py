"""`benchmarks.gpu_traffic` counts the bytes that the kernels of a compiled program read and write."""

from benchmarks.gpu_traffic import kernels

TEXT = """\
HloModule jit_f, is_scheduled=true

%fused_add (p.0: f32[64,8], p.1: f32[64,8]) -> f32[64,8] {
  %p.0 = f32[64,8]{1,0} parameter(0)
  %p.1 = f32[64,8]{1,0} parameter(1)
  ROOT %add.1 = f32[64,8]{1,0} add(%p.0, %p.1)
}

%body (arg: (s32[], f32[64,8])) -> (s32[], f32[64,8]) {
  %arg = (s32[], f32[64,8]{1,0}) parameter(0)
  %i = s32[] get-tuple-element(%arg), index=0
  %x = f32[64,8]{1,0} get-tuple-element(%arg), index=1
  %loop_add_fusion = f32[64,8]{1,0} fusion(%x, %x), kind=kLoop, calls=%fused_add, metadata={op_name="jit(f)/transpose(g)/layers/block_1/mlp/add"}
  ROOT %tuple.1 = (s32[], f32[64,8]{1,0}) tuple(%i, %loop_add_fusion)
}

%condition (arg.1: (s32[], f32[64,8])) -> pred[] {
  %arg.1 = (s32[], f32[64,8]{1,0}) parameter(0)
  ROOT %true = pred[] constant(true)
}

ENTRY %main (a: bf16[64,32], b: bf16[32,8]) -> (s32[], f32[64,8]) {
  %a = bf16[64,32]{1,0} parameter(0)
  %b = bf16[32,8]{1,0} parameter(1)
  %zero = s32[] constant(0)
  %gemm_fusion_dot.1 = f32[64,8]{1,0} fusion(%a, %b), kind=kCustom, calls=%fused_add, metadata={op_name="jit(f)/dot"}
  %attention = f32[64,8]{1,0} custom-call(%gemm_fusion_dot.1), custom_call_target="__cudnn$fmhaSoftmax"
  %tuple = (s32[], f32[64,8]{1,0}) tuple(%zero, %attention)
  ROOT %while = (s32[], f32[64,8]{1,0}) while(%tuple), condition=%condition, body=%body, backend_config={"known_trip_count":{"n":"5"}}
}
"""  # noqa: E501


def test_kernels_in_loops_count_as_often_as_they_run_and_what_is_fused_is_no_kernel():
    array = 64 * 8 * 4
    assert sorted(kernels(TEXT)) == [
        ("__cudnn$fmhaSoftmax", 2 * array, 1),
        ("product", 2 * (64 * 32 + 32 * 8) + array, 1),
        ("transpose block/mlp/add", 3 * array, 5),
    ]
