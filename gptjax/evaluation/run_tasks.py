"""Evaluation of a workdir on tasks: reads, scores and reports each task (`python -m gptjax.evaluate`)."""

import dataclasses
import importlib.metadata
import json
import platform
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import jax

from gptjax.config import Config, UserError, read_config
from gptjax.data.mixture import parts
from gptjax.data.pipeline import held_out_documents
from gptjax.data.sources import is_packaged, open_source
from gptjax.data.templates import chat_format
from gptjax.distributed import processes
from gptjax.evaluation.catalogue import BENCHMARKS, read_benchmark
from gptjax.evaluation.choice_controls import choice_baselines, choices_only
from gptjax.evaluation.core_metric import CoreTask, core_task
from gptjax.evaluation.dialogue import DialogueTask, RewardScore, dialogue_task, evaluate_dialogue, read_prompts
from gptjax.evaluation.example_records import file_name, score_resumably
from gptjax.evaluation.few_shot import Examples
from gptjax.evaluation.generative_examples import GenerativeExample
from gptjax.evaluation.generative_tasks import (
    GenerativeTask,
    evaluate_generative,
    generative_task,
)
from gptjax.evaluation.judging import judge_dialogue
from gptjax.evaluation.perplexity import MixedPerplexityTask, PerplexityTask, perplexity_task
from gptjax.evaluation.result_table import score_entry, table
from gptjax.evaluation.sample_files import task_samples, write_samples
from gptjax.evaluation.scoring import Scorer
from gptjax.evaluation.task_options import (
    CORE,
    DIALOGUE,
    PERPLEXITY,
    SOURCED,
    VISUAL,
    Options,
    check,
    check_generation,
    short_name,
)
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

Task = (
    ExampleTask | GenerativeTask | CoreTask | PerplexityTask | MixedPerplexityTask | DialogueTask | VisualQuestionTask
)


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
    tasks = [task for _, task in prepared]
    generative = any(isinstance(task, GenerativeTask) for task in tasks)
    completes = generative or any(isinstance(task, DialogueTask | VisualQuestionTask) for task in tasks)
    check_generation(options, completes=completes, generative=generative)
    score = _reward_score(options, trained)
    results, samples = {}, {}
    completions, examples = list[dict[str, Any]](), list[dict[str, Any]]()
    for name, task in prepared:
        short = short_name(name, options)
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
    numbers = sorted({options.shots(name) for name in names if name not in (*SOURCED, CORE)})
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
        if options.judge is not None:
            answers = [record["answer"] for record in completions]
            judged, records = judge_dialogue(
                task, answers, options.judge, options.mesh, directory, short, options.batch_size
            )
            metrics, stated = metrics | judged, stated | options.judge.stated
            completions = [known | new for known, new in zip(completions, records, strict=True)]
        even = {"random": 0.5}
        return _Evaluated(
            metrics,
            stated,
            completions,
            baselines=dict.fromkeys(("win_rate", "judge_win_rate", "judge_first_position"), even),
        )
    if isinstance(task, VisualQuestionTask):
        metrics, completions = evaluate_visual_questions(task, trained, scorer, directory, short, options.batch_size)
        return _Evaluated(metrics, completions=completions)
    if isinstance(task, GenerativeTask):
        metrics, stated, examples = evaluate_generative(task, trained, scorer, directory, short, options.batch_size)
        return _Evaluated(metrics, stated, examples=examples)
    scores = score_resumably(directory, short, scorer, trained.step, task.requests)
    metrics = task.metrics(scores)
    if isinstance(task, CoreTask):
        return _Evaluated(metrics, examples=task.records(scores), baselines=task.baselines())
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
    if name == CORE:
        assert options.core_bundle is not None, "check"
        context_length = trained.model.config.context_length
        return core_task(options.core_bundle, trained.tokenizer, context_length, limit=options.limit)
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
