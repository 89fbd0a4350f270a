"""Text metrics: BLEU (sacrebleu), ROUGE (rouge-score) and distinct-n.

For pairs, as rewards, and for corpora, in reports. Text of scripts without spaces, such as Chinese, is compared
character by character.
"""

from collections.abc import Sequence
from functools import cache
from typing import Any

import numpy as np
import numpy.typing as npt

from gptjax.data.words import KANA, is_written_without_blanks, words

ROUGES = ("rouge1", "rouge2", "rougeL")


def bleu(completion: str, reference: str) -> float:
    """Computes sentence BLEU in [0, 1] with exponential smoothing (Chen and Cherry 2014, method 3).

    1 for equal texts, 0 without a common word.
    """
    if not completion.strip() or not reference.strip():
        return 0.0
    score = _bleu(_tokenizer([reference]), effective_order=True).sentence_score(completion, [reference]).score
    return min(score / 100, 1.0)


def rouge_l(completion: str, reference: str) -> float:
    """Computes ROUGE-L in [0, 1]: F1 by the longest common subsequence of words (Lin 2004, section 3.1)."""
    return rouge(completion, reference)["rougeL"]


def rouge(completion: str, reference: str) -> dict[str, float]:
    """Computes the F1 of each of ROUGES, without stemming."""
    return {name: float(score.fmeasure) for name, score in _rouge().score(reference, completion).items()}


def corpus_bleu(completions: Sequence[str], references: Sequence[str]) -> tuple[float, str]:
    """Computes corpus BLEU in [0, 1] (Papineni et al. 2002); returns it and sacrebleu's signature."""
    metric = _bleu(_tokenizer(references), effective_order=False)
    score = metric.corpus_score(list(completions), [list(references)]).score
    return min(score / 100, 1.0), str(metric.get_signature())


def bleu_terms(
    completions: Sequence[str], references: Sequence[str] | Sequence[Sequence[str]]
) -> npt.NDArray[np.float64]:
    """Returns what each completion adds to corpus BLEU, float64 (completions, 10).

    The columns are the matching n-grams of the orders 1 to 4, all n-grams of these orders, and the lengths of
    completion and reference.

    Args:
      references: one of each completion, or several, of which the one of the closest length counts for the length.
    """
    several = [[other] if isinstance(other, str) else list(other) for other in references]
    metric = _bleu(_tokenizer([text for others in several for text in others]), effective_order=False)
    scores = (
        metric.corpus_score([text], [[other] for other in others])
        for text, others in zip(completions, several, strict=True)
    )
    return np.array([[*score.counts, *score.totals, score.sys_len, score.ref_len] for score in scores], np.float64)


def bleu_of_sums(sums: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """Computes corpus BLEU in [0, 1] from sums of `bleu_terms` over pairs, float64 (N, 10) -> (N,)."""
    from sacrebleu.metrics import BLEU

    rows = [[int(number) for number in row] for row in sums]
    scores = [BLEU.compute_bleu(row[:4], row[4:8], row[8], row[9], smooth_method="exp").score for row in rows]
    return np.minimum(np.array(scores) / 100, 1.0)


def distinct(texts: Sequence[str], n: int) -> float:
    """Computes the ratio of distinct to all word n-grams within the texts (Li et al. 2016, section 5.3); 0 if none."""
    grams = [tuple(of_text[i : i + n]) for of_text in map(words, texts) for i in range(len(of_text) - n + 1)]
    return len(set(grams)) / len(grams) if grams else 0.0


def _tokenizer(references: Sequence[str]) -> str:
    """Returns the name of sacrebleu's tokenizer. Its "zh" does not split kana, so Japanese is split into characters."""
    if not is_written_without_blanks(references):
        return "13a"
    return "char" if any(KANA.search(text) for text in references) else "zh"


@cache
def _bleu(tokenize: str, effective_order: bool) -> Any:
    from sacrebleu.metrics import BLEU

    return BLEU(tokenize=tokenize, smooth_method="exp", effective_order=effective_order)


@cache
def _rouge() -> Any:
    from rouge_score.rouge_scorer import RougeScorer

    class Words:
        """Splits any language into words; the package's own tokenizer keeps only a to z and digits."""

        def tokenize(self, text: str) -> list[str]:
            return words(text)

    return RougeScorer(list(ROUGES), tokenizer=Words())
