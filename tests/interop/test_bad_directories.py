"""Directories that cannot be imported: one line that names the culprit and the fix, and nothing written."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from gptjax.config import UserError
from gptjax.interop import safetensors_files
from gptjax.interop.huggingface import export_workdir, import_workdir
from gptjax.interop.safetensors_files import Declared
from tests.commands import run_command
from tests.interop.write_fixtures import FIXTURES

ROOT = Path(__file__).parents[2]


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """A good directory, to be spoilt; a tokenizer is lacking."""
    directory = tmp_path / "source"
    shutil.copytree(FIXTURES / "gpt2", directory)
    return directory


def refused(source: Path, match: str, **arguments: str) -> None:
    """Importing raises one line that matches, and leaves nothing."""
    before = sorted(source.parent.iterdir())
    with pytest.raises(UserError, match=match) as caught:
        import_workdir(str(source), source.parent / "run", **({"tokenizer": "bytes"} | arguments))
    assert "\n" not in str(caught.value)
    assert sorted(source.parent.iterdir()) == before


def set_config(directory: Path, **changes: object) -> None:
    path = directory / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def edit_tensors(directory: Path, edit: Callable[[dict[str, np.ndarray]], object], **settings: int) -> None:
    """Rewrites the weights as `edit` leaves their dict of arrays."""
    headers = safetensors_files.read_headers(directory)
    tensors = {name: safetensors_files.read(tensor) for name, tensor in headers.items()}
    edit(tensors)
    for path in directory.glob("*.safetensors*"):
        path.unlink()
    declared = [Declared(name, "F32", array.shape) for name, array in tensors.items()]
    safetensors_files.write(directory, declared, iter(tensors.values()), **settings)


C_FC = "transformer.h.1.mlp.c_fc.weight"


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"model_type": "gptj"}, r"config.json: model_type='gptj' is not supported: one of openai-gpt, gpt2, gpt_neo"),
        ({"model_type": None}, "model_type=None is not supported"),
        (
            {"scale_attn_by_inverse_layer_idx": True},
            "scale_attn_by_inverse_layer_idx=true is not supported: only false",
        ),
        ({"add_cross_attention": True}, "add_cross_attention=true is not supported: only false"),
        ({"tie_word_embeddings": False}, r"source lacks the tensor lm_head\.weight \[263, 12\]"),
        ({"quantization_config": {"bits": 4}}, r"quantization_config=.*4.* is not supported: only null"),
        ({"auto_map": {"AutoModelForCausalLM": "code.Model"}}, "auto_map names custom model code"),
        ({"activation_function": "mish"}, "activation_function='mish' is not supported: one of gelu_new"),
        ({"n_layer": "3"}, 'n_layer="3" is not of type int'),
        ({"n_layer": True}, "n_layer=true is not of type int"),
        ({"n_head": 5}, "num_heads=5 does not divide"),
        ({"n_layer": 4}, r"lacks the tensor h\.3\.\S+ \[.*its config\.json \(gpt2, 4 layers\) requires"),
        (
            {"n_layer": 2},
            r"has the tensor h\.2\.\S+ \[.*no place in a gpt2 of 2 layers",
        ),
        ({"vocab_size": 264}, r"the tensor wte\.weight has shape \[263, 12\], but config.json requires \[264, 12\]"),
        ({"n_positions": 14}, r"the tensor wpe\.weight has shape \[13, 12\], but config.json requires \[14, 12\]"),
    ],
)
def test_configs(source, changes, match):
    set_config(source, **changes)
    refused(source, match)


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"attention_types": [[["global", "sparse"], 2]], "attention_layers": None}, "not a list of global and local"),
        ({"attention_types": [[["global"], 4]]}, "attention_layers and attention_types contradict each other"),
        ({"attention_types": [[["global"], 3]], "attention_layers": None}, "is for 3 layers, but num_layers=4"),
        ({"attention_types": 7, "attention_layers": None}, "not a list of global and local"),
    ],
)
def test_configs_of_gpt_neo(tmp_path, changes, match):
    shutil.copytree(FIXTURES / "gpt_neo", tmp_path / "source")
    set_config(tmp_path / "source", **changes)
    refused(tmp_path / "source", match)


@pytest.mark.parametrize("content", [None, "{broken", "[]", "\xff"])
def test_config_files(source, content):
    path = source / "config.json"
    path.unlink()
    if content is not None:
        path.write_bytes(content.encode("latin-1"))
    refused(source, "config.json")


@pytest.mark.parametrize(
    ("edit", "match"),
    [
        (lambda t: t.pop(C_FC), r"source lacks the tensor h\.1\.mlp\.c_fc\.weight \[12, 48\]"),
        (lambda t: t.update(score=np.zeros((2, 12), np.float32)), r"model\.safetensors has the tensor score \[2, 12\]"),
        (lambda t: t.update({C_FC: t[C_FC].T.copy()}), r"c_fc\.weight has shape \[48, 12\], .* requires \[12, 48\]"),
        (
            lambda t: t.update({"wte.weight": t["transformer.wte.weight"]}),
            r"wte\.weight twice, with and without 'transf",
        ),
        (lambda t: t[C_FC].__setitem__((3, 4), np.nan), r"h\.1\.mlp\.c_fc\.weight has values that are not finite"),
        (
            lambda t: t.update({"lm_head.weight": t["transformer.wte.weight"] + np.float32(1e-3)}),
            r"lm_head\.weight \[263, 12\] is not the same as wte\.weight .*says tie_word_embeddings=true",
        ),
        (
            lambda t: t.update({"lm_head.weight": np.zeros((9, 12), np.float32)}),
            r"lm_head\.weight \[9, 12\] is not the",
        ),
    ],
)
def test_tensors(source, edit, match):
    edit_tensors(source, edit)
    refused(source, match)


def test_integers(source):
    file = source / "model.safetensors"
    file.write_bytes(file.read_bytes().replace(b'c_fc.weight":{"dtype":"F32"', b'c_fc.weight":{"dtype":"I32"'))
    refused(source, r"the tensor h\.\d\.mlp\.c_fc\.weight is of dtype I32: save it as one of F32, F16, BF16")


def header(changes: dict[str, object]) -> Callable[[bytes], bytes]:
    """Changes the entry of the token embedding in the header."""

    def edit(content: bytes) -> bytes:
        length = int.from_bytes(content[:8], "little")
        tensors = json.loads(content[8 : 8 + length])
        tensors["transformer.wte.weight"] |= changes
        text = json.dumps(tensors).encode()
        return len(text).to_bytes(8, "little") + text + content[8 + length :]

    return edit


@pytest.mark.parametrize(
    ("spoil", "match"),
    [
        (
            lambda b: b[:-10],
            r"model\.safetensors is cut off: the tensor transformer\.\S+ .* ends at byte \d+, the file at",
        ),
        (lambda b: b[:50], "model.safetensors is not a safetensors file, or is cut off in its header"),
        (lambda b: b[:3], "not a safetensors file"),
        (lambda b: b"", "not a safetensors file"),
        (lambda b: b"version https://git-lfs.github.com/spec/v1\n" * 4, "not a safetensors file"),
        (lambda b: b[:8] + b"x" + b[9:], "damaged header"),
        (header({"shape": [263, -12]}), "damaged header: the tensor transformer.wte.weight"),
        (
            header({"shape": [263, 13]}),
            r"the tensor transformer\.wte\.weight \[263, 13\] of F32 does not fill its 12624 b",
        ),
        (header({"data_offsets": [0, 2**60]}), r"transformer\.wte\.weight \[263, 12\] of F32 does not fill"),
        (header({"dtype": ["F32"]}), "damaged header: the tensor transformer.wte.weight"),
    ],
)
def test_damaged_files(source, spoil, match):
    file = source / "model.safetensors"
    file.write_bytes(spoil(file.read_bytes()))
    refused(source, match)


def test_indices(source):
    edit_tensors(source, lambda tensors: None, max_file_bytes=5000)
    index = source / "model.safetensors.index.json"
    good = json.loads(index.read_text())
    first, last = min(good["weight_map"].values()), max(good["weight_map"].values())

    def refused_with(weight_map: object, match: str) -> None:
        index.write_text(json.dumps({"weight_map": weight_map}))
        refused(source, match)

    for file in ("../source/model.safetensors", "/etc/model.safetensors", "..", "a\\b.safetensors", "x.bin", 3):
        refused_with(
            good["weight_map"] | {"transformer.wte.weight": file},
            r"transformer\.wte\.weight in .* not the name of a file",
        )
    refused_with(good["weight_map"] | {"other": first}, rf"{first} lacks the tensor other, which .*index\.json lists")
    refused_with({}, r"source lacks the tensor")
    refused_with([], r"cannot read .*index\.json")
    without = {name: file for name, file in good["weight_map"].items() if name != "transformer.h.0.ln_1.bias"}
    refused_with(without, r"has the tensor transformer\.h\.0\.ln_1\.bias, which .*index\.json does not list for it")
    index.write_text(json.dumps(good))
    (source / last).unlink()
    refused(source, rf"{last}, named in model\.safetensors\.index\.json, is missing")


def test_pickles(source):
    (source / "model.safetensors").rename(source / "pytorch_model.bin")
    refused(source, r"its pytorch_model\.bin is not read, as a pickle .* convert it .*save_pretrained")
    (source / "pytorch_model.bin").unlink()
    refused(source, r"has neither model\.safetensors nor model\.safetensors\.index\.json")


def test_tokenizers(source):
    with pytest.raises(UserError, match=r"neither tokenizer\.json nor .* --tokenizer=gpt2 or --tokenizer=json:PATH"):
        import_workdir(str(source), source.parent / "run")
    refused(
        source, "the tokenizer has 50257 tokens, but the model in .*source a vocab_size of only 263", tokenizer="gpt2"
    )
    refused(source, "--tokenizer=bpe:4096 is a tokenizer to train", tokenizer="bpe:4096")
    refused(source, "unknown tokenizer 'gpt9'", tokenizer="gpt9")


def test_targets_that_exist(source):
    target = source.parent / "target"
    target.mkdir()
    import_workdir(str(source), target, tokenizer="bytes")  # an empty directory will do
    files = sorted(target.rglob("*"))
    with pytest.raises(UserError, match="target exists already: name a new directory, or remove it"):
        import_workdir(str(source), target, tokenizer="bytes")
    with pytest.raises(UserError, match="source exists already"):
        export_workdir(target, source)
    assert sorted(target.rglob("*")) == files
    with pytest.raises(UserError, match=r"config\.json exists already"):
        import_workdir(str(source), source / "config.json", tokenizer="bytes")


def test_sources_that_do_not_exist(tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    with pytest.raises(UserError, match=r"there is no directory tests/missing$"):  # not sought on the Hub
        import_workdir("tests/missing", tmp_path / "run")
    with pytest.raises(UserError, match=r"there is no directory .*/missing$"):
        import_workdir(str(tmp_path / "missing"), tmp_path / "run")
    with pytest.raises(UserError, match=r"missing is not a workdir: it has no config\.json"):
        export_workdir(tmp_path / "missing", tmp_path / "out")
    assert not list(tmp_path.iterdir())


def convert(*flags: object, limits: str = "") -> str:
    """Standard error's one line of a command that fails with exit code 2."""
    if limits:
        command = [sys.executable, "-m", "gptjax.convert", *map(str, flags)]
        command = ["bash", "-c", f'ulimit {limits}; exec "$0" "$@"', *command]
        environment = os.environ | {"HF_HUB_OFFLINE": "1"}
        result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=environment)
    else:
        result = run_command("gptjax.convert", *flags, environment={"HF_HUB_OFFLINE": "1"})
    assert result.returncode == 2, result.stderr
    # Where orbax's writes fail, its other threads may print that they were cut off.
    assert limits or "Traceback" not in result.stderr
    (line,) = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
    return line


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ([], "needs --workdir=DIR and one of --from_hf=DIR, --from_peft=DIR"),
        (["--workdir=a"], "one of --from_hf"),
        (["--workdir=a", "--from_hf=b", "--to_hf=c"], "one of --from_hf"),
        (["--workdir=a", "--to_hf=c", "--dtype=float32"], "--dtype, --param_dtype and --tokenizer are for"),
        (["--workdir=a", "--to_hf=c", "--param_dtype=float32"], "--dtype, --param_dtype and --tokenizer are for"),
        (["--workdir=a", "--from_hf=b", "--dtype=float16"], "float16"),
        (["--workdir=a", "--from_hf=no/such-model"], "there is no directory no/such-model, and no model of that name"),
    ],
)
def test_mistakes_in_flags(flags, words):
    assert words in convert(*flags)


@pytest.mark.slow
def test_a_full_disk(source):
    """Neither direction leaves a part of what it was to write.

    Orbax divides the weights among files by when its threads arrive, so the limit (8 KiB) is below the size of
    one array (the token embedding: 263 rows of 12 float32), and above that of the files written before it.
    """
    run, out = source.parent / "run", source.parent / "out"
    line = convert(f"--from_hf={source}", f"--workdir={run}", "--tokenizer=bytes", limits="-f 8")
    assert "cannot save in " in line or "cannot write " in line
    import_workdir(str(source), run, tokenizer="bytes")
    assert "out: File too large" in convert(f"--workdir={run}", f"--to_hf={out}", limits="-f 8")
    assert sorted(path.name for path in source.parent.iterdir()) == ["run", "source"]
