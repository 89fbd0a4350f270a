"""data.mixture and data.mixture_schedule: how they are written, saved and refused."""

from pathlib import Path

import pytest

from gptjax import config as c
from gptjax.config import UserError, load_config

ROOT = Path(__file__).parents[2]
GPT2 = f"{ROOT}/configs/gpt2.py:runlocal"
TWO = "('sotu', 3), ('shakespeare', 1)"


def test_a_mixture_is_set_on_the_command_line_and_kept_in_config_json(tmp_path: Path) -> None:
    schedule = "[(1_000_000, (1, 1)), (2_000_000, (0, 0.5))]"
    config = load_config(GPT2, {"data.mixture": TWO, "data.mixture_schedule": schedule})
    assert config.data.mixture == (("sotu", 3.0), ("shakespeare", 1.0))
    assert config.data.mixture_schedule == ((1_000_000, (1.0, 1.0)), (2_000_000, (0.0, 0.5)))
    (tmp_path / "config.json").write_text(c.to_json(config))
    assert load_config(str(tmp_path)) == config
    assert load_config(str(tmp_path), {"data.mixture": "", "data.mixture_schedule": ""}).data.mixture == ()


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"mixture": "('sotu', 0), ('shakespeare', 1)"}, "data.mixture has the weight 0.0 for 'sotu'"),
        ({"mixture": "('sotu', -1), ('shakespeare', 1)"}, "data.mixture has the weight -1.0 for 'sotu'"),
        ({"mixture": (("sotu", float("nan")), ("shakespeare", 1.0))}, "data.mixture=nan must be a finite number"),
        ({"mixture": "('sotu', 1e999), ('shakespeare', 1)"}, "data.mixture=inf must be a finite number"),
        ({"mixture": "('sotu', 1), ('sotu', 2)"}, "data.mixture has 'sotu' twice"),
        ({"mixture": "sotu,shakespeare"}, r"data.mixture\[0\]='sotu' is not a tuple"),
        ({"mixture": "('sotu', 'much'),"}, r"data.mixture\[0\]\[1\]='much' is not of type float"),
        ({"mixture": TWO, "source": "text:a.txt"}, "data.source=text:a.txt and data.mixture exclude each other"),
        ({"mixture": TWO, "validation_source": "sotu"}, "data.validation_source=sotu is for data.source"),
        ({"mixture_schedule": "(10, (1, 1)),"}, "data.mixture_schedule changes the weights of data.mixture, which is"),
        ({"mixture": TWO, "mixture_schedule": "(10, (1, 1, 1)),"}, "at 10 tokens has 3 weights, and data.mixture 2"),
        ({"mixture": TWO, "mixture_schedule": "(10, (1, -1)),"}, "at 10 tokens: the weights .* must not be negative"),
        ({"mixture": TWO, "mixture_schedule": "(10, (0, 0)),"}, "and one must be positive"),
        ({"mixture": TWO, "mixture_schedule": "(-1, (1, 1)),"}, "at -1 tokens: the number of tokens must not be"),
        ({"mixture": TWO, "mixture_schedule": "(9, (1, 1)), (9, (1, 2))"}, "has 9 tokens after 9: sort its pairs"),
    ],
)
def test_mistakes(changes: dict, words: str) -> None:
    with pytest.raises(UserError, match=words):
        load_config(GPT2, {f"data.{key}": value for key, value in changes.items()})


@pytest.mark.parametrize(
    ("key", "fix"),
    [
        ("batch.epochs", "batch.total_tokens"),
        ("evaluation.every_epochs", "evaluation.every_tokens"),
        ("checkpoint.every_epochs", "checkpoint.every_tokens"),
    ],
)
def test_epochs_of_a_mixture_are_no_unit(key: str, fix: str) -> None:
    unset = {} if key == "batch.epochs" else {"batch.total_tokens": 1000}
    others = {"batch.total_tokens": None, "evaluation.every_tokens": None, "checkpoint.every_tokens": None} | unset
    with pytest.raises(UserError, match=f"{key}=2.0: the sources of .* set {fix} instead"):
        load_config(GPT2, {"data.mixture": TWO, **others, key: "2"})


def test_gpt3_has_the_mixture_of_its_paper() -> None:
    mixture = load_config(f"{ROOT}/configs/gpt3.py:data=mixture,folder=/data").data.mixture
    assert [weight for _, weight in mixture] == [60, 22, 8, 8, 3]
    assert mixture[1] == ("jsonl:/data/webtext2*.jsonl*", 22)
    for argument in ("data=mixture", "folder=/data", "data=sotu,folder=/data"):
        with pytest.raises(UserError, match="data=mixture and folder=DIRECTORY need each other"):
            load_config(f"{ROOT}/configs/gpt3.py:{argument}")
