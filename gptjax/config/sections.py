"""Dataclasses of a run's configuration, one for each section, and `Config`, which holds them all."""

import dataclasses
from typing import Literal

from gptjax.config.model import GPTConfig
from gptjax.config.optimizer import OptimizerConfig


@dataclasses.dataclass(frozen=True)
class DataConfig:
    """Training and validation text, tokenizer and packing."""

    # text:GLOB | jsonl:GLOB[#FIELD] | parquet:GLOB[#FIELD] | arrow:DIR[@SPLIT][#FIELD] |
    # hf:OWNER/NAME[@CONFIG:SPLIT][?revision=COMMIT][#FIELD] | tfds:NAME[@SPLIT][#FIELD] | tokens:GLOB@DTYPE |
    # prepared:DIR, the --output of gptjax.prepare | sotu | shakespeare. GLOB may be a URL: gs://, s3://, https://, hf://
    source: str = "sotu"
    validation_source: str | None = None  # same forms but prepared:; None: every k-th document of `source` is held out
    # Fraction of the documents held out when validation_source is None; with a mixture, of each source
    validation_fraction: float = 0.01
    # (source, weight) pairs, in the place of `source`: the weights are shares of the training tokens, up to a common
    # factor. A source that has been read once repeats in another order
    mixture: tuple[tuple[str, float], ...] = ()
    # (tokens, weights) pairs: from so many training tokens on, the sources of `mixture` have these weights, of which
    # some may be 0; before the first pair those of `mixture`
    mixture_schedule: tuple[tuple[int, tuple[float, ...]], ...] = ()
    # gpt2 | cl100k_base | o200k_base | o200k_harmony (gpt-oss) | bytes | bpe:SIZE | gpt1_bpe:SIZE |
    # json:PATH (a tokenizer.json)
    tokenizer: str = "gpt2"
    # concatenate: documents are joined by end-of-text tokens and attention crosses document boundaries (GPT-3);
    # segment: attention, positions and targets are confined to one document
    packing: Literal["concatenate", "segment"] = "concatenate"
    # Pretraining objective. causal: the next token; masked: masked tokens, with bidirectional attention (Devlin et al.
    # 2019); fill_in_the_middle: the next token of documents whose middle is moved to their end (Bavarian et al. 2022);
    # prefix: the next token after a prefix of random length with bidirectional attention (Raffel et al. 2020)
    objective: Literal["causal", "masked", "fill_in_the_middle", "prefix"] = "causal"
    mask_rate: float = 0.15  # masked: probability that a token, or a word, is selected for prediction
    mask_whole_words: bool = False  # masked: the tokens of a word are selected together
    fim_rate: float = 0.5  # fill_in_the_middle: probability that a document of a row is split
    # fill_in_the_middle: share of the split documents in the order suffix, prefix, middle (SPM); the others are in the
    # order prefix, suffix, middle (PSM)
    fim_spm_rate: float = 0.5
    document_separator: str | None = None  # line that separates documents within a text file; None: one per file
    # Bytes that are not UTF-8. replace: by U+FFFD, counted and reported; error: stop the run
    invalid_utf8: Literal["replace", "error"] = "replace"
    # Damaged or unreadable files, lines and records. error: stop the run; skip: leave them out, counted and reported
    on_corrupt: Literal["error", "skip"] = "error"
    # Folder of images that are named by relative paths; None: that of the JSON lines or table that names them
    image_dir: str | None = None
    remote_images: bool = False  # read images from URLs that the data names; otherwise they are refused
    # Augmentation: the most by which a training image is moved in each direction, as a fraction of its width
    image_shift: float = 0.0
    video_frames: int = 8  # images that a video is read as, evenly spaced from its first frame to its last
    video_timestamps: bool = False  # write the time of each frame before it, such as "1.5 s: "
    cache_dir: str = "~/.cache/gptjax"  # directory of prepared corpora, trained tokenizers and compiled programs
    prefetch_batches: int = 8  # microbatches prefetched in host memory


@dataclasses.dataclass(frozen=True)
class ChatConfig:
    """Conversations of the chat stages, which `data.source` and `data.validation_source` name there.

    Their forms are in `gptjax/data/conversations.py`, the templates in `gptjax/data/templates.py`.
    """

    # none: the contents alone, as in pretraining; harmony: gpt-oss
    template: Literal["none", "plain", "chatml", "harmony", "custom"] = "chatml"
    # custom: text around the {content} of a message; <|name|> is a special token, <|endoftext|> that of the tokenizer
    system_format: str = ""
    user_format: str = ""
    assistant_format: str = ""  # a special token right behind {content} ends the turn
    # harmony, sft: tokens in the loss. assistant: all that the assistant writes; final: messages of the final channel
    loss_mask: Literal["assistant", "final"] = "assistant"
    # harmony: the system message; a record's own reasoning_effort and model_identity take precedence
    reasoning_effort: Literal["low", "medium", "high"] = "medium"
    model_identity: str = "You are ChatGPT, a large language model trained by OpenAI."
    knowledge_cutoff: str = "2024-06"
    current_date: str | None = None  # such as 2025-06-28; None: the system message has none
    # A conversation whose last exchange alone is longer than the context stops the run, or is left out and counted
    on_too_long: Literal["error", "skip"] = "error"
    pack: bool = True  # sft, reward, dpo: several sequences in a row, without attention between them; false: one a row
    pretraining_source: str | None = None  # sft, ppo: pretraining text, in the forms of data.source in stage pretrain
    pretraining_share: float = 0.0  # sft: the text's share of all rows (Ouyang et al. 2022, appendix C.3)
    # reward, dpo: number of randomly chosen completions of other conversations that each completion is ranked above; 0:
    # the source has rankings
    random_answers: int = 0
    random_draws: int = 1  # times that an epoch has each completion, each time with other random completions


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
    prompts_per_iteration: int = 512  # prompts whose completions are sampled before the policy is trained on them
    responses_per_prompt: int = 1  # completions sampled for each prompt; in grpo the group size
    # maximum length of a prompt, which beyond it loses its oldest turns; None: the context without response_tokens
    prompt_tokens: int | None = None
    response_tokens: int = 128  # maximum length of a completion, which is cut off there
    # Subtracted from the reward of a completion that was cut off. None, as in TRL: no penalty, since its size depends
    # on the scale of the reward; a python: reward can read the finish reason itself
    missing_eos_penalty: float | None = None
    # Exclude completions that were cut off from the loss, but not from the group statistics of grpo (Yu et al. 2025,
    # DAPO, section 3.4). False, as in TRL: a policy that is not trained on them does not learn to end completions
    mask_truncated_completions: bool = False
    inner_epochs: int = 1  # epochs over the completions of an iteration
    clip: float = 0.2  # PPO clip range (epsilon) of the probability ratio
    kl_weight: float = 0.02  # KL penalty coefficient (beta) against init_from: in the reward of ppo, the loss of grpo
    # Truncated importance sampling: the policy loss of a token is multiplied by min(pi_old / pi_sampler, cap), the same
    # policy as trainer and as sampler compute it (Yao et al. 2025). None: no correction
    importance_sampling_cap: float | None = None
    generate_batch: int = 64  # completions sampled at once
    # static: `generate_batch` prompts start together, and the next ones when the longest completion has ended;
    # continuous: the next prompt starts as soon as a completion has ended, on meshes that do not shard the batch;
    # auto: continuous on a CPU with such a mesh, where it was measured to be faster, and otherwise static
    batching: Literal["auto", "static", "continuous"] = "auto"


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
    # parameters only (head, special tokens, image encoder); top_layers: those and the last layers; parts: those and
    # the parameters of `trained`
    method: Literal["none", "lora", "adalora", "adapters", "head", "top_layers", "parts"] = "none"
    # lora, adalora, adapters, parts: regular expressions over the paths of parameters that are trained whole, such as
    # "vision/projector_.*" or "(layers|final_norm)/.*"
    trained: tuple[str, ...] = ()
    # lora, adalora: regular expressions over the paths of the kernels to adapt
    targets: tuple[str, ...] = ("layers/.*/attention/(qkv|q|kv|out)/kernel",)
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
    """Length of training, batch size and gradient accumulation."""

    total_tokens: int | None = None  # length of training in tokens; exactly one of this and `epochs` is set
    epochs: float | None = None  # length of training in epochs
    tokens_per_batch: int = 524_288  # tokens of one optimizer step
    # Sequences (over all devices) of one forward and backward pass; gradients are accumulated over the microbatches of
    # a batch. None: no accumulation
    microbatch_size: int | None = None
    # Batch-size ramp (GPT-3): the batch grows linearly in tokens seen, in whole microbatches. None: no ramp
    ramp_start_tokens: int | None = None  # initial batch size in tokens
    ramp_tokens: int | None = None  # tokens seen when the batch reaches tokens_per_batch


@dataclasses.dataclass(frozen=True)
class MeshConfig:
    """Number of devices along each mesh axis; one axis may be -1, which takes all remaining devices."""

    data: int = -1  # data parallelism
    fsdp: int = 1  # data parallelism with sharded parameters and optimizer state
    tensor: int = 1  # tensor parallelism
    context: int = 1  # context parallelism: positions of a sequence are sharded
    expert: int = 1  # expert parallelism


@dataclasses.dataclass(frozen=True)
class EvaluationConfig:
    """Validation and sampling during and after training, and early stopping."""

    every_tokens: int | None = None  # interval in tokens; None: only at the start and at the end
    every_epochs: float | None = None  # interval in epochs of the training data, in place of every_tokens
    # Validation tokens evaluated, the same number of each source of a mixture; None: the whole validation split
    max_tokens: int | None = 1_000_000
    metric: str = "loss"  # validation metric that selects the best checkpoint
    # Early stopping: number of consecutive evaluations without improvement. None: no early stopping
    patience: int | None = None
    sample_prompt: str = "The"
    sample_tokens: int = 128  # length of a sample; 0: no samples
    sample_temperature: float = 0.8
    sample_top_k: int | None = 50  # None: no truncation


@dataclasses.dataclass(frozen=True)
class CheckpointConfig:
    """Checkpoint intervals and retention; `python -m benchmarks.checkpoint` measures the overhead of saving."""

    every_tokens: int | None = None  # interval in tokens; None: only at the end
    every_epochs: float | None = None  # interval in epochs of the training data, in place of every_tokens
    keep_last: int = 2  # newest checkpoints kept, in addition to the one with the best evaluation.metric


@dataclasses.dataclass(frozen=True)
class StabilityConfig:
    """Handling of non-finite updates and loss spikes."""

    # Updates with a non-finite loss or gradient are skipped; this many in a row stop the run
    max_skipped_updates: int = 10
    # Spike threshold: standard deviations of the loss above its mean over the previous spike_window steps. None: no
    # detection
    spike_deviations: float | None = None
    spike_window: int = 128
    # log: report a spike; rewind: restore the newest checkpoint and skip the batches from there to the spike, and
    # rewind_batches more (Chowdhery et al. 2022, section 5.1)
    on_spike: Literal["log", "rewind"] = "log"
    rewind_batches: int = 100


@dataclasses.dataclass(frozen=True)
class LoggingConfig:
    """Training metrics."""

    every_steps: int = 10  # interval of training records in metrics.jsonl, in steps
    tensorboard: bool = True  # also write TensorBoard event files
    # Weights & Biases project to log to (pip install 'gptjax[wandb]'); WANDB_MODE=offline is supported
    wandb_project: str | None = None


@dataclasses.dataclass(frozen=True)
class Config:
    """Configuration of one run."""

    stage: Literal["pretrain", "finetune", "sft", "reward", "dpo", "ppo", "grpo"] = "pretrain"
    seed: int = 0  # random seed of initialisation, dropout, data order and sampling
    # (XLA flag, value) pairs for compiling the training step
    compiler_options: tuple[tuple[str, str], ...] = ()
    init_from: str | None = None  # workdir whose newest weights initialise the model
    # Number of its layers that are transferred, from the first, with the embeddings (Radford et al. 2018, figure 2);
    # the final norm is transferred with all layers only, and the rest is initialised from the seed. None: all
    init_layers: int | None = None
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

    def completed(
        self, vocab_size: int, *, extends_vocabulary: bool = False, image_token: int | None = None
    ) -> "Config":
        """Returns the config with the fields that depend on the data filled in.

        Args:
          vocab_size: size of the tokenizer's vocabulary, special tokens added to it included.
          extends_vocabulary: whether a smaller model.vocab_size is raised to `vocab_size` instead of refused.
          image_token: the value of model.vision.image_token; None: it stays.

        Raises:
          UserError: model.vocab_size is set and smaller than `vocab_size`.
        """
        model = self.model
        if extends_vocabulary:
            model = dataclasses.replace(model, vocab_size=max(vocab_size, model.vocab_size or 0))
        if image_token is not None:
            model = dataclasses.replace(model, vision=dataclasses.replace(model.vision, image_token=image_token))
        if self.peft.method == "adapters":
            model = dataclasses.replace(model, adapter_dim=self.peft.adapter_dim)
        return dataclasses.replace(self, model=model.with_vocabulary(vocab_size))

    @property
    def sequences_per_microbatch(self) -> int:
        """Sequences of a microbatch over all devices; those of the whole batch if batch.microbatch_size is None."""
        return self.batch.microbatch_size or self.sequences_per_batch

    @property
    def sequences_per_batch(self) -> int:
        """Sequences of a full batch over all devices; in stages whose elements have several rows, elements."""
        return self.batch.tokens_per_batch // self.model.context_length
