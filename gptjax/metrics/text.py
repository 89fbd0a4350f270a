"""How alike texts are, and how varied: BLEU and ROUGE, as the packages that papers quote compute them, and distinct-n.

Of pairs, for rewards, and of a corpus, for reports. Texts may be of any language: what is written without blanks, as
Chinese is, is compared character by character.
"""

from collections.abc import Sequence
from functools import cache
from typing import Any

from gptjax.data.words import KANA, is_written_without_blanks, words

ROUGES = ("rouge1", "rouge2", "rougeL")


def bleu(answer: str, reference: str) -> float:
    """Sentence BLEU in [0, 1], smoothed by halving for each order of n-grams without a match (Chen and Cherry 2014,
    method 3): 1 for the same text, 0 where no word is the same."""
    if not answer.strip() or not reference.strip():
        return 0.0
    score = _bleu(_tokenizer([reference]), effective_order=True).sentence_score(answer, [reference]).score
    return min(score / 100, 1.0)


def rouge_l(answer: str, reference: str) -> float:
    """ROUGE-L in [0, 1]: F1 of the longest words in common, in their order (Lin 2004, section 3.1)."""
    return rouge(answer, reference)["rougeL"]


def rouge(answer: str, reference: str) -> dict[str, float]:
    """F1 of each of ROUGES; words are compared as they are, not by their stems."""
    return {name: float(score.fmeasure) for name, score in _rouge().score(reference, answer).items()}


def corpus_bleu(answers: Sequence[str], references: Sequence[str]) -> tuple[float, str]:
    """BLEU in [0, 1] of all pairs together (Papineni et al. 2002), and sacrebleu's signature of how it was computed."""
    metric = _bleu(_tokenizer(references), effective_order=False)
    score = metric.corpus_score(list(answers), [list(references)]).score
    return min(score / 100, 1.0), str(metric.get_signature())


def distinct(texts: Sequence[str], n: int) -> float:
    """Different n-grams of words over all of them, within the texts (Li et al. 2016, section 5.3); 0 of none."""
    grams = [tuple(of_text[i : i + n]) for of_text in map(words, texts) for i in range(len(of_text) - n + 1)]
    return len(set(grams)) / len(grams) if grams else 0.0


def _tokenizer(references: Sequence[str]) -> str:
    """sacrebleu's tokenizer for such texts: its zh leaves kana together, so Japanese is split into characters."""
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
        """In place of the package's own, for which a word is of the letters a to z."""

        def tokenize(self, text: str) -> list[str]:
            return words(text)

    return RougeScorer(list(ROUGES), tokenizer=Words())
