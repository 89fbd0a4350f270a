"""Validates a config for every stage: ranges of values, and fields that contradict each other.

Requirements of a single stage are checked by the `check` of its definition (`gptjax/stages/`).
"""

import dataclasses
import math
from typing import Any

from gptjax.config.errors import positive, require
from gptjax.config.mixture_checks import check_mixture
from gptjax.config.model_checks import check_model
from gptjax.config.optimizer import OptimizerConfig
from gptjax.config.sections import ChatConfig, Config
from gptjax.config.vision_checks import check_vision


def check(config: Config) -> None:
    """Raises UserError if values of `config` are out of range or contradict each other, in any stage."""
    _check_finite(config, "")
    check_model(config.model)
    check_vision(config.model)
    _check_data(config)
    check_mixture(config)
    _check_chat(config)
    _check_rl(config)
    _check_init_layers(config)
    _check_peft(config)
    _check_batch(config)
    _check_optimizer(config.optimizer)
    _check_intervals(config)
    require(-(2**63) <= config.seed < 2**63, f"seed={config.seed} must be a 64-bit integer, below 2**63")


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


def _check_data(config: Config) -> None:
    data, task, regularisation = config.data, config.task, config.regularisation
    require(0 < data.validation_fraction < 1, f"data.validation_fraction={data.validation_fraction} must be in (0, 1)")
    positive(data, "data", "prefetch_batches")
    positive(data, "data", "video_frames")
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
    cap = rl.importance_sampling_cap
    require(cap is None or cap >= 1, f"rl.importance_sampling_cap={cap} must be at least 1")
    positive(ppo, "ppo", "value_lr", "value_clip", "pretraining_rows")
    for field in ("discount", "gae_lambda"):
        require(0 <= getattr(ppo, field) <= 1, f"ppo.{field}={getattr(ppo, field)} must be in [0, 1]")
    require(ppo.pretraining_weight >= 0, f"ppo.pretraining_weight={ppo.pretraining_weight} must not be negative")


def _check_init_layers(config: Config) -> None:
    if (count := config.init_layers) is None:
        return
    require(config.init_from is not None, f"init_layers={count} transfers layers of init_from: set that to a workdir")
    layers = config.model.num_layers
    require(0 <= count <= layers, f"init_layers={count} must be from 0 to model.num_layers={layers}")
    require(
        config.peft.method == "none",
        f"init_layers={count} leaves layers untrained that peft.method={config.peft.method} freezes: unset one of them",
    )


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
    require(
        all(factor > 0 for _, factor in optimizer.lr_rules),
        f"optimizer.lr_rules={optimizer.lr_rules} has a factor that is not positive: peft.method=parts trains some "
        "parameters only",
    )
    variance = optimizer.muon_variance_decay
    require(variance is None or 0 <= variance < 1, f"optimizer.muon_variance_decay={variance} must be in [0, 1)")
    plain = variance is None and optimizer.muon_iteration == "newton_schulz"
    require(
        plain or optimizer.name == "muon",
        f"optimizer.muon_variance_decay={variance} and optimizer.muon_iteration={optimizer.muon_iteration} need "
        f"optimizer.name=muon, not {optimizer.name}",
    )
    require(optimizer.warmup_tokens >= 0, f"optimizer.warmup_tokens={optimizer.warmup_tokens} must not be negative")
    start = optimizer.warmup_start_fraction
    require(0 <= start <= 1, f"optimizer.warmup_start_fraction={start} must be in [0, 1]")
    floor = optimizer.floor_lr_fraction
    require(0 <= floor <= 1, f"optimizer.floor_lr_fraction={floor} must be in [0, 1]")
    ema = optimizer.ema_decay
    require(ema is None or 0 < ema < 1, f"optimizer.ema_decay={ema} must be in (0, 1)")

    decay = optimizer.decay_fraction
    require(decay is None or 0 < decay <= 1, f"optimizer.decay_fraction={decay} must be in (0, 1]")
    require(
        decay is None or optimizer.decay_tokens is None,
        f"optimizer.decay_fraction={decay} and optimizer.decay_tokens={optimizer.decay_tokens} both set the decay: "
        "unset one of them",
    )
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
