"""The table of platform defaults."""

import jax
import pytest

from gptjax.config import MeshConfig, UserError
from gptjax.parallel.mesh import make_mesh, use_mesh
from gptjax.parallel.platforms import PLATFORM_DEFAULTS, override_defaults, platform_defaults


def test_defaults_are_those_of_the_platform_of_the_mesh_in_use(monkeypatch):
    with use_mesh(make_mesh(MeshConfig(), jax.devices("cpu")[:1])):
        monkeypatch.setattr(jax, "default_backend", lambda: "tpu")
        assert platform_defaults() is PLATFORM_DEFAULTS["cpu"]
    assert platform_defaults() is PLATFORM_DEFAULTS["tpu"]


def test_an_override_ends_with_its_block():
    before = PLATFORM_DEFAULTS["cpu"]
    with override_defaults("cpu", loss_chunk_tokens=7):
        assert platform_defaults().loss_chunk_tokens == 7
        assert platform_defaults().logits_dtype == before.logits_dtype
    assert PLATFORM_DEFAULTS["cpu"] is before


def test_a_default_that_does_not_exist_cannot_be_overridden():
    with pytest.raises(TypeError, match="loss_chunk"), override_defaults("cpu", loss_chunk=7):
        pass


@pytest.mark.parametrize(
    ("axes", "message"),
    [
        ({"context": 3}, r"mesh\.data=-1 x mesh\.context=3 does not match \d+ device"),
        ({"tensor": 0}, r"mesh\.data=-1 x mesh\.tensor=0: sizes must be positive"),
    ],
)
def test_a_mesh_that_does_not_fit_is_named_by_its_fields(axes, message):
    with pytest.raises(UserError, match=message):
        make_mesh(MeshConfig(**axes))
