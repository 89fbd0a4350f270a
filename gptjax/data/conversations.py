"""Conversations and rankings of answers: of JSON lines, tensorflow-datasets, or the dialogues that a package carries.

Whatever is wrong with a conversation is one line that says in which line of which file it is.
"""

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from gptjax.config import UserError
from gptjax.data import records
from gptjax.data.conversation_forms import Message, Role, conversation_messages, prompt_messages, ranked_answers
from gptjax.data.packages import require_package
from gptjax.data.preparation import split_documents
from gptjax.data.text_files import InvalidUtf8

__all__ = [
    "Conversation",
    "Message",
    "Prompt",
    "Ranking",
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

_FORMS = "jsonl:GLOB, tfds:NAME[@SPLIT], chatterbot[:LANGUAGE+LANGUAGE]"


@dataclasses.dataclass(frozen=True)
class Conversation:
    """Turns of a user and an assistant, one after the other, perhaps behind a system message.

    Attributes:
      place: where it is from, for messages: "chats.jsonl:17".
    """

    messages: tuple[Message, ...]
    place: str

    @property
    def prompt(self) -> tuple[Message, ...]:
        """What comes before the first answer."""
        first = next(i for i, message in enumerate(self.messages) if message.role == "assistant")
        return self.messages[:first]


@dataclasses.dataclass(frozen=True)
class Ranking:
    """Answers to one prompt, best first, two or more.

    Attributes:
      prompt: ends in a user's message.
      ordered: false: the first answer is better than the others, of which none is known to be better than another.
    """

    prompt: tuple[Message, ...]
    answers: tuple[str, ...]
    place: str
    ordered: bool = True

    @property
    def levels(self) -> tuple[int, ...]:
        """Of each answer, 1 the best; of equal ones neither is better."""
        return tuple(i + 1 if self.ordered else min(i + 1, 2) for i in range(len(self.answers)))


@dataclasses.dataclass(frozen=True)
class Prompt:
    """What an assistant is to answer.

    Attributes:
      messages: the last a user's.
      reference: the answer that is there; None: there is none.
    """

    messages: tuple[Message, ...]
    reference: str | None
    place: str


T = TypeVar("T", Conversation, Ranking, Prompt)


def check_spec(spec: str) -> None:
    """Raises UserError when `spec` is of no known form, or what it names is not there; no file is read."""
    scheme = spec.partition(":")[0]
    if scheme == "chatterbot":
        _language_folders(spec)
    elif scheme in ("jsonl", "tfds"):
        records.check_spec(spec)
    else:
        raise UserError(f"unknown source {spec!r} of conversations: known are {_FORMS}")


def read_conversations(spec: str, *, invalid_utf8: InvalidUtf8 = "error") -> list[Conversation]:
    """All conversations of a source, in its order.

    Args:
      spec: one of the following; GLOB and the files' encodings are as of `sources.open_source`.
        jsonl:GLOB — each line a JSON object: OpenAI's {"messages": [{"role": ..., "content": ...}, ...]}, ShareGPT's
          {"conversations": [{"from": "human", "value": ...}, {"from": "gpt", "value": ...}, ...]}, Alpaca's
          {"instruction": ..., "input": ..., "output": ...}, or TRL's {"prompt": ..., "completion": ...}, both texts or
          lists of messages. A field `system` or `system_prompt` is the system message. The content may be a list of
          parts {"type": "text", "text": ...}. The role developer is read as system;
        tfds:NAME[@SPLIT] — a tensorflow-datasets dataset with such a feature;
        chatterbot[:LANGUAGE+LANGUAGE] — dialogues of the PyPI package chatterbot-corpus, English if not said otherwise;
          each once.
      invalid_utf8: "replace" puts U+FFFD for bytes that are not UTF-8, and warns; "error" raises.

    Raises:
      UserError: in one line, with the file's name and the line's number: an unknown role, calls of tools, two turns of
        one side in a row, a message that is empty or not text, no answer at all; or there are no conversations, or the
        source cannot be read.
    """
    check_spec(spec)
    if spec.partition(":")[0] == "chatterbot":
        # Half of them are there several times: copies would be held out of what has been trained on.
        once: dict[tuple[Message, ...], Conversation] = {}
        for conversation in _chatterbot(spec):
            once.setdefault(conversation.messages, conversation)
        found = list(once.values())
    else:
        records_ = records.read_records(spec, invalid_utf8)
        found = [Conversation(_whole(conversation_messages(record, place), place), place) for record, place in records_]
    if not found:
        raise UserError(f"{spec} has no conversations")
    return found


def read_rankings(spec: str, *, invalid_utf8: InvalidUtf8 = "error") -> list[Ranking]:
    """All rankings of a source, in its order.

    Args:
      spec: jsonl:GLOB or tfds:NAME[@SPLIT]. A record has its prompt as `messages` or `prompt`, a list of messages or a
        user's message, perhaps with `system`, and its answers as `ranking`, a list with the best first, or as `chosen`
        and `rejected`. An answer is a text, a list of the assistant's message (TRL), or a whole conversation, a list
        of messages (UltraFeedback) or a dialogue "\\n\\nHuman: ...\\n\\nAssistant: ..." (Anthropic's HH); these differ
        in the last message alone, and need no other prompt.
      invalid_utf8: as of `read_conversations`.

    Raises:
      UserError: as of `read_conversations`; less than two answers, or two that are the same.
    """
    check_spec(spec)
    if spec.partition(":")[0] == "chatterbot":
        raise UserError(f"{spec} has conversations and no rankings: set chat.random_answers to make some of them")
    found = [_ranking(record, place) for record, place in records.read_records(spec, invalid_utf8)]
    if not found:
        raise UserError(f"{spec} has no rankings")
    return found


def read_prompts(spec: str, *, invalid_utf8: InvalidUtf8 = "error") -> list[Prompt]:
    """What a source gives an assistant to answer: what comes before each of its turns, and a last question without one.

    Args:
      spec, invalid_utf8: as of `read_conversations`. A line may also have `prompt`, a user's message or a list of
        messages, alone.

    Raises:
      UserError: as of `read_conversations`.
    """
    check_spec(spec)
    if spec.partition(":")[0] == "chatterbot":
        return prompts(read_conversations(spec))
    found: list[Prompt] = []
    for record, place in records.read_records(spec, invalid_utf8):
        messages = prompt_messages(record, place)
        check_order(messages, place)
        found += prompts([Conversation(messages, place)])
        if messages and messages[-1].role == "user":
            found.append(Prompt(messages, None, place))
    if not found:
        raise UserError(f"{spec} has no prompts")
    return found


def hold_out(items: Sequence[T], fraction: float) -> tuple[list[T], list[T]]:
    """Train and validation: every k-th first question is held out, with all that begins with it.

    Raises:
      UserError: there is only one first question.
    """
    asked = [_first_question(item) for item in items]
    questions = dict.fromkeys(asked)
    if len(questions) < 2:
        raise UserError(f"{items[0].place} has the only question: none can be held out, set data.validation_source")
    names = [name for name, _ in split_documents(map(str, range(len(questions))), fraction)]
    side = dict(zip(questions, names, strict=True))
    sides = list(zip(items, (side[question] for question in asked), strict=True))
    train, validation = ([item for item, name in sides if name == wanted] for wanted in ("train", "validation"))
    return train, validation


def _first_question(item: Conversation | Ranking | Prompt) -> str:
    messages = item.prompt if isinstance(item, Ranking) else item.messages
    return next(message.content for message in messages if message.role == "user")


def prompts(conversations: Sequence[Conversation]) -> list[Prompt]:
    """What comes before each of the assistant's turns, which is its reference."""
    return [Prompt(*turn) for conversation in conversations for turn in _turns(conversation)]


def random_rankings(conversations: Sequence[Conversation], answers: int, seed: int, draws: int = 1) -> list[Ranking]:
    """Every answer of the conversations, ranked above others drawn from all of them.

    Args:
      answers: how many others, all different, of other conversations; none is a true answer to the same prompt.
      draws: how often; each has all answers of the conversations, in their order, with others drawn anew.

    Raises:
      UserError: there are not so many others.
    """
    import grain

    true: dict[tuple[Message, ...], set[str]] = {}
    owners: dict[str, set[int]] = {}  # which conversations have an answer
    turns = [(number, *turn) for number, conversation in enumerate(conversations) for turn in _turns(conversation)]
    turns *= draws
    for number, prompt, answer, _ in turns:
        true.setdefault(prompt, set()).add(answer)
        owners.setdefault(answer, set()).add(number)
    pool = list(owners)
    seeds = np.random.Generator(np.random.Philox(np.random.SeedSequence(seed % 2**64))).integers(2**32, size=len(turns))
    rankings = []
    for (number, prompt, answer, place), turn_seed in zip(turns, seeds.tolist(), strict=True):
        others: list[str] = []
        for i in range(len(pool)):  # a permutation, made only as far as it is read: corpora have many answers
            if len(others) == answers:
                break
            other = pool[grain.experimental.index_shuffle(i, max_index=len(pool) - 1, seed=turn_seed, rounds=4)]
            if other not in true[prompt] and owners[other] != {number}:
                others.append(other)
        if len(others) < answers:
            raise UserError(
                f"{place} has fewer than chat.random_answers={answers} answers of other conversations to other "
                "prompts: lower it"
            )
        rankings.append(Ranking(prompt, (answer, *others), place, ordered=False))
    return rankings


def _turns(conversation: Conversation) -> Iterator[tuple[tuple[Message, ...], str, str]]:
    """What comes before each answer, the answer, and where it is from."""
    for i, message in enumerate(conversation.messages):
        if message.role == "assistant":
            yield conversation.messages[:i], message.content, conversation.place


# --- checks ---------------------------------------------------------------------------------------------------------


def check_order(messages: Sequence[Message], place: str) -> None:
    """Raises UserError unless user and assistant take turns, the user first, a system message only before them."""
    turns = messages[1:] if messages and messages[0].role == "system" else messages
    for i, message in enumerate(turns):
        wanted = ("user", "assistant")[i % 2]
        if message.role != wanted:
            number = i + len(messages) - len(turns)
            before = f"behind one of role {messages[number - 1].role}" if number else "at the start"
            raise UserError(
                f"{place}: message {number} is of role {message.role} {before}, where it is {wanted}'s turn"
            )


def _whole(messages: tuple[Message, ...], place: str) -> tuple[Message, ...]:
    """`messages`, checked, without a last question that has no answer."""
    check_order(messages, place)
    if messages and messages[-1].role == "user":
        messages = messages[:-1]
    if not any(message.role == "assistant" for message in messages):
        raise UserError(f"{place} has no answer of the assistant to learn from: remove it")
    return messages


def _ranking(record: Mapping[str, Any], place: str) -> Ranking:
    prompt, texts = ranked_answers(record, place)
    check_order(prompt, place)
    if not prompt or prompt[-1].role != "user":
        raise UserError(f"{place}: the prompt does not end in a user's message, which the answers are to")
    if len(texts) < 2 or len({text.strip() for text in texts}) < len(texts):
        raise UserError(f"{place} needs two answers or more, all different by more than blanks, the best first")
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
    """A conversation is a list of utterances, the first of them a user's. A few that are no list are left out."""
    import yaml

    for folder in _language_folders(spec):
        for path in sorted(folder.glob("*.yml")):
            # It makes no values but text, so that "Yes" is no truth value and "1,000" no number.
            tree = yaml.load(path.read_text(encoding="utf-8"), Loader=yaml.BaseLoader)
            for number, turns in enumerate(tree["conversations"]):
                texts = [turn.strip() for turn in turns] if isinstance(turns, list) else []
                texts = texts[: len(texts) // 2 * 2]
                if texts and all(texts):
                    roles: tuple[Role, Role] = ("user", "assistant")
                    messages = tuple(Message(roles[i % 2], text) for i, text in enumerate(texts))
                    yield Conversation(messages, f"chatterbot {folder.name}/{path.name}, conversation {number}")
