"""The knobs of a run, section by section, and the run that has them all."""

import dataclasses
from typing import Literal

from gptjax.config.model import GPTConfig


@dataclasses.dataclass(frozen=True)
class DataConfig:
    """Text, tokenizer and packing."""

    # tfds:NAME[@SPLIT][#FIELD] | text:GLOB | jsonl:GLOB[#FIELD] (plain, .gz or .zst) | sotu | shakespeare
    source: str = "sotu"
    validation_source: str | None = None  # same forms; None: hold out every k-th document of `source`
    validation_fraction: float = 0.01  # share of the documents held out, when there is no validation_source
    tokenizer: str = "gpt2"  # gpt2 | cl100k_base | bytes | bpe:SIZE | gpt1_bpe:SIZE | json:PATH (a tokenizer.json)
    # concatenate: documents follow each other, end-of-text between, attention crosses them (GPT-3's rule);
    # segment: attention, positions and targets stay within a document
    packing: Literal["concatenate", "segment"] = "concatenate"
    document_separator: str | None = None  # text files that hold many documents: the line between them
    invalid_utf8: Literal["replace", "error"] = "replace"  # replaced bytes are counted and reported
    # A file, line or record that is damaged or cannot be read stops the run, or is left out, counted and reported
    on_corrupt: Literal["error", "skip"] = "error"
    cache_dir: str = "~/.cache/gptjax"  # prepared corpora, trained tokenizers, compiled programs
    prefetch_batches: int = 8  # microbatches read ahead of the device


@dataclasses.dataclass(frozen=True)
class ChatConfig:
    """Conversations of the chat stages, which `data.source` and `data.validation_source` name there.

    Their forms are in `gptjax/data/conversations.py`, the templates in `gptjax/data/templates.py`.
    """

    template: Literal["plain", "chatml", "custom"] = "chatml"
    # custom: text around the {content} of a message; <|name|> is a special token, <|endoftext|> that of the tokenizer
    system_format: str = ""
    user_format: str = ""
    assistant_format: str = ""  # a special token right behind {content} ends the turn
    # A conversation whose last exchange alone is longer than the context stops the run, or is left out and counted
    on_too_long: Literal["error", "skip"] = "error"
    pack: bool = True  # sft, reward, dpo: several sequences in a row, without attention between them; false: one a row
    pretraining_source: str | None = None  # sft, ppo: pretraining text, in the forms of data.source in stage pretrain
    pretraining_share: float = 0.0  # sft: the text's share of all rows (Ouyang et al. 2022, appendix C.3)
    # reward, dpo: the completion of each turn is ranked above so many completions of other conversations; 0: the
    # source has rankings
    random_answers: int = 0
    random_draws: int = 1  # an epoch has each turn so many times, each time with other random completions


@dataclasses.dataclass(frozen=True)
class DPOConfig:
    """Stage "dpo": direct preference optimization (Rafailov et al. 2023)."""

    beta: float = 0.1  # scale of the implicit reward: coefficient of the KL penalty against the reference
    label_smoothing: float = 0.0  # assumed share of pairs whose ranking is wrong (Mitchell 2023)


@dataclasses.dataclass(frozen=True)
class RLConfig:
    """Stages "ppo" and "grpo": reinforcement learning of a policy on its completions of the prompts of `data.source`.

    The defaults are InstructGPT's (Ouyang et al. 2022, appendix C.4) where it gives them. Completions are sampled from
    the policy at temperature 1. A step trains on batch.tokens_per_batch / model.context_length prompts.
    """

    # model:WORKDIR (of stage reward) | bleu | rouge (against the reference completions) | python:MODULE.FUNCTION
    reward: str = ""
    prompts_per_iteration: int = 512  # whose completions are sampled before the policy changes
    responses_per_prompt: int = 1  # completions of each; in grpo the group size
    prompt_tokens: int | None = None  # at most: a longer prompt loses its oldest turns; None: what the context leaves
    response_tokens: int = 128  # maximum length of a completion, which is cut off there
    # A completion that was cut off: subtracted from its reward. None, as in TRL: a penalty has the scale of the reward,
    # so that there is no default for all, and a python: reward can judge by the finish reason itself
    missing_eos_penalty: float | None = None
    # ... excluded from the loss, not from the group statistics of grpo (Yu et al. 2025, DAPO, section 3.4). False, as
    # in TRL: a policy that is never trained on completions that were cut off is not taught to end them
    mask_truncated_completions: bool = False
    inner_epochs: int = 1  # epochs over the completions of an iteration
    clip: float = 0.2  # PPO clip range (epsilon) of the probability ratio
    kl_weight: float = 0.02  # KL penalty coefficient (beta) against init_from: in the reward of ppo, the loss of grpo
    generate_batch: int = 64  # completions sampled at once


@dataclasses.dataclass(frozen=True)
class PPOConfig:
    """Stage "ppo": proximal policy optimization (Schulman et al. 2017), with a value function of its own weights."""

    # The value function starts from: reward: the reward model of rl.reward; policy: init_from, with a head of zeros
    value_init: Literal["reward", "policy"] = "reward"
    value_lr: float = 9e-6  # peak learning rate of the value function; the policy's is optimizer.peak_lr
    value_clip: float = 0.2  # clip range of the value estimates
    discount: float = 1.0  # gamma
    gae_lambda: float = 0.95  # lambda of generalised advantage estimation
    whiten_rewards: bool = False  # divide the tokens' rewards by their standard deviation
    # PPO-ptx: coefficient of the language-model loss on chat.pretraining_source; 27.8 in the paper, 8 rows a prompt
    pretraining_weight: float = 0.0
    pretraining_rows: int = 8


@dataclasses.dataclass(frozen=True)
class GRPOConfig:
    """Stage "grpo": group relative policy optimization (Shao et al. 2024, DeepSeekMath), without a value function."""

    # How the losses of tokens are averaged. grpo: over the tokens of each completion, then over completions; dr_grpo:
    # their sum, divided by completions x rl.response_tokens (Liu et al. 2025); dapo: over all tokens (Yu et al. 2025)
    loss_type: Literal["grpo", "dr_grpo", "dapo"] = "grpo"
    divide_by_std: bool = True  # divide advantages by the group's standard deviation; Dr. GRPO does not: set false too


@dataclasses.dataclass(frozen=True)
class TaskConfig:
    """Stage "finetune": the supervised task (Radford et al. 2018, section 3.2).

    `data.source` and `data.validation_source` then name labelled rows, in the forms of `gptjax/data/labelled.py`.
    """

    kind: Literal[
        "classification",
        "entailment",
        "similarity",
        "multiple_choice",
        "regression",
        "tagging",
        "question_answering",
    ] = "classification"
    # (input of the task, column name), such as (("text", "tweet"),); others are found by their common names
    columns: tuple[tuple[str, str], ...] = ()
    labels: tuple[str, ...] = ()  # in the order of the head's outputs; empty: those of the training rows, sorted
    test_source: str | None = None  # labelled rows for the final report; None: the validation rows
    lm_weight: float = 0.5  # weight of the auxiliary language-model loss (section 3.2, equation 5)
    head_dropout: float = 0.1
    # Every position attends to the whole sequence, not only to the positions before it; needs lm_weight=0
    bidirectional: bool = False
    # tagging: the subword whose output is the word's tag. With causal attention only the last has seen the whole word
    label_piece: Literal["first", "last"] = "last"
    label_weights: tuple[float, ...] = ()  # loss weight of each label; empty: 1
    balanced_labels: bool = False  # loss weights inversely proportional to the label frequencies in the training rows
    # regression: the head predicts (target - mean) / std; None: mean and standard deviation of the training rows
    target_mean: float | None = None
    target_std: float | None = None


@dataclasses.dataclass(frozen=True)
class RegularisationConfig:
    """Stage "finetune": regularisation against overfitting on small data. Dropout rates are in `model` and `task`."""

    label_smoothing: float = 0.0  # probability mass spread evenly over all labels (Szegedy et al. 2016, section 7)
    word_dropout: float = 0.0  # share of a text's tokens that are blanked (Iyyer et al. 2015, section 3.1)
    token_replacement: float = 0.0  # share of them replaced by random tokens (Wang et al. 2018, section 3)
    mixup_alpha: float | None = None  # Beta(a, a) mixing of pooled states and labels (senMixup of Guo et al. 2019)
    # L2 norm of the adversarial perturbation of an example's normalised embeddings (Miyato et al. 2017, equation 5)
    adversarial_epsilon: float | None = None
    augmented_copies: int = 0  # augmented copies of each training row, by the two options below; a turn is a line
    drop_turns: float = 0.0  # probability that a copy loses its oldest turns, up to a uniformly sampled one
    shuffle_turns: float = 0.0  # probability that the turns before the last are permuted


@dataclasses.dataclass(frozen=True)
class PeftConfig:
    """Parameter-efficient fine-tuning of the weights that `init_from` names."""

    # none: all weights; lora: Hu et al. 2021; adalora: Zhang et al. 2023; adapters: Houlsby et al. 2019; head: the new
    # parameters only (head and special tokens); top_layers: those and the last layers
    method: Literal["none", "lora", "adalora", "adapters", "head", "top_layers"] = "none"
    # lora, adalora: regular expressions over the paths of the kernels to adapt
    targets: tuple[str, ...] = ("layers/.*/attention/(qkv|out)/kernel",)
    rank: int = 8  # lora: rank of every target; adalora: average rank at the end
    alpha: float = 16.0  # the low-rank update is scaled by alpha / rank
    dropout: float = 0.0  # lora, adalora: on the input of the low-rank matrices
    initial_rank: int = 12  # adalora: rank of every target at the start
    initial_fraction: float = 0.1  # adalora: share of training before the budget shrinks
    final_fraction: float = 0.3  # adalora: share of training with the final budget
    prune_every_steps: int = 10  # adalora
    sensitivity_beta: float = 0.85  # adalora: moving average of the importance of a singular value
    uncertainty_beta: float = 0.85  # adalora: moving average of its uncertainty
    orthogonality: float = 0.1  # adalora: weight of the penalty that keeps P and Q orthogonal
    adapter_dim: int = 32  # adapters: width of the bottleneck
    num_layers: int = 2  # top_layers: number of trained layers


@dataclasses.dataclass(frozen=True)
class BatchConfig:
    """How much is trained, and on how many tokens a step."""

    total_tokens: int | None = None  # length of training: this, or `epochs`
    epochs: float | None = None
    tokens_per_batch: int = 524_288
    microbatch_size: int | None = None  # sequences (over all devices) in one gradient; None: the whole batch at once
    # GPT-3's batch ramp: the batch grows linearly in tokens seen, in whole microbatches. None: no ramp.
    ramp_start_tokens: int | None = None  # the first batch
    ramp_tokens: int | None = None  # full size is reached after so many tokens


@dataclasses.dataclass(frozen=True)
class OptimizerConfig:
    """How gradients become updates, and the schedule, in tokens seen."""

    # adamw: Loshchilov & Hutter 2019; muon: Jordan et al. 2024, of the layers' matrices, with AdamW for all else, and
    # one learning rate for both (Liu et al. 2025); adafactor: second moments as rows and columns (Shazeer & Stern 2018)
    # and given learning rates (Zhai et al. 2021). All have decoupled decay, and clip the gradient
    name: Literal["adamw", "muon", "adafactor"] = "adamw"
    peak_lr: float = 6e-4
    schedule: Literal["cosine", "linear", "wsd", "constant"] = "cosine"
    warmup_tokens: int = 0  # linear from warmup_start_fraction
    warmup_fraction: float | None = None  # the same, as a share of the whole training
    warmup_start_fraction: float = 0.0  # of peak_lr
    decay_tokens: int | None = None  # cosine, linear: where the floor is reached; wsd: length of the last descent;
    # None: cosine and linear reach it at the end, wsd takes the last tenth
    floor_lr_fraction: float = 0.1  # of peak_lr
    beta1: float = 0.9  # of the first moment; adafactor with 0 keeps none
    beta2: float = 0.95  # of the second; adafactor's grows up to it
    eps: float = 1e-8  # adafactor has its own
    muon_momentum: float = 0.95
    # As it is kept, muon's too; param_dtype: as model.param_dtype says
    first_moment_dtype: Literal["param_dtype", "float32", "bfloat16"] = "param_dtype"
    min_factored_dim: int = 32  # adafactor keeps the second moments of arrays with a shorter axis as they are
    weight_decay: float = 0.1  # decoupled, times the learning rate
    # (regex over parameter paths, factor of weight_decay): the first full match counts, every parameter needs one
    decay_rules: tuple[tuple[str, float], ...] = ((".*/(bias|scale)", 0.0), (".*", 1.0))
    clip_norm: float | None = 1.0  # of the gradient, over all parameters
    ema_decay: float | None = None  # per step; evaluations and samples then use the average
    layer_lr_decay: float = 1.0  # a layer's learning rate is so many times that of the layer above it
    offload: bool = False  # the moments wait in the host's memory from one step to the next


@dataclasses.dataclass(frozen=True)
class MeshConfig:
    """Devices along each mesh axis; one axis may be -1: all that the others leave."""

    data: int = -1
    fsdp: int = 1
    tensor: int = 1
    context: int = 1
    expert: int = 1


@dataclasses.dataclass(frozen=True)
class EvaluationConfig:
    """Held-out loss and samples, while training and at the end."""

    every_tokens: int | None = None  # None: only at the start and at the end
    every_epochs: float | None = None  # the same, counted in epochs of the training data
    max_tokens: int | None = 1_000_000  # of the validation split; None: all of it
    metric: str = "loss"  # of the validation, by which a checkpoint is the best
    patience: int | None = None  # stop after so many evaluations in a row that are no better; None: train to the end
    sample_prompt: str = "The"
    sample_tokens: int = 128  # 0: no samples
    sample_temperature: float = 0.8
    sample_top_k: int | None = 50


@dataclasses.dataclass(frozen=True)
class CheckpointConfig:
    """What a kill costs at most; `python -m benchmarks.checkpoint` measures what saving costs."""

    every_tokens: int | None = None  # None: only at the end
    every_epochs: float | None = None  # the same, counted in epochs of the training data
    keep_last: int = 2  # besides the one of the best evaluation.metric


@dataclasses.dataclass(frozen=True)
class StabilityConfig:
    """What is done about numbers that go wrong."""

    # An update whose loss or gradient is not finite is skipped; so many in a row stop the run
    max_skipped_updates: int = 10
    # A loss so many standard deviations above the mean of the spike_window steps before it is a spike; None: none is
    spike_deviations: float | None = None
    spike_window: int = 128
    # rewind: go back to the newest checkpoint, and pass over the data from there to the spike and of so many more
    # batches (Chowdhery et al. 2022, section 5.1)
    on_spike: Literal["log", "rewind"] = "log"
    rewind_batches: int = 100


@dataclasses.dataclass(frozen=True)
class LoggingConfig:
    every_steps: int = 10  # training records in metrics.jsonl
    tensorboard: bool = True
    wandb_project: str | None = None  # Weights & Biases too (pip install 'gptjax[wandb]'); WANDB_MODE=offline works


@dataclasses.dataclass(frozen=True)
class Config:
    """One run."""

    stage: Literal["pretrain", "finetune", "sft", "reward", "dpo", "ppo", "grpo"] = "pretrain"
    seed: int = 0  # of initialisation, dropout, data order and samples
    # (XLA flag, value) pairs for the training step
    compiler_options: tuple[tuple[str, str], ...] = ()
    init_from: str | None = None  # a workdir whose newest weights to start from
    model: GPTConfig = GPTConfig()
    data: DataConfig = DataConfig()
    chat: ChatConfig = ChatConfig()
    dpo: DPOConfig = DPOConfig()
    rl: RLConfig = RLConfig()
    ppo: PPOConfig = PPOConfig()
    grpo: GRPOConfig = GRPOConfig()
    task: TaskConfig = TaskConfig()
    regularisation: RegularisationConfig = RegularisationConfig()
    peft: PeftConfig = PeftConfig()
    batch: BatchConfig = BatchConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    mesh: MeshConfig = MeshConfig()
    evaluation: EvaluationConfig = EvaluationConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    stability: StabilityConfig = StabilityConfig()
    logging: LoggingConfig = LoggingConfig()

    def completed(self, vocab_size: int, *, extends_vocabulary: bool = False) -> "Config":
        """The config that a run computes with, once its data is known.

        Args:
          vocab_size: of the tokenizer, or of what extends it by special tokens.
          extends_vocabulary: a smaller model.vocab_size grows to `vocab_size`, instead of being refused.

        Raises:
          UserError: model.vocab_size is set, and too small.
        """
        model = self.model
        if extends_vocabulary:
            model = dataclasses.replace(model, vocab_size=max(vocab_size, model.vocab_size or 0))
        if self.peft.method == "adapters":
            model = dataclasses.replace(model, adapter_dim=self.peft.adapter_dim)
        return dataclasses.replace(self, model=model.with_vocabulary(vocab_size))

    @property
    def sequences_per_microbatch(self) -> int:
        """Over all devices; the whole batch where batch.microbatch_size is unset."""
        return self.batch.microbatch_size or self.sequences_per_batch

    @property
    def sequences_per_batch(self) -> int:
        """Over all devices, of a whole batch; of a stage with elements of several rows so many elements."""
        return self.batch.tokens_per_batch // self.model.context_length
