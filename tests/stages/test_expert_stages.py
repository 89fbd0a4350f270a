"""LoRA on the experts of a gpt-oss through stages sft and grpo, and its export."""

import dataclasses
import math
from pathlib import Path

import jax
import numpy as np
import pytest

from gptjax import config as c
from gptjax.data.tokenizers import BytesTokenizer
from gptjax.inference.engine import Engine
from gptjax.inference.sampling import Sampling
from gptjax.interop.adapters import export_adapter
from gptjax.interop.huggingface import export_workdir, load_pretrained
from gptjax.models import peft
from gptjax.models.gpt import GPT
from gptjax.parallel.mesh import make_mesh
from gptjax.run import run
from gptjax.stages.saved_weights import SavedWeights, load_parts, load_weights
from gptjax.training.metrics_file import read_metrics
from tests.tiny_chats import config_of, rl_config
from tests.tiny_tasks import MODEL, save_pretrained

pytestmark = pytest.mark.slow

CONTEXT, NEW = 128, 100
OSS = dataclasses.replace(
    MODEL,
    context_length=CONTEXT,
    num_layers=1,
    num_heads=4,
    num_kv_heads=2,
    head_width=4,
    ffw_dim=12,
    positions="rotary",
    norm="rms",
    attention_sinks=True,
    gated=True,
    activation="silu",
    swish_beta=1.702,
    gate_limit=7.0,
    up_offset=1.0,
    num_experts=4,
    router_bias=True,
    tied_head=False,
    router_balance_loss=0.01,
)
EXPERTS = r"layers/.*/(attention|experts)/.*/kernel"
PEFT = c.PeftConfig(method="lora", rank=2, alpha=4.0, targets=(EXPERTS,))


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> dict[str, Path]:
    """The workdirs of a pretrained model, of a run of sft from it, and of one of grpo from that."""
    root = tmp_path_factory.mktemp("experts")
    workdirs = {"pretrained": save_pretrained(root / "pretrained", settings=OSS)}
    for stage, start in (("sft", "pretrained"), ("grpo", "sft")):
        make = rl_config if stage == "grpo" else config_of
        config = make(stage, root, workdirs[start])
        batch = c.BatchConfig(
            epochs=1.0, tokens_per_batch=config.batch.tokens_per_batch // MODEL.context_length * CONTEXT
        )
        evaluation = dataclasses.replace(config.evaluation, sample_tokens=0)
        workdirs[stage] = root / stage
        run(dataclasses.replace(config, model=OSS, peft=PEFT, batch=batch, evaluation=evaluation), workdirs[stage])
    return workdirs


def weights_of(workdir: Path) -> SavedWeights:
    mesh = make_mesh(c.MeshConfig())
    with jax.set_mesh(mesh):
        return load_weights(workdir, mesh)


def test_experts_are_adapted_in_both_stages(runs):
    mesh = make_mesh(c.MeshConfig())
    for stage in ("sft", "grpo"):
        with jax.set_mesh(mesh):
            trained = peft.flatten(load_parts(runs[stage], mesh).trained)
        adapted = [path for path in trained if "/experts/" in path]
        assert sorted({path.split("/")[-2] for path in adapted}) == ["down", "gate", "up"]
        for path in adapted:
            assert path.endswith(peft.LORA)
            # lora_b is 0 at first; each expert that is chosen has its own.
            assert np.count_nonzero(np.abs(trained[path]).max(axis=(0, 2, 3))) > 1
        trains = [record for record in read_metrics(runs[stage])[1] if record["split"] == "train"]
        assert all(math.isfinite(record["loss"]) for record in trains)
        assert all(("router_balance" in record) == (stage == "sft") for record in trains)


def test_the_export_is_the_model_with_its_matrices_folded_in(runs, tmp_path):
    weights = weights_of(runs["grpo"])
    export_workdir(runs["grpo"], tmp_path / "out")
    _, params = load_pretrained(tmp_path / "out")
    jax.tree.map(np.testing.assert_array_equal, params, weights.gpt)
    start = weights_of(runs["sft"]).gpt
    changed = [
        path for path, leaf in peft.flatten(params).items() if not np.array_equal(leaf, peft.flatten(start)[path])
    ]
    assert len(changed) == 3 + 3
    assert all(path.endswith("/kernel") for path in changed)


@pytest.mark.filterwarnings("ignore:.*_pattern keys did not match any targeted module:RuntimeWarning")
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
def test_transformers_says_the_same(runs, tmp_path):
    torch, peft_library = pytest.importorskip("torch"), pytest.importorskip("peft")
    import transformers

    weights = weights_of(runs["grpo"])
    gpt, vocab_size = GPT(weights.config.model), weights.config.model.vocab_size
    for name in ("sft", "grpo"):
        export_workdir(runs[name], tmp_path / name)
    export_adapter(runs["grpo"], tmp_path / "lora")
    settings = {"experts_implementation": "eager", "attn_implementation": "eager", "dtype": "float32"}
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "grpo", **settings).eval()
    base = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "sft", **settings).eval()
    tokens_BT = np.random.default_rng(0).integers(0, vocab_size, (2, CONTEXT))
    expected_BTV = np.asarray(jax.jit(lambda p, t: gpt.apply({"params": p}, t))(weights.gpt, tokens_BT))
    with torch.no_grad():
        assert np.abs(base(torch.tensor(tokens_BT)).logits.numpy() - expected_BTV).max() > 1e-2
        adapted = peft_library.PeftModel.from_pretrained(base, tmp_path / "lora").eval()
        for model in (theirs, adapted):
            np.testing.assert_allclose(model(torch.tensor(tokens_BT)).logits.numpy(), expected_BTV, atol=1e-4, rtol=0)
    engine, prompt = Engine(gpt, weights.gpt, BytesTokenizer()), tokens_BT[0, :20]
    (ours,) = engine.generate([prompt], NEW, Sampling(temperature=0), ignore_end_of_text=True)
    ids = torch.tensor(prompt[None])
    found = theirs.generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=NEW, do_sample=False, pad_token_id=0, eos_token_id=None
    )
    assert ours.tokens.tolist() == found[0, 20:].tolist()
    assert len(ours.tokens) == NEW
