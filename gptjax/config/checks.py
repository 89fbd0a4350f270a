"""Validates a config for every stage: ranges of values, and fields that contradict each other.

Requirements of a single stage are checked by the `check` of its definition (`gptjax/stages/`).
"""

import dataclasses
import math
from typing import Any

from gptjax.config.errors import require
from gptjax.config.mixture_checks import check_mixture
from gptjax.config.model import GATE_CHANNELS, GPTConfig
from gptjax.config.sections import ChatConfig, Config, OptimizerConfig
from gptjax.config.start_checks import check_init_layers
from gptjax.config.vision_checks import check_vision


def check(config: Config) -> None:
    """Raises UserError if values of `config` are out of range or contradict each other, in any stage."""
    _check_finite(config, "")
    _check_model(config.model)
    check_vision(config.model)
    _check_data(config)
    check_mixture(config)
    _check_chat(config)
    _check_rl(config)
    check_init_layers(config)
    _check_peft(config)
    _check_batch(config)
    _check_optimizer(config.optimizer)
    _check_intervals(config)
    require(-(2**63) <= config.seed < 2**63, f"seed={config.seed} must be a 64-bit integer, below 2**63")


def positive(section: Any, prefix: str, *names: str) -> None:
    """Raises UserError unless each named field of `section` is positive or None."""
    for name in names:
        value = getattr(section, name)
        require(value is None or value > 0, f"{prefix}.{name}={value} must be positive")


def _check_finite(value: Any, name: str) -> None:
    """Raises UserError if a number in a section, or in a tuple, is infinite or not a number."""
    if dataclasses.is_dataclass(value):
        for field in dataclasses.fields(value):
            _check_finite(getattr(value, field.name), f"{name}.{field.name}" if name else field.name)
    elif isinstance(value, tuple):
        for part in value:
            _check_finite(part, name)
    else:
        require(not isinstance(value, float) or math.isfinite(value), f"{name}={value} must be a finite number")


def _check_model(model: GPTConfig) -> None:
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


def _check_data(config: Config) -> None:
    data, task, regularisation = config.data, config.task, config.regularisation
    require(0 < data.validation_fraction < 1, f"data.validation_fraction={data.validation_fraction} must be in (0, 1)")
    positive(data, "data", "prefetch_batches")
    require(0 <= data.image_shift < 1, f"data.image_shift={data.image_shift} must be in [0, 1)")
    require(0 < data.mask_rate < 1, f"data.mask_rate={data.mask_rate} must be in (0, 1)")
    for name in ("fim_rate", "fim_spm_rate"):
        require(0 <= getattr(data, name) <= 1, f"data.{name}={getattr(data, name)} must be in [0, 1]")
    require(
        not data.mask_whole_words or data.objective == "masked",
        f"data.mask_whole_words is for data.objective=masked, not {data.objective}: unset it",
    )

    require(task.lm_weight >= 0, f"task.lm_weight={task.lm_weight} must not be negative")
    require(0 <= task.head_dropout < 1, f"task.head_dropout={task.head_dropout} must be in [0, 1)")
    require(task.target_std is None or task.target_std > 0, f"task.target_std={task.target_std} must be positive")
    require(
        not (task.label_weights and task.balanced_labels),
        "task.label_weights and task.balanced_labels exclude each other: unset one",
    )
    require(
        all(weight > 0 for weight in task.label_weights), f"task.label_weights={task.label_weights} must be positive"
    )

    for name in ("label_smoothing", "word_dropout", "token_replacement", "drop_turns", "shuffle_turns"):
        value = getattr(regularisation, name)
        require(0 <= value <= 1, f"regularisation.{name}={value} must be in [0, 1]")
    positive(regularisation, "regularisation", "mixup_alpha", "adversarial_epsilon")
    copies = regularisation.augmented_copies
    require(copies >= 0, f"regularisation.augmented_copies={copies} must not be negative")
    require(
        (copies > 0) == (max(regularisation.drop_turns, regularisation.shuffle_turns) > 0),
        f"regularisation.augmented_copies={copies} with drop_turns={regularisation.drop_turns} and shuffle_turns="
        f"{regularisation.shuffle_turns}: set augmented_copies and one of the others above 0, or all to 0",
    )
    require(
        regularisation.mixup_alpha is None or task.kind not in ("tagging", "question_answering"),
        f"regularisation.mixup_alpha={regularisation.mixup_alpha} mixes whole texts and does not apply to "
        f"task.kind={task.kind}, which labels positions: unset it",
    )


def _check_chat(config: Config) -> None:
    chat, dpo = config.chat, config.dpo
    formats = (chat.system_format, chat.user_format, chat.assistant_format)
    require(
        chat.template != "custom" or all(formats),
        "chat.template=custom needs chat.system_format, chat.user_format and chat.assistant_format: set all three",
    )
    require(
        chat.template == "custom" or not any(formats),
        f"chat.template={chat.template} ignores chat.system_format, chat.user_format and chat.assistant_format: unset "
        "them, or set chat.template=custom",
    )
    for name in ("loss_mask", "reasoning_effort", "model_identity", "knowledge_cutoff", "current_date"):
        require(
            chat.template == "harmony" or getattr(chat, name) == getattr(ChatConfig, name),
            f"chat.{name}={getattr(chat, name)} is of chat.template=harmony: unset it, or set that",
        )
    require(0 <= chat.pretraining_share < 1, f"chat.pretraining_share={chat.pretraining_share} must be in [0, 1)")
    require(chat.random_answers >= 0, f"chat.random_answers={chat.random_answers} must not be negative")
    positive(chat, "chat", "random_draws")
    require(
        chat.random_draws == 1 or chat.random_answers > 0,
        f"chat.random_draws={chat.random_draws} needs random completions: set chat.random_answers above 0, or "
        "chat.random_draws to 1",
    )
    positive(dpo, "dpo", "beta")
    require(0 <= dpo.label_smoothing < 0.5, f"dpo.label_smoothing={dpo.label_smoothing} must be in [0, 0.5)")


def _check_rl(config: Config) -> None:
    rl, ppo = config.rl, config.ppo
    positive(rl, "rl", "prompts_per_iteration", "responses_per_prompt", "response_tokens", "inner_epochs", "clip")
    positive(rl, "rl", "generate_batch", "prompt_tokens", "missing_eos_penalty")
    require(rl.kl_weight >= 0, f"rl.kl_weight={rl.kl_weight} must not be negative")
    positive(ppo, "ppo", "value_lr", "value_clip", "pretraining_rows")
    for field in ("discount", "gae_lambda"):
        require(0 <= getattr(ppo, field) <= 1, f"ppo.{field}={getattr(ppo, field)} must be in [0, 1]")
    require(ppo.pretraining_weight >= 0, f"ppo.pretraining_weight={ppo.pretraining_weight} must not be negative")


def _check_peft(config: Config) -> None:
    peft = config.peft
    require(0 <= peft.dropout < 1, f"peft.dropout={peft.dropout} must be in [0, 1)")
    positive(peft, "peft", "rank", "initial_rank", "alpha", "prune_every_steps", "adapter_dim", "num_layers")
    require(peft.orthogonality >= 0, f"peft.orthogonality={peft.orthogonality} must not be negative")
    require(
        peft.initial_rank >= peft.rank or peft.method != "adalora",
        f"peft.initial_rank={peft.initial_rank} is below peft.rank={peft.rank}, the final average rank of AdaLoRA: "
        "raise peft.initial_rank",
    )
    for name in ("sensitivity_beta", "uncertainty_beta"):
        require(0 <= getattr(peft, name) < 1, f"peft.{name}={getattr(peft, name)} must be in [0, 1)")
    require(
        min(peft.initial_fraction, peft.final_fraction) >= 0 and peft.initial_fraction + peft.final_fraction < 1,
        f"peft.initial_fraction={peft.initial_fraction} and peft.final_fraction={peft.final_fraction} must not be "
        "negative, and must sum to less than 1, since AdaLoRA lowers the rank between them",
    )
    require(
        peft.method != "adalora" or config.optimizer.ema_decay is None,
        "peft.method=adalora prunes singular values, which a moving average would keep: unset optimizer.ema_decay",
    )
    require(
        not peft.trained or peft.method in ("lora", "adalora", "adapters", "parts"),
        f"peft.trained={peft.trained} has no effect with peft.method={peft.method}: set that to parts, or unset it",
    )
    require(
        peft.method == "none" or config.init_from is not None,
        f"peft.method={peft.method} adapts pretrained weights: set init_from to their workdir",
    )
    require(
        peft.method != "adalora" or config.model.parametrization == "standard",
        f"model.parametrization={config.model.parametrization} has no rules for the singular vectors of "
        "peft.method=adalora: set peft.method=lora",
    )
    require(
        peft.method == "none" or config.optimizer.name != "muon",
        f"optimizer.name=muon is not supported with peft.method={peft.method}: set optimizer.name=adamw",
    )


def _check_batch(config: Config) -> None:
    model, batch = config.model, config.batch
    positive(batch, "batch", "total_tokens", "epochs", "tokens_per_batch", "microbatch_size")
    positive(batch, "batch", "ramp_start_tokens", "ramp_tokens")
    require(
        (batch.total_tokens is None) != (batch.epochs is None),
        f"batch.total_tokens={batch.total_tokens} and batch.epochs={batch.epochs}: set exactly one, the other to None",
    )
    unit = (batch.microbatch_size or 1) * model.context_length
    require(
        batch.tokens_per_batch % unit == 0,
        f"batch.tokens_per_batch={batch.tokens_per_batch} is not a multiple of the {unit} tokens of a microbatch "
        f"(batch.microbatch_size x model.context_length): try {max(1, round(batch.tokens_per_batch / unit)) * unit}",
    )
    require(
        (batch.ramp_start_tokens is None) == (batch.ramp_tokens is None),
        f"batch.ramp_start_tokens={batch.ramp_start_tokens} and batch.ramp_tokens={batch.ramp_tokens}: set both for a "
        "batch ramp, or neither",
    )
    if batch.ramp_start_tokens is not None:
        require(
            batch.microbatch_size is not None and unit <= batch.ramp_start_tokens <= batch.tokens_per_batch,
            f"batch.ramp_start_tokens={batch.ramp_start_tokens} must be between a microbatch (batch.microbatch_size x "
            f"model.context_length={unit} tokens) and batch.tokens_per_batch={batch.tokens_per_batch}",
        )


def _check_optimizer(optimizer: OptimizerConfig) -> None:
    positive(optimizer, "optimizer", "peak_lr", "decay_tokens", "eps", "clip_norm")
    require(0 <= optimizer.beta1 < 1, f"optimizer.beta1={optimizer.beta1} must be in [0, 1)")
    require(0 <= optimizer.beta2 < 1, f"optimizer.beta2={optimizer.beta2} must be in [0, 1)")
    momentum = optimizer.muon_momentum
    require(0 <= momentum < 1, f"optimizer.muon_momentum={momentum} must be in [0, 1)")
    positive(optimizer, "optimizer", "min_factored_dim")
    require(optimizer.weight_decay >= 0, f"optimizer.weight_decay={optimizer.weight_decay} must not be negative")
    require(
        all(factor >= 0 for _, factor in optimizer.decay_rules),
        f"optimizer.decay_rules={optimizer.decay_rules} has a negative factor: use 0 for no weight decay",
    )
    require(optimizer.warmup_tokens >= 0, f"optimizer.warmup_tokens={optimizer.warmup_tokens} must not be negative")
    start = optimizer.warmup_start_fraction
    require(0 <= start <= 1, f"optimizer.warmup_start_fraction={start} must be in [0, 1]")
    floor = optimizer.floor_lr_fraction
    require(0 <= floor <= 1, f"optimizer.floor_lr_fraction={floor} must be in [0, 1]")
    ema = optimizer.ema_decay
    require(ema is None or 0 < ema < 1, f"optimizer.ema_decay={ema} must be in (0, 1)")

    fraction = optimizer.warmup_fraction
    require(fraction is None or 0 <= fraction < 1, f"optimizer.warmup_fraction={fraction} must be in [0, 1)")
    require(
        fraction is None or optimizer.warmup_tokens == 0,
        f"optimizer.warmup_tokens={optimizer.warmup_tokens} and optimizer.warmup_fraction={fraction} exclude each "
        "other: set the first to 0 or the second to None",
    )
    require(0 < optimizer.layer_lr_decay <= 1, f"optimizer.layer_lr_decay={optimizer.layer_lr_decay} must be in (0, 1]")


def _check_intervals(config: Config) -> None:
    for name, section in (("evaluation", config.evaluation), ("checkpoint", config.checkpoint)):
        positive(section, name, "every_tokens", "every_epochs")
        require(
            section.every_tokens is None or section.every_epochs is None,
            f"{name}.every_tokens={section.every_tokens} and {name}.every_epochs={section.every_epochs} exclude each "
            "other: set one to None",
        )
    positive(config.evaluation, "evaluation", "max_tokens", "sample_top_k", "patience")
    for name in ("sample_temperature", "sample_tokens"):
        value = getattr(config.evaluation, name)
        require(value >= 0, f"evaluation.{name}={value} must not be negative")
    positive(config.checkpoint, "checkpoint", "keep_last")
    positive(config.stability, "stability", "max_skipped_updates", "spike_deviations")
    require(
        config.stability.spike_window >= 8,
        f"stability.spike_window={config.stability.spike_window} is too short to estimate a standard deviation: "
        "use 8 or more",
    )
    rewind = config.stability.rewind_batches
    require(rewind >= 0, f"stability.rewind_batches={rewind} must not be negative")
    positive(config.logging, "logging", "every_steps")


def _divisor_near(number: int, near: int) -> int:
    return min((d for d in range(1, number + 1) if number % d == 0), key=lambda d: abs(d - near))
