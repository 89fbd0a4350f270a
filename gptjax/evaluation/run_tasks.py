"""Evaluation of a workdir on tasks: reads, scores and reports each task (`python -m gptjax.evaluate`)."""

import dataclasses
import importlib.metadata
import json
import math
import platform
from collections.abc import Iterable, Sequence
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
    results, completions, examples = {}, list[dict[str, Any]](), list[dict[str, Any]]()
    for name, task in prepared:
        short = _short(name, options)
        if isinstance(task, DialogueTask):
            metrics, stated, completions = evaluate_dialogue(
                task, trained, scorer, directory / "scores", short, options.batch_size, score
            )
        elif isinstance(task, VisualQuestionTask):
            metrics, completions = evaluate_visual_questions(
                task, trained, scorer, directory / "scores", short, options.batch_size
            )
            stated = {}
        elif isinstance(task, GenerativeTask):
            metrics, stated, found = evaluate_generative(
                task, trained, scorer, directory / "scores", short, options.batch_size
            )
            examples += [{"task": short, "index": index, **record} for index, record in enumerate(found)]
        else:
            scores = score_resumably(directory / "scores", short, scorer, trained.step, task.requests)
            metrics, stated = task.metrics(scores), {}
            if isinstance(task, ExampleTask):
                found = task.records(scores)
                examples += [{"task": short, "index": index, **record} for index, record in enumerate(found)]
        results[short] = {
            "metrics": {metric: _json(measured) for metric, measured in metrics.items()},
            "requests": len(task.requests),
            "truncated_requests": sum(map(scorer.is_truncated, task.requests)),
            "source": _source(name, options, config),
            **task.settings,
            **stated,
            **({} if score is None or name != DIALOGUE else {"reward_model": str(options.reward_model)}),
        }
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
    if processes.is_first():
        _write(output, report)
    print(table(report))
    print(f"written to {output}")
    for records, suffix, what in (
        (completions, ".answers.jsonl", "the completions are in"),
        (examples, ".examples.jsonl", "each example, with its whole prompt and its scores, is in"),
    ):
        if records:
            path = output.with_suffix(suffix)
            if processes.is_first():
                write_predictions(path, records)
            print(f"{what} {path}")
    return report


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


def _prepare(
    name: str, options: Options, trained: TrainedModel
) -> ExampleTask | GenerativeTask | PerplexityTask | MixedPerplexityTask | DialogueTask | VisualQuestionTask:
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
    num_fewshot, tokenizer = options.shots(name), trained.tokenizer
    if isinstance(examples.asked[0], GenerativeExample):
        context, generation = trained.model.config.context_length, options.generation
        return generative_task(
            examples, tokenizer, context, generation, name=name, num_fewshot=num_fewshot, limit=options.limit
        )
    return example_task(
        examples, tokenizer, num_fewshot=num_fewshot, limit=options.limit, seed=options.seed, few_shot_form=form
    )


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


def _json(measured: Measurement) -> dict[str, float | None]:
    """Returns the fields of a measurement, with None for infinity and NaN, which JSON lacks."""
    return {
        field: value if value is not None and math.isfinite(value) else None
        for field, value in measured._asdict().items()
    }


def _write(path: Path, report: dict[str, Any]) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_whole(path, json.dumps(report, indent=2) + "\n")
    except OSError as error:
        raise UserError(f"cannot write --output={path}: {error.strerror}") from None


# Keys of a task's entry that are printed below the table.
_STATED = (
    *("num_fewshot", "fewshot_seed", "stride", "context_length", "concatenated", "first_token_scored"),
    *("documents", "tokens", "bytes", "detokenizer", "original_tokens", "detokenizer_restored_lines"),
    *("examples", "examples_available", "truncated_requests"),
    *("prompts", "prompts_available", "left_out", "max_new_tokens", "bleu_signature", "reward_model"),
    *("samples", "temperature", "top_p", "sampling_seed", "truncated_prompts", "isolation"),
)


def table(report: dict[str, Any]) -> str:
    """Formats the report's metrics as a table, with the settings of each task below."""
    rows = [("task", "metric", "value", "stderr", "n")]
    for name, entry in report["results"].items():
        for metric, measured in entry["metrics"].items():
            rows.append((name, metric, _number(measured["value"]), _number(measured["stderr"]), f"{measured['n']:,}"))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = [_aligned(row, widths) for row in rows]
    lines.insert(1, "-" * len(lines[0]))
    lines.append("")
    for name, entry in report["results"].items():
        stated = ", ".join(f"{key} {_plain(entry[key])}" for key in _STATED if entry.get(key) is not None)
        lines.append(f"{name}: {stated}")
    lines.append(f"step {report['step']} of {report['workdir']}, {report['model']['dtype']}, {report['device']}")
    return "\n".join(lines)


def _aligned(row: Sequence[str], widths: Sequence[int]) -> str:
    texts, numbers = row[:2], row[2:]
    return "  ".join(
        [text.ljust(width) for text, width in zip(texts, widths[:2], strict=True)]
        + [number.rjust(width) for number, width in zip(numbers, widths[2:], strict=True)]
    )


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.4f}" if abs(value) < 1000 else f"{value:,.1f}"


def _plain(value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    return f"{value:,}" if isinstance(value, int) else f"{value:.4f}" if isinstance(value, float) else str(value)
