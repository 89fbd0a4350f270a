"""The command: serving a workdir as a process, load with clients that leave, and its end."""

import dataclasses
import json
import re
import signal
import urllib.error
import urllib.request

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import gptjax
from gptjax import config as c
from gptjax.checkpoint.manager import Checkpoints
from gptjax.checkpoint.state import abstract_state
from gptjax.data.labelled import Row
from gptjax.data.tokenizers import BytesTokenizer
from gptjax.inference.speculation import EngineShape
from gptjax.interop.huggingface import save_pretrained
from gptjax.models.gpt import GPT, init_params
from gptjax.parallel.mesh import make_mesh
from gptjax.serving.model_loading import load_draft
from gptjax.stages import registry
from gptjax.stages.finetune.predictor import load_predictor
from gptjax.stages.saved_weights import given_base, load_given
from tests.commands import run_command, start_command
from tests.tiny_chats import save_sft
from tests.tiny_servers import LIMIT
from tests.tiny_tasks import run_config, save_classifier


@pytest.fixture(scope="module")
def workdir(tmp_path_factory):
    directory = tmp_path_factory.mktemp("served")
    return save_sft(directory / "sft", directory)


def ask(url, path, body=None):
    data = None if body is None else json.dumps(body).encode()
    request = urllib.request.Request(url + path, data, {"Content-Type": "application/json"})
    try:
        with urllib.request.urlopen(request, timeout=LIMIT) as response:
            return response.status, json.load(response)
    except urllib.error.HTTPError as error:
        return error.code, json.load(error)


@pytest.mark.slow
def test_a_workdir_is_served_until_sigterm(workdir, tmp_path):
    """With itself as the draft model."""
    log = tmp_path / "log.jsonl"
    drafts = (f"--speculation={workdir}", "--deterministic")
    command = start_command(
        "gptjax.serve", f"--workdir={workdir}", "--port=0", "--rows=2", f"--request_log={log}", *drafts
    )
    try:
        command.wait_for("serving sft at http://127.0.0.1:")
        url = re.search(r"http://\S+", command._files["stdout"].read_text())[0]
        body = {"model": "sft", "messages": [{"role": "user", "content": "q1"}], "max_tokens": 5}
        status, answer = ask(url, "/v1/chat/completions", body)
        assert status == 200
        assert answer["usage"]["completion_tokens"] <= 5
        assert ask(url, "/v1/chat/completions", {**body, "model": "x"})[0] == 404
        with urllib.request.urlopen(f"{url}/metrics") as response:
            metrics = response.read().decode()
        proposed, accepted = (
            float(re.search(rf"^gptjax_engine_tokens_{name} (\S+)", metrics, re.MULTILINE)[1])
            for name in ("proposed", "accepted")
        )
        assert 0 < accepted <= proposed
        command.send_signal(signal.SIGTERM)
        result = command.result(LIMIT)
    finally:
        command.close()
    assert result.returncode == 0, result.stderr
    assert "Traceback" not in result.stderr
    assert [json.loads(line)["status"] for line in log.read_text().splitlines()] == [200, 404, 200]


def save_lora(workdir, base):
    """Saves random matrices as those of a run of LoRA that started from `base`."""
    settings = c.PeftConfig(method="lora", rank=2, alpha=8.0)
    config = dataclasses.replace(c.read_config(base), init_from=str(base), peft=settings)
    workdir.mkdir()
    (workdir / "config.json").write_text(c.to_json(config))
    BytesTokenizer().save(workdir / "tokenizer")
    mesh = make_mesh(c.MeshConfig())
    rng = np.random.default_rng(1)
    with jax.set_mesh(mesh):
        parameters = registry.parameters(registry.completed_config(workdir)[0])
        wanted = abstract_state(parameters, mesh).params
        params = jax.tree.map(lambda leaf: jnp.asarray(rng.normal(0, 0.5, leaf.shape), leaf.dtype), wanted)
        fixed = given_base(parameters, load_given(parameters, mesh), mesh)
        with Checkpoints(workdir, config.checkpoint) as checkpoints:
            checkpoints.save_params(params, fixed)
    return workdir


@pytest.mark.slow
def test_adapters_and_classifiers_are_further_models(pretrained, tmp_path):
    lora = save_lora(tmp_path / "lora", pretrained)
    labels = save_classifier(tmp_path / "labels", run_config(tmp_path, "classification", None))
    models = (f"--adapters=lora={lora}", f"--classifiers=labels={labels}")
    command = start_command("gptjax.serve", f"--workdir={pretrained}", "--name=base", "--port=0", *models)
    try:
        command.wait_for("serving base, lora, labels at http://127.0.0.1:")
        url = re.search(r"http://\S+", command._files["stdout"].read_text())[0]
        for name, workdir in (("base", pretrained), ("lora", lora)):
            body = {"model": name, "prompt": "abc", "max_tokens": 8, "temperature": 0}
            found = ask(url, "/v1/completions", body)[1]["choices"][0]["text"]
            assert found == gptjax.load(workdir).generate("abc", 8, temperature=0)
        status, found = ask(url, "/v1/classify", {"model": "labels", "input": ["a text", {"text": "another"}]})
        assert status == 200
        mesh = make_mesh(c.MeshConfig())
        with jax.set_mesh(mesh):
            _, predict = load_predictor(labels, mesh, 8)
            wanted = predict([Row({"text": text}, "") for text in ("a text", "another")]).details
        assert [{name: entry[name] for name in wanted[0]} for entry in found["data"]] == wanted
        assert ask(url, "/v1/classify", {"model": "labels", "input": {"texts": "a"}})[0] == 400
        assert ask(url, "/v1/completions", {"model": "labels", "prompt": "a"})[0] == 400
        assert ask(url, "/v1/embeddings", {"model": "lora", "input": "a"})[0] == 400
    finally:
        command.close()


def test_a_draft_model_may_be_a_hugging_face_directory(tmp_path):
    """Its tokenizer is a tokenizer.json of the same tokens."""
    config = c.GPTConfig(vocab_size=257, context_length=8, num_layers=1, num_heads=1, embed_dim=4, dtype="float32")
    params = nn.unbox(init_params(GPT(config), jax.random.key(0)))
    save_pretrained(config, params, tmp_path / "draft", BytesTokenizer())
    drafter = load_draft(str(tmp_path / "draft"), c.MeshConfig(), None, "stacked")
    drafter.start(EngineShape(BytesTokenizer(), vocab_size=257, rows=1, num_pages=2, page_size=4, pages_of_row=2))
    assert drafter.model.config.embed_dim == 4


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ((), "needs --workdir=DIR or --from_hf=DIR"),
        (("--from_hf=nothing", "--best"), "--from_hf is none"),
        (("--workdir={}", "--template=plain"), "leave out --template"),
        (("--workdir={}", "--classifiers=a"), "not of the form NAME=DIR"),
        (("--from_hf={}", "--adapters=a=b"), "--adapters needs --workdir"),
        (("--workdir={}", "--port=1", "--host=192.0.2.1"), "cannot listen on --host=192.0.2.1"),
        (("--workdir={}", "--api_keys_file=/dev/null"), "has no key"),
        (("--workdir={}", "--speculative_tokens=2"), "--speculative_tokens needs --speculation"),
        (("--workdir={}", "--speculation=ngrams"), "--speculation=ngrams is neither ngram nor the directory"),
    ],
)
def test_mistakes_in_flags(workdir, arguments, words):
    result = run_command("gptjax.serve", *(argument.format(workdir) for argument in arguments))
    assert result.returncode == 2, result.stderr
    assert words in result.stderr
    assert len(result.stderr.splitlines()) == 1


@pytest.mark.slow
def test_the_load_command(workdir):
    options = ("--port=0", "--rows=8", "--max_queue=128", "--request_log=")
    command = start_command("gptjax.serve", f"--workdir={workdir}", *options)
    try:
        command.wait_for("serving sft at http://127.0.0.1:")
        url = re.search(r"http://\S+", command._files["stdout"].read_text())[0]
        arguments = (f"--url={url}", "--requests=60", "--concurrency=20", "--disconnect=0.3")
        result = run_command("benchmarks.serve", *arguments, "--max_tokens=4", "--prompt_words=1")
        assert result.returncode == 0, result.stderr
        statuses = json.loads(result.stdout.partition(": ")[2])["statuses"]
        assert statuses["200"] > 0
        assert sum(statuses.values()) == 60
    finally:
        command.close()


@pytest.mark.slow
def test_promises_under_load():
    """No errors but 429, nothing left in use, and SIGTERM under load."""
    result = run_command("benchmarks.serve_drill", "--clients=20", "--seconds=5", "--nocheck_times")
    assert result.returncode == 0, result.stdout + result.stderr
    report = json.loads(result.stdout.removesuffix("all promises held\n"))
    assert report["load"]["statuses"]["left"] > 0
    assert report["drain"]["in_progress"]["200"] > 0
