"""The warm pool: machines that went on from a template already, each with an engine, and wait for a sandbox.

Who waits is a process (`kata.engine.factory.waiting`) with a directory in `DIRECTORY`, and a socket in it. A launcher
that finds one for its sandbox hands over what an engine is started with; the first to connect has it. Both then
confirm: a launcher that gets no answer in time starts an engine as always, and who waited ends without the second
word.

A process that waits can stand for the engine that a launcher would start only if nothing differs that a process has
from its parent: namespaces, limits, user, capabilities, cgroup, environment. All that, and the machine's settings, are
in the name of its directory (`name_of`).

Only where the pool is on: not on other starts.
"""

from __future__ import annotations

import _socket
import fcntl
import marshal
import os

from kata import __version__, launcher, paths, sysio
from kata.engine.factory import pool_counts
from kata.engine.factory.template import hashed
from kata.errors import JournalError
from kata.journal import FILE_NAME

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence
    from typing import Any

    from kata.engine.factory.template import Template
    from kata.hypervisor.base import MachineShape
    from kata.hypervisor.protocols import Monitor
    from kata.settings import SandboxSettings

COMMAND = "wait-for-sandbox"
SOCKET_NAME = "take.sock"
TAKE, END, CONFIRM = b"take", b"end", b"go"
MOST = 64
PATIENCE_S = 1.0
"""How long each of the two waits for a word of the other's."""
_NAMESPACES = ("cgroup", "ipc", "mnt", "net", "pid", "time", "user", "uts")
_STATUS = (
    *(b"Uid:", b"Gid:", b"Groups:", b"CapInh:", b"CapPrm:", b"CapEff:", b"CapBnd:", b"CapAmb:"),
    *(b"NoNewPrivs:", b"Seccomp:", b"Cpus_allowed:", b"Mems_allowed:"),
)
_LIMITS = 16
"""``RLIM_NLIMITS`` of ``asm-generic/resource.h``."""
_VARIES = frozenset({"TRACEPARENT"})
"""Variables that are handed over."""
NONE = "none was waiting"
"""Why a start has none, where there was none at all."""
PLACEHOLDERS = 6
"""Descriptors that whoever waits keeps free: for those of an engine."""


def directory() -> str:
    """Where those who wait are."""
    return os.path.join(paths.run_dir(), paths.POOL)


def why_not(settings: SandboxSettings) -> str:
    """Why a sandbox's machine cannot come from the pool, as a clause; empty if it can."""
    if settings.machine is None or settings.pod is not None:
        return "pods are described after their engine's start"
    if settings.host_devices:
        return "it has devices of the host"
    if settings.machine.hypervisor.map_images and settings.image_path():
        return "its image is mapped, which a machine does from its start"
    network = settings.network
    if network.mode == "netns":
        return "" if network.model == "tcfilter" else f"its network is connected by {network.model}"
    if network.mode == "tap":
        return "its network is a tap of pasta's"
    if network.mode == "user":
        if network.endpoints:
            return "it is in a named network"
        if sysio.in_user_namespace():
            return "an ordinary user's network is made before its machine"
    return ""


def wanted(settings: SandboxSettings, plain: Mapping[str, Any]) -> str:
    """What a sandbox needs of one that waits, as text.

    Args:
        settings: The sandbox's.
        plain: The same, as plain values.
    """
    disks = [None if disk is None else disk.readonly for disk in settings.disks]
    has_tap = settings.network.mode == "netns"
    return repr((plain["machine"], disks, settings.all_disk_slots, has_tap, settings.needs_share()))


def name_of(needs: str, environment: Mapping[str, str], nice: int) -> str:
    """The beginning of the name of the directories of those who can be a sandbox's engine.

    Args:
        needs: See `wanted`.
        environment: Of engines.
        nice: Of engines.
    """
    import resource

    with open("/proc/self/status", "rb") as file:
        status = [line for line in file.read().split(b"\n") if line.startswith(_STATUS)]
    with open("/proc/self/cgroup", "rb") as file:
        cgroups = file.read()
    spaces = []
    for name in _NAMESPACES:
        try:
            spaces.append(os.readlink(f"/proc/self/ns/{name}"))
        except OSError:
            spaces.append("")  # this kernel has none of that kind
    limits = [resource.getrlimit(number) for number in range(_LIMITS)]
    code = os.stat(launcher.__file__)
    parts = (
        *(__version__, code.st_ino, code.st_mtime_ns, needs, nice),
        *(
            sorted(item for item in environment.items() if item[0] not in _VARIES),
            status,
            cgroups,
            spaces,
            limits,
        ),
    )
    return hashed(repr(parts).encode())


# ---- from a launcher ----


def take(
    needs: str,
    environment: Mapping[str, str],
    plain: Mapping[str, Any],
    place: str,
    fds: Sequence[int],
) -> tuple[int, str]:
    """Have one that waits become the engine of a sandbox.

    Args:
        needs: See `wanted`.
        environment: Of the engine.
        plain: The sandbox's settings.
        place: Its directory.
        fds: What an engine has as descriptors 0, 1 and so on, but for its settings.

    Returns:
        Its process, and 0 with the reason, as a clause, if there is none to be had.
    """
    base = directory()
    names = _names(base)
    if not names:
        return 0, NONE
    try:
        prefix = name_of(needs, environment, os.nice(0))
    except OSError as error:
        return 0, f"{error.filename} cannot be looked at: {error.strerror}"
    reason = ""
    for name in [name for name in names if name.startswith(prefix)][:MOST]:
        try:
            pid = _take(os.path.join(base, name, SOCKET_NAME), environment, plain, place, fds)
        except TimeoutError:
            reason = "the one that waited did not answer"
            continue
        except OSError:
            continue  # it is somebody else's by now, or has ended
        if pid:
            return pid, ""
    return 0, reason or _others(base, names, prefix)


def _others(base: str, names: Sequence[str], prefix: str) -> str:
    """Why there is none, as a clause, when none of these names begins so."""
    others = sum(
        os.path.exists(os.path.join(base, name, SOCKET_NAME))
        for name in names
        if not name.startswith(prefix)
    )
    return f"none was waiting that is like it ({others} of other kinds)" if others else NONE


def _take(
    path: str, environment: Mapping[str, str], plain: Mapping[str, Any], place: str, fds: Sequence[int]
) -> int:
    sock = _connect(path)
    try:
        order = os.memfd_create("kata-settings")
        try:
            sysio.write_all(order, marshal.dumps((place, dict(environment), dict(plain))))
            rights = b"".join(fd.to_bytes(4, "little") for fd in (*fds, order))
            sock.sendmsg([TAKE], [(_socket.SOL_SOCKET, _socket.SCM_RIGHTS, rights)])
        finally:
            os.close(order)
        answer = sock.recv(32)
        if not answer.isdigit():
            return 0
        sock.send(CONFIRM)
        return int(answer)
    finally:
        sock.close()


def _connect(path: str) -> _socket.socket:
    """Connect to one that waits.

    Raises:
        OSError: It waits no more.
    """
    sock = _socket.socket(_socket.AF_UNIX, _socket.SOCK_SEQPACKET | _socket.SOCK_CLOEXEC)
    try:
        sock.settimeout(PATIENCE_S)
        with sysio.SocketName(path) as name:
            sock.connect(name)
    except BaseException:
        sock.close()
        raise
    return sock


# ---- from an engine ----


def fill(
    needs: str,
    template: Template,
    monitor: Monitor,
    shape: MachineShape,
    most: int,
    free_mib: int,
    leave: Callable[[], object],
    nice: int | None = None,
    file_server: tuple[str, str] | None = None,
) -> None:
    """Start a process that waits with a machine, unless there are enough. Returns at once.

    Args:
        needs: See `wanted`.
        template: That of the machine, which is there.
        monitor: The hypervisor.
        shape: What the machine is.
        most: How many may wait.
        free_mib: MiB that the host has to have available, so that any waits.
        leave: Is called in the new process: takes it out of what is the caller's sandbox's.
        nice: Of an engine; None where the caller is one.
        file_server: What serves files of the host to such machines, if they have any: program, and what the guest may
            keep (`kata.hypervisor.virtiofsd.FileServer`).

    Raises:
        OSError: It could not be started.
    """
    plain = {name: getattr(shape, name) for name in shape.__slots__}
    order = marshal.dumps(
        (
            *(needs, template.root, template.key, monitor.name, {**plain, "options": dict(shape.options)}),
            *(most, free_mib, os.nice(0) if nice is None else nice, file_server),
        )
    )
    argv = [*launcher.command(), COMMAND]
    orders = os.memfd_create("kata-order")
    sysio.write_all(orders, order)
    os.lseek(orders, 0, os.SEEK_SET)

    from kata import children

    def prepare() -> None:
        leave()
        children.let_others_go_first()

    with sysio.Fd(orders), sysio.Fd(os.open(os.devnull, os.O_RDWR | os.O_CLOEXEC)) as null:
        children.in_background(argv, os.environ, (*(null.raw,) * PLACEHOLDERS, orders), prepare)


# ---- all of them ----


def lock() -> sysio.Fd | None:
    """The right to fill the pool, which one has at a time; None where another one has it."""
    base = directory()
    paths.make_dirs(base, 0o700)
    fd = sysio.Fd(os.open(f"{base}.lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600))
    try:
        fcntl.flock(fd.raw, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        fd.close()
        return None
    return fd


def listed() -> list[dict[str, Any]]:
    """Those who wait.

    Returns:
        Of each its ``name``, ``pid``, ``machine_pid`` (0 where it is not known), ``since`` (seconds since 1970) and
        ``bytes`` (what these and a file server take of the host's memory: proportional set size, and swap).
    """
    base, found = directory(), []
    for name in _names(base):
        path = os.path.join(base, name)
        try:
            since = os.stat(os.path.join(path, SOCKET_NAME)).st_mtime
            pid, others = _processes(path)
        except (OSError, JournalError):
            continue  # a sandbox has it, or it is ending
        if pid:
            taken = sum(map(_memory, (pid, *others)))
            machine = others[0] if others else 0
            found.append({"name": name, "pid": pid, "machine_pid": machine, "since": since, "bytes": taken})
    return found


def count_killed() -> None:
    """Count those who were killed while they waited; before what they have left is undone."""
    base, killed = directory(), 0
    for name in _names(base):
        path = os.path.join(base, name)
        try:
            os.stat(os.path.join(path, SOCKET_NAME))  # who is taken, or ends, takes it away first
            killed += not _processes(path)[0]
        except (OSError, JournalError):
            continue
    if killed:
        pool_counts.count(pool_counts.dropped(pool_counts.KILLED), killed)


def _names(base: str) -> list[str]:
    try:
        return sorted(os.listdir(base))
    except OSError:
        return []


def _processes(path: str) -> tuple[int, list[int]]:
    """Who owns a journal, 0 if nobody lives; and its other processes, the machine's first."""
    from kata.journal import Journal

    journal = Journal.open(os.path.join(path, FILE_NAME))
    try:
        owner = int((journal.owner or {}).get("pid", 0)) if journal.owner_alive() else 0
        others = [
            int((entry.identity or {}).get("pid", 0))
            for entry in journal.entries
            if entry.kind == "process" and not entry.gone
        ]
    finally:
        journal.close()
    return owner, others


def _memory(pid: int) -> int:
    try:
        with open(f"/proc/{pid}/smaps_rollup", "rb") as file:
            lines = [line.split() for line in file if line.startswith((b"Pss:", b"SwapPss:"))]
    except OSError:
        return 0
    return sum(int(words[1]) << 10 for words in lines)


def end(names: Sequence[str] | None = None) -> list[str]:
    """End those who wait, and return when they have ended.

    Args:
        names: Which; all if None.

    Returns:
        The names of those who are gone.
    """
    base, gone = directory(), []
    for one in listed():
        name = one["name"]
        if names is not None and name not in names:
            continue
        try:
            sock = _connect(os.path.join(base, name, SOCKET_NAME))
        except OSError:
            continue  # it is somebody's
        try:
            sock.settimeout(END_S)
            sock.send(END)
            sock.recv(1)  # the end of the connection
            gone.append(name)
        except OSError:
            continue
        finally:
            sock.close()
    return gone


END_S = 10.0
"""How long one may take to end with its machine."""
