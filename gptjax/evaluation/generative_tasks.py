"""Generative tasks: completions of prompts, their scores against references, and pass@k of programs."""

import dataclasses
import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from gptjax.config import UserError
from gptjax.data.tokenizers import Tokenizer
from gptjax.distributed import processes
from gptjax.evaluation.example_records import complete_resumably, file_name, key, resumably
from gptjax.evaluation.few_shot import Examples, few_shot_prompts
from gptjax.evaluation.generative_examples import BLEU, DROP, ROUGE, TESTS, GenerativeExample
from gptjax.evaluation.sandbox import LIMITS, Outcome, isolation, run_programs
from gptjax.evaluation.scoring import Scorer, ScoringRequest
from gptjax.evaluation.tasks import identity
from gptjax.inference.engine import Engine
from gptjax.inference.sampling import Sampling
from gptjax.metrics.answers import ANSWER_METRICS, drop, pass_at_k, summary_rouge
from gptjax.metrics.measurement import Measurement, mean
from gptjax.metrics.resampling import Sample
from gptjax.metrics.text import bleu_terms, corpus_bleu
from gptjax.stages.trained_model import TrainedModel

PASS_AT = (1, 10, 100)  # k of pass@k, as far as there are samples (Chen et al. 2021, table 1)
CODE_CONSENT = (
    "{} runs programs that the model writes: allow it by --allow_code_execution (docs/evaluation.md states how they "
    "are isolated)"
)
PROGRAMS_AT_ONCE = 32  # programs whose outcomes are recorded together


class GeneratedText(NamedTuple):
    """A completion: its text up to a stop string, its tokens, and whether it ended (False: at max_new_tokens)."""

    text: str
    num_tokens: int
    ended: bool


@dataclasses.dataclass(frozen=True)
class GenerationOptions:
    """How completions are generated.

    Attributes:
      max_new_tokens: of a completion; None: each example's own, but at most half of the context.
      samples: completions of a prompt.
      temperature: 0: greedy.
      top_p: nucleus sampling; None: off.
      seed: sampling seed of the completions and of the few-shot examples.
      allow_code_execution: whether completions may be run as programs, in the sandbox.
    """

    max_new_tokens: int | None = None
    samples: int = 1
    temperature: float = 0.0
    top_p: float | None = None
    seed: int = 0
    allow_code_execution: bool = False

    def __post_init__(self) -> None:
        """Raises UserError for invalid options."""
        self.sampling  # noqa: B018  (checks the ranges)
        if self.samples > 1 and self.temperature == 0:
            raise UserError(f"--samples={self.samples} needs a --temperature above 0: greedy completions are all equal")
        if self.top_p is not None and self.temperature == 0:
            raise UserError("--top_p needs a --temperature above 0: it has no effect on greedy completions")

    @property
    def is_sampled(self) -> bool:
        """Whether completions are sampled, instead of greedy."""
        return self.temperature > 0

    @property
    def sampling(self) -> Sampling:
        return Sampling(temperature=self.temperature, top_p=self.top_p)


@dataclasses.dataclass(frozen=True)
class GenerativeTask:
    """Encoded prompts.

    Completions are numbered: sample s of example i is number i * samples + s.

    Attributes:
      prompts: text of each prompt, few-shot examples included.
      inputs: int32 (T,) of each prompt, cut on the left to leave room for its completion.
      new_tokens: maximum length of a completion of each prompt.
      settings: what the metrics depend on other than the model, for the report.
    """

    examples: list[GenerativeExample]
    prompts: list[str]
    inputs: list[npt.NDArray[np.int32]]
    new_tokens: list[int]
    options: GenerationOptions
    settings: dict[str, Any]

    @property
    def identities(self) -> list[str]:
        """A hash of each example with its few-shot examples, equal for equal text whatever the tokenizer."""
        return [identity(pair) for pair in zip(self.prompts, self.examples, strict=True)]

    @property
    def requests(self) -> list[ScoringRequest]:
        """There are no likelihoods to score."""
        return []

    def batches(self, size: int) -> list[list[int]]:
        """Returns batches of completions with the same stop strings and lengths, those of the longest prompts first."""
        alike: dict[tuple[tuple[str, ...], int], list[int]] = {}
        for number in range(len(self.examples) * self.options.samples):
            index = number // self.options.samples
            alike.setdefault((self.examples[index].stop, self.new_tokens[index]), []).append(number)
        batches = []
        for numbers in alike.values():
            numbers.sort(key=lambda number: -len(self.inputs[number // self.options.samples]))
            batches += [numbers[i : i + size] for i in range(0, len(numbers), size)]
        return batches

    def seed(self, number: int) -> int:
        """Returns the sampling seed of a completion, which is the same whatever `limit` and `samples` are."""
        index, sample = divmod(number, self.options.samples)
        return int(hashlib.sha256(f"{self.options.seed} {index} {sample}".encode()).hexdigest()[:8], 16)

    def complete(self, engine: Engine, numbers: Sequence[int]) -> list[GeneratedText]:
        """Generates the completions of a batch."""
        indices = [number // self.options.samples for number in numbers]
        completions = engine.generate(
            [self.inputs[i] for i in indices],
            self.new_tokens[indices[0]],
            self.options.sampling,
            seeds=[self.seed(number) for number in numbers],
            stop=self.examples[indices[0]].stop,
        )
        return [GeneratedText(c.text, len(c.tokens), c.finish_reason != "length") for c in completions]

    def values(
        self, completions: Sequence[GeneratedText], outcomes: dict[str, Outcome]
    ) -> list[list[dict[str, float]]]:
        """Computes the values of each completion of each example; BLEU has none, as it is one of all.

        Args:
          outcomes: of the programs of examples with tests.
        """
        samples = self.options.samples
        values = []
        for index, example in enumerate(self.examples):
            texts = [completion.text for completion in completions[index * samples : (index + 1) * samples]]
            values.append([_value(example, text, outcomes) for text in texts])
        return values


def generative_task(
    examples: Examples[GenerativeExample],
    tokenizer: Tokenizer,
    context_length: int,
    options: GenerationOptions,
    *,
    name: str,
    num_fewshot: int = 0,
    limit: int | None = None,
) -> GenerativeTask:
    """Encodes the examples, each after `num_fewshot` others.

    Args:
      name: of the task, for error messages.
      limit: number of examples to evaluate, from the first; None: all.

    Raises:
      UserError: there are too few few-shot examples; a prompt is empty and the tokenizer has no end-of-text; no room is
        left for a prompt; or code would be executed without consent, or cannot be isolated here.
    """
    asked = list(examples.asked[:limit])
    most = options.max_new_tokens
    if most is not None and most >= context_length:
        raise UserError(
            f"--max_new_tokens={most} leaves no room for a prompt in the context of {context_length}: lower it"
        )
    if any(example.metric == TESTS for example in asked):
        if not options.allow_code_execution:
            raise UserError(CODE_CONSENT.format(name))
        isolation()  # raises before anything is generated
    texts = few_shot_prompts(examples, num_fewshot, limit, options.seed)
    prompts, inputs, new_tokens, truncated = [], [], [], 0
    for example, before in zip(asked, texts, strict=True):
        new = min(example.max_new_tokens, max(1, context_length // 2)) if most is None else most
        tokens = tokenizer.encode(before + example.prompt).astype(np.int32)
        truncated += len(tokens) > context_length - new
        prompts.append(before + example.prompt)
        inputs.append(tokens[-(context_length - new) :])
        new_tokens.append(new)
    settings = {
        "examples": len(asked),
        "examples_available": len(examples.asked),
        "num_fewshot": num_fewshot,
        "fewshot_seed": options.seed if num_fewshot and examples.sampled else None,
        "examples_sha256": identity(asked),
        "max_new_tokens": max(new_tokens),
        "samples": options.samples,
        "temperature": options.temperature,
        "top_p": options.top_p,
        "sampling_seed": options.seed if options.temperature else None,
        "truncated_prompts": truncated,
    }
    return GenerativeTask(asked, prompts, inputs, new_tokens, options, settings)


def evaluate_generative(
    task: GenerativeTask, trained: TrainedModel, scorer: Scorer, directory: Path, name: str, batch_size: int
) -> tuple[dict[str, Measurement], dict[str, Any], list[dict[str, Any]]]:
    """Generates and scores the completions; a stopped evaluation resumes from its records.

    Args:
      scorer: of the model in `trained`, for the names of the records.
      directory: of the records.
      name: of the task, for files and progress bars.
      batch_size: prompts completed together.

    Returns:
      The metrics; further entries of the report; a record of each example, from which its values can be recomputed.
    """
    asked = list(map(ScoringRequest, task.inputs, task.new_tokens))
    path = directory / f"{file_name(name)}-completions-{key(scorer, trained.step, asked, _settings(task))}.jsonl"
    batches = task.batches(batch_size)
    completions = complete_resumably(path, f"{name} completions", batches, trained, task.complete, GeneratedText)
    programs = [
        _program(example, completions[i * task.options.samples + sample].text)
        for i, example in enumerate(task.examples)
        for sample in range(task.options.samples)
        if example.metric == TESTS
    ]
    outcomes = _run(list(dict.fromkeys(programs)), directory, name) if programs else {}
    values = task.values(completions, outcomes)
    metrics, stated = _measured(task, completions, values)
    return (
        metrics,
        stated | ({"isolation": str(isolation())} if programs else {}),
        _records(task, completions, values, outcomes),
    )


def _settings(task: GenerativeTask) -> list[str]:
    """What completions depend on other than the model, the prompts and their lengths."""
    options = dataclasses.replace(task.options, max_new_tokens=None, allow_code_execution=False)
    if options.temperature == 0:
        options = dataclasses.replace(options, seed=0)
    return [repr(options), *(repr(example.stop) for example in task.examples)]


def _program(example: GenerativeExample, completion: str) -> str:
    return f"{example.prompt}{completion}\n{example.tests}\n"


def _run(programs: list[str], directory: Path, name: str) -> dict[str, Outcome]:
    """Runs the programs, in the first process of several; recorded outcomes are not computed again."""
    digest = hashlib.sha256(json.dumps([programs, repr(LIMITS)]).encode()).hexdigest()[:16]
    batches = [
        list(range(i, min(i + PROGRAMS_AT_ONCE, len(programs)))) for i in range(0, len(programs), PROGRAMS_AT_ONCE)
    ]

    def run(indices: Sequence[int]) -> list[Outcome]:
        of_first = processes.of_first(lambda: [o._asdict() for o in run_programs([programs[i] for i in indices])])
        return [Outcome(**fields) for fields in of_first]

    path = directory / f"{file_name(name)}-programs-{digest}.jsonl"
    outcomes = resumably(path, f"{name} programs", batches, run, Outcome)
    return dict(zip(programs, outcomes, strict=True))


def _value(example: GenerativeExample, text: str, outcomes: dict[str, Outcome]) -> dict[str, float]:
    if example.metric == TESTS:
        return {"passed": float(outcomes[_program(example, text)].passed)}
    if example.metric == BLEU:
        return {}
    if example.metric == DROP:
        return drop(text, example.references)
    references = [reference for reference in example.references if isinstance(reference, str)]
    return (
        summary_rouge(text, references) if example.metric == ROUGE else ANSWER_METRICS[example.metric](text, references)
    )


def _measured(
    task: GenerativeTask, completions: Sequence[GeneratedText], values: Sequence[Sequence[dict[str, float]]]
) -> tuple[dict[str, Measurement], dict[str, Any]]:
    samples, found, stated = task.options.samples, dict[str, list[float]](), dict[str, Any]()
    for example, of_example in zip(task.examples, values, strict=True):
        for name, value in _of_example(of_example).items():
            for subset in ("", *(f"_{label}" for label in example.labels)):
                found.setdefault(name + subset, []).append(value)
    metrics = {name: mean(of_all) for name, of_all in found.items()}
    translated = [i for i, example in enumerate(task.examples) if example.metric == BLEU]
    if translated:
        numbers = [i * samples + sample for i in translated for sample in range(samples)]
        references = [str(task.examples[number // samples].references[0]) for number in numbers]
        texts = [completions[number].text for number in numbers]
        score, stated["bleu_signature"] = corpus_bleu(texts, references)
        terms = bleu_terms(texts, references).reshape(len(translated), samples, -1).sum(1)
        metrics["bleu"] = Measurement(score, None, len(translated), Sample((terms,), form="bleu"))
    ended = np.reshape([completion.ended for completion in completions], (-1, samples))
    return metrics | {"ended": mean(ended.mean(1).tolist())}, stated


def _of_example(values: Sequence[dict[str, float]]) -> dict[str, float]:
    """Returns the values of an example: means over its completions, and pass@k."""
    if "passed" in values[0]:
        n, correct = len(values), sum(value["passed"] == 1 for value in values)
        return {f"pass@{k}": pass_at_k(n, correct, k) for k in sorted({*(k for k in PASS_AT if k <= n), n})}
    return {name: float(np.mean([value[name] for value in values])) for name in values[0]}


def _records(
    task: GenerativeTask,
    completions: Sequence[GeneratedText],
    values: Sequence[Sequence[dict[str, float]]],
    outcomes: dict[str, Outcome],
) -> list[dict[str, Any]]:
    records, samples = [], task.options.samples
    for index, of_example in enumerate(values):
        example = task.examples[index]
        texts = completions[index * samples : (index + 1) * samples]
        written = []
        for text, value in zip(texts, of_example, strict=True):
            ran = {"outcome": outcomes[_program(example, text.text)].reason} if example.metric == TESTS else {}
            written.append({**text._asdict(), **value, **ran})
        given = {"tests": example.tests} if example.metric == TESTS else {"references": list(example.references)}
        records.append(
            {"prompt": task.prompts[index], "metric": example.metric, **given, "completions": written}
            | {"metrics": _of_example(of_example)}
        )
    return records
