"""CORE, the mean of centered accuracies on 22 tasks (Li et al. 2024, DCLM, section 3.5), as nanochat evaluates it.

`--core_bundle` is the folder of its evaluation bundle: core.yaml, which lists the tasks; eval_meta_data.csv, which has
their random baselines; and the examples in eval_data. A task is of one of three types:
  multiple_choice     the choice after the query whose own tokens are the most probable, on average per token
  schema              the context after which the tokens of the continuation are the most probable, on average
  language_modeling   greedy decoding gives all tokens of the continuation
A choice's own tokens are those after the tokens that all choices begin with, and a schema's continuation is the tokens
that all its texts end with. A choice without tokens of its own has the loss NaN, which wins only as the first choice.

The examples of each task are shuffled with seed 1337, of which --limit takes the first; those before example i are
sampled among the others with seed 1234 + i. Metrics:
  core            mean of the centered accuracies
  centered/TASK   (accuracy - random) / (1 - random)
  accuracy/TASK
"""

import csv
import dataclasses
import math
import random
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from gptjax.config import UserError
from gptjax.data.text_files import json_objects, read_lines
from gptjax.data.tokenizers import Tokenizer
from gptjax.evaluation.few_shot import SEPARATOR
from gptjax.evaluation.scoring import ScoringRequest, ScoringResult, start_of_text
from gptjax.evaluation.tasks import identity
from gptjax.metrics.measurement import Measurement, mean, weighted_mean

SHUFFLING_SEED = 1337
SAMPLING_SEED = 1234  # plus the index of the example
TYPES = ("multiple_choice", "schema", "language_modeling")


@dataclasses.dataclass(frozen=True)
class CoreEntry:
    """A task of the bundle.

    Attributes:
      kind: one of TYPES.
      path: file of the examples.
      delimiter: text between a query or context and its continuation.
      baseline: accuracy of a random choice.
    """

    label: str
    kind: str
    path: Path
    num_fewshot: int
    delimiter: str
    baseline: float


@dataclasses.dataclass(frozen=True)
class CoreExample:
    """An example: the texts that are compared, or the one text to continue.

    Attributes:
      few_shot: the text before each of `texts`.
      texts: the options; of language_modeling the text with its continuation.
      prompt: of language_modeling the text without its continuation.
      answer: index of the correct option.
    """

    few_shot: str
    texts: tuple[str, ...]
    prompt: str
    answer: int


@dataclasses.dataclass(frozen=True)
class CoreTask:
    """Encoded examples of all tasks.

    Attributes:
      examples: of each task, in the order of `entries`.
      requests: one for each text of each example, in order.
      scored: number of tokens of each request that count; 0: there are none, and the request is not used.
    """

    entries: list[CoreEntry]
    examples: list[list[CoreExample]]
    requests: list[ScoringRequest]
    scored: list[int]
    settings: dict[str, Any]

    @property
    def identities(self) -> list[str]:
        """A hash of each example with its few-shot examples, equal for equal text whatever the tokenizer."""
        return [
            identity((entry.label, example))
            for entry, examples in zip(self.entries, self.examples, strict=True)
            for example in examples
        ]

    def metrics(self, scores: Sequence[ScoringResult]) -> dict[str, Measurement]:
        """Computes the metrics above."""
        accuracies, centered = dict[str, Measurement](), dict[str, Measurement]()
        remaining = self._losses(scores)
        for entry, examples in zip(self.entries, self.examples, strict=True):
            right = [self._is_right(entry, example, remaining) for example in examples]
            accuracies[f"accuracy/{entry.label}"] = mean([float(each) for each in right])
            scale = 1 - entry.baseline
            centered[f"centered/{entry.label}"] = mean([(each - entry.baseline) / scale for each in right])
        weights = [1 / len(centered)] * len(centered)
        return {"core": weighted_mean(list(centered.values()), weights), **centered, **accuracies}

    def baselines(self) -> dict[str, dict[str, float]]:
        """The random baseline of each score."""
        found = {"core": {"random": 0.0}}
        for entry in self.entries:
            found |= {f"accuracy/{entry.label}": {"random": entry.baseline}}
            found |= {f"centered/{entry.label}": {"random": 0.0}}
        return found

    def records(self, scores: Sequence[ScoringResult]) -> list[dict[str, Any]]:
        """Returns a record of each example with its texts, mean losses in nats per token, and whether it is right."""
        remaining, again, found = self._losses(scores), self._losses(scores), list[dict[str, Any]]()
        for entry, examples in zip(self.entries, self.examples, strict=True):
            for example in examples:
                losses = [loss for loss, _ in (next(remaining) for _ in example.texts)]
                found.append(
                    {
                        "core_task": entry.label,
                        "few_shot": example.few_shot,
                        "options": example.texts,
                        "answer": example.answer,
                        "losses": [None if math.isnan(loss) else loss for loss in losses],
                        "right": self._is_right(entry, example, again),
                    }
                )
        return found

    def _losses(self, scores: Sequence[ScoringResult]) -> Iterator[tuple[float, bool]]:
        """Yields the mean loss of each request, and whether greedy decoding gives its tokens."""
        for score, scored in zip(scores, self.scored, strict=True):
            yield (-score.logprob / scored, score.is_greedy) if scored else (math.nan, True)

    @staticmethod
    def _is_right(entry: CoreEntry, example: CoreExample, remaining: Iterator[tuple[float, bool]]) -> bool:
        losses = [next(remaining) for _ in example.texts]
        if entry.kind == "language_modeling":
            return losses[0][1]
        values = [loss for loss, _ in losses]
        return values.index(min(values)) == example.answer


def read_bundle(bundle: Path) -> list[CoreEntry]:
    """Reads the list of the tasks of a bundle.

    Raises:
      UserError: a file is missing or malformed.
    """
    import yaml

    listing, table = bundle / "core.yaml", bundle / "eval_meta_data.csv"
    for path in (listing, table):
        if not path.is_file():
            raise UserError(f"--core_bundle={bundle} has no {path.name}: give the folder of nanochat's eval_bundle")
    try:
        with table.open(encoding="utf-8", newline="") as file:
            baselines = {row["Eval Task"]: float(row["Random baseline"]) / 100 for row in csv.DictReader(file)}
    except (KeyError, ValueError, TypeError):
        raise UserError(f"{table} needs the columns 'Eval Task' and 'Random baseline', in percent") from None
    try:
        listed = yaml.safe_load(listing.read_text(encoding="utf-8"))["icl_tasks"]
        entries = [_entry(task, bundle / "eval_data", baselines) for task in listed]
    except (KeyError, IndexError, TypeError, ValueError, AttributeError, yaml.YAMLError) as error:
        raise UserError(f"{listing} is not a list of tasks as in nanochat's eval_bundle ({error!r})") from None
    if not entries or len({entry.label for entry in entries}) < len(entries):
        raise UserError(f"{listing} has no tasks, or two of the same label")
    return entries


def _entry(task: dict[str, Any], data: Path, baselines: dict[str, float]) -> CoreEntry:
    label, path = str(task["label"]), data / str(task["dataset_uri"])
    if task["icl_task_type"] not in TYPES:
        raise ValueError(f"{label}: icl_task_type must be one of {', '.join(TYPES)}")
    if label not in baselines or not 0 <= baselines[label] < 1:
        raise UserError(f"eval_meta_data.csv has no random baseline from 0 to below 100 of the task {label}")
    if not path.resolve().is_relative_to(data.resolve()) or not path.is_file():
        raise UserError(f"there is no file {path} in the folder eval_data, which core.yaml names for {label}")
    delimiter = str(task.get("continuation_delimiter", " "))
    return CoreEntry(label, task["icl_task_type"], path, int(task["num_fewshot"][0]), delimiter, baselines[label])


def core_task(bundle: Path, tokenizer: Tokenizer, context_length: int, *, limit: int | None = None) -> CoreTask:
    """Reads and encodes the examples of all tasks of a bundle.

    Args:
      context_length: of longer texts the last tokens are used.
      limit: number of examples of each task, from the first after shuffling; None: all.

    Raises:
      UserError: a file is malformed, has too few examples to show, or the tokenizer has no end-of-text.
    """
    entries, examples = read_bundle(bundle), list[list[CoreExample]]()
    requests, scored = list[ScoringRequest](), list[int]()
    for entry in entries:
        records = list(json_objects(read_lines(entry.path)))
        random.Random(SHUFFLING_SEED).shuffle(records)
        records = records[:limit]
        if len(records) <= entry.num_fewshot:
            raise UserError(
                f"{entry.label} shows {entry.num_fewshot} other examples, but has {len(records)}: raise --limit"
            )
        examples.append([_example(entry, records, index) for index in range(len(records))])
        for example, (_, place) in zip(examples[-1], records, strict=True):
            for tokens, count in _encoded(entry, example, tokenizer, context_length):
                if count >= len(tokens):
                    raise UserError(f"{place}: a continuation is longer than the model's context of {context_length}")
                requests.append(ScoringRequest(tokens, max(count, 1)))
                scored.append(count)
    settings = {
        "examples": sum(map(len, examples)),
        "core_bundle": str(bundle),
        "core_tasks": {
            entry.label: {"type": entry.kind, "num_fewshot": entry.num_fewshot, "examples": len(of)}
            for entry, of in zip(entries, examples, strict=True)
        },
    }
    return CoreTask(entries, examples, requests, scored, settings)


def _example(entry: CoreEntry, records: Sequence[tuple[dict[str, Any], str]], index: int) -> CoreExample:
    """Returns an example with its few-shot examples."""
    others = [i for i in range(len(records)) if i != index]
    shown = random.Random(SAMPLING_SEED + index).sample(others, entry.num_fewshot) if entry.num_fewshot else []
    few_shot = "".join(_parts(entry, *records[i]).shown + SEPARATOR for i in shown)
    parts = _parts(entry, *records[index])
    return CoreExample(few_shot, parts.texts, parts.prompt, parts.answer)


@dataclasses.dataclass(frozen=True)
class _Parts:
    """The texts of a record: as a question, and as a few-shot example."""

    texts: tuple[str, ...]
    prompt: str
    answer: int
    shown: str


def _parts(entry: CoreEntry, record: dict[str, Any], place: str) -> _Parts:
    delimiter = entry.delimiter
    try:
        if entry.kind == "language_modeling":
            prompt = str(record["context"]).strip() + delimiter
            text = prompt + str(record["continuation"])
            return _Parts((text,), prompt, 0, text)
        if entry.kind == "multiple_choice":
            texts = tuple(f"{record['query']}{delimiter}{choice}" for choice in record["choices"])
        else:
            texts = tuple(f"{each}{delimiter}{record['continuation']}" for each in record["context_options"])
        return _Parts(texts, "", answer := int(record["gold"]), texts[answer])
    except (KeyError, IndexError, TypeError, ValueError) as error:
        raise UserError(f"{place} is not an example of type {entry.kind} ({error!r})") from None


def _encoded(
    entry: CoreEntry, example: CoreExample, tokenizer: Tokenizer, context_length: int
) -> Iterator[tuple[npt.NDArray[np.int32], int]]:
    """Yields the tokens of each text, cut to the last `context_length`, and the number of the last ones that count."""

    def encode(text: str) -> npt.NDArray[np.int32]:
        return np.concatenate([start_of_text(tokenizer), tokenizer.encode(text)]).astype(np.int32)

    texts = [encode(example.few_shot + text) for text in example.texts]
    if entry.kind == "language_modeling":
        # The prompt may end in white space that is part of the continuation's first token.
        prompt = encode((example.few_shot + example.prompt).strip())
        counts = [len(texts[0]) - _common([prompt, texts[0]], lambda i: i)]
    elif entry.kind == "multiple_choice":
        shared = _common(texts, lambda i: i)
        counts = [len(tokens) - shared for tokens in texts]
    else:
        counts = [_common(texts, lambda i: -1 - i)] * len(texts)
    for tokens, count in zip(texts, counts, strict=True):
        yield tokens[-context_length:], count


def _common(sequences: Sequence[npt.NDArray[np.int32]], place: Callable[[int], int]) -> int:
    """Returns how many of the elements at place(0), place(1), ... all sequences share."""
    least = min(map(len, sequences))
    for i in range(least):
        if any(sequence[place(i)] != sequences[0][place(i)] for sequence in sequences):
            return i
    return least
