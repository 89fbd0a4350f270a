"""The recipes of the studies evolution and since_gpt2 have one size and one budget."""

import json
import runpy

import pytest

from experiments import study
from gptjax.config import Config, load_config, to_json
from gptjax.scaling.flops import flops_per_token

EVOLUTION = runpy.run_path(str(study.FOLDER / "evolution/sweep.py"))
SINCE = runpy.run_path(str(study.FOLDER / "since_gpt2/sweep.py"))


def flops(config: Config, scale: str) -> int:
    """Training FLOPs of a token."""
    return flops_per_token(config.model.with_vocabulary(EVOLUTION["SCALES"][scale].vocabulary))


@pytest.mark.parametrize("scale", EVOLUTION["SCALES"])
def test_generations_have_one_budget_and_one_size(scale):
    budget = EVOLUTION["SCALES"][scale].flops
    paths = [f"experiments/evolution/sweep.py:generation={name},scale={scale}" for name in EVOLUTION["GENERATIONS"]]
    configs = [load_config(path, {}) for path in paths]
    for config in configs:
        assert config.batch.total_tokens * flops(config, scale) == pytest.approx(budget, rel=1e-4)
    sizes = {
        (c.model.num_layers, c.model.embed_dim, c.model.context_length, c.model.head_dim, c.data.tokenizer)
        for c in configs
    }
    assert len(sizes) == 1
    share = load_config(f"{paths[1]},share=0.5", {})
    assert share.batch.total_tokens == pytest.approx(configs[1].batch.total_tokens / 2, abs=1)
    assert share.optimizer.warmup_tokens == pytest.approx(configs[1].optimizer.warmup_tokens / 2, abs=1)


def test_variants_cost_a_token_what_the_modern_recipe_does():
    configs = {name: load_config(f"experiments/since_gpt2/sweep.py:variant={name}", {}) for name in SINCE["VARIANTS"]}
    modern = configs["modern"]
    for name, config in configs.items():
        rate = EVOLUTION["RATES"]["gpt2" if name in ("gpt2", "muon") else "modern"]
        assert config.optimizer.peak_lr == rate, name
        assert config.batch == modern.batch
        # Experts add their router.
        assert flops(config, "cpu") == pytest.approx(flops(modern, "cpu"), rel=0.015), name


def test_the_variants_at_the_size_of_the_demo():
    """They differ from the configs' own `runlocal` in the length of training and what follows from it."""
    for name, (file, argument, generation) in SINCE["VARIANTS"].items():
        config = load_config(f"experiments/since_gpt2/sweep.py:variant={name},scale=demo", {})
        own = load_config(f"configs/{file}.py:runlocal{argument}", {})
        assert config.model == own.model, name
        assert config.batch.tokens_per_batch == own.batch.tokens_per_batch
        assert config.optimizer.peak_lr == SINCE["RUNLOCAL_RATES"][generation] == own.optimizer.peak_lr
        assert config.optimizer.warmup_tokens == own.optimizer.warmup_tokens / 4


def test_runs_of_a_sweep_by_argument_and_seed(tmp_path):
    config = load_config("experiments/since_gpt2/sweep.py", {})
    members = {f"{name}-{seed}": (name, seed) for seed in (1, 0) for name in ("b", "a")}
    for member, (_, seed) in members.items():
        workdir = tmp_path / member
        workdir.mkdir()
        (workdir / "config.json").write_text(json.dumps({**json.loads(to_json(config)), "seed": seed}))
        (workdir / "metrics.jsonl").write_text('{"run": {}}\n')
    record = {member: {"config": f"x.py:variant={name},scale=cpu", "seed": s} for member, (name, s) in members.items()}
    (tmp_path / "sweep.json").write_text(json.dumps({"members": record}))
    runs = study.runs_by(tmp_path, "variant")
    assert {name: sorted(of) for name, of in runs.items()} == {"b": [0, 1], "a": [0, 1]}
    assert {path.name for path in study.workdirs(tmp_path, runs)} == set(members)


def test_labels_of_curves_are_moved_apart():
    assert study._apart({"a": 1.0, "b": 1.05, "c": 3.0}, 0.5) == {"a": 1.0, "b": 1.5, "c": 3.0}


@pytest.mark.parametrize("form", [{"bands": True}, {"rows": ("first", "second")}, {}])
def test_every_form_of_a_panel_is_drawn(form, tmp_path):
    panel = study.Panel("title", {"line": [(0.0, [1.0, 2.0]), (1.0, [2.0, 3.0])]}, "x", "y", **form)
    study.plot(tmp_path / "figure.png", [panel])
    assert (tmp_path / "figure.png").read_bytes().startswith(b"\x89PNG")
