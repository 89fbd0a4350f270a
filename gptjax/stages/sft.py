"""Stage "sft": supervised fine-tuning on conversations, InstructGPT's first step (Ouyang et al. 2022, section 3.5)."""

from collections.abc import Callable
from typing import Any

from jax.sharding import Mesh

from gptjax.config import Config
from gptjax.data.chat_batches import PackedConversations
from gptjax.data.conversations import Conversation, Message
from gptjax.data.pipeline import PackedExamples
from gptjax.data.tokenizers import Tokenizer
from gptjax.inference.engine import Engine
from gptjax.inference.sampling import Sampling
from gptjax.models.gpt import GPT
from gptjax.stages.chat_data import ChatData, conversations_of, fitting, open_chat, positions, pretraining_text
from gptjax.stages.reading import reader
from gptjax.stages.registry import make_program, plain
from gptjax.training.held_out import held_out_means, perplexity
from gptjax.training.intervals import in_tokens
from gptjax.training.stage import Stage


def build(config: Config, mesh: Mesh, tokenizer: Tokenizer | None) -> Stage:
    """The stage on `mesh`.

    Args:
      tokenizer: of the run that goes on; None: that of the weights to start from, or the one that the config names.

    Raises:
      UserError: as of `open_chat`; a conversation whose last exchange is longer than the context.
    """
    data = open_chat(config, mesh, tokenizer, conversations_of)
    train = _rows(data, data.train, data.config.seed, pretraining_text(data))
    validation = _rows(data, data.validation, None, None)
    tokens_per_epoch, tokens = positions(data.config, train)
    config = in_tokens(data.config, tokens_per_epoch)
    program, size, read = make_program(config), config.sequences_per_microbatch, reader(config, mesh)
    return Stage(
        program=program,
        tokenizer=data.tokenizer,
        total_tokens=tokens,
        batches=lambda start: read(train, start),
        evaluate=_evaluate(held_out_means(program.loss, lambda: read(validation, 0), size, mesh)),
        sample=_sample(config, data, mesh) if config.evaluation.sample_tokens > 0 else None,
    )


def _rows(
    data: ChatData[Conversation], of: list[Conversation], seed: int | None, pretraining: PackedExamples | None
) -> PackedConversations:
    chat, context = data.config.chat, data.config.model.context_length
    encoded = fitting(data.config, of, lambda item: data.chat_format.encode(item.messages, context, place=item.place))
    share = chat.pretraining_share if pretraining is not None else 0.0
    return PackedConversations(encoded, context, pack=chat.pack, seed=seed, pretraining=pretraining, share=share)


def _evaluate(measure: Callable[[Any], dict[str, float]]) -> Callable[[Any], dict[str, float]]:
    """Loss (nats a token of the answers) and perplexity on the validation conversations."""

    def evaluate(params: Any) -> dict[str, float]:
        means = measure(params)
        return means | {"perplexity": perplexity(means["loss"])}

    return evaluate


def _sample(config: Config, data: ChatData[Conversation], mesh: Mesh) -> Callable[[Any], str]:
    """A question and the model's answer, the same draws every time."""
    settings, question = config.evaluation, Message("user", config.evaluation.sample_prompt)
    room = config.model.context_length - settings.sample_tokens

    def sample(params: Any) -> str:
        # No second copy beside the training state.
        engine = Engine(GPT(config.model), plain(config, params), data.tokenizer, mesh, weights="stacked")
        answer = engine.generate(
            [data.chat_format.encode_prompt((question,), room)],
            settings.sample_tokens,
            Sampling(settings.sample_temperature, settings.sample_top_k),
            seeds=config.seed,
            end_tokens=(data.chat_format.end_of_turn,),
        )
        return f"user: {question.content}\nassistant: {answer[0].text}"

    return sample
