"""The step: accumulation equals one big batch, whatever the room; the average of the weights; donated memory."""

import jax
import numpy as np
import pytest

from gptjax.checkpoint.state import create_state, state_shardings
from gptjax.config import replace
from gptjax.parallel.mesh import make_mesh
from gptjax.stages.builders import build
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
