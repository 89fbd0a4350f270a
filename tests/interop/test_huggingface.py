"""Models that transformers saved: the same logits, the same bytes back, and a workdir that all commands can use."""

import dataclasses
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tokenizers

from gptjax import config as c
from gptjax.config import GPTConfig, UserError
from gptjax.data.tokenizers import get_tokenizer
from gptjax.interop import families, safetensors_files
from gptjax.interop.huggingface import export_workdir, import_workdir, load_pretrained, save_pretrained
from gptjax.interop.safetensors_files import DTYPES, Declared
from gptjax.models.gpt import GPT, abstract_params
from gptjax.parallel.mesh import make_mesh
from gptjax.run import run
from gptjax.stages.trained_model import load_model
from tests import tiny_chats
from tests.commands import run_command
from tests.interop.write_fixtures import FIXTURES, MODELS
from tests.tiny_tasks import save_pretrained as save_weights

ROOT = Path(__file__).parents[2]


def contents(directory: Path) -> dict[str, tuple[str, tuple[int, ...], bytes]]:
    """dtype, shape and bytes of each tensor."""
    headers = safetensors_files.read_headers(directory)
    return {name: (t.dtype, t.shape, safetensors_files.read(t).tobytes()) for name, t in headers.items()}


def arrays(directory: Path) -> dict[str, np.ndarray]:
    return {name: safetensors_files.read(t) for name, t in safetensors_files.read_headers(directory).items()}


def write(directory: Path, tensors: dict[str, np.ndarray], config: dict, **settings: int) -> Path:
    """A model's directory with these tensors."""
    names = {dtype: name for name, dtype in DTYPES.items()}
    directory.mkdir()
    (directory / "config.json").write_text(json.dumps(config))
    declared = [Declared(name, names[array.dtype], array.shape) for name, array in tensors.items()]
    safetensors_files.write(directory, declared, iter(tensors.values()), **settings)
    return directory


def config_of(name: str) -> dict:
    return json.loads((FIXTURES / name / "config.json").read_text())


def compute(model: GPT, params: object, tokens_BT: np.ndarray) -> np.ndarray:
    return np.asarray(jax.jit(lambda p, t: model.apply({"params": p}, t))(params, tokens_BT))


def assert_close_to_fixture(model: GPT, params: object, name: str) -> None:
    expected = np.load(FIXTURES / name / "logits.npz")
    got_BTV = compute(model, params, expected["tokens_BT"])
    assert got_BTV.dtype == np.float32
    np.testing.assert_allclose(got_BTV, expected["logits_BTV"], atol=1e-4, rtol=0)


@pytest.mark.parametrize("name", MODELS)
def test_logits_are_those_of_transformers_and_the_bytes_go_back(name, tmp_path):
    model, params = load_pretrained(FIXTURES / name)
    assert (model.config.dtype, model.config.param_dtype) == ("float32", "float32")
    assert_close_to_fixture(model, params, name)
    save_pretrained(model.config, params, tmp_path / "out")
    assert contents(tmp_path / "out") == contents(FIXTURES / name)
    theirs, ours = config_of(name), json.loads((tmp_path / "out" / "config.json").read_text())
    header_bytes = int.from_bytes((tmp_path / "out" / "model.safetensors").read_bytes()[:8], "little")
    assert header_bytes % 8 == 0  # the tensors are aligned for those that map the file
    differing = {key for key in ours if ours[key] != theirs[key]}
    assert differing <= {"attention_types"}  # of a pattern that has a shorter form
    assert families.read_config(tmp_path / "out") == families.read_config(FIXTURES / name)


def test_configs_are_read_into_ours():
    read = {name: families.read_config(FIXTURES / name)[1] for name in MODELS}
    assert read["gpt2_variant"] == GPTConfig(
        vocab_size=61,
        context_length=7,
        num_layers=2,
        num_heads=5,
        embed_dim=20,
        ffw_dim=28,
        norm_eps=1e-3,
        activation="gelu_exact",
        scale_attention=False,
        embedding_dropout=0.1,
        attention_dropout=0.1,
        residual_dropout=0.1,
        dtype="float32",
    )
    assert read["openai_gpt"].norm_position == "post"
    assert read["openai_gpt"].activation == "gelu_tanh"  # what transformers computes where this family says "gelu"
    neo, aperiodic = read["gpt_neo"], read["gpt_neo_aperiodic"]
    assert (neo.attention_pattern, neo.band_width) == (("dense", "banded"), 5)
    assert (neo.scale_attention, neo.qkv_bias) == (False, False)
    assert aperiodic.attention_pattern == ("dense", "banded", "banded")


@pytest.mark.parametrize("name", ["gpt2", "openai_gpt", "gpt_neo"])
def test_names_of_older_checkpoints(name, tmp_path):
    """As on the Hub: no prefix, buffers of all kinds, the tied head once more."""
    inner = "attn.attention" if name == "gpt_neo" else "attn"
    tensors = arrays(FIXTURES / name)
    embedding = tensors[next(key for key in tensors if key.endswith(("wte.weight", "tokens_embed.weight")))]
    buffers = {
        f"h.0.{inner}.bias": np.ones((1, 1, 13, 13), np.float32),
        f"h.0.{inner}.masked_bias": np.float32([-1e9]),
    }
    old = {key.removeprefix("transformer."): array for key, array in tensors.items()} | buffers
    directory = write(tmp_path / "old", old | {"lm_head.weight": embedding}, config_of(name), max_file_bytes=5000)
    assert len(list(directory.glob("*.safetensors"))) > 2
    model, params = load_pretrained(directory)
    assert_close_to_fixture(model, params, name)
    # Buffers may be of any dtype.
    for file in directory.glob("*.safetensors"):
        file.write_bytes(file.read_bytes().replace(b'masked_bias":{"dtype":"F32"', b'masked_bias":{"dtype":"I32"'))
    load_pretrained(directory)


def test_a_head_alone_stands_for_the_embedding(tmp_path):
    tensors = arrays(FIXTURES / "gpt2")
    tensors["lm_head.weight"] = tensors.pop("transformer.wte.weight")
    model, params = load_pretrained(write(tmp_path / "headed", tensors, config_of("gpt2")))
    assert_close_to_fixture(model, params, "gpt2")


@pytest.mark.parametrize("dtype", ["BF16", "F16"])
@pytest.mark.parametrize("kept", ["float32", "bfloat16"])
def test_half_precision(dtype, kept, tmp_path):
    """Parameters are float32 unless asked for otherwise: training in bfloat16 loses its updates."""
    tensors = {name: array.astype(DTYPES[dtype]) for name, array in arrays(FIXTURES / "gpt_neo").items()}
    half = write(tmp_path / "half", tensors, config_of("gpt_neo"))
    model, params = load_pretrained(half, **({} if kept == "float32" else {"param_dtype": kept}))
    assert model.config.param_dtype == kept
    assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {jnp.dtype(kept)}
    save_pretrained(model.config, params, tmp_path / "out")
    back = arrays(tmp_path / "out")
    for name, array in tensors.items():
        np.testing.assert_array_equal(back[name].astype(np.float32), array.astype(kept).astype(np.float32))
    assert {array.dtype for array in back.values()} == {jnp.dtype(kept)}
    assert json.loads((tmp_path / "out" / "config.json").read_text())["dtype"] == kept


def test_bfloat16_parameters_compute_as_float32_ones(tmp_path):
    """Where activations are float32, so is every sum, that of the two embeddings too."""
    tensors = {name: array.astype(jnp.bfloat16) for name, array in arrays(FIXTURES / "gpt2").items()}
    half = write(tmp_path / "half", tensors, config_of("gpt2"))
    tokens_BT = np.load(FIXTURES / "gpt2" / "logits.npz")["tokens_BT"]
    results = []
    for param_dtype in ("bfloat16", "float32"):
        model, params = load_pretrained(half, param_dtype=param_dtype)
        # Not compiled as a whole: XLA may keep more bits of a sum than its dtype has.
        results.append(np.asarray(model.apply({"params": params}, tokens_BT)))
    got, expected = results
    np.testing.assert_allclose(got, expected, atol=1e-5, rtol=0)


def test_devices_hold_their_shards():
    """On four devices, in a process of its own: half of each matrix on each, and the same logits."""
    code = f"""
import jax, numpy as np
from gptjax.interop.huggingface import load_pretrained
model, params = load_pretrained("{FIXTURES}/gpt_neo")
kernel = params["layers"]["block_1"]["mlp"]["up"]["kernel"]
assert kernel.addressable_shards[0].data.shape == (2, 3, 48), kernel.sharding
expected = np.load("{FIXTURES}/gpt_neo/logits.npz")
got = jax.jit(lambda p, t: model.apply({{"params": p}}, t))(params, expected["tokens_BT"])
np.testing.assert_allclose(got, expected["logits_BTV"], atol=1e-4, rtol=0)
"""
    environment = os.environ | {"XLA_FLAGS": f"{os.environ['XLA_FLAGS']} --xla_force_host_platform_device_count=4"}
    result = subprocess.run([sys.executable, "-c", code], env=environment, cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr


# --- workdirs ---------------------------------------------------------------------------------------------------------


def test_the_commands_go_there_and_back(tmp_path):
    def convert(*flags: str) -> str:
        result = run_command("gptjax.convert", *flags)
        assert result.returncode == 0, result.stderr
        return result.stdout

    convert(f"--from_hf={FIXTURES}/gpt2", f"--workdir={tmp_path}/run", "--tokenizer=bytes", "--dtype=bfloat16")
    assert c.read_config(tmp_path / "run").model.dtype == "bfloat16"
    trained = load_model(tmp_path / "run", dtype="float32")
    assert (trained.step, trained.tokenizer.vocab_size) == (0, 257)
    assert_close_to_fixture(trained.model, trained.params, "gpt2")
    convert(f"--workdir={tmp_path}/run", f"--to_hf={tmp_path}/out")
    assert contents(tmp_path / "out") == contents(FIXTURES / "gpt2")
    assert json.loads((tmp_path / "out" / "config.json").read_text())["eos_token_id"] == 256
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "run"]


def tiny_run(directory: Path, model: GPTConfig, **fields: object) -> c.Config:
    """One step on a generated text."""
    (directory / "text.txt").write_text("the cat sat on the mat. " * 99 + "\n")
    (directory / "more.txt").write_text("the dog sat on the cat. " * 99 + "\n")
    tokens = 2 * model.context_length
    return c.Config(
        model=model,
        data=c.DataConfig(
            source=f"text:{directory}/*.txt", tokenizer="bytes", validation_fraction=0.5, cache_dir=f"{directory}/cache"
        ),
        batch=c.BatchConfig(total_tokens=tokens, tokens_per_batch=tokens),
        optimizer=c.OptimizerConfig(ema_decay=0.5),
        evaluation=c.EvaluationConfig(max_tokens=64, sample_tokens=0),
        logging=c.LoggingConfig(tensorboard=False),
        **fields,
    )


@pytest.mark.slow
def test_training_starts_from_imported_weights_but_not_in_their_workdir(tmp_path):
    import_workdir(str(FIXTURES / "gpt2"), tmp_path / "imported", tokenizer="bytes")
    model = dataclasses.replace(
        c.read_config(tmp_path / "imported").model, residual_dropout=0.0, remat="full", token_init_std=0.5
    )
    config = tiny_run(tmp_path, model, init_from=str(tmp_path / "imported"))
    with pytest.raises(UserError, match=r"imported holds imported weights.*--config\.init_from=.*another --workdir"):
        run(config, tmp_path / "imported")
    report = run(config, tmp_path / "tuned")
    assert report.step == 1
    other = dataclasses.replace(config, model=dataclasses.replace(model, activation="relu"))
    with pytest.raises(UserError, match=r"another model: model\.activation: 'gelu_tanh' -> 'relu'"):
        run(other, tmp_path / "other")
    # The average is what is exported.
    export_workdir(tmp_path / "tuned", tmp_path / "out")
    model, params = load_pretrained(tmp_path / "out")
    expected = load_model(tmp_path / "tuned").params
    jax.tree.map(np.testing.assert_array_equal, params, expected)
    assert contents(tmp_path / "out") != contents(FIXTURES / "gpt2")
    export_workdir(tmp_path / "tuned", tmp_path / "of_step", step=1)
    assert contents(tmp_path / "of_step") == contents(tmp_path / "out")
    with pytest.raises(UserError, match="there is no checkpoint 2"):
        export_workdir(tmp_path / "tuned", tmp_path / "of_none", step=2)


def test_a_model_of_chat_is_exported_with_its_tokens(tmp_path):
    config = tiny_chats.config_of("sft", tmp_path, None)
    workdir = save_weights(tmp_path / "run", settings=dataclasses.replace(config.model, vocab_size=259))
    (workdir / "config.json").write_text(c.to_json(config))
    export_workdir(workdir, tmp_path / "out")
    theirs = json.loads((tmp_path / "out" / "config.json").read_text())
    written = tokenizers.Tokenizer.from_file(str(tmp_path / "out" / "tokenizer.json"))
    assert theirs["vocab_size"] == written.get_vocab_size() == 257 + 2
    assert (written.token_to_id("<|a|>"), written.token_to_id("<|end|>")) == (257, 258)
    assert (theirs["bos_token_id"], theirs["eos_token_id"]) == (256, 258)


def with_tokens(directory: Path, names: list[str], **files: dict) -> Path:
    """The fixture gpt2 with a vocabulary whose first tokens are `names`, and with JSON files by their names."""
    shutil.copytree(FIXTURES / "gpt2", directory)
    vocabulary = {name: i for i, name in enumerate([*names, *(f"word{i}" for i in range(20))])}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token=names[0]))
    tokenizer.add_special_tokens([name for name in names if name.startswith("<")])
    tokenizer.save(str(directory / "tokenizer.json"))
    files["config"] = config_of("gpt2") | files.get("config", {})
    for name, content in files.items():
        (directory / f"{name}.json").write_text(json.dumps(content))
    return directory


GENERIC = ["<|endoftext|>", "</s>", "<a>", "stop"]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("files", "ends"),
    [
        ({}, (0,)),  # by its name
        ({"tokenizer_config": {"eos_token": "</s>"}}, (1,)),
        ({"tokenizer_config": {"eos_token": {"content": "<a>", "special": True}}}, (2,)),
        ({"tokenizer_config": {"eos_token": "<a>"}, "config": {"eos_token_id": 1}}, (1,)),
        ({"config": {"eos_token_id": 3}}, (3,)),  # no special token, as its files say
        ({"config": {"eos_token_id": 1}, "generation_config": {"eos_token_id": [2, 1, 3]}}, (1, 2, 3)),
        ({"config": {"eos_token_id": 0}, "generation_config": {"eos_token_id": 2}}, (2,)),
        ({"config": {"eos_token_id": [2, 1]}, "generation_config": {"eos_token_id": None}}, (2, 1)),
        ({"config": {"eos_token_id": 50256}}, (0,)),  # transformers' default, which this vocabulary lacks
    ],
)
def test_a_models_files_say_which_tokens_end_a_text(files, ends, tmp_path):
    source, workdir = with_tokens(tmp_path / "source", GENERIC, **files), tmp_path / "run"
    import_workdir(str(source), workdir)
    trained = load_model(workdir)
    assert trained.tokenizer.ends == ends
    assert trained.tokenizer.end_of_text == ends[0]
    # The config names the same tokenizer, which pretraining checks.
    spec = c.read_config(workdir).data.tokenizer
    kept = get_tokenizer(spec, train_documents=tuple, corpus_fingerprint="", cache_dir=tmp_path)
    assert (kept.fingerprint, kept.ends) == (trained.tokenizer.fingerprint, ends)
    export_workdir(workdir, tmp_path / "out")
    theirs = json.loads((tmp_path / "out" / "config.json").read_text())
    assert theirs["eos_token_id"] == (ends[0] if len(ends) == 1 else list(ends))
    assert json.loads((tmp_path / "out" / "tokenizer_config.json").read_text())["eos_token"] == GENERIC[ends[0]]
    import_workdir(str(tmp_path / "out"), tmp_path / "again")
    assert load_model(tmp_path / "again").tokenizer.ends == ends


@pytest.mark.parametrize("wrong", ["1", [1, "2"], True, {"id": 1}])
def test_ends_that_are_no_ids(wrong, tmp_path):
    source = with_tokens(tmp_path / "source", GENERIC, generation_config={"eos_token_id": wrong})
    with pytest.raises(UserError, match=r"eos_token_id=.* is neither a token id nor a list of them"):
        import_workdir(str(source), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def small(**fields: object) -> GPTConfig:
    return GPTConfig(vocab_size=17, context_length=5, num_layers=2, num_heads=2, embed_dim=8, dtype="float32", **fields)


@pytest.mark.parametrize(
    ("fields", "model_type"),
    [
        ({}, "gpt2"),
        ({"scale_attention": False, "activation": "silu", "ffw_dim": 12}, "gpt2"),
        ({"attention_pattern": ("dense", "dense")}, "gpt2"),
        ({"norm_position": "post", "activation": "relu"}, "openai-gpt"),
        ({"scale_attention": False, "qkv_bias": False}, "gpt_neo"),
        ({"scale_attention": False, "qkv_bias": False, "attention_pattern": ("banded",), "band_width": 3}, "gpt_neo"),
    ],
)
def test_our_models_are_of_the_family_that_can_express_them(fields, model_type, tmp_path):
    model = GPT(small(**fields))
    tokens_BT = np.arange(5)[None]
    rng = np.random.default_rng(0)
    params = jax.tree.map(
        lambda leaf: rng.standard_normal(leaf.shape, np.float32), abstract_params(model, make_mesh(c.MeshConfig()))
    )
    save_pretrained(model.config, params, tmp_path / "out")
    assert json.loads((tmp_path / "out" / "config.json").read_text())["model_type"] == model_type
    loaded, loaded_params = load_pretrained(tmp_path / "out")
    np.testing.assert_array_equal(compute(loaded, loaded_params, tokens_BT), compute(model, params, tokens_BT))


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"attention_pattern": ("dense", "banded")}, "model.scale_attention=True, model.qkv_bias=True"),
        ({"attention_pattern": ("banded",), "scale_attention": False}, "model.qkv_bias=True"),
        ({"norm_position": "post", "activation": "gelu_exact"}, "model.activation='gelu_exact'"),
        ({"norm_position": "post", "ffw_dim": 12}, "model.ffw_dim=12"),
        ({"norm_position": "post", "attention_pattern": ("banded",)}, r"model.attention_pattern=\('banded',\)"),
        ({"norm_position": "post", "scale_attention": False}, "model.scale_attention=False"),
    ],
)
def test_models_that_no_family_expresses(fields, words, tmp_path):
    with pytest.raises(UserError, match=f"no Hugging Face family has {words} with"):
        save_pretrained(small(**fields), {}, tmp_path / "out")
    assert not list(tmp_path.iterdir())


# --- the Hub ----------------------------------------------------------------------------------------------------------


def test_a_name_on_the_hub_is_downloaded(tmp_path, monkeypatch):
    hub = pytest.importorskip("huggingface_hub")
    asked = []

    def download(name: str, allow_patterns: list[str]) -> str:
        asked.append((name, allow_patterns))
        return str(shutil.copytree(FIXTURES / "gpt2", tmp_path / "snapshot"))

    monkeypatch.setattr(hub, "snapshot_download", download)
    import_workdir("owner/gpt2", tmp_path / "run", tokenizer="bytes")
    (call,) = asked
    assert call[0] == "owner/gpt2"
    assert not any("bin" in pattern for pattern in call[1])
    assert (tmp_path / "run" / "config.json").exists()


def test_without_a_network(tmp_path, monkeypatch):
    hub = pytest.importorskip("huggingface_hub")

    def download(name: str, allow_patterns: list[str]) -> str:
        raise ConnectionError("no route to host\nand more lines")

    monkeypatch.setattr(hub, "snapshot_download", download)
    with pytest.raises(
        UserError, match=r"there is no directory owner/gpt2, and .*ConnectionError: no route to host\)$"
    ):
        import_workdir("owner/gpt2", tmp_path / "run")
    assert not list(tmp_path.iterdir())
