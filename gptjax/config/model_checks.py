"""Validates the settings of a model."""

from gptjax.config.errors import positive, require
from gptjax.config.model import GATE_CHANNELS, GPTConfig


def check_model(model: GPTConfig) -> None:
    """Raises UserError if values of `model` are out of range or contradict each other."""
    positive(model, "model", "vocab_size", "context_length", "num_layers", "num_heads", "embed_dim", "ffw_dim")
    positive(model, "model", "band_width", "norm_eps", "adapter_dim")
    require(
        model.head_width is not None or model.embed_dim % model.num_heads == 0,
        f"model.num_heads={model.num_heads} does not divide model.embed_dim={model.embed_dim}: "
        f"choose one that does, such as {_divisor_near(model.embed_dim, model.num_heads)}, or set model.head_width",
    )
    positive(model, "model", "num_kv_heads", "head_width")
    require(
        model.num_heads % model.kv_heads == 0,
        f"model.num_kv_heads={model.num_kv_heads} does not divide model.num_heads={model.num_heads}: "
        f"choose one that does, such as {_divisor_near(model.num_heads, model.kv_heads)}",
    )
    _check_blocks(model)
    _check_experts(model)
    _check_parametrization(model)
    require(
        len(model.attention_pattern) > 0,
        'model.attention_pattern is empty: set it to ("dense",) for dense attention in every layer',
    )
    for kind in model.attention_pattern:
        require(kind in ("dense", "banded"), f"model.attention_pattern has {kind!r}: use 'dense' or 'banded'")
    require(
        model.num_layers % len(model.attention_pattern) == 0,
        f"model.num_layers={model.num_layers} is not a multiple of the length of model.attention_pattern="
        f"{model.attention_pattern}: set it to a multiple of {len(model.attention_pattern)}",
    )
    require(
        model.logits_dtype != "bfloat16" or model.dtype == "bfloat16",
        f"model.logits_dtype=bfloat16 needs model.dtype=bfloat16, not {model.dtype}: set both to bfloat16, or "
        "model.logits_dtype to float32",
    )
    for name in ("embedding_dropout", "attention_dropout", "residual_dropout"):
        value = getattr(model, name)
        require(0 <= value < 1, f"model.{name}={value} must be in [0, 1)")
    for name in ("token_init_std", "position_init_std", "kernel_init_std"):
        require(getattr(model, name) >= 0, f"model.{name}={getattr(model, name)} must not be negative")


def _check_blocks(model: GPTConfig) -> None:
    """Positions, norms and feed-forward layers: values in range, and no field that would have no effect."""
    positive(model, "model", "rope_theta", "yarn_factor", "yarn_original_context", "yarn_beta_fast", "yarn_beta_slow")
    positive(model, "model", "yarn_attention_factor", "qk_norm_scale", "swish_beta", "gate_limit", "logit_soft_cap")
    positive(model, "model", "llama3_factor", "llama3_original_context", "llama3_low_rotations")
    for name in ("yarn_factor", "llama3_factor"):
        require(
            model.positions == "rotary" or getattr(model, name) is None,
            f"model.{name}={getattr(model, name)} extends rotary positions: set model.positions=rotary, or unset it",
        )
    require(
        model.yarn_factor is None or model.llama3_factor is None,
        f"model.yarn_factor={model.yarn_factor} and model.llama3_factor={model.llama3_factor} both extend rotary "
        "positions: unset one of them",
    )
    require(
        model.llama3_high_rotations > model.llama3_low_rotations,
        f"model.llama3_high_rotations={model.llama3_high_rotations} must be above model.llama3_low_rotations="
        f"{model.llama3_low_rotations}",
    )
    require(
        model.positions == "learned" or model.head_dim % 2 == 0,
        f"model.positions=rotary rotates pairs of channels, and heads have {model.head_dim}: make their width even",
    )
    require(
        model.yarn_beta_fast > model.yarn_beta_slow,
        f"model.yarn_beta_fast={model.yarn_beta_fast} must be above model.yarn_beta_slow={model.yarn_beta_slow}",
    )
    require(
        model.gated or (model.gate_limit is None and model.up_offset == 0),
        "model.gate_limit and model.up_offset are for gated layers: set model.gated=true, or unset them",
    )
    require(
        model.activation == "silu" or model.swish_beta == 1,
        f"model.swish_beta={model.swish_beta} is for model.activation=silu, not {model.activation}: set it to 1",
    )
    require(
        model.qk_norm or model.qk_norm_scale == 1,
        f"model.qk_norm_scale={model.qk_norm_scale} needs model.qk_norm=true: set it, or leave the scale at 1",
    )
    require(
        model.value_embeddings != "alternate" or len(model.attention_pattern) % 2 == 0,
        "model.value_embeddings=alternate needs a model.attention_pattern of even length, such as ('dense', 'dense')",
    )
    require(
        model.value_embeddings == "none" or model.embed_dim >= GATE_CHANNELS,
        f"model.value_embeddings reads {GATE_CHANNELS} channels of the hidden state: model.embed_dim="
        f"{model.embed_dim} is too small",
    )


def _check_experts(model: GPTConfig) -> None:
    """A mixture of experts: values in range, and no field that would have no effect."""
    positive(model, "model", "num_experts", "experts_per_token", "expert_capacity")
    for name in ("z_loss", "router_balance_loss", "router_z_loss", "balance_bias_rate"):
        require(getattr(model, name) >= 0, f"model.{name}={getattr(model, name)} must not be negative")
    if model.num_experts is None:
        names = ("router_bias", "balance_bias", "expert_capacity", "router_balance_loss", "router_z_loss")
        used = [f"model.{name}" for name in names if getattr(model, name)]
        require(not used, f"{', '.join(used)}: only a mixture of experts has a router: set model.num_experts")
        return
    require(
        model.experts_per_token <= model.num_experts,
        f"model.experts_per_token={model.experts_per_token} is above model.num_experts={model.num_experts}: lower it",
    )
    require(
        model.matmul_dtype == "model",
        f"model.matmul_dtype={model.matmul_dtype} is not supported for experts: set it to model",
    )


def _check_parametrization(model: GPTConfig) -> None:
    """The base model of muP and CompleteP: sizes that are needed, and none that would have no effect."""
    positive(model, "model", "base_width", "base_depth", "base_head_width")
    kind = model.parametrization
    needed = {"standard": (), "mup": ("base_width",), "completep": ("base_width", "base_depth")}[kind]
    for name in needed:
        require(
            getattr(model, name) is not None,
            f"model.parametrization={kind} needs model.{name}: set it to that of the model whose hyperparameters "
            "these are",
        )
    allowed = (*needed, "base_head_width") if needed else ()
    for name in ("base_width", "base_depth", "base_head_width"):
        require(
            name in allowed or getattr(model, name) is None,
            f"model.{name}={getattr(model, name)} has no effect with model.parametrization={kind}: unset it, or set "
            f"model.parametrization={'completep' if name == 'base_depth' else 'mup'}",
        )
    require(
        kind != "completep" or model.norm_position == "pre",
        "model.parametrization=completep scales the branches of pre-LN layers: set model.norm_position=pre, or "
        "model.parametrization=mup",
    )


def _divisor_near(number: int, near: int) -> int:
    return min((d for d in range(1, number + 1) if number % d == 0), key=lambda d: abs(d - near))
