"""Images in the stages that follow supervised fine-tuning: what they change, whole and resumed runs, user errors."""

import dataclasses
from pathlib import Path
from types import SimpleNamespace

import flax.linen as nn
import jax
import numpy as np
import pytest

from gptjax import config as c
from gptjax.config import UserError
from gptjax.parallel.mesh import make_mesh
from gptjax.run import run
from gptjax.scaling.flops import image_flops, image_step_flops
from gptjax.stages import registry
from gptjax.stages.builders import build
from gptjax.stages.chat_data import open_chat, prompts_of
from gptjax.stages.policy import REFERENCE
from gptjax.stages.preference.reward_scorer import load_reward_model
from gptjax.stages.rl.completions import CompletionSampler
from gptjax.stages.rl.policy_stage import encoded_prompts
from gptjax.stages.rl.reward_functions import open_reward
from gptjax.stages.saved_weights import load_weights
from gptjax.training.metrics_file import read_metrics
from tests.tiny_chats import save_sft
from tests.tiny_images import image_config, image_ranking_config, image_rl_config, save_image_sft

RANKED, RL = ("reward", "dpo"), ("ppo", "grpo")
ROW = 32  # positions: the longest prompt and its completion


@pytest.fixture(scope="module")
def given(tmp_path_factory) -> Path:
    """A folder with random weights to start from, `sft`."""
    directory = tmp_path_factory.mktemp("given")
    save_image_sft(directory / "sft", directory)
    return directory


def policy_of(workdir: Path):
    mesh = make_mesh(c.MeshConfig())
    with jax.set_mesh(mesh):
        return load_weights(workdir, mesh).gpt


def random_params(config: c.Config):
    """All parameters of the stage of a complete config; the reference differs from the policy."""
    init = registry.definition(config).parameters(config).init
    params, other = (nn.unbox(jax.jit(init)(jax.random.key(i))) for i in (0, 1))
    return params | ({REFERENCE: other[REFERENCE]} if REFERENCE in params else {})


@pytest.mark.slow
@pytest.mark.parametrize("stage_name", RANKED)
def test_an_image_changes_the_loss_of_rankings(stage_name, given):
    mesh = make_mesh(c.MeshConfig())
    config = image_ranking_config(stage_name, given, given / "sft")
    stage = build(config, mesh, None)
    batch = {name: np.asarray(array) for name, array in next(stage.batches(0, None)).arrays.items()}
    vision = stage.config.model.vision
    image_tokens = (batch["tokens"] == vision.image_token).sum(axis=-1)
    used = (batch["images"].sum(axis=-1) > 0).sum(axis=-1)
    np.testing.assert_array_equal(image_tokens, used * vision.tokens_per_image)
    with jax.set_mesh(mesh):
        params = random_params(stage.config)
        loss = jax.jit(lambda batch: stage.objective.loss(params, batch, None)[0])
        assert loss(batch) != loss(batch | {"images": 255 - batch["images"]})


@pytest.mark.slow
@pytest.mark.parametrize("stage_name", RL)
def test_the_policy_samples_and_learns_from_the_same_images(stage_name, given, tmp_path):
    """The loss sees each completion as it was sampled: before the first update, no log-probability has changed."""
    config = image_rl_config(stage_name, given, given / "sft")
    run(config, tmp_path / "whole")
    metrics = [r for r in read_metrics(tmp_path / "whole")[1] if r["split"] == "train"]
    assert metrics[0]["policy_kl"] == pytest.approx(0, abs=1e-6)
    assert metrics[-1]["policy_kl"] > 1e-6
    first = dataclasses.replace(config, batch=dataclasses.replace(config.batch, epochs=None, total_tokens=1))
    run(first, tmp_path / "resumed")
    run(config, tmp_path / "resumed", allow_config_changes=True)
    weights = (jax.tree.leaves(policy_of(tmp_path / name)) for name in ("whole", "resumed"))
    for once, twice in zip(*weights, strict=True):
        np.testing.assert_array_equal(once, twice)


@pytest.mark.slow
def test_a_completion_depends_on_the_image(given):
    mesh = make_mesh(c.MeshConfig())
    data = open_chat(image_rl_config("grpo", given, given / "sft"), mesh, None, prompts_of)
    prompts = encoded_prompts(data, data.train[3:4])
    swapped = [dataclasses.replace(p, images=tuple(reversed(p.images))) for p in prompts]
    assert len(prompts[0].images) == 2
    reward = open_reward("python:tests.tiny_chats.low_characters", mesh, data.train[3:4])
    static, continuous = (
        CompletionSampler(config, mesh, data.tokenizer, reward, prompts, data.chat_format, data.images)
        for config in (c.replace(data.config, {"rl": {"batching": name}}) for name in ("static", "continuous"))
    )
    with jax.set_mesh(mesh):
        params = random_params(data.config)
        found = [static.sample(params, of, 2, [3, 4]).arrays["old_logprobs"] for of in (prompts, swapped)]
        again = continuous.sample(params, prompts, 2, [3, 4]).arrays
    assert found[0].shape == found[1].shape
    assert not np.array_equal(*found)
    np.testing.assert_allclose(again["old_logprobs"], found[0], atol=1e-5)


@pytest.mark.slow
def test_a_reward_model_scores_what_an_image_shows(given, tmp_path):
    reward = tmp_path / "reward"
    run(image_ranking_config("reward", given, given / "sft"), reward)
    mesh = make_mesh(c.MeshConfig())
    config = image_rl_config("ppo", given, given / "sft", reward)
    prompt = prompts_of(config)[0][3]
    (message,) = prompt.messages
    assert len(message.images) == 2
    swapped = dataclasses.replace(message, images=message.images[::-1])
    prompts = [prompt, dataclasses.replace(prompt, messages=(swapped,))]
    score = load_reward_model(reward, mesh, batch_size=2)
    one, two = ((prompt.messages, "a") for prompt in prompts)
    rewards = score([one, two, one])
    assert rewards[0] == pytest.approx(rewards[2], rel=1e-5)
    assert rewards[0] != rewards[1]
    source = open_reward(f"model:{reward}", mesh, prompts, config.data)
    completions = [SimpleNamespace(text="a", finish_reason="end_of_turn")] * 2
    np.testing.assert_allclose(source.rewards(prompts, completions), rewards[:2], rtol=1e-5)
    run(config, tmp_path / "ppo")  # with a value function that starts as the reward model


def sources_of_images(messages, completion, reference) -> float:
    return float(len(messages[0]["images"]))


def test_a_function_gets_the_sources_of_the_images(given):
    prompts = prompts_of(image_rl_config("grpo", given, given / "sft"))[0][:2]
    source = open_reward("python:tests.stages.test_image_alignment.sources_of_images", None, prompts)
    completions = [SimpleNamespace(text="a", finish_reason="end_of_turn")] * 2
    assert source.rewards(prompts, completions).tolist() == [2, 1]


@pytest.mark.parametrize("stage_name", [*RANKED, *RL])
def test_a_text_model_is_given_no_image(stage_name, given, tmp_path):
    text = save_sft(tmp_path / "text", tmp_path)
    config_of = image_ranking_config if stage_name in RANKED else image_rl_config
    config = config_of(stage_name, given, text)
    config = dataclasses.replace(config, model=dataclasses.replace(config.model, vision=c.VisionConfig()))
    with pytest.raises(UserError, match=r"jsonl:1: there is an image, but this model reads text alone"):
        build(config, make_mesh(c.MeshConfig()), None)


@pytest.mark.parametrize("stage_name", RL)
@pytest.mark.parametrize(("name", "value"), [("on_corrupt", "skip"), ("image_shift", 0.25)])
def test_the_images_of_a_policy_do_not_change(stage_name, name, value, given):
    config = c.replace(image_rl_config(stage_name, given, given / "sft"), {"data": {name: value}})
    with pytest.raises(UserError, match=rf"data.{name}={value} is not supported by stage {stage_name}"):
        registry.check(config)


@pytest.mark.slow
def test_a_reward_model_of_text_is_given_no_image(given, tmp_path):
    config = image_rl_config("grpo", given, given / "sft")
    text = save_sft(tmp_path / "text", tmp_path)
    written = c.read_config(text)
    (text / "config.json").write_text(c.to_json(dataclasses.replace(written, stage="reward")))
    config = c.replace(config, {"rl": {"reward": f"model:{text}"}})
    with pytest.raises(UserError, match=r"text: .*jsonl:1: there is an image, but this model reads text alone"):
        build(config, make_mesh(c.MeshConfig()), None)


@pytest.mark.parametrize("stage_name", [*RANKED, *RL])
def test_images_count_in_the_operations_of_a_step(stage_name, given, tmp_path):
    """DPO and the policy stages pass images through a reference too, and PPO trains a value function."""
    config_of = image_ranking_config if stage_name in RANKED else image_rl_config
    stage = build(config_of(stage_name, given, given / "sft"), make_mesh(c.MeshConfig()), None)
    forward, spec = image_flops(stage.config.model), stage.objective.parameters
    times = {"reward": 3, "dpo": 3 + 1, "ppo": 3 + 3 + 1, "grpo": 3 + 1}[stage_name]
    assert spec.flops_per_image == pytest.approx(times * forward)
    assert stage.flops_per_token == spec.flops_per_token + stage.images_per_token * times * forward
    if stage_name in RANKED:
        batches = stage.batches(0, None)
        elements = [next(batches).arrays for _ in range(12)]  # more than an epoch
        images = sum((element["images"].sum(axis=-1) > 0).sum() for element in elements)
        assert stage.images_per_token == pytest.approx(images / sum(e["tokens"].size for e in elements), rel=0.3)
    else:
        assert stage.images_per_token == pytest.approx((24 + 8) / 24 / ROW)


@pytest.mark.parametrize(("trained", "times"), [(("vision/projector_.*",), "projector"), (("(?!vision/).*",), "none")])
def test_images_count_less_where_the_encoder_is_frozen(trained, times, given):
    config = dataclasses.replace(image_config(given, given / "sft"), peft=c.PeftConfig(method="parts", trained=trained))
    stage = build(config, make_mesh(c.MeshConfig()), None)
    expected = image_step_flops(stage.config.model, times)
    assert image_flops(stage.config.model) <= expected < 3 * image_flops(stage.config.model)
    assert stage.objective.parameters.flops_per_image == expected
