"""Conversion of intervals from epochs to tokens, the unit of the loop and the schedules."""

import dataclasses

from gptjax.config import Config


def in_tokens(config: Config, tokens_per_epoch: int) -> Config:
    """Replaces `every_epochs` by `every_tokens` in the sections `evaluation` and `checkpoint`."""

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
