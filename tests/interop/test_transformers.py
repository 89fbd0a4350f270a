"""Comparison with transformers, where it is installed: more shapes than the fixtures have, and exported models."""

import dataclasses
from pathlib import Path

import jax
import numpy as np
import pytest

from gptjax import config as c
from gptjax.data import tokenizers
from gptjax.data.conversations import Message
from gptjax.data.templates import chat_format
from gptjax.interop.huggingface import export_workdir, load_pretrained, save_pretrained
from tests.interop.write_fixtures import draw_tokens, logits, make_model
from tests.tiny_chats import config_of
from tests.tiny_tasks import save_pretrained as save_weights

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")  # torch's and transformers' own


def gpt(model_type: str, vocab_size: int, context: int, width: int, layers: int, heads: int, **fields: object) -> tuple:
    sizes = (vocab_size, context, width, layers, heads)
    keys = ("vocab_size", "n_positions", "n_embd", "n_layer", "n_head")
    if model_type == "gpt_neo":
        keys = ("vocab_size", "max_position_embeddings", "hidden_size", "num_layers", "num_heads")
    return model_type, dict(zip(keys, sizes, strict=True)) | fields


CASES = [
    gpt("gpt2", 71, 9, 15, 1, 3, activation_function="relu"),
    gpt("gpt2", 50, 33, 16, 4, 1, activation_function="gelu_fast", n_inner=7),
    gpt("gpt2", 33, 17, 14, 5, 7, activation_function="swish", reorder_and_upcast_attn=True),
    gpt("openai-gpt", 71, 19, 15, 2, 5, afn="silu"),
    gpt("openai-gpt", 40, 8, 16, 5, 2),
    gpt("gpt_neo", 71, 21, 15, 6, 3, attention_types=[[["local", "global", "local"], 2]], window_size=1),
    gpt("gpt_neo", 40, 30, 12, 5, 2, attention_types=[[["global", "local"], 2], [["global"], 1]], window_size=29),
    gpt("gpt_neo", 40, 12, 12, 2, 4, attention_types=[[["local"], 2]], window_size=50, activation_function="gelu"),
]


@pytest.mark.parametrize(("model_type", "fields"), CASES)
def test_same_logits_and_the_same_weights_back(model_type, fields, tmp_path):
    theirs = make_model(model_type, fields)
    theirs.save_pretrained(tmp_path / "theirs", max_shard_size="4KB")
    assert len(list((tmp_path / "theirs").glob("*.safetensors"))) > 1
    model, params = load_pretrained(tmp_path / "theirs")
    full_BT = draw_tokens(theirs.config.vocab_size, theirs.config.max_position_embeddings)
    for tokens_BT in (full_BT, full_BT[:1, :3]):
        got_BTV = jax.jit(lambda p, t: model.apply({"params": p}, t))(params, tokens_BT)
        np.testing.assert_allclose(got_BTV, logits(theirs, tokens_BT), atol=1e-4, rtol=0)

    save_pretrained(model.config, params, tmp_path / "ours", max_file_bytes=5000)
    back, info = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "ours", output_loading_info=True)
    assert not any(info.values()), info
    assert type(back) is type(theirs)
    expected = theirs.state_dict()
    assert back.state_dict().keys() == expected.keys()
    for name, tensor in back.state_dict().items():
        assert torch.equal(tensor, expected[name]), name
    # Not bit for bit: there are several names for one activation, and transformers rounds each in its own way.
    np.testing.assert_allclose(logits(back.eval(), full_BT), logits(theirs, full_BT), atol=1e-5, rtol=0)


def test_a_chat_template_makes_the_tokens_that_the_model_was_trained_on(tmp_path):
    config = config_of("sft", tmp_path, None)
    workdir = save_weights(tmp_path / "run", settings=dataclasses.replace(config.model, vocab_size=259))
    (workdir / "config.json").write_text(c.to_json(config))
    export_workdir(workdir, tmp_path / "out")
    loaded = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    talk = [Message("user", "naïve?\n"), Message("assistant", "a"), Message("user", "q")]
    messages = [{"role": message.role, "content": message.content} for message in talk]
    expected = chat_format(config.chat, tokenizers.BytesTokenizer()).encode_prompt(talk).tolist()
    ids = loaded.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
    assert ids == expected
    assert len(loaded) == model.config.vocab_size == model.get_input_embeddings().num_embeddings == 259
    assert loaded.eos_token_id == model.config.eos_token_id == model.generation_config.eos_token_id == 258


@pytest.mark.parametrize("spec", ["bytes", "gpt2"])
def test_tokenizers_load_with_the_model(spec, tmp_path):
    tokenizer = tokenizers.get_tokenizer(
        spec, train_documents=tuple, corpus_fingerprint="", cache_dir=Path("~/.cache/gptjax").expanduser()
    )
    theirs = make_model(*gpt("gpt2", tokenizer.vocab_size, 8, 4, 1, 1))
    theirs.save_pretrained(tmp_path / "theirs")
    model, params = load_pretrained(tmp_path / "theirs")
    save_pretrained(model.config, params, tmp_path / "ours", tokenizer)
    loaded = transformers.AutoTokenizer.from_pretrained(tmp_path / "ours")
    text = "It's a naïve 日本 test,  twice.\n"
    assert loaded(text)["input_ids"] == tokenizer.encode(text).tolist()
    assert loaded.decode(tokenizer.encode(text)) == text
    config = transformers.AutoConfig.from_pretrained(tmp_path / "ours")
    assert loaded.eos_token_id == config.eos_token_id == config.bos_token_id == tokenizer.end_of_text
