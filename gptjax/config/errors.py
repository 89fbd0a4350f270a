"""The mistake that a user can mend, and how to name what was meant."""

import difflib
from collections.abc import Iterable


class UserError(Exception):
    """A mistake the user can mend: one line naming the culprit and the mend. Commands print it and exit with code 2."""


def nearest(name: str, known: Iterable[str], group: str = "") -> str:
    """The end of an "unknown name" message: the nearest of the known names of `group`, or all of them."""
    names = [f"{group}.{other}" if group else other for other in known]
    match = difflib.get_close_matches(f"{group}.{name}" if group else name, names, n=1)
    return f": did you mean {match[0]!r}?" if match else f": known are {', '.join(names)}"
