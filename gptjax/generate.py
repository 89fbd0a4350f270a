"""Generates text with the model of a workdir.

python -m gptjax.generate --workdir=runs/demo --prompt="The Congress" --temperature=0.8 --top_k=50
python -m gptjax.generate --workdir=runs/demo --prompts=prompts.jsonl --num_samples=4 --output=completions.jsonl
echo "The Congress" | python -m gptjax.generate --workdir=runs/demo --num_beams=4
python -m gptjax.generate --workdir=runs/fim --prompt="The Congress" --suffix=" of the United States."
python -m gptjax.generate --workdir=runs/digits --image=digits:7 --prompt="Which digit?"

A single completion is streamed as text. Otherwise the output is JSON lines, one for each completion:
{"prompt": .., "text": .., "finish_reason": "end_of_text" | "stop" | "length", "num_tokens": .., "seed": ..}, with the
other fields of the prompt's line in a .jsonl file, and with --logprobs "tokens" and "logprobs". A beam has no seed.

With --image the prompt is a user's message in the format of a chat model, and plain text for other models.
"""

import json
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, TextIO, cast

from absl import flags

from gptjax import cli
from gptjax.config import UserError, read_config
from gptjax.data import text_files
from gptjax.distributed import processes
from gptjax.files import expand, is_in_bucket
from gptjax.parallel import program_cache

if TYPE_CHECKING:
    from gptjax.inference.engine import Completion, Engine, Images

DEFAULT_NEW_TOKENS = 128


class PromptImages(NamedTuple):
    """The images of all prompts, and the tokens that end their completions."""

    images: "Images"
    end_tokens: tuple[int, ...]


WORKDIR = flags.DEFINE_string("workdir", None, "Directory of a run, or of imported weights.")
PROMPT = flags.DEFINE_string("prompt", None, "Text to continue; default: standard input.")
PROMPTS = flags.DEFINE_string(
    "prompts", None, "File of prompts, one a line, or .jsonl with a text 'prompt' a line; - is stdin."
)
SUFFIX = flags.DEFINE_string(
    "suffix",
    None,
    "Text after the gap: completions fill the middle; for models of data.objective=fill_in_the_middle.",
)
IMAGE = flags.DEFINE_multi_string(
    "image", [], "Image that the prompt has where it says <image>, or else at its start; repeatable."
)
START_DOCUMENT = flags.DEFINE_bool("start_document", False, "Put end-of-text before the prompt: it begins a document.")
MAX_NEW_TOKENS = flags.DEFINE_integer(
    "max_new_tokens", None, "Tokens of a completion; default: 128, or what the context has room for.", lower_bound=1
)
NUM_SAMPLES = flags.DEFINE_integer("num_samples", 1, "Completions of each prompt.", lower_bound=1)
VIDEO = flags.DEFINE_multi_string("video", [], "Video whose frames the prompt has as images, after those of --image.")
FRAMES = flags.DEFINE_integer(
    "frames", None, "Frames of a video; default: data.video_frames of the run.", lower_bound=1
)
TEMPERATURE = flags.DEFINE_float("temperature", 1.0, "Divides the logits; 0: greedy decoding.")
TOP_K = flags.DEFINE_integer("top_k", None, "Samples from the k most probable tokens.")
TOP_P = flags.DEFINE_float("top_p", None, "Nucleus sampling: smallest set with this probability.")
MIN_P = flags.DEFINE_float("min_p", None, "Minimum probability relative to the most probable token.")
REPETITION_PENALTY = flags.DEFINE_float(
    "repetition_penalty", None, "Above 1: makes tokens that occurred before less probable."
)
NUM_BEAMS = flags.DEFINE_integer("num_beams", None, "Beam search instead of sampling.", lower_bound=1)
LENGTH_PENALTY = flags.DEFINE_float("length_penalty", 1.0, "With --num_beams: above 0 favours longer completions.")
STOP = flags.DEFINE_multi_string("stop", [], "String that ends a completion and is removed; repeatable.")
IGNORE_END_OF_TEXT = flags.DEFINE_bool("ignore_end_of_text", False, "Continue after end-of-text.")
OVERFLOW = flags.DEFINE_enum(
    "overflow", "error", ["error", "slide"], "When a text exceeds the context: error, or continue from its last half."
)
SEED = flags.DEFINE_integer("seed", 0, "Sampling seed of the first completion, modulo 2**32; then consecutive.")
BATCH_SIZE = flags.DEFINE_integer("batch_size", 8, "Completions generated together.", lower_bound=1)
BATCHING = flags.DEFINE_enum(
    "batching",
    "static",
    ["static", "continuous"],
    "continuous: the next prompt starts as soon as a completion ends, rather than when all of a batch have ended.",
)
WEIGHTS = flags.DEFINE_enum(
    "weights",
    "as_given",
    ["as_given", "bfloat16", "int8", "stacked"],
    "Weight precision; stacked: no copy.",
)
MESH = flags.DEFINE_string("mesh", "", "Layout over the devices, such as fsdp=2,tensor=4; default: all on data.")
LOGPROBS = flags.DEFINE_bool("logprobs", False, "Output token ids and log-probabilities, as JSON.")
OUTPUT = flags.DEFINE_string("output", None, "Write JSON lines to this file.")
CHECKPOINT = cli.CheckpointFlags()
CACHE_DIR = cli.define_cache_dir()


def main() -> None:
    if WORKDIR.value is None:
        raise UserError("needs --workdir=DIR, such as --workdir=runs/demo --prompt='The'")
    if PROMPT.value is not None and PROMPTS.value is not None:
        raise UserError("--prompt and --prompts exclude each other")
    if NUM_BEAMS.value is not None:
        check_beams(NUM_BEAMS.value)
    if FRAMES.value is not None and not VIDEO.value:
        raise UserError("--frames is the number of frames of a --video: name one")
    if (IMAGE.value or VIDEO.value) and (
        NUM_BEAMS.value is not None or SUFFIX.value is not None or START_DOCUMENT.value
    ):
        raise UserError("--image and --video exclude --num_beams, --suffix and --start_document")
    if SUFFIX.value is not None:
        check_suffix(WORKDIR.value)
    if BATCHING.value == "continuous" and (NUM_BEAMS.value is not None or OVERFLOW.value == "slide"):
        raise UserError("--batching=continuous excludes --num_beams and --overflow=slide: leave it at static")
    cli.join()
    records = processes.of_first(read_prompts)
    output = None if OUTPUT.value is None else cli.output_file("output", OUTPUT.value)
    if output is not None and not processes.is_first():
        output = Path(os.devnull)
    if output is not None and not (is_in_bucket(output) or output.parent.is_dir()):
        raise UserError(f"--output={output}: there is no directory {output.parent}")

    from gptjax.data.images.image_references import WHOLE_VIDEO, ImageReference
    from gptjax.data.infilling import InfillingFormat
    from gptjax.inference.engine import Engine  # after the checks: it takes seconds to import
    from gptjax.stages.image_prompts import ImagePrompts
    from gptjax.stages.trained_model import load_model, parse_mesh

    program_cache.use(expand(CACHE_DIR.value))
    mesh = parse_mesh(MESH.value)
    trained = load_model(expand(WORKDIR.value), mesh, best=CHECKPOINT.best, step=CHECKPOINT.step)
    images = [ImageReference(source) for source in IMAGE.value]
    images += [ImageReference(source, frame=WHOLE_VIDEO) for source in VIDEO.value]
    of_images = ImagePrompts(trained.config, trained.tokenizer, FRAMES.value) if images else None
    engine = Engine(trained.model, trained.params, trained.tokenizer, trained.mesh, cast(Any, WEIGHTS.value))
    del trained  # the engine has its own copy
    read: PromptImages | None = None
    if of_images is not None:
        of_images.check(images)
        encoded = [of_images.encode(record["prompt"], images) for record in records]
        prompts = [prompt.tokens.tolist() for prompt in encoded]
        read = PromptImages(of_images.read(encoded[0].images), of_images.end_tokens)  # the same for all prompts
    elif SUFFIX.value is None:
        prompts = [encode(engine, record["prompt"]) for record in records]
    else:
        form = InfillingFormat(engine.tokenizer)
        prompts = [form.prompt(record["prompt"], SUFFIX.value) for record in records]
        records = [record | {"suffix": SUFFIX.value} for record in records]
    max_new_tokens = check_lengths(prompts, engine.model.config.context_length)
    as_text = len(records) * NUM_SAMPLES.value == 1 and output is None and not LOGPROBS.value and PROMPTS.value is None
    if as_text:
        before = records[0]["prompt"]  # printed with the first text, after compilation

        def show(text: str) -> None:
            nonlocal before
            print(before, text, sep="", end="", flush=True)
            before = ""

        for _ in complete(engine, prompts, max_new_tokens, show, read):
            show(f"{SUFFIX.value or ''}\n")
        return
    with nullcontext(sys.stdout) if output is None else opened_output(output) as file:
        completions = complete(engine, prompts, max_new_tokens, images=read)
        for number, completion in enumerate(progress(completions, len(prompts) * NUM_SAMPLES.value)):
            line = describe(records[number // NUM_SAMPLES.value], completion, SEED.value + number)
            print(json.dumps(line, ensure_ascii=False), file=file, flush=True)


def opened_output(path: Path) -> TextIO:
    """Opens --output for writing; UserError where that is not possible."""
    try:
        return path.open("w", encoding="utf-8")
    except OSError as error:
        raise UserError(f"cannot write --output={path}: {error.strerror}") from None


def check_suffix(workdir: str) -> None:
    """Raises UserError where the workdir's model cannot fill a gap, and for flags that contradict --suffix."""
    objective = read_config(expand(workdir)).data.objective
    if objective != "fill_in_the_middle":
        raise UserError(
            f"--suffix needs a model trained with data.objective=fill_in_the_middle, and that of {workdir} has "
            f"data.objective={objective}"
        )
    if NUM_BEAMS.value is not None:
        raise UserError("--suffix and --num_beams exclude each other")
    if OVERFLOW.value != "error" or START_DOCUMENT.value:
        raise UserError("--suffix excludes --overflow=slide and --start_document: the gap is in one context")


def check_beams(num_beams: int) -> None:
    """Raises UserError for flags that do not apply to beam search."""
    sampling = (TEMPERATURE, TOP_K, TOP_P, MIN_P, REPETITION_PENALTY, STOP, OVERFLOW, SEED)
    if given := [flag.name for flag in sampling if flag.present]:
        raise UserError(f"--{given[0]} and --num_beams exclude each other")
    if NUM_SAMPLES.value > num_beams:
        raise UserError(f"--num_samples={NUM_SAMPLES.value} is more than --num_beams={num_beams} can find")


def read_prompts() -> list[dict[str, Any]]:
    """Reads the prompts: dicts with "prompt", and the other fields of the line in a .jsonl file."""
    if PROMPT.value is not None:
        return [{"prompt": PROMPT.value}]
    if PROMPTS.value is None:
        if sys.stdin.isatty():
            raise UserError("needs --prompt=TEXT, --prompts=FILE, or text on standard input")
        return [{"prompt": text_files.without_end(text_files.read_text(None))}]
    lines = text_files.read_lines(None if PROMPTS.value == "-" else expand(PROMPTS.value))
    if text_files.is_json_lines(PROMPTS.value):
        records = []
        for record, place in text_files.json_objects(lines):
            if not isinstance(record.get("prompt"), str):
                raise UserError(f'{place}: a line must be an object with a text "prompt"')
            records.append(record)
    else:
        records = [{"prompt": line} for _, line in lines]
    if not records:
        raise UserError(f"--prompts={PROMPTS.value} has no lines")
    return records


def encode(engine: "Engine", prompt: str) -> list[int]:
    """The tokens of a prompt; an empty one is end-of-text, from which a document starts."""
    ids = engine.tokenizer.encode(prompt).tolist()
    if START_DOCUMENT.value:
        if engine.tokenizer.end_of_text is None:
            raise UserError("--start_document: this tokenizer has no end-of-text token")
        ids = [engine.tokenizer.end_of_text, *ids]
    return ids if ids else engine.ids("").tolist()  # which starts a document, or refuses


def check_lengths(prompts: list[list[int]], context: int) -> int:
    """Returns the number of new tokens; UserError with the first prompt that leaves no room for them."""
    longest = max(map(len, prompts))
    slides = OVERFLOW.value == "slide"
    new = MAX_NEW_TOKENS.value
    if new is None:
        new = DEFAULT_NEW_TOKENS if slides else max(1, min(DEFAULT_NEW_TOKENS, context - longest))
    if longest + new > context and not slides:
        number, length = next((i, len(ids)) for i, ids in enumerate(prompts, start=1) if len(ids) + new > context)
        raise UserError(
            f"prompt {number} has {length} tokens, with --max_new_tokens={new} more than the model's context of "
            f"{context}: shorten one, or pass --overflow=slide"
        )
    return new


def complete(
    engine: "Engine",
    prompts: list[list[int]],
    max_new_tokens: int,
    show: Callable[[str], None] | None = None,
    images: PromptImages | None = None,
) -> Iterator["Completion"]:
    """Yields NUM_SAMPLES completions of each prompt in turn; `show` gets their text as it is generated."""
    from gptjax.inference.beam import beam_search
    from gptjax.inference.sampling import Sampling

    if NUM_BEAMS.value is not None:
        for start in range(0, len(prompts), BATCH_SIZE.value):
            for beams in beam_search(
                engine,
                prompts[start : start + BATCH_SIZE.value],
                max_new_tokens,
                num_beams=NUM_BEAMS.value,
                length_penalty=LENGTH_PENALTY.value,
                num_return=NUM_SAMPLES.value,
                ignore_end_of_text=IGNORE_END_OF_TEXT.value,
            ):
                if show is not None:
                    show(beams[0].completion.text)
                yield from (beam.completion for beam in beams)
        return
    sampling = Sampling(TEMPERATURE.value, TOP_K.value, TOP_P.value, MIN_P.value, REPETITION_PENALTY.value)
    repeated = [prompt for prompt in prompts for _ in range(NUM_SAMPLES.value)]
    ends = () if images is None else images.end_tokens
    of_prompts = None if images is None else [images.images] * len(repeated)
    separate_text = SUFFIX.value is not None or images is not None  # a middle is encoded on its own
    if BATCHING.value == "continuous" and show is None:
        from gptjax.inference.batching import BatchedEngine
        from gptjax.inference.continuous import complete_prompts

        batched = BatchedEngine(
            engine.model, engine.params, engine.tokenizer, engine.mesh, "stacked", rows=BATCH_SIZE.value
        )
        yield from complete_prompts(
            batched,
            repeated,
            max_new_tokens,
            sampling,
            seeds=SEED.value,
            stop=STOP.value,
            end_tokens=ends,
            ignore_end_of_text=IGNORE_END_OF_TEXT.value,
            separate_text=separate_text,
            images=of_prompts,
        )
        return
    for start in range(0, len(repeated), BATCH_SIZE.value):
        yield from engine.generate(
            repeated[start : start + BATCH_SIZE.value],
            max_new_tokens,
            sampling,
            seeds=SEED.value + start,
            stop=STOP.value,
            end_tokens=ends,
            images=None if of_prompts is None else of_prompts[start : start + BATCH_SIZE.value],
            ignore_end_of_text=IGNORE_END_OF_TEXT.value,
            separate_text=separate_text,
            overflow=cast(Any, OVERFLOW.value),
            on_text=None if show is None else (lambda _, text: show(text)),
        )


def progress(completions: Iterator["Completion"], total: int) -> Iterator["Completion"]:
    from tqdm import tqdm

    hidden = total == 1 or not sys.stderr.isatty() or not processes.is_first()
    return iter(tqdm(completions, total=total, unit="completion", disable=hidden))


def describe(record: dict[str, Any], completion: "Completion", seed: int) -> dict[str, Any]:
    line = record | {
        "text": completion.text,
        "finish_reason": completion.finish_reason,
        "num_tokens": len(completion.tokens),
    }
    if NUM_BEAMS.value is None:
        line["seed"] = seed
    if LOGPROBS.value:
        line |= {"tokens": completion.tokens.tolist(), "logprobs": [round(float(x), 6) for x in completion.logprobs]}
    return line


if __name__ == "__main__":
    cli.run(main, joins=True)
