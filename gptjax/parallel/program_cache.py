"""Compiled programs on disk, by JAX's persistent compilation cache: the second run of a config starts at once.

They lie in `<cache_dir>/compiled`, which may be removed at any time. JAX's own JAX_COMPILATION_CACHE_DIR names another
directory, and JAX_ENABLE_COMPILATION_CACHE=false turns the cache off. A program's name there is a hash of the program,
the compiler, its version and flags, and the device.

JAX runs what it finds there, so whoever can write there can run code as the user. The directory therefore comes from
the command line (`data.cache_dir` of the config that trains, or --cache_dir), never from a workdir, and it is not used
where others could put files into it.
"""

import grp
import hashlib
import importlib.util
import os
import platform
import pwd
import stat
import sys
from pathlib import Path

from gptjax.distributed import processes

MAX_BYTES = 4 * 2**30  # what was used longest ago goes first
MIN_SECONDS = 0.1  # what compiles faster is not worth a file


def use(cache_dir: Path) -> None:
    """Makes JAX keep compiled programs below `cache_dir` from now on.

    Does nothing where the directory cannot be written, and says so on stderr where it exists but other users could put
    programs there (`writable_by_others`): a run without the cache is only slower to start.

    Several processes as one go without: JAX keeps the programs of process 0 alone, so that with a disk each the others
    would reach the first collective a compilation later.
    """
    import jax  # takes a second, which a command that only checks its flags need not spend

    if processes.is_one_of_several() or jax.config.values["jax_compilation_cache_dir"] is not None:
        return
    try:
        cache_dir = cache_dir.expanduser()
        cache_dir.mkdir(parents=True, exist_ok=True)
        directory = cache_dir.resolve(strict=True) / "compiled" / _processor()
        for path in (directory.parent, directory):
            path.mkdir(mode=0o700, exist_ok=True)
        directory = directory.resolve(strict=True)  # where a link leads, which nobody can change afterwards
        culprit = writable_by_others(directory)
    except (OSError, RuntimeError):  # RuntimeError: a loop of links, or no home directory
        return
    if culprit is not None:
        print(
            f"compiled programs are not cached: other users may write to {culprit}, and could run code through the "
            "cache; remove it, make it yours alone, or choose another cache directory",
            file=sys.stderr,
        )
        return
    if not os.access(directory, os.W_OK | os.X_OK):
        return
    jax.config.update("jax_compilation_cache_dir", str(directory))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", MIN_SECONDS)
    if importlib.util.find_spec("filelock") is not None:  # which JAX needs to count the bytes
        jax.config.update("jax_compilation_cache_max_size", MAX_BYTES)


def writable_by_others(directory: Path) -> Path | None:
    """The part of a path through which another user could change what is in `directory`; None: there is none.

    Others are all but this user and root. The directory must be the user's own, and it and all above it writable by
    their owner alone, or by the user's private group. Above it, a sticky directory such as /tmp is safe as well: others
    cannot rename what is in it.

    Args:
      directory: absolute, without symbolic links.

    Raises:
      OSError: a part cannot be examined.
    """
    user = os.geteuid()
    for path in (directory, *directory.parents):
        found = path.stat()
        is_sticky = path != directory and bool(found.st_mode & stat.S_ISVTX)
        if found.st_uid not in (user, 0) or (path == directory and found.st_uid != user):
            return path
        by_group = found.st_mode & stat.S_IWGRP and not _is_private_group(found.st_gid)
        if (by_group or found.st_mode & stat.S_IWOTH) and not is_sticky:
            return path
    return None


def _is_private_group(group: int) -> bool:
    """Whether this user is alone in a group: the one of the same name, which systems with umask 002 give each user."""
    try:
        name, found = pwd.getpwuid(os.geteuid()).pw_name, grp.getgrgid(group)
    except KeyError:  # an id without a name
        return False
    return found.gr_name == name and set(found.gr_mem) <= {name}


def _processor() -> str:
    """8 hex digits for the instructions of this machine: a home directory may be that of another machine, too."""
    lines = {platform.machine()}
    try:
        known = Path("/proc/cpuinfo").read_text().splitlines()
        lines |= {line for line in known if line.startswith(("flags", "Features"))}
    except OSError:  # not Linux
        lines.add(platform.processor())
    return hashlib.sha256("\n".join(sorted(lines)).encode()).hexdigest()[:8]
