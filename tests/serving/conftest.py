"""Servers of a tiny random model that the tests share."""

from collections.abc import Callable, Iterator
from typing import Any

import pytest

from tests.tiny_servers import RunningServer, running


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
