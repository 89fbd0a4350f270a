"""Evaluation of a workdir on tasks: reads, scores and reports each task (`python -m gptjax.evaluate`)."""

import dataclasses
import importlib.metadata
import json
import platform
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Literal

import jax

from gptjax.config import Config, UserError, read_config
from gptjax.data import conversations
from gptjax.data.mixture import parts
from gptjax.data.pipeline import held_out_documents
from gptjax.data.sources import is_packaged, open_source
from gptjax.data.templates import chat_format
from gptjax.distributed import processes
from gptjax.evaluation.catalogue import BENCHMARKS, check_name, read_benchmark
from gptjax.evaluation.choice_controls import choice_baselines, choices_only
from gptjax.evaluation.detokenizers import get_detokenizer
from gptjax.evaluation.dialogue import DialogueTask, RewardScore, dialogue_task, evaluate_dialogue, read_prompts
from gptjax.evaluation.example_records import file_name, score_resumably
from gptjax.evaluation.few_shot import Examples
from gptjax.evaluation.generative_examples import GenerativeExample
from gptjax.evaluation.generative_tasks import (
    CODE_CONSENT,
    GenerationOptions,
    GenerativeTask,
    evaluate_generative,
    generative_task,
)
from gptjax.evaluation.perplexity import MixedPerplexityTask, PerplexityTask, perplexity_task
from gptjax.evaluation.result_table import score_entry, table
from gptjax.evaluation.sample_files import task_samples, write_samples
from gptjax.evaluation.scoring import Scorer
from gptjax.evaluation.tasks import ExampleTask, example_task, read_examples
from gptjax.evaluation.visual_questions import (
    VisualQuestionTask,
    evaluate_visual_questions,
    read_questions,
    visual_question_task,
)
from gptjax.files import expand, write_whole
from gptjax.metrics.measurement import Measurement
from gptjax.metrics.report_files import write_predictions
from gptjax.stages import registry
from gptjax.stages.trained_model import TrainedModel, load_model, parse_mesh

PERPLEXITY, DIALOGUE, VISUAL = "perplexity", "dialogue", "vqa"
Task = ExampleTask | GenerativeTask | PerplexityTask | MixedPerplexityTask | DialogueTask | VisualQuestionTask
SOURCED = (PERPLEXITY, DIALOGUE, VISUAL)  # tasks whose data --source names


@dataclasses.dataclass(frozen=True)
class Options:
    """The flags of the command `gptjax/evaluate.py`, without the workdir."""

    tasks: tuple[str, ...]
    num_fewshot: int | None = None  # None: the benchmark's own
    limit: int | None = None
    batch_size: int = 8
    seed: int = 0
    source: str | None = None
    held_out: bool = False
    stride: int | None = None
    detokenizer: str | None = None
    concatenate: bool = False
    choices_only: bool = False
    max_new_tokens: int | None = None
    samples: int = 1
    temperature: float = 0.0
    top_p: float | None = None
    allow_code_execution: bool = False
    benchmark_dir: Path | None = None
    reward_model: Path | None = None
    mesh: str = ""
    dtype: Literal["float32", "bfloat16"] | None = None
    output: Path | None = None
    best: bool = False
    step: int | None = None

    @property
    def generation(self) -> GenerationOptions:
        """The options of generative tasks; raises UserError if they are invalid."""
        return GenerationOptions(
            self.max_new_tokens, self.samples, self.temperature, self.top_p, self.seed, self.allow_code_execution
        )

    def shots(self, name: str) -> int:
        """Returns the number of few-shot examples of a task."""
        if self.num_fewshot is not None:
            return self.num_fewshot
        return BENCHMARKS[name].num_fewshot if name in BENCHMARKS else 0


def check(options: Options) -> None:
    """Raises UserError for invalid options, before anything is read."""
    if not options.tasks:
        raise UserError(
            "needs --tasks=NAME,...: " + ", ".join([*SOURCED, *BENCHMARKS]) + ", or a path ending in .jsonl"
        )
    for name in options.tasks:
        if not name.endswith(".jsonl"):
            check_name(name, SOURCED)
        elif not expand(name).is_file():
            raise UserError(f"there is no task file {name}")
    names = [_short(name, options) for name in dict.fromkeys(options.tasks)]
    if len(set(names)) < len(names):
        raise UserError(f"--tasks={','.join(options.tasks)}: two files have the same name: evaluate them separately")
    if options.held_out and options.source is not None:
        raise UserError("--source and --held_out exclude each other: both say what perplexity and dialogue read")
    if options.source is not None and not set(SOURCED) & set(options.tasks):
        raise UserError("--source is for --tasks=perplexity, --tasks=dialogue and --tasks=vqa")
    if options.source is None and VISUAL in options.tasks:
        raise UserError("--tasks=vqa needs --source=jsonl:FILE, with images, questions and answers")
    if options.source is not None and PERPLEXITY in options.tasks:
        open_source(options.source)
    if options.source is not None and {DIALOGUE, VISUAL} & set(options.tasks):
        conversations.check_spec(options.source)
    if PERPLEXITY not in options.tasks and (options.stride or options.detokenizer or options.concatenate):
        raise UserError("--stride, --detokenizer and --concatenate are for --tasks=perplexity")
    if options.held_out and not {PERPLEXITY, DIALOGUE} & set(options.tasks):
        raise UserError("--held_out is for --tasks=perplexity and --tasks=dialogue")
    if set(options.tasks) == {PERPLEXITY} and options.max_new_tokens:
        raise UserError("--max_new_tokens is for tasks that generate text, not for perplexity")
    if set(options.tasks) <= set(SOURCED) and options.generation.samples_differ:
        raise UserError("--samples, --temperature and --top_p are for benchmarks and task files that generate text")
    programs = [name for name in options.tasks if name in BENCHMARKS and BENCHMARKS[name].runs_programs]
    if programs and not options.allow_code_execution:
        raise UserError(CODE_CONSENT.format(programs[0]))
    if options.benchmark_dir is not None and not set(options.tasks) & set(BENCHMARKS):
        raise UserError("--benchmark_dir is for benchmarks, which it has the records of")
    if DIALOGUE not in options.tasks and options.reward_model:
        raise UserError("--reward_model is for --tasks=dialogue")
    if options.choices_only and set(options.tasks) <= set(SOURCED):
        raise UserError("--choices_only is for tasks of examples with options, such as hellaswag or a .jsonl file")
    if options.detokenizer is not None:
        get_detokenizer(options.detokenizer)


def evaluate(workdir: Path, options: Options) -> dict[str, Any]:
    """Evaluates the newest weights of a workdir, or those that `options` choose.

    Prints a table, writes the report and returns it.

    Raises:
      UserError: see `check` and `load_model`; a task cannot be read or does not fit the model.
    """
    check(options)
    config = read_config(workdir)
    if DIALOGUE in options.tasks and not registry.definition(config).chats:
        chats = ", ".join(name for name, stage in registry.DEFINITIONS.items() if stage.chats)
        raise UserError(f"{workdir} is of stage {config.stage}: --tasks=dialogue is for stages {chats}")
    _check_held_out(options, config)
    trained = load_model(workdir, parse_mesh(options.mesh), options.dtype, best=options.best, step=options.step)
    scorer = Scorer(trained.model, trained.params, trained.mesh, options.batch_size)
    directory = workdir / "evaluation"
    names = tuple(dict.fromkeys(options.tasks))
    # All tasks are read before any is scored, so that errors appear at once; process 0 first, which downloads.
    prepared = processes.first_then_others(lambda: [(name, _prepare(name, options, trained)) for name in names])
    score = _reward_score(options, trained)
    results, samples = {}, {}
    completions, examples = list[dict[str, Any]](), list[dict[str, Any]]()
    for name, task in prepared:
        short = _short(name, options)
        found = _evaluate_task(short, task, options, trained, scorer, directory / "scores", score)
        results[short] = {
            "metrics": found.entries(),
            "requests": len(task.requests),
            "truncated_requests": sum(map(scorer.is_truncated, task.requests)),
            "source": _source(name, options, config),
            **task.settings,
            **found.stated,
        }
        samples[short] = task_samples(task.identities, found.metrics)
        completions += found.completions
        examples += [{"task": short, "index": index, **record} for index, record in enumerate(found.examples)]
    report = {
        "workdir": str(workdir),
        "step": trained.step,
        "model": dataclasses.asdict(trained.model.config),
        "tokenizer": trained.tokenizer.fingerprint,
        "device": f"{jax.device_count()} x {jax.devices()[0].device_kind}",
        "mesh": {axis: size for axis, size in trained.mesh.shape.items() if size > 1},
        "batch_size": options.batch_size,
        "versions": {
            "python": platform.python_version(),
            **{package: importlib.metadata.version(package) for package in ("gptjax", "jax", "numpy")},
        },
        "results": results,
    }
    numbers = sorted({options.shots(name) for name in names if name not in SOURCED})
    shots = f"-{'+'.join(map(str, numbers))}shot" if numbers else ""
    default = directory / f"{'+'.join(map(file_name, results))}{shots}-step{trained.step}.json"
    output = default if options.output is None else options.output
    files = [("completions", ".answers.jsonl", completions), ("examples", ".examples.jsonl", examples)]
    if processes.is_first():
        _write(output, report)
        write_samples(output, samples)
        for _, suffix, records in files:
            if records:
                write_predictions(output.with_suffix(suffix), records)
    print(table(report))
    print(f"written to {output}")
    for what, suffix, records in files:
        if records:
            print(f"the {what} are in {output.with_suffix(suffix)}")
    return report


@dataclasses.dataclass(frozen=True)
class _Evaluated:
    """The scores of a task.

    Attributes:
      stated: further entries of the report.
      completions, examples: records for the files of completions and of scored examples.
      baselines: score -> scores of the choices that it is compared with.
      control: the scores without the question.
    """

    metrics: dict[str, Measurement]
    stated: dict[str, Any] = dataclasses.field(default_factory=dict)
    completions: list[dict[str, Any]] = dataclasses.field(default_factory=list)
    examples: list[dict[str, Any]] = dataclasses.field(default_factory=list)
    baselines: dict[str, dict[str, float]] = dataclasses.field(default_factory=dict)
    control: dict[str, Measurement] = dataclasses.field(default_factory=dict)

    def entries(self) -> dict[str, Any]:
        """Returns the JSON entry of each score."""
        return {
            name: score_entry(measured, self.baselines.get(name), self.control.get(name))
            for name, measured in self.metrics.items()
        }


def _evaluate_task(
    short: str,
    task: Task,
    options: Options,
    trained: TrainedModel,
    scorer: Scorer,
    directory: Path,
    reward_score: RewardScore | None,
) -> _Evaluated:
    """Evaluates a prepared task; `directory` is that of the records."""
    if isinstance(task, DialogueTask):
        metrics, stated, completions = evaluate_dialogue(
            task, trained, scorer, directory, short, options.batch_size, reward_score
        )
        if reward_score is not None:
            stated["reward_model"] = str(options.reward_model)
        return _Evaluated(metrics, stated, completions, baselines={"win_rate": {"random": 0.5}})
    if isinstance(task, VisualQuestionTask):
        metrics, completions = evaluate_visual_questions(task, trained, scorer, directory, short, options.batch_size)
        return _Evaluated(metrics, completions=completions)
    if isinstance(task, GenerativeTask):
        metrics, stated, examples = evaluate_generative(task, trained, scorer, directory, short, options.batch_size)
        return _Evaluated(metrics, stated, examples=examples)
    scores = score_resumably(directory, short, scorer, trained.step, task.requests)
    metrics = task.metrics(scores)
    if not isinstance(task, ExampleTask):
        return _Evaluated(metrics)
    found = choice_baselines(task.examples)
    control = {}
    if task.control is not None:
        requests = task.control.requests
        control = task.control.metrics(
            score_resumably(directory, f"{short}-choices_only", scorer, trained.step, requests)
        )
    return _Evaluated(metrics, examples=task.records(scores), baselines=dict.fromkeys(metrics, found), control=control)


def _check_held_out(options: Options, config: Config) -> None:
    """Raises UserError where a task would read the run's held-out data without --held_out, or data of another kind.

    The config may be someone else's: without consent it must not choose which files of this machine are read. The text
    of an installed package needs no consent.
    """
    if options.source is not None:
        return
    sources = _held_out_sources(config)
    definition = registry.definition(config)
    if PERPLEXITY in options.tasks and (definition.conversational or definition.head is not None):
        raise UserError(f"--tasks=perplexity needs --source=text:FILE: stage {config.stage} trains on no plain text")
    for task, form in ((PERPLEXITY, "text"), (DIALOGUE, "jsonl")):
        allowed = options.held_out or (task == PERPLEXITY and all(map(is_packaged, sources)))
        if task in options.tasks and not allowed:
            raise UserError(
                f"--tasks={task} needs --source={form}:FILE, or --held_out to read what the run held out of "
                f"{', '.join(sources)}"
            )


def _held_out_sources(config: Config) -> list[str]:
    return [part.data.validation_source or part.data.source for part in parts(config.data)]


def _prepare(name: str, options: Options, trained: TrainedModel) -> Task:
    if name == VISUAL:
        assert options.source is not None, "check"
        questions = read_questions(options.source, options.limit)
        return visual_question_task(questions, trained, options.max_new_tokens)
    if name == PERPLEXITY:
        return _prepare_perplexity(options, trained)
    if name == DIALOGUE:
        return dialogue_task(
            read_prompts(options.source, trained.config),
            chat_format(trained.config.chat, trained.tokenizer, trained.config.model.vision),
            trained.model.config.context_length,
            limit=options.limit,
            max_new_tokens=options.max_new_tokens,
        )
    examples: Examples[Any]
    if name.endswith(".jsonl"):
        examples, form = read_examples(expand(name)), None
    else:
        examples = read_benchmark(name, options.shots(name), options.benchmark_dir)
        form = BENCHMARKS[name].few_shot_form
    given: dict[str, Any] = {"num_fewshot": options.shots(name), "limit": options.limit}
    if isinstance(examples.asked[0], GenerativeExample):
        if options.choices_only:
            raise UserError(f"--choices_only needs examples with options, and {name} has none")
        context = trained.model.config.context_length
        return generative_task(examples, trained.tokenizer, context, options.generation, name=name, **given)

    def task(of: Examples[Any]) -> ExampleTask:
        return example_task(of, trained.tokenizer, seed=options.seed, few_shot_form=form, **given)

    control = task(choices_only(examples, name)) if options.choices_only else None
    return dataclasses.replace(task(examples), control=control)


def _prepare_perplexity(options: Options, trained: TrainedModel) -> PerplexityTask | MixedPerplexityTask:
    def task(documents: Iterable[str]) -> PerplexityTask:
        return perplexity_task(
            documents,
            trained.tokenizer,
            trained.model.config.context_length,
            limit=options.limit,
            stride=options.stride,
            detokenizer=options.detokenizer,
            concatenate=options.concatenate,
        )

    data = trained.config.data
    if options.source is not None:
        return task(open_source(options.source).documents())
    if not data.mixture:
        return task(held_out_documents(data, trained.tokenizer))
    sources = parts(data)
    tasks = {source.name: task(held_out_documents(source.data, trained.tokenizer)) for source in sources}
    return MixedPerplexityTask(tasks, [source.weight for source in sources])


def _reward_score(options: Options, trained: TrainedModel) -> RewardScore | None:
    """Returns the reward function of --reward_model; None without one."""
    if options.reward_model is None:
        return None
    from gptjax.stages.preference.reward_scorer import load_reward_model

    return load_reward_model(options.reward_model, trained.mesh)


def _short(name: str, options: Options) -> str:
    """Returns the name of a task in the table."""
    if name in (PERPLEXITY, DIALOGUE) and options.source is not None:
        return f"{name}:{options.source}"
    return Path(name).stem if name.endswith(".jsonl") else name


def _source(name: str, options: Options, config: Config) -> str | None:
    """The source of a task's examples, for the report."""
    if name == PERPLEXITY and options.source is None:
        return f"held out of {', '.join(_held_out_sources(config))}"
    return options.source if name in (PERPLEXITY, DIALOGUE) else name


def _write(path: Path, report: dict[str, Any]) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_whole(path, json.dumps(report, indent=2) + "\n")
    except OSError as error:
        raise UserError(f"cannot write --output={path}: {error.strerror}") from None
