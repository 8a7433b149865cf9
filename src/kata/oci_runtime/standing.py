"""Starts the process that stands for a container's on the host (`kata.oci_runtime.pid_process`)."""

from __future__ import annotations

import os
import sys

from kata import sysio
from kata.errors import HostError
from kata.oci_runtime.pid_process import ADOPTED, LET_GO

TYPE_CHECKING = False
if TYPE_CHECKING:
    import _socket
    from collections.abc import Callable, Mapping, Sequence
    from typing import Any, NoReturn

    from kata.oci_runtime.foreground import Foreground

_TIOCSCTTY = 0x540E
_READY = b"+"
"""What it says before it executes its program; a failure follows, if there is one."""


class Standing:
    """A process that was started; nobody has connected to it yet.

    Attributes:
        pid: Its number.
        path: The socket on which it waits for an engine.
        terminal: The other end of its terminal, where this process is that.
    """

    __slots__ = ("_life", "path", "pid", "terminal")

    def __init__(self, pid: int, path: str, life: int) -> None:
        self.pid = pid
        self.path = path
        self.terminal: Foreground | None = None
        self._life = sysio.Fd(life)

    def let_go(self) -> None:
        """Let it go on without this process, which has done all that it was asked for."""
        try:
            os.write(self._life.raw, LET_GO)
        except BrokenPipeError:
            pass  # it has ended
        self.abandon()

    def abandon(self) -> None:
        """Let it end, and what it stands for with it; nothing after `let_go`."""
        if not self._life.is_open:
            return
        self._life.close()
        try:
            os.unlink(self.path)
        except FileNotFoundError:
            pass


def start(
    path: str,
    network: str,
    streams: Sequence[int],
    *,
    terminal: bool,
    orphan: bool,
    own_mounts: bool,
) -> Standing:
    """Start such a process.

    Args:
        path: Where its socket is to be.
        network: Path of the network namespace in which it is; empty for a new one.
        streams: Three descriptors, which are to be its standard streams.
        terminal: They are the slave of a terminal, which becomes its controlling one.
        orphan: It does not stay this process's child: whoever adopts orphans (conmon) becomes its parent.
        own_mounts: It has a mount namespace of its own, for `take_root`.

    Returns:
        The process.

    Raises:
        HostError: It could not be started.
    """
    import _socket

    sysio.preload()
    sock = _socket.socket(_socket.AF_UNIX, _socket.SOCK_SEQPACKET | _socket.SOCK_CLOEXEC)
    status_read, status_write = map(sysio.Fd, os.pipe())
    life_read, life_write = map(sysio.Fd, os.pipe())
    number_read, number_write = map(sysio.Fd, os.pipe())
    try:
        os.fchmod(sock.fileno(), 0o600)
        with sysio.SocketName(path) as name:
            sock.bind(name)
        # Podman enters its PID namespace (``podman cp``), which an ordinary user may not do with the host's.
        own_pids = sysio.CLONE_NEWPID if sysio.in_user_namespace() else 0
        if own_pids and not orphan:
            sysio.adopt_orphans(True)
        child = os.fork()
        if child == 0:
            if orphan or own_pids:
                _leave_an_orphan(own_pids, number_write.raw)
            flags = sysio.CLONE_NEWNS if own_mounts else 0
            _become(sock, network, streams, terminal, flags, status_write.raw, life_read.raw)
        status_write.close()
        number_write.close()
        if orphan or own_pids:
            os.waitpid(child, 0)
            if not orphan:
                sysio.adopt_orphans(False)
            child = int(os.read(number_read.raw, 32) or b"0")
        status = b""
        while piece := os.read(status_read.raw, 256):
            status += piece
        if status != _READY or not child:
            failure = status.removeprefix(_READY).decode(errors="replace") or "it ended"
            raise HostError(f"cannot start the process that stands for the container: {failure}")
        if orphan:
            os.write(life_write.raw, ADOPTED)  # its parent is its monitor now
        return Standing(child, path, life_write.detach())
    except OSError as error:
        raise HostError(
            f"cannot start the process that stands for the container: {error.strerror}: {error.filename or path}"
        ) from error
    finally:
        sock.close()
        for end in (status_read, status_write, life_read, life_write, number_read, number_write):
            if end.is_open:
                end.close()


def _leave_an_orphan(flags: int, number: int) -> None:
    """In the child: fork the process that is to be that one, say its number, and end. Returns in that process."""
    try:
        if flags:
            sysio.unshare(flags)
        pid = os.fork()
        if pid:
            os.write(number, str(pid).encode())
            os._exit(0)
    except OSError:
        os._exit(1)


def _become(
    sock: _socket.socket,
    network: str,
    streams: Sequence[int],
    terminal: bool,
    flags: int,
    status_fd: int,
    life: int,
) -> NoReturn:
    """In the child: become that process."""
    import fcntl

    report = status_fd
    try:
        os.setsid()
        report = fcntl.fcntl(status_fd, fcntl.F_DUPFD_CLOEXEC, 10)
        sock.listen(1)  # by this process: its number is in the credentials of the connection
        if terminal:
            fcntl.ioctl(streams[0], _TIOCSCTTY, 0)
        moved = [fcntl.fcntl(fd, fcntl.F_DUPFD_CLOEXEC, 10) for fd in (*streams, sock.fileno(), life)]
        for number, fd in enumerate(moved):
            os.dup2(fd, number)
        sysio.close_on_exec_from(len(moved))
        if network:
            with sysio.Fd(os.open(network, os.O_RDONLY | os.O_CLOEXEC)) as namespace:
                sysio.setns(namespace.raw, sysio.CLONE_NEWNET)
        else:
            flags |= sysio.CLONE_NEWNET
        if flags:
            sysio.unshare(flags)
        if flags & sysio.CLONE_NEWNS:
            sysio.mount(None, "/", None, sysio.MS_SLAVE | sysio.MS_REC)
        os.chdir("/")
        sysio.reset_signals()
        os.write(report, _READY)
        sysio.keep_capabilities(())
        program = os.path.join(os.path.dirname(os.path.abspath(__file__)), "pid_process.py")
        argv = [sys.executable, "-I", "-S", program, *(["terminal"] if terminal else [])]
        os.execve(argv[0], argv, {})
    except OSError as error:
        os.write(report, f"{error.strerror}: {error.filename or 'set-up'}".encode())
    finally:
        os._exit(1)


def take_root(pid: int, rootfs: str, mounts: Sequence[Mapping[str, Any]]) -> None:
    """Give such a process the container's root directory, with the directories and files that are mounted there.

    Podman looks for a container's files in the mount namespace of this process, and writes there (``podman cp``): what
    it finds there must not be the host's. The process has loaded all of its program before.

    Args:
        pid: The process, which has a mount namespace of its own.
        rootfs: The root directory on the host.
        mounts: Of the specification; those that are no bind mounts are in the guest only.

    Raises:
        HostError: It cannot be done.
    """

    def enter() -> None:
        with sysio.Fd(os.open(f"/proc/{pid}/ns/mnt", os.O_RDONLY | os.O_CLOEXEC)) as namespace:
            sysio.setns(namespace.raw, sysio.CLONE_NEWNS)
        sysio.mount(rootfs, rootfs, None, sysio.MS_BIND | sysio.MS_REC)
        with sysio.Fd(os.open(rootfs, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)) as root:
            for one in mounts:
                _bind(root.raw, one)
        sysio.pivot_root(rootfs)

    _in_child(enter, "give the process that stands for the container its root directory")


def _bind(root: int, one: Mapping[str, Any]) -> None:
    options = one.get("options") or ()
    if one.get("type") != "bind" and not {"bind", "rbind"} & set(options):
        return
    recursive = sysio.MS_REC if "rbind" in options else 0
    try:
        target = _open_in(root, str(one.get("destination")))
    except OSError:
        return  # the guest makes what is missing where it mounts
    with sysio.Fd(target):
        source, place = str(one.get("source")), f"/proc/self/fd/{target}"
        sysio.mount(source, place, None, sysio.MS_BIND | recursive)
    if "ro" in options:  # of the mount, which the descriptor does not name
        with sysio.Fd(_open_in(root, str(one.get("destination")))) as mounted:
            place = f"/proc/self/fd/{mounted.raw}"
            sysio.mount(None, place, None, sysio.MS_REMOUNT | sysio.MS_BIND | sysio.MS_RDONLY)


def _open_in(root: int, path: str) -> int:
    return sysio.openat2(root, path, os.O_PATH, resolve=sysio.RESOLVE_IN_ROOT)


def _in_child(work: Callable[[], None], what: str) -> None:
    """Do something in a child: it may leave this process's namespaces.

    Raises:
        HostError: It failed, with the reason.
    """
    sysio.preload()
    reading, writing = map(sysio.Fd, os.pipe())
    with reading, writing:
        child = os.fork()
        if child == 0:
            try:
                work()
                os._exit(0)
            except OSError as error:
                os.write(writing.raw, f"{error.strerror}: {error.filename or ''}".encode()[:512])
            finally:
                os._exit(1)
        writing.close()
        failure = os.read(reading.raw, 512)
        _, status = os.waitpid(child, 0)
    if status:
        raise HostError(f"cannot {what}: {failure.decode(errors='replace').rstrip(': ') or 'it ended'}")
