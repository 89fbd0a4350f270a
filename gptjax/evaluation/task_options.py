"""The options of `gptjax/evaluate.py`, and checks of them before anything is read."""

import dataclasses
from pathlib import Path
from typing import Literal

from gptjax.config import UserError
from gptjax.data import conversations
from gptjax.data.sources import open_source
from gptjax.evaluation.catalogue import BENCHMARKS, check_name
from gptjax.evaluation.core_metric import read_bundle
from gptjax.evaluation.detokenizers import get_detokenizer
from gptjax.evaluation.generative_tasks import CODE_CONSENT, GenerationOptions
from gptjax.evaluation.judging import JudgeSettings
from gptjax.files import expand

PERPLEXITY, DIALOGUE, VISUAL, CORE = "perplexity", "dialogue", "vqa", "core"
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
    core_bundle: Path | None = None
    max_new_tokens: int | None = None
    samples: int = 1
    temperature: float = 0.0
    top_p: float | None = None
    allow_code_execution: bool = False
    benchmark_dir: Path | None = None
    reward_model: Path | None = None
    judge: JudgeSettings | None = None
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
            "needs --tasks=NAME,...: " + ", ".join([*SOURCED, CORE, *BENCHMARKS]) + ", or a path ending in .jsonl"
        )
    for name in options.tasks:
        if not name.endswith(".jsonl"):
            check_name(name, (*SOURCED, CORE))
        elif not expand(name).is_file():
            raise UserError(f"there is no task file {name}")
    names = [short_name(name, options) for name in dict.fromkeys(options.tasks)]
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
    _ = options.generation  # checks it
    programs = [name for name in options.tasks if name in BENCHMARKS and BENCHMARKS[name].runs_programs]
    if programs and not options.allow_code_execution:
        raise UserError(CODE_CONSENT.format(programs[0]))
    if options.benchmark_dir is not None and not set(options.tasks) & set(BENCHMARKS):
        raise UserError("--benchmark_dir is for benchmarks, which it has the records of")
    if DIALOGUE not in options.tasks and options.reward_model:
        raise UserError("--reward_model is for --tasks=dialogue")
    if DIALOGUE not in options.tasks and options.judge is not None:
        raise UserError("--judge is for --tasks=dialogue")
    if options.judge is not None:
        options.judge.check()
    if options.choices_only and set(options.tasks) <= set(SOURCED):
        raise UserError("--choices_only is for tasks of examples with options, such as hellaswag or a .jsonl file")
    if (CORE in options.tasks) != (options.core_bundle is not None):
        raise UserError("--tasks=core and --core_bundle=DIR, the folder of nanochat's eval_bundle, need each other")
    if options.core_bundle is not None:
        read_bundle(options.core_bundle)
        if options.num_fewshot or options.choices_only:
            raise UserError("--num_fewshot and --choices_only are not for --tasks=core: evaluate it separately")
    if options.detokenizer is not None:
        get_detokenizer(options.detokenizer)


def check_generation(options: Options, *, completes: bool, generative: bool) -> None:
    """Raises UserError for options of completions that no task uses.

    Args:
      completes: whether a task generates text.
      generative: whether one of those is a benchmark or a task file.
    """
    if options.max_new_tokens is not None and not completes:
        raise UserError("--max_new_tokens is for tasks that generate text, and none of --tasks does")
    if options.generation.is_sampled and not generative:
        raise UserError("--samples, --temperature and --top_p are for benchmarks and task files that generate text")


def short_name(name: str, options: Options) -> str:
    """Returns the name of a task in the table."""
    if name in (PERPLEXITY, DIALOGUE) and options.source is not None:
        return f"{name}:{options.source}"
    return Path(name).stem if name.endswith(".jsonl") else name
