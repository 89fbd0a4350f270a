"""Points of a scaling law from workdirs, and predictions of a run's loss."""

import json

import numpy as np
import pytest

from gptjax import config as c
from gptjax.config import UserError
from gptjax.scaling.flops import flops_per_token
from gptjax.scaling.parameters import non_embedding_parameter_count, parameter_count
from gptjax.training.loss_predictions import compare, config_tree, content_hash, read_prediction, write_prediction
from gptjax.training.measured_runs import measured_run, table_of_runs
from tests.measured_workdirs import ladder_config, law, write_run


@pytest.fixture
def runs(tmp_path):
    return [write_run(tmp_path / rung, ladder_config(rung)) for rung in ("1x16", "1x32", "2x32")]


def change(workdir, edit) -> None:
    """Edits the records of a metrics.jsonl."""
    path = workdir / "metrics.jsonl"
    head, *records = map(json.loads, path.read_text().splitlines())
    path.write_text("".join(json.dumps(line) + "\n" for line in (head, *edit(records))))


def test_the_table_has_parameters_tokens_flops_and_final_losses(runs):
    table = table_of_runs(runs)
    models = [ladder_config(rung).model for rung in ("1x16", "1x32", "2x32")]
    np.testing.assert_array_equal(table.columns["parameters"], [parameter_count(model) for model in models])
    np.testing.assert_allclose(table.columns["loss"], law(table.columns["flops"]))
    per_token = table.columns["flops"] / table.columns["tokens"]
    np.testing.assert_allclose(per_token, [flops_per_token(model) for model in models])
    assert list(table.columns["tokens"]) == [measured_run(run).tokens[-1] for run in runs]
    without = table_of_runs(runs, count="non_embedding")
    np.testing.assert_array_equal(
        without.columns["parameters"], [non_embedding_parameter_count(model) for model in models]
    )
    curves = table_of_runs(runs, curves=True)
    assert len(curves) == 12  # the loss before training is not a point of the curve
    assert table.sha256 != curves.sha256


def test_runs_that_are_no_points_of_a_law_are_refused(runs):
    change(runs[0], lambda records: [record | {"split": "train"} for record in records])
    with pytest.raises(UserError, match=r"1x16 has no held-out loss: evaluate during training"):
        table_of_runs(runs)
    change(runs[0], lambda records: [record | {"split": "validation", "loss": None} for record in records])
    with pytest.raises(UserError, match="1x16: the held-out loss at step 0 is not a positive number"):
        table_of_runs(runs[:1])
    change(runs[1], lambda records: records[:-1])
    with pytest.raises(UserError, match=r"1x32 has read [\d,]+ of [\d,]+ tokens: let the run finish"):
        table_of_runs(runs[1:])
    change(runs[2], lambda records: [*records[:-1], records[-1] | {"split": "train"}])
    with pytest.raises(UserError, match="2x32 was not evaluated at its end"):
        table_of_runs(runs[2:])


def test_losses_on_other_text_cannot_be_compared(runs, tmp_path):
    config = ladder_config("2x48")
    other = write_run(tmp_path / "other", c.replace(config, {"data": {"source": "shakespeare"}}))
    with pytest.raises(UserError, match=r"cannot be compared: data.source is 'sotu' and 'shakespeare'"):
        table_of_runs([*runs, other])


def prediction(run, **changes):
    fields = {"loss": run.losses[-1] * 1.004, "interval": [run.losses[-1] * 0.99, run.losses[-1] * 1.01]}
    fields |= {"parameters": run.parameters, "tokens": run.tokens[-1], "config": config_tree(run.config)}
    return fields | changes


def test_a_prediction_is_compared_with_a_later_run(tmp_path):
    path = tmp_path / "prediction.json"
    config = ladder_config("2x32")
    run = measured_run(write_run(tmp_path / "early", config))
    write_prediction(path, prediction(run))
    with pytest.raises(UserError, match=r"after the start of .*early at 2026-01-02T03:04:05.*: it is no prediction"):
        compare(read_prediction(path), run, path)
    later = "2999-01-01T00:00:00+00:00"
    run = measured_run(write_run(tmp_path / "late", config, started=later))
    result = compare(read_prediction(path), run, path)
    assert result["relative_error"] == pytest.approx(0.004)
    assert result["within_interval"]
    assert result["differences"] == []
    changed = c.replace(config, {"optimizer": {"peak_lr": 1.0}, "logging": {"every_steps": 7}})
    other = measured_run(write_run(tmp_path / "changed", changed, started=later))
    (line,) = compare(read_prediction(path), other, path)["differences"]
    assert line.startswith("optimizer.peak_lr")
    longer = measured_run(write_run(tmp_path / "longer", ladder_config("2x32", total_tokens=10**6), started=later))
    with pytest.raises(UserError, match=r"predicts a run of [\d,]+ tokens, but .*longer has"):
        compare(read_prediction(path), longer, path)


def test_a_changed_prediction_is_refused_and_none_is_replaced(tmp_path, runs):
    path = tmp_path / "prediction.json"
    written = write_prediction(path, prediction(measured_run(runs[0])))
    assert written == read_prediction(path)
    assert written["sha256"] == content_hash(dict(reversed(written.items())))
    with pytest.raises(UserError, match="predictions are not replaced"):
        write_prediction(path, {})
    path.write_text(path.read_text().replace('"loss": ', '"loss": 1'))
    with pytest.raises(UserError, match="does not match its hash"):
        read_prediction(path)
    rates = write_prediction(tmp_path / "rates.json", {"surprise": 1.0})
    with pytest.raises(UserError, match="predicts pass rates"):
        compare(rates, measured_run(runs[0]), tmp_path / "rates.json")
    path.write_text("{}")
    with pytest.raises(UserError, match="is not a prediction"):
        read_prediction(path)
    with pytest.raises(UserError, match="there is no file"):
        read_prediction(tmp_path / "none.json")
