"""Servers of a tiny random model that the tests share."""

from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import pytest

from gptjax.serving import completion_settings
from tests.tiny_servers import RunningServer, running


@pytest.fixture(autouse=True)
def known_seeds(monkeypatch) -> None:
    """Requests without a seed get the same one in every run of a test."""
    monkeypatch.setattr(completion_settings, "secrets", SimpleNamespace(randbelow=lambda most: 12345))


@pytest.fixture(scope="session")
def server() -> Iterator[RunningServer]:
    """A server of a model with the template chatml."""
    with running() as found:
        yield found


@pytest.fixture(scope="session")
def harmony_server() -> Iterator[RunningServer]:
    """A server of a model with the harmony format."""
    with running("harmony") as found:
        yield found


@pytest.fixture(scope="session")
def serve_tiny() -> Callable[..., Any]:
    """`with serve_tiny(rows=..., ...) as server:` with settings of its own."""
    return running
