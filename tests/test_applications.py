"""The applications in examples/: what they make, how they measure, and each from its one command."""

import json
import random
from pathlib import Path

import pytest

from tests.commands import run_command
from tests.test_examples import load

EXAMPLES = Path(__file__).parents[1] / "examples"


@pytest.fixture(scope="module")
def recommendation():
    return load("recommendation/recommend")


@pytest.fixture(scope="module")
def monitoring():
    return load("sentiment_monitoring/monitor")


@pytest.fixture(scope="module")
def support():
    return load("customer_service/support")


@pytest.fixture(scope="module")
def made(recommendation):
    return recommendation.read_interactions("made")


# --- recommendation ---------------------------------------------------------------------------------------------------


def test_new_items_are_never_seen_in_training(recommendation, made):
    parts = made
    trained = {text for row in parts["train"] for text in [*row["history"], *row["candidates"]]}
    assert not any(map(recommendation.is_new, trained))
    assert not any(recommendation.is_new(text) for part in parts.values() for row in part for text in row["history"])
    for kind, indices in recommendation.by_kind(parts["train"], parts["test"]).items():
        rows = [parts["test"][i] for i in indices]
        assert len(rows) > 200
        if kind == "new items":
            assert sum(all(map(recommendation.is_new, row["candidates"])) for row in rows) >= 300
        else:
            assert not any(recommendation.is_new(text) for row in rows for text in row["candidates"])


def test_a_made_choice_is_of_a_topic_of_the_history_and_the_others_are_not(recommendation, made):
    topic_of = {text: name for name, texts in recommendation.read_topics().items() for text in texts}
    for row in made["validation"]:
        topics = [topic_of[text] for text in row["candidates"]]
        chosen = topics.pop(row["chosen"])
        assert not {topic_of[text] for text in row["history"]} & set(topics)
        assert chosen not in topics
        assert row["candidates"][row["chosen"]] not in row["history"]


def test_bm25_ranks_by_rare_words_of_the_history(recommendation):
    rows = [{"history": ["the red fox", "the den"], "candidates": ["the end", "a fox", "none", ""], "chosen": 1}]
    train = [{"history": ["the house", "the tree"], "candidates": ["the end", "a bird"], "chosen": 0}]
    scores = recommendation.bm25(train, rows)[0]
    assert max(range(4), key=scores.__getitem__) == 1
    assert scores[2] == scores[3] == 0


def test_the_figure_of_rankings_has_a_panel_for_each_kind_of_item(recommendation, tmp_path):
    methods = {"BM25": (0.4, 0.03), "model": (0.5, 0.02)}
    recommendation.plot(tmp_path / "a.png", {"known items": methods, "new items": methods}, 0.25)
    assert (tmp_path / "a.png").stat().st_size > 5000


# --- sentiment monitoring ---------------------------------------------------------------------------------------------


def rule(monitoring):
    return lambda trend: monitoring.alerts(trend, "bad", 8, 3.0, 20)


def test_large_changes_are_found_by_true_labels_and_none_by_a_model_that_never_says_so(monitoring):
    pairs = [("bad", "good")] * 5 + [("good", "good")] * 5
    streams = [monitoring.made_stream(pairs, "bad", 0.5, 100, random.Random(i)) for i in range(5)]
    by_truth = monitoring.detection(streams, "bad", 0.5, 0, 8, rule(monitoring))
    assert (by_truth.found, by_truth.delay) == (1.0, 0.0)
    assert by_truth.false < 0.1
    assert monitoring.detection(streams, "bad", 0.5, 1, 8, rule(monitoring)).found == 0.0


def test_a_made_stream_has_the_share_of_the_quiet_periods_and_then_of_the_event(monitoring):
    stream = monitoring.made_stream([("bad", "x"), ("good", "y")], "bad", 0.2, 2000, random.Random(0))
    shares = [sum(pair[0] == "bad" for pair in texts) / len(texts) for texts in stream]
    assert len(shares) == monitoring.QUIET + monitoring.EVENT
    assert shares[: monitoring.QUIET] == pytest.approx([0.3] * monitoring.QUIET, abs=0.05)
    assert shares[monitoring.QUIET :] == pytest.approx([0.5] * monitoring.EVENT, abs=0.05)


def test_the_page_shows_texts_as_text(monitoring):
    trend = [{"period": "2024", "texts": 3, "shares": {"negative": 0.5}}]
    record = {"period": "2024", "texts": 3, "share": 0.5, "mean": 0.1, "threshold": 0.3}
    page = monitoring.page(trend, [record | {"examples": ["<script>alert(1)</script>"]}], "negative")
    assert "<script>" not in page
    assert "&lt;script&gt;alert(1)" in page
    assert "2024: 50% of 3 texts" in page


# --- customer service -------------------------------------------------------------------------------------------------


def test_conversations_cite_the_passage_that_solves_or_pass_on(support, tmp_path):
    documents, train, test = support.make_data(tmp_path, 40)
    assert [question.solution is None for question in test] == [False] * 20 + [True] * 20
    assert not {question.problem for question in train} & {question.problem for question in test}
    lines = [json.loads(line)["messages"] for line in (tmp_path / "train.jsonl").read_text().splitlines()]
    assert len(lines) == len(train) > 300
    cited = 0
    for question, (user, assistant) in zip(train, lines, strict=True):
        assert user["content"].endswith(question.text)
        passage = support.cited_in(assistant["content"], documents.find(question.text))
        assert (passage is None) == (assistant["content"] == support.PASSED_ON)
        if passage is not None:
            assert assistant["content"].endswith(question.solution)
            assert support.end_of(question, passage) == "solved"
            cited += 1
        elif question.solution is None:
            assert support.is_right(question, support.end_of(question, None))
    assert cited > 200
    threshold = support.best_threshold(documents, train)
    ends = {True: [], False: []}
    for question in test:
        passage, score = support.best_passage(documents, question)
        end = support.end_of(question, passage if score >= threshold else None)
        ends[question.solution is None].append(support.is_right(question, end))
    assert min(sum(right) for right in ends.values()) >= 12  # of 20


@pytest.mark.parametrize(
    ("completion", "number"),
    [("[2] So.", 1), (" [1]", 0), ("[0] I pass", None), ("[4] So.", None), ("2 So.", None), ("[x]", None), ("", None)],
)
def test_a_citation_is_the_number_that_a_completion_begins_with(completion, number, support):
    sources = [support.Passage(text, f"a.md:{i}") for i, text in enumerate("abc")]
    assert support.cited_in(completion, sources) == (None if number is None else sources[number])


@pytest.mark.parametrize(
    ("completion", "end"),
    [
        ("[1] b", "solved"),
        ("[1] So.", "wrong"),
        ("[2] b", "wrong"),
        ("[1] I pass this on to a colleague.", "passed on"),
        ("b", "passed on"),
    ],
)
def test_a_model_solves_a_question_by_the_right_passage_and_its_solution(completion, end, support):
    sources = [support.Passage("## a\n\nb", "a.md:1"), support.Passage("## c\n\nd", "a.md:5")]
    assert support.end_by_completion(support.Question("a?", "a", "b"), completion, sources) == end


def test_ends_are_counted_by_kind_of_question(support):
    questions = [support.Question("a", "a", "b"), support.Question("c", "c", "d"), support.Question("e", "e", None)]
    lines = support.table({"m": ["solved", "wrong", "passed on"]}, questions)
    assert lines[2:] == [
        "| m | answerable | 50.0% | 50.0% | 0.0% | 50.0% |",
        "| m | unanswerable | 0.0% | 0.0% | 100.0% | 100.0% |",
    ]


# --- by one command ---------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_recommendation_runs_by_one_command(tmp_path):
    result = run_command(EXAMPLES / "recommendation/recommend.py", f"--run={tmp_path}", "--total_tokens=2000")
    assert result.returncode == 0, result.stderr
    table = (tmp_path / "table.md").read_text()
    assert table.strip() in result.stdout
    assert table.count("| model |") == 2
    assert (tmp_path / "ranking.png").stat().st_size > 5000
    assert len((tmp_path / "ranked.jsonl").read_text().splitlines()) == 600


@pytest.mark.slow
def test_customer_service_runs_by_one_command(tmp_path):
    flags = (f"--run={tmp_path}", "--total_tokens=4000", "--questions=8")
    result = run_command(EXAMPLES / "customer_service/support.py", *flags)
    assert result.returncode == 0, result.stderr
    assert (tmp_path / "table.md").read_text().strip() in result.stdout
    assert len((tmp_path / "completions.jsonl").read_text().splitlines()) == 8
    assert (tmp_path / "escalation.png").stat().st_size > 5000


@pytest.mark.slow
def test_monitoring_is_measured_by_one_command(tmp_path):
    rows = [{"label": label, "predicted": {"label": label}} for label in ("negative", "positive")]
    (tmp_path / "predictions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    flags = (f"--workdir={tmp_path}", "--measure", "--streams=4")
    result = run_command(EXAMPLES / "sentiment_monitoring/monitor.py", *flags)
    assert result.returncode == 0, result.stderr
    assert (tmp_path / "monitoring/measured.md").read_text().strip() in result.stdout
    assert (tmp_path / "monitoring/measured.png").stat().st_size > 5000
    result = run_command(EXAMPLES / "sentiment_monitoring/monitor.py", f"--workdir={tmp_path}/none", "--measure")
    assert result.returncode == 2
    assert "--measure needs a run fine-tuned for classification that has ended" in result.stderr
