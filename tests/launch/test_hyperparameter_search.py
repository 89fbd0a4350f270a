"""Searches by Optuna on curves that the test writes: what is sampled and stopped depends on the curves alone."""

import itertools
import json
import math
import random

import pytest

from gptjax import config as c
from gptjax.config import UserError
from gptjax.launch import grid
from gptjax.launch.hyperparameter_search import PRUNERS, SAMPLERS, Search, Settings
from gptjax.launch.members import make_members

pytest.importorskip("optuna")

SPACE = {
    "optimizer.peak_lr": grid.LogUniform(1e-4, 1e-1),
    "optimizer.name": grid.Choice(["adamw", "muon"]),
    "model.num_layers": grid.Integers(2, 4),
}
EVALUATIONS = 6
EVERY = 1024
CONFIG = c.replace(
    c.load_config("configs/gpt2.py:runlocal"),
    {"batch": {"total_tokens": EVALUATIONS * EVERY}, "evaluation": {"every_tokens": EVERY}},
)


def curve(overrides) -> list[float]:
    """Losses that fall to a level which depends on the learning rate."""
    level = 3 + abs(math.log10(overrides["optimizer.peak_lr"]) + 2.5)
    return [level + 2 / (i + 1) for i in range(EVALUATIONS)]


def write(member, losses) -> None:
    member.workdir.mkdir(parents=True, exist_ok=True)
    lines = [{"run": {}}, {"step": 0, "tokens": 0, "split": "validation", "loss": 9.0}]
    lines += [{"step": i, "tokens": i, "split": "validation", "loss": x} for i, x in enumerate(losses, start=1)]
    (member.workdir / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


def search(directory, settings: Settings, rng: random.Random | None):
    """Runs a search whose records arrive at random times, or each run after the other; returns what it did."""
    found, members = Search(settings, SPACE, CONFIG), []
    for number in range(math.ceil(settings.trials / settings.round_size)):
        sampled = found.sample_round(number)
        names = [f"trial-{len(members) + i}" for i in range(len(sampled))]
        trials = make_members("configs/gpt2.py:runlocal", {}, sampled, directory, names)
        members += trials
        found.add(trials)
        written = dict.fromkeys(names, 0)
        while any(count < EVALUATIONS for count in written.values()):
            unfinished = [trial for trial in trials if written[trial.name] < EVALUATIONS]
            trial = unfinished[0] if rng is None else rng.choice(unfinished)
            written[trial.name] += 1 if rng is None else rng.randint(1, 3)
            write(trial, curve(trial.overrides)[: written[trial.name]])
            if rng is not None and rng.random() < 0.1:  # killed: a new process reads everything again
                again = Search(settings, SPACE, CONFIG)
                again.add(members)
                again.decide(lambda name, written=written: written.get(name, EVALUATIONS) >= EVALUATIONS)
                found = again
            for name in found.decide(lambda name, written=written: written.get(name, EVALUATIONS) >= EVALUATIONS):
                if rng is not None and rng.random() < 0.5:  # stopped at once; otherwise it runs to its end
                    written[name] = EVALUATIONS
        found.decide(lambda name: True)
    return [member.overrides for member in members], found.stopped, found.last_steps()


@pytest.mark.parametrize("pruner", PRUNERS)
def test_a_search_does_not_depend_on_the_order_of_events(pruner, tmp_path):
    settings = Settings("tpe", pruner, trials=10, round_size=4, reduction=2, seed=1)
    expected = search(tmp_path / "one", settings, None)
    assert search(tmp_path / "other", settings, random.Random(0)) == expected
    overrides, stopped, last_steps = expected
    assert len(overrides) == 10
    assert stopped == last_steps
    assert bool(stopped) == (pruner != "none")
    assert all(1 <= count < EVALUATIONS for count in stopped.values())


def test_asha_keeps_the_best(tmp_path):
    settings = Settings("random", "asha", trials=12, round_size=4, reduction=2, seed=0)
    overrides, stopped, _ = search(tmp_path, settings, None)
    finals = {f"trial-{i}": curve(of)[-1] for i, of in enumerate(overrides)}
    assert min(finals, key=finals.get) not in stopped
    assert len(stopped) >= 5


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_samples_are_in_the_space_and_differ(sampler, tmp_path):
    settings = Settings(sampler, "none", trials=8, round_size=3, reduction=2, seed=0)
    overrides, _, _ = search(tmp_path, settings, None)
    assert len(overrides) == 8
    for one in overrides:
        assert 1e-4 <= one["optimizer.peak_lr"] <= 1e-1
        assert one["optimizer.name"] in ("adamw", "muon")
        assert one["model.num_layers"] in (2, 3, 4)
    assert all(a != b for a, b in itertools.combinations(overrides, 2))


def test_tpe_learns_from_the_rounds_before(tmp_path):
    settings = Settings("tpe", "none", trials=40, round_size=4, reduction=2, seed=0)
    overrides, _, _ = search(tmp_path, settings, None)
    distances = [abs(math.log10(one["optimizer.peak_lr"]) + 2.5) for one in overrides[-10:]]
    assert sum(distances) / 10 < 0.5  # of random draws: 0.75 on average


def test_a_diverged_trial_is_stopped(tmp_path):
    found = Search(Settings("random", "asha", 2, 2, 2, 0), SPACE, CONFIG)
    found.sample_round(0)
    trials = make_members("configs/gpt2.py:runlocal", {}, [{"seed": 0}, {"seed": 1}], tmp_path, ["a", "b"])
    found.add(trials)
    write(trials[0], [4.0, 3.0])
    write(trials[1], [None, 3.0])
    assert found.decide(lambda name: False) == ["b"]


def test_a_pruner_needs_evaluations():
    settings = Settings("tpe", "asha", 4, 4, 3, 0)
    rare = c.replace(CONFIG, {"evaluation": {"every_tokens": None}})
    with pytest.raises(UserError, match=r"--pruner=asha stops runs at their evaluations: set batch.total_tokens"):
        Search(settings, SPACE, rare)
