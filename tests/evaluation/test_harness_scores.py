"""Prompts and scores of generative benchmarks are those of lm-evaluation-harness, by its own task definitions."""

import importlib
import itertools
from pathlib import Path

import pytest

from gptjax.evaluation import published_prompts
from gptjax.metrics.answers import drop, final_number, open_match, stated_number, summary_rouge, trivia_match

lm_eval = pytest.importorskip("lm_eval")
# Warnings of the harness and its dependencies.
pytestmark = pytest.mark.filterwarnings("ignore")

WORDS = ("the", "The", "A", "Rome", "rome.", "7", "$7,000", "7000", "3.5", "####", "The answer is", "-", "an", "!")
TEXTS = [" ".join(words) for n in (1, 2, 3) for words in itertools.product(WORDS, repeat=n)][::2]


def definition(name: str) -> dict:
    from lm_eval.tasks._yaml_loader import load_yaml

    return dict(load_yaml(Path(lm_eval.__file__).parent / "tasks" / name))


def score(config: dict, filters: list[dict], completion: str, references: list[str]) -> float:
    """The harness' exact match, after its filters, with the best of the references."""
    from lm_eval.api.metrics import exact_match_hf_evaluate
    from lm_eval.api.registry import get_filter

    importlib.import_module("lm_eval.filters")
    texts = [[completion]]
    for step in filters:
        settings = {name: value for name, value in step.items() if name != "function"}
        if step["function"] != "take_first":
            texts = list(get_filter(step["function"])(**settings).apply(texts, [{}]))
    (metric,) = config["metric_list"]
    known = ("regexes_to_ignore", "ignore_case", "ignore_punctuation")
    options = {name: metric[name] for name in known if name in metric}
    given = [texts[0][0]] * len(references)
    return float(exact_match_hf_evaluate(given, references, **options)["exact_match"] > 0)


@pytest.mark.parametrize(
    ("file", "metric", "references"),
    [
        ("gsm8k/gsm8k.yaml", final_number, ["so 7\n#### 7"]),
        ("gsm8k/gsm8k.yaml", final_number, ["#### 7,000"]),
        ("gsm8k/gsm8k-cot.yaml", stated_number, ["7"]),
        ("triviaqa/default.yaml", trivia_match, ["the rome", "7000"]),
        ("nq_open/nq_open.yaml", open_match, ["The Rome", "7000"]),
    ],
)
def test_scores_of_answers(file, metric, references):
    config = definition(file)
    for text in TEXTS:
        expected = {each["name"]: score(config, each["filter"], text, references) for each in config["filter_list"]}
        ours = metric(text, references)
        if "exact_match" in ours:
            assert [ours["exact_match"]] == list(expected.values()), text
        else:
            found = {"strict-match": ours["exact_match_strict"], "flexible-extract": ours["exact_match_flexible"]}
            assert found == expected, text


def test_scores_of_drop_and_summaries():
    theirs = importlib.import_module("lm_eval.tasks.drop.utils")
    references = [("7",), ("Rome", "an answer"), ("1 May",)]
    for text in TEXTS:
        expected = theirs.process_results({"answers": references}, [text])
        assert drop(text, references) == {"exact_match": expected["em"], "f1": expected["f1"]}, text
    summaries = importlib.import_module("lm_eval.tasks.cnn_dailymail.utils")
    for text in ("He was  running\nto Rome.", "runs", ""):
        expected = summaries.calculate_rouge_scores([text], ["He runs, to Rome ."])
        assert summary_rouge(text, ["He runs, to Rome ."]) == pytest.approx(expected)


PAIR = {"translation": {"de": "Ja.", "en": "Yes."}}


@pytest.mark.parametrize(
    ("file", "convert", "record"),
    [
        ("gsm8k/gsm8k.yaml", published_prompts.gsm8k, {"question": "2 + 3?", "answer": "#### 5"}),
        ("gsm8k/gsm8k-cot.yaml", published_prompts.gsm8k_cot, {"question": "2 + 3?", "answer": "#### 5"}),
        ("triviaqa/default.yaml", published_prompts.trivia_qa, {"question": "Who?", "answer": {"aliases": ["A"]}}),
        ("nq_open/nq_open.yaml", published_prompts.natural_questions, {"question": "who", "answer": ["a"]}),
        ("translation/wmt16_de-en.yaml", published_prompts.translation("de", "en"), PAIR),
        ("cnn_dailymail/cnn_dailymail.yaml", published_prompts.cnn_dailymail, {"article": "A.", "highlights": "B."}),
        (
            "humaneval/humaneval.yaml",
            published_prompts.human_eval,
            {"prompt": "def f():\n", "test": "def check(f): pass\n", "entry_point": "f"},
        ),
    ],
)  # fmt: skip
def test_prompts_and_stop_strings(file, convert, record):
    from lm_eval.utils import apply_template

    path = Path(lm_eval.__file__).parent / "tasks" / file
    if not path.exists():
        (path,) = path.parent.glob("*.yaml")
    text = path.read_text() if "humaneval" in file else None
    config = definition(str(path)) if text is None else None
    (example,) = convert(record)
    if config is None:  # its functions need a network when they are loaded
        assert 'doc_to_text: "{{prompt}}"' in text
        assert example.prompt == record["prompt"]
        assert all(repr(stop)[1:-1] in text for stop in example.stop)
        return
    assert example.description + example.prompt == config.get("description", "") + apply_template(
        config["doc_to_text"], record
    )
    stop = config.get("generation_kwargs", {}).get("until", ["\n\n"])
    assert list(example.stop) == stop
