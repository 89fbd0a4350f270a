"""Made records of the benchmarks of completions that lm-evaluation-harness has too, in the form of its datasets."""

from collections.abc import Callable

from tests.evaluation.harness_cases import VALIDATION, Case, Record, shown

NO_DATE = {"day": "", "month": "", "year": ""}
MATCH = {"exact_match": "exact_match"}
NUMBERS = {
    "exact_match_strict": "exact_match,strict-match",
    "exact_match_flexible": "exact_match,flexible-extract",
}
GSM8K = [{"question": f"{n} + 7 is what?", "answer": f"{n} + 7 = {n + 7}\n#### {n + 7}"} for n in range(7)]


def number(record: Record, completion: str, index: int) -> Record:
    found = [word for word in completion.split() if word.isdigit()] or ["7"]
    return {**record, "answer": f"so\n#### {found[-1]}" if index % 2 else record["answer"]}


DROP = [
    {
        "query_id": str(n),
        "passage": f"He ran {n} times.",
        "question": "How often?",
        "answer": {"number": "", "date": {**NO_DATE, "year": "1999"}, "spans": []},
        "validated_answers": {"number": ["7", ""], "date": [NO_DATE] * 2, "spans": [[], ["he", "Rome"]]},
    }
    for n in range(3)
]


def spans(record: Record, completion: str, index: int) -> Record:
    texts = [[f"The {completion}"], completion.split()[:2] or ["no"], ["no one"]][index]
    return {**record, "answer": {"number": "", "date": NO_DATE, "spans": texts}}


TRIVIA = [
    {"question": f"Who is {name}", "answer": {"aliases": ["Ann", "A."], "value": "Ann"}} for name in ("A", "B", "C")
]
NQ = [{"question": f"who is {name}", "answer": ["Ann", "Bob"]} for name in ("a", "b", "c")]
SQUAD = [
    {
        "id": str(n), "title": "Rome", "context": f"Ann ran {n} times.", "question": "Who?",
        "answers": {"text": ["Ann"], "answer_start": [0]},
    }
    for n in range(4)
]  # fmt: skip


def alias(record: Record, completion: str, index: int) -> Record:
    return {
        **record,
        "answer": {"aliases": ["x", f"{completion.strip().upper()}!"] if index else ["x", "y"], "value": "x"},
    }


def open_answer(record: Record, completion: str, index: int) -> Record:
    return {**record, "answer": ["x", f"the {completion.strip()}"] if index else ["x", "an x"]}


def span(record: Record, completion: str, index: int) -> Record:
    texts = [[], ["x", f"the {completion}!"], completion.split()[:2] or ["x"], []][index]
    return {**record, "answers": {"text": texts, "answer_start": [0] * len(texts)}}


def pairs(source: str, target: str) -> list[Record]:
    return [{"translation": {source: f"Ja {n}.", target: f"Yes {n}."}} for n in range(2)]


def translated(target: str) -> Callable[[Record, str, int], Record]:
    def answered(record: Record, completion: str, index: int) -> Record:
        text = f"{completion.strip()} {index}" if index else "Yes."
        return {"translation": {**record["translation"], target: text}}

    return answered


NEWS = [{"article": f"Ann  ran to Rome {n} times.", "highlights": "Ann ran .", "id": str(n)} for n in range(2)]


def highlights(record: Record, completion: str, index: int) -> Record:
    return {**record, "highlights": f"Running  to\n{completion[: len(completion) // 2]}"}


PROGRAMS = [
    {
        "task_id": str(n),
        "prompt": 'def one():\n    return 1\n\n\nNOTE = """',
        "canonical_solution": "\n",
        "test": f'"""\n\n\ndef check(f):\n    assert f() == {n}\n',
        "entry_point": "one",
    }
    for n in range(2)
]

COMPLETIONS = {
    "gsm8k": Case({"gsm8k": "main"}, "openai/gsm8k", GSM8K[4:], NUMBERS, shown(GSM8K, "question"), answered=number),
    "gsm8k_cot": Case({"gsm8k_cot": "main"}, "openai/gsm8k", GSM8K[4:], NUMBERS, answered=number),
    "drop": Case(
        *({"drop": None}, "EleutherAI/drop", DROP, {"exact_match": "em", "f1": "f1"}, DROP, VALIDATION),
        answered=spans,
        few_shot=False,
    ),
    "triviaqa": Case(
        {"triviaqa": "rc.nocontext"},
        "mandarjoshi/trivia_qa",
        TRIVIA,
        MATCH,
        shown(TRIVIA, "question"),
        VALIDATION,
        answered=alias,
    ),
    "nq_open": Case(
        {"nq_open": None},
        "google-research-datasets/nq_open",
        NQ,
        MATCH,
        shown(NQ, "question"),
        VALIDATION,
        answered=open_answer,
    ),
    "squad_v2": Case(
        {"squadv2": None},
        "lighteval/squad_v2",
        SQUAD,
        {
            "exact_match": "exact",
            "exact_match_answerable": "HasAns_exact",
            "f1_unanswerable": "NoAns_f1",
            "f1": "f1",
            "f1_answerable": "HasAns_f1",
            "exact_match_unanswerable": "NoAns_exact",
        },
        shown(SQUAD, "context"),
        VALIDATION,
        answered=span,
        few_shot=False,
    ),
    **{
        f"{wmt}_{source}_{target}": Case(
            *({f"{wmt}-{source}-{target}": pair}, f"wmt/{wmt}", pairs(source, target), {"bleu": "bleu"}),
            shots=pairs(source, target)[::-1],
            splits=("test", "validation"),
            answered=translated(target),
        )
        for wmt, pair, other in (("wmt14", "fr-en", "fr"), ("wmt16", "de-en", "de"), ("wmt16", "ro-en", "ro"))
        for source, target in ((other, "en"), ("en", other))
    },
    "cnn_dailymail": Case(
        {"cnn_dailymail_abisee": "3.0.0"},
        "abisee/cnn_dailymail",
        NEWS,
        {name: name for name in ("rouge1", "rouge2", "rougeL")},
        answered=highlights,
    ),
    "humaneval": Case({"humaneval": None}, "openai/openai_humaneval", PROGRAMS, {"pass@1": "pass@1"}),
}
