"""A chat session: the turns so far, and generation of the next completion."""

import dataclasses
import json
import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import numpy.typing as npt

from gptjax.config import UserError
from gptjax.data import harmony_forms
from gptjax.data.compression import compression
from gptjax.data.conversations import Message, RequestOptions
from gptjax.data.harmony import HarmonyFormat, final_text
from gptjax.data.images.image_files import ImageFiles
from gptjax.data.images.image_references import IMAGE, WHOLE_VIDEO, ImageReference
from gptjax.data.templates import ChatFormat, EncodedConversation, TooLongError
from gptjax.data.text_files import Utf8, opened_text
from gptjax.files import followed, write_whole
from gptjax.inference import harmony_chat
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
      options: tools and reasoning effort, for the harmony format.
      images: reads the images that `attach` names; None: the model reads none.
      analysis: whether the channel analysis of the harmony format is shown: "hide", "show" or "dim".

    Attributes:
      system: system message before all turns; None: no system message.
      turns: all turns, the oldest first; with the harmony format the messages of all channels.
      sources: passages that the last completion was based on, best first.

    Raises:
      UserError: `max_new_tokens` leaves no room for a prompt, or there are options for a format without them.
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
        options: RequestOptions | None = None,
        analysis: str = "hide",
        images: ImageFiles | None = None,
    ) -> None:
        context = engine.model.config.context_length
        if max_new_tokens >= context:
            raise UserError(f"max_new_tokens={max_new_tokens} leaves no room in a context of {context}: lower it")
        if options is not None and not isinstance(chat_format, HarmonyFormat):
            raise UserError("tools and reasoning effort need a model of chat.template=harmony: leave them out")
        self._engine, self._format, self._sampling = engine, chat_format, sampling
        self._options, self._analysis = options, analysis
        self._max_new_tokens, self._seed, self._documents = max_new_tokens, seed, documents
        self._images, self._attached = images, list[ImageReference]()
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
        images = tuple(self._attached)
        if images and IMAGE not in text:
            text = IMAGE * len(images) + f"\n{text}"
        reply = self._continue([*self.turns, Message("user", text, images=images)], on_text)
        self._attached.clear()
        return reply

    def attach(self, source: str, is_video: bool = False) -> None:
        """Adds an image to the next message, which has it where its text says `<image>`, or else before the text.

        Args:
          source: path, data: URL, or digits:NUMBER.
          is_video: it is a video, which the model reads as data.video_frames images.

        Raises:
          UserError: the model reads no images, or the image or video cannot be read.
        """
        if self._images is None:
            raise UserError("this model reads text alone: train one with model.vision.encoder")
        path = source if ":" in source else os.path.abspath(os.path.expanduser(source))
        reference = ImageReference(path, frame=WHOLE_VIDEO if is_video else None)
        self._images.check([reference])
        self._images.read_all(self._images.with_frames(IMAGE, [reference])[1])
        self._attached.append(reference)

    def regenerate(self, on_text: Callable[[str], None] = lambda _: None) -> str:
        """Replaces the last completion by another one; UserError if there is none yet."""
        if not self.turns:
            raise UserError("there is no completion to regenerate yet: send a message first")
        asked = max(i for i, turn in enumerate(self.turns) if turn.role != "assistant")
        return self._continue(self.turns[: asked + 1], on_text)

    @property
    def call(self) -> Message | None:
        """The call that the last completion ends in, whose result is expected; None: it ends otherwise."""
        return self.turns[-1] if self.turns and self.turns[-1].is_call else None

    def answer_call(self, result: str, on_text: Callable[[str], None] = lambda _: None) -> str:
        """Generates the completion after a tool's result; UserError if the last completion does not end in a call."""
        if self.call is None:
            raise UserError("the last completion does not call a tool: send a message")
        message = Message("tool", result, self.call.channel or "commentary", "assistant", name=self.call.recipient)
        return self._continue([*self.turns, message], on_text)

    def save(self, path: Path) -> None:
        """Appends the conversation to a file, as a line that stage "sft" can read (OpenAI's messages format).

        A missing newline at the end of the file is added. Permissions and symbolic links are preserved.

        Raises:
          UserError: there are no turns, a completion is empty, or the file cannot be written or is not plain UTF-8.
        """
        if not self.turns:
            raise UserError("there is nothing to save yet: send a message first")
        if not all(turn.content.strip() for turn in self.turns if turn.role != "tool"):
            raise UserError("a completion is empty, so the conversation cannot be trained on: regenerate it, or reset")
        if isinstance(self._format, HarmonyFormat):
            harmony_forms.without_unanswered(tuple(self.turns), "the conversation")
            harmony_forms.check_turns(self.turns, "the conversation")
        line = json.dumps(harmony_forms.written(self._all(self.turns)), ensure_ascii=False)
        if compression(path) is not None:
            raise UserError(f"cannot append to {path}, which is {compression(path)} by its name: name another file")
        try:
            path = followed(path)
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
        self._attached.clear()

    def _all(self, turns: list[Message]) -> list[Message]:
        found = turns if self.system is None else [Message("system", self.system), *turns]
        return list(harmony_forms.with_options(found, self._options))

    def _continue(self, asked: list[Message], on_text: Callable[[str], None]) -> str:
        """Generates the completion of `asked`; both become the turns."""
        written = self._completion(asked, on_text)
        self.turns = [*asked, *written]
        return final_text(written)

    def _completion(self, asked: list[Message], on_text: Callable[[str], None]) -> list[Message]:
        room = self._engine.model.config.context_length - self._max_new_tokens
        last = max(i for i, message in enumerate(asked) if message.role == "user")
        sources = self._passages(asked[last], room)
        question = dataclasses.replace(asked[last], content=with_passages(asked[last].content, sources))
        encoded = self._encoded([*asked[:last], question, *asked[last + 1 :]], room)
        prompt = encoded.tokens
        if isinstance(self._format, HarmonyFormat):
            written = harmony_chat.generate(
                self._engine,
                self._format,
                prompt,
                self._max_new_tokens,
                self._sampling,
                seed=self._seed,
                analysis=self._analysis,
                on_text=on_text,
            )
        else:
            completion = self._engine.generate(
                [prompt],
                self._max_new_tokens,
                self._sampling,
                seeds=self._seed,
                end_tokens=self._format.end_tokens,
                separate_text=True,
                on_text=lambda _, piece: on_text(piece),
                images=[self._read(encoded.images)] if encoded.images else None,
            )[0]
            written = [Message("assistant", completion.text)]
        self._seed += 1
        self.sources = sources
        return written

    def _encoded(self, turns: list[Message], room: int) -> EncodedConversation:
        """Encodes turns and the system message as a prompt of at most `room` tokens, with the frames of videos."""
        messages = self._all(turns)
        if self._images is not None:
            messages = [self._images.divided(message) for message in messages]
        return self._format.encode_prompt_with_images(messages, room)

    def _read(self, images: tuple[ImageReference, ...]) -> list[npt.NDArray[np.uint8]]:
        assert self._images is not None, "attach refuses images that the model does not read"
        return self._images.read_all(images)

    def _passages(self, question: Message, room: int) -> list[Passage]:
        """Returns the retrieved passages that fit before the question when all other turns are dropped."""
        kept: list[Passage] = []
        for passage in [] if self._documents is None else self._documents.find(question.content):
            try:
                message = dataclasses.replace(question, content=with_passages(question.content, [*kept, passage]))
                self._encoded([message], room)
            except TooLongError:
                continue
            kept.append(passage)
        return kept
