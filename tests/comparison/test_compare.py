"""Comparisons of runs whose metrics are written by the test: groups, paired tests, tables, curves, damaged files."""

import csv
import dataclasses
import io
import json
import math
from pathlib import Path

import numpy as np
import pytest
from scipy import stats

from gptjax import config as c
from gptjax.comparison.curves import draw_page, draw_png, group_curve
from gptjax.comparison.paired import paired_difference
from gptjax.comparison.runs import Quantity, choose_quantity, group_runs, read_runs
from gptjax.comparison.tables import comparison_table, runs_csv
from gptjax.config import UserError
from tests.commands import run_command

LOSS = Quantity("validation", "loss")
CONFIG = c.load_config("configs/gpt2.py:runlocal")


def write_run(workdir: Path, lr: float, seed: int, losses: list[float], **settings: str) -> Path:
    """A workdir whose validations, every 1,000 tokens, had these losses."""
    workdir.mkdir(parents=True)
    config = c.load_config("configs/gpt2.py:runlocal", {"optimizer.peak_lr": lr, "seed": seed, **settings})
    (workdir / "config.json").write_text(c.to_json(config))
    lines: list[dict] = [{"run": {"parameters": 10, "trained_parameters": 10, "flops_per_token": 60.0}}]
    for i, loss in enumerate(losses):
        place = {"step": 10 * i, "tokens": 1000 * i, "seconds": 2.0 * i}
        lines.append({**place, "split": "validation", "loss": loss, "accuracy": -loss})
        lines.append({**place, "split": "train", "loss": loss + 0.1, "tokens_per_second": 100.0 + seed})
    (workdir / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return workdir


@pytest.fixture
def workdirs(tmp_path):
    """Three seeds of two learning rates; the second is better by 0.5, with noise that pairing removes."""
    return [
        write_run(tmp_path / f"lr{lr}-{seed}", lr, seed, [9.0, 5.0, 4.0 - gain + 0.3 * seed + 0.01 * lr * seed])
        for lr, gain in ((1.0, 0.0), (2.0, 0.5))
        for seed in range(3)
    ]


def notes(text: str) -> None:
    raise AssertionError(text)


def test_groups_differ_in_the_config_but_not_in_the_seed(workdirs):
    runs = read_runs(workdirs, notes)
    groups = group_runs(runs, notes)
    assert [group.settings for group in groups] == [{"optimizer.peak_lr": "1.0"}, {"optimizer.peak_lr": "2.0"}]
    assert [list(group.runs) for group in groups] == [[0, 1, 2]] * 2
    measured = groups[0].measured(lambda run: run.final(LOSS))
    assert measured.value == pytest.approx(4.31)
    assert measured.stderr == pytest.approx(0.31 / math.sqrt(3))
    assert runs[0].best(LOSS) == 4.0
    assert runs[0].best(Quantity("validation", "accuracy")) == -4.0  # higher is better
    assert runs[2].speed() == 102.0


def test_where_data_is_kept_and_what_is_logged_makes_no_other_group(tmp_path):
    one = write_run(tmp_path / "one", 1.0, 0, [3.0])
    other = write_run(tmp_path / "other", 1.0, 1, [4.0], **{"data.cache_dir": "/elsewhere", "logging.every_steps": "3"})
    (group,) = group_runs(read_runs([one, other], notes), notes)
    assert group.label == "one"


def test_the_table_and_the_csv(workdirs):
    groups = group_runs(read_runs(workdirs, notes), notes)
    lines = comparison_table(groups, LOSS).splitlines()
    assert lines[0] == "validation loss, lower is better: mean ± standard error over seeds"
    assert lines[2].split() == ["optimizer.peak_lr", "seeds", "tokens", "final", "best", "tokens/s"]
    assert lines[3].split() == ["1.0", "3", "2,000", "4.3100", "±", "0.1790", "4.3100", "±", "0.1790", "101"]
    assert lines[6].startswith("differences of the final values from optimizer.peak_lr=2.0, the best mean")
    assert lines[7].split()[:2] == ["optimizer.peak_lr=1.0", "+0.4900"]
    assert "WITHIN NOISE" not in lines[7]
    without_times = comparison_table(groups, LOSS, speed=False)
    assert "101" not in without_times
    rows = list(csv.DictReader(io.StringIO(runs_csv(groups, LOSS))))
    assert [row["seed"] for row in rows] == ["0", "1", "2"] * 2
    assert float(rows[2]["final"]) == 4.0 + 0.6 + 0.02
    assert "tokens_per_second" not in runs_csv(groups, LOSS, speed=False)


def test_the_baseline_can_be_chosen(workdirs):
    groups = group_runs(read_runs(workdirs, notes), notes)
    table = comparison_table(groups, LOSS, baseline="optimizer.peak_lr=1.0")
    assert "optimizer.peak_lr=2.0  -0.4900" in table
    with pytest.raises(UserError, match=r"--baseline=optimizer.peak_lr=3.0 is none of the groups: did you mean"):
        comparison_table(groups, LOSS, baseline="optimizer.peak_lr=3.0")


def test_a_difference_within_noise_is_named(tmp_path):
    losses = {1.0: [3.0, 3.2], 2.0: [3.1, 3.15]}
    runs = [write_run(tmp_path / f"{lr}-{i}", lr, i, [x]) for lr, both in losses.items() for i, x in enumerate(both)]
    one_seed = [write_run(tmp_path / "3", 3.0, 0, [3.3]), write_run(tmp_path / "4", 4.0, 7, [3.4])]
    table = comparison_table(group_runs(read_runs([*runs, *one_seed], notes), notes), LOSS)
    rows = {line.split()[0]: line for line in table.splitlines() if line.startswith("  optimizer")}
    assert rows["optimizer.peak_lr=2.0"].endswith("WITHIN NOISE")
    assert rows["optimizer.peak_lr=3.0"].endswith("one seed in common: no estimate of the noise")
    assert rows["optimizer.peak_lr=4.0"].endswith("no seed in common: no test")


def test_paired_tests_are_those_of_scipy():
    rng = np.random.default_rng(0)
    for n in (2, 3, 8):
        differences = list(rng.normal(0.3, 1.0, n))
        found, expected = paired_difference(differences), stats.ttest_1samp(differences, 0.0)
        assert found.t_test == pytest.approx(expected.pvalue)
        assert found.interval == pytest.approx(tuple(expected.confidence_interval(0.95)))
        signs = np.array(np.meshgrid(*[[-1, 1]] * n)).reshape(n, -1)
        means = abs(signs.T @ differences) / n
        assert found.permutation == pytest.approx(np.mean(means >= abs(found.value) - 1e-12))


def test_paired_tests_of_equal_differences():
    assert paired_difference([0.0, 0.0]).within_noise
    found = paired_difference([0.5, 0.5, 0.5])
    assert not found.within_noise
    assert found.permutation == 0.25
    assert paired_difference([0.5]).within_noise


def test_running_and_damaged_runs(workdirs):
    path = workdirs[0] / "metrics.jsonl"
    lines = path.read_text().splitlines(keepends=True)
    path.write_text("".join(lines[:-3]) + lines[-2][:20])  # killed in a line
    runs = read_runs(workdirs, notes)
    assert runs[0].final(LOSS) == 5.0
    assert "some are running, or shorter" in comparison_table(group_runs(runs, notes), LOSS)
    path.write_text(lines[0])  # has only started
    groups = group_runs(read_runs(workdirs, notes), notes)
    assert next(csv.DictReader(io.StringIO(runs_csv(groups, LOSS))))["final"] == ""
    path.write_text("no record\n" + "".join(lines))
    with pytest.raises(UserError, match=r"metrics.jsonl:1 is not a metrics record"):
        read_runs(workdirs, notes)


def test_the_directory_of_a_sweep_and_repeated_runs(workdirs, tmp_path):
    said: list[str] = []
    names = {path.name: {} for path in workdirs}
    (tmp_path / "sweep.json").write_text(json.dumps({"members": {**names, "waiting": {}}}))
    assert len(read_runs([tmp_path], said.append)) == 6
    assert said == [f"{tmp_path / 'waiting'} has no metrics yet, and is left out"]
    (tmp_path / "waiting").mkdir()
    (tmp_path / "output").mkdir()
    assert len(read_runs(sorted(tmp_path.iterdir()), said.append)) == 6  # sweeps/x/*, with its files
    assert said == said[:1] * 2
    write_run(tmp_path / "copy", 1.0, 0, [3.0])
    group_runs(read_runs([*workdirs, tmp_path / "copy"], notes), said.append)
    assert said[-1] == "copy has the config and the seed of lr1.0-0, and is left out"


def test_groups_of_a_sweep_over_config_files_are_named_by_them(tmp_path):
    members: dict[str, dict] = {}
    for seed in range(2):
        for file, lr in (("gpt2.py", 1.0), ("gpt2.py:size=355m", 2.0)):
            name = f"{lr}-{seed}"
            write_run(tmp_path / name, lr, seed, [3.0 - lr], **{"optimizer.eps": str(lr)})
            members[name] = {"config": file, "seed": seed}
    (tmp_path / "sweep.json").write_text(json.dumps({"members": members}))
    groups = group_runs(read_runs([tmp_path], notes), notes)
    assert [group.settings for group in groups] == [{"config": "gpt2.py"}, {"config": "gpt2.py:size=355m"}]
    # A file whose content is another for one of the runs does not name it.
    members["2.0-0"]["config"] = "gpt2.py"
    (tmp_path / "sweep.json").write_text(json.dumps({"members": members}))
    groups = group_runs(read_runs([tmp_path], notes), notes)
    assert [list(group.settings) for group in groups] == [["optimizer.peak_lr", "optimizer.eps"]] * 2


@pytest.mark.parametrize("axis", ["tokens", "flops", "seconds"])
def test_curves_have_the_mean_and_the_deviation_of_the_seeds(axis, workdirs):
    group = group_runs(read_runs(workdirs[:3], notes), notes)[0]
    curve = group_curve(group, LOSS, axis)
    assert curve.x.tolist() == [{"tokens": 1000, "flops": 60_000, "seconds": 2}[axis] * i for i in range(3)]
    assert curve.mean == pytest.approx([9.0, 5.0, 4.31])
    assert curve.deviation == pytest.approx([0.0, 0.0, 0.31])
    assert draw_png([curve], LOSS, axis).startswith(b"\x89PNG")


def test_a_curve_ends_where_the_shortest_run_does(workdirs, tmp_path):
    short = write_run(tmp_path / "short", 1.0, 9, [9.0, 6.0])
    (group,) = group_runs(read_runs([workdirs[0], short], notes), notes)
    assert group_curve(group, LOSS, "tokens").x.tolist() == [0, 1000]


def test_flops_of_runs_that_do_not_record_them(workdirs):
    run = read_runs(workdirs[:1], notes)[0]
    model = {"vocab_size": 100}
    old = dataclasses.replace(run, header={"parameters": 1, "trained_parameters": 1, "config": {"model": model}})
    assert old.x_of("flops")({"tokens": 1000}) > 1e6
    with pytest.raises(UserError, match="does not say how many FLOPs"):
        dataclasses.replace(old, header={"parameters": 2, "trained_parameters": 1}).x_of("flops")


def test_the_page_needs_no_network(workdirs):
    pytest.importorskip("plotly")
    curves = [group_curve(group, LOSS, "tokens") for group in group_runs(read_runs(workdirs, notes), notes)]
    page = draw_page(curves, LOSS, "tokens")
    assert "optimizer.peak_lr=2.0" in page
    assert '<script src="http' not in page


def test_the_metric_is_that_of_the_runs_or_the_given_one(workdirs):
    runs = read_runs(workdirs, notes)
    assert choose_quantity(runs, "validation", None) == LOSS
    assert choose_quantity(runs, "train", None) == Quantity("train", "loss")
    with pytest.raises(UserError, match="no run has measured validation bleu: the metrics are accuracy, loss"):
        choose_quantity(runs, "validation", "bleu")
    with pytest.raises(UserError, match="the splits are train, validation"):
        choose_quantity(runs, "test", None)


def test_the_command_writes_its_files(workdirs, tmp_path):
    out = tmp_path / "out"
    result = run_command("gptjax.compare", *workdirs, f"--output={out}", "--x=flops")
    assert result.returncode == 0, result.stderr
    assert result.stdout.startswith((out / "table.txt").read_text())
    assert {"table.txt", "runs.csv", "curves.png"} <= {path.name for path in out.iterdir()}


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([], "needs workdirs"),
        (["{directory}"], "is not a workdir: it has no metrics.jsonl"),
        (["{directory}/none"], "there is no"),
        (["{directory}/a_file"], "no runs to compare"),
    ],
)
def test_bad_arguments_are_one_line(arguments, words, tmp_path):
    (tmp_path / "a_file").touch()
    result = run_command("gptjax.compare", *(text.format(directory=tmp_path) for text in arguments))
    assert result.returncode == 2
    assert result.stderr.count("\n") == 1
    assert words in result.stderr
