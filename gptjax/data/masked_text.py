"""Examples of the masked language model and of the prefix language model.

Both wrap `PackedExamples`. What they sample for an example depends on the seed and the example's number alone, so that
it is the same when a run is resumed, or has another number of processes.
"""

import numpy as np
import numpy.typing as npt

from gptjax.data.pipeline import ExampleArrays, ExampleSource
from gptjax.data.tokenizers import Tokenizer
from gptjax.data.words import WORD

MASKED, RANDOM = 0.8, 0.1  # shares of the selected tokens that are masked and replaced; the others stay as they are


def example_rng(seed: int, index: int) -> np.random.Generator:
    """Returns the random generator of an example, independent of the order of the examples."""
    return np.random.Generator(np.random.Philox(np.random.SeedSequence([seed % 2**64, index, 1])))


class MaskedExamples:
    """Examples of the masked language model (Devlin et al. 2019, section 3.1 and appendix A.1).

    Each token of the text, or each word, is selected with probability `rate`; where none is, one is chosen.
    A selected token becomes the mask token with probability 0.8, a random token of the vocabulary with 0.1, and stays
    with 0.1, independently of the other tokens of its word. End-of-text is neither selected nor sampled.

    The arrays of an example, each (T,): tokens, int32; targets, int32, the original token at the same position;
    weights, float32, 1 at the selected positions; segments and positions as in `PackedExamples`. With
    packing="concatenate" the row is segment 1. Padding is segment 0.

    Args:
      examples: of `PackedExamples`.
      mask_token: id of the mask token.
      end_of_text: id of the token that separates documents.
      ordinary_tokens: number of ids below those of special tokens, from which random tokens are sampled.
      word_starts: result of `WordStarts`, for whole-word masking. None: tokens are selected one by one.
    """

    def __init__(
        self,
        examples: ExampleSource,
        *,
        mask_token: int,
        end_of_text: int,
        ordinary_tokens: int,
        rate: float,
        seed: int,
        word_starts: "WordStarts | None" = None,
    ):
        self._examples, self._mask_token, self._end_of_text = examples, mask_token, end_of_text
        self._ordinary_tokens, self._rate, self._seed, self._word_starts = ordinary_tokens, rate, seed, word_starts

    def __len__(self) -> int:
        return len(self._examples)

    def __getitem__(self, index: int) -> ExampleArrays:
        arrays, rng = self._examples[index], example_rng(self._seed, index)
        tokens, segments = arrays["tokens"].astype(np.int32), with_segments(arrays)
        text = (segments > 0) & (tokens != self._end_of_text) & (tokens != self._mask_token)
        units = np.arange(len(tokens))
        if self._word_starts is not None:
            starts = self._word_starts(tokens) | ~text | np.append(True, segments[1:] != segments[:-1])
            units = np.cumsum(starts) - 1
        selected = (rng.random(len(tokens)) < self._rate)[units] & text
        if not selected.any() and text.any():
            selected = (units == units[rng.choice(np.flatnonzero(text))]) & text
        action, other = rng.random(len(tokens)), rng.integers(0, self._ordinary_tokens - 1, len(tokens))
        other += other >= self._end_of_text
        corrupted = np.where(action < MASKED, self._mask_token, np.where(action < MASKED + RANDOM, other, tokens))
        return arrays | {
            "tokens": np.where(selected, corrupted, tokens).astype(np.int32),
            "targets": tokens,
            "weights": selected.astype(np.float32),
            "segments": segments,
        }


class WordStarts:
    """Finds the tokens that begin a word: bool (T,) from int (T,).

    A token belongs to the word of the token before it where both the character before the boundary and the one behind
    it are letters or digits, of a script with blanks between words. Punctuation is a word of its own, and so is a token
    of white space. Parts of a character count as letters.

    Args:
      tokenizer: `special_tokens.is_concatenative`.
    """

    def __init__(self, tokenizer: Tokenizer):
        texts = [tokenizer.decode([token]) for token in range(tokenizer.vocab_size)]
        self._first_joins = np.array([_in_word(text[:1]) for text in texts])
        self._last_joins = np.array([_in_word(text[-1:]) for text in texts])

    def __call__(self, tokens: npt.NDArray[np.int32]) -> npt.NDArray[np.bool_]:
        joined = self._last_joins[tokens[:-1]] & self._first_joins[tokens[1:]]
        return np.append(True, ~joined)


def _in_word(character: str) -> bool:
    found = WORD.match(character + "a")  # a character of a script without blanks is matched alone
    return character == "\ufffd" or (found is not None and found.end() == 2)


class PrefixExamples:
    """Examples of the prefix language model (Raffel et al. 2020, section 3.2.1, figure 4).

    The prefix of a segment is its first p inputs, p uniform in 1 to their number. Attention is bidirectional within it
    and causal after it (`models.dot_product.attention_mask`), and the loss is that of the targets after it.

    The arrays of an example are those of `PackedExamples` with weights 0 at targets within a prefix, and with segments
    of negative sign at the positions of a prefix. With packing="concatenate" the row is one segment.

    Args:
      examples: of `PackedExamples`.
    """

    def __init__(self, examples: ExampleSource, *, seed: int):
        self._examples, self._seed = examples, seed

    def __len__(self) -> int:
        return len(self._examples)

    def __getitem__(self, index: int) -> ExampleArrays:
        arrays = self._examples[index]
        segments, steps = with_segments(arrays), np.arange(len(arrays["tokens"]))
        uniform = example_rng(self._seed, index).random(len(segments) + 1)
        starts = np.flatnonzero(np.append(True, segments[1:] != segments[:-1]))
        lengths = np.diff(np.append(starts, len(segments)))
        number = np.repeat(np.arange(len(starts)), lengths)  # of the segment that a position is in, from 0
        prefix = 1 + (uniform[: len(starts)] * lengths).astype(int)
        step = steps - starts[number]
        return arrays | {
            "weights": np.where(step >= prefix[number] - 1, arrays["weights"], 0).astype(np.float32),
            "segments": np.where(step < prefix[number], -segments, segments).astype(np.int32),
        }


def with_segments(arrays: ExampleArrays) -> npt.NDArray[np.int32]:
    """Returns the segments of an example, int32 (T,); without packed segments 1, and 0 at padding."""
    segments = arrays["segments"] if "segments" in arrays else arrays["weights"] > 0
    return segments.astype(np.int32)
