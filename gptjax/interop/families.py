"""The Hugging Face model families that GPTConfig can express: their config.json and the names of their tensors.

Each family has one table of config fields and one of tensor names, used for import and export.
"""

import dataclasses
import json
import math
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from gptjax.config import BatchConfig, Config, GPTConfig, UserError, check
from gptjax.files import read_json

Names = dict[str, tuple[str, ...]]

# Path of a gptjax parameter, with `layers/` for `layers/block_i/`: Hugging Face tensor of layer {i}; three tensors
# where queries, keys and values are separate. Without the optional prefix "transformer.", which the head lacks.
_CONV1D_LAYER = {
    "layers/attention_norm/scale": ("h.{i}.ln_1.weight",),
    "layers/attention_norm/bias": ("h.{i}.ln_1.bias",),
    "layers/attention/qkv/kernel": ("h.{i}.attn.c_attn.weight",),
    "layers/attention/qkv/bias": ("h.{i}.attn.c_attn.bias",),
    "layers/attention/out/kernel": ("h.{i}.attn.c_proj.weight",),
    "layers/attention/out/bias": ("h.{i}.attn.c_proj.bias",),
    "layers/mlp_norm/scale": ("h.{i}.ln_2.weight",),
    "layers/mlp_norm/bias": ("h.{i}.ln_2.bias",),
    "layers/mlp/up/kernel": ("h.{i}.mlp.c_fc.weight",),
    "layers/mlp/up/bias": ("h.{i}.mlp.c_fc.bias",),
    "layers/mlp/down/kernel": ("h.{i}.mlp.c_proj.weight",),
    "layers/mlp/down/bias": ("h.{i}.mlp.c_proj.bias",),
}
_OPENAI_GPT_NAMES: Names = {
    "token_embedding/embedding": ("tokens_embed.weight",),
    "position_embedding/embedding": ("positions_embed.weight",),
    **_CONV1D_LAYER,
}
_GPT2_NAMES: Names = {
    "token_embedding/embedding": ("wte.weight",),
    "position_embedding/embedding": ("wpe.weight",),
    **_CONV1D_LAYER,
    "final_norm/scale": ("ln_f.weight",),
    "final_norm/bias": ("ln_f.bias",),
}
_GPT_NEO_NAMES: Names = {
    **{path: names for path, names in _GPT2_NAMES.items() if "/attention/" not in path},
    "layers/attention/qkv/kernel": tuple(f"h.{{i}}.attn.attention.{role}_proj.weight" for role in "qkv"),
    "layers/attention/out/kernel": ("h.{i}.attn.attention.out_proj.weight",),
    "layers/attention/out/bias": ("h.{i}.attn.attention.out_proj.bias",),
}

PREFIX = "transformer."
HEAD = "lm_head.weight"  # tied to the token embedding
# Causal masks and positions that older versions of transformers saved with the weights.
BUFFERS = re.compile(r"h\.\d+\.attn\.(attention\.)?(bias|masked_bias)|position_ids")

# Field of GPTConfig: (key of config.json, transformers' default, another name that transformers reads it from).
_GPT2_FIELDS = {
    "vocab_size": ("vocab_size", 50257, None),
    "context_length": ("n_positions", 1024, "max_position_embeddings"),
    "num_layers": ("n_layer", 12, "num_hidden_layers"),
    "num_heads": ("n_head", 12, "num_attention_heads"),
    "embed_dim": ("n_embd", 768, "hidden_size"),
    "ffw_dim": ("n_inner", None, None),
    "norm_eps": ("layer_norm_epsilon", 1e-5, None),
    "activation": ("activation_function", "gelu_new", None),
    "scale_attention": ("scale_attn_weights", True, None),
    "embedding_dropout": ("embd_pdrop", 0.1, None),
    "attention_dropout": ("attn_pdrop", 0.1, None),
    "residual_dropout": ("resid_pdrop", 0.1, None),
}
_OPENAI_GPT_FIELDS = {
    **{field: key for field, key in _GPT2_FIELDS.items() if field not in ("ffw_dim", "scale_attention")},
    "vocab_size": ("vocab_size", 40478, None),
    "context_length": ("n_positions", 512, "max_position_embeddings"),
    "activation": ("afn", "gelu", None),
}
_GPT_NEO_FIELDS = {
    "vocab_size": ("vocab_size", 50257, None),
    "context_length": ("max_position_embeddings", 2048, None),
    "num_layers": ("num_layers", 24, "num_hidden_layers"),
    "num_heads": ("num_heads", 16, "num_attention_heads"),
    "embed_dim": ("hidden_size", 2048, None),
    "ffw_dim": ("intermediate_size", None, None),
    "norm_eps": ("layer_norm_epsilon", 1e-5, None),
    "activation": ("activation_function", "gelu_new", None),
    "band_width": ("window_size", 256, None),
    "embedding_dropout": ("embed_dropout", 0.0, None),
    "attention_dropout": ("attention_dropout", 0.0, None),
    "residual_dropout": ("resid_dropout", 0.0, None),
}

# Activation in transformers: in gptjax. Export uses the first match.
_ACTIVATIONS = {
    "gelu_new": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_fast": "gelu_tanh",
    "gelu": "gelu_exact",
    "relu": "relu",
    "silu": "silu",
    "swish": "silu",
}
_OPENAI_GPT_ACTIVATIONS = {"gelu": "gelu_tanh", "relu": "relu", "silu": "silu", "swish": "silu"}

_ATTENTION = {"global": "dense", "local": "banded"}  # GPT-Neo's names of the kinds of layers

# Keys of a config.json that change the model's function: the only value that GPTConfig can express.
_REQUIRED = {
    "tie_word_embeddings": True,
    "scale_attn_by_inverse_layer_idx": False,
    "add_cross_attention": False,
    "pruned_heads": {},
    "quantization_config": None,
}


@dataclasses.dataclass(frozen=True)
class Family:
    """A model type of transformers.

    Attributes:
      model_type: `model_type` of config.json.
      architecture: class of transformers.
      names: names of the tensors, by path of the gptjax parameter.
      fields: keys of config.json, by field of GPTConfig.
      activations: activations, by name in transformers.
      fixed: fields of GPTConfig that are the same for all models of the family.
      transposed: whether matrices are stored as (outputs, inputs); those of gptjax are (inputs, outputs).
    """

    model_type: str
    architecture: str
    names: Names
    fields: dict[str, tuple[str, Any, str | None]]
    activations: dict[str, str]
    fixed: dict[str, Any]
    transposed: bool = False


FAMILIES = {
    family.model_type: family
    for family in (
        Family(
            "openai-gpt",
            "OpenAIGPTLMHeadModel",
            _OPENAI_GPT_NAMES,
            _OPENAI_GPT_FIELDS,
            _OPENAI_GPT_ACTIVATIONS,
            {"norm_position": "post", "attention_pattern": ("dense",), "scale_attention": True, "qkv_bias": True},
        ),
        Family(
            "gpt2",
            "GPT2LMHeadModel",
            _GPT2_NAMES,
            _GPT2_FIELDS,
            _ACTIVATIONS,
            {"norm_position": "pre", "attention_pattern": ("dense",), "qkv_bias": True},
        ),
        Family(
            "gpt_neo",
            "GPTNeoForCausalLM",
            _GPT_NEO_NAMES,
            _GPT_NEO_FIELDS,
            _ACTIVATIONS,
            {"norm_position": "pre", "scale_attention": False, "qkv_bias": False},
            transposed=True,
        ),
    )
}


# --- config.json ------------------------------------------------------------------------------------------------------


def read_config(directory: Path) -> tuple[Family, GPTConfig]:
    """Reads the family and the model config of `directory`/config.json; dtypes are float32.

    Raises:
      UserError: the file is missing or damaged, or describes a model that GPTConfig cannot express.
    """
    path = directory / "config.json"
    try:
        theirs = read_json(path)
    except FileNotFoundError:
        raise UserError(f"{directory} is not a Hugging Face model: it has no config.json") from None
    except (OSError, ValueError) as error:
        raise UserError(f"cannot read {path}: {error}") from None
    if not isinstance(theirs, dict):
        raise UserError(f"{path} is not a JSON object")
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
        model = GPTConfig(**_our_fields(family, theirs), dtype="float32", param_dtype="float32")
        check(Config(model=model, batch=BatchConfig(epochs=1.0, tokens_per_batch=model.context_length)))
    except UserError as error:
        raise UserError(f"{path}: {error}") from None
    return family, model


def _our_fields(family: Family, theirs: dict[str, Any]) -> dict[str, Any]:
    fields = dict(family.fixed)
    for field, (key, default, alias) in family.fields.items():
        name = alias if alias in theirs and key not in theirs else key
        value = theirs.get(name, default)
        # n_inner and intermediate_size may be null; an int is accepted for a float.
        kinds = (float, int) if isinstance(default, float) else (int if default is None else type(default),)
        if not isinstance(value, kinds) or (isinstance(value, bool) and bool not in kinds):
            if not (value is None and default is None):
                raise UserError(f"{name}={json.dumps(value)} is not of type {kinds[0].__name__}")
        elif isinstance(default, float):
            value = float(value)
        if field == "activation":
            if value not in family.activations:
                raise UserError(f"{name}={value!r} is not supported: one of {', '.join(family.activations)}")
            value = family.activations[value]
        fields[field] = value
    if family.model_type == "gpt_neo":
        fields["attention_pattern"] = _attention_pattern(theirs, fields["num_layers"])
    return fields


def _attention_pattern(theirs: dict[str, Any], num_layers: int) -> tuple[str, ...]:
    """Converts GPT-Neo's attention_types, [[kinds], repetitions] pairs, or attention_layers to a repeated pattern."""
    layers = theirs.get("attention_layers")
    try:
        if (types := theirs.get("attention_types")) is not None:
            expanded = [kind for kinds, repeats in types for _ in range(repeats) for kind in kinds]
            if layers not in (None, expanded):
                raise UserError("attention_layers and attention_types contradict each other")
            layers = expanded
        elif layers is None:
            layers = ["global", "local"] * 12  # transformers' default
        pattern = tuple(_ATTENTION[kind] for kind in layers)
    except (TypeError, ValueError, KeyError) as error:
        raise UserError(f"attention_types or attention_layers is not a list of global and local: {error!r}") from None
    if len(pattern) != num_layers:
        raise UserError(f"attention_types is for {len(pattern)} layers, but num_layers={num_layers}")
    period = next(p for p in range(1, num_layers + 1) if pattern == pattern[:p] * (num_layers // p))
    return pattern[:period]


def family_of(model: GPTConfig) -> Family:
    """Returns the family that can express `model`; UserError with the offending fields if there is none."""
    plain = all(kind == "dense" for kind in model.attention_pattern)
    if model.norm_position == "post":
        family = FAMILIES["openai-gpt"]
    elif plain and model.qkv_bias:
        family = FAMILIES["gpt2"]
    else:
        family = FAMILIES["gpt_neo"]
    wrong = [
        f"{field}={value!r}"
        for field, only in family.fixed.items()
        if (value := getattr(model, field)) != only and not (field == "attention_pattern" and plain)
    ]
    if model.activation not in family.activations.values():
        wrong.append(f"activation={model.activation!r}")
    if "ffw_dim" not in family.fields and model.feed_forward_dim != 4 * model.embed_dim:
        wrong.append(f"ffw_dim={model.ffw_dim}")
    if model.adapter_dim is not None:
        wrong.append(f"adapter_dim={model.adapter_dim}")
    if wrong:
        raise UserError(
            f"no Hugging Face family has model.{', model.'.join(wrong)} with norm_position={model.norm_position!r} and "
            f"attention_pattern={model.attention_pattern}: {family.model_type}, the nearest, cannot express it"
        )
    return family


def to_config_json(family: Family, model: GPTConfig, ends: tuple[int, ...]) -> dict[str, Any]:
    """Returns the config.json of a resolved `model`; `ends`: ids of the tokens that end a text, end-of-text first."""
    theirs: dict[str, Any] = {"architectures": [family.architecture], "model_type": family.model_type}
    for field, (key, _, _) in family.fields.items():
        value = getattr(model, field)
        if field == "activation":
            value = next(name for name, ours in family.activations.items() if ours == value)
        theirs[key] = value
    if family.model_type == "gpt_neo":
        kinds = {ours: name for name, ours in _ATTENTION.items()}
        pattern = [kinds[kind] for kind in model.attention_pattern]
        theirs["attention_types"] = [[pattern, model.num_layers // len(pattern)]]
        theirs["attention_layers"] = pattern * (model.num_layers // len(pattern))
    return theirs | {
        "initializer_range": model.kernel_init_std,
        "tie_word_embeddings": True,
        "bos_token_id": ends[0] if ends else None,
        "eos_token_id": list(ends) if len(ends) > 1 else ends[0] if ends else None,
        "dtype": model.param_dtype,
    }


# --- tensors ----------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Placement:
    """The slice of a gptjax parameter that corresponds to a Hugging Face tensor.

    Attributes:
      name: name of the tensor, without PREFIX.
      shape: shape of the tensor.
      path: path of the parameter.
      row: index on its leading axis, the layers; None if it has no such axis.
      part: index on its axis of queries, keys and values (the second axis of a layer), where the tensors are separate.
      view: shape of the slice.
      transposed: whether the tensor is (outputs, inputs).
    """

    name: str
    shape: tuple[int, ...]
    path: str
    row: int | None
    part: int | None
    view: tuple[int, ...]
    transposed: bool

    def to_ours(self, theirs: Any) -> Any:
        """Converts the tensor to an array of shape `view`, without copying."""
        return (theirs.T if self.transposed else theirs).reshape(self.view)

    def to_theirs(self, ours: Any) -> Any:
        """Converts a row of the parameter to the tensor."""
        place = ours if self.part is None else ours[:, self.part]
        return place.reshape(self.shape[::-1]).T if self.transposed else place.reshape(self.shape)


def placements(family: Family, period: int, path: str, shape: tuple[int, ...]) -> Iterator[Placement]:
    """Yields the placements of all tensors that make up the parameter of this path and shape, layer by layer.

    The parameter at `layers/block_b/...` holds the layers b, b + period, b + 2 * period, ...
    """
    block = re.match(r"layers/block_(\d+)/", path)
    names = family.names[re.sub(r"block_\d+/", "", path)]
    rows: list[int | None] = list(range(shape[0])) if block else [None]
    view = shape[1:] if block else shape
    transposed = family.transposed and path.endswith("/kernel")
    if len(names) > 1:
        view = view[:1] + view[2:]
    if path.endswith("/kernel"):  # a matrix; the gptjax parameter has separate axes for the heads
        inputs = 2 if path.endswith("attention/out/kernel") else 1
        theirs: tuple[int, ...] = (math.prod(view[:inputs]), math.prod(view[inputs:]))
        theirs = theirs[::-1] if transposed else theirs
    else:
        theirs = (math.prod(view),) if path.endswith("/bias") else view
    for row in rows:
        layer = None if block is None or row is None else row * period + int(block[1])
        for part, name in enumerate(names):
            yield Placement(
                name=name.format(i=layer),
                shape=theirs,
                path=path,
                row=row,
                part=part if len(names) > 1 else None,
                view=view,
                transposed=transposed,
            )
