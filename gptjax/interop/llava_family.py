"""LLaVA-style models of Hugging Face: a CLIP or SigLIP vision tower, a projector, and a text model of any family.

`vision_fields` and `vision_keys` convert the config, `entries` is the table of the tensors of tower and projector. The
tensors of the text model have the names of its own family behind `TEXT_PREFIX`.
"""

from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from gptjax.config import GPTConfig, UserError, VisionConfig
from gptjax.interop.family import HEAD, Json

MODEL_TYPE, ARCHITECTURE = "llava", "LlavaForConditionalGeneration"
TEXT_PREFIXES = ("language_model.model.", "language_model.")
TOWER, PROJECTOR = "vision_tower.", "multi_modal_projector."
TOWERS = {"clip_vision_model": True, "siglip_vision_model": False}  # whether there is a class token
_ACTIVATIONS = {"quick_gelu": "quick_gelu", "gelu_pytorch_tanh": "gelu_tanh", "gelu": "gelu_exact"}
# SigLIP's processor; CLIP's are the defaults of VisionConfig.
_SIGLIP = {"pixel_mean": (0.5,) * 3, "pixel_std": (0.5,) * 3, "resize": "stretch"}
# Defaults of transformers where config.json lacks a key, CLIP's first.
_DEFAULTS: dict[str, tuple[Any, Any]] = {
    "hidden_size": (768, 768),
    "intermediate_size": (3072, 3072),
    "num_hidden_layers": (12, 12),
    "num_attention_heads": (12, 12),
    "image_size": (224, 224),
    "patch_size": (32, 16),
    "num_channels": (3, 3),
    "hidden_act": ("quick_gelu", "gelu_pytorch_tanh"),
    "layer_norm_eps": (1e-5, 1e-6),
}


def vision_fields(theirs: Json) -> VisionConfig:
    """The images of a LLaVA's config.json.

    Raises:
      UserError: a value that VisionConfig cannot express.
    """
    tower = theirs.get("vision_config") or {}
    kind = tower.get("model_type", "clip_vision_model")
    if kind not in TOWERS:
        raise UserError(f"vision_config: model_type={kind!r} is not supported: one of {', '.join(TOWERS)}")
    is_clip = TOWERS[kind]
    given = {key: tower.get(key, defaults[0 if is_clip else 1]) for key, defaults in _DEFAULTS.items()}
    strategy, layer = theirs.get("vision_feature_select_strategy", "default"), theirs.get("vision_feature_layer", -2)
    wrong = {
        "vision_config.num_channels": (given["num_channels"], given["num_channels"] == 3),
        "vision_config.hidden_act": (given["hidden_act"], given["hidden_act"] in _ACTIVATIONS),
        "vision_feature_layer": (layer, type(layer) is int and layer < 0),
        "vision_feature_select_strategy": (
            strategy,
            strategy in ("default", "full") and (is_clip or strategy == "full"),
        ),
        "projector_hidden_act": (
            theirs.get("projector_hidden_act", "gelu"),
            theirs.get("projector_hidden_act", "gelu") == "gelu",
        ),
        "multimodal_projector_bias": (
            theirs.get("multimodal_projector_bias", True),
            theirs.get("multimodal_projector_bias", True) is True,
        ),
    }
    for name, (value, is_supported) in wrong.items():
        if not is_supported:
            raise UserError(f"{name}={value!r} is not supported")
    token = theirs.get("image_token_index", theirs.get("image_token_id"))
    if type(token) is not int:
        raise UserError(f"image_token_index={token!r} is not an integer")
    return VisionConfig(
        encoder="vit",
        image_size=given["image_size"],
        patch_size=given["patch_size"],
        num_layers=given["num_hidden_layers"],
        num_heads=given["num_attention_heads"],
        embed_dim=given["hidden_size"],
        ffw_dim=given["intermediate_size"],
        activation=_ACTIVATIONS[given["hidden_act"]],  # type: ignore[arg-type]
        norm_eps=given["layer_norm_eps"],
        patch_bias=not is_clip,
        class_token=is_clip,
        embedding_norm=is_clip,
        read_layer=layer,
        keep_class_token=is_clip and strategy == "full",
        image_token=token,
        **({} if is_clip else _SIGLIP),  # type: ignore[arg-type]
    )


def vision_keys(model: GPTConfig, text: Json) -> Json:
    """The config.json of a LLaVA with the text model of config.json `text`.

    Raises:
      UserError: a field of model.vision that LLaVA cannot express.
    """
    vision = model.vision
    kind = "clip_vision_model" if vision.class_token else "siglip_vision_model"
    expressible = {
        "encoder": vision.encoder == "vit",
        "projector": vision.projector == "mlp",
        "final_norm": not vision.final_norm,
        "patch_bias": vision.patch_bias != vision.class_token,
        "embedding_norm": vision.embedding_norm == vision.class_token,
    }
    if wrong := [f"model.vision.{name}={getattr(vision, name)!r}" for name, can in expressible.items() if not can]:
        raise UserError(f"LLaVA of transformers has no {', '.join(wrong)} with class_token={vision.class_token}")
    activation = next(theirs for theirs, ours in _ACTIVATIONS.items() if ours == vision.activation)
    return {
        "architectures": [ARCHITECTURE],
        "model_type": MODEL_TYPE,
        "text_config": text,
        "vision_config": {
            "model_type": kind,
            "hidden_size": vision.embed_dim,
            "intermediate_size": 4 * vision.embed_dim if vision.ffw_dim is None else vision.ffw_dim,
            "num_hidden_layers": vision.num_layers,
            "num_attention_heads": vision.num_heads,
            "image_size": vision.image_size,
            "patch_size": vision.patch_size,
            "hidden_act": activation,
            "layer_norm_eps": vision.norm_eps,
            **({} if vision.class_token else {"vision_use_head": False}),
        },
        "image_token_index": vision.image_token,
        "image_seq_length": vision.tokens_per_image,
        "projector_hidden_act": "gelu",
        "multimodal_projector_bias": True,
        "vision_feature_layer": vision.read_layer,
        "vision_feature_select_strategy": "default" if vision.class_token and not vision.keep_class_token else "full",
        "tie_word_embeddings": bool(text.get("tie_word_embeddings")),
        "dtype": model.param_dtype,
    }


Array = npt.NDArray[Any]


class Entry(NamedTuple):
    """A tensor of transformers, and the part of a gptjax parameter that has its values.

    Attributes:
      part: index of the part in the parameter.
    """

    name: str
    path: str
    part: tuple[Any, ...]
    to_ours: Callable[[Array], Array]
    to_theirs: Callable[[Array], Array]


def _same(array: Array) -> Array:
    return array


def _transposed(array: Array) -> Array:
    return array.T


def entries(model: GPTConfig) -> Iterator[Entry]:
    """Yields all tensors of tower and projector; the names are those of a LLaVA."""
    vision = model.vision
    patch, width = vision.patch_size, vision.embed_dim
    heads, head = vision.num_heads, width // vision.num_heads

    def plain(name: str, path: str) -> Entry:
        return Entry(name, path, (), _same, _same)

    embeddings = f"{TOWER}embeddings."
    yield Entry(
        f"{embeddings}patch_embedding.weight",
        "vision/patch_embedding/kernel",
        (),
        lambda a: a.transpose(2, 3, 1, 0).reshape(-1, width),
        lambda a: a.reshape(patch, patch, 3, width).transpose(3, 2, 0, 1),
    )
    if vision.patch_bias:
        yield plain(f"{embeddings}patch_embedding.bias", "vision/patch_embedding/bias")
    if vision.class_token:
        yield plain(f"{embeddings}class_embedding", "vision/class_token/bias")
    yield plain(f"{embeddings}position_embedding.weight", "vision/position_embedding/embedding")
    norms = {"post_layernorm": "final_norm"} | ({"pre_layrnorm": "embedding_norm"} if vision.embedding_norm else {})
    leaves = {"weight": "scale", "bias": "bias"}
    for theirs, ours in norms.items():
        for leaf, our_leaf in leaves.items():
            yield plain(f"{TOWER}{theirs}.{leaf}", f"vision/{ours}/{our_leaf}")
    for layer in range(vision.num_layers):
        read = vision.layers_read
        place, row = ("encoder", layer) if layer < read else ("unread_encoder", layer - read)
        theirs, ours = f"{TOWER}encoder.layers.{layer}.", f"vision/{place}/block_0/"
        for norm, our_norm in (("layer_norm1", "attention_norm"), ("layer_norm2", "mlp_norm")):
            for leaf, our_leaf in leaves.items():
                yield Entry(f"{theirs}{norm}.{leaf}", f"{ours}{our_norm}/{our_leaf}", (row,), _same, _same)
        for number, name in enumerate("qkv"):
            yield Entry(
                f"{theirs}self_attn.{name}_proj.weight",
                f"{ours}attention/qkv/kernel",
                (row, slice(None), number),
                lambda a: a.T.reshape(width, heads, head),
                lambda a: a.reshape(width, width).T,
            )
            yield Entry(
                f"{theirs}self_attn.{name}_proj.bias",
                f"{ours}attention/qkv/bias",
                (row, number),
                lambda a: a.reshape(heads, head),
                lambda a: a.reshape(width),
            )
        yield Entry(
            f"{theirs}self_attn.out_proj.weight",
            f"{ours}attention/out/kernel",
            (row,),
            lambda a: a.T.reshape(heads, head, width),
            lambda a: a.reshape(width, width).T,
        )
        yield Entry(f"{theirs}self_attn.out_proj.bias", f"{ours}attention/out/bias", (row,), _same, _same)
        for name, our_name in (("fc1", "up"), ("fc2", "down")):
            yield Entry(f"{theirs}mlp.{name}.weight", f"{ours}mlp/{our_name}/kernel", (row,), _transposed, _transposed)
            yield Entry(f"{theirs}mlp.{name}.bias", f"{ours}mlp/{our_name}/bias", (row,), _same, _same)
    for number in (1, 2):
        name, path = f"{PROJECTOR}linear_{number}", f"vision/projector_{number}"
        yield Entry(f"{name}.weight", f"{path}/kernel", (), _transposed, _transposed)
        yield plain(f"{name}.bias", f"{path}/bias")


def to_theirs(model: GPTConfig, leaves: Mapping[str, Any]) -> Iterator[tuple[str, Array]]:
    """Yields the names and values of the tensors of tower and projector; `leaves`: parameters by path."""
    for entry in entries(model):
        yield entry.name, entry.to_theirs(np.asarray(leaves[entry.path])[entry.part])


def text_name(name: str) -> str:
    """The full name of a tensor of the text model, which is `name` in the table of its family."""
    return (TEXT_PREFIXES[1] if name == HEAD else TEXT_PREFIXES[0]) + name


def unified_name(name: str) -> str:
    """The name of a tensor in the newest files; older ones have `model.` before, and `vision_model.` in the tower's."""
    name = name.removeprefix("model.")
    return name.replace(f"{TOWER}vision_model.", TOWER, 1) if name.startswith(TOWER) else name
