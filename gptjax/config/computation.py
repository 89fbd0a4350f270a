"""The part of a config that decides what is computed: runs that agree in it share their compiled programs."""

import dataclasses
from typing import Any

from gptjax.config.sections import Config, DataConfig


def computation(config: Config) -> Config:
    """Returns `config` without the fields that neither the parameters, the loss nor the step depend on.

    Whole sections that they may not read are None, so that reading one is an error, and not a program that is shared by
    runs that need different ones.
    """
    unread: dict[str, Any] = dict.fromkeys(("init_from", "evaluation", "checkpoint", "stability", "logging"))
    return dataclasses.replace(
        config,
        **unread,
        data=DataConfig(objective=config.data.objective),
        batch=dataclasses.replace(config.batch, total_tokens=None, epochs=None),
    )
