"""The part of a config that decides what is computed: runs that agree in it share their compiled programs."""

import dataclasses
from typing import Any

from gptjax.config.sections import Config


def computation(config: Config) -> Config:
    """Returns `config` without the fields that neither the parameters, the loss nor the step depend on.

    They are None, so that reading one is an error, and not a program that is shared by runs that need different ones.
    """
    names = ("init_from", "init_layers", "evaluation", "checkpoint", "stability", "logging")
    sections: dict[str, Any] = dict.fromkeys(names)
    sources: dict[str, Any] = dict.fromkeys(("source", "validation_source", "mixture", "mixture_schedule", "cache_dir"))
    return dataclasses.replace(
        config,
        **sections,
        data=dataclasses.replace(config.data, **sources),
        batch=dataclasses.replace(config.batch, total_tokens=None, epochs=None),
    )
