"""Continuous batching samples the completions of static batching, in their order, whatever the weights were before."""

import dataclasses
import shutil
from types import SimpleNamespace

import flax.linen as nn
import jax
import numpy as np
import pytest

from gptjax import config as c
from gptjax.config import UserError
from gptjax.data.tokenizers import BytesTokenizer
from gptjax.inference.batch_programs import decode_rows, read_chunks
from gptjax.inference.engine import Completion
from gptjax.models.gpt import GPT, init_params
from gptjax.parallel.mesh import make_mesh
from gptjax.parallel.platforms import override_defaults
from gptjax.run import run
from gptjax.stages.rl.generation import CompletionGenerator
from gptjax.training.metrics_file import read_metrics
from tests.tiny_chats import BATCH, rl_config, save_sft
from tests.tiny_tasks import MODEL

ROWS, NEW = 2, 8
ENDS = range(30, 45)  # with end-of-text as many as a request can have; they make the lengths differ
PROMPTS = [np.arange(1, 1 + length, dtype=np.int32) for length in (5, 2, 9, 7, 5)]
SEEDS = [7, 3, 2**32 - 1, 5, 11]


def generator(batching: str, **model: object) -> CompletionGenerator:
    settings = {"context_length": 32, "vocab_size": 258, **model}
    rl = c.RLConfig(batching=batching, generate_batch=ROWS, response_tokens=NEW)
    config = c.Config(stage="grpo", model=dataclasses.replace(MODEL, **settings), rl=rl)
    return CompletionGenerator(config, make_mesh(c.MeshConfig()), BytesTokenizer(), ENDS, 9)


def params_of(number: int):
    model = dataclasses.replace(MODEL, context_length=32, vocab_size=258)
    params = nn.unbox(init_params(GPT(model), jax.random.key(number)))
    return jax.tree.map(lambda leaf: 4 * leaf, params)  # far from uniform


def completed(of: CompletionGenerator, params) -> list[Completion]:
    batches = list(of.generate(params | {"reference": None}, PROMPTS, SEEDS, None))
    assert [len(batch) for batch in batches] == [2, 2, 1]
    return [completion for batch in batches for completion in batch]


@pytest.fixture(scope="module")
def continuous() -> list[list[Completion]]:
    """The completions of two policies by one generator, and of the first again."""
    one = generator("continuous")
    return [completed(one, params_of(number)) for number in (0, 1, 0)]


def test_both_sample_the_same_completions(continuous):
    for number in (0, 1):
        static = completed(generator("static"), params_of(number))
        assert len({len(completion.tokens) for completion in static}) > 1
        for one, other in zip(continuous[number], static, strict=True):
            assert one.tokens.tolist() == other.tokens.tolist()
            assert (one.finish_reason, one.end) == (other.finish_reason, other.end)
            np.testing.assert_allclose(one.logprobs, other.logprobs, atol=1e-5)


def test_an_iteration_that_is_sampled_again_is_the_same_bit_for_bit(continuous):
    for one, again in zip(continuous[0], continuous[2], strict=True):
        assert one.tokens.tolist() == again.tokens.tolist()
        np.testing.assert_array_equal(one.logprobs, again.logprobs)
        assert one.end_logprob == again.end_logprob


def test_new_weights_compile_nothing(continuous):
    compiled = [program._cache_size() for program in (decode_rows, read_chunks)]
    completed(generator("continuous"), params_of(2))
    assert [program._cache_size() for program in (decode_rows, read_chunks)] == compiled


def test_rows_that_are_sharded_are_refused():
    config = c.Config(stage="grpo", model=MODEL, rl=c.RLConfig(batching="continuous"))
    mesh = SimpleNamespace(shape={"data": 2, "fsdp": 2, "expert": 1})
    with pytest.raises(UserError, match=r"rl.batching=continuous .* each of the 4 shards .* set rl.batching=static"):
        CompletionGenerator(config, mesh, BytesTokenizer(), (), 4)
    for other in ("static", "auto"):
        config = c.replace(config, {"rl": {"batching": other}})
        made = CompletionGenerator(config, mesh, BytesTokenizer(), (), 4)
        assert not made._is_continuous


@pytest.mark.parametrize("faster", [False, True])
def test_auto_is_continuous_where_it_is_faster(faster):
    with override_defaults("cpu", continuous_completions=faster):
        assert generator("auto")._is_continuous == faster


@pytest.mark.slow
def test_a_run_resumes_with_the_same_completions(tmp_path):
    """From a checkpoint between two iterations, without the files of its rollouts."""
    save_sft(tmp_path / "sft", tmp_path)
    config = rl_config("grpo", tmp_path, tmp_path / "sft")
    every = 4 * BATCH * 2 * 16  # steps 4 and, at the end, 6; an iteration has two
    changes = {"rl": {"batching": "continuous", "generate_batch": 3}, "checkpoint": {"every_tokens": every}}
    config = c.replace(config, changes)
    run(config, tmp_path / "whole")
    shutil.copytree(tmp_path / "whole", tmp_path / "resumed")
    shutil.rmtree(tmp_path / "resumed" / "checkpoints" / "6")
    shutil.rmtree(tmp_path / "resumed" / "rollouts")
    run(config, tmp_path / "resumed")
    whole, resumed = (
        [
            {name: value for name, value in record.items() if name != "seconds"}
            for record in read_metrics(tmp_path / name)[1]
            if record["split"] == "rollout"
        ]
        for name in ("whole", "resumed")
    )
    assert [record["step"] for record in whole] == [0, 2, 4]
    assert whole == resumed
    assert whole[0]["sampling_logp_difference_max"] < 1e-5
