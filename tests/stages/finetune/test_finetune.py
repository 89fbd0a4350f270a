"""Fine-tuning runs end to end: outputs, checkpoints, resuming and refusals of each kind of task and each method."""

import dataclasses
import json
import shutil
from collections.abc import Callable
from itertools import islice
from pathlib import Path

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest

from gptjax.config import Config, UserError, replace
from gptjax.inference.engine import Engine
from gptjax.inference.sampling import Sampling
from gptjax.interop.huggingface import export_workdir
from gptjax.models import peft
from gptjax.models.gpt import GPT
from gptjax.parallel.mesh import make_mesh
from gptjax.run import run
from gptjax.stages.builders import BUILDERS, build
from gptjax.stages.finetune import build as finetune
from gptjax.stages.saved_weights import load_parts
from gptjax.stages.trained_model import load_model
from gptjax.training.metrics_file import read_metrics
from tests.tiny_tasks import BATCH, KINDS, LABELS, run_config, save_pretrained, with_method

# The kind of task that the run of a method has: together they are a run of each method and of each kind.
KIND_OF = {
    "none": "tagging",
    "lora": "entailment",
    "adalora": "regression",
    "adapters": "similarity",
    "head": "multiple_choice",
    "top_layers": "classification",
}
METHODS = tuple(KIND_OF)
METHOD_OF = {kind: method for method, kind in KIND_OF.items()}  # "none" for the other kinds
STEPS_AN_EPOCH, STEPS = 2, 4
NEW = {"head/linear/kernel", "head/linear/bias", "token_embedding/embedding"}  # of the last, the rows of new tokens
PATH = "layers/block_0/"
LORA = {f"{PATH}attention/{place}/lora_{part}" for place in ("qkv", "out") for part in "ab"}
ADALORA = {f"{PATH}attention/{place}/lora_{part}" for place in ("qkv", "out") for part in ("p", "lambda", "q")}


@pytest.fixture(scope="module")
def config_of(pretrained, tmp_path_factory) -> Callable[..., Config]:
    """A run of four steps that saves in the middle."""
    directory = tmp_path_factory.mktemp("rows")

    def config_of(kind: str = "classification", method: str = "none") -> Config:
        every = {"every_epochs": 1.0}
        settings = {"batch": {"epochs": 2.0}, "evaluation": every, "checkpoint": every}
        return with_method(replace(run_config(directory, kind, pretrained), settings), method)

    return config_of


@pytest.fixture(scope="module")
def trained(config_of, tmp_path_factory) -> Callable[..., Path]:
    """The workdir of the run of a kind of task, which nobody may change."""
    workdirs: dict[str, Path] = {}

    def trained(kind: str) -> Path:
        if kind not in workdirs:
            workdir = tmp_path_factory.mktemp("runs") / kind
            assert run(config_of(kind, METHOD_OF.get(kind, "none")), workdir).step == STEPS
            workdirs[kind] = workdir
        return workdirs[kind]

    return trained


def saved(workdir: Path, step: int = STEPS) -> dict[str, np.ndarray]:
    """Every array of a checkpoint, by item and path."""
    with ocp.CheckpointManager(workdir.absolute() / "checkpoints") as manager:
        items = {name: ocp.args.StandardRestore() for name in ("params", "train")}
        restored = manager.restore(step, args=ocp.args.Composite(**items))
    leaves = jax.tree_util.tree_leaves_with_path(dict(restored.items()))
    return {jax.tree_util.keystr(path, simple=True, separator="/"): np.asarray(leaf) for path, leaf in leaves}


def params_of(workdir: Path) -> dict[str, np.ndarray]:
    """What a checkpoint has of parameters, by path."""
    arrays = saved(workdir).items()
    return {name.removeprefix("params/"): array for name, array in arrays if name.startswith("params/")}


def leaves(tree: object) -> dict[str, np.ndarray]:
    return {path: np.asarray(leaf) for path, leaf in peft.flatten(tree).items()}


def validation(workdir: Path) -> list[dict]:
    return [record for record in read_metrics(workdir)[1] if record["split"] == "validation"]


def lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def one_line(error: pytest.ExceptionInfo, *words: str) -> None:
    assert "\n" not in str(error.value)
    for word in words:
        assert word in str(error.value)


# --- what runs write --------------------------------------------------------------------------------------------------

SAID = {  # of each row, in predictions.jsonl
    **{kind: {"label", "probabilities"} for kind in ("classification", "entailment", "similarity")},
    "regression": {"value"},
    "multiple_choice": {"choice", "probabilities"},
    "tagging": {"tags"},
    "question_answering": {"answer", "answer_start", "score"},
}
METRIC = {"regression": "pearson", "tagging": "entity_f1", "question_answering": "exact_match"}


@pytest.mark.parametrize("kind", [KINDS[0], *(pytest.param(kind, marks=pytest.mark.slow) for kind in KINDS[1:])])
def test_each_kind_of_task_writes_its_report(trained, kind):
    workdir = trained(kind)
    report = json.loads((workdir / finetune.METRICS_FILE).read_text())
    assert {"loss", METRIC.get(kind, "accuracy")} <= report.keys()
    predictions = lines(workdir / finetune.PREDICTIONS_FILE)
    assert len(predictions) == 5
    for i, record in enumerate(predictions, start=1):
        assert record["predicted"].keys() == SAID[kind]
        assert f"validation.{kind}:" in record["place"], i
        assert "text" in record or "first" in record or "tokens" in record or record.keys() & {"context", "premise"}
    has_classes = kind not in ("regression", "multiple_choice", "question_answering")
    assert (workdir / finetune.CONFUSION_FILE).exists() == has_classes
    assert ("per_label" in report) == ("confusion" in report) == has_classes
    assert ("per_entity" in report) == (kind == "tagging")
    if has_classes:
        counts, labels = np.array(report["confusion"]["counts"]), report["confusion"]["labels"]
        assert counts.shape == (len(labels), len(labels))
        for label, scores in report["per_label"].items():
            i = labels.index(label)
            assert scores["support"] == counts[i].sum()
            assert scores["recall"] == pytest.approx(counts[i, i] / max(counts[i].sum(), 1))
            assert scores["precision"] == pytest.approx(counts[i, i] / max(counts[:, i].sum(), 1))
    task = json.loads((workdir / "task.json").read_text())
    assert task.keys() == {"labels", "label_weights", "target_mean", "target_std"}
    if kind == "regression":
        targets = [2.5 * (i % 3) + 1 for i in range(2 * BATCH)]
        assert (task["target_mean"], task["target_std"]) == pytest.approx((np.mean(targets), np.std(targets)))
    assert [record["step"] for record in validation(workdir)] == [0, 2, 4]


def test_the_report_is_of_the_best_checkpoint(trained):
    for kind in KINDS[:2]:
        report = json.loads((trained(kind) / finetune.METRICS_FILE).read_text())
        assert report["loss"] == pytest.approx(
            min(record["loss"] for record in validation(trained(kind))[1:]), rel=1e-6
        )


def test_labels_come_in_the_order_that_is_given(config_of):
    order = ("good", "bad", "fair", "never seen")
    config = replace(config_of(), {"task": {"labels": order}})
    stage = build(config, make_mesh(config.mesh), None)
    assert stage.config.task.labels == order
    assert json.loads(stage.files["task.json"])["labels"] == list(order)
    labels = [array for batch in islice(stage.batches(0, None), STEPS_AN_EPOCH) for array in batch.arrays["labels"]]
    assert np.bincount(labels, minlength=4).tolist() == [5, 6, 5, 0]  # of 16 rows: bad, fair, good, bad, ...
    assert build(config_of(), make_mesh(config.mesh), None).config.task.labels == LABELS  # sorted


def test_rare_labels_can_count_as_much_as_others(config_of):
    config = replace(config_of(), {"task": {"balanced_labels": True}})
    stage = build(config, make_mesh(config.mesh), None)
    assert stage.config.task.label_weights == pytest.approx((16 / 18, 16 / 15, 16 / 15))


# --- methods ----------------------------------------------------------------------------------------------------------


def expected_paths(method: str, given: dict[str, np.ndarray]) -> set[str]:
    """The parameters that a method trains, of all that `init_from` has."""
    adapters = {
        f"{PATH}{place}_adapter/{layer}/{leaf}"
        for place in ("attention", "mlp")
        for layer in ("down", "up")
        for leaf in ("kernel", "bias")
    }
    norms = {path for path in given if path.split("/")[-2].endswith("norm")}
    return (
        NEW
        | {
            "none": set(given),
            "lora": LORA,
            "adalora": ADALORA,
            "adapters": adapters | norms,
            "head": set(),
            "top_layers": {path for path in given if path.startswith((PATH, "final_norm/"))},
        }[method]
    )


@pytest.mark.parametrize("method", METHODS)
def test_a_checkpoint_has_what_is_trained_and_no_more(trained, pretrained, method):
    given = leaves(load_model(pretrained).params)
    arrays = saved(trained(KIND_OF[method]))
    params = {name.removeprefix("params/"): array for name, array in arrays.items() if name.startswith("params/")}
    assert params.keys() == expected_paths(method, given)
    rows = 261 if method == "none" else 4
    assert params["token_embedding/embedding"].shape == (rows, 16)
    if method == "top_layers":
        assert params[f"{PATH}mlp/up/kernel"].shape == (1, 16, 64)
    of_optimizer = sum(array.nbytes for name, array in arrays.items() if name.startswith("train/opt_state"))
    trained_bytes = sum(array.nbytes for array in params.values())
    # Two moments; with AdaLoRA also the sensitivity and its uncertainty. And a count.
    assert 2 * trained_bytes <= of_optimizer <= (4 if method == "adalora" else 2) * trained_bytes + 16
    header, _ = read_metrics(trained(KIND_OF[method]))
    assert header["trained_parameters"] == sum(array.size for array in params.values())
    new = sum(params[path].size for path in NEW) - (rows - 4) * 16
    assert header["parameters"] >= sum(array.size for array in given.values()) + new


@pytest.mark.parametrize("method", METHODS[1:])
def test_weights_that_are_not_trained_stay_bit_for_bit(trained, pretrained, method):
    given, now = leaves(load_model(pretrained).params), leaves(load_model(trained(KIND_OF[method])).params)
    changed = {path for path, leaf in given.items() if np.any(now[path][: len(leaf)] != leaf)}
    expected = {
        "lora": {f"{PATH}attention/{place}/kernel" for place in ("qkv", "out")},
        "adapters": expected_paths("adapters", given) & given.keys(),
        "head": set(),
        "top_layers": expected_paths("top_layers", given) & given.keys(),
    }
    assert changed - {"token_embedding/embedding"} <= expected.get(method, expected["lora"]) - NEW
    assert "token_embedding/embedding" not in changed
    assert bool(changed) == (method != "head")
    if method == "top_layers":
        np.testing.assert_array_equal(now[f"{PATH}mlp/up/kernel"][0], given[f"{PATH}mlp/up/kernel"][0])
        assert np.any(now[f"{PATH}mlp/up/kernel"][1] != given[f"{PATH}mlp/up/kernel"][1])


def test_the_given_workdir_is_only_read(trained, pretrained, tmp_path_factory):
    for method in METHODS:
        trained(KIND_OF[method])
    fresh = leaves(load_model(save_pretrained(tmp_path_factory.mktemp("again"))).params)
    for path, leaf in leaves(load_model(pretrained).params).items():
        np.testing.assert_array_equal(leaf, fresh[path])


@pytest.mark.slow
@pytest.mark.parametrize("method", METHODS)
def test_a_resumed_run_ends_as_an_uninterrupted_one(trained, config_of, tmp_path, method):
    whole = trained(KIND_OF[method])
    resumed = shutil.copytree(whole, tmp_path / "run")
    shutil.rmtree(resumed / "checkpoints" / str(STEPS))  # as if it had died in the steps before
    (resumed / finetune.METRICS_FILE).unlink()
    report = run(config_of(KIND_OF[method], method), resumed)
    assert report.step == STEPS
    expected, found = saved(whole), saved(resumed)
    assert expected.keys() == found.keys()
    for name, array in expected.items():
        np.testing.assert_array_equal(array, found[name], err_msg=name)
    for name in (finetune.METRICS_FILE, finetune.PREDICTIONS_FILE):
        assert (resumed / name).read_text() == (whole / name).read_text()
    assert [r["loss"] for r in read_metrics(resumed)[1]] == [r["loss"] for r in read_metrics(whole)[1]]


@pytest.mark.slow
def test_a_run_that_dies_in_a_step_resumes(trained, config_of, tmp_path, monkeypatch):
    def broken_build(*args):
        stage = finetune.build(*args)

        def broken(start: int, run):
            yield from islice(stage.batches(start, run), 3)
            raise ConnectionError("the data is gone")

        return dataclasses.replace(stage, batches=broken)

    with monkeypatch.context() as patch:
        patch.setitem(BUILDERS, "finetune", broken_build)
        with pytest.raises(ConnectionError):
            run(config_of(KIND_OF["lora"], "lora"), tmp_path / "run")
    assert [path.name for path in (tmp_path / "run" / "checkpoints").iterdir()] == ["2"]
    run(config_of(KIND_OF["lora"], "lora"), tmp_path / "run")
    for name, array in saved(trained(KIND_OF["lora"])).items():
        np.testing.assert_array_equal(array, saved(tmp_path / "run")[name], err_msg=name)


@pytest.mark.parametrize("method", ["lora", "adalora"])
def test_merged_weights_give_the_logits_that_training_saw(trained, method):
    workdir = trained(KIND_OF[method])
    mesh, tokens_BT = make_mesh(load_model(workdir).config.mesh), np.arange(64).reshape(2, 32) * 4
    with jax.set_mesh(mesh):
        parts = load_parts(workdir, mesh)
        config = parts.parameters.config
        params = {**parts.parameters.join(parts.base, parts.trained)}
        params.pop("head")
        with peft.applied(config.peft, deterministic=True):
            model = GPT(config.model)
            seen = jax.jit(lambda p: model.apply({"params": p}, tokens_BT))(params)
    merged = load_model(workdir)
    found = jax.jit(lambda p: merged.model.apply({"params": p}, tokens_BT))(merged.params)
    np.testing.assert_allclose(found, seen, atol=1e-5, rtol=1e-5)
    without = {path: leaf for path, leaf in peft.flatten(params).items() if "lora_" not in path}
    plain = jax.jit(lambda p: model.apply({"params": p}, tokens_BT))(peft.unflatten(without))
    assert np.max(np.abs(plain - seen)) > 1e-3  # the matrices have learned something


@pytest.mark.parametrize("method", ["lora", "top_layers"])
def test_what_a_method_leaves_is_a_plain_model(trained, method):
    workdir = trained(KIND_OF[method])
    model = load_model(workdir)
    assert model.head["linear"]["kernel"].shape == (16, 3)
    engine = Engine(model.model, model.params, model.tokenizer, model.mesh)
    (completion,) = engine.generate(
        [model.tokenizer.encode("good")], 4, Sampling(0.0), seeds=0, ignore_end_of_text=True
    )
    assert len(completion.tokens) == 4


def test_adapters_have_no_form_of_hugging_faces(trained, tmp_path):
    with pytest.raises(UserError, match="adapter") as error:
        export_workdir(trained(KIND_OF["adapters"]), tmp_path / "hf")
    one_line(error)


def test_a_changed_base_is_refused(trained, config_of, tmp_path):
    other = save_pretrained(tmp_path / "other", seed=1)
    workdir = shutil.copytree(trained(KIND_OF["lora"]), tmp_path / "run")
    config = json.loads((workdir / "config.json").read_text()) | {"init_from": str(other)}
    (workdir / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match="restore its init_from") as error:
        load_model(workdir)
    one_line(error, str(workdir), "started from have changed")
    moved = dataclasses.replace(config_of(KIND_OF["lora"], "lora"), init_from=str(other))
    with pytest.raises(UserError, match="restore its init_from"):
        run(moved, workdir)
    shutil.rmtree(other)
    with pytest.raises(UserError, match=f"{other} is not a workdir"):
        load_model(workdir)


# --- stopping early ---------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_stops_out_of_patience_and_reports_the_best(config_of, tmp_path):
    every = {"every_epochs": 0.5}
    settings = {"evaluation": every | {"patience": 2}, "checkpoint": every, "batch": {"epochs": 20.0}}
    config = replace(config_of(), settings | {"optimizer": {"peak_lr": 0.3, "schedule": "constant"}})
    workdir = tmp_path / "run"
    ended = run(config, workdir)
    losses = {record["step"]: record["loss"] for record in validation(workdir) if record["step"] > 0}
    best = min(losses, key=lambda step: losses[step])
    assert 3 <= ended.step < 20
    assert max(losses) == ended.step
    since = [step for step in losses if step > best]
    assert len(since) == 2
    report = json.loads((workdir / finetune.METRICS_FILE).read_text())
    assert report["loss"] == pytest.approx(losses[best], rel=1e-6)
    assert load_model(workdir, best=True).step == best
    said = (workdir / finetune.PREDICTIONS_FILE).read_text()
    (workdir / finetune.PREDICTIONS_FILE).unlink()
    assert run(config, workdir).step == ended.step  # it still has no patience
    assert json.loads((workdir / finetune.METRICS_FILE).read_text()) == report
    assert (workdir / finetune.PREDICTIONS_FILE).read_text() == said
    shutil.rmtree(workdir / "checkpoints" / str(ended.step))
    assert run(config, workdir).step == ended.step  # and knows how much of it was left
    assert json.loads((workdir / finetune.METRICS_FILE).read_text()) == report
    kept = {int(path.name) for path in (workdir / "checkpoints").iterdir()}
    assert best in kept  # although the process that found it the best has ended
    assert len(kept) <= 3  # it, and the newest two
