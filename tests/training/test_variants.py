"""`benchmarks.train_step` compares what its command line says."""

import pytest

from benchmarks.train_step import make_config
from benchmarks.variants import Trainer, changed, parse_variant
from gptjax.config import UserError
from gptjax.losses import cross_entropy as losses
from gptjax.models import attention

BASE = make_config("tiny", sequences=2, context=16, platform="cpu")


def test_a_variant_is_the_base_with_changes() -> None:
    text = "fast,model.layer_loop=unroll,sequences=4,microbatches=3,xla.xla_cpu_ftz=true,losses.ONE_PASS=True"
    variant = parse_variant(text, BASE)
    assert variant.name == "fast"
    assert variant.config.model.layer_loop == "unroll"
    assert (variant.config.sequences_per_microbatch, variant.config.batch.tokens_per_batch) == (4, 3 * 4 * 16)
    assert variant.config.compiler_options == (("xla_cpu_ftz", "true"),)
    assert variant.constants == {("losses", "ONE_PASS"): True}


@pytest.mark.parametrize("text", ["x,model.nonsense=1", "x,losses.NONSENSE=1", "x,losses.logits_dtype=1", "x,fast"])
def test_a_variant_of_what_is_not_there_is_told(text: str) -> None:
    with pytest.raises(UserError):
        parse_variant(text, BASE)


def test_what_modules_choose_is_changed_back() -> None:
    before = losses.CHUNK_TOKENS["cpu"]
    with changed({("losses", "CHUNK_TOKENS"): 7}, "cpu"):
        assert losses.CHUNK_TOKENS["cpu"] == 7
    assert losses.CHUNK_TOKENS["cpu"] == before


def test_all_variants_compute_the_same() -> None:
    """Two programs, and one with a product each for queries, keys and values, on one state that each gives back."""
    trainer = Trainer(BASE, workers=1)
    names = ["plain", "separate,attention.SEPARATE_QKV=True", "unrolled,model.layer_loop=unroll,losses.CHUNK_TOKENS=8"]
    variants = [parse_variant(text, BASE) for text in names]
    for variant in variants:
        trainer.start(variant)
    trainer.wait()
    for variant in variants:
        trainer.finish(variant.name)
        assert trainer.train(variant.name, steps=1) > 0
    plain, separate, unrolled = (trainer.numbers[variant.name] for variant in variants)
    assert separate == pytest.approx(plain, rel=1e-5)
    assert unrolled == pytest.approx(plain, rel=1e-5)
    assert not attention.SEPARATE_QKV["cpu"]
    assert len({len(trainer.program(variant.name).as_text()) for variant in variants}) == 3
