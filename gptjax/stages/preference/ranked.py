"""Training on ranked completions: the part that stages "reward" and "dpo" share."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from jax.sharding import Mesh

from gptjax.config import Config
from gptjax.data.chat_batches import PackedRankings, RankedSequences
from gptjax.data.conversations import Prompt, Ranking
from gptjax.data.pipeline import Microbatch
from gptjax.data.templates import TooLongError, with_completion
from gptjax.data.tokenizers import Tokenizer
from gptjax.stages.chat_data import ChatData, fitting, open_chat, positions, rankings_of
from gptjax.stages.reading import reader
from gptjax.training.held_out import held_out_means
from gptjax.training.intervals import in_tokens
from gptjax.training.objective import Objective
from gptjax.training.stage import Stage, describe_data

Conclude = Callable[[Any, int, Path], str]


def build_ranked(
    config: Config,
    mesh: Mesh,
    tokenizer: Tokenizer | None,
    make_objective: Callable[[Config], Objective],
    conclude: Callable[[Config, Callable[[], Iterator[Microbatch]], Mesh], Conclude] | None = None,
) -> Stage:
    """Builds the stage on `mesh`.

    Args:
      tokenizer: of the run that resumes; None: that of the weights to start from, or the one that the config names.
      make_objective: complete config -> parameters and loss.
      conclude: config, batches that have the best completion of each training prompt, and mesh -> what the stage does
        at the end of training.

    Raises:
      UserError: as in `open_chat`; a completion that is longer than the context.
    """
    data = open_chat(config, mesh, tokenizer, rankings_of)
    context = data.config.model.context_length
    settings: dict[str, Any] = {"pack": data.config.chat.pack, "images": data.images}
    encoded = _encode(data, data.train)
    train = PackedRankings(encoded, context, seed=data.config.seed, **settings)
    # Every repetition has the same best completions, with other random ones.
    first_repetition = encoded[: -(-len(encoded) // data.config.chat.random_draws)]
    once = PackedRankings(first_repetition, context, seed=None, **settings)
    validation = PackedRankings(_encode(data, data.validation), context, seed=None, **settings)
    tokens_per_epoch, tokens = positions(data.config, train)
    config = in_tokens(data.config, tokens_per_epoch)
    objective, size, read = make_objective(config), config.sequences_per_microbatch, reader(config, mesh)
    return Stage(
        objective=objective,
        tokenizer=data.tokenizer,
        total_tokens=tokens,
        batches=lambda start, run: read(train, start),
        evaluate=held_out_means(objective.loss, lambda: read(validation, 0), size, mesh),
        sample=None,
        conclude=None if conclude is None else conclude(config, lambda: read(once, 0), mesh),
        description=describe_data("rankings", len(data.train), len(data.validation), tokens_per_epoch, tokens),
        images_per_token=train.images_per_token,
    )


def held_out_prompts(config: Config) -> list[Prompt]:
    """Returns the prompts of the held-out rankings, each with its best completion as the reference."""
    rankings = rankings_of(config)[1]
    return list({r.prompt: Prompt(r.prompt, r.completions[0], r.place) for r in rankings}.values())


def _encode(data: ChatData[Ranking], rankings: list[Ranking]) -> list[RankedSequences]:
    """Tokenises each prompt with its completions, which share a batch element (Ouyang et al. 2022, section 3.5)."""
    form, context = data.chat_format, data.config.model.context_length

    def sequences(item: Ranking) -> RankedSequences:
        completions, ranks = [form.encode_completion(text) for text in item.completions], item.ranks
        if not item.ordered and data.config.chat.on_too_long == "skip":  # random completions can be left out
            room = context - len(form.encode_prompt(item.prompt[-1:]))
            kept = [i for i, completion in enumerate(completions) if i == 0 or len(completion) <= room]
            completions, ranks = [completions[i] for i in kept], tuple(ranks[i] for i in kept)
            if len(completions) < 2:
                raise TooLongError(f"{item.place}: no random completion fits behind its prompt")
        longest = max(map(len, completions))
        if longest >= context:
            raise TooLongError(
                f"{item.place}: a completion has {longest} tokens, in a context of {context}: shorten it, or increase "
                "model.context_length"
            )
        # The same tokens of the prompt for all completions, whatever their lengths: log-probabilities and scores of
        # different prompts are not comparable.
        prompt = form.encode_prompt_with_images(item.prompt, context - longest, place=item.place)
        return RankedSequences(
            [with_completion(prompt.tokens, completion, prompt.images) for completion in completions], ranks
        )

    return fitting(data.config, rankings, sequences)
