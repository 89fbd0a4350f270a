"""Validates untrusted tokenizer.json files.

The tokenizers library trusts its files. A malformed one can make it panic (an exception that is not an `Exception`),
abort the process, allocate without bound, or backtrack in a regular expression. So a file is first loaded and tested in
a child process with limits on time and memory, which takes about 0.1 s.
"""

import hashlib
import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from gptjax import files
from gptjax.config import UserError
from gptjax.data import tokenizer_trial

MAX_BYTES = 200_000_000  # size of a tokenizer.json; the largest published vocabularies have 35 MB
MAX_IDS = 2**24  # exclusive upper bound of token ids; published vocabularies have fewer than 2**19
SECONDS = 120  # wall-clock time, as the machine may be busy
CPU_SECONDS = 30
MEMORY_BYTES = 4 * 2**30

_passed: set[str] = set()  # digests of contents validated by this process


def read(path: Path) -> str:
    """Reads and validates a tokenizer.json.

    Raises:
      UserError: see `check`.
      OSError, ValueError: the file cannot be read, is not UTF-8, or has more than MAX_BYTES.
    """
    content = files.read_bytes(path, MAX_BYTES).decode()  # not read_text, which would change line ends
    check(content)
    return content


def check(content: str) -> None:
    """Raises UserError unless `content`, a tokenizer.json, loads and encodes sample texts within the limits."""
    raw = content.encode()
    digest = hashlib.sha256(raw).hexdigest()
    if digest in _passed:
        return
    try:
        # -P: the directory of the script has a module called tokenizers, which would shadow the package.
        child = subprocess.run(
            [sys.executable, "-P", tokenizer_trial.__file__, str(CPU_SECONDS), str(MEMORY_BYTES)],
            input=raw,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,  # Rust reports panics there
            timeout=SECONDS,
            env=os.environ | {"TOKENIZERS_PARALLELISM": "false", "RUST_BACKTRACE": "0"},
        )
    except subprocess.TimeoutExpired:
        raise UserError(f"loading it and encoding sample texts takes more than {SECONDS} s") from None
    if child.returncode != 0:
        raise UserError(
            f"the tokenizers library crashes on it or needs more than {MEMORY_BYTES / 2**30:g} GiB or {CPU_SECONDS} s "
            f"(exit code {child.returncode})"
        )
    if child.stdout != b"ok":
        raise UserError(child.stdout.decode(errors="replace"))
    _passed.add(digest)


def vocab_size(vocabulary: Mapping[str, int]) -> int:
    """Returns the largest id plus 1; raises UserError if the vocabulary is empty or an id is not below MAX_IDS."""
    if not vocabulary:
        raise UserError("its vocabulary is empty")
    if (largest := max(vocabulary.values())) >= MAX_IDS:
        raise UserError(f"it has the token id {largest}: ids must be below {MAX_IDS}")
    return largest + 1


class LibraryErrors:
    """Context manager that turns errors and panics of the tokenizers library into UserErrors that begin with `what`."""

    def __init__(self, what: str) -> None:
        self._what = what

    def __enter__(self) -> None:
        pass

    def __exit__(self, _kind: Any, error: BaseException | None, _at: Any) -> None:
        # The class of panics cannot be imported; it derives from BaseException, as KeyboardInterrupt and SystemExit do.
        if isinstance(error, Exception) or type(error).__name__ == "PanicException":
            raise UserError(f"{self._what}: {' '.join(str(error).split())[:300]}") from None
