"""LoRA of the families with rotary positions in PEFT's files, on experts and the router of gpt-oss too."""

import dataclasses
import json
import re
from pathlib import Path

import jax
import numpy as np
import pytest

from gptjax.config import PeftConfig, UserError
from gptjax.interop.huggingface import load_pretrained, save_pretrained
from gptjax.interop.peft_files import load_lora, save_lora
from gptjax.interop.safetensors_files import SINGLE_FILE, Declared, read, read_header
from gptjax.interop.safetensors_files import write as write_tensors
from gptjax.models import peft
from tests.interop.rotary_models import MODELS, tensors, text_tokens, write
from tests.interop.test_peft_files import draw, our_logits
from tests.interop.write_fixtures import logits

pytestmark = pytest.mark.slow  # a model of every family

LORA = PeftConfig(method="lora", targets=("layers/.*/kernel",), rank=3, alpha=6.0)
ATTENTION = "layers/.*/attention/.*/kernel"
# What is adapted: all kernels; one of two that share a parameter; one block of the pattern, so that layers are named.
TARGETS: dict[str, tuple[str, ...]] = {
    "all": LORA.targets,
    "experts": ("layers/.*/experts/.*/kernel",),
    "up": ("layers/.*/experts/up/kernel", ATTENTION),
    "router": ("layers/.*/router/kernel",),
    "block": ("layers/block_0/mlp/experts/(gate|down|up)/kernel", "layers/block_1/mlp/experts/(gate|down)/kernel"),
}
CASES = [("gpt_oss", name) for name in TARGETS] + [(name, "all") for name in ("llama", "mistral", "qwen2", "qwen3")]


@pytest.fixture
def exported(request, tmp_path):
    """A model and its parameters, a config of LoRA and its leaves, and the directories "base" and "lora"."""
    family, targets = request.param
    gpt, params = load_pretrained(write(tmp_path / "source", MODELS[family], tensors(MODELS[family])))
    config = dataclasses.replace(LORA, targets=TARGETS[targets])
    leaves = draw(config, gpt.config)
    save_pretrained(gpt.config, params, tmp_path / "base")
    save_lora(tmp_path / "lora", config, gpt.config, leaves, base=str(tmp_path / "base"))
    return gpt, peft.join(params, leaves), config, tmp_path


def their_delta(name: str, files: Path) -> np.ndarray:
    """What PEFT adds to the tensor `name` of transformers, by the definition of its LoraLayer and its ParamWrapper."""
    settings = json.loads((files / "adapter_config.json").read_text())
    found = {key: read(tensor) for key, tensor in read_header(files / "adapter_model.safetensors").items()}

    def matches(ends: list[str]) -> list[str]:
        return [end for end in ends if re.fullmatch(rf"(.*\.)?({end})", name)]

    module = name.removesuffix(".weight")
    if parameters := matches(settings.get("target_parameters", [])):
        module, _, parameter = name.rpartition(".")
        if parameter == "gate_up_proj" and any("down_proj" in other for other in settings["target_parameters"]):
            module += ".base_layer"
    elif not [end for end in settings["target_modules"] if f".{module}".endswith(f".{end}")]:
        return np.zeros(())
    a, b = (found.pop(f"base_model.model.{module}.lora_{matrix}.weight") for matrix in "AB")
    rank, alpha = (
        next((value for key, value in settings.get(pattern, {}).items() if matches([key])), settings[default])
        for pattern, default in (("rank_pattern", "r"), ("alpha_pattern", "lora_alpha"))
    )
    experts = len(a) // rank
    if not parameters or experts == 1:
        return alpha / rank * (b @ a)
    a_EAD, b_FAE = a.reshape(experts, rank, -1), b.reshape(len(b), rank, experts)
    return alpha / rank * np.einsum("FAE,EAD->EDF", b_FAE, a_EAD)


@pytest.mark.parametrize(
    "exported", [*(("gpt_oss", name) for name in ("all", "up", "block")), ("qwen3", "all")], ids="-".join, indirect=True
)
def test_their_sums_are_our_merged_weights(exported):
    gpt, both, config, directory = exported
    save_pretrained(gpt.config, jax.tree.map(np.asarray, peft.merge(config, both)), directory / "merged")
    base, merged = (read_header(directory / name / "model.safetensors") for name in ("base", "merged"))
    changed = 0
    for name in base:
        expected = read(merged[name]) - read(base[name])
        np.testing.assert_allclose(their_delta(name, directory / "lora") + 0 * expected, expected, atol=1e-5)
        changed += bool(np.abs(expected).max() > 0.1)
    assert changed >= gpt.config.num_layers


@pytest.mark.parametrize("exported", [("gpt_oss", "all")], indirect=True)
def test_the_files_name_parameters(exported):
    directory = exported[-1] / "lora"
    settings = json.loads((directory / "adapter_config.json").read_text())
    assert settings["target_modules"] == [f"self_attn.{role}_proj" for role in "kvoq"]
    experts = "mlp.experts."
    assert settings["target_parameters"] == [f"{experts}down_proj", f"{experts}gate_up_proj", "mlp.router.weight"]
    assert settings["rank_pattern"] == {f"{experts}gate_up_proj": 6}
    assert settings["alpha_pattern"] == {f"{experts}gate_up_proj": 12}
    shapes = {name: tensor.shape for name, tensor in read_header(directory / "adapter_model.safetensors").items()}
    prefix = "base_model.model.model.layers.3.mlp."
    assert shapes[f"{prefix}experts.base_layer.lora_A.weight"] == (5 * 6, 24)
    assert shapes[f"{prefix}experts.base_layer.lora_B.weight"] == (2 * 21, 6 * 5)
    assert shapes[f"{prefix}experts.lora_A.weight"] == (5 * 3, 21)
    assert shapes[f"{prefix}router.lora_B.weight"] == (5, 3)


@pytest.mark.parametrize("exported", CASES, ids="-".join, indirect=True)
def test_what_is_read_back(exported):
    gpt, both, config, directory = exported
    read_config, leaves = load_lora(directory / "lora", gpt.config)
    expected = {path: leaf for path, leaf in peft.flatten(both).items() if path.endswith(peft.LORA)}
    assert (read_config.rank, read_config.alpha) == (config.rank, config.alpha)
    found = peft.flatten(leaves)
    for path in found.keys() - expected.keys():  # of a kernel that shares its parameter with one that is adapted
        assert path.endswith("lora_a") or not found[path].any()
    jax.tree.map(np.testing.assert_array_equal, {path: found[path] for path in expected}, expected)


@pytest.mark.parametrize("exported", [("gpt_oss", "all")], indirect=True)
def test_adapters_with_one_lora_a_for_both_halves_are_read(exported):
    """As PEFT itself makes them: of one rank, with values for the gate and the other projection throughout."""
    gpt, _, _, directory = exported
    files = directory / "theirs"
    files.mkdir()
    settings = json.loads((directory / "lora" / "adapter_config.json").read_text())
    settings |= {"rank_pattern": {"experts.gate_up_proj": 2}, "alpha_pattern": {"experts.gate_up_proj": 8}}
    (files / "adapter_config.json").write_text(json.dumps(settings))
    random, arrays = np.random.default_rng(0), {}
    for name, tensor in read_header(directory / "lora" / "adapter_model.safetensors").items():
        rank = 2 if "base_layer" in name else 3  # that of the file is 6 there
        shape = [size // 6 * rank if "base_layer" in name and size % 30 == 0 else size for size in tensor.shape]
        arrays[name] = random.normal(size=shape).astype(np.float32)
    declared = [Declared(name, "F32", array.shape) for name, array in arrays.items()]
    write_tensors(files, declared, arrays.values())
    (files / SINGLE_FILE).rename(files / "adapter_model.safetensors")
    read_config, leaves = load_lora(files, gpt.config)
    base = read_header(directory / "base" / "model.safetensors")
    params = load_pretrained(directory / "base")[1]
    merged = jax.tree.map(np.asarray, peft.merge(read_config, peft.join(params, leaves)))
    save_pretrained(gpt.config, merged, directory / "merged")
    for name, tensor in read_header(directory / "merged" / "model.safetensors").items():
        expected = read(base[name]) + their_delta(name, files)
        np.testing.assert_allclose(read(tensor), expected, atol=2e-4, err_msg=name)


@pytest.mark.parametrize("exported", [("gpt_oss", "router")], indirect=True)
def test_parameters_that_are_not_named_are_refused(exported):
    directory = exported[-1] / "lora"
    settings = json.loads((directory / "adapter_config.json").read_text())
    for names, message in ((["mlp.experts"], "target_parameters does not name it"), (["(a+)+"], "plain names")):
        (directory / "adapter_config.json").write_text(json.dumps(settings | {"target_parameters": names}))
        with pytest.raises(UserError, match=message):
            load_lora(directory, exported[0].config)


@pytest.mark.parametrize("exported", [("gpt_oss", "router")], indirect=True)
def test_dropout_of_a_parameter_is_refused(exported):
    gpt, both, config, directory = exported
    config = dataclasses.replace(config, dropout=0.1)
    leaves = peft.unflatten({path: leaf for path, leaf in peft.flatten(both).items() if path.endswith(peft.LORA)})
    with pytest.raises(UserError, match=r"peft.dropout=0.1 applies to .*/router/.*, for which PEFT has no dropout"):
        save_lora(directory / "new", config, gpt.config, leaves)
    assert not (directory / "new").exists()


# PEFT compares the patterns of ranks with modules only, and warns that it ignores those of parameters, which it reads.
@pytest.mark.filterwarnings("ignore:.*_pattern keys did not match any targeted module:RuntimeWarning")
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
@pytest.mark.parametrize("exported", CASES, ids="-".join, indirect=True)
def test_peft_computes_the_same(exported):
    pytest.importorskip("torch")
    peft_library = pytest.importorskip("peft")
    import transformers

    gpt, both, config, directory = exported
    settings = {"experts_implementation": "eager", "attn_implementation": "eager", "dtype": "float32"}
    base = transformers.AutoModelForCausalLM.from_pretrained(directory / "base", **settings).eval()
    family = next(name for name in MODELS if MODELS[name]["model_type"] == base.config.model_type)
    tokens_BT = text_tokens(MODELS[family])
    expected_BTV = our_logits(gpt, config, both, tokens_BT)
    assert np.abs(logits(base, tokens_BT) - expected_BTV).max() > 0.1
    adapted = peft_library.PeftModel.from_pretrained(base, directory / "lora").eval()
    np.testing.assert_allclose(logits(adapted, tokens_BT), expected_BTV, atol=1e-4, rtol=0)
    merged = adapted.merge_and_unload().eval()
    np.testing.assert_allclose(logits(merged, tokens_BT), expected_BTV, atol=1e-4, rtol=0)
