"""The step and its state: accumulation, the moving average, dropout, and float32 arithmetic whatever param_dtype is."""

import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gptjax.checkpoint.manager import Checkpoints
from gptjax.checkpoint.position import Position
from gptjax.checkpoint.state import ParameterSpec, TrainState, abstract_state, create_state, state_shardings
from gptjax.config import Config, GPTConfig, OptimizerConfig, PeftConfig, UserError, replace
from gptjax.models import peft
from gptjax.models.gpt import GPT, init_params
from gptjax.parallel.mesh import make_mesh
from gptjax.scaling import flops
from gptjax.stages import registry
from gptjax.stages.builders import build
from gptjax.training.objective import Objective
from gptjax.training.step import make_train_step


@pytest.fixture
def step_of(tiny):
    """Runs one step with the given rows and microbatch size; returns (metrics, params, ema)."""
    # A large eps, as the gradient of the keys' bias is zero but for rounding, which Adam would blow up to a full step.
    changes = {"model": {"residual_dropout": 0.0}, "data": {"packing": "segment"}, "optimizer": {"eps": 1e-3}}
    tiny = replace(tiny, changes)

    def step(rows: dict[str, np.ndarray], microbatch: int, room: int):
        config = replace(tiny, {"batch": {"microbatch_size": microbatch}})
        mesh = make_mesh(config.mesh)
        stage = build(config, mesh, None)
        config = stage.config
        state = create_state(stage.objective.parameters, mesh)
        train_step = make_train_step(stage.objective, state_shardings(stage.objective.parameters, mesh))
        count = len(rows["tokens"]) // microbatch
        batch = {}
        for name, array in rows.items():
            batch[name] = np.zeros((room, microbatch, array.shape[1]), array.dtype)
            batch[name][:count] = array.reshape(count, microbatch, -1)
        with jax.set_mesh(mesh):
            state, metrics = train_step(state, batch, np.int32(count), {"lr": np.float32(0.01)})
        return jax.device_get((metrics, state.params, state.ema))

    rows = next(iter(build(tiny, make_mesh(tiny.mesh), None).batches(0, None))).arrays
    return step, rows


def test_accumulation_equals_one_big_batch(step_of):
    step, rows = step_of
    rows["weights"][0] = 0  # unequal weights: the mean is over targets, not over microbatches
    expected = step(rows, 4, room=1)
    for microbatch, room in ((2, 2), (1, 7)):
        actual = step(rows, microbatch, room)
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), actual, expected)


def test_the_average_follows_the_weights(step_of, tiny):
    step, rows = step_of
    _, params, ema = step(rows, 4, room=1)
    mesh = make_mesh(tiny.mesh)
    stage = build(tiny, mesh, None)
    start = jax.device_get(create_state(stage.objective.parameters, mesh).params)
    expected = jax.tree.map(lambda s, p: 0.9 * s + 0.1 * p, start, params)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-7), ema, expected)


def test_every_step_and_microbatch_draws_its_own_dropout(tiny):
    config = replace(tiny, {"model": {"residual_dropout": 0.5}, "optimizer": {"weight_decay": 0.0}})
    mesh = make_mesh(config.mesh)
    stage = build(config, mesh, None)
    config = stage.config
    state = create_state(stage.objective.parameters, mesh)
    train_step = make_train_step(stage.objective, state_shardings(stage.objective.parameters, mesh))
    rows = next(iter(stage.batches(0, None))).arrays
    batch = {name: np.stack([array, array]) for name, array in rows.items()}
    losses = []
    with jax.set_mesh(mesh):
        for count in (1, 1):  # at a learning rate of 0 only the dropout differs
            state, metrics = train_step(state, batch, np.int32(count), {"lr": np.float32(0)})
            losses.append(float(metrics["loss"]))
    assert losses[0] != losses[1]
    state = create_state(stage.objective.parameters, mesh)
    with jax.set_mesh(mesh):
        _, both = train_step(state, batch, np.int32(2), {"lr": np.float32(0)})
    assert float(both["loss"]) != pytest.approx(losses[0], abs=1e-7)  # the second microbatch is not the first again


# --- model.param_dtype=bfloat16 ---------------------------------------------------------------------------------------

MODEL = GPTConfig(
    vocab_size=64, context_length=8, num_layers=2, num_heads=2, embed_dim=16, dtype="float32", param_dtype="bfloat16"
)
OPTIMIZER = OptimizerConfig(beta2=0.999, ema_decay=0.999, weight_decay=0.0, clip_norm=None)


def spec_of(config: Config) -> ParameterSpec:
    return ParameterSpec(config, lambda rng: init_params(GPT(config.model), rng))


def shapes_of(spec: ParameterSpec) -> dict[str, tuple[int, ...]]:
    return {path: nn.unbox(leaf).shape for path, leaf in peft.flatten(spec.boxed_params).items()}


def next_token_loss(config: Config):
    def loss(params, batch, rng):
        logits_BTV = GPT(config.model).apply({"params": params}, batch["tokens"])
        logprobs_BTV = jax.nn.log_softmax(logits_BTV[:, :-1])
        chosen_BT1 = jnp.take_along_axis(logprobs_BTV, batch["tokens"][:, 1:, None], axis=-1)
        return -jnp.sum(chosen_BT1), jnp.float32(chosen_BT1.size), {}

    return loss


def train(config: Config, num_steps: int, num_microbatches: int, lr: float) -> tuple[TrainState, TrainState, dict]:
    """The state before and after the steps, and the metrics of the last; every microbatch has the same row."""
    spec, mesh = spec_of(config), make_mesh(config.mesh)
    start = state = create_state(spec, mesh)
    start = jax.device_get(start)
    step = make_train_step(Objective(spec, next_token_loss(config)), state_shardings(spec, mesh))
    row = np.random.default_rng(0).integers(0, config.model.vocab_size, (1, 8)).astype(np.int32)
    batch = {"tokens": np.stack([row] * num_microbatches)}
    with jax.set_mesh(mesh):
        for _ in range(num_steps):
            state, metrics = step(state, batch, np.int32(num_microbatches), {"lr": np.float32(lr)})
    return start, jax.device_get(state), jax.device_get(metrics)


def test_small_updates_change_bfloat16_models():
    """At lr 9e-6 an update is below half the spacing of bfloat16, and 0.001 of it moves no bfloat16 average."""
    start, end, _ = train(Config(model=MODEL, optimizer=OPTIMIZER), num_steps=20, num_microbatches=1, lr=9e-6)
    kernels = [tree["layers"]["block_0"]["mlp"]["up"]["kernel"] for tree in (start.params, end.params, end.ema)]
    before, after, average = (np.asarray(kernel, np.float32) for kernel in kernels)
    assert np.mean(before != after) > 0.99
    assert np.mean(before != average) > 0.9
    # After n steps of equal size d, the average has moved by (1 - 0.999) (1 + 2 + ... + n) d, nearly.
    moved = np.abs(average - before)[np.abs(after - before) > 1e-4] / np.abs(after - before).max()
    assert np.median(moved) == pytest.approx(0.001 * 10.5, rel=0.2)


def test_second_moments_of_bfloat16_models_decay():
    spec = spec_of(Config(model=MODEL, optimizer=OPTIMIZER))
    params = create_state(spec, make_mesh(spec.config.mesh)).params
    optimizer = spec.optimizer()
    state = optimizer.init(params)
    for gradient in (1.0, *[0.0] * 20):
        _, state = optimizer.update(jax.tree.map(lambda p, g=gradient: jnp.full(p.shape, g, p.dtype), params), state)
    for second in jax.tree.leaves(state[0].nu):
        np.testing.assert_allclose(np.asarray(second, np.float32), 0.001 * 0.999**20, rtol=1e-5)


def test_gradients_of_many_microbatches_are_summed_in_float32():
    """In bfloat16 a sum of equal terms stops growing at 256 of them."""
    config = Config(model=MODEL, optimizer=OPTIMIZER)
    one, many = (train(config, 1, count, lr=0.0)[2] for count in (1, 600))
    np.testing.assert_allclose(many["grad_norm"], one["grad_norm"], rtol=1e-5)
    np.testing.assert_allclose(many["loss"], one["loss"], rtol=1e-5)


def test_the_loss_is_traced_once():
    """Not for the shapes of the sums over microbatches and again for the loop: tracing takes as long as compiling."""
    config = Config(model=MODEL, optimizer=OPTIMIZER)
    spec, mesh, traces = spec_of(config), make_mesh(config.mesh), []

    def loss(params, batch, rng):
        traces.append(batch)
        return next_token_loss(config)(params, batch, rng)

    step = make_train_step(Objective(spec, loss), state_shardings(spec, mesh))
    batch = {"tokens": np.zeros((3, 1, 8), np.int32)}
    with jax.set_mesh(mesh):
        step.trace(abstract_state(spec, mesh), batch, np.int32(3), {"lr": np.float32(0)})
    assert len(traces) == 1


def test_frozen_parameters_keep_param_dtype():
    settings = PeftConfig(method="lora", targets=("layers/.*/kernel",), rank=2)
    config = Config(model=MODEL, optimizer=OPTIMIZER, peft=settings)
    given = shapes_of(spec_of(config))

    def init(rng):
        params = init_params(GPT(MODEL), rng)
        return peft.join(params, peft.low_rank(settings, params, rng))

    state = create_state(ParameterSpec(config, init, given=given), make_mesh(config.mesh))
    assert {str(leaf.dtype) for leaf in jax.tree.leaves(state.base)} == {"bfloat16"}
    assert {str(leaf.dtype) for leaf in jax.tree.leaves((state.params, state.ema))} == {"float32"}


def test_checkpoints_of_bfloat16_parameters_resume_in_float32(tmp_path):
    """Earlier versions trained bfloat16 parameters, with moments and an average of that dtype; widening is exact."""
    config = Config(model=MODEL, optimizer=OPTIMIZER)
    spec, mesh = spec_of(config), make_mesh(config.mesh)
    state = create_state(spec, mesh)

    def narrow(tree):
        return jax.tree.map(lambda x: x.astype(jnp.bfloat16) if x.dtype == jnp.float32 else x, tree)

    old = state.replace(params=narrow(state.params), opt_state=narrow(state.opt_state), ema=narrow(state.ema))
    with Checkpoints(tmp_path, config.checkpoint) as checkpoints:
        checkpoints.save(3, old, Position(), None)
        checkpoints.wait()
        restored, _ = checkpoints.restore(abstract_state(spec, mesh))
    assert jax.tree.map(lambda x: x.dtype, restored) == jax.tree.map(lambda x: x.dtype, state)
    jax.tree.map(lambda a, b: np.testing.assert_array_equal(a, b.astype(a.dtype)), restored, old)


def test_weights_are_read_in_either_precision(tmp_path):
    """Float32 weights may be read in param_dtype; a run is never resumed with fewer digits than it saved."""
    config = Config(model=MODEL, optimizer=OPTIMIZER)
    spec, mesh = spec_of(config), make_mesh(config.mesh)
    state = create_state(spec, mesh).replace(ema=None)
    abstract = abstract_state(spec, mesh)
    narrow = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, jnp.bfloat16, sharding=x.sharding), abstract.params)
    with Checkpoints(tmp_path, config.checkpoint) as checkpoints:
        checkpoints.save(3, state, Position(), None)
        checkpoints.wait()
        read, _ = checkpoints.restore_params(narrow)
        streamed = list(checkpoints.stream_params(narrow))
        with pytest.raises(UserError, match=r"params/.* is float32.* in the checkpoint and bfloat16.* in this run"):
            checkpoints.restore(abstract.replace(params=narrow, ema=None))
    expected = jax.tree.map(lambda x: np.asarray(x.astype(jnp.bfloat16)), state.params)
    jax.tree.map(np.testing.assert_array_equal, read, expected)
    for array, wanted in zip(streamed, jax.tree.leaves(expected), strict=True):
        np.testing.assert_array_equal(array, wanted)


# --- model FLOPs ------------------------------------------------------------------------------------------------------


def test_flops_count_what_a_step_computes():
    """Products per token and layer: 4 D^2 of attention, 8 D^2 of the feed-forward layer; the tied head has V D."""
    D, L, V, T = 16, 2, 64, 8
    kernels, attention, head = 2 * 12 * D * D, 4 * D * T, 2 * V * D
    forward = L * (kernels + attention) + head
    whole = spec_of(Config(model=MODEL))
    assert whole.flops_per_token == flops.flops_per_token(MODEL) == 3 * forward
    shapes = shapes_of(whole)

    def partly(**settings) -> float:
        config = Config(model=MODEL, peft=PeftConfig(**settings))

        def init(rng):
            params = init_params(GPT(MODEL), rng)
            return peft.join(params, peft.low_rank(config.peft, params, rng)) if "targets" in settings else params

        return ParameterSpec(config, init, given=shapes).flops_per_token

    # Gradients of the activations: attention has two products of two activations, each with two gradients.
    gradients = L * (kernels + 2 * attention) + head
    adapted = L * 2 * (D + 4 * D)  # entries of the two low-rank matrices next to each mlp/up kernel
    assert partly(method="lora", targets=("layers/.*/mlp/up/kernel",), rank=2) == forward + gradients + 6 * adapted
    assert partly(method="top_layers", num_layers=1) == forward + (kernels + 2 * attention) + head + kernels
    reference = ParameterSpec(
        Config(model=MODEL), lambda rng: whole.init(rng) | {"reference": whole.init(rng)}, frozen=("reference",)
    )
    assert reference.flops_per_token == 3 * forward + forward


@pytest.mark.parametrize(("stage", "trained"), [("dpo", 1), ("grpo", 1), ("ppo", 2)])
def test_a_reference_that_reads_completions_once_an_iteration_is_amortised(stage, trained):
    """PPO trains a value function too; DPO's reference reads each row in each step."""
    forward = flops.forward_flops_per_token(MODEL)
    for epochs, passes in ((1, 1), (4, 1 if stage == "dpo" else 1 / 4)):
        config = replace(Config(stage=stage, model=MODEL), {"rl": {"reward": "bleu", "inner_epochs": epochs}})
        config = replace(config, {"ppo": {"value_init": "policy"}})
        assert registry.parameters(config).flops_per_token == pytest.approx((3 * trained + passes) * forward)


def test_flops_of_low_rank_experts_are_those_of_a_tokens_experts():
    """Two of four experts, each with two matrices of rank 2 next to `up`: 2 x 2 x (D + F) entries a layer."""
    model = dataclasses.replace(MODEL, num_experts=4, experts_per_token=2, tied_head=False)
    spec = spec_of(Config(model=model))
    assert spec.flops_per_token == flops.flops_per_token(model)
    lora = PeftConfig(method="lora", targets=("layers/.*/experts/up/kernel",), rank=2)

    def init(rng):
        params = init_params(GPT(model), rng)
        return peft.join(params, peft.low_rank(lora, params, rng))

    adapted = model.num_layers * 2 * 2 * (model.embed_dim + model.feed_forward_dim)
    frozen = flops.partial_flops_per_token(model, flops.TrainedPart(0, 0, 0))
    low_rank = ParameterSpec(Config(model=model, peft=lora), init, given=shapes_of(spec))
    assert low_rank.flops_per_token == frozen + 6 * adapted
    # Nothing given, so that all is trained as a part: matrices of a token, with the untied head, without the table.
    whole = ParameterSpec(Config(model=model, peft=PeftConfig(method="head")), spec.init, given={})
    assert whole.flops_per_token == flops.flops_per_token(model)
