"""User errors, and suggestions for misspelt names."""

import difflib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

from gptjax.user_error import UserError


def require(condition: bool, message: str) -> None:
    """Raises UserError with `message` unless `condition` holds."""
    if not condition:
        raise UserError(message)


def positive(section: Any, prefix: str, *names: str) -> None:
    """Raises UserError unless each named field of `section` is positive or None."""
    for name in names:
        value = getattr(section, name)
        require(value is None or value > 0, f"{prefix}.{name}={value} must be positive")


@contextmanager
def naming(field: str) -> Iterator[None]:
    """Context manager that begins the messages of UserErrors with the config field whose value they are about."""
    try:
        yield
    except UserError as error:
        raise UserError(f"{field}: {error}") from None


def nearest(name: str, known: Iterable[str], group: str = "") -> str:
    """Ends an "unknown name" message: with the most similar known name of `group`, or with all of them."""
    names = [f"{group}.{other}" if group else other for other in known]
    match = difflib.get_close_matches(f"{group}.{name}" if group else name, names, n=1)
    return f": did you mean {match[0]!r}?" if match else f": known are {', '.join(names)}"
