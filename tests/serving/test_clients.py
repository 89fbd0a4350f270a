"""Other clients, unmodified: langchain-openai, schemathesis and lm-evaluation-harness. Run by `make clients`."""

import json
import re

import pytest

import gptjax
from gptjax.config import GPTConfig
from tests.commands import run_command, start_command
from tests.tiny_servers import LIMIT
from tests.tiny_tasks import save_pretrained

TASKS = ("choices", "continuations", "prompts")
RECORDS = 50  # of each task


def test_langchain(server):
    openai = pytest.importorskip("langchain_openai")
    model = openai.ChatOpenAI(
        model="tiny", base_url=f"{server.url}/v1", api_key="none", max_completion_tokens=8, seed=1, stream_usage=True
    )
    whole = model.invoke("Hi")
    streamed = list(model.stream("Hi"))
    assert "".join(chunk.content for chunk in streamed) == whole.content
    assert whole.usage_metadata["output_tokens"] == 8
    schema = {
        "title": "answer",
        "type": "object",
        "properties": {"good": {"type": "boolean"}},
        "required": ["good"],
        "additionalProperties": False,
    }
    for method in ("json_schema", "function_calling"):
        model = openai.ChatOpenAI(model="tiny", base_url=f"{server.url}/v1", api_key="none", seed=2)
        found = model.with_structured_output(schema, method=method, strict=True).invoke("Hi")
        assert isinstance(found["good"], bool)


@pytest.mark.filterwarnings("ignore")
def test_schemathesis(server):
    """Requests made from the OpenAPI file, valid and invalid: no 5xx, and only documented answers."""
    schemathesis = pytest.importorskip("schemathesis")
    from hypothesis import HealthCheck, settings
    from schemathesis import checks as names

    schema = schemathesis.openapi.from_url(f"{server.url}/openapi.json")
    # Valid by its schema alone, a request may still name a model that does not exist.
    excluded = [names.positive_data_acceptance] if hasattr(names, "positive_data_acceptance") else []

    @settings(max_examples=40, deadline=None, suppress_health_check=list(HealthCheck), database=None)
    def check(case):
        if isinstance(case.body, dict) and case.body.get("model") is not None:
            case.body["model"] = "tiny"
        case.call_and_validate(excluded_checks=excluded, timeout=LIMIT)

    for result in schema.get_all_operations():
        operation = result.ok()
        if operation.path not in ("/metrics", "/docs"):
            operation.as_strategy().map(lambda case: case)
            from hypothesis import given

            given(operation.as_strategy())(check)()
    assert server.chat()["choices"]


def write_tasks(directory, workdir):
    """Writes a file of choices, one of continuations and one of prompts; the model has some of the answers."""
    model = gptjax.load(workdir)
    words = ["one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten"]
    files = {name: (directory / f"{name}.jsonl").open("w") for name in TASKS}
    for i in range(RECORDS):
        context = f"{words[i % 10]} and {words[i // 10]} are"
        options = [words[(i + j) % 10] * (1 + j) for j in range(4)]
        completion = model.generate(context, 6, temperature=0) if i % 10 == 0 else options[1]
        for name, record in (
            ("choices", {"context": context, "choices": options, "answer": i % 4}),
            ("continuations", {"context": context, "continuation": options[0]}),
            ("prompts", {"prompt": context, "answers": completion.strip(), "stop": ["\n"], "max_new_tokens": 6}),
        ):
            files[name].write(json.dumps(record) + "\n")
    for file in files.values():
        file.close()


def harness_tasks(directory):
    """The same tasks, as lm-evaluation-harness defines them."""
    dataset = {"dataset_path": "json", "test_split": "test", "doc_to_text": "{{context}}"}
    forms = {
        "choices": {
            "output_type": "multiple_choice",
            "doc_to_choice": "{{choices}}",
            "doc_to_target": "{{answer}}",
            "metric_list": [{"metric": "acc"}, {"metric": "acc_norm"}],
        },
        "continuations": {
            "output_type": "loglikelihood",
            "doc_to_target": "{{' ' + continuation}}",
            "metric_list": [{"metric": "perplexity"}, {"metric": "acc"}],
        },
        "prompts": {
            "output_type": "generate_until",
            "doc_to_text": "{{prompt}}",
            "doc_to_target": "{{answers}}",
            "generation_kwargs": {"until": ["\n"], "max_gen_toks": 6, "do_sample": False},
            "metric_list": [{"metric": "exact_match"}],
        },
    }
    return [
        {
            **dataset,
            "task": name,
            "dataset_kwargs": {
                "data_files": {"test": str(directory / f"{name}.jsonl")},
                "cache_dir": str(directory / "cache"),
            },
            **form,
        }
        for name, form in forms.items()
    ]


@pytest.mark.filterwarnings("ignore")
def test_lm_eval_has_the_scores_of_our_evaluation(tmp_path):
    """local-completions, which asks the server, and gptjax.evaluate, on the same files: of each example and in all."""
    lm_eval = pytest.importorskip("lm_eval")
    from lm_eval.tasks import TaskManager

    settings = GPTConfig(context_length=128, num_layers=2, num_heads=2, embed_dim=16, dtype="float32")
    workdir = save_pretrained(tmp_path / "scored", settings=settings)
    write_tasks(tmp_path, workdir)
    files = ",".join(f"{tmp_path / name}.jsonl" for name in TASKS)
    result = run_command(
        "gptjax.evaluate", f"--workdir={workdir}", f"--tasks={files}", f"--output={tmp_path / 'ours.json'}"
    )
    assert result.returncode == 0, result.stderr
    ours = json.loads((tmp_path / "ours.json").read_text())["results"]
    command = start_command("gptjax.serve", f"--workdir={workdir}", "--port=0", "--request_log=")
    try:
        command.wait_for("serving scored at http://127.0.0.1:")
        url = re.search(r"http://\S+", command._files["stdout"].read_text())[0]
        theirs = lm_eval.simple_evaluate(
            model="local-completions",
            model_args={"model": "scored", "base_url": f"{url}/v1/completions", "max_length": 128, "num_concurrent": 4},
            tasks=harness_tasks(tmp_path),
            task_manager=TaskManager(include_defaults=False),
            bootstrap_iters=0,
        )
    finally:
        command.close()
    for task, name, metric in (
        ("choices", "acc", "accuracy"),
        ("choices", "acc_norm", "accuracy_per_character"),
        ("continuations", "acc", "accuracy"),
        ("prompts", "exact_match", "exact_match"),
    ):
        assert theirs["results"][task][f"{name},none"] == ours[task]["metrics"][metric]["value"], (task, name)
    assert ours["prompts"]["metrics"]["exact_match"]["value"] >= 0.1
    perplexity = theirs["results"]["continuations"]["perplexity,none"]
    assert perplexity == pytest.approx(ours["continuations"]["metrics"]["perplexity"]["value"], rel=1e-5)
    for line in (tmp_path / "ours.examples.jsonl").read_text().splitlines():
        record = json.loads(line)
        samples = theirs["samples"][record["task"]]
        (sample,) = (sample for sample in samples if sample["doc_id"] == record["index"])
        found = [response[0] for response in sample["resps"]]
        if record["task"] == "prompts":
            assert found == [record["completions"][0]["text"]]
        else:
            assert [float(logprob) for logprob, _ in found] == pytest.approx(record["logprobs"], abs=1e-4, rel=1e-6)
            assert [str(is_greedy) for _, is_greedy in found] == [str(greedy) for greedy in record["is_greedy"]]
