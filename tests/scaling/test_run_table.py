"""CSV files of runs: columns, values and user errors."""

import numpy as np
import pytest

from gptjax.config import UserError
from gptjax.scaling.run_table import mean_surprise, read_csv

RUNS = "run,N,D,loss,set\na,1e8,2e9,3.1,x\nb,2e8,4e9,2.9,y\nc,4e8,8e9,2.7,x\n"


def read(tmp_path, text, given=None, needed=("parameters", "tokens", "flops", "loss"), where=None):
    path = tmp_path / "runs.csv"
    path.write_text(text)
    return read_csv(path, given or {}, needed, where or {})


def test_columns_are_found_and_completed(tmp_path):
    runs = read(tmp_path, RUNS, where={"set": "x"})
    assert runs.names == ("a", "c")
    np.testing.assert_array_equal(runs.columns["flops"], [6 * 1e8 * 2e9, 6 * 4e8 * 8e9])
    given = read(tmp_path, RUNS.replace("D", "C").replace("loss", "val"), {"loss": "val"})
    np.testing.assert_allclose(given.columns["tokens"], given.columns["flops"] / (6 * given.columns["parameters"]))
    assert given.sha256 != runs.sha256


@pytest.mark.parametrize(
    ("text", "given", "message"),
    [
        (
            RUNS.replace("loss", "val"),
            {},
            r"runs.csv has no column of loss: name it by --columns=loss=COLUMN \(run, N, D",
        ),
        (RUNS, {"loss": "los"}, r"no column 'los', which --columns names for loss: did you mean 'loss'"),
        (RUNS, {"los": "loss"}, r"--columns names an unknown column 'los': did you mean 'loss'"),
        (RUNS.replace("2.9", "nan"), {}, r"runs.csv:3: loss=nan is not a positive number"),
        (RUNS.replace("2.9", "inf"), {}, r"runs.csv:3: loss=inf is not a positive number"),
        (RUNS.replace("4e9", "0"), {}, r"runs.csv:3: D=0 is not a positive number"),
        (RUNS.replace(",2.9", ""), {}, r"runs.csv:3 has 4 values for 5 columns"),
        (
            RUNS.replace("set", "val_loss"),
            {},
            r"several columns of loss, 'loss', 'val_loss': choose by --columns=loss=",
        ),
        ("", {}, r"runs.csv is empty"),
        ("N,D,loss\n", {}, r"runs.csv has no rows"),
    ],
)
def test_user_errors_name_the_line_and_the_fix(tmp_path, text, given, message):
    with pytest.raises(UserError, match=message):
        read(tmp_path, text, given)


def test_rows_without_a_value_of_where(tmp_path):
    with pytest.raises(UserError, match="no rows with these values of --where"):
        read(tmp_path, RUNS, where={"set": "z"})
    with pytest.raises(UserError, match="no column 'sets': did you mean 'set'"):
        read(tmp_path, RUNS, where={"sets": "x"})
    with pytest.raises(UserError, match="there is no file"):
        read_csv(tmp_path / "none.csv", {}, (), {})


def test_pass_rates_are_averaged_as_logs(tmp_path):
    text = "C,pass_rate\n1e20,0.1\n1e20,0.4\n1e21,0.5\n1e21,0.8\n"
    runs = mean_surprise(read(tmp_path, text, needed=("flops", "pass_rate")))
    np.testing.assert_allclose(runs.columns["surprise"], [-np.log([0.1, 0.4]).mean(), -np.log([0.5, 0.8]).mean()])
    with pytest.raises(UserError, match="has 1 problems for one amount of compute and 2 for another"):
        mean_surprise(read(tmp_path, text.replace("1e20,0.1\n", ""), needed=("flops", "pass_rate")))
    with pytest.raises(
        UserError, match=r"runs.csv:5: pass_rate=0 is not .*: leave out problems that a model never solves"
    ):
        read(tmp_path, text.replace("0.8", "0"), needed=("flops", "pass_rate"))
    with pytest.raises(UserError, match="is above 1"):
        read(tmp_path, text.replace("0.8", "1.2"), needed=("flops", "pass_rate"))
