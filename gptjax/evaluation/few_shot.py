"""Few-shot prompts: which examples are shown before an example, and their text."""

import dataclasses
import random
from collections.abc import Sequence
from typing import Generic, Protocol, TypeVar

from gptjax.config import UserError

SEPARATOR = "\n\n"  # between the examples of a prompt


class Example(Protocol):
    """What a few-shot prompt needs of an example."""

    @property
    def shown(self) -> str:
        """The text of the example with its right answer."""

    @property
    def description(self) -> str:
        """Text at the start of the prompt, before the few-shot examples."""

    @property
    def group(self) -> str:
        """Only examples of the same group are shown before this one, such as questions of one subject."""


E = TypeVar("E", bound=Example)


@dataclasses.dataclass(frozen=True)
class Examples(Generic[E]):
    """The examples of a task.

    Attributes:
      asked: examples to evaluate.
      shots: few-shot examples; may be `asked` itself, where an example is never shown before itself.
      separator: text after each few-shot example.
      sampled: whether few-shot examples are sampled (Brown et al. 2020, section 2.4), instead of the first of `shots`.
      spare: whether one more is drawn than is shown, as lm-evaluation-harness does where a task has no test split.
    """

    asked: Sequence[E]
    shots: Sequence[E]
    separator: str = SEPARATOR
    sampled: bool = True
    spare: bool = False


def few_shot_prompts(examples: Examples[E], num_fewshot: int, limit: int | None, seed: int) -> list[str]:
    """Returns the text that precedes each of the first `limit` examples: its description and few-shot examples.

    Args:
      seed: sampling seed; the few-shot examples depend on it and on the example's index only. They are drawn as
        lm-evaluation-harness does, whose default seed is 1234.

    Raises:
      UserError: there are too few few-shot examples.
    """
    own = examples.shots is examples.asked  # one more is drawn, to replace the example itself
    groups: dict[str, list[int]] = {}
    for number, shot in enumerate(examples.shots):
        groups.setdefault(shot.group, []).append(number)
    prompts, rng = [], random.Random(seed)
    for index, example in enumerate(examples.asked[:limit]):
        group = groups.get(example.group, [])
        if num_fewshot > len(group) - own:
            of_group = f" of {example.group}" if example.group else ""
            most = max(len(group) - own, 0)
            raise UserError(f"--num_fewshot={num_fewshot}, but there are only {most} examples{of_group} to show")
        most = min(num_fewshot + (own or examples.spare), len(group))
        places = rng.sample(range(len(group)), most) if examples.sampled else range(most)
        shown = [group[place] for place in places if not (own and group[place] == index)][:num_fewshot]
        texts = (examples.shots[number].shown + examples.separator for number in shown)
        prompts.append(example.description + "".join(texts))
    return prompts
