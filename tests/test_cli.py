"""The command line: help, resuming, and user errors: one line with culprit and fix, exit code 2, nothing written."""

import gzip
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks import fault_drill
from tests.commands import run_command

ROOT = Path(__file__).parents[1]
RUNLOCAL = "--config=configs/gpt2.py:runlocal"


def main(
    *arguments: object, workdir: Path | None = None, limits: str = "", fresh: bool = False
) -> subprocess.CompletedProcess:
    """Runs the command, under a shell's `ulimit` where there are limits."""
    flags = [*arguments] if workdir is None else [*arguments, f"--workdir={workdir}"]
    if not (limits or fresh):
        return run_command("gptjax.main", *flags)
    command = [sys.executable, "-m", "gptjax.main", *map(str, flags)]
    if limits:
        command = ["bash", "-c", f'ulimit {limits}; exec "$0" "$@"', *command]
    return subprocess.run(command, capture_output=True, text=True, cwd=ROOT)


def assert_one_line(result: subprocess.CompletedProcess, *words: str) -> None:
    assert result.returncode == 2, result.stderr
    lines = result.stderr.strip().splitlines()
    assert lines[-1].startswith("error: "), result.stderr
    assert "Traceback" not in result.stderr
    assert sum("error" in line for line in lines) == 1
    for word in words:
        assert word in lines[-1]
    assert "compiled" not in result.stdout


@pytest.mark.parametrize(
    "command", ["generate --prompt=x", "predict", "chat", "evaluate --tasks=lambada", "convert --to_hf=~/out"]
)
def test_a_tilde_is_the_home_directory(command, tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.json").write_text("[")
    name, *flags = command.split()
    result = run_command(f"gptjax.{name}", *flags, "--workdir=~/run", environment={"HOME": str(tmp_path)})
    assert_one_line(result, f"{tmp_path}/run/config.json")


@pytest.mark.parametrize("more_than_the_pipe_holds", [True, False])
def test_a_reader_that_ends_early_ends_the_command_without_a_traceback(more_than_the_pipe_holds: bool):
    print_lines = f"print('line\\n' * {100_000 if more_than_the_pipe_holds else 1})"
    program = f"import time; from gptjax import cli; cli.run(lambda: (time.sleep(0.5), {print_lines}))"
    command = 'set -o pipefail; "$0" -c "$1" | true'
    result = subprocess.run(["bash", "-c", command, sys.executable, program], capture_output=True, text=True, cwd=ROOT)
    assert (result.returncode, result.stderr) == (141, "")


def test_every_command_expands_the_paths_of_its_flags():
    for path in (ROOT / "gptjax").glob("*.py"):
        assert not re.search(r"\bPath\((str\()?[A-Z_]+\.value", path.read_text()), f"{path}: use gptjax.files.expand"


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([RUNLOCAL, "--config.model.num_layer=3"], ["model.num_layer", "did you mean 'model.num_layers'"]),
        ([RUNLOCAL, "--config.modle.num_layers=3"], ["modle.num_layers", "did you mean 'model'"]),
        ([RUNLOCAL, "--config.optimizer=3"], ["optimizer", "group", "peak_lr"]),
        ([RUNLOCAL, "--config.model.num_layers=many"], ["model.num_layers", "many"]),
        ([RUNLOCAL, "--config.model.dtype=float16"], ["model.dtype", "bfloat16"]),
        ([RUNLOCAL, "--config.model.num_heads=5"], ["model.num_heads=5", "embed_dim=192", "such as 4"]),
        ([RUNLOCAL, "--config.batch.tokens_per_batch=1000"], ["batch.tokens_per_batch=1000", "try 1024"]),
        ([RUNLOCAL, "--config.batch.epochs=2"], ["batch.total_tokens=700000 and batch.epochs=2.0: set exactly one"]),
        ([RUNLOCAL, "--config.seed=12345678901234567890"], ["seed=12345678901234567890", "64-bit"]),
        ([RUNLOCAL, "--config.lr=3e-4"], ["'lr'", "did you mean 'optimizer.peak_lr'"]),
        ([RUNLOCAL, "--config.seed"], ["--config.seed needs a value"]),
        ([RUNLOCAL, "--unknown=3"], ["unknown"]),
        ([RUNLOCAL, "extra"], ["'extra'"]),
        (["--config=configs/gpt2.py:sise=124m"], ["sise", "did you mean 'size'"]),
        (["--config=configs/gpt2.py:size=1b"], ["size '1b'", "124m, 355m, 774m, 1558m"]),
        (["--config=configs/gpt2.py:size"], ["size", "needs a value"]),
        (["--config=configs/none.py"], ["configs/none.py"]),
        ([], ["--config"]),
    ],
)
def test_mistakes_in_flags(arguments, words, tmp_path):
    assert_one_line(main(*arguments, workdir=tmp_path / "run"), *words)
    assert not (tmp_path / "run").exists()


def test_a_workdir_is_needed():
    assert_one_line(main(RUNLOCAL), "--workdir")


def write_bad_data(directory: Path) -> None:
    (directory / "empty.txt").write_text("")
    (directory / "short.jsonl").write_text(json.dumps({"text": "short"}) + "\n" + json.dumps({"text": "too"}) + "\n")
    (directory / "bad.jsonl").write_text(json.dumps({"text": "fine"}) + "\n{not json\n")
    (directory / "latin.txt").write_bytes(b"caf\xe9 " * 5000)
    (directory / "cut.txt.gz").write_bytes(gzip.compress(os.urandom(5000))[:2000])


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--config.data.source=text:{}/missing/*.txt"], ["data.source", "missing/*.txt"]),
        (["--config.data.source=text:{}/empty.txt"], ["empty.txt"]),
        (["--config.data.source=text:{}"], ["{}"]),
        (["--config.data.source=jsonl:{}/bad.jsonl"], ["bad.jsonl:2"]),
        (["--config.data.source=jsonl:{}/short.jsonl"], ["training tokens", "context of 128"]),
        (["--config.data.source=text:{}/latin.txt", "--config.data.invalid_utf8=error"], ["latin.txt"]),
        (["--config.data.source=text:{}/cut.txt.gz"], ["cut.txt.gz"]),
        (["--config.data.source=sootu"], ["data.source", "sootu"]),
        (["--config.data.tokenizer=gpt3"], ["data.tokenizer", "gpt3"]),
        (["--config.mesh.fsdp=3"], ["mesh.fsdp=3", "1 device"]),
        (["--config.init_from={}"], ["init_from", "{}", "config.json"]),
    ],
)
def test_mistakes_in_data_and_devices(arguments, words, tmp_path):
    write_bad_data(tmp_path)
    arguments = [argument.format(tmp_path) for argument in arguments]
    tokenizer = [] if any("tokenizer" in argument for argument in arguments) else ["--config.data.tokenizer=bytes"]
    result = main(
        RUNLOCAL, *tokenizer, f"--config.data.cache_dir={tmp_path}/cache", *arguments, workdir=tmp_path / "run"
    )
    assert_one_line(result, *(word.format(tmp_path) for word in words))


def test_an_unwritable_workdir(tmp_path):
    (tmp_path / "file").write_text("")
    assert_one_line(main(RUNLOCAL, workdir=tmp_path / "file" / "run"), "--workdir", "run")


@pytest.mark.slow
def test_what_a_run_compiles_is_kept(tmp_path, monkeypatch):
    monkeypatch.delenv("JAX_COMPILATION_CACHE_DIR")  # as users have it
    result = main(
        RUNLOCAL,
        *("--config.model.num_layers=1", "--config.model.embed_dim=48", "--config.batch.total_tokens=1024"),
        *("--config.data.tokenizer=bytes", f"--config.data.cache_dir={tmp_path}/cache"),
        *("--config.evaluation.max_tokens=1024", "--config.evaluation.sample_tokens=0"),
        workdir=tmp_path / "run",
        fresh=True,  # JAX reads the variable when it is imported
    )
    assert result.returncode == 0, result.stderr
    assert list((tmp_path / "cache" / "compiled").glob("*/jit_step-*-cache"))


@pytest.mark.slow
@pytest.mark.parametrize("config", ["gpt1", "gpt2", "gpt3"])
def test_every_config_runs_two_steps_locally(config, tmp_path):
    batch = 8 * 128
    result = main(
        f"--config=configs/{config}.py:runlocal",
        f"--config.batch.total_tokens={2 * batch}",
        "--config.evaluation.max_tokens=2048",
        "--config.evaluation.sample_tokens=4",
        "--config.logging.every_steps=1",
        workdir=tmp_path / "run",
    )
    assert result.returncode == 0, result.stderr
    assert "in 2 steps" in result.stdout
    records = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()[1:]]
    assert [(r["split"], r["step"]) for r in records] == [
        ("validation", 0),
        ("train", 1),
        ("train", 2),
        ("validation", 2),
    ]


def small_run(directory: Path) -> list[str]:
    """Flags of a run on a small corpus of its own."""
    text = directory / "text.jsonl"
    text.write_text("".join(json.dumps({"text": f"line {i} of the text"}) + "\n" for i in range(500)))
    settings = {
        "model.context_length": 16,
        "model.num_layers": 1,
        "data.source": f"jsonl:{text}",
        "data.tokenizer": "bytes",
        "data.cache_dir": directory / "cache",
        "batch.tokens_per_batch": 32,
        "evaluation.sample_tokens": 0,
    }
    return [RUNLOCAL, *(f"--config.{key}={value}" for key, value in settings.items())]


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> tuple[list[str], Path]:
    """The flags and the workdir of a run of 2 steps; nobody may change it."""
    directory = tmp_path_factory.mktemp("trained")
    flags = small_run(directory)
    result = main(*flags, "--config.batch.total_tokens=64", workdir=directory / "run")
    assert result.returncode == 0, result.stderr
    return flags, directory / "run"


def test_a_profile_is_written_and_none_unsets_a_key(tmp_path):
    flags = [*small_run(tmp_path), "--config.batch.total_tokens=None", "--config.batch.epochs=0.03"]
    result = main(*flags, "--config.model.embed_dim=12", "--profile", workdir=tmp_path / "run")
    assert result.returncode == 0, result.stderr
    assert list((tmp_path / "run" / "profile").rglob("*.xplane.pb"))
    assert json.loads((tmp_path / "run" / "config.json").read_text())["batch"]["total_tokens"] is None
    assert_one_line(main(RUNLOCAL, "--config.seed=None", workdir=tmp_path / "other"), "seed=None is not of type int")


COMMANDS = ("main", "generate", "chat", "serve", "evaluate", "predict", "convert", "plan", "replay")


@pytest.mark.parametrize("command", COMMANDS)
def test_help_lists_the_flags_of_the_command(command):
    arguments = [sys.executable, "-m", f"gptjax.{command}"]
    shown = subprocess.run([*arguments, "-h"], capture_output=True, text=True, cwd=ROOT)
    assert shown.returncode == 0, shown.stderr
    assert shown.stderr == ""
    source = (ROOT / "gptjax" / f"{command}.py").read_text()
    for name in re.findall(r'DEFINE_\w+\(\s*"(\w+)"', source):
        assert f"  --{name}\n" in shown.stdout
    assert ("--config.optimizer.peak_lr=" in shown.stdout) == ("ConfigFlag" in source)


def test_help_has_the_arguments_of_the_config_file_and_one_section_by_name():
    shown = main(RUNLOCAL, "--help")
    assert shown.returncode == 0, shown.stderr
    assert "size='124m', data='sotu', runlocal=False" in shown.stdout
    assert "--config.model.num_layers=4 (default 12)" in shown.stdout
    section = main("--help=optimizer")
    assert section.returncode == 0, section.stderr
    assert "--config.optimizer.peak_lr=0.0006" in section.stdout
    assert "--config.model" not in section.stdout
    assert_one_line(main("--help=optimiser"), "did you mean 'optimizer'")


def test_a_run_is_described_then_trained_then_resumed_by_its_workdir_alone(tmp_path):
    tokens = "--config.batch.total_tokens=64"
    described = main(*small_run(tmp_path), tokens, "--dry_run", workdir=tmp_path / "run")
    assert described.returncode == 0, described.stderr
    assert not (tmp_path / "run").exists()
    assert re.search(r"^data +495 documents, [\d,]+ tokens; the run reads them", described.stdout, re.MULTILINE)
    assert re.search(r"^held out +5 documents \(1 % of all\)", described.stdout, re.MULTILINE)
    assert "model.num_layers" in described.stdout
    assert "model.norm_eps" not in described.stdout  # it has its default
    for what in ("parameters", "compute", "memory"):
        assert re.search(rf"^{what} ", described.stdout, re.MULTILINE)

    assert_one_line(main(workdir=tmp_path / "run"), "--config", "no run to resume")
    trained = main(*small_run(tmp_path), tokens, workdir=tmp_path / "run")
    assert trained.returncode == 0, trained.stderr
    assert re.search(r"in 2 steps and \d+ (s|min \d+ s)\n", trained.stdout)
    assert re.search(r"best step 2: loss \d", trained.stdout)
    for name in ("config.json", "metrics.jsonl", "loss.png", "checkpoints/"):
        assert f"  {tmp_path}/run/{name}\n" in trained.stdout
    longer = "--config.batch.total_tokens=96"
    assert_one_line(main(longer, workdir=tmp_path / "run"), "batch.total_tokens: 64 -> 96", "--allow_config_changes")
    resumed = main(longer, "--allow_config_changes", workdir=tmp_path / "run")
    assert resumed.returncode == 0, resumed.stderr
    assert fault_drill.RESUMED.findall(resumed.stdout.encode()) == [b"2"]
    assert "in 3 steps" in resumed.stdout


@pytest.mark.slow
def test_a_full_disk_while_saving_loses_nothing(trained, tmp_path):
    flags = [*trained[0], "--allow_config_changes", f"--config.batch.total_tokens={32 * 4}"]
    workdir = shutil.copytree(trained[1], tmp_path / "run")
    full = main(*flags, workdir=workdir, limits="-f 1000")  # kB a file; a checkpoint's are larger
    assert full.returncode == 2, full.stderr
    last = full.stderr.strip().splitlines()[-1]
    assert last.startswith("error: cannot save in ")
    assert "File too large; the last good checkpoint is step 2" in last
    again = main(*flags, workdir=workdir)
    assert again.returncode == 0, again.stderr
    assert "in 4 steps" in again.stdout


@pytest.mark.slow
def test_a_disk_that_is_full_for_records_stops_the_run_with_one_line(trained, tmp_path):
    flags = [*trained[0], "--config.logging.every_steps=1", "--allow_config_changes"]
    workdir = shutil.copytree(trained[1], tmp_path / "run")
    # 80 kB a file, of which TensorBoard's is the first to be too large.
    full = main(*flags, "--config.batch.total_tokens=19200", workdir=workdir, limits="-f 80")
    assert full.returncode == 2, full.stderr
    last = full.stderr.strip().splitlines()[-1]
    assert last == "error: cannot write: File too large; free some space and run the same command again"
