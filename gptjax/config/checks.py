"""Which values of the knobs are in range and go together."""

from typing import Any

from gptjax.config.errors import UserError
from gptjax.config.model import GPTConfig
from gptjax.config.sections import RL_STAGES, Config, OptimizerConfig


def check(config: Config) -> None:
    """Raises UserError when values of `config` are out of range or contradict each other."""
    _check_model(config.model)
    _check_data(config)
    _check_chat(config)
    if config.stage in RL_STAGES:
        _check_rl(config)
    _check_peft(config)
    _check_batch(config)
    _check_optimizer(config.optimizer)
    _check_intervals(config)
    _require(-(2**63) <= config.seed < 2**63, f"seed={config.seed} must be a 64-bit integer, below 2**63")


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise UserError(message)


def _positive(section: Any, prefix: str, *names: str) -> None:
    for name in names:
        value = getattr(section, name)
        _require(value is None or value > 0, f"{prefix}.{name}={value} must be positive")


def _check_model(model: GPTConfig) -> None:
    _positive(model, "model", "vocab_size", "context_length", "num_layers", "num_heads", "embed_dim", "ffw_dim")
    _positive(model, "model", "band_width", "norm_eps", "adapter_dim")
    _require(
        model.embed_dim % model.num_heads == 0,
        f"model.num_heads={model.num_heads} does not divide model.embed_dim={model.embed_dim}: "
        f"choose one that does, such as {_divisor_near(model.embed_dim, model.num_heads)}",
    )
    _require(len(model.attention_pattern) > 0, 'model.attention_pattern is empty: ("dense",) is the plain GPT')
    for kind in model.attention_pattern:
        _require(
            kind in ("dense", "banded"), f"model.attention_pattern has {kind!r}: its parts are 'dense' or 'banded'"
        )
    _require(
        model.num_layers % len(model.attention_pattern) == 0,
        f"model.num_layers={model.num_layers} is not a whole number of model.attention_pattern="
        f"{model.attention_pattern}: make it a multiple of {len(model.attention_pattern)}",
    )
    _require(
        model.logits_dtype != "bfloat16" or model.dtype == "bfloat16",
        "model.logits_dtype=bfloat16 rounds what model.dtype=float32 asks to be exact: set both to bfloat16",
    )
    for name in ("embedding_dropout", "attention_dropout", "residual_dropout"):
        value = getattr(model, name)
        _require(0 <= value < 1, f"model.{name}={value} must be in [0, 1)")


def _check_data(config: Config) -> None:
    data, task, regularisation = config.data, config.task, config.regularisation
    _require(0 < data.validation_fraction < 1, f"data.validation_fraction={data.validation_fraction} must be in (0, 1)")
    _positive(data, "data", "prefetch_batches")

    _require(task.lm_weight >= 0, f"task.lm_weight={task.lm_weight} must not be negative")
    _require(0 <= task.head_dropout < 1, f"task.head_dropout={task.head_dropout} must be in [0, 1)")
    _require(task.target_std is None or task.target_std > 0, f"task.target_std={task.target_std} must be positive")
    _require(
        not (task.label_weights and task.balanced_labels), "set one of task.label_weights and task.balanced_labels"
    )
    _require(
        all(weight > 0 for weight in task.label_weights), f"task.label_weights={task.label_weights} must be positive"
    )

    for name in ("label_smoothing", "word_dropout", "token_replacement", "drop_turns", "shuffle_turns"):
        value = getattr(regularisation, name)
        _require(0 <= value <= 1, f"regularisation.{name}={value} must be in [0, 1]")
    _require(
        regularisation.label_smoothing == 0 or task.kind not in ("regression", "question_answering"),
        f"regularisation.label_smoothing={regularisation.label_smoothing} smooths the probabilities of labels, and "
        f"task.kind={task.kind} has none: set it to 0",
    )
    _positive(regularisation, "regularisation", "mixup_alpha", "adversarial_epsilon")
    copies = regularisation.augmented_copies
    _require(copies >= 0, f"regularisation.augmented_copies={copies} must not be negative")
    _require(
        (copies > 0) == (max(regularisation.drop_turns, regularisation.shuffle_turns) > 0),
        "regularisation.augmented_copies and what changes the copies, drop_turns or shuffle_turns, need each other",
    )
    _require(
        regularisation.mixup_alpha is None or task.kind not in ("tagging", "question_answering"),
        f"regularisation.mixup_alpha mixes whole texts, and task.kind={task.kind} is about places in them: unset it",
    )


def _check_chat(config: Config) -> None:
    chat, dpo = config.chat, config.dpo
    formats = (chat.system_format, chat.user_format, chat.assistant_format)
    _require(
        all(formats) if chat.template == "custom" else not any(formats),
        "chat.template=custom needs chat.system_format, chat.user_format and chat.assistant_format, other templates "
        f"have their own, and chat.template={chat.template}: give all three or none",
    )
    _require(0 <= chat.pretraining_share < 1, f"chat.pretraining_share={chat.pretraining_share} must be in [0, 1)")
    if config.stage == "ppo":
        share, name = config.ppo.pretraining_weight, "ppo.pretraining_weight"
    else:
        share, name = chat.pretraining_share, "chat.pretraining_share"
    _require(
        (share > 0) == (chat.pretraining_source is not None), f"chat.pretraining_source and {name} need each other"
    )
    _require(chat.random_answers >= 0, f"chat.random_answers={chat.random_answers} must not be negative")
    _positive(chat, "chat", "random_draws")
    _require(
        chat.random_draws == 1 or chat.random_answers > 0,
        f"chat.random_draws={chat.random_draws} are of chat.random_answers: set that too",
    )
    _positive(dpo, "dpo", "beta")
    _require(0 <= dpo.label_smoothing < 0.5, f"dpo.label_smoothing={dpo.label_smoothing} must be in [0, 0.5)")
    _require(
        config.stage not in ("dpo", *RL_STAGES) or config.init_from is not None,
        f"stage {config.stage} learns how to leave the model it starts from: name its workdir by init_from",
    )


def _check_rl(config: Config) -> None:
    rl, ppo, model = config.rl, config.ppo, config.model
    form, _, name = rl.reward.partition(":")
    _require(
        rl.reward in ("bleu", "rouge") or (form in ("model", "python") and bool(name)),
        f"rl.reward={rl.reward!r} is no reward: model:WORKDIR, bleu, rouge or python:MODULE.FUNCTION",
    )
    _positive(rl, "rl", "prompts_per_iteration", "responses_per_prompt", "response_tokens", "inner_epochs", "clip")
    _positive(rl, "rl", "generate_batch")
    _require(rl.kl_weight >= 0, f"rl.kl_weight={rl.kl_weight} must not be negative")
    _require(
        rl.prompts_per_iteration % config.sequences_per_batch == 0,
        f"rl.prompts_per_iteration={rl.prompts_per_iteration} is not a whole number of batches of "
        f"{config.sequences_per_batch} prompts (batch.tokens_per_batch / model.context_length): change one",
    )
    _positive(rl, "rl", "prompt_tokens")
    _require(
        (rl.prompt_tokens or 1) + rl.response_tokens <= model.context_length,
        f"rl.prompt_tokens={rl.prompt_tokens} and rl.response_tokens={rl.response_tokens} exceed "
        f"model.context_length={model.context_length}: lower them",
    )
    for dropout in ("embedding_dropout", "attention_dropout", "residual_dropout"):
        _require(
            getattr(model, dropout) == 0,
            f"model.{dropout}={getattr(model, dropout)}: what a policy learns from is the probability with which it "
            "drew its tokens, without dropout: set it to 0",
        )
    _require(
        config.stability.on_spike != "rewind",
        "stability.on_spike=rewind passes over data, and a policy makes its own: set it to log",
    )
    if config.stage == "grpo":
        _require(
            rl.responses_per_prompt > 1,
            "stage grpo compares the answers to a prompt with each other: set rl.responses_per_prompt to 2 or more",
        )
        return
    _positive(ppo, "ppo", "value_lr", "value_clip", "pretraining_rows")
    for field in ("discount", "gae_lambda"):
        _require(0 <= getattr(ppo, field) <= 1, f"ppo.{field}={getattr(ppo, field)} must be in [0, 1]")
    _require(ppo.pretraining_weight >= 0, f"ppo.pretraining_weight={ppo.pretraining_weight} must not be negative")
    _require(
        ppo.value_init == "policy" or form == "model",
        f"ppo.value_init=reward needs a reward model, and rl.reward={rl.reward} is none: set ppo.value_init=policy",
    )
    _require(
        config.peft.method == "none",
        f"peft.method={config.peft.method} is for other stages: ppo trains a value function besides; unset it",
    )


def _check_peft(config: Config) -> None:
    peft = config.peft
    _require(0 <= peft.dropout < 1, f"peft.dropout={peft.dropout} must be in [0, 1)")
    _positive(peft, "peft", "rank", "alpha", "prune_every_steps", "adapter_dim", "num_layers")
    _require(
        peft.initial_rank >= peft.rank or peft.method != "adalora",
        f"peft.initial_rank={peft.initial_rank} is below peft.rank={peft.rank}, at which adalora ends: raise it",
    )
    for name in ("sensitivity_beta", "uncertainty_beta"):
        _require(0 <= getattr(peft, name) < 1, f"peft.{name}={getattr(peft, name)} must be in [0, 1)")
    _require(
        min(peft.initial_fraction, peft.final_fraction) >= 0 and peft.initial_fraction + peft.final_fraction < 1,
        f"peft.initial_fraction={peft.initial_fraction} and peft.final_fraction={peft.final_fraction} must leave "
        "a part of the training between them",
    )
    _require(
        peft.method != "adalora" or config.optimizer.ema_decay is None,
        "peft.method=adalora prunes weights, and their average would keep what is pruned: unset optimizer.ema_decay",
    )
    _require(
        peft.method == "none" or config.init_from is not None,
        f"peft.method={peft.method} trains a part of given weights: name their workdir by init_from",
    )
    _require(
        peft.method == "none" or config.optimizer.name != "muon",
        f"optimizer.name=muon is for whole matrices, and peft.method={peft.method} trains a part: set it to adamw",
    )


def _check_batch(config: Config) -> None:
    model, batch = config.model, config.batch
    _positive(batch, "batch", "total_tokens", "epochs", "tokens_per_batch", "microbatch_size")
    _positive(batch, "batch", "ramp_start_tokens", "ramp_tokens")
    _require(
        (batch.total_tokens is None) != (batch.epochs is None),
        f"set one of batch.total_tokens ({batch.total_tokens}) and batch.epochs ({batch.epochs}) and the other to None",
    )
    unit = (batch.microbatch_size or 1) * model.context_length
    _require(
        batch.tokens_per_batch % unit == 0,
        f"batch.tokens_per_batch={batch.tokens_per_batch} is not a whole number of microbatches of {unit} tokens "
        f"(batch.microbatch_size x model.context_length): try {max(1, round(batch.tokens_per_batch / unit)) * unit}",
    )
    _require(
        (batch.ramp_start_tokens is None) == (batch.ramp_tokens is None),
        "a batch ramp needs both batch.ramp_start_tokens and batch.ramp_tokens",
    )
    if batch.ramp_start_tokens is not None:
        _require(
            batch.microbatch_size is not None and unit <= batch.ramp_start_tokens <= batch.tokens_per_batch,
            f"batch.ramp_start_tokens={batch.ramp_start_tokens} must lie between a microbatch (batch.microbatch_size x "
            f"model.context_length={unit} tokens) and batch.tokens_per_batch={batch.tokens_per_batch}",
        )


def _check_optimizer(optimizer: OptimizerConfig) -> None:
    _positive(optimizer, "optimizer", "peak_lr", "decay_tokens", "eps", "clip_norm")
    _require(0 <= optimizer.beta1 < 1, f"optimizer.beta1={optimizer.beta1} must be in [0, 1)")
    _require(0 <= optimizer.beta2 < 1, f"optimizer.beta2={optimizer.beta2} must be in [0, 1)")
    momentum = optimizer.muon_momentum
    _require(0 <= momentum < 1, f"optimizer.muon_momentum={momentum} must be in [0, 1)")
    _positive(optimizer, "optimizer", "min_factored_dim")
    _require(optimizer.weight_decay >= 0, f"optimizer.weight_decay={optimizer.weight_decay} must not be negative")
    _require(optimizer.warmup_tokens >= 0, f"optimizer.warmup_tokens={optimizer.warmup_tokens} must not be negative")
    start = optimizer.warmup_start_fraction
    _require(0 <= start <= 1, f"optimizer.warmup_start_fraction={start} must be in [0, 1]")
    floor = optimizer.floor_lr_fraction
    _require(0 <= floor <= 1, f"optimizer.floor_lr_fraction={floor} must be in [0, 1]")
    ema = optimizer.ema_decay
    _require(ema is None or 0 < ema < 1, f"optimizer.ema_decay={ema} must be in (0, 1)")

    fraction = optimizer.warmup_fraction
    _require(fraction is None or 0 <= fraction < 1, f"optimizer.warmup_fraction={fraction} must be in [0, 1)")
    _require(
        fraction is None or optimizer.warmup_tokens == 0,
        "set one of optimizer.warmup_tokens and optimizer.warmup_fraction, and the other to 0 or None",
    )
    _require(
        0 < optimizer.layer_lr_decay <= 1, f"optimizer.layer_lr_decay={optimizer.layer_lr_decay} must be in (0, 1]"
    )


def _check_intervals(config: Config) -> None:
    for name, section in (("evaluation", config.evaluation), ("checkpoint", config.checkpoint)):
        _positive(section, name, "every_tokens", "every_epochs")
        _require(
            section.every_tokens is None or section.every_epochs is None,
            f"set one of {name}.every_tokens and {name}.every_epochs, and the other to None",
        )
    _positive(config.evaluation, "evaluation", "max_tokens", "sample_top_k", "patience")
    _require(config.evaluation.sample_temperature >= 0, "evaluation.sample_temperature must not be negative")
    _require(config.evaluation.sample_tokens >= 0, "evaluation.sample_tokens must not be negative")
    _positive(config.checkpoint, "checkpoint", "keep_last")
    _positive(config.stability, "stability", "max_skipped_updates", "spike_deviations")
    _require(
        config.stability.spike_window >= 8,
        f"stability.spike_window={config.stability.spike_window} is too short to know what is usual: 8 at least",
    )
    _require(config.stability.rewind_batches >= 0, "stability.rewind_batches must not be negative")
    _positive(config.logging, "logging", "every_steps")


def _divisor_near(number: int, near: int) -> int:
    return min((d for d in range(1, number + 1) if number % d == 0), key=lambda d: abs(d - near))
