"""Records of CLUE's tasks (Xu et al. 2020, "CLUE: A Chinese Language Understanding Evaluation Benchmark").

The files of AFQMC, TNEWS, IFLYTEK, CMNLI, CSL and WSC have one JSON object a line, with fields that differ by task. The
functions here bring them to the columns of `gptjax/data/labelled.py`.
"""

from collections.abc import Mapping
from typing import Any

NO_LABEL = "-"  # the label of pairs on which the annotators of CMNLI did not agree
KEYWORD_SEPARATOR = "；"


def flat_record(record: Mapping[str, Any], unlabelled: Any) -> dict[str, Any]:
    """Returns a record of any of the tasks with texts only.

    Args:
      record: of the JSON file.
      unlabelled: value in place of the label "-".

    Returns:
      The record; CSL's abstract and keywords become sentence1 and sentence2, and WSC's text has its two spans marked.

    Raises:
      KeyError: a field of WSC's target is missing.
      ValueError: a span of WSC's target is not in the text, or a list of keywords is none.
    """
    flat = dict(record)
    if "abst" in record and "keyword" in record:
        flat |= {"sentence1": flat.pop("abst"), "sentence2": keywords_text(flat.pop("keyword"))}
    if "target" in record:
        del flat["target"]
        flat["text"] = marked_text(record)
    if record.get("label") == NO_LABEL:
        flat["label"] = unlabelled
    return flat


def keywords_text(keywords: Any) -> str:
    if not (isinstance(keywords, list) and all(isinstance(keyword, str) for keyword in keywords)):
        raise ValueError(f"keyword={keywords!r} is not a list of texts")
    return KEYWORD_SEPARATOR.join(keywords)


def marked_text(record: Mapping[str, Any]) -> str:
    """WSC's text with underscores around the noun and brackets around the pronoun."""
    target, text = record["target"], record["text"]
    spans = []
    for name, before, after in (("span1", "_", "_"), ("span2", "[", "]")):
        start, words = target[f"{name}_index"], target[f"{name}_text"]
        if text[start : start + len(words)] != words:
            raise ValueError(f"{name}_text={words!r} is not at character {start} of the text")
        spans.append((start, words, f"{before}{words}{after}"))
    for start, words, marked in sorted(spans, reverse=True):  # the last one first, which moves no other
        text = text[:start] + marked + text[start + len(words) :]
    return text
