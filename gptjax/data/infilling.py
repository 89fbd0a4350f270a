"""Fill in the middle (Bavarian et al. 2022): the examples of training, and the prompts of generation.

The transformation is applied to the documents, or parts of documents, of each row after packing: at the context level,
which the paper finds to work better than before packing, as no split document is cut into two rows.
"""

import dataclasses
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from gptjax.config import UserError
from gptjax.data.masked_text import example_rng
from gptjax.data.pipeline import ExampleArrays, ExampleSource
from gptjax.data.special_tokens import FIM_MIDDLE, FIM_PREFIX, FIM_SUFFIX, is_concatenative, special_id
from gptjax.data.tokenizers import Tokenizer

REPLACED = "\ufffd"  # decoded from the part of a character
LONGEST_CHARACTER = 4  # bytes of UTF-8


@dataclasses.dataclass(frozen=True)
class Split:
    """How one document is split; the cuts are fractions of its characters.

    Attributes:
      suffix_first: order suffix, prefix, middle instead of prefix, suffix, middle.
    """

    first_cut: float
    second_cut: float
    suffix_first: bool


class InfillingFormat:
    """Encodes documents with the middle moved to the end, followed by end-of-text.

    PSM: <prefix> prefix <suffix> suffix <middle> middle <end>
    SPM, in the variant for joint training with PSM: <prefix> <suffix> suffix <middle> prefix middle <end>

    Raises:
      UserError: the tokenizer lacks the special tokens or end-of-text, or cannot encode a text in parts.
    """

    def __init__(self, tokenizer: Tokenizer):
        ids = [special_id(tokenizer, names) for names in (FIM_PREFIX, FIM_SUFFIX, FIM_MIDDLE)]
        if None in ids or tokenizer.end_of_text is None:
            raise UserError(f"this tokenizer lacks the tokens of fill_in_the_middle: {FIM_PREFIX[0]} and others")
        if not is_concatenative(tokenizer):
            raise UserError(
                "data.objective=fill_in_the_middle splits texts between any two characters, and this tokenizer does "
                "not decode the parts to the same text: use a byte-level one, such as data.tokenizer=gpt2 or bpe:SIZE"
            )
        self._tokenizer, self.end_of_text = tokenizer, tokenizer.end_of_text
        self.prefix, self.suffix, self.middle = (int(token) for token in ids if token is not None)

    def prompt(self, prefix: str, suffix: str) -> list[int]:
        """Returns the tokens from which a model generates the middle and then end-of-text (PSM)."""
        before, after = (self._tokenizer.encode(text).tolist() for text in (prefix, suffix))
        return [self.end_of_text, self.prefix, *before, self.suffix, *after, self.middle]

    def document(self, tokens: npt.NDArray[np.int32], split: Split) -> tuple[list[int], int]:
        """Splits a document, or a part of one, between characters.

        Args:
          tokens: of its text, without end-of-text. Parts of characters at its ends stay at its ends.

        Returns:
          The tokens of all parts, and how many of the last ones are the middle with its end-of-text.
        """
        before, text, after = self._whole_characters(tokens)
        first, second = sorted(int(cut * (len(text) + 1)) for cut in (split.first_cut, split.second_cut))
        parts = (text[:first], text[first:second], text[second:])
        prefix, middle, suffix = (self._tokenizer.encode(part).tolist() for part in parts)
        prefix, suffix, middle = [*before, *prefix], [*suffix, *after], [*middle, self.end_of_text]
        if split.suffix_first:
            return [self.prefix, self.suffix, *suffix, self.middle, *prefix, *middle], len(middle)
        return [self.prefix, *prefix, self.suffix, *suffix, self.middle, *middle], len(middle)

    def _whole_characters(self, tokens: npt.NDArray[np.int32]) -> tuple[list[int], str, list[int]]:
        """Returns the tokens before, the text of, and the tokens after the longest part that has whole characters."""
        start, stop = 0, len(tokens)
        text = self._tokenizer.decode(tokens)
        while start < min(stop, LONGEST_CHARACTER - 1) and text.startswith(REPLACED):
            start += 1
            text = self._tokenizer.decode(tokens[start:stop])
        while stop > max(start, len(tokens) - LONGEST_CHARACTER + 1) and text.endswith(REPLACED):
            stop -= 1
            text = self._tokenizer.decode(tokens[start:stop])
        return tokens[:start].tolist(), text, tokens[stop:].tolist()


class InfillingExamples:
    """The rows of `PackedExamples` in which documents are split with probability `rate`.

    Special tokens, and words that are cut, make a row longer: its last document loses tokens at its end, before it is
    split, until the row fits. What is left of the row, a few tokens, is padding. The arrays are those of
    `PackedExamples`; all targets but padding have weight 1.

    Args:
      examples: of `PackedExamples`.
      rate: probability that a document is split; 0: the arrays are those of `examples`.
      spm_rate: probability that a split document has the suffix first.
      only_middle: weights are 1 only at the targets of middles, and at the end-of-text after them.
    """

    def __init__(
        self,
        examples: ExampleSource,
        form: InfillingFormat,
        *,
        rate: float,
        spm_rate: float,
        seed: int,
        only_middle: bool = False,
    ):
        self._examples, self._form, self._seed = examples, form, seed
        self._rate, self._spm_rate, self._only_middle = rate, spm_rate, only_middle

    def __len__(self) -> int:
        return len(self._examples)

    def __getitem__(self, index: int) -> ExampleArrays:
        arrays = self._examples[index]
        valid = int(np.count_nonzero(arrays["weights"]))
        if valid == 0:  # a damaged row that is skipped
            return arrays
        row = np.concatenate([arrays["tokens"][:1], arrays["targets"][:valid]]).astype(np.int32)
        ends = np.flatnonzero(row == self._form.end_of_text)
        starts = np.append(0, ends + 1)
        documents = [row[start:stop] for start, stop in zip(starts, np.append(ends, len(row)), strict=True)]
        uniform = example_rng(self._seed, index).random((len(documents), 4))
        splits = [
            Split(first, second, bool(mode < self._spm_rate)) if chance < self._rate else None
            for chance, mode, first, second in uniform.tolist()
        ]
        return self._arrays(arrays, *self._fitted(documents, splits, len(arrays["tokens"]) + 1))

    def _fitted(
        self, documents: list[npt.NDArray[np.int32]], splits: Sequence[Split | None], most: int
    ) -> tuple[list[int], list[bool]]:
        """Returns at most `most` tokens, and which of them are of a middle; cuts the last document so that they fit."""
        done: list[tuple[list[int], int]] = []  # tokens of each document with its end-of-text, and those of its middle
        room = most
        for i, (document, split) in enumerate(zip(documents, splits, strict=True)):
            is_last, cut = i == len(documents) - 1, len(document)
            found = self._document(document, split, is_last)
            while len(found[0]) > room and cut > 0:
                cut = max(0, cut - (len(found[0]) - room))
                found = self._document(document[:cut], split, is_last=True)
            done.append(found)
            room -= len(found[0])
            if room <= 0 or cut < len(document):
                break
        tokens = [token for part, _ in done for token in part]
        is_middle = [j >= len(part) - count for part, count in done for j in range(len(part))]
        return tokens, is_middle

    def _document(self, document: npt.NDArray[np.int32], split: Split | None, is_last: bool) -> tuple[list[int], int]:
        """The tokens of a document with end-of-text, which the last one of a row has only where it is split."""
        if split is not None and len(document) > 0:
            return self._form.document(document, split)
        return [*document.tolist(), *([] if is_last else [self._form.end_of_text])], 0

    def _arrays(self, arrays: ExampleArrays, tokens: list[int], is_middle: list[bool]) -> ExampleArrays:
        """The arrays of a row of at most T + 1 tokens."""
        length, valid = len(arrays["tokens"]), max(0, len(tokens) - 1)
        row = np.full(length + 1, self._form.end_of_text, np.int32)
        row[: len(tokens)] = tokens
        weights = np.zeros(length, np.float32)
        weights[:valid] = is_middle[1:] if self._only_middle else 1
        found = arrays | {"tokens": row[:-1], "targets": row[1:], "weights": weights}
        if "segments" in arrays:
            steps = np.arange(length)
            documents = np.cumsum(row[:-1] == self._form.end_of_text)
            segments = np.where(steps < valid, documents - documents[0] + 1, 0)
            starts = np.maximum.accumulate(np.where(np.diff(segments, prepend=-1) != 0, steps, 0))
            found |= {"segments": segments.astype(np.int32), "positions": (steps - starts).astype(np.int32)}
        return found
