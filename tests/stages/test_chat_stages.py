"""The chat stages on the training loop: whole runs, resumed ones, and user errors."""

import dataclasses
import json
import shutil
from pathlib import Path

import jax
import numpy as np
import pytest

from gptjax import config as c
from gptjax.checkpoint.manager import Checkpoints
from gptjax.config import UserError
from gptjax.models import peft
from gptjax.parallel.mesh import make_mesh
from gptjax.run import run
from gptjax.stages import registry
from gptjax.stages.builders import build
from gptjax.stages.chat_data import rankings_of
from gptjax.stages.registry import completed_config
from gptjax.stages.saved_weights import load_parts, load_reward_weights, load_weights
from gptjax.stages.start import start_state
from gptjax.training.metrics_file import read_metrics
from tests.tiny_chats import BATCH, STAGES_OF_CHAT, config_of
from tests.tiny_tasks import CONTEXT, MODEL


@pytest.fixture(scope="module")
def finished(tmp_path_factory, pretrained):
    """A whole run of each stage; the others start from the weights of sft."""
    root = tmp_path_factory.mktemp("chat")
    runs: dict[str, tuple[c.Config, Path]] = {}
    for stage in STAGES_OF_CHAT:
        start = pretrained if stage == "sft" else runs["sft"][1]
        runs[stage] = config_of(stage, root, start), root / stage
        run(*runs[stage])
    return runs


def weights_of(workdir: Path):
    mesh = make_mesh(c.MeshConfig())
    with jax.set_mesh(mesh):
        return load_weights(workdir, mesh)


def last(workdir: Path, split: str) -> dict:
    return [record for record in read_metrics(workdir)[1] if record["split"] == split][-1]


@pytest.mark.slow
def test_sft_is_trained_on_the_completions_alone(finished):
    _, workdir = finished["sft"]
    records = read_metrics(workdir)[1]
    first, final = (record["loss"] for record in records if record["split"] == "validation")
    assert final < first
    config, tokenizer = completed_config(workdir)
    assert config.model.vocab_size == tokenizer.vocab_size + 2
    assert "user: q1\nassistant: " in next(iter((workdir / "samples").iterdir())).read_text()
    # Only the assistant's tokens count: 1 to 3 letters and the end of its turn in each of 24 conversations.
    stage = build(finished["sft"][0], make_mesh(c.MeshConfig()), None)
    batches = stage.batches(0, None)
    rows = stage.total_tokens // CONTEXT
    counted = sum(next(batches).arrays["weights"].sum() for _ in range(-(-rows // BATCH)))
    assert counted >= 24 + sum(1 + i % 3 for i in range(24))


def test_reward_and_dpo_rank_the_completions(finished):
    for stage in ("reward", "dpo"):
        _, workdir = finished[stage]
        assert last(workdir, "validation")["accuracy"] > 0.7
        assert {"accuracy", "loss", "grad_norm"} <= set(last(workdir, "train"))
    assert last(finished["dpo"][1], "validation")["margin"] > 0


def test_the_mean_of_the_best_completions_is_recorded(finished):
    _, workdir = finished["reward"]
    scale = json.loads((workdir / "reward.json").read_text())
    assert scale.keys() == {"mean", "step"}
    with Checkpoints(workdir, c.CheckpointConfig(), read_only=True) as checkpoints:
        assert scale["step"] == checkpoints.best_step()
    weights = weights_of(workdir)
    assert weights.head["linear"]["kernel"].shape == (MODEL.embed_dim, 1)


def test_rewards_are_those_of_the_checkpoint_that_their_mean_was_measured_on(finished, tmp_path):
    config, source = finished["reward"]
    workdir = shutil.copytree(source, tmp_path / "reward")
    scale = json.loads((workdir / "reward.json").read_text())
    mesh, best = make_mesh(config.mesh), scale["step"]
    program = registry.parameters(completed_config(workdir)[0])

    def bias() -> tuple[int, float]:
        weights = load_reward_weights(workdir, mesh)
        return weights.step, float(weights.head["linear"]["bias"][0])

    with jax.set_mesh(mesh):
        before = bias()
        with Checkpoints(workdir, config.checkpoint) as checkpoints:  # training continues, and overfits
            state, position = start_state(program, mesh, checkpoints)
            worse = jax.tree.map(lambda leaf: leaf + 1, state.params)
            checkpoints.save(best + 1, state.replace(step=state.step + 1, params=worse), position, -1e9)
        assert bias() == before
        assert before[0] == best
        # Files of earlier versions have no step: their mean was measured on the best checkpoint too.
        (workdir / "reward.json").write_text(json.dumps({"mean": scale["mean"]}))
        assert bias() == before
        (workdir / "reward.json").write_text(json.dumps({"mean": 0.0, "step": best + 1}))
        assert bias() == (best + 1, pytest.approx(before[1] + scale["mean"] + 1, abs=1e-5))
        (workdir / "reward.json").write_text(json.dumps({"mean": 0.0, "step": best + 2}))
        with pytest.raises(UserError, match=rf"was measured on checkpoint {best + 2}, which was deleted"):
            bias()
        (workdir / "reward.json").unlink()
        assert bias() == (best, pytest.approx(before[1] + scale["mean"], abs=1e-5))


def test_dpo_leaves_the_reference_and_saves_the_policy_alone(finished):
    policy, start = (weights_of(finished[stage][1]) for stage in ("dpo", "sft"))
    assert peft.flatten(policy.gpt).keys() == peft.flatten(start.gpt).keys()
    assert any(not np.array_equal(a, b) for a, b in zip(*map(jax.tree.leaves, (policy.gpt, start.gpt)), strict=True))
    header = read_metrics(finished["dpo"][1])[0]
    assert header["parameters"] == 2 * header["trained_parameters"]


@pytest.mark.parametrize("stage", STAGES_OF_CHAT)
def test_a_run_in_two_parts_is_the_same_run(finished, stage, tmp_path):
    """It stops after one step, in the middle of the steps that a record averages."""
    config, whole = finished[stage]
    config = c.replace(config, {"logging": {"every_steps": 2}, "evaluation": {"sample_tokens": 0}})
    first = dataclasses.replace(config, batch=dataclasses.replace(config.batch, epochs=None, total_tokens=1))
    run(first, tmp_path)
    run(config, tmp_path, allow_config_changes=True)
    mesh = make_mesh(c.MeshConfig())
    with jax.set_mesh(mesh):
        parts = [load_parts(workdir, mesh).trained for workdir in (whole, tmp_path)]
    for once, twice in zip(*map(jax.tree.leaves, parts), strict=True):
        np.testing.assert_array_equal(once, twice)
    steps, pairs = ([r for r in read_metrics(d)[1] if r["split"] == "train"] for d in (whole, tmp_path))
    assert pairs
    for one, two, mean in zip(steps[::2], steps[1::2], pairs, strict=False):
        assert mean["step"] == two["step"]
        for name in {"loss", "accuracy", "margin"} & set(one):
            assert mean[name] == (one[name] + two[name]) / 2


@pytest.mark.slow
def test_lora_with_a_reference_trains_its_matrices_alone(finished, tmp_path):
    start = finished["sft"][1]
    changes = {"peft": {"method": "lora", "rank": 2}, "evaluation": {"sample_tokens": 0}}
    run(c.replace(finished["dpo"][0], changes), tmp_path)
    header = read_metrics(tmp_path)[0]
    assert header["trained_parameters"] < header["parameters"] / 20
    merged, given = (peft.flatten(weights_of(workdir).gpt) for workdir in (tmp_path, start))
    changed = [path for path, leaf in merged.items() if not np.array_equal(leaf, given[path])]
    assert changed
    assert all(path.endswith(("attention/qkv/kernel", "attention/out/kernel")) for path in changed)


def test_completions_of_different_lengths_have_the_same_prompt(finished, tmp_path):
    """The first exchange fits with the short completion, but not with the long one."""
    turns = [("user", "q1"), ("assistant", "a"), ("user", "q2")]
    record = {"messages": [{"role": r, "content": t} for r, t in turns], "ranking": ["b", "c" * 26]}
    path = tmp_path / "rankings.jsonl"
    path.write_text(json.dumps(record) + "\n")
    config = c.replace(finished["dpo"][0], {"data": {"source": f"jsonl:{path}"}})
    arrays = next(build(config, make_mesh(c.MeshConfig()), None).batches(0, None)).arrays
    prompt, end = [256, *b"q2", 257], 258
    for number, completion in ((1, b"b"), (2, b"c" * 26)):
        here = arrays["segments"][0] == number
        assert arrays["tokens"][0][here].tolist() == [*prompt, *completion, end]
        assert arrays["weights"][0][here].sum() == len(completion) + 1
    record["ranking"][1] = "c" * CONTEXT
    path.write_text(json.dumps(record) + "\n")
    with pytest.raises(UserError, match=r"rankings.jsonl:1: a completion has 33 tokens, in a context of 32"):
        build(config, make_mesh(c.MeshConfig()), None)


def test_no_held_out_completion_is_a_wrong_one_in_training(finished):
    config = c.replace(
        finished["dpo"][0],
        {
            "data": {"source": "chatterbot", "validation_source": None, "validation_fraction": 0.1},
            "chat": {"random_answers": 3},
        },
    )
    train, validation = rankings_of(config)
    used = [
        {text for texts in side for text in texts}
        for side in ([r.completions for r in train], [r.completions for r in validation])
    ]
    true = [{r.completions[0] for r in side} for side in (train, validation)]
    assert used[0] <= true[0]
    assert used[1] <= true[1]
    assert 0.05 < len(validation) / len(train) < 0.2


def test_random_completions_that_are_too_long_are_left_out_before_the_prompt_is(finished, tmp_path):
    """The long completion fits behind its own prompt alone."""
    exchanges = [("q", "a" * 26), *((f"question {i}", letter) for i, letter in enumerate("bcde"))]
    turns = [[{"role": "user", "content": user}, {"role": "assistant", "content": text}] for user, text in exchanges]
    path = tmp_path / "chats.jsonl"
    path.write_text("".join(json.dumps({"messages": messages}) + "\n" for messages in turns))
    changes = {"data": {"source": f"jsonl:{path}", "validation_source": f"jsonl:{path}"}}
    config = c.replace(finished["dpo"][0], changes | {"chat": {"random_answers": 4, "on_too_long": "skip"}})
    arrays = next(build(config, make_mesh(c.MeshConfig()), None).batches(0, None)).arrays
    counts = (arrays["ranks"] > 0).sum(axis=-1).reshape(-1)  # completions of each prompt, 0 where there is no prompt
    assert set(counts[counts > 0].tolist()) == {4, 5}
    with pytest.raises(UserError, match="its last exchange has"):
        build(c.replace(config, {"chat": {"on_too_long": "error"}}), make_mesh(c.MeshConfig()), None)


def test_bytes_that_are_no_text_are_replaced_or_refused(finished, tmp_path):
    config, _ = finished["sft"]
    path = tmp_path / "bytes.jsonl"
    path.write_bytes(Path(config.data.source.removeprefix("jsonl:")).read_bytes().replace(b"q3", b"\xff"))
    mesh = make_mesh(c.MeshConfig())
    replaced = c.replace(config, {"data": {"source": f"jsonl:{path}", "invalid_utf8": "replace"}})
    assert build(replaced, mesh, None).total_tokens > 0
    with pytest.raises(UserError, match=r"bytes.jsonl:4 is not UTF-8"):
        build(c.replace(replaced, {"data": {"invalid_utf8": "error"}}), mesh, None)


@pytest.mark.parametrize(
    ("stage", "changes", "message"),
    [
        ("sft", {"batch": {"ramp_start_tokens": 128, "ramp_tokens": 512, "microbatch_size": 1}}, "batch.ramp_start"),
        ("sft", {"chat": {"template": "chatml"}}, r"chat\.template=chatml ignores .* set chat\.template=custom"),
        ("sft", {"chat": {"pretraining_share": 0.1}}, r"chat\.pretraining_share=0.1: set both"),
        ("sft", {"evaluation": {"sample_prompt": "x" * 40}}, r"evaluation\.sample_prompt: its last exchange has"),
        ("reward", {"data": {"source": "chatterbot"}}, r"set chat\.random_answers"),
        ("dpo", {"dpo": {"beta": 0.0}}, r"dpo\.beta=0.0 must be positive"),
        ("dpo", {"dpo": {"label_smoothing": 0.5}}, r"dpo\.label_smoothing=0.5 must be in"),
        ("dpo", {"model": {"residual_dropout": 0.1}}, r"model\.residual_dropout=0.1: stage dpo .* set it to 0"),
        ("dpo", {"peft": {"method": "lora", "dropout": 0.1}}, r"peft\.dropout=0.1: stage dpo .* set it to 0"),
        ("dpo", {"model": {"matmul_dtype": "int8"}}, r"model\.matmul_dtype=int8 is not supported by stage dpo"),
        ("sft", {"dpo": {"beta": 0.2}}, r"dpo\.beta=0\.2 has no effect: stage sft does not read it, only dpo"),
        ("dpo", {"regularisation": {"label_smoothing": 0.1}}, r"label_smoothing=0\.1 has no effect: .* only finetune"),
    ],
)
def test_user_errors_are_one_line(finished, tmp_path, stage, changes, message):
    config = c.replace(finished[stage][0], changes)
    with pytest.raises(UserError, match=message):
        run(c.resolve(c.config_dict(config)), tmp_path / "run")
    assert not (tmp_path / "run" / "config.json").exists()


def test_dpo_needs_a_model_to_start_from(finished):
    with pytest.raises(UserError, match="dpo needs a trained model as its reference: set init_from to its"):
        registry.check(dataclasses.replace(finished["dpo"][0], init_from=None))


def test_a_completion_that_is_too_long_is_named_or_skipped(finished, tmp_path):
    config, _ = finished["sft"]
    path = tmp_path / "long.jsonl"
    lines = Path(config.data.source.removeprefix("jsonl:")).read_text().splitlines()
    turns = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "x" * CONTEXT}]
    path.write_text("\n".join([*lines, json.dumps({"messages": turns})]) + "\n")
    config = c.replace(config, {"data": {"source": f"jsonl:{path}"}})
    with pytest.raises(UserError, match=r"long.jsonl:25: its last exchange has 36 tokens, but 32 fit"):
        run(config, tmp_path / "error")
    mesh = make_mesh(c.MeshConfig())
    stages = [build(c.replace(config, {"chat": {"on_too_long": "skip"}}), mesh, None)]
    stages.append(build(finished["sft"][0], mesh, None))
    assert stages[0].total_tokens == stages[1].total_tokens
