"""`python -m gptjax.plan`: user errors in its flags, and a plan for simulated CPU devices."""

import importlib.util
import json
import subprocess
from pathlib import Path

import pytest

from gptjax.config import DataConfig, UserError
from gptjax.data.tokenizers import get_tokenizer, vocab_size
from gptjax.planning.topology import check_libtpu, parse_topology
from tests.commands import run_command

ROOT = Path(__file__).parents[1]
TINY = """
from gptjax import config as c
from tests.commands import run_command

def get_config(arg=None):
    return c.config_dict(c.Config(
        model=c.GPTConfig(context_length=128, num_layers=2, num_heads=2, embed_dim=64, dtype="float32"),
        data=c.DataConfig(tokenizer="bytes"),
        batch=c.BatchConfig(total_tokens=100_000, tokens_per_batch=8 * 128, microbatch_size=4),
    ))
"""


@pytest.fixture(scope="module")
def home(tmp_path_factory) -> Path:
    directory = tmp_path_factory.mktemp("home")
    (directory / "tiny.py").write_text(TINY)
    return directory


def plan(home: Path, *arguments: object) -> subprocess.CompletedProcess:
    return run_command("gptjax.plan", f"--config={home / 'tiny.py'}", *arguments, environment={"HOME": str(home)})


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--search"], ["--search", "need --topology=CHIP:SHAPE"]),
        ([], ["model.dtype=float32", "--config.model.dtype=bfloat16"]),
        (["--topology=v9:2x2"], ["--topology=v9:2x2", "unknown chip 'v9'", "v4, v5e, v5p, v6e"]),
        (["--topology=cpu:4", "--search"], ["--search", "a TPU topology"]),
        (["--topology=all", "--decode"], ["--decode", "in place of --topology=all"]),
        (["--topology=all"], ["model.dtype=float32", "--config.model.dtype=bfloat16"]),
        (
            ["--topology=cpu:4", "--config.stage=reward"],
            ["a run of stage reward cannot be planned"],
        ),
        (["--topology=cpu:4", "--config.mesh.fsdp=3"], ["fsdp=3", "4 device(s)"]),
        (["--topology=cpu:4", "--config.model.vocab_size=100"], ["model.vocab_size=100", "257 tokens"]),
        (["--topology=cpu:4", "--config.mesh.data=1", "--config.mesh.tensor=4"], ["model.num_heads=2", "tensor=4"]),
    ],
)
def test_user_errors_are_one_line(home, arguments, words):
    result = plan(home, *arguments)
    assert result.returncode == 2, result.stderr
    last = result.stderr.strip().splitlines()[-1]
    assert last.startswith("error: ")
    assert "Traceback" not in result.stderr
    for word in words:
        assert word in last
    assert not (home / ".cache/gptjax/plans").exists()


OF_IMAGES = (f"--config={ROOT / 'configs/gpt4.py'}:runlocal", "--config.data.tokenizer=bytes")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([], ["planned for one --topology"]),
        (["--topology=v5e:2x2", "--search"], ["all weights trained: leave out init_from, peft"]),
        (
            ["--topology=cpu:2", "--config.stage=reward"],
            ["stage reward cannot be planned: plan supervised fine-tuning"],
        ),
    ],
)
def test_user_errors_of_a_model_that_reads_images(home, arguments, words):
    result = run_command("gptjax.plan", *OF_IMAGES, *arguments, environment={"HOME": str(home)})
    assert result.returncode == 2, result.stderr
    for word in words:
        assert word in result.stderr.strip().splitlines()[-1]


@pytest.mark.slow
def test_a_step_with_images_is_planned(home):
    flags = ("--topology=cpu:2", "--nocache", "--json=-", "--config.model.num_layers=1")
    result = run_command("gptjax.plan", *OF_IMAGES, *flags, environment={"HOME": str(home)})
    assert result.returncode == 0, result.stderr
    tree = json.loads(result.stdout)
    assert tree["images_per_row"] == 128 // (4 + 1)
    assert tree["flops_per_image"] > 0
    memory, rows = tree["memory"], 8 // 2  # of each device
    state = memory["parameters"] + memory["optimizer"]
    batch = rows * (128 * 5 * 4 + 25 * 3 * 8 * 8)  # five arrays of four bytes a position, and the images
    assert memory["arguments"] - state == pytest.approx(batch, abs=256)


def test_a_missing_libtpu_is_named_with_the_command_to_install_it(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"needs libtpu, .*: pip install 'gptjax\[tpu\]'"):
        check_libtpu(parse_topology("v5e:2x2"))
    check_libtpu(parse_topology("cpu:8"))


def test_layouts_by_formula_need_no_topology_and_no_libtpu(home):
    arguments = ("--config.model.dtype=bfloat16", "--decode", "--json=-")
    run = plan(home, *arguments)
    assert run.returncode == 0, run.stderr
    tree = json.loads(run.stdout)
    assert set(tree) >= {"v5e:1x1", "v5p:2x2x1", "v6e:16x16"}
    assert tree["v5e:1x1"]["training"] is None  # not with --decode
    assert tree["v5e:1x1"]["generation"]["mesh"]["data"] == 1
    assert tree["v5e:16x16"]["generation"]["batch"] > tree["v5e:1x1"]["generation"]["batch"]
    assert not (home / ".cache/gptjax/plans").exists()


def test_a_plan_is_printed_written_and_cached(home):
    arguments = ("--topology=cpu:4", "--config.mesh.data=2", "--config.mesh.fsdp=2", f"--json={home / 'plan.json'}")
    first = plan(home, *arguments)
    assert first.returncode == 0, first.stderr
    assert "cpu:4: 4 devices, mesh data 2 x fsdp 2, microbatch 4 x 2, remat none" in first.stdout
    assert "all-gather over fsdp" in first.stdout
    numbers = json.loads((home / "plan.json").read_text())
    assert numbers["vocab_size"] == 257
    memory = numbers["memory"]
    assert memory["arguments"] > memory["parameters"] + memory["optimizer"] > 0
    assert "estimate" not in numbers  # a CPU has no published peaks

    (cached,) = (home / ".cache/gptjax/plans").iterdir()
    tree = json.loads(cached.read_text())
    tree["result"]["seconds"] = 12345.6  # the second plan must print the cached number
    cached.write_text(json.dumps(tree))
    again = plan(home, *arguments[:3], "--json=-")
    assert json.loads(again.stdout)["compile_seconds"] == 12345.6
    assert json.loads(again.stdout)["memory"] == memory


@pytest.mark.parametrize("spec", ["gpt2", "cl100k_base", "cl100k", "bytes"])
def test_vocab_size_of_a_name_is_the_tokenizers(spec, tmp_path):
    cache = Path(DataConfig.cache_dir).expanduser()
    tokenizer = get_tokenizer(spec, train_documents=list, corpus_fingerprint="", cache_dir=cache)
    assert vocab_size(spec) == tokenizer.vocab_size


def test_vocab_size_of_a_trained_tokenizer_is_the_requested_size():
    assert (vocab_size("bpe:4096"), vocab_size("gpt1_bpe:2000")) == (4096, 2000)
    with pytest.raises(UserError, match="unknown tokenizer 'gpt3'"):
        vocab_size("gpt3")
