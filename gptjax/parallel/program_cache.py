"""Compiled programs on disk, by JAX's persistent compilation cache: a repeated run does not compile.

They are in `<cache_dir>/compiled`, which may be removed at any time. JAX's own JAX_COMPILATION_CACHE_DIR names another
directory, and JAX_ENABLE_COMPILATION_CACHE=false turns the cache off. A program's file name is a hash of the program,
the compiler, its version and flags, and the device.

JAX executes the programs in the directory, so anyone who can write there can run code as the user. The directory
therefore comes from the command line (`data.cache_dir` of the config that trains, or --cache_dir), never from a
workdir, and it is not used if others could put files into it.
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
from gptjax.files import local_directory

MAX_BYTES = 4 * 2**30  # of the cache; the least recently used programs are evicted
MIN_SECONDS = 0.1  # programs that compile faster are not cached


def use(cache_dir: Path) -> None:
    """Makes JAX cache compiled programs below `cache_dir` from now on.

    Does nothing if the directory cannot be written. If other users could put programs there (`writable_by_others`), it
    warns on stderr and does nothing: without the cache a run is only slower to start.

    Multi-process runs have no cache. JAX caches only the programs of process 0, so on machines with separate disks the
    other processes would still compile, and reach the first collective later than process 0.
    """
    import jax  # takes a second, which commands that only check their flags save

    if processes.is_one_of_several() or jax.config.values["jax_compilation_cache_dir"] is not None:
        return
    try:
        cache_dir = local_directory(cache_dir.expanduser())
        cache_dir.mkdir(parents=True, exist_ok=True)
        directory = cache_dir.resolve(strict=True) / "compiled" / _processor()
        for path in (directory.parent, directory):
            path.mkdir(mode=0o700, exist_ok=True)
        directory = directory.resolve(strict=True)  # the target of a link, so that changing the link has no effect
        culprit = writable_by_others(directory)
    except (OSError, RuntimeError):  # RuntimeError: a cycle of links, or no home directory
        return
    if culprit is not None:
        print(
            f"compiled programs are not cached: other users may write to {culprit}, and could run code through the "
            "cache; remove it, make it writable by you alone, or choose another cache directory",
            file=sys.stderr,
        )
        return
    if not os.access(directory, os.W_OK | os.X_OK):
        return
    jax.config.update("jax_compilation_cache_dir", str(directory))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", MIN_SECONDS)
    if importlib.util.find_spec("filelock") is not None:  # needed by JAX to limit the size
        jax.config.update("jax_compilation_cache_max_size", MAX_BYTES)


def writable_by_others(directory: Path) -> Path | None:
    """Returns the part of a path through which another user could change the files in `directory`; None: there is none.

    Other users are all except this one and root. The directory must belong to the user, and it and its parents must be
    writable only by their owner or by the user's private group. A sticky parent such as /tmp is safe as well: others
    cannot rename its content.

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
    """Whether a group has only this user: the group of the user's name, which systems with umask 002 create."""
    try:
        name, found = pwd.getpwuid(os.geteuid()).pw_name, grp.getgrgid(group)
    except KeyError:  # an id without a name
        return False
    return found.gr_name == name and set(found.gr_mem) <= {name}


def _processor() -> str:
    """Returns 8 hex digits that identify the instruction set: machines of several kinds may share a home directory."""
    lines = {platform.machine()}
    try:
        known = Path("/proc/cpuinfo").read_text().splitlines()
        lines |= {line for line in known if line.startswith(("flags", "Features"))}
    except OSError:  # not Linux
        lines.add(platform.processor())
    return hashlib.sha256("\n".join(sorted(lines)).encode()).hexdigest()[:8]
