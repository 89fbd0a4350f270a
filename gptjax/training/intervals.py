"""Intervals that a config counts in epochs, in tokens: as the loop and the schedules count."""

import dataclasses

from gptjax.config import Config


def in_tokens(config: Config, tokens_per_epoch: int) -> Config:
    """`config` with `every_tokens` set wherever it says `every_epochs`."""

    def every(section: str) -> int | None:
        settings = getattr(config, section)
        if settings.every_epochs is None:
            return settings.every_tokens
        return max(1, round(settings.every_epochs * tokens_per_epoch))

    sections = {
        name: dataclasses.replace(getattr(config, name), every_tokens=every(name), every_epochs=None)
        for name in ("evaluation", "checkpoint")
    }
    return dataclasses.replace(config, **sections)
