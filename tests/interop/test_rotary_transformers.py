"""gpt-oss, Llama, Mistral and Qwen against transformers: logits, greedy decoding, and what it loads of ours."""

import json
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gptjax.data.tokenizers import BytesTokenizer
from gptjax.inference.engine import Engine
from gptjax.inference.sampling import Sampling
from gptjax.interop.huggingface import load_pretrained, save_pretrained
from gptjax.interop.mxfp4 import decode
from tests.interop.rotary_models import MODELS, OSS, Json, llama3, load_theirs, model, tensors, text_tokens, write, yarn
from tests.interop.write_fixtures import logits

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
torch.set_num_threads(1)  # quicker for models this small

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")  # torch's and transformers' own

# Beyond the fixtures: other shapes, contexts and combinations of keys, and more text than any window or YaRN's context.
NEW = 200
LONG = {"max_position_embeddings": 256}
CASES: dict[str, Json] = {
    "gpt_oss": model(
        *("gpt_oss", 36, 2, 6, 2, 14),
        **OSS,
        **LONG,
        sliding_window=13,
        rope_theta=150000.0,
        rope_scaling=yarn(8.0, 32, truncate=False, beta_fast=32.0, beta_slow=1.0),
    ),
    "gpt_oss_dense": model(
        *("gpt_oss", 12, 1, 3, 1, 4),
        **LONG,
        num_local_experts=7,
        num_experts_per_tok=1,
        layer_types=["full_attention"],
        rope_parameters={"rope_type": "default", "rope_theta": 77.0},
    ),
    "llama": model(
        "llama", 36, 3, 4, 2, 6, **LONG, hidden_act="relu2", rope_scaling=yarn(4.0, 64), attention_bias=True
    ),
    "llama3": model(
        "llama", 30, 2, 3, 1, 16, **LONG, rope_theta=5e3, rope_scaling=llama3(8.0, 64, high_freq_factor=4.0)
    ),
    "llama_heads": model("llama", 30, 1, 3, 3, 8, **LONG, mlp_bias=True, tie_word_embeddings=True),
    "mistral": model("mistral", 20, 3, 5, 5, 6, **LONG, sliding_window=1),
    "mistral_dense": model("mistral", 28, 2, 4, 2, 8, **LONG, sliding_window=None, rope_scaling=yarn(2.0, 100)),
    "qwen2": model("qwen2", 28, 2, 4, 4, 6, **LONG, tie_word_embeddings=True),
    "qwen2_windows": model(
        *("qwen2", 24, 4, 6, 2, 8),
        **LONG,
        use_sliding_window=True,
        sliding_window=31,
        layer_types=["sliding_attention", "full_attention"] * 2,
    ),
    "qwen3": model("qwen3", 20, 2, 4, 1, 10, **LONG, rope_scaling=yarn(3.0, 50, attention_factor=0.9)),
}


@pytest.fixture(scope="module", params=CASES)
def pair(request, tmp_path_factory) -> tuple[Json, Any, Any, Any]:
    """A config.json, and its model: theirs, ours and our parameters."""
    config = CASES[request.param]
    source = write(tmp_path_factory.mktemp("models") / "source", config, tensors(config), max_file_bytes=9000)
    assert len(list(source.glob("*.safetensors"))) > 1
    return config, load_theirs(source), *load_pretrained(source)


def test_the_logits_are_the_same_at_every_position(pair):
    config, theirs, gpt, params = pair
    tokens_BT = text_tokens(config)
    assert tokens_BT.shape == (2, 256)
    got_BTV = np.asarray(jax.jit(lambda p, t: gpt.apply({"params": p}, t))(params, tokens_BT))
    expected_BTV = logits(theirs, tokens_BT)
    print(config["model_type"], "largest difference", np.abs(got_BTV - expected_BTV).max())
    np.testing.assert_allclose(got_BTV, expected_BTV, atol=1e-4, rtol=0)


def test_greedy_decoding_gives_the_same_tokens(pair):
    config, theirs, gpt, params = pair
    rng = np.random.default_rng(2)
    prompts = [rng.integers(0, config["vocab_size"], length) for length in (1, 40)]
    engine = Engine(gpt, params, BytesTokenizer())
    ours = engine.generate(prompts, NEW, Sampling(temperature=0), ignore_end_of_text=True)
    for prompt, completion in zip(prompts, ours, strict=True):
        ids = torch.tensor(prompt[None])
        mask = torch.ones_like(ids)
        settings = {"max_new_tokens": NEW, "do_sample": False, "pad_token_id": 0}
        # Their cache of a window of 1 drops nothing.
        settings["use_cache"] = config.get("sliding_window") != 1
        expected = theirs.generate(ids, attention_mask=mask, **settings)
        assert completion.tokens.tolist() == expected[0, len(prompt) :].tolist()
        assert len(completion.tokens) == NEW


def test_transformers_loads_ours_with_the_same_bits(pair, tmp_path):
    config, theirs, gpt, params = pair
    save_pretrained(gpt.config, params, tmp_path / "ours", max_file_bytes=9000)
    back = load_theirs(tmp_path / "ours")
    # A mistral without windows is a llama.
    assert type(back) is type(theirs) or (config["model_type"], config["sliding_window"]) == ("mistral", None)
    expected = theirs.state_dict()
    assert back.state_dict().keys() == expected.keys()
    for name, tensor in back.state_dict().items():
        assert torch.equal(tensor, expected[name]), name
    tokens_BT = text_tokens(config)
    # Not bit for bit: an activation has several names, which transformers rounds differently.
    np.testing.assert_allclose(logits(back, tokens_BT), logits(theirs, tokens_BT), atol=2e-5, rtol=0)


# --- MXFP4 ------------------------------------------------------------------------------------------------------------


def bits(tensor: Any) -> np.ndarray:
    return tensor.view(torch.int16).numpy().view(np.uint16)


def test_the_fixture_of_mxfp4_is_what_transformers_decodes():
    from transformers.integrations.mxfp4 import convert_moe_packed_tensors

    from tests.interop.test_mxfp4 import EXPECTED, every_number, random_tensor

    for name, (blocks, scales) in (("every_number", every_number()), ("random", random_tensor())):
        theirs = bits(convert_moe_packed_tensors(torch.tensor(blocks), torch.tensor(scales)))
        np.testing.assert_array_equal(decode(blocks, scales).view(np.uint16).swapaxes(1, 2), theirs)
        np.testing.assert_array_equal(np.load(EXPECTED)[name], theirs)


def test_transformers_decodes_a_checkpoint_to_the_same_weights(tmp_path):
    from tests.interop.test_mxfp4 import packed_model

    config, arrays, _ = packed_model()
    source = write(tmp_path / "source", config, arrays)
    settings = {"quantization_config": transformers.Mxfp4Config(dequantize=True), "dtype": "bfloat16"}
    theirs = transformers.AutoModelForCausalLM.from_pretrained(source, **settings)
    gpt, params = load_pretrained(source, param_dtype="bfloat16")
    save_pretrained(gpt.config, params, tmp_path / "ours")
    written = json.loads((tmp_path / "ours" / "config.json").read_text())
    assert "quantization_config" not in written
    assert written["dtype"] == "bfloat16"
    back = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "ours", dtype="bfloat16")
    expected = theirs.state_dict()
    assert back.state_dict().keys() == expected.keys()
    for name, tensor in back.state_dict().items():
        assert torch.equal(tensor, expected[name]), name
    assert params["token_embedding"]["embedding"].dtype == jnp.bfloat16


# --- what changes logits ----------------------------------------------------------------------------------------------

ROPE = yarn(6.0, 16, rope_theta=100.0, beta_fast=2.0, beta_slow=0.3, mscale=0.7, mscale_all_dim=1.4)
BASES = MODELS | {"llama_yarn": model("llama", 24, 3, 4, 4, 16, rope_parameters=ROPE)}
LLAMA3_CHANGES: list[Json] = [
    *({"factor": 2.0}, {"low_freq_factor": 0.5}, {"high_freq_factor": 3.0}, {"original_max_position_embeddings": 30})
]
CHANGES: list[tuple[str, Json]] = [
    ("gpt_oss", {"rms_norm_eps": 1e-2}),
    ("gpt_oss", {"sliding_window": 6}),
    ("gpt_oss", {"num_experts_per_tok": 3}),
    ("gpt_oss", {"swiglu_limit": 0.5}),
    ("gpt_oss", {"swiglu_alpha": 1.0}),
    ("gpt_oss", {"layer_types": ["full_attention", "sliding_attention"] * 2}),
    ("gpt_oss", {"rope_scaling": None, "rope_parameters": {"rope_type": "default"}}),
    ("llama_yarn", {"rope_parameters": ROPE | {"rope_theta": 50.0}}),
    ("llama_yarn", {"rope_parameters": ROPE | {"factor": 4.0}}),
    ("llama_yarn", {"rope_parameters": ROPE | {"beta_fast": 1.0}}),
    ("llama_yarn", {"rope_parameters": ROPE | {"beta_slow": 0.1}}),
    ("llama_yarn", {"rope_parameters": ROPE | {"truncate": False}}),
    ("llama_yarn", {"rope_parameters": ROPE | {"original_max_position_embeddings": 32}}),
    ("llama_yarn", {"rope_parameters": ROPE | {"attention_factor": 1.5}}),
    ("llama_yarn", {"rope_parameters": ROPE | {"mscale": 1.4}}),
    *(("llama3", {"rope_parameters": MODELS["llama3"]["rope_parameters"] | change}) for change in LLAMA3_CHANGES),
    ("llama", {"hidden_act": "gelu_pytorch_tanh"}),
    ("qwen2", {"use_sliding_window": False}),
    ("qwen2", {"max_window_layers": 2}),
    ("qwen3", {"layer_types": None}),
]


@pytest.mark.parametrize(("name", "changes"), CHANGES, ids=str)
def test_keys_that_change_logits_are_read(name, changes, tmp_path):
    before = BASES[name]
    after = {key: value for key, value in (before | changes).items() if value is not None}
    tokens_BT = text_tokens(before)[:1]
    source = write(tmp_path / "source", after, tensors(after))
    expected_BTV = logits(load_theirs(source), tokens_BT)
    original_BTV = logits(load_theirs(write(tmp_path / "before", before, tensors(before))), tokens_BT)
    assert np.abs(expected_BTV - original_BTV).max() > 1e-3
    gpt, params = load_pretrained(source)
    got_BTV = np.asarray(jax.jit(lambda p, t: gpt.apply({"params": p}, t))(params, tokens_BT))
    np.testing.assert_allclose(got_BTV, expected_BTV, atol=1e-4, rtol=0)
