"""Invertible de-tokenisers for language-model benchmarks (Radford et al. 2019, section 3.1).

Language-model benchmarks are distributed tokenised: punctuation and contractions are separated by blanks. As this is
out of distribution for a model of raw text, GPT-2 is evaluated on de-tokenised text, but with the perplexity per token
of the benchmark, which is valid as long as the transformation is invertible. GPT-2's de-tokenisers are not published;
these are our own.

A de-tokeniser is a list of rules, each a substitution and its inverse. Invertibility depends on the text (the full stop
of an abbreviation would be separated), so `restored_lines` measures it.
"""

import dataclasses
import re
from typing import NamedTuple

from gptjax.config import UserError


class Rule(NamedTuple):
    """Regular expressions and replacements from tokenised to plain text, and back."""

    tokenised: str
    plain_substitute: str
    plain: str
    tokenised_substitute: str


@dataclasses.dataclass(frozen=True)
class Detokenizer:
    """A list of rules, applied line by line.

    Attributes:
      rules: rules in the order from tokenised to plain text.
      padded_lines: the benchmark's lines begin and end with a blank, and empty lines are one blank.
    """

    rules: tuple[Rule, ...]
    padded_lines: bool = False

    def to_plain(self, text: str) -> str:
        return "\n".join(map(self._line_to_plain, text.split("\n")))

    def to_tokenised(self, text: str) -> str:
        """Applies the inverse of `to_plain`, which is exact where the text allows it."""
        return "\n".join(map(self._line_to_tokenised, text.split("\n")))

    def restored_lines(self, text: str) -> float:
        """Returns the share of the benchmark's lines that a round trip through plain text restores exactly."""
        lines = text.removesuffix("\n").split("\n")
        return sum(self._line_to_tokenised(self._line_to_plain(line)) == line for line in lines) / len(lines)

    def _line_to_plain(self, line: str) -> str:
        if self.padded_lines:
            line = line.removeprefix(" ").removesuffix(" ")
        for rule in self.rules:
            line = re.sub(rule.tokenised, rule.plain_substitute, line)
        return line

    def _line_to_tokenised(self, line: str) -> str:
        for rule in reversed(self.rules):
            line = re.sub(rule.plain, rule.tokenised_substitute, line)
        if self.padded_lines:
            line = f" {line} " if line else " "
        return line


def original_tokens(text: str) -> int:
    """Returns the number of a benchmark's tokens in a text: words separated by white space, plus one per line end."""
    lines = text.removesuffix("\n").split("\n")
    return len(text.split()) + len(lines)


_PUNCTUATION = Rule(r" ([.,;:!?])(?= |$)", r"\1", r"(?<=[^ ])([.,;:!?])(?= |$|[.,;:!?])", r" \1")
_BRACKETS = (
    Rule(r"([(\[]) ", r"\1", r"([(\[])", r"\1 "),
    Rule(r" ([)\]])", r"\1", r"([)\]])", r" \1"),
)
_QUOTES = Rule(r'" ([^"]*?) "', r'"\1"', r'"([^"]*?)"', r'" \1 "')
_ENDINGS = Rule(r"(?<=\w) '(s|re|ll|d|ve|m)\b", r"'\1", r"(?<=\w)'(s|re|ll|d|ve|m)\b", r" '\1")  # John 's
_PENN_NOT = Rule(r"(?<=\w) n't\b", "n't", r"(?<=\w)n't\b", " n't")  # do n't
_MOSES_NOT = Rule(r"(?<=n) 't\b", "'t", r"(?<=n)'t\b", " 't")  # don 't

DETOKENIZERS = {
    # WikiText-2 and WikiText-103 (Merity et al. 2016).
    "wikitext": Detokenizer(
        (
            Rule(r" @-@ ", "-", r"(?<=\w)-(?=\w)", " @-@ "),
            Rule(r" @([,.])@ ", r"\1", r"(?<=\d)([,.])(?=\d)", r" @\1@ "),
            Rule(r"= (?==)", "=", r"=(?==)", "= "),  # headings
            _PUNCTUATION,
            *_BRACKETS,
            _QUOTES,
            _ENDINGS,
            _MOSES_NOT,
        ),
        padded_lines=True,
    ),
    # The Penn Treebank as Mikolov et al. 2010 prepared it: lower case, no punctuation, N for numbers.
    "ptb": Detokenizer(
        (
            Rule(r"([$#]) N\b", r"\1N", r"([$#])N\b", r"\1 N"),
            Rule(r"\bN %", "N%", r"\bN%", "N %"),
            _PENN_NOT,
            _ENDINGS,
        ),
        padded_lines=True,
    ),
    # The One Billion Word benchmark (Chelba et al. 2013).
    "lm1b": Detokenizer((_PUNCTUATION, *_BRACKETS, _QUOTES, _ENDINGS, _MOSES_NOT)),
    # LAMBADA as released (Paperno et al. 2016): lower case, `` and '' for quotation marks.
    "lambada": Detokenizer(
        (
            _PUNCTUATION,
            _PENN_NOT,
            _ENDINGS,
            Rule(r"(?<![^ ])`` ", '"', r'(?<![^ ])"(?=[^ ])', "`` "),
            Rule(r" ''(?=[ ,.;:!?]|$)", '"', r'(?<=[^ ])"(?=[ ,.;:!?]|$)', " ''"),
        )
    ),
}


def get_detokenizer(name: str) -> Detokenizer:
    """Raises UserError for an unknown name."""
    if name not in DETOKENIZERS:
        raise UserError(f"unknown detokenizer {name!r}: one of {', '.join(DETOKENIZERS)}")
    return DETOKENIZERS[name]
