"""A conversation with a model: what was said, and the next answer."""

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
    """The turns of a user and a model, of which the oldest are left out when the context is full.

    Args:
      chat_format: that the model was trained with.
      max_new_tokens: of an answer; the rest of the context is left for what was said before.
      seed: of the first answer; each further one has the next.
      documents: of which the model reads, before a question, as many of the best passages as fit; older turns give way
        to them. They stand in the user's turn, as the question is what they belong to, and only while it is the last:
        later answers need the room, and a system message would keep what was asked long ago.

    Attributes:
      system: what comes before all turns; None: nothing.
      turns: all that were taken, the oldest first.
      sources: the passages that the last answer was given from, best first.

    Raises:
      UserError: an answer would leave no room for a question.
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
        """The model's answer to a user's next message; both become turns.

        Args:
          on_text: called with each piece of the answer as soon as it is certain.

        Raises:
          UserError: the message is empty, or alone longer than the context has room for; then nothing is changed.
        """
        if not text.strip():
            raise UserError("an empty message has no answer: write something")
        asked = [*self.turns, Message("user", text)]
        answer = self._answer(asked, on_text)
        self.turns = [*asked, Message("assistant", answer)]
        return answer

    def regenerate(self, on_text: Callable[[str], None] = lambda _: None) -> str:
        """Another answer to the last message, instead of the one given; UserError: there is none."""
        if not self.turns:
            raise UserError("there is no answer yet to give another one for")
        answer = self._answer(self.turns[:-1], on_text)
        self.turns[-1] = Message("assistant", answer)
        return answer

    def save(self, path: Path) -> None:
        """Appends the conversation to a file, as a line that stage "sft" can read (OpenAI's messages form).

        A file whose last line has no end gets one. Permissions and symbolic links stay.

        Raises:
          UserError: nothing was said, an answer is empty, or the file cannot be written or is not plain UTF-8.
        """
        if not self.turns:
            raise UserError("there is nothing to save yet")
        if not all(turn.content.strip() for turn in self.turns):
            raise UserError("an answer is empty, which nothing can learn from: regenerate it, or reset")
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
        """Forgets all turns; the system message stays."""
        self.turns, self.sources = [], []

    def _all(self, turns: list[Message]) -> list[Message]:
        return turns if self.system is None else [Message("system", self.system), *turns]

    def _answer(self, asked: list[Message], on_text: Callable[[str], None]) -> str:
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
        """What of the documents fits before the question, if no other turn has to."""
        kept: list[Passage] = []
        for passage in [] if self._documents is None else self._documents.find(question):
            try:
                message = Message("user", with_passages(question, [*kept, passage]))
                self._format.encode_prompt(self._all([message]), room)
            except TooLongError:
                continue
            kept.append(passage)
        return kept
