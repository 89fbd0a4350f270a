"""MXFP4: every number, the checkpoints that have it, and the memory of their import."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest

from gptjax.config import UserError
from gptjax.interop import safetensors_files
from gptjax.interop.huggingface import load_pretrained, save_pretrained
from gptjax.interop.mxfp4 import decode
from tests.interop.rotary_models import model, shapes, tensors, write

ROOT = Path(__file__).parents[2]
EXPECTED = ROOT / "tests" / "fixtures" / "mxfp4.npz"  # of transformers: bits of bfloat16, (E, inputs, outputs)
MAGNITUDES = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6])


def every_number() -> tuple[np.ndarray, np.ndarray]:
    """Blocks and scales: all pairs of numbers in 16 blocks, at all 256 scales."""
    blocks = np.arange(256, dtype=np.uint8).reshape(1, 1, 16, 16).repeat(256, axis=1)
    return blocks, np.arange(256, dtype=np.uint8)[None, :, None].repeat(16, axis=2)


def random_tensor() -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(0)
    return rng.integers(0, 256, (3, 10, 4, 16), dtype=np.uint8), rng.integers(0, 256, (3, 10, 4), dtype=np.uint8)


@pytest.mark.parametrize(("name", "packed"), [("every_number", every_number()), ("random", random_tensor())])
def test_the_bits_are_those_of_transformers(name, packed):
    got = decode(*packed)
    assert got.dtype == jnp.bfloat16
    np.testing.assert_array_equal(got.view(np.uint16).swapaxes(1, 2), np.load(EXPECTED)[name])


def test_the_numbers_are_those_of_the_format():
    blocks, scales = every_number()
    got = decode(blocks, scales)[0].astype(np.float64)
    byte = np.arange(256)
    codes = np.stack([byte & 15, byte >> 4], axis=1).reshape(-1)  # the low four bits first
    expected = np.where(codes & 8, -1, 1) * MAGNITUDES[codes & 7] * np.exp2(np.arange(255) - 127.0)[:, None]
    expected = np.where(np.abs(expected) < 2.0**128, expected, np.copysign(np.inf, expected))
    np.testing.assert_array_equal(got[:255], expected)
    np.testing.assert_array_equal(np.signbit(got), np.broadcast_to((codes & 8) > 0, got.shape))


def packed_model(**keys: Any) -> tuple[dict, dict[str, np.ndarray], dict[str, np.ndarray]]:
    """A gpt-oss: its config.json, its tensors with experts in MXFP4, and its tensors in bfloat16."""
    config = model("gpt_oss", 64, 2, 4, 2, 8, num_local_experts=3, num_experts_per_tok=2, sliding_window=5)
    config |= {"intermediate_size": 32, "vocab_size": 300} | keys
    rng = np.random.default_rng(0)
    dense = {name: array.astype(jnp.bfloat16) for name, array in tensors(config).items()}
    packed = dict(dense)
    for name, (experts, inputs, outputs) in {n: s for n, s in shapes(config).items() if n.endswith("_proj")}.items():
        blocks = rng.integers(0, 256, (experts, outputs, inputs // 32, 16), dtype=np.uint8)
        scales = rng.integers(118, 126, (experts, outputs, inputs // 32), dtype=np.uint8)
        del packed[name]
        packed |= {f"{name}_blocks": blocks, f"{name}_scales": scales}
        dense[name] = np.ascontiguousarray(decode(blocks, scales).swapaxes(1, 2))
    settings = {"quant_method": "mxfp4", "modules_to_not_convert": ["model.layers.*.self_attn", "lm_head"]}
    return config | {"quantization_config": settings}, packed, dense


def test_a_checkpoint_in_shards_is_decoded(tmp_path):
    config, packed, dense = packed_model()
    source = write(tmp_path / "source", config, packed, max_file_bytes=20_000)
    assert len(list(source.glob("*.safetensors"))) > 3
    for param_dtype in ("bfloat16", "float32"):
        gpt, params = load_pretrained(source, param_dtype=param_dtype)
        save_pretrained(gpt.config, params, tmp_path / param_dtype)
        headers = safetensors_files.read_headers(tmp_path / param_dtype)
        assert headers.keys() == dense.keys()
        for name, array in dense.items():
            back = safetensors_files.read(headers[name])
            assert back.dtype == jnp.dtype(param_dtype)
            assert back.tobytes() == array.astype(param_dtype).tobytes(), name
        written = json.loads((tmp_path / param_dtype / "config.json").read_text())
        assert (written["dtype"], "quantization_config" in written) == (param_dtype, False)


DOWN = "model.layers.0.mlp.experts.down_proj"


@pytest.mark.parametrize(
    ("edit", "match"),
    [
        (lambda t: t.pop(f"{DOWN}_scales"), r"has the tensor \S+down_proj_blocks, but \S+down_proj_scales is missing"),
        (lambda t: t.pop(f"{DOWN}_blocks"), r"lacks the tensor layers\.0\.mlp\.experts\.down_proj \[3, 32, 64\]"),
        (lambda t: t.update({f"{DOWN}_blocks": t[f"{DOWN}_blocks"][..., :8].copy()}), "are not MXFP4, which has U8"),
        (lambda t: t.update({f"{DOWN}_scales": t[f"{DOWN}_scales"].astype(np.float32)}), "are not MXFP4, which has U8"),
        (lambda t: t.update({f"{DOWN}_scales": t[f"{DOWN}_scales"][:2].copy()}), "are not MXFP4, which has U8"),
        (lambda t: t.update({DOWN: np.zeros((3, 32, 64), np.float32)}), "twice, in MXFP4 and as it is"),
        (lambda t: t[f"{DOWN}_scales"].fill(255), r"down_proj has values that are not finite numbers"),
    ],
)
def test_damaged_pairs(edit, match, tmp_path):
    config, packed, _ = packed_model()
    edit(packed)
    source = write(tmp_path / "source", config, packed)
    with pytest.raises(UserError, match=match):
        load_pretrained(source)


def test_blocks_without_a_quantisation_have_no_place(tmp_path):
    config, packed, _ = packed_model()
    with pytest.raises(UserError, match=r"lacks the tensor layers\.0\.mlp\.experts\.down_proj "):
        load_pretrained(write(tmp_path / "source", config | {"quantization_config": None}, packed))


MEMORY = """
import sys
from pathlib import Path
from gptjax.interop.huggingface import export_workdir, import_workdir

def memory(key):
    return int(next(line for line in open("/proc/self/status") if line.startswith(key)).split()[1]) * 1024

direction, (small, source, parent) = sys.argv[1], map(Path, sys.argv[2:])

def convert(source, size):
    if direction == "import":
        import_workdir(str(source), parent / size, tokenizer="bytes")
        return parent / size
    export_workdir(parent / size, parent / f"{size}_out")
    return parent / f"{size}_out"

convert(small, "small")  # imports modules, and compiles
before = memory("VmRSS")
Path("/proc/self/clear_refs").write_text("5")  # resets the peak
size = sum(file.stat().st_size for file in convert(source, "large").rglob("*") if file.is_file())
print((memory("VmHWM") - before) / size, size)
"""


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="reads the peak memory from Linux")
def test_the_peak_memory_is_little_more_than_the_checkpoint(tmp_path):
    """In float32, of which MXFP4 is an eighth: all weights once, and no second copy of a large part."""
    config, packed, _ = packed_model()
    small = write(tmp_path / "source_small", config, packed)
    config, packed, _ = packed_model(
        hidden_size=512, intermediate_size=512, num_hidden_layers=8, num_local_experts=16, max_position_embeddings=128
    )
    source = write(tmp_path / "source", config, packed, max_file_bytes=20_000_000)
    del packed
    for direction in ("import", "export"):
        result = subprocess.run(
            [sys.executable, "-c", MEMORY, direction, small, source, tmp_path],
            env=os.environ | {"PYTHONPATH": str(ROOT)},
            cwd=ROOT,
            capture_output=True,
            text=True,
        )
        assert result.returncode == 0, result.stderr
        ratio, size = map(float, result.stdout.split())
        print(direction, "peak memory by size:", ratio)
        assert size > 4e8
        assert 0.2 < ratio < 1.3
