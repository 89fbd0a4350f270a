"""Scores of short completions against reference answers, as the benchmarks define them, and pass@k.

Each function of a completion and its references returns numbers between 0 and 1, the best over the references.
"""

import functools
import math
import re
import string
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

# A reference is a text, or the texts of several spans, all of which belong to the answer (DROP).
Reference = str | tuple[str, ...]

_PUNCTUATION = str.maketrans("", "", string.punctuation)
_NUMBER = re.compile(r"(-?[$0-9.,]{2,})|(-?[0-9]+)")
_AFTER_HASHES = re.compile(r"#### (-?[0-9.,]+)")
_AFTER_ANSWER_IS = re.compile(r"The answer is (-?[0-9.,]+).")


def exact_match(completion: str, references: Sequence[str]) -> dict[str, float]:
    """Computes `exact_match`: 1 if the completion equals a reference, up to white space at both ends."""
    return {"exact_match": float(completion.strip() in {reference.strip() for reference in references})}


def trivia_match(completion: str, references: Sequence[str]) -> dict[str, float]:
    """Computes `exact_match` up to case and punctuation, as lm-evaluation-harness does for TriviaQA."""

    def plain(text: str) -> str:
        return text.lower().translate(_PUNCTUATION)

    return {"exact_match": float(plain(completion.strip()) in map(plain, references))}


def open_match(completion: str, references: Sequence[str]) -> dict[str, float]:
    """Computes `exact_match` up to case, punctuation and articles before a blank, as lm-evaluation-harness does for
    Natural Questions."""

    def bare(text: str) -> str:
        return re.sub(r"\b(?:The|the|An|A|an|a) ", "", text)

    return trivia_match(bare(completion), [bare(reference) for reference in references])


# --- SQuAD ------------------------------------------------------------------------------------------------------------


def squad_normalised(text: str) -> str:
    """Returns a text in lower case, without punctuation, articles and repeated white space (SQuAD's evaluation)."""
    return " ".join(re.sub(r"\b(a|an|the)\b", " ", text.lower().translate(_PUNCTUATION)).split())


def token_f1(completion: str, reference: str) -> float:
    """Computes the F1 of the words of both normalised texts, counted with repetitions (Rajpurkar et al. 2016, 6.1)."""
    given, wanted = squad_normalised(completion).split(), squad_normalised(reference).split()
    if not given or not wanted:  # no answer (Rajpurkar et al. 2018, section 5)
        return float(given == wanted)
    common = sum((Counter(given) & Counter(wanted)).values())
    return 2 * common / (len(given) + len(wanted))


def squad(completion: str, references: Sequence[str]) -> dict[str, float]:
    """Computes `exact_match` and `f1` as SQuAD defines them.

    Without references, or with empty ones alone, the question has no answer (SQuAD 2.0). The completion is then right
    if nothing is left of it after normalisation, or if it is "unanswerable".
    """
    wanted = [reference for reference in references if squad_normalised(reference)] or [""]
    given = "" if squad_normalised(completion) == "unanswerable" else completion
    return {
        "exact_match": max(float(squad_normalised(given) == squad_normalised(reference)) for reference in wanted),
        "f1": max(token_f1(given, reference) for reference in wanted),
    }


# --- DROP -------------------------------------------------------------------------------------------------------------


def drop(completion: str, references: Sequence[Reference]) -> dict[str, float]:
    """Computes `exact_match` and `f1` of DROP (Dua et al. 2019, section 5).

    The spans of a reference are aligned with those of the completion, which is one span, so that the F1 of the best
    span is divided by the number of spans. A span with numbers counts only if the completion has one of them. As in
    the official evaluation, F1 is rounded to two decimals.
    """
    given = _drop_normalised(completion)
    found = {"exact_match": 0.0, "f1": 0.0}
    for reference in references:
        spans = (reference,) if isinstance(reference, str) else reference
        if not spans[0].strip():
            continue
        wanted = list(map(_drop_normalised, spans))
        f1 = max(_drop_f1(set(given.split()), set(span.split())) for span in wanted) / len(wanted)
        found["exact_match"] = max(found["exact_match"], float(wanted == [given]))
        found["f1"] = max(found["f1"], round(f1, 2))
    return found


def _drop_normalised(text: str) -> str:
    def plain(word: str) -> str:
        word = word if _is_number(word) else word.translate(_PUNCTUATION)
        word = str(float(word)) if _is_number(word) else word
        return " ".join(re.sub(r"\b(a|an|the)\b", " ", word).split())

    return " ".join(filter(None, (plain(word) for word in re.split(r" |-", text.lower()))))


def _drop_f1(given: set[str], wanted: set[str]) -> float:
    numbers = {word for word in wanted if _is_number(word)}
    if numbers and not numbers & given:
        return 0.0
    common = len(given & wanted)
    precision = common / len(given) if given else 1.0
    recall = common / len(wanted) if wanted else 1.0
    return 2 * precision * recall / (precision + recall) if precision + recall else 0.0


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


# --- numbers ----------------------------------------------------------------------------------------------------------


def final_number(completion: str, references: Sequence[str]) -> dict[str, float]:
    """Computes the matches of GSM8K's numbers (Cobbe et al. 2021), as lm-evaluation-harness does.

    `exact_match_strict` reads the number after the first "#### ", in which GSM8K's solutions end, and
    `exact_match_flexible` the last number of the completion. A reference may be a whole solution.
    """
    return _number_matches(_AFTER_HASHES, completion, references)


def stated_number(completion: str, references: Sequence[str]) -> dict[str, float]:
    """Computes the same as `final_number` for solutions that end in "The answer is 5." (Wei et al. 2022, table 20)."""
    return _number_matches(_AFTER_ANSWER_IS, completion, references)


def _number_matches(strict: re.Pattern[str], completion: str, references: Sequence[str]) -> dict[str, float]:
    wanted = set(map(_plain_number, references))
    stated = strict.search(completion)
    numbers = [match[0] for match in _NUMBER.finditer(completion)]
    return {
        "exact_match_strict": float(stated is not None and _plain_number(stated[1]) in wanted),
        "exact_match_flexible": float(bool(numbers) and _plain_number(numbers[-1]) in wanted),
    }


def _plain_number(text: str) -> str:
    without = re.sub(r"(?s).*#### ", "", text.replace(",", "").replace("$", ""))
    return re.sub(r"\.$", "", without).lower()


# --- summaries --------------------------------------------------------------------------------------------------------


def summary_rouge(completion: str, references: Sequence[str]) -> dict[str, float]:
    """Computes `rouge1`, `rouge2` and `rougeL`: F1 of English words after Porter stemming (Lin 2004).

    `text.rouge` compares words of any language, without stemming.
    """
    given = " ".join(completion.split())
    scores = [_stemming_rouge().score(" ".join(reference.split()), given) for reference in references]
    return {name: max(float(score[name].fmeasure) for score in scores) for name in scores[0]}


@functools.cache
def _stemming_rouge() -> Any:
    from rouge_score.rouge_scorer import RougeScorer

    return RougeScorer(["rouge1", "rouge2", "rougeL"], use_stemmer=True)


# --- programs ---------------------------------------------------------------------------------------------------------


def pass_at_k(n: int, correct: int, k: int) -> float:
    """Estimates the probability that one of k samples is correct, without bias: 1 - C(n - c, k) / C(n, k).

    Chen et al. 2021, section 2.1.

    Args:
      n: number of samples, at least k.
      correct: number c of correct ones.
    """
    return 1.0 - math.comb(n - correct, k) / math.comb(n, k)


ANSWER_METRICS: dict[str, Callable[[str, Sequence[str]], dict[str, float]]] = {
    "exact_match": exact_match,
    "trivia_match": trivia_match,
    "open_match": open_match,
    "squad": squad,
    "final_number": final_number,
    "stated_number": stated_number,
}
