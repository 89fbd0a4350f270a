"""Results of several workdirs in one table, with paired tests on the same examples."""

import csv
import json
import os
from pathlib import Path

import numpy as np
import pytest

from gptjax.comparison.evaluation_tables import evaluation_csv, evaluation_json, evaluation_table
from gptjax.comparison.evaluations import compare_evaluations, read_evaluations
from gptjax.config import UserError
from gptjax.evaluation.result_table import score_entry
from gptjax.evaluation.sample_files import samples_path, task_samples, write_samples
from gptjax.metrics.measurement import exponential, mean, ratio, scaled
from tests.commands import run_command

HARD = np.random.default_rng(0).uniform(2, 5, 40)  # nats of documents of 10 tokens


def write_results(workdir: Path, right: list[int], gain: float = 0.0, *, step: int = 5, **changes) -> Path:
    """Writes the results of a workdir on a task of choices and on a text."""
    accuracy = mean(list(map(float, right)))
    nats = ratio(HARD - gain, np.full(40, 10.0))
    text = {"perplexity": exponential(nats), "nats_per_token": nats, "bits_per_byte": scaled(nats, 0.5)}
    settings = {"which": {"num_fewshot": changes.get("shots", 0)}, "perplexity": {}}
    metrics = {"which": {"accuracy": accuracy}, "perplexity": text}
    baselines = {"accuracy": {"random": 0.5}}
    entries = {
        task: {"metrics": {name: score_entry(m, baselines.get(name)) for name, m in of.items()}, **settings[task]}
        for task, of in metrics.items()
    }
    report = {"workdir": str(workdir), "step": step, "tokenizer": changes.get("tokenizer", "a"), "results": entries}
    path = workdir / "evaluation" / f"{changes.get('name', 'results')}-step{step}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(report))
    examples = changes.get("examples", [f"example {i}" for i in range(len(right))])
    texts = [f"text {i}" for i in range(40)]
    write_samples(path, {"which": task_samples(examples, metrics["which"]), "perplexity": task_samples(texts, text)})
    return path


@pytest.fixture
def workdirs(tmp_path):
    """The second workdir is right on 9 more examples and wrong on one more, and better on each text."""
    write_results(tmp_path / "a", [1] * 10 + [0] * 20)
    write_results(tmp_path / "b", [0] + [1] * 18 + [0] * 11, gain=0.1)
    return [tmp_path / "a", tmp_path / "b"]


def test_all_workdirs_in_one_table(workdirs):
    evaluations = read_evaluations(workdirs)
    compared = compare_evaluations(evaluations)
    assert [(each.task, each.metric, each.name) for each in compared] == [
        ("which", "accuracy", "a"),
        ("which", "accuracy", "b"),
        ("perplexity", "bits_per_byte", "a"),
        ("perplexity", "bits_per_byte", "b"),
    ]
    which = compared[1].test
    assert which.value == pytest.approx(8 / 30)
    assert (which.test, which.p_value) == ("McNemar", pytest.approx(2 * 11 / 2**10))
    text = compared[3].test
    assert text.value == pytest.approx(-0.1 / 10 * 0.5)
    assert text.interval == pytest.approx((-0.005, -0.005))  # each text is better by the same
    assert text.p_value < 0.001
    assert [each.p_holm for each in compared if each.test] == [which.p_value, 2 * text.p_value]
    table = evaluation_table(evaluations, compared)
    (row,) = [line for line in table.splitlines() if line.startswith("which") and "[0." in line]
    assert row.split()[2] == "0.3333"
    assert row.split()[-2:] == ["0.5000", "30"]
    assert "differences from a, paired over the same examples; p (Holm) counts all 2 tests" in table
    assert "WITHIN NOISE" not in table
    records = list(csv.DictReader(evaluation_csv(compared).splitlines()))
    assert [record["workdir"] for record in records] == ["a", "b", "a", "b"]
    assert float(records[1]["p_value"]) == which.p_value
    assert json.loads(evaluation_json(compared))[0]["difference"] is None


def test_a_chosen_score_and_baseline(workdirs):
    evaluations = read_evaluations(workdirs)
    forwards = compare_evaluations(evaluations, "perplexity")
    backwards = compare_evaluations(evaluations, "perplexity", "b")
    assert [each.task for each in forwards] == ["perplexity"] * 2
    assert backwards[0].test.value == pytest.approx(-forwards[1].test.value)
    assert len(compare_evaluations(evaluations, "all")) == 8
    for arguments, words in (
        ({"metric": "speed"}, "no task has the score --metric=speed"),
        ({"baseline": "c"}, "--baseline=c is none of a, b"),
    ):
        with pytest.raises(UserError, match=words):
            compare_evaluations(evaluations, **arguments)


def test_the_newest_results_count(workdirs):
    older = write_results(workdirs[0], [0] * 30, step=3, name="other")
    newer = write_results(workdirs[0], [1] * 30, step=5, name="newer")
    os.utime(newer, (2e9, 2e9))
    shots = write_results(workdirs[0], [1] * 30, step=5, name="shots", shots=2)
    evaluations = read_evaluations(workdirs)
    assert evaluations[0].tasks["which"].file == newer
    assert evaluations[0].tasks["which 2-shot"].file == shots
    compared = compare_evaluations(evaluations)
    assert "note: which 2-shot was not evaluated in b" in evaluation_table(evaluations, compared)
    named = read_evaluations([older, workdirs[1]])
    assert named[0].tasks["which"].step == 3
    assert "steps 3 of " in evaluation_table(named, compare_evaluations(named))


def test_unequal_examples_are_refused_by_name(workdirs):
    write_results(workdirs[1], [0] * 30, examples=[f"example {i + (i == 7)}" for i in range(30)])
    with pytest.raises(UserError, match=r"which: example 7 of b \(.*\) is not that of a \(.*--num_fewshot and --seed"):
        compare_evaluations(read_evaluations(workdirs))
    write_results(workdirs[1], [0] * 20)
    with pytest.raises(UserError, match="which: b has 20 examples, a 30"):
        compare_evaluations(read_evaluations(workdirs))


def test_the_command(workdirs, tmp_path):
    write_results(workdirs[1], [1] * 30, tokenizer="b")
    result = run_command("gptjax.compare", "--evaluations", *map(str, workdirs), f"--output={tmp_path / 'out'}")
    assert result.returncode == 0, result.stderr
    assert (tmp_path / "out" / "table.txt").read_text() in result.stdout
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"table.txt", "evaluations.csv", "evaluations.json"}
    assert "perplexity: the tokenizers differ" in result.stdout


@pytest.mark.parametrize(
    ("damage", "arguments", "words"),
    [
        (None, [], "at least two workdirs"),
        (None, ["{tmp}/none"], "there is no"),
        (None, ["{tmp}"], "has no results to compare: run python -m gptjax.evaluate"),
        (None, ["{tmp}/b", "--x=flops"], "--x is for curves"),
        ("samples", ["{tmp}/b"], "is damaged"),
        ("no samples", ["{tmp}/b"], "samples.json: run gptjax.evaluate again"),
        ("report", ["{tmp}/b"], "is damaged, or not from gptjax.evaluate"),
    ],
)
def test_user_errors_are_one_line(damage, arguments, words, workdirs, tmp_path):
    report = next((tmp_path / "b" / "evaluation").glob("*5.json"))
    if damage == "samples":
        samples_path(report).write_text('{"which": {"examples": []}}')
    if damage == "no samples":
        samples_path(report).unlink()
    if damage == "report":
        report.write_text("[1]")
    result = run_command(
        "gptjax.compare", "--evaluations", str(workdirs[0]), *(text.format(tmp=tmp_path) for text in arguments)
    )
    assert result.returncode == 2, result.stdout
    (line,) = result.stderr.strip().splitlines()
    assert words in line
