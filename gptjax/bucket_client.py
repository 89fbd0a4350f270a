"""The client of Google Cloud Storage, for `gptjax/object_store.py` and for Orbax, which gets it from epath."""

import errno
import functools
import json
import logging
import os
import re
from contextlib import suppress
from typing import Any
from urllib.parse import unquote

from gptjax.user_error import UserError

_MAX_CREDENTIALS = 1_000_000  # bytes of a file of credentials
COMMIT_FILE = "commit_success.txt"  # Orbax writes it last into a checkpoint in a bucket


class BucketError(OSError):
    """A bucket refuses a request, or cannot be reached; has an errno and a message as strerror."""


@functools.cache
def client() -> Any:
    """Returns the client of all buckets, the one that epath gives to Orbax too."""
    try:
        import fsspec
        from gcsfs.core import GCSFileSystem
    except ImportError:
        raise UserError("gs:// needs the package gcsfs: pip install 'gptjax[remote]'") from None

    class Client(GCSFileSystem):  # type: ignore[misc, unused-ignore]
        """gcsfs without its cache of listings, as TensorStore and other processes write too, and with OSErrors."""

        def __init__(self, *args: Any, **options: Any) -> None:
            if emulator := os.environ.get("STORAGE_EMULATOR_HOST"):
                os.environ.setdefault("TENSORSTORE_GCS_HTTP_URL", emulator)
                os.environ.setdefault("GOOGLE_AUTH_TOKEN_FOR_TESTING", "emulator")  # or it looks for credentials
                options.setdefault("token", "anon")
            super().__init__(*args, **{**options, "use_listings_cache": False})

        async def _call(self, method: str, path: str, *args: Any, **options: Any) -> Any:
            try:
                return await super()._call(method, path, *args, **options)
            except FileNotFoundError:
                place = _place(path, args, options)
                raise FileNotFoundError(errno.ENOENT, "there is no such object", place) from None
            except FileExistsError:  # a precondition does not hold
                raise
            except Exception as error:
                if (converted := _converted(error, _place(path, args, options))) is None:
                    raise
                raise converted from error

        # Orbax removes checkpoints whose marker does not exist: a failed request must not be read as that.
        async def _isfile(self, path: str) -> bool:
            return await self._kind(path) == "file"

        async def _isdir(self, path: str) -> bool:
            return await self._kind(path) == "directory"

        async def _kind(self, path: str) -> str | None:
            try:
                kind: str = (await self._info(path))["type"]
            except FileNotFoundError:
                return None
            return kind

        async def _rm(self, path: Any, recursive: bool = False, **options: Any) -> Any:
            """Removes the marker of a checkpoint first, so that no part of it is taken for a whole one."""
            if recursive and isinstance(path, str):
                with suppress(FileNotFoundError):
                    await self._rm_file(f"{path.rstrip('/')}/{COMMIT_FILE}")
            return await super()._rm(path, recursive=recursive, **options)

    check_credentials()
    os.environ.setdefault("EPATH_USE_TF", "0")  # epath would prefer TensorFlow's client
    for protocol in ("gs", "gcs"):
        fsspec.register_implementation(protocol, Client, clobber=True)
    return fsspec.filesystem("gcs", finalize_on_close=True)  # the arguments of epath


def check_credentials() -> None:
    """Raises UserError if GOOGLE_APPLICATION_CREDENTIALS names no file with credentials.

    gcsfs would ask without any, and log the tracebacks of the errors that it raises, which is turned off here.
    """
    for logger in ("gcsfs", "google.auth"):
        logging.getLogger(logger).setLevel(logging.CRITICAL)
    name = os.environ.get("GOOGLE_APPLICATION_CREDENTIALS")
    if not name or os.environ.get("STORAGE_EMULATOR_HOST"):
        return
    _check_file(name)


@functools.cache  # every file that is opened asks for its client; one that is refused is read again
def _check_file(name: str) -> None:
    try:
        with open(name, "rb") as file:
            has_type = "type" in json.loads(file.read(_MAX_CREDENTIALS))
    except OSError as error:
        raise UserError(f"cannot read GOOGLE_APPLICATION_CREDENTIALS={name}: {error.strerror}") from None
    except (ValueError, TypeError):
        has_type = False
    if not has_type:
        raise UserError(
            f"GOOGLE_APPLICATION_CREDENTIALS={name} is no JSON file of credentials: name the key of a service account, "
            "or unset it and log in by gcloud auth application-default login"
        )


def _place(path: str, args: tuple[Any, ...], options: dict[str, Any]) -> str:
    """Returns the URL of the object that a request of gcsfs is about."""
    if not args and (found := re.search(r"/b/([^/]+)/o(?:/([^?]*))?", path)) is not None:
        args = (found[1], unquote(found[2] or options.get("name", "")))
    return "gs://" + "/".join(map(str, filter(None, args[:2])))


def _converted(error: Exception, place: str) -> BucketError | None:
    """Returns what is raised instead of an error of gcsfs, aiohttp or google-auth; None: the error itself."""
    text = " ".join(str(error).split())
    if text.startswith("Forbidden"):
        reason = " ".join(str(error).partition("\n")[2].split()) or "forbidden"
        return BucketError(errno.EACCES, f"the bucket refuses access ({reason})", place)
    code = getattr(error, "code", None)
    if code in (401, "401") or type(error).__module__.startswith("google.auth"):
        fix = "log in by gcloud auth application-default login, or set GOOGLE_APPLICATION_CREDENTIALS"
        return BucketError(errno.EACCES, f"no valid credentials ({text}): {fix}", place)
    if code in (429, "429"):
        return BucketError(errno.EBUSY, f"the bucket's request quota is exceeded ({text})", place)
    if (
        code is not None
        or type(error).__module__.startswith(("aiohttp", "requests"))
        or isinstance(error, TimeoutError)
    ):
        return BucketError(errno.EIO, f"the bucket cannot be reached ({text or type(error).__name__})", place)
    return None
