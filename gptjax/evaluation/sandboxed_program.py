"""Isolates itself and runs one Python program: the child process of `gptjax/evaluation/sandbox.py`.

It is started as a script, by `python -I -S`, and imports the standard library alone. Standard input has a line of JSON,
the settings, and then the program. Standard output gets one line of JSON, {"token": .., "reason": ..}: the token of the
settings shows that the program's last line was reached, or what was raised, so that a program that merely ends with
exit code 0 does not pass.

Isolation "namespaces": user (unless root), mount, process, network, IPC and host-name namespaces; the root is a new
directory with Python and /usr, read-only, and an empty /tmp of limited size. Isolation "landlock": where namespaces are
not available, such as in most containers; the kernel's Landlock denies all files but those, and seccomp signals to
other processes. In both, root becomes the user nobody, capabilities are dropped, and a seccomp filter denies sockets,
new process groups, shared memory, and system calls that change the system or other processes.
"""

import ctypes
import json
import os
import resource
import signal
import struct
import sys
from typing import Any, NoReturn

NOBODY = 65534
_NAMESPACES = {"user": 0x10000000, "mount": 0x20000, "pid": 0x20000000, "network": 0x40000000}
_IPC, _UTS = 0x8000000, 0x4000000
_ANY_NAMESPACE = sum(_NAMESPACES.values()) | _IPC | _UTS | 0x2000000 | 0x80  # also cgroup and time
_MS_NOSUID, _MS_NODEV, _MS_BIND, _MS_REC, _MS_PRIVATE = 2, 4, 4096, 16384, 1 << 18
_PDEATHSIG, _SECCOMP, _NO_NEW_PRIVS = 1, 22, 38  # of prctl
_SYS_MOUNT_SETATTR, _SYS_LANDLOCK_CREATE, _SYS_LANDLOCK_ADD, _SYS_LANDLOCK_RESTRICT = 442, 444, 445, 446

# AUDIT_ARCH of the machine, the numbers of clone and clone3, and of the denied system calls, in one order.
_NAMES = (
    *("socket", "io_uring_setup", "mount", "umount2", "unshare", "setns", "ptrace", "process_vm_readv"),
    *("process_vm_writev", "pidfd_getfd", "kexec_load", "bpf", "perf_event_open", "userfaultfd", "keyctl", "add_key"),
    *("request_key", "init_module", "finit_module", "delete_module", "setsid", "setpgid", "memfd_create", "shmget"),
    *("msgget", "semget", "mq_open", "chroot", "pivot_root", "swapon", "reboot", "open_by_handle_at"),
)
_SIGNALS = ("kill", "tkill", "tgkill", "pidfd_send_signal", "rt_sigqueueinfo", "rt_tgsigqueueinfo")
_MACHINES: dict[str, tuple[int, int, int, tuple[int, ...], tuple[int, ...]]] = {
    "x86_64": (
        0xC000003E,
        56,
        435,
        (
            *(41, 425, 165, 166, 272, 308, 101, 310, 311, 438, 246, 321, 298, 323, 250, 248),
            *(249, 175, 313, 176, 112, 109, 319, 29, 68, 64, 240, 161, 155, 167, 169, 304),
        ),
        (62, 200, 234, 424, 129, 297),
    ),
    "aarch64": (
        0xC00000B7,
        220,
        435,
        (
            *(198, 425, 40, 39, 97, 268, 117, 270, 271, 438, 104, 280, 241, 282, 219, 217),
            *(218, 105, 273, 106, 157, 154, 279, 194, 186, 190, 180, 51, 41, 224, 142, 265),
        ),
        (129, 130, 131, 424, 138, 240),
    ),
}

_libc = ctypes.CDLL(None, use_errno=True)


class SetupError(Exception):
    """A step of the isolation failed."""


def main() -> None:
    settings = json.loads(sys.stdin.buffer.readline())
    program = sys.stdin.buffer.read()
    result = os.dup(1)  # not inherited by programs that the program starts
    null = os.open("/dev/null", os.O_RDWR)
    for standard in range(3):
        os.dup2(null, standard)
    os.umask(0o022)

    def report(**fields: str) -> None:
        os.write(result, (json.dumps({"token": settings["token"], **fields}) + "\n").encode())

    try:
        _call("prctl", _PDEATHSIG, signal.SIGKILL, 0, 0, 0)
        with open("/proc/self/oom_score_adj", "w") as opened:
            opened.write("1000")  # the first to be killed where memory is short
        if settings["isolation"] == "namespaces":
            _unshare()
            if child := os.fork():  # the first process of the new process namespace, with which the others die
                _exit_as(child)
            _call("prctl", _PDEATHSIG, signal.SIGKILL, 0, 0, 0)
            _enter_root(settings["directory"], settings["limits"]["disk_bytes"])
        _restrict(settings)
    except (SetupError, OSError, ValueError) as error:
        report(setup=f"{type(error).__name__}: {error}")
        os._exit(1)
    if child := os.fork():
        _exit_as(child)
    # After the fork, which would fail if other programs of the user had started meanwhile: their processes count too.
    _limit("NPROC", settings["limits"]["processes"] + settings["others"])
    _limit("CPU", settings["limits"]["cpu_seconds"])  # of the program alone
    report(reason=_reason(program))
    os._exit(0)


def _reason(program: bytes) -> str:
    """Runs the program; returns what it raised, empty if nothing."""
    try:
        exec(compile(program, "program", "exec"), {"__name__": "__main__"})
    except BaseException as error:  # a program may raise anything, SystemExit included
        try:
            return f"{type(error).__name__}: {error}"[:200]
        except BaseException:
            return type(error).__name__
    return ""


def _exit_as(child: int) -> NoReturn:
    """Waits for a child and exits as it did."""
    while True:
        ended, status = os.wait()
        if ended == child:
            code = os.waitstatus_to_exitcode(status)
            os._exit(code if code >= 0 else 128 - code)


def _call(name: str, *arguments: Any) -> int:
    result: int = getattr(_libc, name)(*arguments)
    if result < 0:
        raise SetupError(f"{name}: {os.strerror(ctypes.get_errno())}")
    return result


# --- namespaces -------------------------------------------------------------------------------------------------------


def _unshare() -> None:
    """Enters new namespaces; without the rights of root, in a user namespace in which the user is called nobody."""
    own = _NAMESPACES["mount"] | _NAMESPACES["pid"] | _NAMESPACES["network"] | _IPC | _UTS
    if os.geteuid() == 0:  # which becomes nobody later: a limit of processes does not hold for root
        _call("unshare", own)
        return
    uid, gid = os.geteuid(), os.getegid()
    _call("unshare", own | _NAMESPACES["user"])
    for file, content in (
        ("setgroups", "deny"),
        ("uid_map", f"{NOBODY} {uid} 1"),
        ("gid_map", f"{NOBODY} {gid} 1"),
    ):
        with open(f"/proc/self/{file}", "w") as opened:
            opened.write(content)


def _enter_root(directory: str, disk_bytes: int) -> None:
    """Changes the root to a new one in `directory` and the working directory to its /tmp."""
    _mount(None, "/", None, _MS_REC | _MS_PRIVATE)
    _mount("tmpfs", directory, "tmpfs", _MS_NOSUID, "size=1m,mode=755")
    for path in readable():
        target = directory + path
        if os.path.isdir(path):
            os.makedirs(target)
        else:
            os.makedirs(os.path.dirname(target), exist_ok=True)
            os.close(os.open(target, os.O_CREAT))
        _mount(os.path.realpath(path), target, None, _MS_BIND | _MS_REC)
    os.mkdir(f"{directory}/tmp")
    # struct mount_attr: read-only and nosuid, for all mounts below
    attributes = ctypes.create_string_buffer(struct.pack("QQQQ", 1 | 2, 0, 0, 0), 32)
    _call("syscall", _SYS_MOUNT_SETATTR, -100, directory.encode(), 0x8000, attributes, ctypes.c_size_t(32))
    _mount("tmpfs", f"{directory}/tmp", "tmpfs", _MS_NOSUID | _MS_NODEV, f"size={disk_bytes},nr_inodes=4096,mode=1777")
    os.chroot(directory)
    os.chdir("/tmp")


def readable() -> list[str]:
    """The paths that a program may read: Python's files, shared libraries, and devices without content."""
    below = [path for path in ("/usr", "/lib", "/lib64") if os.path.isdir(path)]
    if not sys.base_prefix.startswith("/usr"):
        below.append(sys.base_prefix)
    return [*below, "/dev/null", "/dev/zero", "/dev/random", "/dev/urandom"]


def _mount(source: str | None, target: str, kind: str | None, flags: int, data: str = "") -> None:
    given = [None if text is None else text.encode() for text in (source, target, kind)]
    try:
        _call("mount", *given, ctypes.c_ulong(flags), data.encode())
    except SetupError as error:
        raise SetupError(f"{error}, of {target}") from None


# --- limits and rights ------------------------------------------------------------------------------------------------


def _restrict(settings: dict[str, Any]) -> None:
    limits, landlock = settings["limits"], settings["isolation"] == "landlock"
    if landlock:
        os.chdir(settings["directory"])
        os.environ["TMPDIR"] = settings["directory"]
    for name, limit in (
        ("AS", limits["memory_bytes"]),
        ("FSIZE", limits["file_bytes"]),
        ("NOFILE", limits["open_files"]),
        ("CORE", 0),
        ("MEMLOCK", 0),
    ):
        _limit(name, limit)
    _call("prctl", _NO_NEW_PRIVS, 1, 0, 0, 0)
    if landlock:
        _landlock(settings["directory"])
    if os.geteuid() == 0:
        os.setgroups([])
        os.setresgid(NOBODY, NOBODY, NOBODY)
        os.setresuid(NOBODY, NOBODY, NOBODY)
        _call("prctl", _PDEATHSIG, signal.SIGKILL, 0, 0, 0)  # a change of the user clears it
    if not os.access(os.__file__, os.R_OK):
        raise SetupError(f"{os.path.dirname(os.__file__)} is not readable for nobody: install Python elsewhere")
    header = ctypes.create_string_buffer(struct.pack("Ii", 0x20080522, 0), 8)
    _call("capset", header, ctypes.create_string_buffer(24))
    _deny_system_calls(signals=landlock)


def _limit(name: str, limit: int) -> None:
    number = getattr(resource, f"RLIMIT_{name}")
    hard = resource.getrlimit(number)[1]
    # At the soft limit of processor time SIGXCPU can be caught, at the hard one the kernel kills.
    wanted = (limit, limit + 1 if name == "CPU" else limit)
    resource.setrlimit(number, wanted if hard == resource.RLIM_INFINITY else (min(limit, hard), min(wanted[1], hard)))


def _landlock(directory: str) -> None:
    """Denies all files but those of `readable`, to read, and those of `directory`, and TCP (Linux 5.13; TCP: 6.7)."""
    version = _call("syscall", _SYS_LANDLOCK_CREATE, None, ctypes.c_size_t(0), 1)
    rights = (1 << {1: 13, 2: 14, 3: 15, 4: 15}.get(version, 16)) - 1
    fields = [rights, *([3] if version >= 4 else []), *([3] if version >= 6 else [])]  # files, TCP, signals and sockets
    content = struct.pack(f"{len(fields)}Q", *fields)
    attributes = ctypes.create_string_buffer(content, len(content))
    ruleset = _call("syscall", _SYS_LANDLOCK_CREATE, attributes, ctypes.c_size_t(len(content)), 0)
    read, device = 1 | 4 | 8, 2 | 4  # execute, read files and folders; read and write a file
    for path, allowed in [*((path, device if "/dev/" in path else read) for path in readable()), (directory, rights)]:
        file = os.open(path, os.O_PATH)
        rule = ctypes.create_string_buffer(struct.pack("=Qi", allowed, file), 12)
        _call("syscall", _SYS_LANDLOCK_ADD, ruleset, 1, rule, 0)
        os.close(file)
    _call("syscall", _SYS_LANDLOCK_RESTRICT, ruleset, 0)
    os.close(ruleset)


def _deny_system_calls(signals: bool) -> None:
    """Installs a seccomp filter; denied calls fail with EPERM, and clone3 with ENOSYS, as if it did not exist."""
    machine = os.uname().machine
    if machine not in _MACHINES:
        raise SetupError(f"programs can be isolated on {' and '.join(_MACHINES)} alone, not on {machine}")
    architecture, clone, clone3, denied, denied_signals = _MACHINES[machine]
    load, equal, at_least, any_bit, give = 0x20, 0x15, 0x35, 0x45, 0x06  # operations of classic BPF
    eperm, enosys, allow, kill = 0x00050000 | 1, 0x00050000 | 38, 0x7FFF0000, 0x80000000
    rules = [(load, 0, 0, 4), (equal, 1, 0, architecture), (give, 0, 0, kill), (load, 0, 0, 0)]
    rules += [(at_least, 0, 1, 0x40000000), (give, 0, 0, kill)]  # x32, whose calls have other numbers
    for number in (*denied, *(denied_signals if signals else ())):
        rules += [(equal, 0, 1, number), (give, 0, 0, eperm)]
    rules += [(equal, 0, 1, clone3), (give, 0, 0, enosys)]
    # The first argument of clone are its flags: no new namespaces.
    rules += [(equal, 0, 3, clone), (load, 0, 0, 16), (any_bit, 0, 1, _ANY_NAMESPACE), (give, 0, 0, eperm)]
    rules += [(give, 0, 0, allow)]
    code = b"".join(struct.pack("HBBI", *rule) for rule in rules)
    buffer = ctypes.create_string_buffer(code, len(code))
    program = ctypes.create_string_buffer(struct.pack("HxxxxxxQ", len(rules), ctypes.addressof(buffer)), 16)
    _call("prctl", _SECCOMP, 2, program, 0, 0)


if __name__ == "__main__":
    main()
