"""Pairwise judgement in both orders: verdicts, win rates, endpoints on loopback, and models of workdirs."""

import dataclasses
import itertools
import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from gptjax.config import UserError
from gptjax.data.conversations import Message, Prompt
from gptjax.evaluation import judge_models
from gptjax.evaluation.judge_models import EndpointJudge, WorkdirJudge, check_judge, open_judge
from gptjax.evaluation.judging import JudgeSettings, judge_completions, judge_prompt, outcome, read_verdict
from gptjax.evaluation.run_tasks import Options, check, evaluate
from gptjax.metrics.resampling import bootstrap_interval
from tests.tiny_chats import save_sft
from tests.tiny_servers import running

NUMBERS = itertools.count()
PROMPTS = [Prompt((Message("user", f"question {i}"),), "reference", "here") for i in range(6)]


class Scripted:
    """A judge that prefers what `better` says, called with the two completions it is shown."""

    def __init__(self, better) -> None:
        self.identity, self.better, self.asked = str(next(NUMBERS)), better, 0

    def answers(self, prompts):
        self.asked += len(prompts)
        shown = (text.split("### Completion ")[1:] for text in prompts)
        return [self.better(*(part[2:].split("\n\n")[0] for part in pair)) for pair in shown]


def longer(first, second):
    return "tie" if len(first) == len(second) else "A" if len(first) > len(second) else "B"


def judged(better, directory, ours=("aaa", "a", "aa", "aaa", "aaa", "a"), theirs=("aa",) * 6):
    return judge_completions(PROMPTS, ours, theirs, Scripted(better), directory, "dialogue", 4)


@pytest.mark.parametrize(
    ("text", "verdict"),
    [
        *(("A", "A"), ("b.", "B"), ("[[B]]", "B"), ("**Tie**", "tie"), ("Verdict: A", "A"), ("Completion B", "B")),
        *(("The first is correct.\n\nThe answer is", None), ("B\nsince it is correct", "B"), ("A or B", None)),
        *(("I compare A and B.\nFinal answer: B", "B"), ("", None), ("An apple", None)),
    ],
)
def test_verdicts(text, verdict):
    assert read_verdict(text) == verdict


def test_outcomes():
    assert [outcome(*pair) for pair in (("A", "B"), ("B", "A"), ("A", "A"), ("tie", "B"), ("tie", "tie"))] == [
        *(1.0, 0.0, 0.5, 0.5, 0.5)
    ]


def test_a_consistent_judge(tmp_path):
    metrics, records = judged(longer, tmp_path)
    assert metrics["judge_win_rate"].value == pytest.approx((3 + 0.5) / 6)
    assert metrics["judge_disagreement"].value == 0
    assert metrics["judge_first_position"].value == 0.5
    assert metrics["judge_unreadable"].value == 0
    low, high = bootstrap_interval(metrics["judge_win_rate"].sample)
    assert low < 3.5 / 6 < high
    assert records[1]["judge_outcome"] == 0
    assert [each["verdict"] for each in records[1]["judge"]] == ["B", "A"]
    assert records[1]["judge"][0]["prompt"] == judge_prompt(PROMPTS[1], "a", "aa")
    assert "User: question 1" in records[1]["judge"][0]["prompt"]


def test_a_judge_with_position_bias(tmp_path):
    metrics, _ = judged(lambda *_: "A", tmp_path)
    assert metrics["judge_win_rate"].value == 0.5  # whatever the completions are
    assert metrics["judge_disagreement"].value == 1
    assert metrics["judge_first_position"].value == 1


def test_unreadable_verdicts_are_counted_and_left_out(tmp_path):
    metrics, records = judged(lambda a, b: "cannot say" if a == "a" else longer(a, b), tmp_path)
    assert metrics["judge_unreadable"].value == pytest.approx(2 / 12)
    assert (metrics["judge_win_rate"].value, metrics["judge_win_rate"].n) == (pytest.approx(3.5 / 4), 4)
    assert records[1]["judge_outcome"] is None
    with pytest.raises(UserError, match="no verdict of the judge could be read; its first answer is 'hm'"):
        judged(lambda *_: "hm", tmp_path)


def test_recorded_verdicts_are_not_asked_for_again(tmp_path):
    judge, arguments = Scripted(longer), (PROMPTS, ["aaa"] * 6, ["a"] * 6)
    first = judge_completions(*arguments, judge, tmp_path, "dialogue", 4)
    assert judge.asked == 12
    assert judge_completions(*arguments, judge, tmp_path, "dialogue", 4) == first
    assert judge.asked == 12


# --- endpoints --------------------------------------------------------------------------------------------------------


@dataclasses.dataclass
class Stub:
    """An endpoint that prefers the longer completion, after the given failures."""

    url: str
    failures: list[int]
    requests: list[tuple[dict, dict]]


@pytest.fixture
def stub() -> Iterator[Stub]:
    found = Stub("", [], [])

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self):
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            found.requests.append((dict(self.headers), body))
            status = found.failures.pop() if found.failures else 200
            (text,) = Scripted(longer).answers([body["messages"][0]["content"]])
            answer = {"choices": [{"message": {"content": text}}]} if status == 200 else {"error": "it is so"}
            content = json.dumps(answer).encode()
            self.send_response(status)
            if status == 302:
                self.send_header("Location", "http://127.0.0.1:9/")
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

        def log_message(self, *_):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    found.url = f"http://127.0.0.1:{server.server_port}/v1"
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield found
    server.shutdown()
    thread.join()
    server.server_close()


def test_an_endpoint(stub, tmp_path, monkeypatch):
    monkeypatch.setenv("GPTJAX_JUDGE_KEY", "secret")
    monkeypatch.setattr(judge_models.time, "sleep", lambda _: None)
    stub.failures += [503, 429]
    judge = open_judge(f"{stub.url}#large", "", 9)
    assert "secret" not in repr(judge)
    metrics, _ = judge_completions(PROMPTS, ["aaa"] * 6, ["a"] * 6, judge, tmp_path, "dialogue", 4)
    assert metrics["judge_win_rate"].value == 1
    assert len(stub.requests) == 14
    headers, body = stub.requests[0]
    assert headers["Authorization"] == "Bearer secret"
    assert (body["model"], body["temperature"], body["max_tokens"]) == ("large", 0, 9)


def test_an_endpoint_that_fails(stub, monkeypatch):
    monkeypatch.setattr(judge_models.time, "sleep", lambda _: None)
    judge = EndpointJudge(stub.url, "large", 9)
    question = judge_prompt(PROMPTS[0], "a", "b")
    for status, words in ((401, "answered 401: .*it is so"), (302, "answered 302")):
        stub.failures[:] = [status]
        with pytest.raises(UserError, match=words):
            judge.answers([question])
    stub.failures[:] = [500] * 5
    with pytest.raises(UserError, match=r"answered 500: .*\(5 tries\): the same command resumes"):
        judge.answers([question])
    with pytest.raises(UserError, match="does not answer as an OpenAI-compatible endpoint"):
        EndpointJudge("http://127.0.0.1:9", "large", 9).answers([question])


def test_our_own_server():
    with running(rows=2) as server:
        found = EndpointJudge(f"{server.url}/v1", "tiny", 4).answers([judge_prompt(PROMPTS[0], "a", "b")] * 2)
        body = {"messages": [{"role": "user", "content": judge_prompt(PROMPTS[0], "a", "b")}], "temperature": 0}
        expected = server.chat(**body, max_tokens=4)["choices"][0]["message"]["content"]
    assert found == [expected, expected]


# --- workdirs ---------------------------------------------------------------------------------------------------------


def test_a_workdir_against_another(tmp_path: Path, monkeypatch, capsys):
    """The models are random: a judge of a workdir is asked, but its answers are replaced by readable ones."""
    (tmp_path / "data").mkdir()
    workdirs = [save_sft(tmp_path / name, tmp_path / "data") for name in ("a", "b")]
    source = f"jsonl:{tmp_path / 'data' / 'sft_validation.jsonl'}"
    asked = []

    def answers(self, prompts):
        asked.extend(prompts)
        assert original(self, prompts[:1]) == [""]  # the question is longer than the tiny judge's context
        short = original(self, ["q", prompts[0]])
        assert short == [original(self, ["q"])[0], ""]
        assert 0 < len(short[0]) <= 4
        return Scripted(longer).answers(prompts)

    original = WorkdirJudge.answers
    monkeypatch.setattr(WorkdirJudge, "answers", answers)
    settings = JudgeSettings(str(workdirs[1]), 4, workdirs[1])
    options = Options(tasks=("dialogue",), source=source, max_new_tokens=4, judge=settings)
    report = evaluate(workdirs[0], options)
    entry = report["results"][f"dialogue:{source}"]
    assert entry["metrics"]["judge_win_rate"]["value"] == 0.5  # the weights are equal
    assert entry["metrics"]["judge_win_rate"]["baselines"] == {"random": 0.5}
    assert (entry["judge"], entry["opponent"]) == (str(workdirs[1]), str(workdirs[1]))
    assert len(asked) == 10
    assert list((workdirs[1] / "evaluation" / "scores").glob("*answers*"))
    records = next((workdirs[0] / "evaluation").glob("*.answers.jsonl")).read_text().splitlines()
    assert [json.loads(record)["judge_outcome"] for record in records] == [0.5] * 5
    assert "judge_win_rate" in capsys.readouterr().out


def test_flags_that_do_not_fit(tmp_path):
    for spec, words in (("http://host/v1", "names no model"), (str(tmp_path / "none"), "neither a workdir nor")):
        with pytest.raises(UserError, match=words):
            check_judge(spec)
    for options, words in (
        (Options(tasks=("lambada",), judge=JudgeSettings("http://h#m")), "--judge is for --tasks=dialogue"),
        (Options(tasks=("dialogue",), judge=JudgeSettings("http://h#m", 1, tmp_path / "none")), "is not a workdir"),
    ):
        with pytest.raises(UserError, match=words):
            check(options)
