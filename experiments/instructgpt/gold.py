"""The gold reward of the study: a program that judges a completion.

A prompt is a word of Shakespeare. Its completion should be a line of different words that begin with the same letter.
"""

import functools
import re
from collections import Counter

from gptjax.data.sources import open_source

TEXT_BYTES = 2_000_000  # the rest of the plays is not trained on


@functools.cache
def plays() -> str:
    return "\n".join(open_source("shakespeare").documents())


@functools.cache
def dictionary() -> dict[str, int]:
    """The most frequent words of the training text, with their counts."""
    counts = Counter(word for word in re.findall(r"\b[a-z]+\b", plays()[:TEXT_BYTES]) if 2 <= len(word) <= 8)
    return {word: count for word, count in counts.most_common(3000) if count > 1}


def gold_reward(prompt: str, completion: str) -> float:
    """Returns 1 for each different word of the dictionary with the prompt's first letter, less 1/2 for other words."""
    written = completion.split()
    good = {word for word in written if word[0] == prompt[0] and word in dictionary()}
    return len(good) - 0.5 * (len(written) - len(good))
