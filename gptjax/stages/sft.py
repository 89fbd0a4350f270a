"""Stage "sft": supervised fine-tuning on conversations, InstructGPT's first step (Ouyang et al. 2022, section 3.5)."""

from collections.abc import Callable
from typing import Any

from jax.sharding import Mesh

from gptjax.checkpoint.state import ParameterSpec
from gptjax.config import Config, require
from gptjax.data import conversations
from gptjax.data.chat_batches import PackedConversations
from gptjax.data.conversations import Conversation, Message, Prompt
from gptjax.data.pipeline import PackedExamples
from gptjax.data.tokenizers import Tokenizer
from gptjax.inference.engine import Engine
from gptjax.inference.sampling import Sampling
from gptjax.models.gpt import GPT
from gptjax.stages import policy
from gptjax.stages.chat_data import ChatData, conversations_of, fitting, open_chat, positions, pretraining_text
from gptjax.stages.definition import Definition
from gptjax.stages.pretrain import next_token_loss
from gptjax.stages.reading import reader
from gptjax.training.held_out import held_out_means, perplexity
from gptjax.training.intervals import in_tokens
from gptjax.training.objective import Objective
from gptjax.training.stage import Stage, describe_data


def check(config: Config) -> None:
    """Raises UserError when the config has settings that supervised fine-tuning does not support."""
    require(
        (config.chat.pretraining_share > 0) == (config.chat.pretraining_source is not None),
        f"chat.pretraining_source={config.chat.pretraining_source} and chat.pretraining_share="
        f"{config.chat.pretraining_share}: set both, or neither",
    )


DEFINITION = Definition(
    parameters=policy.policy_parameters,
    loss=next_token_loss,
    complete=policy.complete,
    check=check,
    sections=("chat",),
    conversational=True,
    chats=True,
    rows_of_context=True,
)


def build(
    config: Config, mesh: Mesh, tokenizer: Tokenizer | None, make_objective: Callable[[Config], Objective]
) -> Stage:
    """Builds the stage on `mesh`.

    Args:
      tokenizer: of the run that resumes; None: that of the weights to start from, or the one that the config names.
      make_objective: complete config -> parameters and loss.

    Raises:
      UserError: as in `open_chat`; a conversation whose last exchange is longer than the context.
    """
    data = open_chat(config, mesh, tokenizer, conversations_of)
    train = _rows(data, data.train, data.config.seed, pretraining_text(data))
    validation = _rows(data, data.validation, None, None)
    tokens_per_epoch, tokens = positions(data.config, train)
    config = in_tokens(data.config, tokens_per_epoch)
    objective, size, read = make_objective(config), config.sequences_per_microbatch, reader(config, mesh)
    return Stage(
        objective=objective,
        tokenizer=data.tokenizer,
        total_tokens=tokens,
        batches=lambda start, run: read(train, start),
        evaluate=_evaluate(held_out_means(objective.loss, lambda: read(validation, 0), size, mesh)),
        sample=_sample(objective.parameters, data, mesh) if config.evaluation.sample_tokens > 0 else None,
        description=describe_data("conversations", len(data.train), len(data.validation), tokens_per_epoch, tokens),
        images_per_token=train.images_per_token,
    )


def held_out_prompts(config: Config) -> list[Prompt]:
    """Returns the prompts of the held-out conversations, each with its reference completion."""
    return conversations.prompts(conversations_of(config)[1])


def _rows(
    data: ChatData[Conversation], items: list[Conversation], seed: int | None, pretraining: PackedExamples | None
) -> PackedConversations:
    chat, context = data.config.chat, data.config.model.context_length
    form = data.chat_format
    documents = [item for item in items if item.messages[0].role == "document"]
    encoded = [
        piece for item in documents for piece in form.encode_document(item.messages[0], context, place=item.place)
    ]
    turns = [
        Conversation(tuple(messages), item.place)
        for item in items
        if item.messages[0].role != "document"
        for messages in form.training_conversations(item.messages)
    ]
    if turns or not documents:
        encoded += fitting(data.config, turns, lambda i: form.encode(i.messages, context, place=i.place))
    share = chat.pretraining_share if pretraining is not None else 0.0
    return PackedConversations(
        encoded, context, pack=chat.pack, seed=seed, pretraining=pretraining, share=share, images=data.images
    )


def _evaluate(measure: Callable[[Any], dict[str, float]]) -> Callable[[Any], dict[str, float]]:
    """Returns (all parameters) -> loss, in nats per token of the completions, and perplexity on held-out data."""

    def evaluate(params: Any) -> dict[str, float]:
        means = measure(params)
        return means | {"perplexity": perplexity(means["loss"])}

    return evaluate


def _sample(parameters: ParameterSpec, data: ChatData[Conversation], mesh: Mesh) -> Callable[[Any], str]:
    """Returns (all parameters) -> a prompt and the model's completion, always with the same sampling seed."""
    config = parameters.config
    settings, message = config.evaluation, Message("user", config.evaluation.sample_prompt)
    room = config.model.context_length - settings.sample_tokens
    prompt = data.chat_format.encode_prompt((message,), room, place="evaluation.sample_prompt")

    def sample(params: Any) -> str:
        # Stacked: no second copy of the weights.
        engine = Engine(GPT(config.model), parameters.merge(params), data.tokenizer, mesh, weights="stacked")
        completion = engine.generate(
            [prompt],
            settings.sample_tokens,
            Sampling(settings.sample_temperature, settings.sample_top_k),
            seeds=config.seed,
            end_tokens=data.chat_format.end_tokens,
        )
        return f"user: {message.content}\nassistant: {data.chat_format.decode(completion[0].tokens)}"

    return sample
