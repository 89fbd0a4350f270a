"""Word segmentation for metrics and retrieval, in any script."""

import re
from collections.abc import Sequence

# Scripts without blanks between words: kana, and CJK ideographs.
WITHOUT_BLANKS = "\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003fa1f"
KANA = re.compile("[\u3041-\u3096\u30a1-\u30fa]")  # letters only, without marks that Chinese uses too
WORD = re.compile(rf"[{WITHOUT_BLANKS}]|[^\W_{WITHOUT_BLANKS}]+")


def words(text: str) -> list[str]:
    """Splits a text into lower-case words without punctuation; in scripts without blanks, into characters."""
    return WORD.findall(text.lower())


def is_written_without_blanks(texts: Sequence[str]) -> bool:
    """Whether most words of the texts are in a script without blanks."""
    found = [word for text in texts for word in words(text)]
    return 2 * sum(bool(re.match(f"[{WITHOUT_BLANKS}]", word)) for word in found) > len(found)
