"""Special tokens of pretraining objectives, and what an objective that decodes tokens needs of a tokenizer."""

from collections.abc import Sequence

from gptjax.data.tokenizers import Tokenizer

# Each token by the names that vocabularies have for it; the first one is added where a vocabulary has none.
MASK = ("<|mask|>", "[MASK]", "<mask>")
FIM_PREFIX = ("<|fim_prefix|>", "<fim_prefix>", "<PRE>")
FIM_SUFFIX = ("<|fim_suffix|>", "<fim_suffix>", "<SUF>")
FIM_MIDDLE = ("<|fim_middle|>", "<fim_middle>", "<MID>")
_PROBE = ("Na", "ïve  日", "本\n\t🙂 Wo", "rds,don't", " <|endo", "ftext|> ")


def special_id(tokenizer: Tokenizer, names: Sequence[str]) -> int | None:
    """Returns the id of the special token with one of the names; None: there is none to which no text encodes."""
    for name in names:
        token = tokenizer.id_of(name)
        if token is not None and token not in tokenizer.encode(name):
            return token
    return None


def with_special_tokens(tokenizer: Tokenizer, tokens: Sequence[Sequence[str]]) -> Tokenizer:
    """Returns `tokenizer` with those of the special tokens added to its vocabulary that it lacks."""
    missing = [names[0] for names in tokens if special_id(tokenizer, names) is None]
    return tokenizer.with_added(missing) if missing else tokenizer


def is_concatenative(tokenizer: Tokenizer) -> bool:
    """Whether decoding concatenates the texts of tokens, so that a text can be split anywhere and encoded in parts.

    Byte-level vocabularies are; those that lower-case, drop blanks, or put one before a text are not.
    """
    tokens = [token for part in _PROBE for token in tokenizer.encode(part).tolist()]
    return tokenizer.decode(tokens) == "".join(_PROBE)
