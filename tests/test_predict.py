"""The command `gptjax.predict`: predictions, several workdirs, scores of labelled rows, and refused input."""

import bz2
import codecs
import importlib
import io
import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from absl import flags

from gptjax.config import Config, UserError, read_config, replace
from gptjax.run import run
from gptjax.stages import saved_weights
from gptjax.training.metrics_file import read_metrics
from tests.commands import run_command
from tests.tiny_tasks import KINDS, records, run_config, with_method

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def command() -> Iterator[Callable[..., list[dict]]]:
    """`command(*arguments, stdin="")`: the records that it prints, in this process."""
    others, modules = set(flags.FLAGS), set(sys.modules)
    predict = importlib.import_module("gptjax.predict")

    def command(*arguments: str, stdin: str | bytes = "") -> list[dict]:
        with pytest.MonkeyPatch.context() as patch:
            out = io.StringIO()
            raw = stdin.encode() if isinstance(stdin, str) else stdin
            patch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(raw)))
            patch.setattr(sys, "stdout", out)
            flags.FLAGS.unparse_flags()
            for name in set(flags.FLAGS) - others:
                flags.FLAGS[name].value = flags.FLAGS[name].default
            flags.FLAGS(["predict", *arguments])
            predict.main()
        return [json.loads(line) for line in out.getvalue().split("\n")[:-1]]

    yield command
    for name in set(flags.FLAGS) - others:  # as other commands have flags of the same names
        delattr(flags.FLAGS, name)
    for name in ("gptjax.predict", "gptjax.cli"):
        if name not in modules:
            sys.modules.pop(name, None)


@pytest.fixture(scope="module")
def workdir_of(pretrained, tmp_path_factory) -> Callable[..., Path]:
    """The workdir of a short run."""
    directory = tmp_path_factory.mktemp("runs")
    made: dict[str, Path] = {}

    def workdir_of(kind: str, method: str = "head") -> Path:
        name = f"{kind}_{method}"
        if name not in made:
            config: Config = replace(run_config(directory, kind, pretrained), {"batch": {"epochs": 0.5}})
            run(with_method(config, method), directory / name)
            made[name] = directory / name
        return made[name]

    return workdir_of


def test_predictions_equal_those_of_the_run(command, workdir_of, tmp_path):
    workdir = workdir_of("classification", "lora")
    predicted = [json.loads(line) for line in (workdir / "predictions.jsonl").read_text().splitlines()]
    stdin = "\n\n".join(record["text"] for record in predicted) + "\n"  # lines with nothing on them are none
    found = command(f"--workdir={workdir}", stdin=stdin)
    assert [record["text"] for record in found] == [record["text"] for record in predicted]
    for record, of_run in zip(found, predicted, strict=True):
        assert record.keys() == {"text", "predicted"}
        assert record["predicted"]["label"] == of_run["predicted"]["label"]
        assert record["predicted"]["probabilities"] == pytest.approx(of_run["predicted"]["probabilities"], abs=2e-6)
    (tmp_path / "texts").write_text(stdin)
    arguments = [f"--workdir={workdir}", f"--input={tmp_path / 'texts'}"]
    assert command(*arguments) == found
    assert command(*arguments, "--batch_size=2") == found
    assert command(*arguments, f"--output={tmp_path / 'predicted'}") == []
    assert [json.loads(line) for line in (tmp_path / "predicted").read_text().splitlines()] == found


def test_several_adapters_share_one_base(command, workdir_of, monkeypatch):
    workdirs = [workdir_of("classification", "lora"), workdir_of("classification", "head")]
    loaded, load = [], saved_weights.load_weights
    monkeypatch.setattr(
        saved_weights, "load_weights", lambda *args, **kwargs: loaded.append(args[0]) or load(*args, **kwargs)
    )
    both = command(f"--workdir={workdirs[0]},{workdirs[1]}", stdin="good 12\nbad 3\n")
    assert len(loaded) == 1
    for workdir in workdirs:
        alone = command(f"--workdir={workdir}", stdin="good 12\nbad 3\n")
        assert [record["predicted"][str(workdir)] for record in both] == [record["predicted"] for record in alone]


def test_the_words_of_a_line_get_tags(command, workdir_of):
    found = command(f"--workdir={workdir_of('tagging')}", stdin="to  Rome we go\nat home\n")
    assert [record["tokens"] for record in found] == [["to", "Rome", "we", "go"], ["at", "home"]]
    assert [len(record["predicted"]["tags"]) for record in found] == [4, 2]
    assert {tag for record in found for tag in record["predicted"]["tags"]} <= {"O", "B-LOC"}


def test_texts_may_look_like_json(command, workdir_of, tmp_path, caplog):
    workdir = f"--workdir={workdir_of('classification')}"
    texts = ["{sigh} good 1", "[bad] 2", '"good" 3', "bad\u2028 4\f 5", "1", "null"]
    found = command(workdir, stdin="\ufeff" + "\r\n".join(texts) + "\n")
    assert [record["text"] for record in found] == texts
    assert "--input_format" not in caplog.text
    assert command(workdir, stdin='{"text": "good"}\n')[0]["text"] == '{"text": "good"}'
    assert "pass --input_format=jsonl to read its fields" in caplog.text


def test_json_lines_by_name_and_by_flag(command, workdir_of, tmp_path):
    workdir = f"--workdir={workdir_of('classification')}"
    rows = b'\n{"text": "good 1"}\r\n\n{"text": "bad\xe2\x80\xa8 2"}\n'
    (tmp_path / "new.JSONL").write_bytes(codecs.BOM_UTF8 + rows)
    (tmp_path / "new.jsonl.bz2").write_bytes(bz2.compress(rows))
    by_flag = command(workdir, "--input_format=jsonl", stdin=rows)
    assert [record["text"] for record in by_flag] == ["good 1", "bad\u2028 2"]
    for name in ("new.JSONL", "new.jsonl.bz2"):
        assert command(workdir, f"--input={tmp_path / name}") == by_flag
    as_text = command(workdir, f"--input={tmp_path / 'new.JSONL'}", "--input_format=text")
    assert as_text[0]["text"] == '{"text": "good 1"}'
    for line, words in [('{"txt": "x"}', "has no text"), ('{"text": 5}', "has no text"), ("text", "is not JSON")]:
        with pytest.raises(UserError, match=f"standard input:1 {words}"):
            command(workdir, "--input_format=jsonl", stdin=line)


def test_words_are_separated_by_blanks_and_tabs_as_in_training(command, workdir_of):
    workdir = f"--workdir={workdir_of('tagging')}"
    assert command(workdir, stdin="to\t20\u00a0000  Rome\n")[0]["tokens"] == ["to", "20\u00a0000", "Rome"]
    with pytest.raises(UserError, match="standard input:1 has no tokens"):
        command(workdir, "--input_format=jsonl", stdin='{"tokens": ["a", ""]}\n')


def test_output_keeps_links_and_is_no_folder(command, workdir_of, tmp_path):
    workdir = f"--workdir={workdir_of('classification')}"
    (tmp_path / "predicted").write_text("old")
    (tmp_path / "link").symlink_to(tmp_path / "predicted")
    command(workdir, f"--output={tmp_path / 'link'}", stdin="good\n")
    assert json.loads((tmp_path / "predicted").read_text())["text"] == "good"
    with pytest.raises(UserError, match=f"--output={tmp_path} is a directory"):
        command(workdir, f"--output={tmp_path}", stdin="good\n")


def test_rows_of_a_file_and_its_columns(command, workdir_of, tmp_path):
    (tmp_path / "new.csv").write_text("id,message\n1,good 1\n2,bad 2\n")
    workdir, source = workdir_of("classification", "head"), f"--source=csv:{tmp_path / 'new.csv'}"
    found = command(f"--workdir={workdir}", source, "--columns=text=message")
    assert [record["text"] for record in found] == ["good 1", "bad 2"]
    with pytest.raises(UserError, match="no column for text"):
        command(f"--workdir={workdir}", source)


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_labelled_rows_are_scored_as_in_the_run(command, workdir_of, tmp_path, capsys, kind):
    """The report of the validation rows, which is also the run's own."""
    workdir = workdir_of(kind)
    source = f"--source={read_config(workdir).data.validation_source}"
    predicted = command(f"--workdir={workdir}", source, f"--report={tmp_path / 'report.json'}")
    report, in_run = (json.loads((place / "report.json").read_text()) for place in (tmp_path, workdir))
    assert report.keys() == in_run.keys()
    for name, value in report.items():
        assert value == (pytest.approx(in_run[name], rel=1e-5) if isinstance(value, float) else in_run[name])
    assert len(predicted) == 5  # standard output has the predictions only
    assert " of 5 " in capsys.readouterr().err or kind == "tagging"
    unscored = command(f"--workdir={workdir}", source, "--noscore")
    assert [record["predicted"] for record in unscored] == [record["predicted"] for record in predicted]
    assert capsys.readouterr().err == ""


def test_labels_that_cannot_be_scored(command, workdir_of, tmp_path, caplog):
    """They do not keep rows from being predicted, unless metrics are asked for."""
    (tmp_path / "new.csv").write_text("text,label\ngood 1,\nbad 2,\n")
    arguments = (f"--workdir={workdir_of('classification', 'head')}", f"--source=csv:{tmp_path / 'new.csv'}")
    found = command(*arguments)
    assert [record.keys() for record in found] == [{"text", "predicted"}] * 2
    assert "not scored: " in caplog.text
    with pytest.raises(UserError, match=r"new\.csv:2: label is empty"):
        command(*arguments, "--score")
    (tmp_path / "new.csv").write_text("text,label\ngood 1,great\n")
    with pytest.raises(UserError, match="unknown label 'great'"):
        command(*arguments, f"--report={tmp_path / 'report.json'}")
    assert not (tmp_path / "report.json").exists()


@pytest.mark.slow
def test_the_checkpoint_is_chosen(command, pretrained, tmp_path):
    config = replace(run_config(tmp_path, "classification", pretrained), {"optimizer": {"peak_lr": 0.3}})
    config = replace(config, {"checkpoint": {"every_tokens": 1}, "evaluation": {"every_tokens": 1}})
    run(replace(config, {"batch": {"epochs": 2.4}}), tmp_path / "run")  # the last step overshoots
    losses = {
        record["step"]: record["loss"]
        for record in read_metrics(tmp_path / "run")[1]
        if record["split"] == "validation"
    }
    best, newest = min(list(losses)[1:], key=losses.__getitem__), max(losses)
    assert best != newest

    def loss(*arguments: str) -> float:
        report = tmp_path / "report.json"
        command(
            f"--workdir={tmp_path / 'run'}",
            f"--source={config.data.validation_source}",
            f"--report={report}",
            *arguments,
        )
        return json.loads(report.read_text())["loss"]

    assert loss() == loss("--best") == loss(f"--step={best}") == pytest.approx(losses[best], rel=1e-5)
    assert loss("--nobest") == loss(f"--step={newest}") == pytest.approx(losses[newest], rel=1e-5)
    with pytest.raises(UserError, match="no checkpoint 999"):
        loss("--step=999")


def test_tasks_of_several_texts_read_json(command, workdir_of):
    workdir = workdir_of("multiple_choice")
    rows = records("multiple_choice", 3)
    found = command(f"--workdir={workdir}", stdin="".join(json.dumps(row) + "\n" for row in rows))
    assert [record["choices"] for record in found] == [row["choices"] for row in rows]
    assert all(len(record["predicted"]["probabilities"]) == 3 for record in found)


@pytest.mark.parametrize(
    ("kind", "stdin", "words"),
    [
        ("classification", "", ["there is nothing to predict"]),
        ("classification", "\n \n", ["there is nothing to predict"]),
        ("multiple_choice", '\n{"context": "cut', ["standard input:2 is not JSON"]),
        ("multiple_choice", "a plain line\n", ["standard input:1 is not JSON"]),
        ("multiple_choice", '{"context": "a"}\n', ["standard input:1 has no choices", "context, choices"]),
        ("multiple_choice", '["a"]\n', ["standard input:1 is not a JSON object"]),
        ("classification", b"caf\xe9\n", ["standard input:1 is not UTF-8 at byte 3"]),
        ("multiple_choice", '{"context": "a", "choices": "b"}\n', ["standard input:1 has no choices"]),
        ("multiple_choice", '{"context": "a", "choices": ["b", 3, "c"]}\n', ["standard input:1"]),
    ],
)
def test_lines_that_cannot_be_read(command, workdir_of, kind, stdin, words):
    with pytest.raises(UserError) as error:
        command(f"--workdir={workdir_of(kind)}", stdin=stdin)
    for word in words:
        assert word in str(error.value)
    assert "\n" not in str(error.value)


def test_flags_that_make_no_sense(command, workdir_of, pretrained, tmp_path):
    workdir = workdir_of("classification")
    for arguments, words in [
        ([], "--workdir"),
        ([f"--workdir={pretrained}"], "stage pretrain"),
        ([f"--workdir={tmp_path}"], "is not a workdir"),
        ([f"--workdir={workdir}", "--input=none.txt"], "none.txt"),
        ([f"--workdir={workdir}", "--input=a", "--source=csv:b"], "give one"),
        ([f"--workdir={workdir}", "--step=2", "--best"], "give one"),
        ([f"--workdir={workdir}", "--score"], "--source"),
        ([f"--workdir={workdir}", "--source=csv:b", "--noscore", "--report=c"], "give one"),
        ([f"--workdir={workdir}", "--columns=text"], "--columns"),
    ]:
        with pytest.raises(UserError) as error:
            command(*arguments, stdin="text\n")
        assert words in str(error.value)
        assert "\n" not in str(error.value)


def test_a_user_error_is_one_line_and_exit_code_2(pretrained):
    result = run_command("gptjax.predict", f"--workdir={pretrained}", stdin="text\n")
    assert result.returncode == 2, result.stderr
    assert result.stdout == ""
    assert result.stderr.strip().splitlines()[-1].startswith(f"error: {pretrained} is of stage pretrain")
    assert "Traceback" not in result.stderr
