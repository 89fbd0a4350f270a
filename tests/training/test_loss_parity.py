"""Our loss curve is that of a plain PyTorch GPT-2, recorded by `python -m benchmarks.loss_parity --write_fixture`."""

from dataclasses import replace

import jax
import numpy as np
import pytest

from benchmarks.loss_parity import FIXTURE, SIZES, Curve, Weights, make_config, train_gptjax
from gptjax import config as c
from gptjax.parallel.mesh import make_mesh
from gptjax.stages.builders import build

STEPS = 20


@pytest.fixture(scope="module")
def recorded() -> dict[str, np.ndarray]:
    with np.load(FIXTURE) as file:
        return dict(file)


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> c.DataConfig:
    """Any text: the stage wants a corpus, but the batches come from the recording."""
    directory = tmp_path_factory.mktemp("corpus")
    for i in range(2):
        (directory / f"{i}.txt").write_text("To be, or not to be, that is the question. " * 20)
    return c.DataConfig(source=f"text:{directory}/*.txt", tokenizer="bytes", cache_dir=str(directory / "cache"))


def train(corpus: c.DataConfig, recorded: dict[str, np.ndarray], microbatch_size: int | None) -> Curve:
    config = replace(make_config(SIZES["tiny"], STEPS), data=corpus)
    config = c.replace(config, {"batch": {"microbatch_size": microbatch_size}})
    mesh = make_mesh(config.mesh, jax.devices()[:1])
    weights: Weights = {name: array for name, array in recorded.items() if name.startswith("transformer.")}
    return train_gptjax(build(config, mesh, None), mesh, weights, recorded["windows_NBS"].astype(np.int32))


@pytest.mark.parametrize("microbatch_size", [None, 2])
def test_loss_curve_is_that_of_pytorch(
    corpus: c.DataConfig, recorded: dict[str, np.ndarray], microbatch_size: int | None
) -> None:
    curve = train(corpus, recorded, microbatch_size)
    assert curve.losses.shape == (STEPS,)
    # Measured: losses 1e-6, logits 2e-6 and 7e-6, norms 4e-7.
    np.testing.assert_allclose(curve.first_logits_BTV[0], recorded["first_logits_TV"], rtol=0, atol=1e-5)
    np.testing.assert_allclose(curve.losses, recorded["losses"], rtol=0, atol=1e-5)
    np.testing.assert_allclose(curve.grad_norms, recorded["grad_norms"], rtol=1e-5)
    np.testing.assert_allclose(curve.last_logits_BTV[0], recorded["last_logits_TV"], rtol=0, atol=1e-4)


def test_the_recording_clips_some_gradients_and_not_others(recorded: dict[str, np.ndarray]) -> None:
    clipped = recorded["grad_norms"] > 1
    assert 0 < clipped.sum() < STEPS


def test_the_recording_is_small() -> None:
    assert FIXTURE.stat().st_size < 300_000
