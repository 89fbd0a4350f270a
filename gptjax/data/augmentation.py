"""Data augmentation of labelled dialogues, whose texts have one turn per line, the newest last."""

import dataclasses
import random

from gptjax.config import RegularisationConfig
from gptjax.data.labelled import Row


def with_copies(rows: list[Row], config: RegularisationConfig, seed: int) -> list[Row]:
    """Returns the rows, followed by `augmented_copies` augmented copies of each row with several turns.

    The last turn, which determines the label most, stays last. The result is a pure function of the arguments.
    """
    copies = []
    for number in range(config.augmented_copies):
        for index, row in enumerate(rows):
            rng = random.Random(f"{seed}/{number}/{index}")
            fields = {role: _changed(value, config, rng) for role, value in row.fields.items() if role != "label"}
            fields |= {role: value for role, value in row.fields.items() if role == "label"}
            if fields != row.fields:
                copies.append(dataclasses.replace(row, fields=fields))
    return rows + copies


def _changed(value: object, config: RegularisationConfig, rng: random.Random) -> object:
    if not isinstance(value, str) or "\n" not in value:
        return value
    *earlier, last = value.split("\n")
    if rng.random() < config.drop_turns:
        earlier = earlier[rng.randint(1, len(earlier)) :]
    if rng.random() < config.shuffle_turns:
        rng.shuffle(earlier)
    return "\n".join([*earlier, last])
