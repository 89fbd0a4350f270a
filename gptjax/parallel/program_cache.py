"""Compiled programs kept on the disk, by JAX's persistent cache: the second run of a config starts at once.

They lie in `<data.cache_dir>/compiled`, which may be removed at any time. JAX's own JAX_COMPILATION_CACHE_DIR names
another place, and JAX_ENABLE_COMPILATION_CACHE=false turns it off. A program's name there is a hash of the program, the
compiler, its version and flags, and the device.
"""

import hashlib
import importlib.util
import os
import platform
from pathlib import Path

import jax

from gptjax.config import read_config
from gptjax.distributed import processes

MAX_BYTES = 4 * 2**30  # what was used longest ago goes first
MIN_SECONDS = 0.1  # what compiles faster is not worth a file


def use(cache_dir: Path) -> None:
    """Keeps what this process compiles from now on; does nothing where it cannot, for that is no reason to stop.

    Several processes as one do without: JAX keeps the programs of process 0 alone, so that with a disk each the others
    would come to the first sum over all of them a compilation later.
    """
    if processes.is_one_of_several() or jax.config.values["jax_compilation_cache_dir"] is not None:
        return
    directory = cache_dir.expanduser() / "compiled" / _processor()
    try:
        directory.mkdir(parents=True, exist_ok=True)
    except OSError:
        return
    if not os.access(directory, os.W_OK | os.X_OK):
        return
    jax.config.update("jax_compilation_cache_dir", str(directory))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", MIN_SECONDS)
    if importlib.util.find_spec("filelock") is not None:  # which JAX needs to count the bytes
        jax.config.update("jax_compilation_cache_max_size", MAX_BYTES)


def use_that_of(workdir: Path) -> None:
    """`use` with the directory of the run in `workdir`; UserError where there is none."""
    use(Path(read_config(workdir).data.cache_dir))


def _processor() -> str:
    """8 hex digits for the instructions of this machine: a home directory may be that of another machine, too."""
    lines = {platform.machine()}
    try:
        known = Path("/proc/cpuinfo").read_text().splitlines()
        lines |= {line for line in known if line.startswith(("flags", "Features"))}
    except OSError:  # not Linux
        lines.add(platform.processor())
    return hashlib.sha256("\n".join(sorted(lines)).encode()).hexdigest()[:8]
