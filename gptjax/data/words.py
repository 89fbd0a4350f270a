"""The words of a text in any script, as metrics and searches compare them."""

import re
from collections.abc import Sequence

# What is written without blanks between words: kana, and the ideographs of Chinese, Japanese and Korean.
_WITHOUT_BLANKS = "\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003fa1f"
KANA = re.compile("[\u3041-\u3096\u30a1-\u30fa]")  # letters, without the marks that Chinese has too
WORD = re.compile(rf"[{_WITHOUT_BLANKS}]|[^\W_{_WITHOUT_BLANKS}]+")


def words(text: str) -> list[str]:
    """The words without punctuation, in lower case; of what is written without blanks each character is one."""
    return WORD.findall(text.lower())


def is_written_without_blanks(texts: Sequence[str]) -> bool:
    """Whether most of the words are of such a script."""
    found = [word for text in texts for word in words(text)]
    return 2 * sum(bool(re.match(f"[{_WITHOUT_BLANKS}]", word)) for word in found) > len(found)
