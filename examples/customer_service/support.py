"""Answers customers from documents, with citations, and passes on what it is unsure of.

    python examples/customer_service/support.py --run=runs/support
    python -m gptjax.serve --workdir=runs/support/model --documents=runs/support/documents

The first command makes documents, conversations to train on and questions to test with from the package
chatterbot-corpus, whose questions and answers on several topics stand in for problems and solutions of a help desk;
trains a chat model; chats with it; and measures how answerable and unanswerable questions end. It writes documents/,
train.jsonl, questions.jsonl, table.md, escalation.png and completions.jsonl. The second command serves the model with
the documents.

- Documents: four fifths of the problems, each with its solution a passage.
- Questions: problems as customers would write them: some words left out, others of a small table in their place, and
  a greeting. The words are made, not collected. Those of the last fifth are unanswerable: no document has them.
- Conversations: the message is what retrieval puts before a question; the completion is the number of the passage that
  solves it and the solution, "[2] George Orwell.", or PASSED_ON. Problems to train and to test with differ, and so
  do unanswerable ones.

A question is passed on if the best passage has a BM25 score, per word of the question, below a threshold, or if the
model says so. The threshold is the one with the most right ends of the training questions, answerable or not.
"""

import dataclasses
import json
import random
from collections.abc import Sequence
from pathlib import Path

from absl import flags

from gptjax import cli
from gptjax.config import UserError
from gptjax.data.words import words
from gptjax.inference.retrieval import Documents, Passage, with_passages

RUN = flags.DEFINE_string("run", None, "Directory for all steps.")
TOTAL_TOKENS = flags.DEFINE_integer("total_tokens", 200_000, "Tokens to train on.", lower_bound=1)
QUESTIONS = flags.DEFINE_integer("questions", 200, "Questions to test with, half of them unanswerable.", lower_bound=2)

SENTENCE = "I pass this on to a colleague."
PASSED_ON = f"[0] {SENTENCE}"
TOPICS = ("ai", "emotion", "literature", "money", "movies", "psychology", "science", "sports", "trivia")
PER_FILE, MAX_WORDS = 50, 24
SEED = 0
SAME = {
    "what": "which",
    "who": "which person",
    "you": "your system",
    "wrote": "is the author of",
    "are": "is",
    "year": "date",
    "called": "named",
    "tell": "explain",
    "movie": "film",
    "the": "a",
    "did": "has",
    "first": "1st",
}
GREETINGS = ("Hello,", "Hi, please help:", "Good morning,", "I need help.", "")


@dataclasses.dataclass(frozen=True)
class Question:
    """What a customer writes.

    Attributes:
      text: made from `problem`.
      solution: None: no document has it.
    """

    text: str
    problem: str
    solution: str | None


# --- data -------------------------------------------------------------------------------------------------------------


def read_problems() -> list[tuple[str, str]]:
    """Reads the problems of the package and their solutions, in one random order, each problem once."""
    import yaml

    try:
        import chatterbot_corpus
    except ImportError:
        raise UserError("needs the package: pip install --no-deps chatterbot-corpus==1.3.3") from None
    folder = Path(chatterbot_corpus.__file__).parent / "data" / "english"
    problems: dict[str, tuple[str, str]] = {}
    for topic in TOPICS:
        for turns in yaml.safe_load((folder / f"{topic}.yml").read_text(encoding="utf-8"))["conversations"]:
            problem, solution = (" ".join(str(turn).split()[:MAX_WORDS]) for turn in turns[:2])
            problems.setdefault(problem.lower().rstrip("?.! "), (problem, solution))
    found = sorted(problems.values())
    random.Random(SEED).shuffle(found)
    return found


def write_documents(folder: Path, problems: Sequence[tuple[str, str]]) -> None:
    """Writes Markdown files: a heading with the problem, below it the solution."""
    folder.mkdir(parents=True, exist_ok=True)
    for first in range(0, len(problems), PER_FILE):
        text = "\n".join(f"## {problem}\n\n{solution}\n" for problem, solution in problems[first : first + PER_FILE])
        (folder / f"problems_{first // PER_FILE:02}.md").write_text(text, encoding="utf-8")


def asked(problem: str, rng: random.Random) -> str:
    """Returns a problem as a customer would write it: without a fifth of its words, others replaced, greeted."""
    kept = [word for word in problem.rstrip(".?!").lower().split() if rng.random() > 0.2] or [problem]
    text = " ".join(SAME.get(word, word) for word in kept)
    return f"{rng.choice(GREETINGS)} {text}.".strip()


def solves(passage: Passage, question: Question) -> bool:
    """Whether a passage is the one that a question is from."""
    return question.solution is not None and passage.text == f"## {question.problem}\n\n{question.solution}"


def reference(question: Question, passages: Sequence[Passage]) -> str:
    """Returns the completion to train on: a passage's number and solution, or PASSED_ON where none solves it."""
    for number, passage in enumerate(passages, start=1):
        if solves(passage, question):
            return f"[{number}] {question.solution}"
    return PASSED_ON


def make_questions(
    problems: Sequence[tuple[str, str]], documented: int, count: int
) -> tuple[list[Question], list[Question]]:
    """Returns the questions to train on and to test with; half of each are unanswerable, or as many as there are."""
    rng = random.Random(SEED)
    known = [Question(asked(p, rng), p, s) for p, s in problems[:documented]]
    unknown = [Question(asked(p, rng), p, None) for p, _ in problems[documented:]]
    half = min(count // 2, len(unknown) // 2)
    test = known[:half] + unknown[:half]
    return known[half:] + unknown[half:], test


# --- how questions end ------------------------------------------------------------------------------------------------


def end_of(question: Question, cited: Passage | None) -> str:
    """Returns how a question ended: "solved", "wrong" or "passed on".

    Args:
      cited: the passage that the completion cites; None: the question was passed on.
    """
    if cited is None:
        return "passed on"
    return "solved" if solves(cited, question) else "wrong"


def is_right(question: Question, end: str) -> bool:
    """Whether a question ended as it should: solved, or passed on if no document has its solution."""
    return end == ("passed on" if question.solution is None else "solved")


def cited_in(completion: str, sources: Sequence[Passage]) -> Passage | None:
    """Returns the passage whose number a completion begins with; None: it has no such number."""
    number = completion.strip()[1:].partition("]")[0]
    if not completion.strip().startswith("[") or not number.isdecimal() or not 1 <= int(number) <= len(sources):
        return None
    return sources[int(number) - 1]


def end_by_completion(question: Question, completion: str, sources: Sequence[Passage]) -> str:
    """Returns how a question ended by a model: "solved" if it cites the right passage and gives the solution of it."""
    cited = cited_in(completion, sources)
    if cited is None or SENTENCE in completion:
        return "passed on"
    if question.solution is None or question.solution not in completion:
        return "wrong"
    return end_of(question, cited)


def best_passage(documents: Documents, question: Question) -> tuple[Passage | None, float]:
    """Returns the best passage for a question, and its BM25 score per word of the question."""
    found = documents.scored(question.text, 1)
    return (found[0][0], found[0][1] / len(words(question.text))) if found else (None, 0.0)


def best_threshold(documents: Documents, questions: Sequence[Question]) -> float:
    """Returns the score below which questions are passed on: that of the most right ends, both kinds equal."""
    best = [(*best_passage(documents, question), question) for question in questions]

    def right(threshold: float) -> float:
        of_kind: dict[bool, list[bool]] = {}
        for passage, score, question in best:
            end = end_of(question, passage if score >= threshold else None)
            of_kind.setdefault(question.solution is None, []).append(is_right(question, end))
        return sum(sum(found) / len(found) for found in of_kind.values())

    return max(sorted({score for _, score, _ in best}), key=right)


def table(methods: dict[str, list[str]], questions: Sequence[Question]) -> list[str]:
    """Returns the lines of a Markdown table: shares of the ends of answerable and of unanswerable questions."""
    lines = ["| method | questions | solved | wrong | passed on | right |", "|---|---|---|---|---|---|"]
    for name, ends in methods.items():
        for kind in ("answerable", "unanswerable"):
            chosen = [
                (q, end) for q, end in zip(questions, ends, strict=True) if (q.solution is None) == (kind[0] == "u")
            ]
            shares = [sum(end == way for _, end in chosen) / len(chosen) for way in ("solved", "wrong", "passed on")]
            shares.append(sum(is_right(q, end) for q, end in chosen) / len(chosen))
            lines.append(f"| {name} | {kind} | " + " | ".join(f"{share:.1%}" for share in shares) + " |")
    return lines


def plot(path: Path, documents: Documents, questions: Sequence[Question], points: dict[str, list[str]]) -> None:
    """Draws solved answerable against passed-on unanswerable questions, over all thresholds and by each method."""
    from matplotlib.figure import Figure

    best = [(*best_passage(documents, question), question) for question in questions]
    top = max(score for _, score, _ in best)

    def shares(ends: Sequence[str]) -> tuple[float, float]:
        solved = [e == "solved" for e, q in zip(ends, questions, strict=True) if q.solution is not None]
        passed = [e == "passed on" for e, q in zip(ends, questions, strict=True) if q.solution is None]
        return sum(passed) / len(passed), sum(solved) / len(solved)

    curve = [
        shares([end_of(q, passage if score >= top * step / 50 else None) for passage, score, q in best])
        for step in range(52)
    ]
    figure = Figure(figsize=(5.5, 4.2), layout="constrained")
    axes = figure.subplots()
    axes.plot(*zip(*curve, strict=True), color="#9db8d9", linewidth=2, label="BM25, all thresholds")
    for (name, ends), color in zip(points.items(), ("#8a9099", "#1f4e8c", "#c8452d"), strict=True):
        axes.plot(*shares(ends), "o", color=color, label=name)
    axes.set(xlabel="unanswerable questions passed on", ylabel="answerable questions solved")
    axes.set(xlim=(-0.03, 1.03), ylim=(-0.03, 1.03))
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(alpha=0.3)
    axes.legend(frameon=False)
    figure.savefig(path, dpi=150)


# --- commands ---------------------------------------------------------------------------------------------------------


def make_data(folder: Path, count: int) -> tuple[Documents, list[Question], list[Question]]:
    """Writes documents, conversations and at most `count` test questions; returns documents and questions."""
    problems = read_problems()
    documented = len(problems) * 4 // 5
    write_documents(folder / "documents", problems[:documented])
    documents = Documents(folder / "documents")
    train, test = make_questions(problems, documented, count)
    with (folder / "train.jsonl").open("w", encoding="utf-8") as file:
        for question in train:
            passages = documents.find(question.text)
            turns = [
                {"role": "user", "content": with_passages(question.text, passages)},
                {"role": "assistant", "content": reference(question, passages)},
            ]
            file.write(json.dumps({"messages": turns}) + "\n")
    lines = (json.dumps(dataclasses.asdict(question)) + "\n" for question in test)
    (folder / "questions.jsonl").write_text("".join(lines), encoding="utf-8")
    print(f"{documented:,} problems in {folder / 'documents'}, {len(train):,} conversations, {len(test):,} questions")
    return documents, train, test


def run(folder: Path) -> None:
    """Makes the data, trains, or resumes, chats and measures."""
    import gptjax

    documents, train, test = make_data(folder, QUESTIONS.value)
    config = gptjax.load_config(
        f"configs/chatgpt.py:stage=sft,data=jsonl:{folder}/train.jsonl,runlocal",
        {
            "model.context_length": 256,
            "data.validation_fraction": 0.05,
            "data.tokenizer": "bpe:2048",
            "batch.epochs": None,
            "batch.total_tokens": TOTAL_TOKENS.value,
            "batch.tokens_per_batch": 8 * 256,
            "optimizer.peak_lr": 2e-3,
            "evaluation.every_epochs": None,
            "evaluation.every_tokens": max(1, TOTAL_TOKENS.value // 4),
            "evaluation.sample_prompt": test[0].text,
            "checkpoint.every_epochs": None,
            "checkpoint.every_tokens": max(1, TOTAL_TOKENS.value // 4),
        },
    )
    gptjax.train(config, folder / "model")
    chat = gptjax.load(folder / "model").chat(documents=folder / "documents", temperature=0.0, max_new_tokens=32)
    threshold = best_threshold(documents, train)
    always, thresholded, by_model, records = [], [], [], []
    for question in test:
        passage, score = best_passage(documents, question)
        sure = score >= threshold
        chat.reset()
        completion = chat.reply(question.text)
        cited = cited_in(completion, chat.sources)
        always.append(end_of(question, passage))
        thresholded.append(end_of(question, passage if sure else None))
        by_model.append(end_by_completion(question, completion, chat.sources) if sure else "passed on")
        place = None if cited is None else cited.place
        records.append(
            {
                **dataclasses.asdict(question),
                "completion": completion,
                "cited": place,
                "sure": sure,
                "end": by_model[-1],
            }
        )
    methods = {"best passage": always, "best passage, threshold": thresholded, "model, threshold": by_model}
    lines = table(methods, test)
    (folder / "table.md").write_text("\n".join(lines) + "\n", encoding="utf-8")
    (folder / "completions.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records), "utf-8")
    plot(folder / "escalation.png", documents, test, methods)
    print(f"\nBM25 threshold {threshold:.2f}, chosen on the training questions\n")
    print("\n".join(lines))
    print(f"\n{folder / 'escalation.png'}")
    print(f"python -m gptjax.serve --workdir={folder / 'model'} --documents={folder / 'documents'}")


def main() -> None:
    if RUN.value is None:
        raise UserError("needs --run=DIR, a directory for all steps")
    run(Path(RUN.value).expanduser())


if __name__ == "__main__":
    cli.run(main)
