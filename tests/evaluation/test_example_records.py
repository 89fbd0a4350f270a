"""Interrupted evaluations resume with the same results, and nothing is scored twice."""

import errno
import json
from contextlib import nullcontext

import numpy as np
import pytest

from gptjax.config import UserError
from gptjax.evaluation import example_records as records
from gptjax.evaluation.example_records import file_name, score_resumably
from gptjax.evaluation.scoring import Scorer

from .test_scoring import random_requests


class Counting(Scorer):
    """Counts the batches, and is killed when it has done `left` of them."""

    def __init__(self, *args, left=10**9, **kwargs):
        super().__init__(*args, **kwargs)
        self.done, self.left = 0, left

    def score_batch(self, requests, batch):
        if self.done == self.left:
            raise KeyboardInterrupt
        self.done += 1
        return super().score_batch(requests, batch)


def test_a_killed_evaluation_goes_on_to_the_same_numbers(tiny, tmp_path):
    requests = random_requests(21)

    def scorer(left=10**9):
        return Counting(tiny.model, tiny.params, batch_size=4, left=left)

    whole = scorer()
    expected = score_resumably(tmp_path / "whole", "task", whole, 7, requests)
    assert expected == Scorer(tiny.model, tiny.params, batch_size=4).scores(requests)
    with pytest.raises(KeyboardInterrupt):
        score_resumably(tmp_path / "cut", "task", scorer(left=2), 7, requests)
    (path,) = (tmp_path / "cut").iterdir()
    content = path.read_bytes()
    path.write_bytes(content[:-5])  # the last line was cut off
    again = scorer()
    assert score_resumably(tmp_path / "cut", "task", again, 7, requests) == expected
    assert again.done == whole.done - 1  # of the two batches done, the torn one is done again
    third = scorer()
    assert score_resumably(tmp_path / "cut", "task", third, 7, requests) == expected
    assert third.done == 0
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert {line["index"] for line in lines} == set(range(21))


def test_two_evaluations_of_one_key_do_not_cut_each_other_s_lines(tiny, tmp_path, capsys):
    requests = random_requests(12)
    expected = Scorer(tiny.model, tiny.params, batch_size=4).scores(requests)
    second = []

    class Interrupted(Counting):
        """Another evaluation begins and ends while this one is in the middle of a line."""

        def score_batch(self, requests, batch):
            if self.done == 1:
                (path,) = tmp_path.iterdir()
                line = path.read_bytes().splitlines(keepends=True)[0]
                with path.open("ab") as file:
                    file.write(line[:20])
                other = Counting(tiny.model, tiny.params, batch_size=4)
                second.append(score_resumably(tmp_path, "task", other, 7, requests))
                second.append(other.done)
                with path.open("ab") as file:
                    file.write(line[20:])
            return super().score_batch(requests, batch)

    first = Interrupted(tiny.model, tiny.params, batch_size=4)
    assert score_resumably(tmp_path, "task", first, 7, requests) == expected
    assert second == [expected, first.done - 1]  # the batch that was recorded is not computed again
    assert "is in use by another evaluation" in capsys.readouterr().err
    third = Counting(tiny.model, tiny.params, batch_size=4)
    assert score_resumably(tmp_path, "task", third, 7, requests) == expected
    assert third.done == 0
    assert len(list(tmp_path.iterdir())) == 2


def test_a_file_system_without_locks(tiny, tmp_path, monkeypatch):
    def flock(*_):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(records.fcntl, "flock", flock)
    requests, done = random_requests(12), []
    for left in (1, 10**9, 10**9):
        scorer = Counting(tiny.model, tiny.params, batch_size=4, left=left)
        with nullcontext() if left > 1 else pytest.raises(KeyboardInterrupt):
            scores = score_resumably(tmp_path, "task", scorer, 7, requests)
        done.append(scorer.done)
    assert scores == Scorer(tiny.model, tiny.params, batch_size=4).scores(requests)
    assert done == [1, len(scorer.plan(requests)) - 1, 0]


def test_scores_of_anything_else_are_not_taken(tiny, tmp_path):
    requests = random_requests(3)

    def score(step=7, params=tiny.params, requests=requests, name="task"):
        scorer = Counting(tiny.model, params)
        score_resumably(tmp_path, name, scorer, step, requests)
        return scorer.done

    assert score() > 0
    assert score() == 0
    assert score(step=8) > 0
    assert score(requests=requests[:2]) > 0
    other = requests[0]._replace(tokens=np.append(requests[0].tokens[:-1], 3).astype(np.int32))
    assert score(requests=[other, *requests[1:]]) > 0
    assert score(requests=[requests[0]._replace(scored=requests[0].scored % 2 + 1), *requests[1:]]) > 0
    norm = {"scale": tiny.params["final_norm"]["scale"] * 2, "bias": tiny.params["final_norm"]["bias"]}
    assert score(params={**tiny.params, "final_norm": norm}) > 0
    assert score() == 0


def test_a_damaged_record_is_named(tiny, tmp_path):
    requests = random_requests(3)
    score_resumably(tmp_path, "task", Scorer(tiny.model, tiny.params), 7, requests)
    (path,) = tmp_path.iterdir()
    path.write_text("garbage\n" + path.read_text())
    with pytest.raises(UserError, match=r"jsonl:1 is not a valid record"):
        score_resumably(tmp_path, "task", Scorer(tiny.model, tiny.params), 7, requests)


def test_a_directory_that_cannot_be_written(tiny, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot write"):
        score_resumably(tmp_path / "file" / "scores", "task", Scorer(tiny.model, tiny.params), 7, random_requests(1))


def test_file_names():
    assert file_name("perplexity:text:/data/*.txt") == "perplexity_text_data_.txt"
    assert file_name("lambada") == "lambada"
    assert file_name("...") == "task"
