"""The models of a server: what a request's `model` names, and what is needed to prepare and read its completions."""

import dataclasses
import time
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from gptjax.config import Config, UserError
from gptjax.data.harmony import SPECIAL_TOKENS, HarmonyFormat
from gptjax.data.images.image_files import ImageFiles
from gptjax.data.images.image_references import ImageReference
from gptjax.data.infilling import InfillingFormat
from gptjax.data.labelled import Row
from gptjax.data.templates import ChatFormat
from gptjax.data.token_bytes import token_bytes
from gptjax.data.tokenizers import Tokenizer
from gptjax.serving.api_errors import ApiError
from gptjax.serving.completion_readers import CallTextReader, CompletionReader, HarmonyReader, TextReader
from gptjax.serving.constraints import GrammarCompiler, GrammarConstraint
from gptjax.serving.grammars import Structure, Tools, harmony_grammar, text_grammar


class GenerativeModel:
    """A model that generates text: the base model, or it with an adapter.

    Args:
      name: what requests call it.
      form: chat format; None: the model has no chat format, and serves completions only.
      infills: whether it is trained to fill in the middle.
      conversational: whether it is meant for conversations; otherwise the chat page shows text that it continues.
      adapter: name of the LoRA adapter in the engine; None: the base model.
      images: decodes the images of conversations; None: the model reads text alone.
    """

    def __init__(
        self,
        name: str,
        tokenizer: Tokenizer,
        *,
        vocab_size: int,
        context_length: int,
        form: ChatFormat | None = None,
        infills: bool = False,
        conversational: bool = True,
        adapter: str | None = None,
        images: ImageFiles | None = None,
    ) -> None:
        self.name, self.tokenizer, self.adapter, self._images = name, tokenizer, adapter, images
        self.vocab_size, self.context_length = vocab_size, context_length
        self.form, self.conversational = form, conversational
        self.infilling = InfillingFormat(tokenizer) if infills else None
        self.text_ends = tokenizer.ends
        self.chat_ends = () if form is None else tuple(dict.fromkeys([*form.end_tokens, *tokenizer.ends]))
        self.pieces = token_bytes(tokenizer)
        self.created = int(time.time())
        specials = [*self.chat_ends, *self.text_ends]
        if isinstance(form, HarmonyFormat):
            specials += self._harmony_ids.values()
        self.compiler = GrammarCompiler(tokenizer, vocab_size, list(dict.fromkeys(specials)))

    @property
    def chat_form(self) -> ChatFormat:
        """The chat format; ApiError 400 where the model has none."""
        if self.form is None:
            raise ApiError(400, f"the model {self.name!r} has no chat format: use /v1/completions", param="model")
        return self.form

    def read_images(self, references: Sequence[ImageReference]) -> tuple[npt.NDArray[np.uint8], ...]:
        """Decodes images, uint8 (X,) each, as the model reads them; UserError for one that cannot be decoded."""
        if not references:
            return ()
        assert self._images is not None, "`conversation` refuses images that the model does not read"
        return tuple(self._images.read_all(references))

    @property
    def _harmony_ids(self) -> dict[str, int]:
        assert isinstance(self.form, HarmonyFormat)
        return {name: self.form.id_of(name) for name in SPECIAL_TOKENS}

    def piece(self, token: int) -> bytes:
        """Returns the bytes of a token; empty for special tokens."""
        return self.pieces[token] if token < len(self.pieces) else b""

    def chat_reader(self, stop: Sequence[str], tools: Tools | None) -> CompletionReader:
        """Returns a reader of a chat completion."""
        if isinstance(self.form, HarmonyFormat):
            return HarmonyReader(self.form, self.tokenizer, stop)
        return TextReader(self.tokenizer, stop) if tools is None else CallTextReader(self.tokenizer, stop)

    def text_constraint(self, structure: Structure | None, param: str) -> GrammarConstraint | None:
        """Returns the constraint of a completion that is text."""
        if structure is None:
            return None
        return self.compiler.constraint(text_grammar(structure, None), self.text_ends, param)

    def chat_constraint(self, structure: Structure | None, tools: Tools | None, param: str) -> GrammarConstraint | None:
        """Returns the constraint of a chat completion; None: any tokens may follow.

        A model of the harmony format is trained to choose between calls and messages, and its calls are constrained
        only if they are required.
        """
        if not isinstance(self.form, HarmonyFormat):
            if structure is None and tools is None:
                return None
            return self.compiler.constraint(text_grammar(structure, tools), self.chat_ends, param)
        required = tools is not None and tools.required
        if structure is None and not required:
            return None
        ids = self._harmony_ids
        called, final = ids["<|call|>"], ids["<|return|>"]
        ends = [called] if required else [final] if tools is None else [final, called]
        return self.compiler.constraint(harmony_grammar(ids, structure, tools), ends, param)

    def card(self) -> dict[str, Any]:
        """Returns the model as /v1/models lists it."""
        parent = {} if self.adapter is None else {"parent": "base"}
        sizes = {"max_model_len": self.context_length, "conversational": self.conversational}
        return {**_card(self.name, self.created), **sizes, "images": self._images is not None, **parent}


@dataclasses.dataclass(frozen=True)
class ClassificationModel:
    """A fine-tuned model with the head of a task.

    Attributes:
      predict: maps rows to predictions; runs in the engine's thread.
    """

    name: str
    config: Config
    predict: Callable[[Sequence[Row]], Any]
    created: int = dataclasses.field(default_factory=lambda: int(time.time()))

    def card(self) -> dict[str, Any]:
        """Returns the model as /v1/models lists it."""
        return {**_card(self.name, self.created), "task": self.config.task.kind}


def _card(name: str, created: int) -> dict[str, Any]:
    return {"id": name, "object": "model", "created": created, "owned_by": "gptjax"}


class ServedModels:
    """All models of a server, by name.

    Raises:
      UserError: two have one name.
    """

    def __init__(self, models: Iterable[GenerativeModel | ClassificationModel]) -> None:
        self._models: dict[str, GenerativeModel | ClassificationModel] = {}
        for model in models:
            if model.name in self._models:
                raise UserError(f"two served models are called {model.name!r}: name one of them differently")
            self._models[model.name] = model

    def find(self, name: str) -> GenerativeModel | ClassificationModel:
        """Returns a model; ApiError 404 if there is none of the name."""
        found = self._models.get(name)
        if found is None:
            names = ", ".join(self._models)
            raise ApiError(
                404, f"there is no model {name[:80]!r}: the models are {names}", param="model", code="model_not_found"
            )
        return found

    def generative(self, name: str) -> GenerativeModel:
        """Returns a model that generates text; ApiError 404 or 400 if it is none."""
        found = self.find(name)
        if not isinstance(found, GenerativeModel):
            raise ApiError(400, f"the model {name!r} classifies texts: use /v1/classify", param="model")
        return found

    def classifier(self, name: str) -> ClassificationModel:
        """Returns a model that classifies; ApiError 404 or 400 if it is none."""
        found = self.find(name)
        if not isinstance(found, ClassificationModel):
            raise ApiError(400, f"the model {name!r} generates text and has no head of a task", param="model")
        return found

    def first_generative(self) -> GenerativeModel:
        """Returns the first model that generates text; ApiError 400 if there is none."""
        for model in self._models.values():
            if isinstance(model, GenerativeModel):
                return model
        raise ApiError(400, "this server has no model that generates text", param="model")

    def cards(self) -> list[dict[str, Any]]:
        """Returns the models as /v1/models lists them."""
        return [model.card() for model in self._models.values()]
