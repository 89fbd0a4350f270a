"""Initial state of fine-tuning runs: the given weights in their places, and new rows from the seed."""

import dataclasses
import shutil
from pathlib import Path

import jax
import numpy as np
import pytest

from gptjax.config import Config, UserError, read_config, replace, with_absolute_paths
from gptjax.config.checks import check
from gptjax.models import peft
from gptjax.parallel.mesh import make_mesh
from gptjax.run import run
from gptjax.stages import registry, saved_weights, start
from gptjax.stages.finetune.task_model import completed
from gptjax.stages.trained_model import load_model
from tests.tiny_tasks import LABELS, MODEL, run_config, save_pretrained, with_method


@pytest.fixture(scope="module")
def config(pretrained, tmp_path_factory) -> Config:
    """Complete, but for what is trained."""
    directory = tmp_path_factory.mktemp("start")
    return completed(run_config(directory, "classification", pretrained), 257, {"labels": LABELS})


@pytest.fixture(scope="module")
def given(pretrained) -> dict[str, np.ndarray]:
    """The weights of `init_from`, by path."""
    return {path: np.asarray(leaf) for path, leaf in peft.flatten(load_model(pretrained).params).items()}


def start_of(config: Config) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    """Base and trained leaves, by path."""
    objective, mesh = registry.objective(config), make_mesh(config.mesh)
    with jax.set_mesh(mesh):
        base, trained = start.given_params(objective.parameters, mesh)
    return tuple(
        {path: np.asarray(leaf) for path, leaf in peft.flatten(tree or {}).items()} for tree in (base, trained)
    )


def test_new_tokens_come_behind_the_rows_that_were_there(config, given):
    base, trained = start_of(config)
    assert base == {}
    assert trained.keys() == given.keys() | {"head/linear/kernel", "head/linear/bias"}
    for path, leaf in given.items():
        np.testing.assert_array_equal(trained[path][: len(leaf)], leaf, err_msg=path)
    table = trained["token_embedding/embedding"]
    assert table.shape == (257 + 4, 16)
    assert 0 < np.std(table[257:]) < 0.1  # as the seed makes them, and the given ones are wider
    others = start_of(dataclasses.replace(config, seed=1))[1]["token_embedding/embedding"]
    np.testing.assert_array_equal(others[:257], table[:257])
    assert np.any(others[257:] != table[257:])


def test_what_is_trained_of_the_top_layers_is_apart_from_what_stays(config, given):
    base, trained = start_of(with_method(config, "top_layers"))
    for path, leaf in given.items():
        rows = np.concatenate([part[path] for part in (base, trained) if path in part])
        np.testing.assert_array_equal(rows[: len(leaf)], leaf, err_msg=path)
    assert trained["layers/block_0/mlp/up/kernel"].shape == base["layers/block_0/mlp/up/kernel"].shape == (1, 16, 64)
    assert trained["token_embedding/embedding"].shape == (4, 16)


def test_layers_that_are_not_transferred_are_initialised_from_the_seed(config, given):
    def transferred(count: int | None) -> dict[str, np.ndarray]:
        return start_of(dataclasses.replace(config, init_layers=count))[1]

    whole, fresh = transferred(None), start_of(dataclasses.replace(config, init_layers=0))[1]
    np.testing.assert_array_equal(fresh["position_embedding/embedding"], given["position_embedding/embedding"])
    assert np.all(fresh["final_norm/scale"] == 1)
    first = transferred(1)
    for path, leaf in given.items():
        np.testing.assert_array_equal(transferred(2)[path], whole[path], err_msg=path)
        if path.startswith("layers/"):
            np.testing.assert_array_equal(first[path][:1], leaf[:1], err_msg=path)
            np.testing.assert_array_equal(first[path][1:], fresh[path][1:], err_msg=path)
            assert np.any(fresh[path] != leaf), path
    for wrong, words in (
        ({"init_layers": 3}, "init_layers=3 must be from 0 to model.num_layers=2"),
        ({"init_layers": 1, "init_from": None}, "set that to a workdir"),
        ({"init_layers": 1, "peft": dataclasses.replace(config.peft, method="lora")}, "peft.method=lora freezes"),
    ):
        with pytest.raises(UserError, match=words):
            check(dataclasses.replace(config, **wrong))
    with pytest.raises(UserError, match="init_layers=1 is no trained model for the reference of stage dpo"):
        registry.check(dataclasses.replace(config, stage="dpo", init_layers=1))


def test_special_tokens_are_trained_where_the_vocabulary_was_rounded_up(config, tmp_path):
    rounded = save_pretrained(tmp_path / "rounded", settings=dataclasses.replace(MODEL, vocab_size=264))
    lora = with_method(replace(config, {"model": {"vocab_size": 264}}), "lora")
    base, trained = start_of(dataclasses.replace(lora, init_from=str(rounded)))
    assert base["token_embedding/embedding"].shape == (257, 16)
    table = np.asarray(load_model(rounded).params["token_embedding"]["embedding"])
    np.testing.assert_array_equal(trained["token_embedding/embedding"], table[257:])


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"num_layers": 4}, "another model: model.num_layers: 2 -> 4"),
        ({"norm_position": "post"}, "another model: model.norm_position: 'pre' -> 'post'"),
        ({"context_length": 16}, "another model: model.context_length: 32 -> 16"),
    ],
)
@pytest.mark.parametrize("method", ["none", "lora"])
def test_weights_of_another_model_are_refused(config, changes, words, method):
    other = with_method(replace(config, {"model": changes}), method)
    with pytest.raises(UserError, match="init_from=") as error:
        start_of(other)
    assert words in str(error.value)
    assert "\n" not in str(error.value)


def test_training_may_choose_its_own_dropout_and_precision(config):
    saved_weights.check_model(
        replace(config, {"model": {"residual_dropout": 0.1, "dtype": "bfloat16"}}), _given(config), "it"
    )


def _given(config: Config) -> Config:
    return saved_weights.completed_config(Path(config.init_from))[0]


@pytest.mark.slow
def test_a_run_from_relative_paths_is_read_from_any_folder(pretrained, tmp_path, monkeypatch):
    """The other folder has a model of the same name, which is not this run's."""
    here, other = tmp_path / "here", tmp_path / "other"
    for folder, weights in ((here, pretrained), (other, save_pretrained(tmp_path / "drawn", seed=1))):
        shutil.copytree(weights, folder / "given")
    monkeypatch.chdir(here)
    config = with_method(run_config(tmp_path, "classification", Path("given")), "lora")
    run(config, Path("tuned"))
    assert read_config(Path("tuned")).init_from == str(here / "given")
    expected = load_model(Path("tuned")).params
    monkeypatch.chdir(other)
    jax.tree.map(np.testing.assert_array_equal, load_model(here / "tuned").params, expected)
    run(dataclasses.replace(config, init_from="../here/given"), here / "tuned")  # resumes: it is the same model
    with pytest.raises(UserError, match="init_from: "):
        run(config, here / "tuned")


def test_paths_of_a_config_are_made_absolute(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", "/home/me")
    config = replace(Config(init_from="~/a"), {"rl": {"reward": "model:runs/reward"}})
    absolute = with_absolute_paths(config)
    assert (absolute.init_from, absolute.rl.reward) == ("/home/me/a", f"model:{tmp_path}/runs/reward")
    for reward in ("", "bleu", "python:rewards.score"):
        kept = replace(Config(init_from="gs://bucket/run"), {"rl": {"reward": reward}})
        assert with_absolute_paths(kept) == kept


def test_weights_that_are_not_there(config, pretrained, tmp_path):
    copy = shutil.copytree(pretrained, tmp_path / "copy")
    shutil.rmtree(copy / "checkpoints")
    with pytest.raises(UserError, match=r"copy has no checkpoint"):
        start_of(dataclasses.replace(config, init_from=str(copy)))
    with pytest.raises(UserError, match="is not a workdir"):
        start_of(dataclasses.replace(config, init_from=str(tmp_path)))


def test_several_share_the_weights_that_they_start_from(config):
    mesh = make_mesh(config.mesh)
    loaded: dict = {}
    bases = []
    with jax.set_mesh(mesh):
        for method in ("head", "lora"):
            parameters = registry.parameters(with_method(config, method))
            bases.append(
                peft.flatten(
                    saved_weights.given_base(parameters, saved_weights.load_given(parameters, mesh, loaded), mesh)
                )
            )
    (weights,) = loaded.values()
    path = "layers/block_0/mlp/up/kernel"
    memory = {leaf[path].unsafe_buffer_pointer() for leaf in [*bases, peft.flatten(weights)]}
    assert len(memory) == 1
