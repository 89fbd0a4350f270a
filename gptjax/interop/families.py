"""The Hugging Face model families that GPTConfig can express, and the config.json of their models.

Each family has one table of keys of config.json and one of tensor names, used for import and export:
`gpt_families.py`, `llama_families.py` and `gpt_oss_family.py`.
"""

import dataclasses
import json
import re
from pathlib import Path
from typing import Any

from gptjax.config import BatchConfig, Config, GPTConfig, UserError, VisionConfig, check
from gptjax.files import read_json
from gptjax.interop import image_processors, llava_family
from gptjax.interop.family import Family, inexpressible, read_keys, write_keys
from gptjax.interop.gpt_families import GPT2, GPT_NEO, OPENAI_GPT
from gptjax.interop.gpt_oss_family import GPT_OSS
from gptjax.interop.llama_families import LLAMA, MISTRAL, QWEN2, QWEN3

FAMILIES = {family.model_type: family for family in (OPENAI_GPT, GPT2, GPT_NEO, GPT_OSS, LLAMA, MISTRAL, QWEN2, QWEN3)}

# Causal masks, positions and frequencies that older versions of transformers saved with the weights.
BUFFERS = re.compile(
    r"h\.\d+\.attn\.(attention\.)?(bias|masked_bias)|position_ids|layers\.\d+\.self_attn\.rotary_emb\.inv_freq"
)

# Keys of a config.json that change the model's function: the only value that GPTConfig can express.
_REQUIRED = {
    "scale_attn_by_inverse_layer_idx": False,
    "add_cross_attention": False,
    "pruned_heads": {},
    "is_causal": True,
}


def read_config(directory: Path) -> tuple[Family, GPTConfig]:
    """Reads the family and the model config of `directory`/config.json; dtypes are float32.

    Raises:
      UserError: the file is missing or damaged, or describes a model that GPTConfig cannot express.
    """
    path, whole = directory / "config.json", read_json_config(directory)
    theirs = text_config(whole)
    model_type = theirs.get("model_type")
    if not isinstance(model_type, str) or model_type not in FAMILIES:
        raise UserError(f"{path}: model_type={model_type!r} is not supported: one of {', '.join(FAMILIES)}")
    family = FAMILIES[model_type]
    for key, value in _REQUIRED.items():
        if key in theirs and theirs[key] not in (value, None):
            raise UserError(f"{path}: {key}={json.dumps(theirs[key])} is not supported: only {json.dumps(value)}")
    if "AutoModelForCausalLM" in (theirs.get("auto_map") or {}):
        raise UserError(f"{path}: auto_map names custom model code, which gptjax cannot run")
    try:
        quantisation_of(family, theirs)
        model = GPTConfig(**read_keys(family, theirs), dtype="float32", param_dtype="float32")
        if theirs is not whole:
            model = dataclasses.replace(model, vision=llava_family.vision_fields(whole))
        check(Config(model=model, batch=BatchConfig(epochs=1.0, tokens_per_batch=model.context_length)))
    except UserError as error:
        raise UserError(f"{path}: {error}") from None
    if model.reads_images:
        model = dataclasses.replace(model, vision=image_processors.with_processor(directory, model.vision))
    return family, model


def text_config(theirs: dict[str, Any]) -> dict[str, Any]:
    """The config of the text model: the config.json itself, or a part of a LLaVA's."""
    text = theirs.get("text_config") if theirs.get("model_type") == llava_family.MODEL_TYPE else theirs
    return text if isinstance(text, dict) else {}


def read_json_config(directory: Path) -> dict[str, Any]:
    """Reads the object in `directory`/config.json; UserError if the file is missing or damaged."""
    path = directory / "config.json"
    try:
        theirs = read_json(path)
    except FileNotFoundError:
        raise UserError(f"{directory} is not a Hugging Face model: it has no config.json") from None
    except (OSError, ValueError) as error:
        raise UserError(f"cannot read {path}: {error}") from None
    if not isinstance(theirs, dict):
        raise UserError(f"{path} is not a JSON object")
    return theirs


def quantisation_of(family: Family, theirs: dict[str, Any]) -> str | None:
    """The quant_method of a config.json; None if the weights are not quantised.

    Raises:
      UserError: weights of this quant_method cannot be decoded.
    """
    if (settings := theirs.get("quantization_config")) is None:
        return None
    method = settings.get("quant_method") if isinstance(settings, dict) else None
    if method not in family.quantisations:
        only = " or ".join(["null", *(f"quant_method={json.dumps(name)}" for name in family.quantisations)])
        raise UserError(f"quantization_config={json.dumps(settings)} is not supported: only {only}")
    return method


def family_of(model: GPTConfig) -> Family:
    """Returns the family that can express `model`; UserError with the offending fields if there is none."""
    if model.positions == "rotary":
        candidates = [LLAMA, QWEN2, QWEN3, MISTRAL] if model.num_experts is None else [GPT_OSS]
    elif model.norm_position == "post":
        candidates = [OPENAI_GPT]
    elif model.qkv_bias and "banded" not in model.attention_pattern:
        candidates = [GPT2]
    else:
        candidates = [GPT_NEO]
    family = min(candidates, key=lambda family: len(inexpressible(family, model)))
    if wrong := inexpressible(family, dataclasses.replace(model, vision=VisionConfig())):
        raise UserError(
            f"no Hugging Face family has model.{', model.'.join(wrong)} with positions={model.positions!r}, "
            f"norm_position={model.norm_position!r} and attention_pattern={model.attention_pattern}: "
            f"{family.model_type}, the nearest, cannot express it"
        )
    return family


def to_config_json(family: Family, model: GPTConfig, ends: tuple[int, ...]) -> dict[str, Any]:
    """Returns the config.json of a resolved `model`; `ends`: ids of the tokens that end a text, end-of-text first."""
    text = (
        {"architectures": [family.architecture], "model_type": family.model_type}
        | write_keys(family, model)
        | {
            "initializer_range": model.kernel_init_std,
            "bos_token_id": ends[0] if ends else None,
            "eos_token_id": list(ends) if len(ends) > 1 else ends[0] if ends else None,
            "dtype": model.param_dtype,
        }
    )
    return llava_family.vision_keys(model, text) if model.reads_images else text
