"""Platform defaults: every choice whose best value differs between CPU, GPU and TPU, in one table.

None of these values changes what a model computes, rounding aside (`logits_dtype` rounds logits to bfloat16). The
measurements behind them are in `benchmarks/LOG.md`; `benchmarks/train_step.py --variant=NAME,platform.FIELD=VALUE`
compares a training step with another value.
"""

import dataclasses
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from gptjax.parallel.mesh import platform


@dataclasses.dataclass(frozen=True)
class PlatformDefaults:
    """Defaults of one platform, read while a program is traced.

    Attributes:
      logits_dtype: dtype of the logits in a training step, where model.logits_dtype=auto and model.dtype=bfloat16. With
        other model dtypes the logits are float32.
      loss_chunk_tokens: tokens whose logits a device holds at a time in the cross entropy. A CPU wants the logits of a
        chunk in its cache. Each chunk reads and writes the head's float32 gradient, so a GPU, whose memory is large
        compared with its bandwidth, wants few chunks.
      head_row_multiple: the head is padded to a multiple of this number of vocabulary rows. With rows of 50,257 logits,
        GPT-2's vocabulary, a GPU's matrix products take several times longer. Logits of padding are masked.
      logsumexp_in_one_pass: whether one reduction over (maximum, sum of exponentials) pairs computes the log-sum-exp of
        the logits. It reads them once instead of twice, but a CPU does not vectorise it.
      gather_target_logits: whether the cross entropy indexes the targets' logits; otherwise it sums over the masked
        vocabulary. On a GPU that sum slows the kernel that writes the logits' gradient; elsewhere it costs nothing.
      recompute_activations: whether the backward pass of scanned layers recomputes activation functions and attention
        probabilities even with model.remat=none. On a CPU recomputation costs less than writing and reading them.
      store_norm_moments: whether the backward pass of a layer norm reads the mean and the inverse standard deviation
        from memory. Otherwise XLA's GPU compiler recomputes them in each kernel, no longer fuses the sums for the
        gradients of scale and bias, and writes their float32 terms to memory.
      max_unrolled_layers: the most layers that a training step unrolls where model.layer_loop=auto; deeper models are
        scanned. A scan copies what the backward pass needs into stacked arrays and out again: on a GPU a fifth of a
        step. 48 unrolled layers take twice as long to compile. A CPU gains nothing; TPU plans assume scanned layers.
      expert_backend: products with the kernels of experts where model.expert_backend=auto. TPUs have grouped products;
        on a CPU, XLA computes them as masked dense ones for each assignment of a token, more work than each token once.
      output_major_kernels: whether decoding on one device stores kernels as `gptjax.models.few_rows.OutputMajor`. A CPU
        multiplies few rows by them faster; GPUs and TPUs choose layouts by themselves.
      min_decode_rows: the fewest rows that a device decodes at once in bfloat16. For one row XLA's GPU compiler turns
        matrix products into element-wise multiplications and sums, in more kernels than two rows need.
      continuous_completions: whether stages ppo and grpo sample by continuous batching where rl.batching=auto. A CPU's
        time for a token grows with the rows that decode it, so rows of completions that have ended cost. Elsewhere such
        rows cost little, and continuous batching calls the device more often; it has not been measured there.
      unroll_ring: whether the rounds of ring attention are unrolled: a workaround for XLA's CPU backend (JAX 0.10),
        which sometimes mixes up the collective permutes of nested loops.
      interpret_pallas: whether Pallas TPU kernels are interpreted, slowly, as tests do where there is no TPU.
      emulate_low_precision: whether 8-bit matrix products are allowed on hardware that gains nothing from them. False
        everywhere: tests and `benchmarks/low_precision.py` override it.
    """

    logits_dtype: str
    loss_chunk_tokens: int
    head_row_multiple: int
    logsumexp_in_one_pass: bool
    gather_target_logits: bool
    recompute_activations: bool
    store_norm_moments: bool
    max_unrolled_layers: int
    expert_backend: str
    output_major_kernels: bool
    min_decode_rows: int
    continuous_completions: bool
    unroll_ring: bool
    interpret_pallas: bool
    emulate_low_precision: bool


PLATFORM_DEFAULTS = {
    "cpu": PlatformDefaults(
        logits_dtype="float32",
        loss_chunk_tokens=256,
        head_row_multiple=1,
        logsumexp_in_one_pass=False,
        gather_target_logits=False,
        recompute_activations=True,
        store_norm_moments=False,
        max_unrolled_layers=0,
        expert_backend="dense",
        output_major_kernels=True,
        min_decode_rows=1,
        continuous_completions=True,
        unroll_ring=True,
        interpret_pallas=True,
        emulate_low_precision=False,
    ),
    "gpu": PlatformDefaults(
        logits_dtype="bfloat16",
        loss_chunk_tokens=8192,
        head_row_multiple=128,
        logsumexp_in_one_pass=True,
        gather_target_logits=True,
        recompute_activations=False,
        store_norm_moments=True,
        max_unrolled_layers=48,
        expert_backend="grouped",
        output_major_kernels=False,
        min_decode_rows=2,
        continuous_completions=False,
        unroll_ring=False,
        interpret_pallas=False,
        emulate_low_precision=False,
    ),
    "tpu": PlatformDefaults(
        logits_dtype="bfloat16",
        loss_chunk_tokens=2048,
        head_row_multiple=1,
        logsumexp_in_one_pass=False,
        gather_target_logits=False,
        recompute_activations=False,
        store_norm_moments=False,
        max_unrolled_layers=0,
        expert_backend="grouped",
        output_major_kernels=False,
        min_decode_rows=1,
        continuous_completions=False,
        unroll_ring=False,
        interpret_pallas=False,
        emulate_low_precision=False,
    ),
}


def platform_defaults() -> PlatformDefaults:
    """Returns the defaults of the platform of the mesh in use, or of JAX's default backend without a mesh."""
    return PLATFORM_DEFAULTS[platform()]


@contextmanager
def override_defaults(platform: str, **changes: Any) -> Iterator[None]:
    """Replaces defaults of a platform within a `with` statement, for tests and benchmarks.

    Programs that were traced before keep the values that they were traced with.

    Args:
      platform: "cpu", "gpu" or "tpu".
      changes: fields of `PlatformDefaults` and their values.
    """
    before = PLATFORM_DEFAULTS[platform]
    PLATFORM_DEFAULTS[platform] = dataclasses.replace(before, **changes)
    try:
        yield
    finally:
        PLATFORM_DEFAULTS[platform] = before
