"""Generative tasks: task files, greedy and sampled completions, records, and programs."""

import json

import numpy as np
import pytest

from gptjax.config import UserError
from gptjax.data.tokenizers import BytesTokenizer
from gptjax.evaluation.few_shot import Examples
from gptjax.evaluation.generative_examples import GenerativeExample
from gptjax.evaluation.generative_tasks import GenerationOptions, generative_task
from gptjax.evaluation.run_tasks import Options, evaluate
from gptjax.evaluation.sandbox import isolation
from gptjax.evaluation.tasks import read_examples
from gptjax.inference.engine import Engine
from tests.commands import run_command


def write(path, *records):
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def test_the_lines_of_a_task_file(tmp_path):
    path = write(
        tmp_path / "task.jsonl",
        {"prompt": "2 + 2 =", "answers": "4"},
        {"prompt": "Q\n", "answers": ["a", "b"], "metric": "squad", "stop": [], "max_new_tokens": 5, "shown": "c"},
        {"prompt": "P:", "answers": [["x", "y"], "z"], "metric": "drop", "description": "D.", "group": "g"},
        {"prompt": "x = ", "tests": "assert x"},
        {"prompt": "?", "answers": [], "metric": "squad"},
        {"prompt": "shown", "answers": "s", "split": "fewshot"},
    )
    examples = read_examples(path)
    assert examples.asked == [
        GenerativeExample("2 + 2 =", ("4",), " 4"),
        GenerativeExample("Q\n", ("a", "b"), "c", "squad", (), 5),
        GenerativeExample("P:", (("x", "y"), "z"), " x, y", "drop", description="D.", group="g"),
        GenerativeExample("x = ", (), "", "tests", (), 512, "assert x"),
        GenerativeExample("?", (), " ", "squad"),
    ]
    assert [example.shown for example in examples.shots] == ["shown s"]
    assert examples.asked[2].texts == ["P: x, y", "P: z"]


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ({"prompt": " ", "answers": "a"}, '"prompt" must be a string that is not empty'),
        ({"prompt": "a"}, '"answers" must be a text or a list of texts'),
        ({"prompt": "a", "answers": ["b", 3]}, '"answers" must be a text or a list of texts'),
        ({"prompt": "a", "answers": []}, "only the metric squad has questions without an answer"),
        ({"prompt": "a", "answers": ["b"], "metric": "blue"}, '"metric" must be one of exact_match'),
        ({"prompt": "a", "answers": ["b", "c"], "metric": "bleu"}, "the metric bleu takes one answer"),
        ({"prompt": "a", "answers": ["b"], "stop": "c"}, '"stop" must be a list of strings'),
        ({"prompt": "a", "answers": ["b"], "max_new_tokens": 0}, '"max_new_tokens" must be an integer of at least 1'),
        ({"prompt": "a", "answer": "b"}, 'unknown field "answer": known are answers'),
        ({"prompt": "a", "tests": "b", "metric": "squad"}, '"tests" belongs to the metric tests, not to squad'),
        ({"prompt": "a", "metric": "tests"}, 'no "tests"'),
        ({"prompt": "a", "tests": "b", "answers": ["c"]}, '"answers" and "tests" exclude each other'),
        ({"text": "two words"}, 'lines with and without "prompt" do not belong in one file'),
    ],
)
def test_a_bad_line_is_named(record, message, tmp_path):
    path = write(tmp_path / "task.jsonl", {"prompt": "a", "answers": "b"}, record)
    with pytest.raises(UserError) as error:
        read_examples(path)
    assert str(error.value).startswith(f"{path}:2: ")
    assert message in str(error.value)


# --- completions ------------------------------------------------------------------------------------------------------


def asked(count, **settings):
    return [GenerativeExample(f"{i} is", (f"{i}",), f" {i}", **settings) for i in range(count)]


def task_of(examples, tiny, options=GenerationOptions(), **settings):  # noqa: B008  (it is frozen)
    return generative_task(Examples(examples, examples), BytesTokenizer(), 24, options, name="task", **settings)


def by_hand(tiny, tokens, new):
    tokens = list(tokens)
    for _ in range(new):
        tokens.append(int(tiny.logits(np.array(tokens)).argmax(-1)[-1]))
    return tokens[len(tokens) - new :]


def test_greedy_completions_of_prompts_that_are_cut(tiny):
    long = GenerativeExample("A prompt that is longer than the context", ("x",), " x", stop=(), max_new_tokens=6)
    task = task_of([long], tiny)
    assert task.settings["truncated_prompts"] == 1
    assert BytesTokenizer().decode(task.inputs[0]) == long.prompt[-18:]
    (completion,) = task.complete(Engine(tiny.model, tiny.params, tiny.tokenizer), [0])
    new = by_hand(tiny, task.inputs[0], 6)
    assert completion.text == tiny.tokenizer.decode(new[: new.index(256)] if 256 in new else new)
    assert task_of([long], tiny, GenerationOptions(max_new_tokens=20)).new_tokens == [20]
    assert task_of(asked(1, max_new_tokens=64), tiny).new_tokens == [12]  # half of the context
    with pytest.raises(UserError, match="--max_new_tokens=24 leaves no room for a prompt in the context of 24"):
        task_of([long], tiny, GenerationOptions(max_new_tokens=24))


def test_samples_do_not_depend_on_limit_batch_or_number_of_samples(tiny):
    engine = Engine(tiny.model, tiny.params, tiny.tokenizer)
    options = GenerationOptions(max_new_tokens=4, samples=3, temperature=1.0)
    three = task_of(asked(4, stop=()), tiny, options)
    texts = {}
    for batch in three.batches(5):
        texts |= dict(zip(batch, three.complete(engine, batch), strict=True))
    assert sorted(texts) == list(range(12))
    assert len({text.text for text in texts.values()}) > 3
    two = task_of(asked(4, stop=()), tiny, GenerationOptions(4, samples=2, temperature=1.0), limit=2)
    (batch,) = two.batches(8)
    alone = dict(zip(batch, two.complete(engine, batch), strict=True))
    assert [alone[i] for i in range(4)] == [texts[i] for i in (0, 1, 3, 4)]


def test_batches_have_one_length_and_one_list_of_stop_strings(tiny):
    mixed = asked(3, stop=(".",)) + asked(2, stop=()) + asked(2, stop=(".",), max_new_tokens=3)
    assert sorted(map(sorted, task_of(mixed, tiny).batches(8))) == [[0, 1, 2], [3, 4], [5, 6]]


def test_invalid_options():
    with pytest.raises(UserError, match="--samples=2 needs a --temperature above 0"):
        GenerationOptions(samples=2)
    with pytest.raises(UserError, match="--top_p needs a --temperature above 0"):
        GenerationOptions(top_p=0.9)
    with pytest.raises(UserError, match=r"top_p=2\.0 must be in"):
        GenerationOptions(top_p=2.0, temperature=1.0)


# --- evaluation -------------------------------------------------------------------------------------------------------


def test_a_score_can_be_recomputed_from_the_records(workdir, tmp_path, monkeypatch):
    lines = [{"prompt": f"{i} is", "answers": [str(i)], "metric": "squad", "stop": ["6"]} for i in range(4)]
    path = write(tmp_path / "values.jsonl", *lines, {"prompt": "0 is", "answers": "Yes, it is.", "metric": "bleu"})
    options = Options((str(path),), num_fewshot=1, max_new_tokens=4, output=tmp_path / "out.json", temperature=1.0)
    entry = evaluate(workdir, options)["results"]["values"]
    records = [json.loads(line) for line in (tmp_path / "out.examples.jsonl").read_text().splitlines()]
    assert [record["index"] for record in records] == list(range(5))
    for record, line in zip(records, lines, strict=False):
        assert record["prompt"].endswith(f"\n\n{line['prompt']}")
        assert not record["prompt"].startswith(line["prompt"])
    f1 = [record["metrics"]["f1"] for record in records[:4]]
    assert entry["metrics"]["f1"]["value"] == pytest.approx(np.mean(f1))
    assert entry["metrics"]["bleu"]["n"] == 1
    assert "tok:13a" in entry["bleu_signature"]
    monkeypatch.setattr(Engine, "generate", lambda *_, **__: pytest.fail("completions are recorded"))
    assert evaluate(workdir, options)["results"]["values"] == entry


def test_options_that_no_task_uses(workdir, tmp_path):
    path = write(tmp_path / "words.jsonl", {"text": "to be or not"})
    for options, message in (
        ({"max_new_tokens": 3}, "--max_new_tokens is for tasks that generate text"),
        ({"temperature": 1.0}, "--samples, --temperature and --top_p are for"),
        ({"benchmark_dir": tmp_path}, "--benchmark_dir is for benchmarks"),
    ):
        with pytest.raises(UserError, match=message):
            evaluate(workdir, Options((str(path),), **options))


def test_programs_are_run_only_if_it_is_allowed(workdir, tmp_path):
    """An endless loop and an exit do not end the evaluation."""
    try:
        isolation()
    except UserError as error:
        pytest.skip(str(error))
    tests = ["assert x == 1", "assert x == 2", "import os; os._exit(0)", "os.fork()"]
    path = write(tmp_path / "programs.jsonl", *({"prompt": "x = 1 #", "tests": test, "stop": ["\n"]} for test in tests))
    arguments = (f"--workdir={workdir}", f"--tasks={path}", f"--output={tmp_path / 'out.json'}")
    refused = run_command("gptjax.evaluate", *arguments)
    assert refused.returncode == 2
    assert f"{path} runs programs that the model writes: allow it by --allow_code_execution" in refused.stderr
    sampled = ("--allow_code_execution", "--samples=2", "--temperature=0.1", "--max_new_tokens=4")
    result = run_command("gptjax.evaluate", *arguments, *sampled)
    assert result.returncode == 0, result.stderr
    entry = json.loads((tmp_path / "out.json").read_text())["results"]["programs"]
    assert entry["isolation"] == isolation()
    records = [json.loads(line) for line in (tmp_path / "out.examples.jsonl").read_text().splitlines()]
    passed = [record["metrics"]["pass@2"] for record in records]
    assert passed[1:] == [0, 0, 0]
    assert entry["metrics"]["pass@2"]["value"] == sum(passed) / 4
    if passed[0]:  # else the completion was a newline, or characters that no comment may have
        assert records[2]["completions"][0]["outcome"] == "ended with exit code 0"
