"""Examples of CLUE's Chinese tasks (Xu et al. 2020), made of the records of its JSON files.

CMNLI, TNEWS and IFLYTEK: each label is written before the text, and the label is chosen that makes the text most
probable, with the prompts of Zhang et al. 2020 ("CPM: A Large-scale Generative Chinese Pre-trained Language Model",
section 4.1; theirs for OCNLI serves CMNLI). That paper draws three wrong labels for each text; all are options here.
AFQMC, CSL and WSC: a question and the answers "yes" and "no"; these prompts are our own.
"""

from typing import Any

from gptjax.data.clue import NO_LABEL, keywords_text
from gptjax.evaluation.tasks import TaskExample

_YES_NO = ("是", "否")
_ENTAILMENT = {"entailment": "对", "contradiction": "错", "neutral": "也许"}
TNEWS_LABELS = {
    "100": "故事",
    "101": "文化",
    "102": "娱乐",
    "103": "体育",
    "104": "财经",
    "106": "房产",
    "107": "汽车",
    "108": "教育",
    "109": "科技",
    "110": "军事",
    "112": "旅游",
    "113": "国际",
    "114": "股票",
    "115": "农业",
    "116": "游戏",
}


def afqmc(record: dict[str, Any]) -> list[TaskExample]:
    """Whether two questions of bank customers mean the same."""
    shown = f"{record['sentence1']}\n{record['sentence2']}"
    return _asked(shown, "以上两个句子的意思相同吗？", {"1": 0, "0": 1}.get(str(record["label"]), -1))


def csl(record: dict[str, Any]) -> list[TaskExample]:
    """Whether all keywords are those of an abstract."""
    shown = f"摘要：{record['abst']}\n关键词：{keywords_text(record['keyword'])}"
    return _asked(shown, "以上关键词都是这篇摘要的关键词吗？", {"1": 0, "0": 1}.get(str(record["label"]), -1))


def wsc(record: dict[str, Any]) -> list[TaskExample]:
    """Whether a pronoun refers to a noun."""
    target = record["target"]
    question = f"文中的“{target['span2_text']}”指的是“{target['span1_text']}”吗？"
    return _asked(record["text"], question, {"true": 0, "false": 1}.get(str(record["label"]).lower(), -1))


def _asked(shown: str, question: str, answer: int) -> list[TaskExample]:
    context = f"{shown}\n问题：{question}\n答案："
    return [TaskExample(tuple((context, option) for option in _YES_NO), answer, question=shown)]


def cmnli(record: dict[str, Any]) -> list[TaskExample]:
    """Whether a sentence follows from another; pairs whose label is "-" are left out."""
    label = str(record["label"])
    if label == NO_LABEL:
        return []
    options = tuple((f"{record['sentence1']}？{word}，", record["sentence2"]) for word in _ENTAILMENT.values())
    return [TaskExample(options, _index(label, _ENTAILMENT))]


def tnews(record: dict[str, Any]) -> list[TaskExample]:
    """The topic of a headline, one of 15."""
    return _labelled("这是关于{}的文章：", record, TNEWS_LABELS)


def iflytek(record: dict[str, Any]) -> list[TaskExample]:
    """The category of an app by its description, one of 119."""
    return _labelled("这是关于{}的应用程序：", record, record["label_names"])


def _labelled(prompt: str, record: dict[str, Any], names: dict[str, str]) -> list[TaskExample]:
    options = tuple((prompt.format(name), record["sentence"]) for name in names.values())
    return [TaskExample(options, _index(str(record["label"]), names))]


def _index(label: str, names: dict[str, str]) -> int:
    return [*names].index(label) if label in names else -1
