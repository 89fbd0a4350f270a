"""The command `gptjax.evaluate`: results on stdout and in a file, resuming, and user errors."""

import json
import math
import shutil
from pathlib import Path

import pytest

from gptjax.evaluation.result_table import score_entry
from gptjax.evaluation.run_tasks import Options, evaluate
from gptjax.evaluation.sample_files import read_samples
from gptjax.evaluation.scoring import Scorer, ScoringRequest, encode_pair
from gptjax.metrics.measurement import Measurement
from tests.commands import run_command

ROOT = Path(__file__).parents[2]


def command(*arguments):
    return run_command("gptjax.evaluate", *arguments)


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    directory = tmp_path_factory.mktemp("tasks")
    (directory / "words.jsonl").write_text('{"text": "to be or not"}\n{"text": "a b c"}\n{"text": "one two"}\n')
    which = [
        {"context": f"{i} is", "choices": ["odd", "even", "neither, for it is long"], "answer": i % 2} for i in range(5)
    ]
    (directory / "which.jsonl").write_text("".join(json.dumps(record) + "\n" for record in which))
    (directory / "text.txt").write_text("A text of some length, to be read in windows; it is ASCII.\n")
    (directory / "bad.jsonl").write_text('{"text": "fine so far"}\n{"text": }\n')
    return directory


@pytest.mark.slow
def test_the_command_end_to_end(workdir, files, tiny, tmp_path):
    output = tmp_path / "results.json"
    words, which = files / "words.jsonl", files / "which.jsonl"
    arguments = (f"--workdir={workdir}", f"--tasks={words},{which}", "--num_fewshot=1", f"--output={output}")
    result = command(*arguments, "--limit=2")
    assert result.returncode == 0, result.stderr
    report = json.loads(output.read_text())
    assert list(report["results"]) == ["words", "which"]
    assert report["step"] == 0
    assert report["versions"]["jax"]
    entry = report["results"]["which"]
    assert (entry["num_fewshot"], entry["examples"], entry["examples_available"]) == (1, 2, 5)
    assert entry["truncated_requests"] > 0
    assert entry["source"] == str(which)
    assert set(entry["metrics"]) == {
        "accuracy",
        "accuracy_per_token",
        "accuracy_per_character",
        "accuracy_by_answer_prompt",
    }
    for name, task in report["results"].items():
        for metric, measured in task["metrics"].items():
            (row,) = [line.split() for line in result.stdout.splitlines() if line.split()[:2] == [name, metric]]
            assert float(row[2].replace(",", "")) == pytest.approx(measured["value"], rel=1e-3, abs=1e-4)
    assert f"written to {output}" in result.stdout
    again = command(*arguments, "--limit=2")
    assert again.stdout == result.stdout


def test_last_words_equal_those_by_hand(workdir, files, tiny, capsys):
    report = evaluate(workdir, Options(tasks=(str(files / "words.jsonl"),)))
    nats, right = 0.0, 0
    for context, word in (("to be or", " not"), ("a b", " c"), ("one", " two")):
        logprob, greedy = tiny.by_hand(encode_pair(tiny.tokenizer, context, word))
        nats, right = nats - logprob, right + greedy
    metrics = report["results"]["words"]["metrics"]
    assert metrics["accuracy"]["value"] == right / 3
    assert metrics["perplexity"]["value"] == pytest.approx(math.exp(nats / 3), rel=1e-4)
    written = json.loads((workdir / "evaluation" / "words-0shot-step0.json").read_text())
    assert written == json.loads(json.dumps(report))
    assert "examples 3" in capsys.readouterr().out


def test_perplexity_of_a_text(workdir, files, tiny):
    source = f"text:{files / 'text.txt'}"
    report = evaluate(workdir, Options(tasks=("perplexity",), source=source, stride=24, detokenizer="ptb"))
    entry = report["results"][f"perplexity:{source}"]
    text = (files / "text.txt").read_text()
    tokens = encode_pair(tiny.tokenizer, "", text).tokens
    nats, start = 0.0, 1
    while start < len(tokens):  # windows that do not overlap
        end = min(start + 24, len(tokens))
        nats -= tiny.by_hand(ScoringRequest(tokens[max(0, end - 25) : end], end - start))[0]
        start = end
    assert entry["metrics"]["bits_per_byte"]["value"] == pytest.approx(nats / math.log(2) / len(text), rel=1e-5)
    words = len(text.split()) + 1
    assert entry["metrics"]["word_perplexity"]["value"] == pytest.approx(math.exp(nats / words), rel=1e-4)
    assert (entry["stride"], entry["documents"], entry["original_tokens"]) == (24, 1, words)


def test_perplexity_of_what_the_run_held_out(workdir, tmp_path):
    documents = [f"document {i} of the corpus" for i in range(20)]
    held_out = documents[9::10]
    for name, texts in {"all": documents, "held_out": held_out}.items():
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    shutil.copytree(workdir, tmp_path / "run")
    tree = json.loads((tmp_path / "run" / "config.json").read_text())
    tree["data"] |= {"source": f"jsonl:{tmp_path}/all.jsonl", "validation_fraction": 0.1}
    (tmp_path / "run" / "config.json").write_text(json.dumps(tree))
    own = evaluate(tmp_path / "run", Options(tasks=("perplexity",), held_out=True))["results"]["perplexity"]
    source = f"jsonl:{tmp_path}/held_out.jsonl"
    named = evaluate(tmp_path / "run", Options(tasks=("perplexity",), source=source))["results"][f"perplexity:{source}"]
    assert own["metrics"] == named["metrics"]
    assert own["documents"] == 2
    assert own["source"] == f"held out of jsonl:{tmp_path}/all.jsonl"


def test_nothing_is_scored_twice(workdir, files, monkeypatch):
    options = Options(tasks=(str(files / "which.jsonl"),), num_fewshot=2)
    first = evaluate(workdir, options)

    def refuse(*_):
        raise AssertionError("scored again")

    monkeypatch.setattr(Scorer, "score_batch", refuse)
    assert evaluate(workdir, options) == first
    with pytest.raises(AssertionError, match="scored again"):
        evaluate(workdir, Options(tasks=(str(files / "which.jsonl"),), num_fewshot=2, seed=1))


def test_a_score_with_interval_baselines_and_control(workdir, files, capsys):
    evaluate(workdir, Options(tasks=(str(files / "words.jsonl"),)))
    assert "random" not in capsys.readouterr().out  # no options to choose from
    report = evaluate(workdir, Options(tasks=(str(files / "which.jsonl"),), choices_only=True))
    printed = capsys.readouterr().out
    accuracy = report["results"]["which"]["metrics"]["accuracy"]
    low, high = accuracy["interval"]
    assert 0 <= low <= accuracy["value"] <= high <= 1
    assert accuracy["baselines"] == {"random": pytest.approx(1 / 3), "majority": 0.6}
    control = accuracy["choices_only"]
    assert control["gain"]["value"] == pytest.approx(accuracy["value"] - control["value"])
    assert "choices_only" not in report["results"]["which"]["metrics"]["accuracy_by_answer_prompt"]
    (row,) = [line.split() for line in printed.splitlines() if line.split()[:2] == ["which", "accuracy"]]
    assert row[6:] == ["0.3333", "0.6000", f"{control['value']:.4f}", "5"]
    inside = [name for name, value in accuracy["baselines"].items() if low <= value <= high]
    assert ("which accuracy: the interval contains the baseline" in printed) == bool(inside)
    assert "which accuracy: no better than without the question" in printed  # five examples cannot show it
    path = workdir / "evaluation" / "which-0shot-step0.examples.jsonl"
    records = [json.loads(line) for line in path.read_text().splitlines()]
    assert [record["index"] for record in records] == list(range(5))
    assert records[1]["context"] == "1 is"
    chosen = [max(range(3), key=lambda i: record["logprobs"][i]) for record in records]
    right = [float(choice == record["answer"]) for choice, record in zip(chosen, records, strict=True)]
    assert sum(right) / 5 == accuracy["value"]
    assert (
        read_samples(workdir / "evaluation" / "which-0shot-step0.json")["which"].samples["accuracy"].value
        == (accuracy["value"])
    )


def test_numbers_that_json_cannot_hold():
    assert score_entry(Measurement(math.inf, math.nan, 2)) == {"value": None, "stderr": None, "n": 2}


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--workdir={workdir}"], ["--tasks=NAME", "lambada"]),
        (["--tasks=lambada"], ["--workdir=DIR"]),
        (["--workdir={files}/none", "--tasks=lambada"], ["there is no workdir", "none"]),
        (["--workdir={files}", "--tasks=lambada"], ["not a workdir"]),
        (["--workdir={workdir}", "--tasks=lambda"], ["unknown task 'lambda'", "did you mean 'lambada'"]),
        (["--workdir={workdir}", "--tasks={files}/none.jsonl"], ["there is no task file", "none.jsonl"]),
        (["--workdir={workdir}", "--tasks={files}/words.jsonl,{files}/../tasks0/words.jsonl"], ["the same name"]),
        (["--workdir={workdir}", "--tasks={files}/bad.jsonl"], ["bad.jsonl:2 is not JSON: Expecting value"]),
        (["--workdir={workdir}", "--tasks={files}/which.jsonl", "--num_fewshot=5"], ["only 4 examples to show"]),
        (["--workdir={workdir}", "--tasks=lambada", "--num_fewshot=-1"], ["num_fewshot"]),
        (["--workdir={workdir}", "--tasks=perplexity", "--step=7"], ["no checkpoint 7"]),
        (["--workdir={workdir}", "--tasks=perplexity", "--step=7", "--best"], ["--step=7 and --best exclude"]),
        (
            ["--workdir={workdir}", "--tasks=lambada", "--source=sotu"],
            ["--source is for --tasks=perplexity, --tasks=dialogue and"],
        ),
        (
            ["--workdir={workdir}", "--tasks={files}/words.jsonl", "--choices_only"],
            ["--choices_only", "have none"],
        ),
        (["--workdir={workdir}", "--tasks=perplexity", "--choices_only"], ["--choices_only is for tasks of examples"]),
        (["--workdir={workdir}", "--tasks=lambada", "--reward_model=x"], ["--reward_model", "--tasks=dialogue"]),
        (["--workdir={workdir}", "--tasks=dialogue"], ["is of stage pretrain: --tasks=dialogue is for stages sft"]),
        (["--workdir={workdir}", "--tasks=dialogue", "--source=sotu"], ["unknown source 'sotu' of conversations"]),
        (["--workdir={workdir}", "--tasks=lambada", "--stride=3"], ["--stride", "--tasks=perplexity"]),
        (["--workdir={workdir}", "--tasks=perplexity", "--source=text:{files}/none"], ["no file matches"]),
        (
            ["--workdir={workdir}", "--tasks=perplexity", "--source=text:{files}/text.txt", "--stride=25"],
            ["stride=25 must be between 1 and the model's context of 24"],
        ),
        (
            ["--workdir={workdir}", "--tasks=perplexity", "--source=text:{files}/text.txt", "--detokenizer=wiki"],
            ["unknown detokenizer 'wiki'", "wikitext"],
        ),
        (["--workdir={workdir}", "--tasks={files}/words.jsonl", "--output=/"], ["--output=/ is a directory"]),
        (["--workdir={workdir}", "--tasks={files}/words.jsonl", "--mesh=rows=2"], ["--mesh=rows=2", "rows"]),
    ],
)
def test_mistakes_are_one_line(arguments, words, workdir, files):
    result = command(*(argument.format(workdir=workdir, files=files) for argument in arguments))
    assert result.returncode == 2, result.stderr
    (line,) = result.stderr.strip().splitlines()
    assert line.startswith("error: ")
    for word in words:
        assert word in line


def test_a_continuation_too_long_for_the_model(workdir, tmp_path):
    path = tmp_path / "long.jsonl"
    path.write_text(json.dumps({"context": "a", "continuation": "b" * 30}) + "\n")
    result = command(f"--workdir={workdir}", f"--tasks={path}")
    assert result.returncode == 2
    assert "continuation of 31 tokens is longer than the model's context of 24" in result.stderr
