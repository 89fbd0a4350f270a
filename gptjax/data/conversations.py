"""Reads conversations, rankings and prompts from JSON lines, tensorflow-datasets, or a Python package.

Errors in a conversation are reported in one line with file name and line number.
"""

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from gptjax.config import UserError
from gptjax.data import harmony_forms, records
from gptjax.data.conversation_forms import (
    Message,
    RequestOptions,
    Role,
    conversation_messages,
    prompt_messages,
    ranked_texts,
)
from gptjax.data.images import digits
from gptjax.data.packages import require_package
from gptjax.data.preparation import split_documents
from gptjax.data.text_files import InvalidUtf8

__all__ = [
    "Conversation",
    "Message",
    "Prompt",
    "Ranking",
    "RequestOptions",
    "Role",
    "check_order",
    "check_spec",
    "hold_out",
    "prompts",
    "random_rankings",
    "read_conversations",
    "read_prompts",
    "read_rankings",
]

_TABLES = ("jsonl", "csv", "tsv", "parquet", "webdataset", "arrow", "hf", "tfds")  # of `records.read_records`
_FORMS = (
    "jsonl:GLOB, csv:GLOB, tsv:GLOB, parquet:GLOB, webdataset:GLOB, arrow:DIR[@SPLIT], "
    "hf:OWNER/NAME[@CONFIG:SPLIT][?revision=COMMIT], tfds:NAME[@SPLIT], "
    "chatterbot[:LANGUAGE+LANGUAGE], digits:train[:FORM], digits:test[:FORM]"
)
_PACKAGED = ("chatterbot", "digits")


@dataclasses.dataclass(frozen=True)
class Conversation:
    """Alternating turns of user and assistant, optionally after a system message.

    With the harmony format a turn of the assistant may have several messages, and results of tools between them.

    Attributes:
      messages: begins with the system message, if any, then a user's message.
      place: where the conversation is from, for error messages: "chats.jsonl:17".
    """

    messages: tuple[Message, ...]
    place: str

    @property
    def prompt(self) -> tuple[Message, ...]:
        """The messages before the first completion."""
        first = next(i for i, message in enumerate(self.messages) if message.role == "assistant")
        return self.messages[:first]


@dataclasses.dataclass(frozen=True)
class Ranking:
    """Two or more completions of one prompt, best first.

    Attributes:
      prompt: ends in a user's message.
      completions: their texts.
      place: where the ranking is from, for error messages.
      ordered: if False, only the first completion is known to be better than the others.
    """

    prompt: tuple[Message, ...]
    completions: tuple[str, ...]
    place: str
    ordered: bool = True

    @property
    def ranks(self) -> tuple[int, ...]:
        """Rank of each completion, 1 for the best; completions of equal rank are not compared."""
        return tuple(i + 1 if self.ordered else min(i + 1, 2) for i in range(len(self.completions)))


@dataclasses.dataclass(frozen=True)
class Prompt:
    """Messages that the assistant completes.

    Attributes:
      messages: ends in a user's message.
      reference: the reference completion; None: there is none.
      place: where the prompt is from, for error messages.
    """

    messages: tuple[Message, ...]
    reference: str | None
    place: str


T = TypeVar("T", Conversation, Ranking, Prompt)


def check_spec(spec: str) -> None:
    """Raises UserError if the form of `spec` is unknown, or its files or package do not exist; reads no file."""
    scheme = spec.partition(":")[0]
    if scheme == "chatterbot":
        _language_folders(spec)
    elif scheme == "digits":
        digits.parse(spec)
    elif scheme in _TABLES:
        records.check_spec(spec)
    else:
        raise UserError(f"unknown source {spec!r} of conversations: known sources are {_FORMS}")


def read_conversations(
    spec: str, *, invalid_utf8: InvalidUtf8 = "error", harmony: bool = False, skip_damaged: bool = False
) -> list[Conversation]:
    """Reads all conversations of a source, in its order.

    Args:
      spec: one of the following; GLOB and the encodings of files are those of `sources.open_source`.
        jsonl:GLOB — each line a JSON object: OpenAI's {"messages": [{"role": ..., "content": ...}, ...]}, ShareGPT's
          {"conversations": [{"from": "human", "value": ...}, {"from": "gpt", "value": ...}, ...]}, Alpaca's
          {"instruction": ..., "input": ..., "output": ...}, or TRL's {"prompt": ..., "completion": ...}, both texts or
          lists of messages. A field `system` or `system_prompt` is the system message. The content may be a list of
          parts {"type": "text", "text": ...}, in a user's message also {"type": "image_url", "image_url": {"url":
          ...}}. The role developer is read as system. A record with `image`, `images` or `file_name` has them where its
          texts have `<image>`; it may also be {"question": ..., "answer": ...}, {"caption": ...} or {"text": ...}, a
          document if it has `<image>`, otherwise a caption;
        csv:GLOB, tsv:GLOB — tables with such columns;
        `parquet:GLOB`, `arrow:DIR[@SPLIT]`, `hf:OWNER/NAME[@CONFIG:SPLIT][?revision=COMMIT]`, `tfds:NAME[@SPLIT]` — a
          dataset with such columns, as in `labelled.read_rows`;
        webdataset:GLOB — tar files of images and their texts, as in `tar_shards.read_shards`;
        chatterbot[:LANGUAGE+LANGUAGE] — dialogues of the PyPI package chatterbot-corpus, without duplicates; English by
          default;
        digits:train, digits:test — scikit-learn's digits: questions about one image, and about two; with :text behind
          it, without the images; with :captions or :documents, images with their digit behind, alone or several.
      invalid_utf8: "replace" replaces bytes that are not UTF-8 by U+FFFD, and warns; "error" raises.
      harmony: reads reasoning, channels, tools and their calls, as `harmony_forms.parse_record` does; otherwise records
        that have them are refused.
      skip_damaged: skips the damaged samples of tar files.

    Raises:
      UserError: in one line with file name and line number: an unknown role, tool calls, two consecutive turns of one
        role, a message that is empty or not text, no completion; or the source has no conversations or cannot be read.
    """
    check_spec(spec)
    if spec.partition(":")[0] == "chatterbot":
        # Half of them are duplicates, which would otherwise occur in both training and validation data.
        once: dict[tuple[Message, ...], Conversation] = {}
        for conversation in _chatterbot(spec):
            once.setdefault(conversation.messages, conversation)
        found = list(once.values())
    elif spec.startswith("digits:"):
        found = [Conversation(messages, place) for messages, place in digits.conversations(spec)]
    else:
        found = []
        for record, place in _records(spec, invalid_utf8, skip_damaged):
            if harmony:
                messages = harmony_forms.parse_record(record, place, conversation_messages)
                harmony_forms.check_turns(messages, place)
                messages = harmony_forms.without_unanswered(messages, place)
            else:
                messages = _whole(conversation_messages(record, place), place)
            found.append(Conversation(messages, place))
    if not found:
        raise UserError(f"{spec} has no conversations")
    return found


def read_rankings(spec: str, *, invalid_utf8: InvalidUtf8 = "error", skip_damaged: bool = False) -> list[Ranking]:
    """Reads all rankings of a source, in its order.

    Args:
      spec: as in `read_conversations`, but not chatterbot. A record has its prompt as `messages` or `prompt`, a list of
        messages or a user's message, optionally with `system`, and its completions as `ranking`, a list with the best
        first, or as `chosen` and `rejected`. A completion is a text, a list of the assistant's message (TRL), or a
        whole conversation, a list of messages (UltraFeedback) or a dialogue "\\n\\nHuman: ...\\n\\nAssistant: ..."
        (Anthropic's HH); whole conversations differ only in the last message, and need no separate prompt.
      invalid_utf8, skip_damaged: as in `read_conversations`.

    Raises:
      UserError: as in `read_conversations`; or there are fewer than two completions, or two equal ones.
    """
    check_spec(spec)
    if spec.partition(":")[0] in _PACKAGED:
        raise UserError(f"{spec} has conversations, but no rankings: set chat.random_answers to make rankings of them")
    found = [_ranking(record, place) for record, place in _records(spec, invalid_utf8, skip_damaged)]
    if not found:
        raise UserError(f"{spec} has no rankings")
    return found


def read_prompts(
    spec: str, *, invalid_utf8: InvalidUtf8 = "error", harmony: bool = False, skip_damaged: bool = False
) -> list[Prompt]:
    """Reads the prompts of a source: the messages before each completion, and a last user message without completion.

    Args:
      spec, invalid_utf8, harmony, skip_damaged: as in `read_conversations`. A record may also have only `prompt`, a
        user's message or a list of messages.

    Raises:
      UserError: as in `read_conversations`.
    """
    check_spec(spec)
    if spec.partition(":")[0] in _PACKAGED:
        return prompts(read_conversations(spec))
    found: list[Prompt] = []
    for record, place in _records(spec, invalid_utf8, skip_damaged):
        if harmony:
            messages = harmony_forms.parse_record(record, place, prompt_messages)
            harmony_forms.check_turns(messages, place)
        else:
            messages = prompt_messages(record, place)
            check_order(messages, place)
        found += prompts([Conversation(messages, place)])
        if messages and messages[-1].role in ("user", "tool"):
            found.append(Prompt(messages, None, place))
    if not found:
        raise UserError(f"{spec} has no prompts")
    return found


def hold_out(items: Sequence[T], fraction: float) -> tuple[list[T], list[T]]:
    """Splits into train and validation: every k-th first user message is held out, with all items that begin with it.

    Raises:
      UserError: there is only one first user message.
    """
    asked = [_first_question(item) for item in items]
    questions = dict.fromkeys(asked)
    if len(questions) < 2:
        raise UserError(
            f"all data begin with the first user message of {items[0].place}, so none can be held out: set "
            "data.validation_source"
        )
    names = [name for name, _ in split_documents(map(str, range(len(questions))), fraction)]
    side = dict(zip(questions, names, strict=True))
    sides = list(zip(items, (side[question] for question in asked), strict=True))
    train, validation = ([item for item, name in sides if name == wanted] for wanted in ("train", "validation"))
    return train, validation


def _first_question(item: Conversation | Ranking | Prompt) -> str:
    messages = item.prompt if isinstance(item, Ranking) else item.messages
    first = next(message for message in messages if message.role in ("user", "document"))
    return first.content + "".join(image.source for image in first.images)


def prompts(conversations: Sequence[Conversation]) -> list[Prompt]:
    """Returns the prompt of each completion of the conversations, with that completion as its reference."""
    return [Prompt(*turn) for conversation in conversations for turn in _turns(conversation)]


def random_rankings(
    conversations: Sequence[Conversation], completions: int, seed: int, repetitions: int = 1
) -> list[Ranking]:
    """Ranks each completion of the conversations above completions sampled from other conversations.

    Args:
      conversations: sources of the completions.
      completions: number of sampled completions, all different; none is a completion of the same prompt in the data.
      seed: sampling seed.
      repetitions: number of rankings of each completion, with independent samples. Each repetition ranks all
        completions, in the order of the conversations.

    Raises:
      UserError: there are fewer than `completions` suitable completions.
    """
    import grain

    true: dict[tuple[Message, ...], set[str]] = {}
    owners: dict[str, set[int]] = {}  # the conversations that have a completion
    turns = [(number, *turn) for number, conversation in enumerate(conversations) for turn in _turns(conversation)]
    turns *= repetitions
    for number, prompt, best, _ in turns:
        true.setdefault(prompt, set()).add(best)
        owners.setdefault(best, set()).add(number)
    pool = list(owners)
    seeds = np.random.Generator(np.random.Philox(np.random.SeedSequence(seed % 2**64))).integers(2**32, size=len(turns))
    rankings = []
    for (number, prompt, best, place), turn_seed in zip(turns, seeds.tolist(), strict=True):
        others: list[str] = []
        for i in range(len(pool)):  # a lazily computed permutation, as corpora have many completions
            if len(others) == completions:
                break
            other = pool[grain.experimental.index_shuffle(i, max_index=len(pool) - 1, seed=turn_seed, rounds=4)]
            if other not in true[prompt] and owners[other] != {number}:
                others.append(other)
        if len(others) < completions:
            raise UserError(
                f"{place}: the other conversations have fewer than chat.random_answers={completions} completions of "
                "other prompts: lower chat.random_answers"
            )
        rankings.append(Ranking(prompt, (best, *others), place, ordered=False))
    return rankings


def _turns(conversation: Conversation) -> Iterator[tuple[tuple[Message, ...], str, str]]:
    """Yields (prompt, completion, place) for each completion that is for the user; its analysis is in neither."""
    messages = conversation.messages
    for i, message in enumerate(messages):
        if message.is_final:
            begin = i
            while messages[begin - 1].role == "assistant" and not messages[begin - 1].is_call:
                begin -= 1
            yield messages[:begin], message.content, conversation.place


def _records(spec: str, invalid_utf8: InvalidUtf8, skip_damaged: bool) -> Iterator[tuple[Mapping[str, Any], str]]:
    """Yields the records of a source; those of Arrow tables without nulls, which are fields that a message lacks."""
    has_nulls = spec.startswith(("parquet:", "arrow:", "hf:"))
    for record, place in records.read_records(spec, invalid_utf8, skip_damaged):
        yield (_without_nulls(record) if has_nulls else record), place


def _without_nulls(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _without_nulls(part) for name, part in value.items() if part is not None}
    return [_without_nulls(part) for part in value] if isinstance(value, list) else value


# --- checks ---------------------------------------------------------------------------------------------------------


def check_order(messages: Sequence[Message], place: str) -> None:
    """Raises UserError unless user and assistant alternate, the user first, with a system message only before them."""
    if [message.role for message in messages] == ["document"]:
        return
    turns = messages[1:] if messages and messages[0].role == "system" else messages
    for i, message in enumerate(turns):
        wanted = ("user", "assistant")[i % 2]
        if message.role != wanted:
            number = i + len(messages) - len(turns)
            before = f"after one with role {messages[number - 1].role}" if number else "at the start"
            raise UserError(f"{place}: message {number} has role {message.role} {before}, where {wanted} is expected")


def _whole(messages: tuple[Message, ...], place: str) -> tuple[Message, ...]:
    """Checks `messages`, and removes a last user message without completion."""
    check_order(messages, place)
    messages = messages[:-1] if messages and messages[-1].role == "user" else messages
    if not any(message.role in ("assistant", "document") for message in messages):
        raise UserError(f"{place} has no completion by the assistant to train on: remove it")
    return messages


def _ranking(record: Mapping[str, Any], place: str) -> Ranking:
    prompt, texts = ranked_texts(record, place)
    check_order(prompt, place)
    if not prompt or prompt[-1].role != "user":
        raise UserError(f"{place}: the prompt does not end in a user's message, which the completions need")
    if len(texts) < 2 or len({text.strip() for text in texts}) < len(texts):
        raise UserError(f"{place} needs two completions or more, the best first, that differ in more than white space")
    return Ranking(prompt, texts, place)


# --- the packaged dialogues -------------------------------------------------------------------------------------------


def _language_folders(spec: str) -> list[Path]:
    package = require_package("chatterbot_corpus", "pip install --no-deps chatterbot-corpus==1.3.3", "chatterbot")
    data = Path(package, "data")
    known = sorted(path.name for path in data.iterdir() if path.is_dir() and any(path.glob("*.yml")))
    names = (spec.partition(":")[2] or "english").split("+")
    for name in names:
        if name not in known:
            raise UserError(f"{spec}: there is no language {name!r}: one of {', '.join(known)}")
    return [data / name for name in names]


def _chatterbot(spec: str) -> Iterator[Conversation]:
    """Yields conversations, lists of utterances that begin with a user's. Entries that are not lists are skipped."""
    import yaml

    for folder in _language_folders(spec):
        for path in sorted(folder.glob("*.yml")):
            # BaseLoader reads every scalar as text, so that "Yes" is not a boolean and "1,000" not a number.
            tree = yaml.load(path.read_text(encoding="utf-8"), Loader=yaml.BaseLoader)
            for number, turns in enumerate(tree["conversations"]):
                texts = [turn.strip() for turn in turns] if isinstance(turns, list) else []
                texts = texts[: len(texts) // 2 * 2]
                if texts and all(texts):
                    roles: tuple[Role, Role] = ("user", "assistant")
                    messages = tuple(Message(roles[i % 2], text) for i, text in enumerate(texts))
                    yield Conversation(messages, f"chatterbot {folder.name}/{path.name}, conversation {number}")
