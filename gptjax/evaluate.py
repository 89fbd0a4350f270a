"""Evaluates the newest weights of a workdir, or those that --step or --best choose.

python -m gptjax.evaluate --workdir=runs/gpt2 --tasks=lambada,hellaswag --num_fewshot=0
python -m gptjax.evaluate --workdir=runs/gpt2 --tasks=mine.jsonl --num_fewshot=5 --limit=100
python -m gptjax.evaluate --workdir=runs/gpt2 --tasks=perplexity --source=sotu --stride=512
python -m gptjax.evaluate --workdir=runs/gpt2 --tasks=perplexity --held_out --best
python -m gptjax.evaluate --workdir=runs/gpt2 --tasks=perplexity --source=text:wiki.test.tokens --detokenizer=wikitext
python -m gptjax.evaluate --workdir=runs/sft --tasks=dialogue --held_out --reward_model=runs/reward
python -m gptjax.evaluate --workdir=runs/gpt2 --tasks=core --core_bundle=eval_bundle --limit=500
python -m gptjax.evaluate --workdir=runs/dpo --tasks=dialogue --held_out --judge=runs/judge --opponent=runs/sft
python -m gptjax.evaluate --workdir=runs/digits --tasks=vqa --source=digits:test
python -m gptjax.evaluate --workdir=runs/gpt2 --tasks=gsm8k_cot,triviaqa,squad_v2
python -m gptjax.evaluate --workdir=runs/gpt2 --tasks=humaneval --allow_code_execution --samples=20 --temperature=0.8

A task is a benchmark of `gptjax/evaluation/catalogue.py` (downloaded on first use, or read from --benchmark_dir), a
file of JSON lines (formats: `docs/evaluation.md`), `perplexity` of the text named by --source in any form of
`data.source`, or `dialogue`: completions by a chat model of the conversations named by --source. With --held_out both
read what the run held out of its own data (metrics of dialogues: `gptjax/evaluation/dialogue.py`); of a mixture, the
perplexity of each source is measured too. `core` are the tasks of `gptjax/evaluation/core_metric.py`. `vqa` are
questions about the images of --source (`gptjax/evaluation/visual_questions.py`). The metrics are printed and, with all
settings, written to --output, and completions and scored examples to files next to it. A stopped evaluation resumes
when the same command is run again.
"""

from typing import Any, cast

from absl import flags

from gptjax import cli
from gptjax.config import UserError
from gptjax.files import expand
from gptjax.parallel import program_cache

WORKDIR = flags.DEFINE_string("workdir", None, "Directory of a run.")
TASKS = flags.DEFINE_list(
    "tasks", [], "What to evaluate, comma-separated: benchmarks, .jsonl files, core, perplexity, dialogue, vqa."
)
NUM_FEWSHOT = flags.DEFINE_integer(
    "num_fewshot", None, "Few-shot examples before each example; default: the benchmark's, mostly 0.", lower_bound=0
)
LIMIT = flags.DEFINE_integer(
    "limit", None, "Number of examples or documents of each task, from the first.", lower_bound=1
)
BATCH_SIZE = flags.DEFINE_integer("batch_size", 8, "Sequences of full context length in a batch.", lower_bound=1)
SEED = flags.DEFINE_integer("seed", 0, "Sampling seed of few-shot examples and of completions.")
BENCHMARK_DIR = flags.DEFINE_string(
    "benchmark_dir",
    None,
    "Folder with the records of the benchmarks, as NAME/SPLIT.jsonl or .parquet; default: download.",
)
SOURCE = flags.DEFINE_string(
    "source",
    None,
    "For perplexity: text:GLOB, jsonl:GLOB#FIELD, tfds:NAME, sotu, ...; for dialogue: jsonl:GLOB, tfds:NAME, "
    "chatterbot; for vqa: jsonl:GLOB, csv:GLOB, digits:test.",
)
HELD_OUT = flags.DEFINE_bool(
    "held_out",
    False,
    "For perplexity and dialogue, instead of --source: what the run held out. Reads the files that its config names.",
)
STRIDE = flags.DEFINE_integer(
    "stride", None, "For perplexity: tokens scored by a window; default: half of the context.", lower_bound=1
)
DETOKENIZER = flags.DEFINE_string("detokenizer", None, "For perplexity: wikitext, ptb, lm1b or lambada; default: none.")
CONCATENATE = flags.DEFINE_bool("concatenate", False, "For perplexity: all documents as one stream, as in training.")
CHOICES_ONLY = flags.DEFINE_bool(
    "choices_only",
    False,
    "For examples with options: also scores the options without the question, which shows whether it is read.",
)
CORE_BUNDLE = flags.DEFINE_string(
    "core_bundle", None, "For core: folder of nanochat's eval_bundle, with core.yaml and eval_data."
)
MAX_NEW_TOKENS = flags.DEFINE_integer(
    "max_new_tokens",
    None,
    "Tokens of a completion; default: for dialogue a fourth of the context, for vqa 32 or fewer, for other tasks what "
    "they define or half of the context.",
    lower_bound=1,
)
SAMPLES = flags.DEFINE_integer(
    "samples", 1, "For tasks that generate text: completions of each prompt, for pass@k.", lower_bound=1
)
TEMPERATURE = flags.DEFINE_float(
    "temperature", 0.0, "For tasks that generate text: sampling temperature; 0: greedy.", lower_bound=0.0
)
TOP_P = flags.DEFINE_float("top_p", None, "For tasks that generate text: nucleus sampling.")
ALLOW_CODE_EXECUTION = flags.DEFINE_bool(
    "allow_code_execution", False, "Runs programs that the model writes, isolated, for humaneval and tasks with tests."
)
REWARD_MODEL = flags.DEFINE_string(
    "reward_model", None, "For dialogue: workdir of a run of stage reward, for win rates against the references."
)
JUDGE = flags.DEFINE_string(
    "judge",
    None,
    "For dialogue: workdir of a chat model, or URL#MODEL of an OpenAI-compatible endpoint (its key: in the environment "
    "variable GPTJAX_JUDGE_KEY), that compares each completion with another, in both orders.",
)
JUDGE_TOKENS = flags.DEFINE_integer("judge_tokens", 64, "Tokens of an answer of the judge.", lower_bound=1)
OPPONENT = flags.DEFINE_string(
    "opponent", None, "For --judge: workdir whose completions are compared with. Default: the references."
)
MESH = flags.DEFINE_string("mesh", "", "Layout over the devices, such as data=2,tensor=4; default: all on data.")
DTYPE = flags.DEFINE_enum("dtype", None, ["float32", "bfloat16"], "Dtype of activations; default: as in training.")
OUTPUT = flags.DEFINE_string("output", None, "JSON file of the results; default: in WORKDIR/evaluation.")
CHECKPOINT = cli.CheckpointFlags()
CACHE_DIR = cli.define_cache_dir()


def main() -> None:
    if WORKDIR.value is None:
        raise UserError("needs --workdir=DIR, the directory of a run")
    workdir = expand(WORKDIR.value)
    if not workdir.is_dir():
        raise UserError(f"there is no workdir {WORKDIR.value}")
    output = None if OUTPUT.value is None else cli.output_file("output", OUTPUT.value)
    cli.join()
    program_cache.use(expand(CACHE_DIR.value))
    if JUDGE.value is None and OPPONENT.value is not None:
        raise UserError("--opponent needs --judge, which compares with its completions")
    opponent = None if OPPONENT.value is None else expand(OPPONENT.value)
    from gptjax.evaluation.judging import JudgeSettings  # these take seconds to import
    from gptjax.evaluation.run_tasks import Options, evaluate

    evaluate(
        workdir,
        Options(
            tasks=tuple(TASKS.value),
            num_fewshot=NUM_FEWSHOT.value,
            limit=LIMIT.value,
            batch_size=BATCH_SIZE.value,
            seed=SEED.value,
            source=SOURCE.value,
            held_out=HELD_OUT.value,
            stride=STRIDE.value,
            detokenizer=DETOKENIZER.value,
            concatenate=CONCATENATE.value,
            choices_only=CHOICES_ONLY.value,
            core_bundle=None if CORE_BUNDLE.value is None else expand(CORE_BUNDLE.value),
            max_new_tokens=MAX_NEW_TOKENS.value,
            samples=SAMPLES.value,
            temperature=TEMPERATURE.value,
            top_p=TOP_P.value,
            allow_code_execution=ALLOW_CODE_EXECUTION.value,
            benchmark_dir=None if BENCHMARK_DIR.value is None else expand(BENCHMARK_DIR.value),
            reward_model=None if REWARD_MODEL.value is None else expand(REWARD_MODEL.value),
            judge=None if JUDGE.value is None else JudgeSettings(JUDGE.value, JUDGE_TOKENS.value, opponent),
            mesh=MESH.value,
            dtype=cast(Any, DTYPE.value),
            output=output,
            best=CHECKPOINT.best,
            step=CHECKPOINT.step,
        ),
    )


if __name__ == "__main__":
    cli.run(main, joins=True)
