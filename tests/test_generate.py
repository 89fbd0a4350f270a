"""The command `gptjax.generate` on a workdir of a tiny random model."""

import importlib
import io
import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest
from absl import flags
from flax import linen as nn

from gptjax import config as c
from gptjax.checkpoint.manager import Checkpoints
from gptjax.config import UserError
from gptjax.data.tokenizers import BytesTokenizer
from gptjax.inference.engine import Engine
from gptjax.inference.sampling import Sampling
from gptjax.models.gpt import GPT
from gptjax.stages.trained_model import load_model
from tests.commands import run_command

ROOT = Path(__file__).parents[1]
MODEL = c.GPTConfig(vocab_size=257, context_length=32, num_layers=1, num_heads=2, embed_dim=16, dtype="float32")


@pytest.fixture(scope="module")
def workdir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("workdir")
    run = c.Config(model=MODEL, data=c.DataConfig(tokenizer="bytes"), batch=c.BatchConfig(epochs=1.0))
    (directory / "config.json").write_text(c.to_json(run))
    BytesTokenizer().save(directory / "tokenizer")
    params = nn.unbox(jax.jit(GPT(MODEL).init)(jax.random.key(0), jnp.zeros((1, 1), jnp.int32)))["params"]
    with Checkpoints(directory, run.checkpoint) as checkpoints:
        checkpoints.save_params(params)
    return directory


@pytest.fixture
def read_prompts(monkeypatch) -> Iterator[Callable[..., list[dict]]]:
    """`read_prompts(prompts=None, stdin=b"")`: what the command reads of a file or of standard input."""
    others = set(flags.FLAGS)
    module = importlib.import_module("gptjax.generate")

    def read(prompts: Path | None = None, stdin: bytes = b"") -> list[dict]:
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(stdin)))
        flags.FLAGS.unparse_flags()
        flags.FLAGS["prompts"].value = None
        flags.FLAGS(["generate", *([] if prompts is None else [f"--prompts={prompts}"])])
        return module.read_prompts()

    yield read
    for name in set(flags.FLAGS) - others:  # as other commands have flags of the same names
        delattr(flags.FLAGS, name)
    for name in ("gptjax.generate", "gptjax.cli"):
        sys.modules.pop(name, None)


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
def test_prompts_are_lines_that_end_in_a_line_end(read_prompts, tmp_path, encoding):
    texts = ["one\fpage", "two\u2028\u0085\v\x1c", "", "zwölf"]
    plain, lines = tmp_path / "prompts.txt", tmp_path / "prompts.jsonl"
    plain.write_bytes(("\r\n".join(texts) + "\n").encode(encoding))
    assert read_prompts(plain) == [{"prompt": text} for text in texts]
    objects = [json.dumps({"prompt": text, "id": i}, ensure_ascii=False) for i, text in enumerate(texts)]
    lines.write_bytes(("\n" + "\r\n \n".join(objects)).encode(encoding))
    assert read_prompts(lines) == [{"prompt": text, "id": i} for i, text in enumerate(texts)]
    assert read_prompts(stdin="one\r\nand two\r\n".encode(encoding)) == [{"prompt": "one\r\nand two"}]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.txt", b"one\ntw\xff\n", r"a\.txt:2 is not UTF-8 at byte 6"),
        ("a.jsonl", b'{"prompt": "x", "p": NaN}', r"a\.jsonl:1 is not JSON: NaN is not a JSON value"),
        ("a.jsonl", b"[" * 100_000, r"a\.jsonl:1 is not JSON"),
        ("a.jsonl", b"\n\n", r"a\.jsonl has no lines"),
    ],
)
def test_prompt_files_that_cannot_be_read(read_prompts, tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=message):
        read_prompts(tmp_path / name)


def test_seeds_of_any_size(workdir):
    result = generate(workdir, "--prompt=x", "--seed=12345678901234567890", "--max_new_tokens=2", "--logprobs")
    assert result.returncode == 0, result.stderr.decode()
    assert json.loads(result.stdout)["seed"] == 12345678901234567890


def generate(workdir: Path | None, *arguments: str, stdin: str = "") -> subprocess.CompletedProcess:
    flags = [*arguments] if workdir is None else [*arguments, f"--workdir={workdir}"]
    return run_command("gptjax.generate", *flags, stdin=stdin, text=False)


def test_one_prompt_is_text_and_several_are_json_lines(workdir, tmp_path):
    trained = load_model(workdir)
    engine = Engine(trained.model, trained.params, trained.tokenizer, trained.mesh)

    def text(prompt: str, seed: int) -> str:
        return engine.generate([prompt], 8, Sampling(0.7, top_k=5), seeds=seed, ignore_end_of_text=True)[0].text

    flags = ("--max_new_tokens=8", "--temperature=0.7", "--top_k=5", "--seed=3", "--ignore_end_of_text")
    streamed = generate(workdir, *flags, stdin="a prompt\n")
    assert streamed.returncode == 0, streamed.stderr.decode()
    assert streamed.stdout.decode() == "a prompt" + text("a prompt", 3) + "\n"

    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text('{"prompt": "one", "id": 7}\n{"prompt": "zwölf"}\n')
    output = tmp_path / "out.jsonl"
    written = generate(
        workdir, *flags, f"--prompts={prompts}", "--num_samples=2", "--batch_size=3", "--logprobs", f"--output={output}"
    )
    assert written.returncode == 0, written.stderr.decode()
    lines = [json.loads(line) for line in output.read_text().splitlines()]
    assert [(line["prompt"], line["seed"], line.get("id")) for line in lines] == [
        ("one", 3, 7),
        ("one", 4, 7),
        ("zwölf", 5, None),
        ("zwölf", 6, None),
    ]
    assert [line["text"] for line in lines] == [text(line["prompt"], line["seed"]) for line in lines]
    assert all(len(line["tokens"]) == len(line["logprobs"]) == line["num_tokens"] == 8 for line in lines)
    assert {line["finish_reason"] for line in lines} == {"length"}


@pytest.mark.slow
def test_continuous_batching_writes_the_same_completions(workdir, tmp_path):
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("one\nzwölf and more\nx\n")
    arguments = (f"--prompts={prompts}", "--num_samples=2", "--max_new_tokens=8", "--batch_size=2", "--seed=3")
    static, continuous = (generate(workdir, *arguments, f"--batching={kind}") for kind in ("static", "continuous"))
    assert static.returncode == continuous.returncode == 0, continuous.stderr.decode()
    assert len(static.stdout.splitlines()) == 6
    assert continuous.stdout == static.stdout


def test_beams(workdir):
    result = generate(workdir, "--prompt=x", "--num_beams=3", "--num_samples=2", "--max_new_tokens=6", "--logprobs")
    assert result.returncode == 0, result.stderr.decode()
    lines = [json.loads(line) for line in result.stdout.decode().splitlines()]
    assert len(lines) == 2
    assert lines[0]["tokens"] != lines[1]["tokens"]
    assert sum(lines[0]["logprobs"]) / lines[0]["num_tokens"] > sum(lines[1]["logprobs"]) / lines[1]["num_tokens"]
    assert "seed" not in lines[0]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--prompt=x", "--max_new_tokens=32"], ["prompt 1", "32", "--overflow=slide"]),
        (["--prompt=x", "--top_p=3"], ["top_p=3.0", "(0, 1]"]),
        (["--prompt=x", "--num_beams=2", "--top_k=5"], ["--top_k", "--num_beams"]),
        (["--prompt=x", "--num_beams=2", "--num_samples=3"], ["--num_samples=3", "--num_beams=2"]),
        (["--prompt=x", "--prompts=y"], ["--prompt", "exclude"]),
        (["--prompt=x", "--batching=continuous", "--num_beams=2"], ["--batching=continuous", "--num_beams"]),
        (["--prompts=/nowhere"], ["/nowhere", "No such file"]),
        (["--prompt=x", "--mesh=tensr=2"], ["tensr", "did you mean 'tensor'"]),
        (["--prompt=x", "--output=/nowhere/out.jsonl"], ["/nowhere"]),
        (["--prompt=x", "--output=/"], ["--output=/ is a directory"]),
    ],
)
def test_mistakes_are_one_line(workdir, arguments, words):
    result = generate(workdir, *arguments)
    assert result.returncode == 2
    (line,) = result.stderr.decode().strip().splitlines()
    assert line.startswith("error: ")
    for word in words:
        assert word in line


def test_a_bad_line_of_a_prompt_file_is_named(workdir, tmp_path):
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text('{"prompt": "one"}\n{"text": "two"}\n')
    result = generate(workdir, f"--prompts={prompts}")
    assert result.returncode == 2
    assert f'{prompts}:2: a line must be an object with a text "prompt"' in result.stderr.decode()


def test_an_empty_prompt_starts_a_document(workdir):
    flags = (f"--workdir={workdir}", "--prompt=", "--temperature=0", "--ignore_end_of_text")
    result = run_command("gptjax.generate", *flags)
    assert result.returncode == 0, result.stderr
    trained = load_model(workdir)
    engine = Engine(trained.model, trained.params, trained.tokenizer, trained.mesh)
    wanted = engine.generate([[trained.tokenizer.end_of_text]], 31, Sampling(0.0), ignore_end_of_text=True)[0]
    assert result.stdout == wanted.text + "\n"


@pytest.mark.parametrize("command", ["generate --prompt=x", "evaluate --tasks=perplexity", "convert --to_hf=out"])
def test_the_checkpoint_to_read_can_be_chosen(workdir, command):
    name, *flags = command.split()
    result = run_command(f"gptjax.{name}", f"--workdir={workdir}", *flags, "--step=7")
    assert result.returncode == 2
    assert "there is no checkpoint 7 in" in result.stderr
    both = run_command(f"gptjax.{name}", f"--workdir={workdir}", *flags, "--step=0", "--best")
    assert both.stderr.splitlines()[-1] == "error: --step=0 and --best exclude each other"
