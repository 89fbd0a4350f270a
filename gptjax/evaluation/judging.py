"""Pairwise comparison of completions by a judge, in both orders (Zheng et al. 2023, sections 3.1 and 3.4).

The judge is shown a conversation with two completions, A and B, and answers A, B or tie; then the same with the
completions swapped. A completion wins if both verdicts prefer it, and loses if both prefer the other; otherwise, where
the orders disagree or are tied, it counts 1/2. Metrics:
  judge_win_rate        mean over the prompts whose two verdicts can be read
  judge_disagreement    share of these prompts for which the verdicts differ between the orders
  judge_first_position  share of the verdicts A among the verdicts A and B: 0.5 without position bias
  judge_unreadable      share of the verdicts that cannot be read, whose prompts have no part in the other metrics
"""

import dataclasses
import hashlib
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple, cast

from gptjax.config import UserError
from gptjax.data.conversations import Prompt
from gptjax.data.templates import chat_format
from gptjax.evaluation.dialogue import DialogueTask, complete_prompts, dialogue_task
from gptjax.evaluation.example_records import file_name, resumably
from gptjax.evaluation.judge_models import Judge, check_judge, load_chat_model, open_judge
from gptjax.evaluation.scoring import Scorer
from gptjax.metrics.measurement import Measurement, mean, ratio

Verdict = Literal["A", "B", "tie"]
_VERDICT = re.compile(
    r"(?:(?:final )?(?:verdict|answer|winner|choice)(?: is)? ?:? ?)?(?:completion )?[\[(\"' ]*(a|b|tie)[\])\"'. ]*",
    re.IGNORECASE,
)
_PROMPT = """\
Below are a conversation and two completions of it, A and B. Decide which completion serves the user better. Judge \
whether it is correct, to the point and clear. Pay no attention to which one is shown first, nor to their lengths.

### Conversation
{conversation}

### Completion A
{first}

### Completion B
{second}

### Verdict
Answer with one word: A, B or tie."""


@dataclasses.dataclass(frozen=True)
class JudgeSettings:
    """The judge and what completions are compared with.

    Attributes:
      judge: workdir, or URL#MODEL.
      max_tokens: maximum length of the judge's answer in tokens.
      opponent: workdir whose completions are compared with; None: the references.
    """

    judge: str
    max_tokens: int = 64
    opponent: Path | None = None

    def check(self) -> None:
        """Raises UserError if the judge or the opponent does not exist."""
        check_judge(self.judge)
        if self.opponent is not None and not self.opponent.is_dir():
            raise UserError(f"--opponent={self.opponent} is not a workdir")

    @property
    def stated(self) -> dict[str, str]:
        """The settings, for the report."""
        return {"judge": self.judge, "opponent": "references" if self.opponent is None else str(self.opponent)}


class JudgeAnswer(NamedTuple):
    """The text that a judge answers."""

    text: str


def judge_prompt(prompt: Prompt, first: str, second: str) -> str:
    """Returns the text that asks a judge for its verdict."""
    turns = "\n\n".join(f"{message.role.capitalize()}: {message.content}" for message in prompt.messages)
    return _PROMPT.format(conversation=turns, first=first, second=second)


def read_verdict(text: str) -> Verdict | None:
    """Reads the verdict in the last line of an answer or, failing that, in its first; None: there is none."""
    lines = [line for line in (line.strip(" *`#\t") for line in text.splitlines()) if line]
    for line in (lines[-1:], lines[:1]):
        if line and (found := _VERDICT.fullmatch(line[0].replace("*", ""))):
            verdict = found[1].lower()
            return cast(Verdict, verdict if verdict == "tie" else verdict.upper())
    return None


def outcome(shown_first: Verdict, shown_second: Verdict) -> float:
    """Returns 1 for a win in both orders, 0 for a loss in both, else 1/2.

    Args:
      shown_first: verdict with our completion as A.
      shown_second: verdict with our completion as B.
    """
    if (shown_first, shown_second) == ("A", "B"):
        return 1.0
    return 0.0 if (shown_first, shown_second) == ("B", "A") else 0.5


def judge_dialogue(
    task: DialogueTask,
    ours: Sequence[str],
    settings: JudgeSettings,
    mesh: str,
    directory: Path,
    name: str,
    batch_size: int,
) -> tuple[dict[str, Measurement], list[dict[str, Any]]]:
    """Compares completions of a task's prompts with those of the opponent, completed first if they are not recorded.

    Args:
      mesh: layout of the judge's and the opponent's model over the devices, as --mesh.

    Returns:
      As `judge_completions`.

    Raises:
      UserError: the judge or the opponent is no chat model, or a prompt does not fit into the opponent's context.
    """
    theirs = task.references
    if settings.opponent is not None:
        other = load_chat_model(settings.opponent, mesh, "--opponent")
        form = chat_format(other.config.chat, other.tokenizer, other.config.model.vision)
        context_length = other.model.config.context_length
        their_task = dialogue_task(task.prompts, form, context_length, max_new_tokens=task.max_new_tokens)
        if len(their_task.prompts) < len(task.prompts):
            raise UserError(f"a prompt does not fit into the context of --opponent={settings.opponent}: lower --limit")
        scorer = Scorer(other.model, other.params, other.mesh, batch_size)
        records = settings.opponent / "evaluation" / "scores"
        theirs = [answer.text for answer in complete_prompts(their_task, other, scorer, records, name, batch_size)]
    judge = open_judge(settings.judge, mesh, settings.max_tokens)
    return judge_completions(task.prompts, ours, theirs, judge, directory, name, batch_size)


def judge_completions(
    prompts: Sequence[Prompt],
    ours: Sequence[str],
    theirs: Sequence[str],
    judge: Judge,
    directory: Path,
    name: str,
    batch_size: int,
) -> tuple[dict[str, Measurement], list[dict[str, Any]]]:
    """Judges each pair of completions in both orders; a stopped evaluation resumes from its records.

    Args:
      directory: directory of the records.
      name: name of the task, for files and progress bars.
      batch_size: pairs judged together.

    Returns:
      The metrics above; for each prompt a record of the two questions to the judge, its answers and verdicts.

    Raises:
      UserError: no verdict can be read, or the judge fails.
    """
    asked = []
    for prompt, own, other in zip(prompts, ours, theirs, strict=True):
        asked += [judge_prompt(prompt, own, other), judge_prompt(prompt, other, own)]
    key = hashlib.sha256(repr((judge.identity, asked)).encode(errors="backslashreplace")).hexdigest()[:16]
    batches = [range(i, min(i + 2 * batch_size, len(asked))) for i in range(0, len(asked), 2 * batch_size)]

    def answer(indices: Sequence[int]) -> list[JudgeAnswer]:
        return [JudgeAnswer(text) for text in judge.answers([asked[i] for i in indices])]

    path = directory / f"{file_name(name)}-judge-{key}.jsonl"
    answers = [each.text for each in resumably(path, f"{name} judge", batches, answer, JudgeAnswer)]
    verdicts = [read_verdict(text) for text in answers]
    pairs = list(zip(verdicts[::2], verdicts[1::2], strict=True))
    if all(None in pair for pair in pairs):
        raise UserError(
            f"no verdict of the judge could be read; its first answer is {answers[0][:80]!r}: choose another judge, "
            "with a longer context if this is empty, or raise --judge_tokens"
        )
    records = []
    for i, pair in enumerate(pairs):
        fields = zip(asked[2 * i : 2 * i + 2], answers[2 * i : 2 * i + 2], pair, strict=True)
        judged = [{"prompt": prompt, "text": text, "verdict": verdict} for prompt, text, verdict in fields]
        first, second = pair
        result = None if first is None or second is None else outcome(first, second)
        records.append({"opponent_answer": theirs[i], "judge": judged, "judge_outcome": result})
    return _measured(pairs), records


def _measured(pairs: Sequence[tuple[Verdict | None, Verdict | None]]) -> dict[str, Measurement]:
    """Computes the metrics from the verdicts, our completion first and second; unreadable pairs have weight 0."""
    wins, changed, firsts, decided, known = [], [], [], [], []
    for first, second in pairs:
        readable = first is not None and second is not None
        known.append(float(readable))
        wins.append(outcome(first, second) if first is not None and second is not None else 0.0)
        changed.append(float(readable and {"A": "B", "B": "A", "tie": "tie"}[str(first)] != second))
        firsts.append(float((first, second).count("A")) if readable else 0.0)
        decided.append(float(2 - (first, second).count("tie")) if readable else 0.0)
    n = int(sum(known))
    found = {
        "judge_win_rate": ratio(wins, known)._replace(n=n),
        "judge_disagreement": ratio(changed, known)._replace(n=n),
    }
    if sum(decided):
        found["judge_first_position"] = ratio(firsts, decided)._replace(n=n)
    return found | {"judge_unreadable": mean([pair.count(None) / 2 for pair in pairs])}
