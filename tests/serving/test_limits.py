"""What a server refuses, and that it serves others meanwhile: bad bodies, keys, limits, slow and absent clients."""

import dataclasses
import json
import socket
import threading
import time
from types import SimpleNamespace

import pytest

from gptjax.serving import engine_thread
from gptjax.serving.json_bodies import MAX_DEPTH
from tests.tiny_servers import LIMIT, slow_down, wait_until

PATH = "/v1/chat/completions"
MESSAGES = [{"role": "user", "content": "Hi"}]
CHAT = {"model": "tiny", "messages": MESSAGES, "max_tokens": 4}


def raw(server, content, kind="application/json", path=PATH):
    with server.client() as client:
        return client.post(path, content=content, headers={"Content-Type": kind})


@pytest.mark.parametrize(
    ("content", "status", "words"),
    [
        (b"", 400, "not valid JSON"),
        (b"{", 400, "not valid JSON"),
        (b"[1]", 400, "not a JSON object"),
        (b'{"a": "\xff"}', 400, "not UTF-8"),
        (b'{"a": NaN}', 400, "not a number"),
        (b'{"a": 1e999}', 400, "too large"),
        (b'{"a": ' + b"9" * 5000 + b"}", 400, "not valid JSON"),
        (b'{"a": "\\ud800"}', 400, "surrogate"),
        (b'{"a":' * 100 + b"1" + b"}" * 100, 400, f"deeper than {MAX_DEPTH}"),
        (b'{"a":' + b"[" * 100_000 + b"]" * 100_000 + b"}", 400, "deeper"),
        (b" " * (1 << 20) * 17, 413, "larger than the limit"),
    ],
    ids=range(11),
)
def test_bodies_that_are_no_requests(server, content, status, words):
    response = raw(server, content)
    assert response.status_code == status
    assert words in response.json()["error"]["message"]


def test_only_json_is_read(server):
    """A page of another site could send text without asking."""
    assert raw(server, json.dumps(CHAT), "text/plain").status_code == 415


@pytest.mark.parametrize(
    ("param", "change"),
    [
        ("frequency", {"frequency": 1}),
        ("messages[0].contents", {"messages": [{"role": "user", "content": "a", "contents": "b"}]}),
        ("messages[0].content", {"messages": [{"role": "user", "content": 3}]}),
        ("messages[0].content[0]", {"messages": [{"role": "user", "content": [{"type": "input_audio"}]}]}),
        ("messages[0].content[0].image_url", {"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}),
        ("messages", {"messages": []}),
        ("temperature", {"temperature": 2.5}),
        ("temperature", {"temperature": "hot"}),
        ("temperature", {"temperature": True}),
        ("top_p", {"top_p": 0}),
        ("n", {"n": 0}),
        ("n", {"n": 1.5}),
        ("stop", {"stop": ["a"] * 10_000}),
        ("stop", {"stop": ""}),
        ("stop[1]", {"stop": ["a", ""]}),
        ("logit_bias", {"logit_bias": {"x": 1}}),
        ("logit_bias", {"logit_bias": {"264": 1}}),
        ("logit_bias.1", {"logit_bias": {"1": 101}}),
        ("top_logprobs", {"top_logprobs": 3}),
        ("stream_options", {"stream_options": {"include_usage": True}}),
        ("store", {"store": True}),
        ("model", {"model": "other"}),
        ("messages", {"max_tokens": 5000}),
        ("messages", {"messages": [{"role": "user", "content": "a" * 5000}]}),
        ("reasoning_effort", {"reasoning_effort": "low"}),
    ],
)  # fmt: skip
def test_parameters_are_refused_by_name(server, param, change):
    response = server.post(PATH, **{**CHAT, **change})
    error = response.json()["error"]
    assert response.status_code == (404 if param == "model" else 400)
    assert error["param"] == param
    assert set(error) == {"message", "type", "param", "code"}


@pytest.mark.parametrize("change", [{"previous_response_id": "r"}, {"background": True}, {"store": True}])
def test_stored_responses_are_refused(server, change):
    response = server.post("/v1/responses", input="Hi", **change)
    assert response.status_code == 400
    assert response.json()["error"]["param"] == next(iter(change))


def test_suffix_needs_a_model_that_infills(server):
    assert server.post("/v1/completions", prompt="a", suffix="b").json()["error"]["param"] == "suffix"
    assert server.post("/v1/classify", input="a").json()["error"]["param"] == "model"


def test_null_is_the_same_as_absent(server):
    nothing = dict.fromkeys(("temperature", "stop", "tools", "response_format", "logit_bias", "n", "stream", "user"))
    assert server.post(PATH, **CHAT, seed=1, **nothing).status_code == 200


def test_paths_and_methods(server):
    with server.client() as client:
        for method, path, status in (("GET", PATH, 405), ("POST", "/v1/files", 404), ("GET", "/nothing", 404)):
            response = client.request(method, path)
            assert response.status_code == status
            assert response.json()["error"]["message"]


def test_keys(serve_tiny):
    with serve_tiny(api_keys=("one", "two")) as server, server.client() as client:
        assert client.get("/health").status_code == 200
        for path in ("/v1/models", "/metrics", "/v1/nothing"):
            assert client.get(path).status_code == 401
        assert client.post(PATH, json=CHAT, headers={"Authorization": "Bearer three"}).status_code == 401
        assert client.get("/v1/models", headers={"Authorization": "Basic two"}).status_code == 401
        assert client.get("/v1/models", headers={"Authorization": "Bearer two"}).status_code == 200
        assert "two" not in server.log.getvalue()


def test_other_origins_are_refused_unless_they_are_named(server, serve_tiny):
    ask = {"Origin": "https://a.example", "Access-Control-Request-Method": "POST"}
    with server.client() as client:
        assert "access-control-allow-origin" not in client.options(PATH, headers=ask).headers
        assert "access-control-allow-origin" not in client.get("/health", headers=ask).headers
    with serve_tiny(allowed_origins=("https://a.example",)) as other, other.client() as client:
        assert client.options(PATH, headers=ask).headers["access-control-allow-origin"] == "https://a.example"
        refused = client.post(PATH, json={}, headers=ask)
        assert refused.status_code == 400
        assert refused.headers["access-control-allow-origin"] == "https://a.example"
        assert (
            "access-control-allow-origin" not in client.get("/health", headers={"Origin": "https://b.example"}).headers
        )


def test_slow_headers_and_bodies_are_cut_off(serve_tiny):
    with serve_tiny() as server:
        options = server.serving.options
        for begin in (b"GET / HTTP/1.1\r\nHost:", b"POST /v1/completions HTTP/1.1\r\nHost: a\r\nContent-Type: "
                      b"application/json\r\nContent-Length: 99\r\n\r\n{"):  # fmt: skip
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr("gptjax.serving.http_server.HEADER_SECONDS", 2.0)
                server.serving.options = dataclasses.replace(options, body_seconds=2.0)
                with socket.create_connection(server.address, timeout=LIMIT) as connection:
                    connection.sendall(begin)
                    assert b" 408 " in connection.recv(4096)
        server.serving.options = options
        assert server.chat()["choices"]


def test_a_full_queue_is_429_and_a_late_request_504(serve_tiny, monkeypatch):
    long = {**CHAT, "max_tokens": 900, "logit_bias": {str(end): -100 for end in (256, 258, 259)}}
    with serve_tiny(rows=4, max_queue=1) as server:
        server.chat()  # compiles
        slow_down(monkeypatch, server.engine)
        answers = []
        threads = [threading.Thread(target=lambda: answers.append(server.post(PATH, **long))) for _ in range(5)]
        for number, thread in enumerate(threads, start=1):
            thread.start()
            wait_until(lambda number=number: server.serving.thread.num_running == min(number, 4))
        wait_until(lambda: server.serving.thread.num_waiting == 1)
        refused = server.post(PATH, **CHAT)
        assert refused.status_code == 429
        assert int(refused.headers["retry-after"]) >= 1
        assert refused.json()["error"]["type"] == "rate_limit_error"
        later = SimpleNamespace(monotonic=lambda: time.monotonic() + server.serving.options.request_seconds)
        monkeypatch.setattr(engine_thread, "time", later)
        for thread in threads:
            thread.join()
        assert {answer.status_code for answer in answers} == {504}
        wait_until(lambda: server.engine.stats.rows_in_use == 0)


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_disconnects_frees_its_row_within_a_step(serve_tiny, monkeypatch, stream):
    long = {**CHAT, "max_tokens": 900, "stream": stream, "logit_bias": {str(end): -100 for end in (256, 258, 259)}}
    with serve_tiny() as server:
        server.chat()  # compiles
        slow_down(monkeypatch, server.engine)
        steps = []
        note(monkeypatch, server.engine, "step", steps)
        note(monkeypatch, server.serving.thread, "cancel", steps)
        note(monkeypatch, server.engine, "evict", steps)
        if stream:
            with server.client() as client, client.stream("POST", PATH, json=long) as response:
                next(response.iter_bytes())
        else:
            with socket.create_connection(server.address, timeout=LIMIT) as connection:
                body = json.dumps(long).encode()
                head = f"POST {PATH} HTTP/1.1\r\nHost: a\r\nContent-Type: application/json\r\n"
                connection.sendall(f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body)
                wait_until(lambda: server.engine.stats.rows_in_use == 1)
        wait_until(lambda: "evict" in steps)
        assert steps.count("step") < 100
        assert steps[steps.index("cancel") : steps.index("evict")].count("step") <= 1  # that in progress
        wait_until(lambda: server.engine.stats.rows_in_use == server.engine.stats.pages_in_use == 0)
        wait_until(lambda: server.serving.active == 0)
        assert any(line.get("disconnected") for line in server.log_lines())


def note(monkeypatch, owner, name, calls):
    """Makes the calls of a method append its name to `calls`."""
    method = getattr(owner, name)
    monkeypatch.setattr(owner, name, lambda *given: (calls.append(name), method(*given))[1])


def test_a_failing_engine_fails_its_requests_and_serves_on(serve_tiny, monkeypatch, caplog):
    with serve_tiny() as server:
        step = server.engine.step
        monkeypatch.setattr(server.engine, "step", lambda: 1 / 0)
        response = server.post(PATH, **CHAT)
        assert response.status_code == 500
        assert response.json()["error"]["type"] == "server_error"
        with server.client() as client:
            assert client.get("/health").status_code == 503
        monkeypatch.setattr(server.engine, "step", step)
        assert server.chat()["choices"]
        assert server.engine.stats.rows_in_use == 0


def test_draining_refuses_new_requests_and_ends_old_ones(serve_tiny, monkeypatch):
    with serve_tiny() as server:
        step, resumed = server.engine.step, threading.Event()
        monkeypatch.setattr(server.engine, "step", lambda: (resumed.wait(LIMIT), step())[1])
        answers = []
        thread = threading.Thread(target=lambda: answers.append(server.chat(max_tokens=100)))
        thread.start()
        wait_until(lambda: server.serving.thread.num_running == 1)
        server.serving.draining = True
        refused = server.post(PATH, **CHAT)
        resumed.set()
        assert refused.status_code == 503
        assert "retry-after" in refused.headers
        thread.join()
        assert answers[0]["choices"]
