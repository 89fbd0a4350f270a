"""Classification of errors in reading a checkpoint: damage, a failing read, or a checkpoint that was deleted.

Only damage (a wrong checksum, a wrong format, a missing file) is a property of the checkpoint. Other errors, such as
exhausted file descriptors or an unreachable file server, are properties of the machine and may be transient.
"""

import errno
import os
import re
import time
from collections.abc import Callable
from typing import TypeVar

from gptjax.config import UserError
from gptjax.distributed import processes

T = TypeVar("T")

RETRY_DELAYS = (0.2, 1.0, 3.0)  # seconds before each further attempt

_MISSING = {errno.ENOENT, errno.ENOTDIR, errno.EISDIR}
# Status codes of TensorStore that do not describe the content of a file.
_STATUSES = "UNAVAILABLE|DEADLINE_EXCEEDED|PERMISSION_DENIED|UNAUTHENTICATED|ABORTED|CANCELLED|RESOURCE_EXHAUSTED"
# In messages of TensorStore about a bucket: the connection failed, or the status is not that of a missing object.
_REQUEST = re.compile(r"\[curl_code|\[http_response_code='(?!404|416)")
# What Orbax, TensorStore and our own parsing raise for content of the wrong format.
_FORMAT_ERRORS = (
    *(ValueError, LookupError, TypeError, AttributeError, EOFError, OverflowError, RecursionError),
    *(NotImplementedError, AssertionError, FileNotFoundError, NotADirectoryError, IsADirectoryError),
)


class DamageError(Exception):
    """The content of a checkpoint differs from what was saved."""


class ReadError(Exception):
    """A checkpoint cannot be read at present; its content is unknown."""


class VanishedError(Exception):
    """A checkpoint was deleted while it was read."""


def retried(read: Callable[[], T], exists: Callable[[], bool]) -> T:
    """Returns `read()`; a failing read is repeated after each of `RETRY_DELAYS`.

    Args:
      exists: whether the checkpoint is still there.

    Raises:
      UserError: as raised by `read`.
      DamageError, ReadError, VanishedError: by the kind of the error. Other errors are bugs, and re-raised.
    """
    for delay in (*RETRY_DELAYS, None):
        try:
            return read()
        except (UserError, DamageError):
            raise
        except Exception as error:
            reason = refusal(error)
            if reason is None:
                if not isinstance(error, _FORMAT_ERRORS) and type(error) is not Exception:  # Orbax raises it as such
                    raise
                if not exists():
                    raise VanishedError(first_line(error)) from error
                raise DamageError(first_line(error)) from error
            if delay is None:
                raise ReadError(reason) from error
        time.sleep(delay)
    raise AssertionError("unreachable")


def agreed(read: Callable[[], T]) -> T:
    """Returns `read()` where it succeeds in all processes; otherwise raises the same error in all of them.

    A deleted checkpoint takes precedence over a damaged one, and that over one that cannot be read.
    """
    kinds = (VanishedError, DamageError, ReadError)
    verdict: list[str] | None = None
    try:
        value = read()
    except kinds as error:
        verdict, cause = [type(error).__name__, str(error)], error.__cause__
    verdicts = [each for each in processes.gather(verdict) if each is not None]
    for kind in kinds:
        for name, reason in verdicts:
            if name == kind.__name__:
                raise kind(reason) from (cause if verdict is not None else None)
    return value


def first_line(error: BaseException) -> str:
    """Returns the first line of an error's message, shortened."""
    line = next(iter(str(error).splitlines()), "").partition(". See full")[0] or type(error).__name__
    return line if len(line) <= 120 else f"{line[:117]}..."


def refusal(error: BaseException | None) -> str | None:
    """Returns the reason if the operating system or the file server refused a read; None for any other error.

    Such errors may be the cause of another exception, or a ValueError of TensorStore with the code in its message.
    """
    while error is not None:
        if isinstance(error, OSError) and error.errno is not None and error.errno not in _MISSING:
            return error.strerror or os.strerror(error.errno)
        codes = [int(code) for code in re.findall(r"os_error_code='?(\d+)", str(error))]
        if code := next((code for code in codes if code not in _MISSING), None):
            return os.strerror(code)
        if _REQUEST.search(str(error)) is not None:
            return "the bucket refuses the request or cannot be reached"
        if isinstance(error, ValueError) and (status := re.match(_STATUSES, str(error))) is not None:
            return status[0].lower().replace("_", " ")
        error = error.__cause__ or error.__context__
    return None
