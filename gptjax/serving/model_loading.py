"""Loads what a server serves: the base model, and fine-tuned models that share its weights."""

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import jax
from jax.sharding import Mesh

from gptjax.config import (
    ChatConfig,
    Config,
    DataConfig,
    MeshConfig,
    PeftConfig,
    UserError,
    VisionConfig,
    read_config,
)
from gptjax.data.images.image_files import ImageFiles
from gptjax.data.labelled import Row
from gptjax.data.templates import ChatFormat, chat_format
from gptjax.data.tokenizers import Tokenizer
from gptjax.files import expand
from gptjax.inference.batching import BatchedEngine
from gptjax.inference.draft_model import DraftProposer
from gptjax.inference.speculation import Proposer
from gptjax.inference.weights import WeightFormat
from gptjax.interop import huggingface
from gptjax.models.gpt import GPT
from gptjax.parallel.mesh import make_mesh
from gptjax.serving.served_models import ClassificationModel, GenerativeModel
from gptjax.stages import registry
from gptjax.stages.finetune.predictor import load_predictor
from gptjax.stages.saved_weights import load_parts
from gptjax.stages.trained_model import load_model

CLASSIFIED_TOGETHER = 8  # rows of a batch


@dataclasses.dataclass(frozen=True)
class BaseModel:
    """A model that generates text, with its weights.

    Attributes:
      params: unboxed, sharded over `mesh`.
      form: chat format; None: the tokenizer has no token that could end a turn.
      infills: whether it is trained to fill in the middle.
      conversational: whether it is trained on conversations, or used for them by choice of a template.
    """

    model: GPT
    params: Any
    tokenizer: Tokenizer
    mesh: Mesh
    form: ChatFormat | None
    infills: bool
    conversational: bool


def load_base(
    workdir: Path,
    mesh: MeshConfig,
    dtype: Literal["float32", "bfloat16"] | None,
    template: str | None,
    *,
    best: bool,
    step: int | None,
) -> BaseModel:
    """Loads a workdir.

    Args:
      template: chat template of a model that no chat stage trained; None: plain.
      dtype, best, step: as in `load_model`.

    Raises:
      UserError: as `load_model`, or `template` contradicts what the model is trained with.
    """
    saved = read_config(workdir)
    trains_chat = registry.definition(saved).conversational
    if template is not None and trains_chat:
        raise UserError(f"{workdir} is trained with chat.template={saved.chat.template}: leave out --template")
    trained = load_model(workdir, mesh, dtype, best=best, step=step)
    chat = trained.config.chat if trains_chat else ChatConfig(template=template or "plain")  # type: ignore[arg-type]
    form = _form(chat, trained.tokenizer, trained.config.model.vision, None if trains_chat else str(workdir))
    infills = trained.config.data.objective == "fill_in_the_middle"
    conversational = trains_chat or template is not None
    return BaseModel(trained.model, trained.params, trained.tokenizer, trained.mesh, form, infills, conversational)


def load_huggingface(
    source: str, mesh: MeshConfig, dtype: Literal["float32", "bfloat16"] | None, template: str | None
) -> BaseModel:
    """Loads a Hugging Face directory. Arguments and errors as in `load_base` and `huggingface.read_model`."""
    model, params, tokenizer = huggingface.read_model(source, dtype or "float32", param_dtype=dtype or "float32")
    chat = ChatConfig(template=template or "plain")  # type: ignore[arg-type]
    form = _form(chat, tokenizer, model.config.vision, source)
    conversational = template is not None
    return BaseModel(model, params, tokenizer, make_mesh(mesh), form, infills=False, conversational=conversational)


def _form(chat: ChatConfig, tokenizer: Tokenizer, vision: VisionConfig, untrained: str | None) -> ChatFormat | None:
    """Returns the chat format; `untrained`: place of a model that has no tokens for it but the tokenizer's."""
    if chat.template == "plain" and tokenizer.end_of_text is None:
        return None
    form = chat_format(chat, tokenizer, vision)
    if untrained is not None and form.special_tokens:
        missing = next(iter(form.special_tokens))
        raise UserError(f"the tokenizer of {untrained} lacks {missing} of --template={chat.template}")
    return form


@dataclasses.dataclass(frozen=True)
class LoadedAdapter:
    """Low-rank matrices over the base model, and the chat format that they were trained with.

    Attributes:
      settings, params: as the engine takes them.
      form: None: that of the base model.
    """

    settings: PeftConfig
    params: Any
    form: ChatFormat | None


def load_adapter(workdir: Path, base_workdir: Path, base: BaseModel) -> LoadedAdapter:
    """Loads the low-rank matrices of a run of LoRA or AdaLoRA that started from the served base model.

    Raises:
      UserError: the run is of another method, has a head, or started from another workdir or other weights.
    """
    config = read_config(workdir)
    if is_classifier(config):
        raise UserError(f"{workdir} has the head of a task: serve it by --classifiers")
    if config.peft.method not in ("lora", "adalora"):
        raise UserError(f"{workdir} is of peft.method={config.peft.method}, but adapters are of lora or adalora")
    source = expand(str(config.init_from)).resolve()
    if source != base_workdir.resolve():
        raise UserError(f"{workdir} is an adapter of {source}, not of the served {base_workdir}")
    with jax.set_mesh(base.mesh):
        parts = load_parts(workdir, base.mesh, given={source: base.params})
    trained = registry.definition(config).conversational
    model = parts.parameters.config.model
    form = chat_format(parts.parameters.config.chat, parts.tokenizer, model.vision) if trained else None
    return LoadedAdapter(parts.parameters.config.peft, parts.trained, form)


def is_classifier(config: Config) -> bool:
    """Whether a run has the head of a task instead of next-token logits."""
    return registry.definition(config).head == "task"


def load_classifier(name: str, workdir: Path, mesh: Mesh, given: dict[Path, Any]) -> ClassificationModel:
    """Loads the best checkpoint of a fine-tuned run.

    Args:
      given: cache of base weights by workdir, which several runs share.

    Raises:
      UserError: as `load_predictor`.
    """
    with jax.set_mesh(mesh):
        config, predict = load_predictor(workdir, mesh, CLASSIFIED_TOGETHER, given=given)

    def predicted(rows: Sequence[Row]) -> Any:
        with jax.set_mesh(mesh):
            return predict(rows)

    return ClassificationModel(name, config, predicted)


def load_draft(
    source: str, mesh: MeshConfig, dtype: Literal["float32", "bfloat16"] | None, weights: WeightFormat
) -> DraftProposer:
    """Loads a workdir, or a Hugging Face directory, as the draft model of speculative decoding.

    Raises:
      UserError: as `load_model` or `huggingface.read_model`, or the model generates no text.
    """
    workdir = expand(source)
    if not (workdir / "checkpoints").is_dir():
        model, params, tokenizer = huggingface.read_model(source, dtype or "float32", param_dtype=dtype or "float32")
        return DraftProposer(model, params, tokenizer, make_mesh(mesh), weights)
    if is_classifier(read_config(workdir)):
        raise UserError(f"{source} has the head of a task, so it cannot be a draft model")
    trained = load_model(workdir, mesh, dtype)
    return DraftProposer(trained.model, trained.params, trained.tokenizer, trained.mesh, weights)


def create_engine(
    base: BaseModel,
    adapters: Mapping[str, LoadedAdapter],
    rows: int,
    weights: WeightFormat,
    cache_bytes: int | None,
    *,
    deterministic: bool,
    proposer: Proposer | None = None,
    speculative_tokens: int = 4,
) -> BatchedEngine:
    """Creates the engine, and compiles its programs. Arguments as in `BatchedEngine`."""
    engine = BatchedEngine(
        base.model,
        base.params,
        base.tokenizer,
        base.mesh,
        weights,
        rows=rows,
        cache_bytes=cache_bytes,
        deterministic=deterministic,
        adapters={name: (adapter.settings, adapter.params) for name, adapter in adapters.items()},
        proposer=proposer,
        speculative_tokens=speculative_tokens,
    )
    engine.compile()
    return engine


def generative_model(
    name: str, base: BaseModel, form: ChatFormat | None, adapter: str | None = None
) -> GenerativeModel:
    """Returns the base model, or it with an adapter, as requests name it."""
    config = base.model.config
    assert config.vocab_size is not None
    return GenerativeModel(
        name,
        base.tokenizer,
        vocab_size=config.vocab_size,
        context_length=config.context_length,
        form=form,
        infills=base.infills,
        conversational=base.conversational,
        adapter=adapter,
        images=ImageFiles(config.vision, DataConfig()) if config.reads_images else None,
    )
