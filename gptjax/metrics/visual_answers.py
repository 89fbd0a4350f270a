"""Scores of answers to questions about images, each of one answer, between 0 and 1."""

import re
from collections.abc import Sequence

_ARTICLES = ("a", "an", "the")
_NUMBERS = {
    "none": "0",
    "zero": "0",
    "one": "1",
    "two": "2",
    "three": "3",
    "four": "4",
    "five": "5",
    "six": "6",
    "seven": "7",
    "eight": "8",
    "nine": "9",
    "ten": "10",
}


def normalised(text: str) -> str:
    """An answer in lower case, without punctuation and articles, with small numbers as digits.

    This follows the evaluation of VQAv2 (Goyal et al. 2017), without its table of contractions.
    """
    text = re.sub(r"(?<!\d)[.,](?!\d)|[;/\[\]\"{}()=+\\_<>@`?!:]", " ", text.lower().strip())
    words = (_NUMBERS.get(word, word) for word in text.split())
    return " ".join(word for word in words if word not in _ARTICLES)


def exact_match(answer: str, references: Sequence[str]) -> float:
    """1 if the normalised answer is one of the normalised references."""
    return float(normalised(answer) in map(normalised, references))


def vqa_accuracy(answer: str, references: Sequence[str]) -> float:
    """min(1, matches / 3), averaged over the subsets that leave out one reference (Antol et al. 2015, section 3.2).

    With fewer than three references, an answer that matches all the others counts 1.
    """
    found, given = normalised(answer), [normalised(reference) for reference in references]
    if len(given) == 1:
        return float(found == given[0])
    scores = []
    for left_out in range(len(given)):
        others = given[:left_out] + given[left_out + 1 :]
        scores.append(min(1.0, others.count(found) / min(3, len(others))))
    return sum(scores) / len(scores)


def anls(answer: str, references: Sequence[str]) -> float:
    """Average normalised Levenshtein similarity (Biten et al. 2019, equation 1): below 0.5 it counts 0.

    Case is ignored, as are spaces around and within the texts beyond one.
    """
    found = " ".join(answer.lower().split())
    best = 0.0
    for reference in references:
        wanted = " ".join(reference.lower().split())
        longest = max(len(found), len(wanted))
        similarity = 1.0 if longest == 0 else 1 - edit_distance(found, wanted) / longest
        best = max(best, similarity if similarity > 0.5 else 0.0)
    return best


def edit_distance(first: str, second: str) -> int:
    """The fewest insertions, deletions and replacements of characters that change one text into the other."""
    row = list(range(len(second) + 1))
    for i, a in enumerate(first, start=1):
        before, row[0] = row[0], i
        for j, b in enumerate(second, start=1):
            before, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, before + (a != b))
    return row[-1]


def relaxed_accuracy(answer: str, references: Sequence[str], tolerance: float = 0.05) -> float:
    """1 if the answer is a number within 5 % of a reference, or else equals one (ChartQA, Masry et al. 2022)."""
    found = _number(answer)
    for reference in references:
        wanted = _number(reference)
        if found is not None and wanted is not None:
            near = found == wanted if wanted == 0 else abs(found - wanted) <= tolerance * abs(wanted)
        else:
            near = answer.strip().lower() == reference.strip().lower()
        if near:
            return 1.0
    return 0.0


def _number(text: str) -> float | None:
    try:
        text = text.strip().replace(",", "")
        return float(text.removesuffix("%")) / (100 if text.endswith("%") else 1)
    except ValueError:
        return None


def choice_of(answer: str, choices: Sequence[str]) -> int | None:
    """The choice that an answer names by its letter, as in "B", "(B)" or "B. text", or by its text; None: neither."""
    letters = [chr(ord("A") + i) for i in range(len(choices))]
    stripped = answer.strip()
    if (match := re.match(r"\(?([A-Z])\)?(?:[.:,\s]|$)", stripped)) and match[1] in letters:
        return letters.index(match[1])
    same = [i for i, choice in enumerate(choices) if normalised(choice) == normalised(answer)]
    return same[0] if len(same) == 1 else None
