"""The text of a batch: what is in the loss, segments, special tokens, and lengths, for each stage."""

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from gptjax.config import Config, replace
from gptjax.data.pipeline import open_corpus
from gptjax.stages.batch_text import show
from tests.tiny_chats import config_of, rl_config
from tests.tiny_tasks import run_config


def lines_of(text: str, start: str) -> list[str]:
    """The lines of the part of a text that begins with `start`."""
    (part,) = [part for part in text.split("\n\n") if part.startswith(start)]
    return part.splitlines()[1:]


def test_pretraining_rows_are_the_text_with_its_segments(tiny: Config) -> None:
    config = replace(
        tiny, {"data": {"packing": "segment"}, "model": {"context_length": 400}, "batch": {"tokens_per_batch": 3200}}
    )
    text = show(config, rows=1)
    lines = lines_of(text, "row 0")
    corpus = open_corpus(config.data, context_length=400, seed=config.seed)
    segments = corpus.train[0]["segments"]
    assert [int(re.findall(r"segment (\d+)", line)[0]) for line in lines if "in loss" in line] == np.unique(
        segments
    ).tolist()
    counts = [int(re.findall(r"(\d+) tokens", line)[0]) for line in lines]
    assert sum(counts) == 401  # the inputs, and the last target
    assert "neighbours. 1" in lines[-1] or "says: " in "".join(lines)
    total = f"lengths of {corpus.train.split.num_documents} training documents"
    assert total in text
    bins = [int(line.split()[3]) for line in lines_of(text, "lengths of")]
    assert sum(bins) == corpus.train.split.num_documents


@pytest.mark.parametrize(
    ("objective", "pattern"),
    [
        ("masked", r'in loss +\d+ tokens  "[^"]*", to predict "'),
        ("prefix", r"segment 1    prefix"),
        ("fill_in_the_middle", r"<\|fim_(prefix|suffix)\|>"),
    ],
)
def test_objectives(tiny: Config, objective: str, pattern: str) -> None:
    changes: dict[str, Any] = {"data": {"objective": objective, "fim_rate": 1.0}, "model": {"context_length": 32}}
    assert re.search(pattern, show(replace(tiny, changes), rows=4))


def test_conversations_show_the_loss_mask_and_special_tokens(tmp_path: Path, pretrained: Path) -> None:
    text = show(config_of("sft", tmp_path, pretrained), rows=1)
    lines = lines_of(text, "row 0")
    assert re.fullmatch(r'  segment 1    - +\d+ tokens  "<\|endoftext\|>q\d+<\|a\|>"', lines[0])
    assert re.fullmatch(r'  segment 1    in loss +\d+ tokens  "(a|b)+<\|end\|>"', lines[1])
    assert "lengths of" in text


def test_rankings_show_ranks(tmp_path: Path, pretrained: Path) -> None:
    text = show(config_of("dpo", tmp_path, pretrained), rows=1)
    assert lines_of(text, "element 0, row 0")[1].endswith('"aa<|end|>"')
    assert "ranks of the sequences, for each prompt: [[1, 2" in text


def test_policies_show_prompts(tmp_path: Path, pretrained: Path) -> None:
    text = show(rl_config("grpo", tmp_path, pretrained), rows=2)
    assert text.count("prompt ") == 2
    assert re.search(r'"<\|endoftext\|>q\d+<\|a\|>"', text)


@pytest.mark.parametrize("kind", ["classification", "multiple_choice", "tagging", "question_answering"])
def test_labelled_rows_show_their_labels(tmp_path: Path, pretrained: Path, kind: str) -> None:
    text = show(run_config(tmp_path, kind, pretrained), rows=1)
    expected = {
        "classification": r'"<start>(bad|fair|good) \d+<extract>", then \d+ of padding\n  labels: (bad|fair|good)',
        "multiple_choice": r"<delimiter>.*<extract>.*\n.*<delimiter>.*\n(.*\n)*  labels: \d",
        "tagging": r"labels \(position: value\): \d+: \w+",
        "question_answering": r"starts: \d+\n  stops: \d+",
    }
    assert re.search(expected[kind], text), text
