"""Variants of a training step for `benchmarks.train_step`."""

import pytest

from benchmarks.train_step import make_config
from benchmarks.variants import Trainer, parse_variant
from gptjax.config import UserError
from gptjax.parallel.platforms import PLATFORM_DEFAULTS

BASE = make_config("tiny", sequences=2, context=16, platform="cpu")


def test_a_variant_is_the_base_with_changes() -> None:
    text = "fast,model.layer_loop=unroll,sequences=4,microbatches=3,xla.xla_cpu_ftz=true,platform.min_decode_rows=2"
    variant = parse_variant(text, BASE)
    assert variant.name == "fast"
    assert variant.config.model.layer_loop == "unroll"
    assert (variant.config.sequences_per_microbatch, variant.config.batch.tokens_per_batch) == (4, 3 * 4 * 16)
    assert variant.config.compiler_options == (("xla_cpu_ftz", "true"),)
    assert variant.defaults == {"min_decode_rows": 2}


@pytest.mark.parametrize("text", ["x,model.nonsense=1", "x,platform.NONSENSE=1", "x,platform=1", "x,fast"])
def test_an_unknown_key_of_a_variant_is_a_user_error(text: str) -> None:
    with pytest.raises(UserError):
        parse_variant(text, BASE)


def test_all_variants_compute_the_same() -> None:
    """Three programs on one training state, which each of them donates and returns."""
    trainer = Trainer(BASE, workers=1)
    names = [
        "plain",
        "one_pass,platform.logsumexp_in_one_pass=True",
        "unrolled,model.layer_loop=unroll,platform.loss_chunk_tokens=8",
    ]
    variants = [parse_variant(text, BASE) for text in names]
    for variant in variants:
        trainer.start(variant)
    trainer.wait()
    for variant in variants:
        trainer.finish(variant.name)
        assert trainer.train(variant.name, steps=1) > 0
    plain, one_pass, unrolled = (trainer.numbers[variant.name] for variant in variants)
    assert one_pass == pytest.approx(plain, rel=1e-5)
    assert unrolled == pytest.approx(plain, rel=1e-5)
    assert not PLATFORM_DEFAULTS["cpu"].logsumexp_in_one_pass
    assert len({len(trainer.program(variant.name).as_text()) for variant in variants}) == 3
