"""Interactive chat with a fine-tuned chat model.

python -m gptjax.chat --workdir=runs/sft
python -m gptjax.chat --workdir=runs/dpo --system="Answer in one sentence." --temperature=0.7
echo "Who are you?" | python -m gptjax.chat --workdir=runs/sft
python -m gptjax.chat --workdir=runs/sft --documents=examples/customer_service
python -m gptjax.chat --workdir=runs/gpt_oss --template=harmony

A line is a message. Ctrl-C stops a completion, which is then not part of the conversation; Ctrl-D quits. Commands:
/system TEXT sets the system message (without TEXT: removes it), /reset deletes the turns, /regen regenerates the last
completion, /image PATH and /video PATH add an image or a video to the next message, /save FILE appends the conversation
to a file that stage "sft" can train on, /tool RESULT answers a call, /help, /quit.

A model of chat.template=harmony may reason before it answers, which --analysis=show shows, and call the functions of
--tools=FILE, a JSON list in the form of OpenAI's API. A call is printed, and /tool RESULT gives its result.

With --documents the passages of these texts that match a message best are inserted before it (retrieval-augmented
generation), and their sources are printed below the completion.
"""

import dataclasses
import io
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from types import FrameType
from typing import TYPE_CHECKING

from absl import flags

from gptjax import cli, files
from gptjax.config import UserError, read_config
from gptjax.data import text_files
from gptjax.files import expand
from gptjax.inference import retrieval
from gptjax.parallel import program_cache

if TYPE_CHECKING:
    from gptjax.data.conversations import RequestOptions
    from gptjax.inference.chatting import ChatSession

WORKDIR = flags.DEFINE_string("workdir", None, "Directory of a run of a chat stage, such as sft.")
SYSTEM = flags.DEFINE_string("system", None, "System message, before all turns.")
DOCUMENTS = flags.DEFINE_string("documents", None, "Folder of .txt and .md files for retrieval.")
TEMPLATE = flags.DEFINE_enum(
    "template", None, ["harmony"], "Template of a model that no chat stage trained, such as an imported gpt-oss."
)
TOOLS = flags.DEFINE_string("tools", None, "chat.template=harmony: file with a JSON list of functions to call.")
REASONING_EFFORT = flags.DEFINE_enum(
    "reasoning_effort", None, ["low", "medium", "high"], "chat.template=harmony: default: that of the config."
)
ANALYSIS = flags.DEFINE_enum(
    "analysis", "hide", ["hide", "show"], "chat.template=harmony: the channel analysis, in dim letters in a terminal."
)
MAX_NEW_TOKENS = flags.DEFINE_integer(
    "max_new_tokens", None, "Maximum tokens of a completion; default: a fourth of the context.", lower_bound=1
)
TEMPERATURE = flags.DEFINE_float("temperature", 0.8, "Divides the logits; 0: greedy decoding.")
TOP_K = flags.DEFINE_integer("top_k", 50, "Samples from the k most probable tokens; 0: all.", lower_bound=0)
TOP_P = flags.DEFINE_float("top_p", None, "Nucleus sampling: smallest set with this probability.")
SEED = flags.DEFINE_integer("seed", 0, "Sampling seed, modulo 2**32.")
CHECKPOINT = cli.CheckpointFlags()
MESH = flags.DEFINE_string("mesh", "", "Devices by axis, such as fsdp=2,tensor=4; data takes what is left.")
CACHE_DIR = cli.define_cache_dir()

HELP = "/system TEXT, /image PATH, /video PATH, /reset, /regen, /save FILE, /tool RESULT, /help, /quit"


def main() -> None:
    if WORKDIR.value is None:
        raise UserError("needs --workdir=DIR, the directory of a run of a chat stage, such as sft")
    from gptjax.stages import registry  # takes seconds to import

    config = read_config(expand(WORKDIR.value))
    if TEMPLATE.value is not None and registry.definition(config).conversational:
        raise UserError(f"{WORKDIR.value} is trained with chat.template={config.chat.template}: leave out --template")
    if TEMPLATE.value is None and not registry.definition(config).chats:
        raise UserError(
            f"{WORKDIR.value} is a run of stage {config.stage}, which trains no chat model: fine-tune it with "
            f"gptjax.main --config=configs/chatgpt.py:stage=sft,init_from={WORKDIR.value}"
        )
    if DOCUMENTS.value is not None:
        retrieval.check(expand(DOCUMENTS.value))
    session = open_session()
    interactive = sys.stdin.isatty()
    lines: Iterator[str] = iter(()) if interactive else (line for _, line in text_files.read_lines(None))
    if interactive:
        if isinstance(sys.stdin, io.TextIOWrapper):
            sys.stdin.reconfigure(errors="strict")  # some locales would pass bytes on that are not text
        import readline  # noqa: F401 (makes `input` edit lines, and remember them)

        print(f"{WORKDIR.value}; {HELP}")
    while True:
        try:
            line = (input("> ") if interactive else next(lines)).strip()
        except (EOFError, StopIteration):
            return
        except UnicodeDecodeError as error:
            print(f"error: this is not UTF-8: {error}")
            continue
        except KeyboardInterrupt:
            if not interactive:
                raise
            print()
            continue
        if line == "/quit":
            return
        if not line:
            continue
        try:
            take(session, line)
        except UserError as error:
            if not interactive:
                raise
            print(f"error: {error}")
        except KeyboardInterrupt:
            if not interactive:
                raise
            print("\n(stopped)")


def open_session() -> "ChatSession":
    """Creates the chat session from the flags."""
    from gptjax.data.images.image_files import ImageFiles
    from gptjax.data.templates import chat_format  # after the checks: these take seconds to import
    from gptjax.inference.chatting import ChatSession
    from gptjax.inference.engine import Engine
    from gptjax.inference.sampling import Sampling
    from gptjax.stages.trained_model import load_model, parse_mesh

    sampling = Sampling(TEMPERATURE.value, TOP_K.value or None, TOP_P.value)
    documents = None
    if DOCUMENTS.value is not None:
        documents = retrieval.Documents(expand(DOCUMENTS.value))
    options = read_options()
    assert WORKDIR.value is not None
    program_cache.use(expand(CACHE_DIR.value))
    trained = load_model(expand(WORKDIR.value), parse_mesh(MESH.value), best=CHECKPOINT.best, step=CHECKPOINT.step)
    chat = trained.config.chat
    if TEMPLATE.value is not None:
        chat = dataclasses.replace(chat, template="harmony")
    form = chat_format(chat, trained.tokenizer, trained.config.model.vision)
    if TEMPLATE.value is not None and form.special_tokens:
        raise UserError(
            f"the tokenizer of {WORKDIR.value} lacks {next(iter(form.special_tokens))} of --template={TEMPLATE.value}: "
            "train the model with stage sft"
        )
    engine = Engine(trained.model, trained.params, trained.tokenizer, trained.mesh)
    max_new_tokens = MAX_NEW_TOKENS.value or trained.model.config.context_length // 4
    return ChatSession(
        engine,
        form,
        sampling,
        system=SYSTEM.value,
        max_new_tokens=max_new_tokens,
        seed=SEED.value,
        documents=documents,
        options=options,
        images=ImageFiles.of_prompts(trained.config) if trained.config.model.reads_images else None,
        analysis="dim" if ANALYSIS.value == "show" and sys.stdout.isatty() else ANALYSIS.value,
    )


def read_options() -> "RequestOptions | None":
    """Reads the request options of the flags; None if there are none. Raises UserError if the file is malformed."""
    from gptjax.data.harmony_forms import parse_options

    tools = None
    if TOOLS.value is not None:
        try:
            tools = files.read_json(expand(TOOLS.value))
        except (OSError, ValueError) as error:
            raise UserError(f"cannot read --tools={TOOLS.value}: {error}") from None
    return parse_options({"tools": tools, "reasoning_effort": REASONING_EFFORT.value}, f"--tools={TOOLS.value}")


def take(session: "ChatSession", line: str) -> None:
    """Executes a line of input: a command, or a message to complete."""
    command, _, argument = line.partition(" ")
    argument = argument.strip()

    if command == "/system":
        session.system = argument or None
    elif command in ("/image", "/video"):
        if not argument:
            raise UserError(f"{command} needs the PATH of {'an image' if command == '/image' else 'a video'}")
        session.attach(argument, is_video=command == "/video")
    elif command == "/reset":
        session.reset()
    elif command == "/save":
        if not argument:
            raise UserError("/save needs a FILE to append the conversation to")
        session.save(expand(argument))
    elif command == "/regen":
        print_completion(session, session.regenerate)
    elif command == "/tool":
        print_completion(session, partial(session.answer_call, argument))
    elif command == "/help":
        print(HELP)
    elif line.startswith("/"):
        raise UserError(f"unknown command {line!r}: {HELP}")
    else:
        print_completion(session, partial(session.reply, line))


@contextmanager
def shown() -> Iterator[Callable[[str], None]]:
    """Yields a function that prints a piece of a completion; after Ctrl-C it raises KeyboardInterrupt.

    Raised at an arbitrary place, the exception could be lost: Python ignores exceptions in callbacks of the garbage
    collector, and JAX installs one. A second Ctrl-C interrupts at once, as the next piece may need a compilation.
    """
    interrupted = False

    def note(_number: int, _frame: FrameType | None) -> None:
        nonlocal interrupted
        interrupted = True
        signal.signal(signal.SIGINT, before)

    def show(piece: str) -> None:
        print(piece, end="", flush=True)
        if interrupted:
            raise KeyboardInterrupt

    before = signal.signal(signal.SIGINT, note)
    try:
        yield show
    finally:
        signal.signal(signal.SIGINT, before)


def print_completion(session: "ChatSession", generate: Callable[[Callable[[str], None]], str]) -> None:
    """Prints a completion while it is generated, then its sources."""
    with shown() as show:
        generate(show)
    print()
    if session.call is not None:
        print("(/tool RESULT gives the result of this call)")
    if session.sources:
        print(retrieval.citations(session.sources))


if __name__ == "__main__":
    cli.run(main)
