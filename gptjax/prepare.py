"""Prepares a corpus: filters, removes copies and the text of evaluation tasks, tokenises, writes shards and a report.

With --show it prepares nothing, and prints what the batches of a run hold: decoded, with segments and loss masks.

python -m gptjax.prepare --source='jsonl:crawl/*.jsonl.zst' --tokenizer=gpt2 --output=corpora/crawl --processes=16 \\
    --languages=en --quality_reference='jsonl:webtext/*.jsonl' --tasks=lambada,hellaswag,mine.jsonl
python -m gptjax.main --config=configs/gpt2.py --config.data.source=prepared:corpora/crawl --workdir=runs/gpt2
python -m gptjax.prepare --show --config=configs/gpt2.py:runlocal

The filters are those of GPT-3 (Brown et al. 2020, appendices A and C). A stopped preparation resumes when the same
command is run again. The files of --output do not depend on --processes, --engine, --shard or how often it was stopped.
"""

import re
from typing import Any, cast

from absl import flags

from gptjax import cli
from gptjax.config import DataConfig, UserError
from gptjax.files import expand

SOURCE = flags.DEFINE_string("source", None, "The documents, in any form of data.source: text:GLOB, jsonl:GLOB, ...")
TOKENIZER = flags.DEFINE_string("tokenizer", DataConfig.tokenizer, "As data.tokenizer: gpt2, bpe:SIZE, json:PATH, ...")
OUTPUT = flags.DEFINE_string("output", None, "Directory of the corpus, and of the results of steps until it is done.")
VALIDATION_FRACTION = flags.DEFINE_float(
    "validation_fraction", DataConfig.validation_fraction, "Fraction of the documents that is held out."
)
LANGUAGES = flags.DEFINE_list("languages", [], "Keep documents in these languages, such as en,de; default: all.")
QUALITY_REFERENCE = flags.DEFINE_string(
    "quality_reference", None, "Source of good documents, for the quality filter; default: no filter."
)
DUPLICATES = flags.DEFINE_enum("duplicates", "near", ["none", "exact", "near"], "Copies of documents that are dropped.")
SIMILARITY = flags.DEFINE_float("similarity", 0.8, "Jaccard similarity of 5-word shingles that makes a near copy.")
TASKS = flags.DEFINE_list("tasks", [], "Benchmarks and .jsonl task files whose text is removed, as in evaluate.")
MAX_GRAM_DOCUMENTS = flags.DEFINE_integer(
    "max_gram_documents",
    10,
    "13-grams of tasks in more documents than this are common phrases and stay.",
    lower_bound=0,
)
SEED = flags.DEFINE_integer("seed", 0, "Seed of the random numbers of the quality filter.")
DOCUMENT_SEPARATOR = flags.DEFINE_string(
    "document_separator", None, "Line that separates documents within a text file; default: one document per file."
)
INVALID_UTF8 = flags.DEFINE_enum("invalid_utf8", "replace", ["replace", "error"], "As data.invalid_utf8.")
ON_CORRUPT = flags.DEFINE_enum("on_corrupt", "error", ["error", "skip"], "As data.on_corrupt.")
PART_BYTES = flags.DEFINE_integer(
    "part_bytes", 2**25, "Bytes of text that a process works on at a time.", lower_bound=1
)
PROCESSES = flags.DEFINE_integer("processes", 1, "Processes of this machine.", lower_bound=1)
ENGINE = flags.DEFINE_enum("engine", "processes", ["processes", "ray"], "Where the work runs; ray: by Ray Data.")
SHARD = flags.DEFINE_string(
    "shard", "0/1", "i/n: this is machine i of n, from 0, that run the same command with a shared --output."
)
CACHE_DIR = flags.DEFINE_string("cache_dir", DataConfig.cache_dir, "Directory of vocabularies and trained tokenizers.")
SHOW = flags.DEFINE_bool("show", False, "Print what the batches of --config hold, and the lengths of documents.")
ROWS = flags.DEFINE_integer("rows", 2, "Rows that --show prints.", lower_bound=1)
CONFIG = cli.ConfigFlag()


def main() -> None:
    if SHOW.value:
        show()
        return
    if SOURCE.value is None or OUTPUT.value is None:
        raise UserError("needs --source=SOURCE and --output=DIR")
    shard = re.fullmatch(r"(\d+)/(\d+)", SHARD.value)
    if shard is None:
        raise UserError(f"--shard={SHARD.value}: write i/n, such as 0/4")
    from gptjax.corpus.executors import Executor
    from gptjax.corpus.recipe import Recipe
    from gptjax.corpus.run_preparation import prepare_corpus

    recipe = Recipe(
        source=SOURCE.value,
        tokenizer=TOKENIZER.value,
        validation_fraction=VALIDATION_FRACTION.value,
        languages=tuple(LANGUAGES.value),
        quality_reference=QUALITY_REFERENCE.value,
        duplicates=cast(Any, DUPLICATES.value),
        similarity=SIMILARITY.value,
        tasks=tuple(TASKS.value),
        max_gram_documents=MAX_GRAM_DOCUMENTS.value,
        seed=SEED.value,
        document_separator=DOCUMENT_SEPARATOR.value,
        invalid_utf8=cast(Any, INVALID_UTF8.value),
        on_corrupt=cast(Any, ON_CORRUPT.value),
        part_bytes=PART_BYTES.value,
    )
    executor = Executor(PROCESSES.value, cast(Any, ENGINE.value), (int(shard[1]), int(shard[2])))
    print(prepare_corpus(recipe, expand(OUTPUT.value), expand(CACHE_DIR.value), executor), end="")


def show() -> None:
    """Prints what the batches of --config hold."""
    config = CONFIG.load()
    if config is None:
        raise UserError("--show needs --config=FILE, such as --show --config=configs/gpt2.py:runlocal")
    from gptjax.stages import batch_text

    print(batch_text.show(config, ROWS.value))


if __name__ == "__main__":
    cli.run(main)
