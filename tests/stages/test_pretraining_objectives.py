"""Objectives of stage "pretrain": what each position sees, exact resumption, metrics, generation, and refusals."""

import dataclasses
import json
from pathlib import Path

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gptjax import config as c
from gptjax.config import UserError, read_config, replace
from gptjax.data import tokenizers
from gptjax.interop import huggingface
from gptjax.models.decoding import decode, logits, prefill, unstack
from gptjax.models.gpt import GPT, hidden_states, init_params
from gptjax.run import run
from gptjax.stages import registry
from gptjax.stages.pretrain import next_token_loss
from gptjax.stages.pretraining_objectives import attending
from tests.commands import run_command
from tests.training.test_loop import records, saved, train_and_die

pytestmark = pytest.mark.slow  # whole runs of each objective

LENGTH = 12
MODEL = c.GPTConfig(
    vocab_size=61, context_length=LENGTH, num_layers=1, num_heads=2, embed_dim=16, kernel_init_std=0.3, dtype="float32"
)
SEGMENTS = np.repeat([1, 2, 3], [3, 5, 4])[None].astype(np.int32)
PREFIXES = np.array([[-1, 1, 1, -2, -2, -2, 2, 2, -3, -3, -3, -3]], np.int32)


def with_objective(objective: str, **model: object) -> c.Config:
    return c.Config(model=dataclasses.replace(MODEL, **model), data=c.DataConfig(objective=objective))


def initial(config: c.Config):
    return nn.unbox(jax.jit(lambda: init_params(GPT(config.model), jax.random.key(0)))())


# --- what a position sees ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("objective", "segments"), [("causal", SEGMENTS), ("masked", SEGMENTS), ("prefix", PREFIXES)])
def test_a_position_depends_on_what_its_objective_lets_it_see_and_on_nothing_else(objective, segments):
    config = with_objective(objective)
    model, params = GPT(attending(config)), initial(config)
    tokens = jax.random.randint(jax.random.key(1), (1, LENGTH), 0, 61)

    def outputs(perturbation_TD):
        return hidden_states(model, params, tokens, segments, perturbation_BTD=perturbation_TD[None])[0]

    jacobian_TDTD = jax.jit(jax.jacrev(outputs))(jnp.zeros((LENGTH, 16)))
    sees_TS = np.abs(np.asarray(jacobian_TDTD)).max((1, 3)) > 0
    t, s, group = np.arange(LENGTH)[:, None], np.arange(LENGTH)[None], np.abs(segments)
    same = group == group.T
    prefix = segments < 0
    expected = {"causal": s <= t, "masked": s >= 0, "prefix": (s <= t) | (prefix.T & prefix)}[objective] & same
    np.testing.assert_array_equal(sees_TS, expected)


@pytest.mark.parametrize(("objective", "segments"), [("masked", SEGMENTS), ("prefix", PREFIXES)])
def test_no_document_leaks_into_another_one_of_its_row(objective, segments):
    config = with_objective(objective, num_layers=2)
    model, params = GPT(attending(config)), initial(config)
    forward = jax.jit(lambda tokens: model.apply({"params": params}, tokens, segments))
    tokens = np.asarray(jax.random.randint(jax.random.key(1), (1, LENGTH), 1, 61))
    before = np.asarray(forward(tokens))
    for position in range(LENGTH):
        changed = tokens.copy()
        changed[0, position] = 0
        after = np.asarray(forward(changed))
        others = np.abs(segments[0]) != abs(segments[0, position])
        np.testing.assert_array_equal(after[0, others], before[0, others])
        assert (after[0, position] != before[0, position]).any()


def test_the_loss_is_the_mean_over_the_selected_positions():
    config = with_objective("masked")
    params = initial(config)
    tokens, targets = (jax.random.randint(jax.random.key(i), (2, LENGTH), 0, 61) for i in range(2))
    weights = np.zeros((2, LENGTH), np.float32)
    weights[0, [1, 5]] = weights[1, 11] = 1
    segments = np.tile(SEGMENTS, (2, 1))
    batch = {"tokens": tokens, "targets": targets, "weights": jnp.asarray(weights), "segments": segments}
    total, weight, _ = jax.jit(lambda params: next_token_loss(config)(params, batch, None))(params)
    nats = -jax.nn.log_softmax(GPT(attending(config)).apply({"params": params}, tokens, segments))
    expected = [float(nats[b, t, targets[b, t]]) for b, t in ((0, 1), (0, 5), (1, 11))]
    assert weight == 3
    assert float(total / weight) == pytest.approx(np.mean(expected), rel=1e-5)


def test_generation_reads_the_prompt_as_a_prefix():
    config = with_objective("prefix", num_layers=2)
    model, params, lengths = GPT(attending(config)), initial(config), np.array([2, 5], np.int32)
    tokens = np.asarray(jax.random.randint(jax.random.key(1), (2, LENGTH), 0, 61))
    segments = np.where(np.arange(LENGTH) < lengths[:, None], -1, 1).astype(np.int32)
    whole = np.asarray(jax.jit(lambda: model.apply({"params": params}, tokens, segments))())
    causal = np.asarray(jax.jit(lambda: GPT(config.model).apply({"params": params}, tokens))())
    layers = unstack(model.config, params)
    x, cache = jax.jit(lambda: prefill(model, layers, jnp.asarray(tokens[:, :7]), jnp.asarray(lengths), LENGTH))()
    step = jax.jit(lambda cache, token, at: decode(model, layers, cache, token, at))
    for i in range(3):
        at, rows = lengths + i, np.arange(2)
        np.testing.assert_allclose(logits(model, layers, x), whole[rows, at - 1], atol=2e-5)
        assert np.abs(whole[rows, at - 1] - causal[rows, at - 1]).max() > 0.01
        x, cache = step(cache, jnp.asarray(tokens[rows, at]), jnp.asarray(at))


# --- runs -------------------------------------------------------------------------------------------------------------

CHANGES = {
    "masked": {"packing": "segment", "mask_whole_words": True},
    "fill_in_the_middle": {"packing": "segment"},
    "prefix": {},
}
METRICS = {
    "masked": set(),
    "prefix": set(),
    "fill_in_the_middle": {"left_to_right_loss", "middle_loss", "bits_per_byte"},
}


@pytest.fixture(scope="module")
def configs(make_tiny, tmp_path_factory) -> dict[str, c.Config]:
    config = make_tiny(tmp_path_factory.mktemp("objectives"))
    config = replace(config, {"checkpoint": {"every_tokens": 3 * 128}})
    return {name: replace(config, {"data": {"objective": name} | CHANGES[name]}) for name in CHANGES}


@pytest.fixture(scope="module")
def workdirs(configs, tmp_path_factory) -> dict[str, Path]:
    directory = tmp_path_factory.mktemp("workdirs")
    for name, config in configs.items():
        run(config, directory / name)
    return {name: directory / name for name in configs}


@pytest.mark.parametrize("name", CHANGES)
def test_a_run_is_resumed_exactly(name, configs, workdirs, tmp_path, monkeypatch):
    train_and_die(configs[name], tmp_path / "resumed", 11, monkeypatch)  # in the middle of step 6
    run(configs[name], tmp_path / "resumed")
    whole, resumed = saved(workdirs[name]), saved(tmp_path / "resumed")
    assert whole.keys() == resumed.keys()
    for path, array in whole.items():
        np.testing.assert_array_equal(array, resumed[path], err_msg=path)
    for split in ("train", "validation"):
        assert records(workdirs[name], split) == records(tmp_path / "resumed", split)


@pytest.mark.parametrize("name", CHANGES)
def test_held_out_losses_are_in_the_metrics(name, workdirs):
    validation = records(workdirs[name], "validation")
    metrics = validation[-1].keys() - {"step", "tokens", "split"}
    assert metrics == {"loss", "perplexity"} | METRICS[name]
    assert validation[-1]["loss"] < validation[0]["loss"] == pytest.approx(np.log(258), abs=0.15)
    assert all(np.isfinite(validation[-1][metric]) for metric in metrics)
    has_samples = any((workdirs[name] / "samples").glob("*")) if (workdirs[name] / "samples").exists() else False
    assert has_samples == (name != "masked")


def test_special_tokens_are_in_the_vocabulary_and_in_the_saved_tokenizer(workdirs):
    for name, added in (("masked", 1), ("fill_in_the_middle", 3), ("prefix", 0)):
        config, tokenizer = registry.completed_config(workdirs[name])
        assert (config.model.vocab_size, tokenizer.vocab_size, len(tokenizer.added)) == (257 + added,) * 2 + (added,)
    assert json.loads((workdirs["masked"] / "tokenizer" / "spec.json").read_text())["added"] == ["<|mask|>"]


def test_weights_of_another_objective_are_a_start(configs, workdirs, tmp_path):
    """Tokens of the given weights keep their ids, and those of the new objective are appended."""
    batch = c.BatchConfig(total_tokens=128, tokens_per_batch=128)
    config = dataclasses.replace(configs["masked"], init_from=str(workdirs["fill_in_the_middle"]), batch=batch)
    run(config, tmp_path / "run")
    names = ("<|fim_prefix|>", "<|fim_suffix|>", "<|fim_middle|>", "<|mask|>")
    assert tokenizers.load(tmp_path / "run" / "tokenizer").added == names
    assert saved(tmp_path / "run")["['params']['token_embedding']['embedding']"].shape == (261, 16)


def test_generate_fills_a_gap(workdirs):
    flags = ("--prompt=document", "--suffix= end", "--max_new_tokens=3", "--logprobs")
    result = run_command("gptjax.generate", f"--workdir={workdirs['fill_in_the_middle']}", *flags)
    assert result.returncode == 2  # 8 + 4 + 4 tokens fill the context of 16
    assert "prompt 1 has 16 tokens" in result.stderr
    flags = ("--prompt=doc", "--suffix= end", "--max_new_tokens=3", "--ignore_end_of_text", "--logprobs")
    result = run_command("gptjax.generate", f"--workdir={workdirs['fill_in_the_middle']}", *flags)
    assert result.returncode == 0, result.stderr
    line = json.loads(result.stdout)
    assert (line["prompt"], line["suffix"], line["num_tokens"]) == ("doc", " end", 3)


def test_generate_refuses_what_the_model_cannot(workdirs):
    for name, flags, words in (
        ("prefix", ["--suffix=x"], ["--suffix", "fill_in_the_middle", "data.objective=prefix"]),
        ("masked", [], ["masked language model", "stage finetune"]),
        ("fill_in_the_middle", ["--suffix=x", "--num_beams=2"], ["--suffix", "--num_beams"]),
    ):
        result = run_command("gptjax.generate", f"--workdir={workdirs[name]}", "--prompt=x", *flags)
        assert result.returncode == 2
        (line,) = result.stderr.strip().splitlines()
        assert all(word in line for word in words), line


def test_what_no_class_of_transformers_computes_is_not_exported(workdirs, tmp_path):
    for name in ("masked", "prefix"):
        with pytest.raises(UserError, match=rf"data.objective={name}.*both directions"):
            huggingface.export_workdir(workdirs[name], tmp_path / name)
    huggingface.export_workdir(workdirs["fill_in_the_middle"], tmp_path / "out")
    found = json.loads((tmp_path / "out" / "tokenizer.json").read_text())
    assert {token["content"]: token["id"] for token in found["added_tokens"]}["<|fim_middle|>"] == 259


# --- what is refused --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"data": {"objective": "masked"}, "model": {"attention_backend": "cudnn"}}, "model.attention_backend=cudnn"),
        ({"data": {"objective": "prefix"}, "model": {"attention_backend": "splash"}}, "model.attention_backend=splash"),
        (
            {"data": {"objective": "masked"}, "model": {"attention_pattern": ("dense", "banded")}},
            "model.attention_pattern",
        ),
        ({"data": {"objective": "prefix"}, "mesh": {"context": 2}}, "mesh.context=2"),
    ],
)
def test_attention_that_is_causal(changes, words, tiny, tmp_path):
    with pytest.raises(UserError, match=words):
        run(replace(tiny, changes), tmp_path / "run")


def test_values_out_of_range():
    for changes, words in (
        ({"mask_rate": 0.0}, "data.mask_rate=0.0"),
        ({"fim_rate": 1.5}, "data.fim_rate=1.5"),
        ({"mask_whole_words": True}, "data.mask_whole_words.*causal"),
        ({"objective": "mlm"}, "data.objective"),
    ):
        config = c.config_dict(c.Config(batch=c.BatchConfig(epochs=1.0)))
        config.data.update(changes)
        with pytest.raises(UserError, match=words):
            c.resolve(config)


def test_other_stages_have_no_objective(tiny, tmp_path, pretrained):
    from tests.tiny_tasks import run_config

    config = replace(run_config(tmp_path, "classification", pretrained), {"data": {"objective": "prefix"}})
    with pytest.raises(UserError, match=r"data\.objective=prefix is for stage pretrain"):
        run(config, tmp_path / "run")


def test_a_run_is_not_resumed_with_an_objective_that_its_weights_have_no_tokens_for(workdirs, configs):
    config = dataclasses.replace(configs["prefix"], data=configs["masked"].data)
    with pytest.raises(UserError, match=r"data\.objective=masked needs .*<\|mask\|>.*init_from"):
        run(config, workdirs["prefix"], allow_config_changes=True)


def test_a_masked_model_is_not_the_start_of_a_policy(configs, workdirs, tmp_path):
    masked = read_config(workdirs["masked"])
    for stage in ("sft", "reward", "dpo", "ppo", "grpo"):
        config = dataclasses.replace(c.Config(), stage=stage, init_from="runs/masked")
        with pytest.raises(UserError, match=rf"init_from=runs/masked.*masked.*stage {stage}"):
            registry.check_given(config, masked)
    registry.check_given(dataclasses.replace(c.Config(), stage="finetune", init_from="runs/masked"), masked)


def test_configs_of_older_workdirs_are_causal(workdirs, tmp_path):
    saved_config = json.loads((workdirs["prefix"] / "config.json").read_text())
    for key in ("objective", "mask_rate", "mask_whole_words", "fim_rate", "fim_spm_rate"):
        del saved_config["data"][key]
    (tmp_path / "config.json").write_text(json.dumps(saved_config))
    assert read_config(tmp_path).data.objective == "causal"
