"""The objectives of stage "pretrain": the attention, examples and special tokens of each value of data.objective.

All have the loss of `pretrain.next_token_loss`: the weighted cross entropy of the targets in a batch.
"""

from gptjax.config import Config, GPTConfig, UserError
from gptjax.data.infilling import InfillingExamples, InfillingFormat
from gptjax.data.masked_text import MaskedExamples, PrefixExamples, WordStarts
from gptjax.data.pipeline import ExampleSource
from gptjax.data.special_tokens import (
    FIM_MIDDLE,
    FIM_PREFIX,
    FIM_SUFFIX,
    MASK,
    is_concatenative,
    special_id,
    with_special_tokens,
)
from gptjax.data.tokenizers import Tokenizer, load
from gptjax.files import expand

ATTENTION = {"masked": "full", "prefix": "prefix"}  # kind of attention; others are causal
SPECIAL_TOKENS = {"masked": (MASK,), "fill_in_the_middle": (FIM_PREFIX, FIM_SUFFIX, FIM_MIDDLE)}
HELD_OUT_SEED = 0  # of what is sampled for held-out examples: the same in every run


def attending(config: Config) -> GPTConfig:
    """Returns the model of `config` with the attention of its objective."""
    kind = ATTENTION.get(config.data.objective)
    return config.model if kind is None else config.model.with_attention(kind)


def check(config: Config) -> None:
    """Raises UserError when the model or the mesh cannot have the attention of the objective."""
    model, objective = config.model, config.data.objective
    if objective not in ATTENTION:
        return
    if set(model.attention_pattern) != {"dense"}:
        raise UserError(
            f"data.objective={objective} attends in both directions, and model.attention_pattern="
            f'{model.attention_pattern} has layers that are causal by definition: set it to ("dense",)'
        )
    if model.attention_backend not in ("auto", "xla"):
        raise UserError(
            f"model.attention_backend={model.attention_backend} is causal and data.objective={objective} is not: set "
            "the backend to auto"
        )
    if config.mesh.context != 1:
        raise UserError(
            f"mesh.context={config.mesh.context} is ring attention, which is causal, and data.objective={objective} is "
            "not: set it to 1"
        )


def extended(config: Config, tokenizer: Tokenizer, *, resumes: bool) -> Tokenizer:
    """Returns `tokenizer` with the special tokens of the weights to start from, and those of the objective.

    Args:
      resumes: whether `tokenizer` is that of a run that resumes, whose weights have all tokens already.

    Raises:
      UserError: the run that resumes was started with another objective.
    """
    if not resumes and config.init_from is not None:
        given = load(expand(config.init_from) / "tokenizer")
        tokenizer = tokenizer.with_added(given.added)
    found = with_special_tokens(tokenizer, SPECIAL_TOKENS.get(config.data.objective, ()))
    if resumes and found.added != tokenizer.added:
        raise UserError(
            f"data.objective={config.data.objective} needs the special token {found.added[-1]}, which the weights of "
            "this workdir lack: start from them by init_from, in another --workdir"
        )
    return found


def examples(config: Config, rows: ExampleSource, tokenizer: Tokenizer, seed: int) -> ExampleSource:
    """Returns the examples of the objective, made of the rows of `PackedExamples`.

    Args:
      tokenizer: result of `extended`.

    Raises:
      UserError: the objective does not support the tokenizer.
    """
    data = config.data
    if data.objective == "masked":
        mask = special_id(tokenizer, MASK)
        assert mask is not None, "extended adds it"
        assert tokenizer.end_of_text is not None, "open_corpus checks it"
        if data.mask_whole_words and not is_concatenative(tokenizer):
            raise UserError(
                "data.mask_whole_words finds words in the texts of tokens, and those of data.tokenizer="
                f"{data.tokenizer} do not add up to the text: unset it, or use a byte-level one, as gpt2 or bpe:SIZE"
            )
        return MaskedExamples(
            rows,
            mask_token=mask,
            end_of_text=tokenizer.end_of_text,
            ordinary_tokens=tokenizer.vocab_size - len(tokenizer.added),
            rate=data.mask_rate,
            seed=seed,
            word_starts=WordStarts(tokenizer) if data.mask_whole_words else None,
        )
    if data.objective == "prefix":
        return PrefixExamples(rows, seed=seed)
    if data.objective == "fill_in_the_middle":
        form = InfillingFormat(tokenizer)
        return InfillingExamples(rows, form, rate=data.fim_rate, spm_rate=data.fim_spm_rate, seed=seed)
    return rows


def middles(config: Config, rows: ExampleSource, tokenizer: Tokenizer) -> ExampleSource:
    """Returns held-out examples of fill_in_the_middle in which every document is split; the loss is that of middles."""
    return InfillingExamples(
        rows,
        InfillingFormat(tokenizer),
        rate=1.0,
        spm_rate=config.data.fim_spm_rate,
        seed=HELD_OUT_SEED,
        only_middle=True,
    )


def describe(config: Config, tokenizer: Tokenizer) -> dict[str, str]:
    """Returns the objective and the ids of its special tokens, for the user; empty for causal."""
    tokens = SPECIAL_TOKENS.get(config.data.objective, ())
    if config.data.objective == "causal":
        return {}
    found = (special_id(tokenizer, names) for names in tokens)
    ids = ", ".join(f"{names[0]} = {token}" for names, token in zip(tokens, found, strict=True))
    return {"objective": config.data.objective + (f"; special tokens: {ids}" if ids else "")}
