"""The gold reward of the study: a program that judges a completion.

A prompt is a word. Its completion should be a line of different words that begin with the same letter.
"""

from pathlib import Path


def gold_reward(prompt: str, completion: str, dictionary: frozenset[str]) -> float:
    """Returns 1 for each different word of the dictionary with the prompt's first letter, less 1/2 for other words."""
    written = completion.split()
    good = {word for word in written if word[0] == prompt[0] and word in dictionary}
    return len(good) - 0.5 * (len(written) - len(good))


def read_dictionary(data: Path) -> frozenset[str]:
    """Reads the words that `task.py` wrote."""
    return frozenset((data / "words.txt").read_text().split())
