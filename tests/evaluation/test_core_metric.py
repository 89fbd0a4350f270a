"""CORE on a bundle made here, against texts written out and the logits of a tiny model.

The same bundle layout was compared with nanochat's own function (7 tasks of 25 examples, all equal).
"""

import json
import math
import random
from pathlib import Path

import numpy as np
import pytest

from gptjax.config import UserError
from gptjax.data.tokenizers import BytesTokenizer
from gptjax.evaluation.core_metric import core_task
from gptjax.evaluation.run_tasks import Options, check, evaluate
from gptjax.evaluation.scoring import ScoringRequest, ScoringResult

ROWS = {
    "which": [{"query": f"q{i}", "choices": ["a", "ab", "c"], "gold": i % 3} for i in range(4)],
    "schema": [{"context_options": [f"{i} he", f"{i} she"], "continuation": "ran", "gold": i % 2} for i in range(4)],
    "words": [{"context": f" {i} is \n", "continuation": "b"} for i in range(4)],
}
LISTED = """
icl_tasks:
- {label: which, dataset_uri: x/which.jsonl, num_fewshot: [1], icl_task_type: multiple_choice}
- {label: schema, dataset_uri: x/schema.jsonl, num_fewshot: [0], icl_task_type: schema, continuation_delimiter: "; "}
- {label: words, dataset_uri: x/words.jsonl, num_fewshot: [0, 5], icl_task_type: language_modeling}
"""
RANDOM = "Eval Task,Task Category,Random baseline\nwhich,x,25\nschema,x,50.0\nwords,x,0\nother,x,1\n"


@pytest.fixture
def bundle(tmp_path):
    (tmp_path / "eval_data" / "x").mkdir(parents=True)
    for name, rows in ROWS.items():
        text = "".join(json.dumps(row) + "\n" for row in rows)
        (tmp_path / "eval_data" / "x" / f"{name}.jsonl").write_text(text)
    (tmp_path / "core.yaml").write_text(LISTED)
    (tmp_path / "eval_meta_data.csv").write_text(RANDOM)
    return tmp_path


def shuffled(name):
    rows = list(ROWS[name])
    random.Random(1337).shuffle(rows)
    return rows


def text_of(request: ScoringRequest) -> str:
    return BytesTokenizer().decode(request.tokens).removeprefix("<|endoftext|>")


def test_texts_and_scored_tokens(bundle):
    task = core_task(bundle, BytesTokenizer(), 100)
    rows = shuffled("which")
    (shown,) = random.Random(1234).sample([1, 2, 3], 1)
    before = f"{rows[shown]['query']} {rows[shown]['choices'][rows[shown]['gold']]}\n\n"
    texts = [text_of(request) for request in task.requests]
    assert texts[:3] == [f"{before}{rows[0]['query']} {choice}" for choice in ("a", "ab", "c")]
    assert task.scored[:3] == [1, 2, 1]
    number = shuffled("schema")[0]["context_options"][0][0]
    assert texts[12:14] == [f"{number} he; ran", f"{number} she; ran"]
    assert task.scored[12:14] == [len("he; ran")] * 2  # also of the contexts, what all texts end with
    number = shuffled("words")[0]["context"].strip()
    assert texts[20] == f"{number} b"
    assert task.scored[20] == 2  # the blank too, as the prompt has none at its end
    assert task.settings["core_tasks"]["words"] == {"type": "language_modeling", "num_fewshot": 0, "examples": 4}
    short = core_task(bundle, BytesTokenizer(), 8, limit=2)
    assert [len(examples) for examples in short.examples] == [2, 2, 2]
    assert {len(request.tokens) for request in short.requests[:6]} == {8}  # the last tokens
    assert [example.few_shot for example in short.examples[0]] != [example.few_shot for example in task.examples[0]]


def test_the_metric_by_hand(bundle, workdir, tiny):
    entry = evaluate(workdir, Options(tasks=("core",), core_bundle=bundle))["results"]["core"]
    task = core_task(bundle, tiny.tokenizer, tiny.model.config.context_length)
    found = [tiny.by_hand(request) for request in task.requests]
    losses = [-logprob / scored for (logprob, _), scored in zip(found, task.scored, strict=True)]
    which = [int(np.argmin(losses[3 * i : 3 * i + 3])) == row["gold"] for i, row in enumerate(shuffled("which"))]
    schema = [
        int(np.argmin(losses[12 + 2 * i : 14 + 2 * i])) == row["gold"] for i, row in enumerate(shuffled("schema"))
    ]
    words = [greedy for _, greedy in found[20:]]
    accuracies = {"which": np.mean(which), "schema": np.mean(schema), "words": np.mean(words)}
    centered = [
        (accuracies[name] - base) / (1 - base) for name, base in (("which", 0.25), ("schema", 0.5), ("words", 0.0))
    ]
    for name, accuracy in accuracies.items():
        assert entry["metrics"][f"accuracy/{name}"]["value"] == pytest.approx(accuracy)
    assert entry["metrics"]["core"]["value"] == pytest.approx(np.mean(centered))
    assert entry["metrics"]["accuracy/which"]["baselines"] == {"random": 0.25}
    low, high = entry["metrics"]["core"]["interval"]
    assert low < np.mean(centered) < high
    path = workdir / "evaluation" / "core-step0.examples.jsonl"
    records = [json.loads(line) for line in path.read_text().splitlines()]
    assert [record["right"] for record in records] == [*which, *schema, *words]


def test_a_choice_that_another_begins_with(bundle):
    """With a tokenizer of bytes, "a" has no token of its own before "ab": nanochat's NaN wins only as the first."""
    rows = [{"query": "q", "choices": choices, "gold": 0} for choices in (["a", "ab"], ["ab", "a"])]
    path = bundle / "eval_data" / "x" / "which.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    task = core_task(bundle, BytesTokenizer(), 100)
    scores = [ScoringResult(-1.0, 1, False)] * len(task.requests)
    assert sorted(task.scored[:4]) == [0, 0, 1, 1]
    records = task.records(scores)[:2]
    assert all(record["right"] for record in records)
    assert [None in record["losses"] for record in records] == [True, True]
    assert not math.isnan(task.metrics(scores)["core"].value)


@pytest.mark.parametrize(
    ("file", "text", "words"),
    [
        ("eval_meta_data.csv", "Eval Task\nwhich\n", "needs the columns 'Eval Task' and 'Random baseline'"),
        ("eval_meta_data.csv", "Eval Task,Random baseline\nwhich,25\n", "no random baseline"),
        ("core.yaml", "tasks: []\n", "is not a list of tasks"),
        ("core.yaml", LISTED.replace("schema, c", "letters, c"), "icl_task_type must be one of"),
        ("core.yaml", LISTED.replace("x/words", "../words"), "there is no file"),
        ("eval_data/x/which.jsonl", '{"query": "q", "choices": ["a"]}\n' * 2, "which.jsonl:"),
        ("eval_data/x/which.jsonl", '{"query": "q", "choices": ["a", "b"], "gold": 0}\n', "shows 1 other examples"),
    ],
)
def test_damaged_bundles_are_user_errors(bundle: Path, file, text, words):
    (bundle / file).write_text(text)
    with pytest.raises(UserError, match=words):
        core_task(bundle, BytesTokenizer(), 100)


def test_flags_that_do_not_fit(bundle):
    for options, words in (
        (Options(tasks=("core",)), "--tasks=core and --core_bundle=DIR"),
        (Options(tasks=("lambada",), core_bundle=bundle), "need each other"),
        (Options(tasks=("core",), core_bundle=bundle / "none"), r"has no core\.yaml"),
        (Options(tasks=("core",), core_bundle=bundle, num_fewshot=1), "are not for --tasks=core"),
    ):
        with pytest.raises(UserError, match=words):
            check(options)
