"""`python -m gptjax.scaling fit | predict | plan | verify | coordinates`, and the ladder of configs/ladder.py."""

import json
import subprocess
from pathlib import Path

import pytest

from gptjax import config as c
from gptjax.scaling.flops import flops_per_token
from tests.commands import run_command
from tests.measured_workdirs import LADDER, ladder_config, law, write_run

TABLE = Path(__file__).parent / "fixtures" / "overtraining" / "models.csv"
LATER = "2999-01-01T00:00:00+00:00"


def scaling(*arguments: object) -> subprocess.CompletedProcess:
    return run_command("gptjax.scaling", *arguments)


def succeeded(result: subprocess.CompletedProcess) -> str:
    assert result.returncode == 0, result.stderr
    return result.stdout


@pytest.fixture(scope="module")
def home(tmp_path_factory) -> Path:
    """Workdirs of the ladder, and a fit of L(C) to them."""
    directory = tmp_path_factory.mktemp("scaling")
    for rung in ("1x16", "1x32", "2x32", "2x48", "3x48"):
        write_run(directory / "ladder" / rung, ladder_config(rung))
    out = succeeded(
        scaling("fit", f"--workdirs={directory}/ladder/*", "--law=compute", "--samples=40", f"--output={directory}/law")
    )
    assert "compute: L(C) = a C^b + c" in out
    return directory


def test_a_ladder_predicts_a_later_run(home, tmp_path):
    fit = json.loads((home / "law" / "fit.json").read_text())
    assert fit["parameters"] == pytest.approx({"a": 60, "b": -0.15, "c": 0.9}, rel=1e-2)
    assert len(fit["runs"]) == 5
    assert fit["command"].startswith("python -m gptjax.scaling fit ")
    assert len(fit["data"]["sha256"]) == 64
    assert (home / "law" / "loss.png").stat().st_size > 10_000
    path = tmp_path / "prediction.json"
    arguments = (f"--law={home}/law/fit.json", "--config=configs/ladder.py:rung=5x128", f"--output={path}")
    assert "sha256 " in succeeded(scaling("predict", *arguments))
    run = write_run(tmp_path / "target", ladder_config("5x128"), started=LATER)
    out = succeeded(scaling("verify", f"--prediction={path}", f"--workdir={run}", f"--output={tmp_path}/result.json"))
    assert "within the interval" in out or "OUTSIDE the interval" in out  # residuals of an exact law are rounding
    result = json.loads((tmp_path / "result.json").read_text())
    assert abs(result["relative_error"]) < 1e-3
    assert result["differences"] == []
    model = ladder_config("5x128").model
    assert result["measured"] == pytest.approx(law(flops_per_token(model) * json.loads(path.read_text())["tokens"]))
    again = scaling("predict", *arguments)
    assert (again.returncode, again.stderr.count("\n")) == (2, 1)
    early = write_run(tmp_path / "early", ladder_config("5x128"))
    late = scaling("verify", f"--prediction={path}", f"--workdir={early}")
    assert late.returncode == 2
    assert "it is no prediction" in late.stderr


def test_a_table_is_fitted_and_a_budget_planned(tmp_path):
    out = succeeded(
        scaling(
            *("fit", f"--csv={TABLE}", "--columns=parameters=params,loss=loss_c4_val", "--where=train_dataset=rpj"),
            *("--min_tokens_per_parameter=20", "--max_flops=1e21", "--samples=20", f"--output={tmp_path}"),
        )
    )
    assert "25 rows of" in out
    assert "10 left out" in out
    assert (tmp_path / "residuals.png").exists()
    plan = ("plan", "--budget=1e21", f"--law={tmp_path}/fit.json", "--config.data.tokenizer=bytes")
    out = succeeded(scaling(*plan, "--topology=v5p:2x2x4", f"--output={tmp_path}/plan.json"))
    found = json.loads((tmp_path / "plan.json").read_text())
    assert found["flops"] == pytest.approx(1e21, rel=1e-3)
    assert found["interval"][0] < found["loss"] < found["interval"][1]
    (cost,) = found["costs"]
    # at an MFU of 1 it would be 1e21 / 459e12 FLOP/s
    assert cost["chip_hours"] == pytest.approx(1e21 / 459e12 / 3600 / cost["mfu"], rel=0.02)
    assert found["flags"] in out
    flags = [flag.removeprefix("--config.").split("=") for flag in found["flags"].split()]
    config = c.load_config("configs/gpt2.py", {"data.tokenizer": "bytes", **dict(flags)})
    assert config.batch.total_tokens == found["tokens"]
    out = succeeded(scaling("plan", "--budget=1e21", "--device=H200", "--devices=64", "--config.data.tokenizer=bytes"))
    assert "H200" in out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["fit", "--output=x"], "give --csv=FILE or --workdirs=DIR,..., one of the two"),
        (["fit", "--csv=none.csv", "--output=x"], "there is no file none.csv"),
        (["fit", "--workdirs=none*", "--output=x"], "--workdirs=none* matches no workdir"),
        (["fit", f"--csv={TABLE}", "--output=x"], "has no column of loss"),
        (["fit", f"--csv={TABLE}", "--law=pass_rate", "--output=x"], "has no column of pass_rate"),
        (["predict", "--law=epoch", "--output=x.json"], "needs --config=FILE, or --parameters and --tokens"),
        (["predict", "--law=epoch", "--output=x.json", "--parameters=1e9"], "the law chinchilla of epoch needs tokens"),
        (["predict", "--law=epoc", "--output=x.json", "--flops=1e9"], "neither a file nor one of hoffmann, epoch"),
        (["predict", "--law=setup.py", "--output=x.json", "--flops=1e9"], "cannot read --law=setup.py"),
        (["plan"], "needs --budget=FLOPS"),
        (["plan", "--budget=1e3", "--topology=v5e:1x1"], "--budget=1000: the law chinchilla wants"),
        (["plan", "--budget=1e21", "--law=kaplan_tokens"], "has no optimal model size: fit chinchilla"),
        (["plan", "--budget=1e21", "--device=Z80"], "--device=Z80 is unknown: one of TPU v2"),
        (["verify", "--prediction=x.json"], "needs --prediction=FILE and --workdir=DIR"),
        (["fits"], "unknown command 'fits': one of fit, predict, plan, verify"),
    ],
)
def test_user_errors_are_one_line(arguments, message):
    result = scaling(*arguments)
    assert result.returncode == 2, result.stdout
    assert result.stderr.startswith("error: ")
    assert result.stderr.count("\n") == 1
    assert message in result.stderr
    assert not Path("x").exists()


def test_the_ladder():
    """Every member is a valid config; budgets are spent; the target has 100 times the compute of the largest rung."""
    spent = {}
    for name in ("sweep_ladder", "sweep_isoflop", "sweep_target"):
        for overrides in LADDER[name]():
            config = c.load_config("configs/ladder.py", overrides)
            tokens = config.batch.total_tokens
            spent.setdefault(name, []).append(flops_per_token(config.model) * tokens)
            assert tokens > 50 * config.batch.tokens_per_batch
    budgets = [budget for budget in LADDER["ISOFLOP_BUDGETS"] for _ in LADDER["ISOFLOP_SIZES"]]
    assert spent["sweep_isoflop"] == pytest.approx(budgets, rel=1e-3)
    (target,) = spent["sweep_target"]
    assert target > 100 * max(spent["sweep_ladder"])


@pytest.mark.slow
def test_coordinates_of_two_widths(tmp_path):
    arguments = ("coordinates", "--config=configs/ladder.py:rung=1x16", "--config.model.context_length=8")
    sizes = ("--widths=16,64", "--steps=1", "--seeds=1", "--config.optimizer.peak_lr=0.01")
    out = succeeded(scaling(*arguments, *sizes, "--parametrizations=mup", f"--output={tmp_path}/check"))
    assert "logits" in out
    assert "not flat: " in out
    rows = json.loads((tmp_path / "check" / "coordinates.json").read_text())["coordinates"]
    assert {row["kind"] for row in rows} == {"embedding", "attention", "feed_forward", "residual", "scores", "logits"}
    assert all(row["is_flat"] for row in rows if row["kind"] != "scores")  # which vary with the seed
    assert all(row["changes"]["16"][0] == 0 and len(row["sizes"]["64"]) == 2 for row in rows)
    assert (tmp_path / "check" / "width.png").stat().st_size > 10_000
    for wrong, culprit in (
        ([], "--widths"),
        (["--widths=16"], "--widths=16"),
        (["--widths=16,20", f"--output={tmp_path}/no"], "no whole number"),
        (["--widths=16,32", "--parametrizations=mupp"], "mupp"),
        (["--widths=16,32"], "--output"),
    ):
        result = scaling(*arguments, *wrong)
        assert (result.returncode, result.stderr.count("\n")) == (2, 1), wrong
        assert culprit in result.stderr
