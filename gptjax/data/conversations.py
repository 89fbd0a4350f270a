"""Conversations and rankings of answers: of JSON lines, tensorflow-datasets, or the dialogues that a package carries.

Whatever is wrong with a conversation is one line that says in which line of which file it is.
"""

import dataclasses
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, TypeVar, get_args

import grain
import numpy as np

from gptjax.config import UserError
from gptjax.data import records
from gptjax.data.preparation import split_documents
from gptjax.data.sources import InvalidUtf8, require_package

Role = Literal["system", "user", "assistant"]
_SHAREGPT_ROLES = {"human": "user", "gpt": "assistant", "chatgpt": "assistant", "bot": "assistant"}
_FORMS = "jsonl:GLOB, tfds:NAME[@SPLIT], chatterbot[:LANGUAGE+LANGUAGE]"


@dataclasses.dataclass(frozen=True)
class Message:
    role: Role
    content: str


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
      spec: one of the following; files may be .gz or .zst.
        jsonl:GLOB — each line a JSON object: OpenAI's {"messages": [{"role": ..., "content": ...}, ...]}, or ShareGPT's
          {"conversations": [{"from": "human", "value": ...}, {"from": "gpt", "value": ...}, ...]};
        tfds:NAME[@SPLIT] — a tensorflow-datasets dataset with such a feature;
        chatterbot[:LANGUAGE+LANGUAGE] — dialogues of the PyPI package chatterbot-corpus, English if not said otherwise;
          each once.
      invalid_utf8: "replace" puts U+FFFD for bytes that are not UTF-8, and warns; "error" raises.

    Raises:
      UserError: in one line, with the file's name and the line's number: an unknown role, two turns of one side in a
        row, a message that is empty, no answer at all; or there are no conversations, or the source cannot be had.
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
        found = [Conversation(_whole(_messages(record, place), place), place) for record, place in records_]
    if not found:
        raise UserError(f"{spec} has no conversations")
    return found


def read_rankings(spec: str, *, invalid_utf8: InvalidUtf8 = "error") -> list[Ranking]:
    """All rankings of a source, in its order.

    Args:
      spec: jsonl:GLOB or tfds:NAME[@SPLIT]. A record has its prompt as `messages` (or `prompt`, a user's message), and
        its answers as `ranking`, a list with the best first, or as `chosen` and `rejected`. These may also be whole
        conversations, lists of messages that differ in the last alone; then there is no other prompt.
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
      spec, invalid_utf8: as of `read_conversations`. A line may also have `prompt`, a user's message, alone.

    Raises:
      UserError: as of `read_conversations`.
    """
    check_spec(spec)
    if spec.partition(":")[0] == "chatterbot":
        return prompts(read_conversations(spec))
    found: list[Prompt] = []
    for record, place in records.read_records(spec, invalid_utf8):
        if isinstance(asked := record.get("prompt"), str):
            messages: tuple[Message, ...] = (Message("user", _content(asked, f"{place}: prompt")),)
        else:
            messages = _messages(record, place)
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


# --- from records to conversations ------------------------------------------------------------------------------------


def _messages(record: Mapping[str, Any], place: str) -> tuple[Message, ...]:
    """The messages of a record in one of the two forms."""
    if "messages" in record:
        return _of_list(record["messages"], place, "role", "content", "messages")
    if "conversations" in record:
        return _of_list(record["conversations"], place, "from", "value", "conversations")
    raise UserError(f"{place} has neither messages nor conversations: it has {', '.join(record) or 'nothing'}")


def _of_list(turns: Any, place: str, role_key: str, content_key: str, name: str) -> tuple[Message, ...]:
    if isinstance(turns, Mapping):  # as tensorflow-datasets has a sequence of features: a list of each
        try:
            columns = zip(turns[role_key], turns[content_key], strict=True)
        except (KeyError, TypeError, ValueError):
            raise UserError(f"{place}: {name} does not have lists of {role_key} and {content_key}") from None
        turns = [{role_key: role, content_key: content} for role, content in columns]
    if not isinstance(turns, list):
        raise UserError(f"{place}: {name} is not a list but {str(turns)[:40]!r}")
    return tuple(_message(turn, f"{place}: {name}[{i}]", role_key, content_key) for i, turn in enumerate(turns))


def _message(turn: Any, place: str, role_key: str, content_key: str) -> Message:
    if not isinstance(turn, Mapping) or not {role_key, content_key} <= set(turn):
        raise UserError(f"{place} is not an object with {role_key} and {content_key}")
    role = turn[role_key]
    if role_key == "from":
        role = _SHAREGPT_ROLES.get(role, role) if isinstance(role, str) else role
    if role not in get_args(Role):
        known = ", ".join((*get_args(Role), *(_SHAREGPT_ROLES if role_key == "from" else ())))
        raise UserError(f"{place} has the unknown {role_key} {str(turn[role_key])[:40]!r}: one of {known}")
    return Message(role, _content(turn[content_key], place))


def _content(value: Any, place: str) -> str:
    if not isinstance(value, str):
        raise UserError(f"{place}: the content is not a text but {str(value)[:40]!r}")
    if not value or value.isspace():
        raise UserError(f"{place}: the content is empty: remove the conversation, or write what was said")
    return re.sub("[\ud800-\udfff]", "\ufffd", value)  # halves of characters, which JSON may hold and UTF-8 cannot


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
    answers = [record[name] for name in ("chosen", "rejected") if name in record]
    if "ranking" in record:
        answers = record["ranking"]
        if not isinstance(answers, list):
            raise UserError(f"{place}: ranking is not a list of answers but {str(answers)[:40]!r}")
    elif len(answers) < 2:
        raise UserError(f"{place} has neither a ranking nor both chosen and rejected: it has {', '.join(record)}")
    if answers and all(isinstance(answer, list) for answer in answers):
        whole = [_of_list(answer, place, "role", "content", "an answer") for answer in answers]
        prompts = {messages[:-1] for messages in whole}
        if len(prompts) > 1 or any(not messages or messages[-1].role != "assistant" for messages in whole):
            raise UserError(f"{place}: the answers are not conversations that differ in the last answer alone")
        prompt, texts = prompts.pop(), [messages[-1].content for messages in whole]
    else:
        texts = [_content(answer, f"{place}: answer {i}") for i, answer in enumerate(answers)]
        if isinstance(asked := record.get("prompt"), str):
            prompt = (Message("user", _content(asked, f"{place}: prompt")),)
        else:
            prompt = _messages(record if asked is None else {"messages": asked}, place)
    check_order(prompt, place)
    if not prompt or prompt[-1].role != "user":
        raise UserError(f"{place}: the prompt does not end in a user's message, which the answers are to")
    if len(texts) < 2 or len(set(texts)) < len(texts):
        raise UserError(f"{place} needs two answers or more, all different, the best first")
    return Ranking(prompt, tuple(texts), place)


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
