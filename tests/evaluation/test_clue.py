"""CLUE's tasks: prompts to the letter from its own files, and the same files as rows to fine-tune on."""

import json
from pathlib import Path
from typing import Any

import pytest

from gptjax.config import UserError
from gptjax.data.labelled import read_rows
from gptjax.evaluation.catalogue import BENCHMARKS, read_benchmark
from gptjax.evaluation.clue_prompts import TNEWS_LABELS

WSC = {
    "target": {"span2_index": 10, "span1_index": 0, "span1_text": "张永红", "span2_text": "他"},
    "idx": 47,
    "label": "true",
    "text": "张永红的外婆去世了，他很难过。",
}
RECORDS: dict[str, dict[str, Any]] = {
    "clue_afqmc": {"sentence1": "能还花呗吗", "sentence2": "花呗怎么还", "label": "0"},
    "clue_tnews": {"label": "103", "label_desc": "news_sports", "sentence": "球队赢了", "keywords": ""},
    "clue_iflytek": {"label": "1", "label_des": "地图导航", "sentence": "告诉你路怎么走"},
    "clue_cmnli": {"sentence1": "天在下雨", "sentence2": "地是湿的", "label": "neutral"},
    "clue_csl": {"id": 1, "abst": "本文研究桥梁。", "keyword": ["桥梁", "结构"], "label": "1"},
    "clue_wsc": WSC,
}
# The options in their order, and the index of the right one.
EXPECTED: dict[str, tuple[list[tuple[str, str]], int]] = {
    "clue_afqmc": (
        [("能还花呗吗\n花呗怎么还\n问题：以上两个句子的意思相同吗？\n答案：", answer) for answer in "是否"],
        1,
    ),
    "clue_tnews": ([(f"这是关于{name}的文章：", "球队赢了") for name in TNEWS_LABELS.values()], 3),
    "clue_iflytek": ([(f"这是关于{name}的应用程序：", "告诉你路怎么走") for name in ("打车", "地图导航")], 1),
    "clue_cmnli": ([(f"天在下雨？{word}，", "地是湿的") for word in ("对", "错", "也许")], 2),
    "clue_csl": (
        [
            ("摘要：本文研究桥梁。\n关键词：桥梁；结构\n问题：以上关键词都是这篇摘要的关键词吗？\n答案：", answer)
            for answer in "是否"
        ],
        0,
    ),
    "clue_wsc": ([(f"{WSC['text']}\n问题：文中的“他”指的是“张永红”吗？\n答案：", answer) for answer in "是否"], 0),
}


def write(path: Path, *records: dict[str, Any]) -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records))
    return f"clue:{path}"


def write_labels(folder: Path) -> None:
    write(folder / "labels.json", {"label": "0", "label_des": "打车"}, {"label": "1", "label_des": "地图导航"})


@pytest.mark.parametrize("name", EXPECTED)
def test_prompts_to_the_letter(name: str, tmp_path: Path) -> None:
    for split in ("train", "dev"):
        write(tmp_path / name / f"{split}.json", RECORDS[name])
    write_labels(tmp_path / name)
    found = read_benchmark(name, 1, tmp_path)
    (example,) = found.asked
    assert (list(example.options), example.answer) == EXPECTED[name]
    assert found.shots == found.asked


def test_every_task_has_an_answer_for_each_of_its_labels(tmp_path: Path) -> None:
    labels = {"afqmc": "01", "csl": "01", "wsc": ("true", "false"), "tnews": TNEWS_LABELS}
    labels["cmnli"] = ("entailment", "neutral", "contradiction")
    for name, values in labels.items():
        records = [RECORDS[f"clue_{name}"] | {"label": label} for label in values]
        write(tmp_path / f"clue_{name}" / "dev.json", *records)
        answers = {example.answer for example in read_benchmark(f"clue_{name}", 0, tmp_path).asked}
        assert answers == set(range(len(records))), name


def test_pairs_without_agreement_are_left_out(tmp_path: Path) -> None:
    record = RECORDS["clue_cmnli"]
    spec = write(tmp_path / "clue_cmnli" / "dev.json", record, record | {"label": "-"})
    assert len(read_benchmark("clue_cmnli", 0, tmp_path).asked) == 1
    assert len(read_rows(spec, "entailment")) == 1


def test_test_splits_have_no_labels(tmp_path: Path) -> None:
    unlabelled = {name: value for name, value in RECORDS["clue_afqmc"].items() if name != "label"}
    write(tmp_path / "clue_afqmc" / "dev.json", unlabelled)
    with pytest.raises(UserError, match=r"dev\.json:1 has no field 'label', which clue_afqmc needs"):
        read_benchmark("clue_afqmc", 0, tmp_path)
    write(tmp_path / "clue_tnews" / "dev.json", RECORDS["clue_tnews"] | {"label": "105"})
    with pytest.raises(UserError, match=r"dev\.json:1 has no label"):
        read_benchmark("clue_tnews", 0, tmp_path)


def test_iflytek_needs_the_names_of_its_classes(tmp_path: Path) -> None:
    write(tmp_path / "clue_iflytek" / "dev.json", RECORDS["clue_iflytek"])
    with pytest.raises(UserError, match=r"clue_iflytek needs --benchmark_dir"):
        read_benchmark("clue_iflytek", 0)
    with pytest.raises(UserError, match=r"has no .*clue_iflytek/labels\.json"):
        read_benchmark("clue_iflytek", 0, tmp_path)
    write(tmp_path / "clue_iflytek" / "labels.json", {"label": 0, "label_des": "打车"})
    with pytest.raises(UserError, match=r"labels\.json:1 needs the texts label and label_des"):
        read_benchmark("clue_iflytek", 0, tmp_path)


@pytest.mark.parametrize(
    ("name", "kind", "fields"),
    [
        ("clue_afqmc", "similarity", {"first": "能还花呗吗", "second": "花呗怎么还", "label": "0"}),
        ("clue_tnews", "classification", {"text": "球队赢了", "label": "103"}),
        ("clue_iflytek", "classification", {"text": "告诉你路怎么走", "label": "1"}),
        ("clue_cmnli", "entailment", {"premise": "天在下雨", "hypothesis": "地是湿的", "label": "neutral"}),
        ("clue_csl", "entailment", {"premise": "本文研究桥梁。", "hypothesis": "桥梁；结构", "label": "1"}),
        ("clue_wsc", "classification", {"text": "_张永红_的外婆去世了，[他]很难过。", "label": "true"}),
    ],
)
def test_rows_to_fine_tune_on(name: str, kind: str, fields: dict[str, str], tmp_path: Path) -> None:
    (row,) = read_rows(write(tmp_path / "train.json", RECORDS[name]), kind)
    assert row.fields == fields
    unlabelled = {key: value for key, value in RECORDS[name].items() if key != "label"}
    (row,) = read_rows(write(tmp_path / "test.json", unlabelled), kind, labelled=False)
    assert row.fields == {role: text for role, text in fields.items() if role != "label"}


@pytest.mark.parametrize(
    ("record", "message"),
    [
        (WSC | {"target": WSC["target"] | {"span2_index": 11}}, r"'他' is not at character 11 of the text"),
        (WSC | {"target": {"span1_index": 0}}, r"has no field 'span1_text', which CLUE's tasks have"),
        (WSC | {"target": 3}, r"test\.json:1: "),
        (RECORDS["clue_csl"] | {"keyword": "桥梁"}, r"keyword='桥梁' is not a list of texts"),
    ],
)
def test_a_malformed_record_is_named(record: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=message):
        read_rows(write(tmp_path / "test.json", record), "classification")


def test_names_are_those_of_the_hub() -> None:
    configs = {BENCHMARKS[name].dataset for name in EXPECTED}
    assert configs == {f"hf:clue/clue@{n}" for n in ("afqmc", "tnews", "iflytek", "cmnli", "csl", "cluewsc2020")}
