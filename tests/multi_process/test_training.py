"""A run of two processes that is stopped and resumed in other layouts equals an uninterrupted run of one process."""

import json
import shutil
import signal
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

pytestmark = pytest.mark.slow

RESUME = Path(__file__).with_name("train_and_resume.py")
STEP = 2 * 4 * 16  # tokens
# Each process holds half the rows of a batch in the first, and all rows in the second.
MESHES = {"data": {"data": 4}, "tensor_context": {"data": 1, "tensor": 2, "context": 2}}
# float32 sums over processes are taken in another order than within one.
CLOSE = 1e-6


def flags(directory: Path) -> list[str]:
    """The config of a run of 6 steps of 2 microbatches, stopped after 3."""
    text, more = directory / "text.jsonl", directory / "more.jsonl"
    text.write_text("".join(json.dumps({"text": f"line {i} of the text, {i * i}"}) + "\n" for i in range(300)))
    more.write_text("".join(json.dumps({"text": f"{i} more lines"}) + "\n" for i in range(60)))
    settings = {
        "model.context_length": 16,
        "model.num_layers": 1,
        "model.num_heads": 2,
        "model.embed_dim": 16,
        "model.vocab_size": 260,
        "model.dtype": "float32",
        "model.residual_dropout": 0.1,
        "data.mixture": f"('jsonl:{text}', 2), ('jsonl:{more}', 1)",
        "data.tokenizer": "bytes",
        "data.cache_dir": directory / "cache",
        "batch.tokens_per_batch": STEP,
        "batch.microbatch_size": 4,
        "batch.total_tokens": 3 * STEP,
        "optimizer.schedule": "constant",
        "optimizer.peak_lr": 0.01,
        "evaluation.max_tokens": 512,
        "evaluation.sample_tokens": 0,
        "logging.every_steps": 1,
        "logging.tensorboard": "false",
    }
    return ["--config=configs/gpt2.py:runlocal", *(f"--config.{key}={value}" for key, value in settings.items())]


def metrics(workdir: Path) -> tuple[dict[str, Any], list[tuple[int, str]], list[float]]:
    """The header, and of the records step and split, and the losses."""
    header, *records = map(json.loads, (workdir / "metrics.jsonl").read_text().splitlines())
    return header["run"], [(r["step"], r["split"]) for r in records], [r["loss"] for r in records]


def by_index(lines: list[str]) -> dict[int, str]:
    return {json.loads(line)["index"]: line for line in lines}


@pytest.fixture(scope="module")
def runs(processes, tmp_path_factory) -> SimpleNamespace:
    """`half`: three steps in two processes; then runs that resume its copies, in two processes (`of_two`) or one."""
    directory = tmp_path_factory.mktemp("runs")
    half = directory / "half"
    results = processes("gptjax.main", *flags(directory), f"--workdir={half}").wait()
    assert [result.returncode for result in results] == [0, 0], results[0].stderr + results[1].stderr

    def files(name: str, resumed: dict[str, Any], new: dict[str, Any]) -> tuple[Path, dict[str, Path]]:
        workdirs = {mesh: directory / f"{name}_{mesh}" for mesh in resumed | new}
        for mesh in resumed:
            shutil.copytree(half, workdirs[mesh])
        entries = [
            {"like": str(half), "workdir": str(workdirs[mesh]), "mesh": axes, "tokens": 6 * STEP}
            for mesh, axes in (resumed | new).items()
        ]
        (path := directory / f"{name}.json").write_text(json.dumps(entries))
        return path, workdirs

    of_two, two = files("two", MESHES, {})
    of_one, one = files("one", MESHES, {"whole": MESHES["data"]})
    under_way = [processes(RESUME, f"--runs={of_two}"), processes(RESUME, f"--runs={of_one}", count=1, devices=4)]
    for result in [result for started in under_way for result in started.wait()]:
        assert result.returncode == 0, result.stderr
    return SimpleNamespace(directory=directory, half=half, outputs=[r.stdout for r in results], two=two, one=one)


def test_the_records_are_those_of_a_run_that_never_stopped(runs):
    header, places, losses = metrics(runs.two["data"])
    whole_header, whole_places, whole_losses = metrics(runs.one["whole"])
    assert (header["processes"], header["devices"]) == (2, "4 x cpu")
    assert (whole_header["processes"], whole_header["devices"]) == (1, "4 x cpu")
    # In addition a held-out loss where it stopped; no record twice.
    assert [place for place in places if place != (3, "validation")] == whole_places
    assert len(set(places)) == len(places) == len(whole_places) + 1
    kept = [loss for place, loss in zip(places, losses, strict=True) if place != (3, "validation")]
    assert kept == pytest.approx(whole_losses, rel=CLOSE)
    assert losses[-1] < losses[0] - 0.01


@pytest.mark.parametrize("mesh", MESHES)
def test_on_any_mesh_two_processes_go_on_as_one_does(runs, mesh):
    (_, places, losses), (_, one_places, one_losses) = metrics(runs.two[mesh]), metrics(runs.one[mesh])
    assert places == one_places
    assert losses == pytest.approx(one_losses, rel=CLOSE)


def test_only_process_0_prints(runs):
    assert "trained on 384 tokens in 3 steps" in runs.outputs[0]
    assert "Gloo" not in runs.outputs[0]
    assert runs.outputs[1] == ""


def test_generate_gives_the_text_of_one_process(runs, processes):
    command = ["gptjax.generate", f"--workdir={runs.half}", "--prompts=-", "--max_new_tokens=6", "--logprobs"]
    command.append("--mesh=fsdp=2,tensor=2")
    started = [processes(*command, stdin="line 3\nthe text\n", count=count, devices=4 // count) for count in (2, 1)]
    (two, silent), (one,) = (each.wait() for each in started)
    assert (two.returncode, silent.returncode, one.returncode) == (0, 0, 0), two.stderr + silent.stderr
    assert silent.stdout == ""
    lines, of_one = ([json.loads(line) for line in result.stdout.splitlines()] for result in (two, one))
    assert len(lines) == 2
    assert [line["tokens"] for line in lines] == [line["tokens"] for line in of_one]
    for line, other in zip(lines, of_one, strict=True):
        assert line["logprobs"] == pytest.approx(other["logprobs"], abs=1e-5)


def test_evaluate_gives_the_numbers_of_one_process_and_goes_on_with_its_scores(runs, processes):
    directory = runs.directory
    command = ["gptjax.evaluate", f"--workdir={runs.half}", "--tasks=perplexity", "--limit=20"]
    command.append(f"--source=jsonl:{directory / 'text.jsonl'}")
    two, silent = processes(*command, f"--output={directory / 'two.json'}").wait()
    assert (two.returncode, silent.returncode, silent.stdout) == (0, 0, ""), two.stderr + silent.stderr
    (scores,) = (runs.half / "evaluation" / "scores").iterdir()
    lines = scores.read_text().splitlines()
    assert len(by_index(lines)) == len(lines)
    # As if stopped half-way: process 0's file decides for both what is left to do.
    scores.write_text("\n".join(lines[: len(lines) // 2]) + "\n")
    again, _ = processes(*command, f"--output={directory / 'again.json'}").wait()
    assert again.returncode == 0, again.stderr
    assert by_index(scores.read_text().splitlines()) == by_index(lines)
    (one,) = processes(*command, f"--output={directory / 'one.json'}", count=1, devices=4).wait()
    assert one.returncode == 0, one.stderr
    reports = [json.loads((directory / f"{name}.json").read_text()) for name in ("two", "again", "one")]
    assert reports[0] == reports[1]
    values = [next(iter(report["results"].values()))["metrics"]["nats_per_token"]["value"] for report in reports]
    assert values[0] == pytest.approx(values[2], rel=CLOSE)


def test_a_config_that_differs_is_named_in_both(runs, processes, reason):
    each = {0: ["--config.optimizer.peak_lr=0.01"], 1: ["--config.optimizer.peak_lr=0.02"]}
    results = processes("gptjax.main", *flags(runs.directory), f"--workdir={runs.directory / 'new'}", each=each).wait()
    assert [result.returncode for result in results] == [2, 2]
    for result in results:
        assert "process 1 has config.optimizer.peak_lr=0.02, process 0 has config.optimizer.peak_lr=0.01" in reason(
            result
        )


def test_a_workdir_that_is_not_shared_is_named_in_both(runs, processes, reason):
    for number in (0, 1):
        (runs.directory / f"machine{number}").mkdir()
    config = Path("configs/gpt2.py").absolute()
    command = [flag.replace("configs/gpt2.py", str(config)) for flag in flags(runs.directory)]
    cwd = {number: runs.directory / f"machine{number}" for number in (0, 1)}
    results = processes("gptjax.main", *command, "--workdir=run", cwd=cwd).wait()
    assert [result.returncode for result in results] == [2, 2]
    for result in results:
        assert "run of process 1 is not the same directory as in process 0" in reason(result)
    assert not list(runs.directory.glob("machine*/run/*"))


def test_signalled_and_killed_a_run_goes_on_as_if_undisturbed(runs, processes, reason):
    disturbed, undisturbed = (runs.directory / name for name in ("disturbed", "undisturbed"))
    command = ["gptjax.main", *flags(runs.directory), "--allow_config_changes"]
    command.append(f"--config.checkpoint.every_tokens={4 * STEP}")
    for workdir in (disturbed, undisturbed):
        shutil.copytree(runs.half, workdir)

    def start(workdir: Path, steps: int) -> Any:
        return processes(*command, f"--config.batch.total_tokens={steps * STEP}", f"--workdir={workdir}")

    def newest() -> int:
        return max(int(path.name) for path in (disturbed / "checkpoints").iterdir() if path.name.isdecimal())

    # A signal to one: both save the same step.
    started = start(disturbed, 10**6)
    started.processes[0].wait_for("compiled the training step")
    started.processes[1].send_signal(signal.SIGTERM)
    results = started.wait()
    assert [result.returncode for result in results] == [75, 75], results[0].stderr + results[1].stderr
    step = newest()
    for result in results:
        said = result.stderr.splitlines()[-1]
        assert said == f"stopped by SIGTERM, step {step} is saved: the same command resumes"

    # One is killed: the other ends.
    started = start(disturbed, 10**6)
    first, second = started.processes
    while newest() <= step and first.poll() is None:
        time.sleep(0.01)
    second.kill()
    result, _ = started.wait()
    assert result.returncode == 1
    assert reason(result).startswith("error: process 1 died")

    steps = newest() + 3
    under_way = [start(disturbed, steps), start(undisturbed, steps)]
    for result in [result for each in under_way for result in each.wait()]:
        assert result.returncode == 0, result.stderr
    (_, *one), (_, *other) = (metrics(workdir) for workdir in (disturbed, undisturbed))
    assert one == other
