"""A chat session: the turns so far, and generation of the next completion."""

import json
import os
from collections.abc import Callable
from pathlib import Path

from gptjax.config import UserError
from gptjax.data.compression import compression
from gptjax.data.conversations import Message
from gptjax.data.templates import ChatFormat, TooLongError
from gptjax.data.text_files import Utf8, opened_text
from gptjax.files import write_whole
from gptjax.inference.engine import Engine
from gptjax.inference.retrieval import Documents, Passage, with_passages
from gptjax.inference.sampling import Sampling


class ChatSession:
    """A conversation of a user and a model; the oldest turns are dropped from the prompt when the context is full.

    Args:
      chat_format: chat format that the model was trained with.
      max_new_tokens: maximum length of a completion in tokens; the rest of the context is for the prompt.
      seed: sampling seed of the first completion, incremented for each further one.
      documents: source of passages to retrieve for each question. As many of the best passages as fit are inserted
        before the question, and older turns are dropped for them. They are part of the user's turn only while it is the
        last one: later completions need the room.

    Attributes:
      system: system message before all turns; None: no system message.
      turns: all turns, the oldest first.
      sources: passages that the last completion was based on, best first.

    Raises:
      UserError: `max_new_tokens` leaves no room for a prompt.
    """

    def __init__(
        self,
        engine: Engine,
        chat_format: ChatFormat,
        sampling: Sampling,
        *,
        system: str | None = None,
        max_new_tokens: int = 256,
        seed: int = 0,
        documents: Documents | None = None,
    ) -> None:
        context = engine.model.config.context_length
        if max_new_tokens >= context:
            raise UserError(f"max_new_tokens={max_new_tokens} leaves no room in a context of {context}: lower it")
        self._engine, self._format, self._sampling = engine, chat_format, sampling
        self._max_new_tokens, self._seed, self._documents = max_new_tokens, seed, documents
        self.system = system
        self.turns: list[Message] = []
        self.sources: list[Passage] = []

    def reply(self, text: str, on_text: Callable[[str], None] = lambda _: None) -> str:
        """Generates the completion of a user's next message; both are appended to the turns.

        Args:
          on_text: called with each piece of the completion as soon as it is final.

        Raises:
          UserError: the message is empty, or does not fit into the context on its own; the turns are then unchanged.
        """
        if not text.strip():
            raise UserError("the message is empty: write some text")
        asked = [*self.turns, Message("user", text)]
        completion = self._complete(asked, on_text)
        self.turns = [*asked, Message("assistant", completion)]
        return completion

    def regenerate(self, on_text: Callable[[str], None] = lambda _: None) -> str:
        """Replaces the last completion by another one; UserError if there is none yet."""
        if not self.turns:
            raise UserError("there is no completion to regenerate yet: send a message first")
        completion = self._complete(self.turns[:-1], on_text)
        self.turns[-1] = Message("assistant", completion)
        return completion

    def save(self, path: Path) -> None:
        """Appends the conversation to a file, as a line that stage "sft" can read (OpenAI's messages format).

        A missing newline at the end of the file is added. Permissions and symbolic links are preserved.

        Raises:
          UserError: there are no turns, a completion is empty, or the file cannot be written or is not plain UTF-8.
        """
        if not self.turns:
            raise UserError("there is nothing to save yet: send a message first")
        if not all(turn.content.strip() for turn in self.turns):
            raise UserError("a completion is empty, so the conversation cannot be trained on: regenerate it, or reset")
        line = json.dumps({"messages": [vars(message) for message in self._all(self.turns)]}, ensure_ascii=False)
        if compression(path) is not None:
            raise UserError(f"cannot append to {path}, which is {compression(path)} by its name: name another file")
        try:
            path = Path(os.path.realpath(path))
            before = ""
            if path.exists():
                with opened_text(path) as text:
                    if not text.encoding.startswith("utf-8"):
                        raise UserError(f"cannot append UTF-8 to {path}, which is {text.encoding}: name another file")
                before = Utf8().decode(path.read_bytes(), path)
            end = "" if not before or before.endswith("\n") else "\n"
            write_whole(path, before + end + line + "\n")
        except OSError as error:
            raise UserError(f"cannot write {path}: {error}") from None

    def reset(self) -> None:
        """Deletes all turns; the system message is kept."""
        self.turns, self.sources = [], []

    def _all(self, turns: list[Message]) -> list[Message]:
        return turns if self.system is None else [Message("system", self.system), *turns]

    def _complete(self, asked: list[Message], on_text: Callable[[str], None]) -> str:
        room = self._engine.model.config.context_length - self._max_new_tokens
        sources = self._passages(asked[-1].content, room)
        read = [*asked[:-1], Message("user", with_passages(asked[-1].content, sources))]
        completion = self._engine.generate(
            [self._format.encode_prompt(self._all(read), room)],
            self._max_new_tokens,
            self._sampling,
            seeds=self._seed,
            end_tokens=(self._format.end_of_turn,),
            separate_text=True,
            on_text=lambda _, piece: on_text(piece),
        )[0]
        self._seed += 1
        self.sources = sources
        return completion.text

    def _passages(self, question: str, room: int) -> list[Passage]:
        """Returns the retrieved passages that fit before the question when all other turns are dropped."""
        kept: list[Passage] = []
        for passage in [] if self._documents is None else self._documents.find(question):
            try:
                message = Message("user", with_passages(question, [*kept, passage]))
                self._format.encode_prompt(self._all([message]), room)
            except TooLongError:
                continue
            kept.append(passage)
        return kept
