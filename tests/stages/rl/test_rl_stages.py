"""Stages ppo and grpo on the training loop: rewards, penalties, whole and resumed runs, and user errors.

Longer than 400 lines because all tests share the runs of its fixtures, which take most of the time.
"""

import json
import shutil
from itertools import islice
from pathlib import Path

import jax
import numpy as np
import pytest

from gptjax import config as c
from gptjax.checkpoint.manager import Checkpoints
from gptjax.config import UserError
from gptjax.data.conversations import Message, Prompt
from gptjax.distributed import preemption
from gptjax.distributed.preemption import PreemptedError
from gptjax.interop.adapters import export_adapter
from gptjax.models import peft
from gptjax.models.gpt import GPT, hidden_states
from gptjax.models.heads import VALUE
from gptjax.parallel.mesh import make_mesh
from gptjax.run import run
from gptjax.stages import registry
from gptjax.stages.builders import build
from gptjax.stages.preference.reward_scorer import check_prompts_fit, load_reward_model
from gptjax.stages.saved_weights import load_parts, load_reward_weights, load_weights
from gptjax.stages.start import start_state
from gptjax.training import loop
from gptjax.training.metrics_file import read_metrics
from tests.tiny_chats import BATCH, config_of, rl_config
from tests.tiny_tasks import CONTEXT

RL_STAGES = ("ppo", "grpo")
STEPS = 6
ROW = 16  # positions: the longest prompt and its completion


@pytest.fixture(scope="module")
def given(tmp_path_factory, pretrained):
    """Runs of stages sft and reward to start from."""
    root = tmp_path_factory.mktemp("given")
    run(config_of("sft", root, pretrained), root / "sft")
    run(config_of("reward", root, root / "sft"), root / "reward")
    return root


@pytest.fixture(scope="module")
def finished(given):
    """A whole run of each stage, rewarded by a function."""
    runs = {}
    for stage in RL_STAGES:
        config = rl_config(stage, given, given / "sft")
        # Steps 3 and 6: one checkpoint is within an iteration.
        every = 3 * BATCH * ROW * config.rl.responses_per_prompt
        runs[stage] = c.replace(config, {"checkpoint": {"every_tokens": every}}), given / stage
        run(*runs[stage])
    return runs


@pytest.fixture(scope="module")
def interrupted(finished, tmp_path_factory):
    """The same runs, stopped by a signal after step 3, in the middle of the second iteration."""
    workdirs = {}
    for stage, (config, _) in finished.items():
        workdirs[stage] = tmp_path_factory.mktemp("interrupted") / stage
        stop_after(3, config, workdirs[stage])
    return workdirs


def stop_after(steps: int, config: c.Config, workdir: Path) -> None:
    taken = []
    train_step = loop._Run.train_step

    def step_and_count(run):
        train_step(run)
        taken.append(run.steps_here)

    def check():
        if len(taken) == steps:
            raise PreemptedError("asked to stop")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop._Run, "train_step", step_and_count)
        patch.setattr(preemption, "check", check)
        with pytest.raises(PreemptedError, match=f"step {steps} is saved"):
            run(config, workdir)


def run_and_copy(config: c.Config, workdir: Path, copy: Path) -> None:
    """Runs to the end; `copy` is the workdir of a process that died after it had saved for the first time."""
    save = loop._Run.save

    def save_and_copy(run, **kwargs):
        save(run, **kwargs)
        if not copy.exists():
            run._checkpoints.wait()
            shutil.copytree(workdir, copy, ignore=shutil.ignore_patterns("run.lock"))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop._Run, "save", save_and_copy)
        run(config, workdir)


def records(workdir: Path, split: str) -> list[dict]:
    """Returns the records of a split, without what depends on the clock."""
    found = [record for record in read_metrics(workdir)[1] if record["split"] == split]
    return [{name: value for name, value in record.items() if name != "seconds"} for record in found]


def weights_of(workdir: Path):
    mesh = make_mesh(c.MeshConfig())
    with jax.set_mesh(mesh):
        return load_weights(workdir, mesh)


def policy_of(workdir: Path):
    return jax.device_get(weights_of(workdir).gpt)


def distance(first, second) -> float:
    return max(float(np.abs(a - b).max()) for a, b in zip(*map(jax.tree.leaves, (first, second)), strict=True))


@pytest.mark.parametrize("stage", ["grpo", pytest.param("ppo", marks=pytest.mark.slow)])
def test_the_records_of_a_run(finished, stage):
    _, workdir = finished[stage]
    rollouts, steps = records(workdir, "rollout"), records(workdir, "train")
    assert [record["iteration"] for record in rollouts] == [0, 1, 2]
    assert [record["step"] for record in rollouts] == [0, 2, 4]
    assert len(steps) == STEPS
    first = rollouts[0]
    assert first["kl"] == pytest.approx(0, abs=1e-4)  # the policy is the reference
    assert rollouts[-1]["kl"] > 0.01
    assert 0 < first["entropy"] < np.log(300)
    assert 1 <= first["response_tokens"] <= 4
    # The policy of the first step is the old policy, bit for bit; the sampler computes it by other programs.
    assert (steps[0]["ratio"], steps[0]["policy_kl"]) == (1, 0)
    assert first["sampling_logp_difference_max"] < 1e-5
    assert first["importance_sampling_ratio_mean"] == pytest.approx(1, abs=1e-5)
    assert steps[0]["clip_fraction"] == 0
    assert steps[1]["policy_kl"] > 0
    if stage == "ppo":  # the value function starts from the policy, and estimates 0
        assert first["explained_variance"] == pytest.approx(0, abs=1e-6)
    shown = (workdir / "samples" / "rollout_step_00000004.txt").read_text()
    assert shown.count("user: q") == 8
    assert "(reward " in shown
    assert (workdir / "reward.png").stat().st_size > 10_000


@pytest.mark.slow
@pytest.mark.parametrize("stage", RL_STAGES)
def test_the_reward_rises(given, tmp_path, stage):
    config = rl_config(stage, given, given / "sft")
    changes = {
        "batch": {"epochs": 16.0, "tokens_per_batch": 16 * CONTEXT},
        "rl": {"kl_weight": 0.0, "prompts_per_iteration": 32, "generate_batch": 64},
        "optimizer": {"peak_lr": 3e-2},
    }
    run(c.replace(config, changes), tmp_path)
    rewards = [record["reward"] for record in records(tmp_path, "rollout")]
    assert np.mean(rewards[-2:]) > np.mean(rewards[:2]) + 1
    first, final = records(tmp_path, "validation")
    assert final["reward"] > first["reward"] + 1


@pytest.mark.slow
@pytest.mark.parametrize("stage", RL_STAGES)
def test_a_large_kl_weight_holds_the_policy(finished, given, tmp_path, stage):
    """Adam takes steps of one size whatever the gradient, so the policy oscillates around the reference."""
    config, free = finished[stage]
    run(c.replace(config, {"rl": {"kl_weight": 1000.0}, "optimizer": {"peak_lr": 1e-3}}), tmp_path / "held")
    run(c.replace(config, {"rl": {"kl_weight": 0.0}, "optimizer": {"peak_lr": 1e-3}}), tmp_path / "free")
    held, free = (records(tmp_path / name, "rollout")[-1]["kl"] for name in ("held", "free"))
    assert abs(held) < 0.5 * abs(free)


def test_equal_rewards_change_no_weight_in_grpo(given, tmp_path):
    """Without differences and without a penalty the policy stays the same, bit for bit."""
    config = rl_config("grpo", given, given / "sft")
    config = c.replace(config, {"rl": {"kl_weight": 0.0, "reward": "python:tests.stages.rl.test_rl_stages.nothing"}})
    run(config, tmp_path)
    assert records(tmp_path, "rollout")[-1]["informative_groups"] == 0
    assert distance(policy_of(tmp_path), policy_of(given / "sft")) == 0


def nothing(messages, answer, reference) -> float:
    return 0.0


def test_the_value_function_starts_as_the_reward_model(given):
    mesh = make_mesh(c.MeshConfig())
    config = rl_config("ppo", given, given / "sft", given / "reward")
    parameters = build(config, mesh, None).objective.parameters
    with jax.set_mesh(mesh), Checkpoints(given / "none", config.checkpoint) as checkpoints:
        state, _ = start_state(parameters, mesh, checkpoints)
        reward = load_reward_weights(given / "reward", mesh)
    assert distance(state.params[VALUE], {**reward.gpt, "head": reward.head}) == 0
    raw = weights_of(given / "reward").head["linear"]["bias"]
    mean = json.loads((given / "reward" / "reward.json").read_text())["mean"]
    assert float(reward.head["linear"]["bias"][0]) == pytest.approx(float(raw[0]) - mean)
    policy = {name: part for name, part in state.params.items() if name != VALUE}
    assert distance(policy, policy_of(given / "sft")) == 0


@pytest.mark.slow
def test_a_reward_model_rewards(given, tmp_path):
    """A whole run whose value function starts from the reward model, with pretraining text: PPO-ptx."""
    config = rl_config("ppo", given, given / "sft", given / "reward")
    text = tmp_path / "text.txt"
    text.write_text("what is known is known\n" * 400)
    changes = {
        "chat": {"pretraining_source": f"text:{text}"},
        "ppo": {"pretraining_weight": 27.8, "pretraining_rows": 2},
        "optimizer": {"ema_decay": 0.9},
    }
    run(c.replace(config, changes), tmp_path / "run")
    rollouts, steps = records(tmp_path / "run", "rollout"), records(tmp_path / "run", "train")
    assert len({record["reward"] for record in rollouts}) == len(rollouts)
    assert steps[-1]["text_loss"] < steps[0]["text_loss"]
    # Chat and other commands read the moving average of the policy alone.
    assert set(policy_of(tmp_path / "run")) == set(policy_of(given / "sft"))


@pytest.mark.slow
@pytest.mark.parametrize("stage", RL_STAGES)
@pytest.mark.parametrize("kept", [True, False])
def test_a_run_that_stops_within_an_iteration_resumes_exactly(finished, interrupted, stage, kept, tmp_path):
    config, whole = finished[stage]
    shutil.copytree(interrupted[stage], tmp_path, dirs_exist_ok=True)
    assert sorted(path.name for path in (tmp_path / "rollouts").iterdir()) == ["00000001.npz"]
    if not kept:
        (tmp_path / "rollouts" / "00000001.npz").write_bytes(b"")
    run(config, tmp_path)
    steps = [record["step"] for record in records(tmp_path, "train")]
    assert steps == [1, 2, 3, 4, 5, 6]
    losses = [[record["loss"] for record in records(workdir, "train")] for workdir in (whole, tmp_path)]
    assert (losses[0] == losses[1]) == kept
    assert losses[0][:3] == losses[1][:3]
    if kept:
        assert records(whole, "rollout") == records(tmp_path, "rollout")
        assert distance(policy_of(whole), policy_of(tmp_path)) == 0


@pytest.mark.slow
def test_a_run_resumes_with_other_sizes(finished, tmp_path):
    """In the middle of an iteration, which then has twice the prompts and twice the batch."""
    config, whole = finished["grpo"]
    shutil.copytree(whole, tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "checkpoints" / "6")
    larger = {"rl": {"prompts_per_iteration": 16}, "batch": {"tokens_per_batch": 8 * CONTEXT}}
    run(c.replace(config, larger), tmp_path / "run", allow_config_changes=True)
    assert [record["step"] for record in records(tmp_path / "run", "train")] == [1, 2, 3, 4, 5, 6]


def test_a_reward_model_reads_a_completion_that_was_cut_off_without_an_end(given):
    """A prompt that leaves room for exactly response_tokens in the contexts of policy and reward model."""
    mesh = make_mesh(c.MeshConfig())
    score = load_reward_model(given / "reward", mesh)
    messages = (Message("user", "q" * (CONTEXT - 6)),)  # 28 tokens: the start, the text, <|a|>
    cut = score([(messages, "aaaa")], [False])
    weights = weights_of(given / "reward")
    tokens = np.array([[256, *b"q" * (CONTEXT - 6), 257, *b"aaaa"]])
    assert tokens.shape == (1, CONTEXT)
    hidden = jax.jit(lambda params: hidden_states(GPT(weights.config.model), params, tokens, deterministic=True))
    x_D = hidden(weights.gpt)[0, -1]
    linear, mean = weights.head["linear"], json.loads((given / "reward" / "reward.json").read_text())["mean"]
    expected = float(x_D @ linear["kernel"][:, 0] + linear["bias"][0]) - mean
    assert float(cut[0]) == pytest.approx(expected, abs=1e-4)
    assert score([(messages, "aaaa")])[0] == cut[0]  # truncated, its end does not fit
    check_prompts_fit(given / "reward", [Prompt(messages, None, "fits")])
    with pytest.raises(UserError, match=r"reward: longer: its last exchange has 34 tokens, but 31 fit"):
        check_prompts_fit(given / "reward", [Prompt((Message("user", "q" * CONTEXT),), None, "longer")])
    assert abs(score([(messages, "aaa")])[0] - score([(messages, "aaa")], [False])[0]) > 1e-4


def test_the_longest_prompt_and_a_completion_that_is_cut_off_have_room(given, tmp_path):
    path = tmp_path / "prompts.jsonl"
    path.write_text("".join(json.dumps({"prompt": f"{i:02}" + "q" * (CONTEXT - 8)}) + "\n" for i in range(24)))
    config = rl_config("grpo", given, given / "sft", given / "reward")
    config = c.replace(config, {"data": {"source": f"jsonl:{path}"}, "rl": {"prompt_tokens": None}})
    stage = build(config, make_mesh(c.MeshConfig()), None)
    fake = FakeRun(stage.objective, given)
    with jax.set_mesh(make_mesh(c.MeshConfig())):
        microbatch = next(stage.batches(0, fake))
    assert fake.recorded[0]["ended"] < 1
    assert microbatch.arrays["tokens"].shape[-1] == CONTEXT
    longer = path.read_text().replace("00q", "00" + "q" * 5)
    path.write_text(longer)
    with pytest.raises(UserError, match=r"prompts.jsonl:1: its last exchange has 32 tokens, but 28 fit"):
        build(config, make_mesh(c.MeshConfig()), None)


@pytest.mark.slow
@pytest.mark.parametrize("value_init", ["policy", "reward"])
def test_ppo_with_lora_trains_low_rank_matrices_and_the_whole_value_function(given, tmp_path, value_init):
    config = rl_config("ppo", given, given / "sft", given / "reward" if value_init == "reward" else None)
    changes = {
        "peft": {"method": "lora", "rank": 2, "targets": ("layers/.*/kernel",)},
        "checkpoint": {"every_tokens": 3 * BATCH * ROW},  # in the middle of an iteration
    }
    config = c.replace(config, changes)
    run_and_copy(config, tmp_path / "whole", tmp_path / "parts")
    mesh = make_mesh(c.MeshConfig())
    parts = []
    with jax.set_mesh(mesh):
        parts.append(load_parts(tmp_path / "whole", mesh))
    trained = peft.flatten(parts[0].trained)
    assert all(path.startswith(f"{VALUE}/") != path.endswith(peft.LORA) for path in trained)
    assert {path.removeprefix(f"{VALUE}/") for path in trained} > {"head/linear/kernel", "final_norm/scale"}
    assert records(tmp_path / "whole", "rollout")[0]["kl"] == pytest.approx(0, abs=1e-4)
    # Resumed in the middle of an iteration: the same run.
    assert [path.name for path in (tmp_path / "parts" / "checkpoints").iterdir()] == ["3"]
    run(config, tmp_path / "parts")
    with jax.set_mesh(mesh):
        parts.append(load_parts(tmp_path / "parts", mesh))
    assert distance(*(part.trained for part in parts)) == 0
    # Merged: the policy alone; only the targets have changed.
    merged, start = (peft.flatten(policy_of(workdir)) for workdir in (tmp_path / "whole", given / "sft"))
    assert merged.keys() == start.keys()
    changed = {path for path, leaf in merged.items() if not np.array_equal(leaf, start[path])}
    assert changed == {path for path in start if path.startswith("layers/") and path.endswith("/kernel")}
    export_adapter(tmp_path / "whole", tmp_path / "adapter")
    assert (tmp_path / "adapter" / "adapter_model.safetensors").exists()


def test_the_value_function_of_lora_starts_from_the_policy(given):
    mesh = make_mesh(c.MeshConfig())
    config = c.replace(rl_config("ppo", given, given / "sft"), {"peft": {"method": "lora", "rank": 2}})
    parameters = build(config, mesh, None).objective.parameters
    with jax.set_mesh(mesh), Checkpoints(given / "none", config.checkpoint) as checkpoints:
        state, _ = start_state(parameters, mesh, checkpoints)
    value = dict(state.params[VALUE])
    assert not any(np.any(leaf) for leaf in jax.tree.leaves(value.pop("head")))
    assert distance(value, policy_of(given / "sft")) == 0


def test_inner_epochs_and_microbatches_have_each_completion_equally_often(given):
    config = c.replace(
        rl_config("grpo", given, given / "sft"), {"rl": {"inner_epochs": 3}, "batch": {"microbatch_size": 2}}
    )
    stage = build(config, make_mesh(c.MeshConfig()), None)
    fake = FakeRun(stage.objective, given)
    with jax.set_mesh(make_mesh(c.MeshConfig())):
        microbatches = list(islice(stage.batches(0, fake), 12))  # 8 prompts in microbatches of 2, three times
    rows = [row.tobytes() for microbatch in microbatches for row in microbatch.arrays["tokens"]]
    assert all(sorted(rows[i : i + 8]) == sorted(rows[:8]) for i in (0, 8, 16))
    assert rows[8:16] != rows[:8]
    assert stage.total_tokens == 3 * 12 * microbatches[0].num_tokens
    assert len(fake.recorded) == 1


class FakeRun:
    """A run at its start."""

    def __init__(self, objective, given):
        self.workdir, self.recorded = given / "fake", []
        self.workdir.mkdir(exist_ok=True)
        mesh = make_mesh(c.MeshConfig())
        with jax.set_mesh(mesh), Checkpoints(given / "none", c.CheckpointConfig()) as checkpoints:
            state, _ = start_state(objective.parameters, mesh, checkpoints)
        self.policy = objective.parameters.join(state.base, state.params)

    def record(self, split, text=None, **values):
        self.recorded.append(values)

    def say(self, text):
        pass


@pytest.mark.parametrize(
    ("stage", "changes", "message"),
    [
        ("ppo", {"rl": {"reward": ""}}, r"rl.reward='' is no known reward: set it to model:WORKDIR, bleu"),
        ("ppo", {"rl": {"prompts_per_iteration": 6}}, r"=6 is not a multiple of the 4 prompts of a batch"),
        ("ppo", {"rl": {"response_tokens": 32}}, r"exceed model.context_length=32: lower them"),
        ("ppo", {"rl": {"kl_weight": -1.0}}, r"rl.kl_weight=-1.0 must not be negative"),
        ("ppo", {"model": {"residual_dropout": 0.1}}, r"model.residual_dropout=0.1: .* set it to 0"),
        ("ppo", {"ppo": {"value_init": "reward"}}, r"needs a reward model, and rl.reward=python:\S+ is not one"),
        ("ppo", {"ppo": {"gae_lambda": 1.5}}, r"ppo.gae_lambda=1.5 must be in \[0, 1\]"),
        (
            "ppo",
            {"ppo": {"pretraining_weight": 1.0}},
            r"pretraining_source=None and ppo.pretraining_weight=1.0: set both",
        ),
        ("ppo", {"peft": {"method": "adapters"}}, r"peft.method=adapters is not supported by stage ppo"),
        ("ppo", {"peft": {"method": "lora", "dropout": 0.1}}, r"peft.dropout=0.1: stage ppo .* set it to 0"),
        ("grpo", {"peft": {"method": "lora", "dropout": 0.1}}, r"peft.dropout=0.1: stage grpo .* set it to 0"),
        ("grpo", {"model": {"matmul_dtype": "int8"}}, r"model.matmul_dtype=int8 is not supported by stage grpo"),
        ("ppo", {"rl": {"missing_eos_penalty": 0.0}}, r"rl.missing_eos_penalty=0.0 must be positive"),
        ("ppo", {"stability": {"on_spike": "rewind"}}, r"stability.on_spike=rewind skips data"),
        ("grpo", {"rl": {"responses_per_prompt": 1}}, r"rl.responses_per_prompt=1: .* set it to 2 or more"),
    ],
)
def test_settings_that_are_refused(given, stage, changes, message):
    config = c.replace(rl_config(stage, given, given / "sft"), changes)
    with pytest.raises(UserError, match=message):
        registry.check(c.resolve(c.config_dict(config)))


@pytest.mark.parametrize(
    ("reward", "message"),
    [
        ("python:nowhere.reward", r"rl.reward=python:nowhere.reward: No module named 'nowhere'"),
        ("python:tests.tiny_chats.no_such", r"has no attribute 'no_such'"),
        ("python:tests.tiny_chats.BATCH", r"is not a function but int"),
        ("model:{given}/sft", r"is a run of stage sft: name the workdir of a run of stage reward"),
        ("model:{given}/nowhere", r"is not a workdir"),
    ],
)
def test_rewards_that_do_not_exist(given, reward, message):
    config = c.replace(rl_config("grpo", given, given / "sft"), {"rl": {"reward": reward.format(given=given)}})
    with pytest.raises(UserError, match=message):
        build(config, make_mesh(c.MeshConfig()), None)


@pytest.mark.parametrize(
    ("name", "message"), [("broken", "failed on the completion .*oh no"), ("endless", "returned inf for")]
)
def test_a_function_that_fails_is_named(given, tmp_path, name, message):
    config = rl_config("grpo", given, given / "sft")
    config = c.replace(config, {"rl": {"reward": f"python:tests.stages.rl.test_rl_stages.{name}"}})
    with pytest.raises(UserError, match=message):
        run(config, tmp_path)


def broken(messages, answer, reference) -> float:
    raise RuntimeError("oh no")


def endless(messages, answer, reference) -> float:
    return float("inf")


def test_bleu_needs_reference_completions(given, tmp_path):
    path = tmp_path / "prompts.jsonl"
    path.write_text("".join(json.dumps({"prompt": f"q{i}"}) + "\n" for i in range(20)))
    config = rl_config("grpo", given, given / "sft")
    config = c.replace(config, {"data": {"source": f"jsonl:{path}"}, "rl": {"reward": "bleu"}})
    with pytest.raises(UserError, match=r"prompts.jsonl:1 has no reference completion, which rl.reward=bleu needs"):
        build(config, make_mesh(c.MeshConfig()), None)
    build(rl_config("grpo", given, given / "sft"), make_mesh(c.MeshConfig()), None)


def test_a_value_function_must_read_the_policys_tokens(given):
    config = rl_config("ppo", given, given / "sft", given / "reward")
    config = c.replace(config, {"chat": {"user_format": "U {content}<|a|>"}})
    with pytest.raises(UserError, match=r"has another user_format than the policy"):
        build(config, make_mesh(c.MeshConfig()), None)
