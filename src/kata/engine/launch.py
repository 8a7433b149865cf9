"""Starting an engine: the way in for every client.

Imported on every `run` and `start`: no asyncio, no subprocess, nothing that is not needed to get the engine
going.
"""

from __future__ import annotations

import errno
import marshal
import os
import time

from kata import launcher, paths, sysio
from kata.errors import AlreadyExistsError, HostError, JournalError, UsageError
from kata.journal import FILE_NAME, Journal
from kata.json_text import dumps

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any

    from kata.settings import SandboxSettings

    _Way = Callable[[str, SandboxSettings, dict[str, Any], Journal, tuple[int, ...]], int]
    """Directory, settings, these as plain values, journal and descriptors of an engine -> its pid, or 0."""

LISTEN_FD = 3
LIFETIME_FD = 4
SETTINGS_FD = 5
"""What an engine finds on its first descriptors: its listening socket, the reading end of a pipe whose other
end its launcher holds, its settings (marshal; reading JSON first would hold the start of the hypervisor up by 6
ms)."""

RELEASE_BYTE = b"r"
"""What the launcher writes to the pipe before it closes it on purpose: without it, the launcher has died."""

_OWN_FDS = 5
"""What of these an engine gets that is told its settings otherwise: all but the last."""

SOCKET_NAME = "engine.sock"
LOG_NAME = "engine.log"
SETTINGS_NAME = "sandbox.json"

_BACKLOG = 256
"""Connections that wait to be accepted: clients that do not wait themselves are turned away by a full queue."""
MIN_FILES = 256
"""Descriptors that an engine has to be able to open: a start takes about forty, each process some more."""
_MAX_FILES = 1 << 16


class Engine:
    """An engine that was started.

    Attributes:
        pid: Its process id.
        sock_path: Its socket; one may connect at once.
        run_dir: The sandbox's directory.
    """

    __slots__ = ("_lifetime", "pid", "run_dir", "sock_path")

    def __init__(self, pid: int, run_dir: str, lifetime: int) -> None:
        self.pid = pid
        self.run_dir = run_dir
        self.sock_path = os.path.join(run_dir, SOCKET_NAME)
        self._lifetime = sysio.Fd(lifetime)

    def release(self) -> None:
        """Let the engine live on its own. Until then it ends with this process, unless it has a
        container.
        """
        if self._lifetime.is_open:
            try:
                os.write(self._lifetime.raw, RELEASE_BYTE)
            except BrokenPipeError:
                pass  # it has ended
            self._lifetime.close()


class Lease:
    """What the lifetime pipe says of the client that started this engine: the reading end of `Engine.release`.

    Args:
        fd: The pipe's reading end.

    Attributes:
        HELD: The client still answers for the engine.
        RELEASED: It has released it on purpose: the engine lives on its own.
        BROKEN: It died before that, so nobody was ever told of this engine.
        state: Which of these it was at the last look.
    """

    HELD = "held"
    RELEASED = "released"
    BROKEN = "broken"

    __slots__ = ("_fd", "state")

    def __init__(self, fd: int = LIFETIME_FD) -> None:
        self._fd = fd
        self.state = self.HELD

    def look(self) -> str:
        """Look again, without waiting. Once the client has gone, the answer no longer changes."""
        import select

        if self.state == self.HELD:
            poller = select.poll()
            poller.register(self._fd, select.POLLIN)  # POLLHUP is always reported
            if poller.poll(0):
                self.state = self.RELEASED if os.read(self._fd, 1) == RELEASE_BYTE else self.BROKEN
        return self.state


def check_id(sandbox_id: str) -> str:
    """*sandbox_id* itself, if it can be the name of a directory and of things in the guest.

    Raises:
        UsageError: It cannot.
    """
    if not paths.may_be_name(sandbox_id):
        raise UsageError(
            f"{sandbox_id!r} cannot be an id",
            f"use 1 to {paths.MAX_NAME} letters, digits, '_', '.', '-', beginning with a letter or digit",
        )
    return sandbox_id


def raise_file_limit() -> int:
    """Have this process, and the engines that it starts, open as many descriptors as they may (65536 at most).

    Called before anything is made.

    Returns:
        The soft limit before, for `restore_file_limit`.

    Raises:
        HostError: They may not open enough.
    """
    import resource

    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    limit = _MAX_FILES if hard == resource.RLIM_INFINITY else min(hard, _MAX_FILES)
    if limit < MIN_FILES:
        raise HostError(
            f"the limit of open files is {limit} here, and a sandbox needs {MIN_FILES}",
            "raise it in the shell ('ulimit -n 1024') or in the service that starts this (LimitNOFILE=1024)",
        )
    if soft != resource.RLIM_INFINITY and soft < limit:
        resource.setrlimit(resource.RLIMIT_NOFILE, (limit, hard))
    return soft


def restore_file_limit(soft: int) -> None:
    """Give this process the soft limit of open files that it had. What it has started meanwhile keeps its own."""
    import resource

    resource.setrlimit(resource.RLIMIT_NOFILE, (soft, resource.getrlimit(resource.RLIMIT_NOFILE)[1]))


def launch(
    settings: SandboxSettings, run_dir: str | None = None, name: str = "", patience_s: float = 0.0
) -> Engine:
    """Start the engine of a new sandbox and return at once; what goes wrong later, its Create call reports.

    Args:
        settings: The sandbox's.
        run_dir: Directory for run-time things, `kata.paths.run_dir` if None.
        name: Of the sandbox's directory there; empty is its id, which another client may have, too.
        patience_s: How long to wait for the end of an engine that the sandbox has already, for a client that
            knows that it must be ending.

    Returns:
        The engine. Its directory, socket and journal exist.

    Raises:
        AlreadyExistsError: The sandbox has an engine already.
        UsageError: The id, or the length of the socket's path.
        HostError: The engine could not be started, or may open too few files.
    """
    # The engine inherits the limit; a program that calls us keeps its own (select(2) ends at 1024).
    soft = raise_file_limit()
    try:
        return _launch(settings, run_dir, name, patience_s)
    finally:
        restore_file_limit(soft)


def _launch(settings: SandboxSettings, run_dir: str | None, name: str, patience_s: float) -> Engine:
    sandbox_id = check_id(settings.id)
    base = os.path.join(run_dir or paths.run_dir(), "sandboxes")
    name = check_id(name or sandbox_id)
    directory = os.path.join(base, name)
    sock_path = os.path.join(directory, SOCKET_NAME)
    if len(os.fsencode(sock_path)) > paths.MAX_SOCKET_PATH:
        raise UsageError(
            f"the path of the engine's socket is too long: {sock_path}", "set KATA_RUN_DIR to a shorter path"
        )
    settings.request_started_ns = settings.request_started_ns or time.monotonic_ns()
    journal = _make_directory(base, name, settings, patience_s)
    settings.launched_ns = time.monotonic_ns()
    try:
        listener = listen(sock_path, journal)
        try:
            plain = settings.to_plain()
            _write_settings(directory, plain)
            engine = _spawn(directory, listener, settings, plain, journal)
        finally:
            os.close(listener)
    except BaseException as error:
        from kata import journal_undo

        journal_undo.undo(journal)
        if isinstance(error, OSError):
            raise HostError(
                f"cannot start the engine of {sandbox_id}: {error.strerror}: {error.filename or directory}"
            ) from error
        raise
    journal.close()
    return engine


def _make_directory(base: str, name: str, settings: SandboxSettings, patience_s: float) -> Journal:
    sandbox_id = settings.id
    meta = {"client": settings.client.name, "id": sandbox_id}
    if settings.client.namespace:
        meta["namespace"] = settings.client.namespace
    try:
        return Journal.create_dir(base, name, meta)
    except AlreadyExistsError:
        # An engine that was killed leaves its directory; what it left is undone before the next one starts.
        _undo_dead_engine(os.path.join(base, name, FILE_NAME), sandbox_id, patience_s)
        return Journal.create_dir(base, name, meta)


def _undo_dead_engine(path: str, sandbox_id: str, patience_s: float) -> None:
    try:
        old = Journal.open(path)
    except JournalError:
        if os.path.lexists(path):
            raise
        return  # its engine has just ended, and took it away
    try:
        if not old.signal_owner(0, patience_s):
            raise AlreadyExistsError(f"sandbox {sandbox_id} is running already") from None
        from kata import journal_undo

        left = journal_undo.undo(old)
    finally:
        old.close()
    if left:
        raise HostError(f"sandbox {sandbox_id} left something behind: {left[0]}", "kata gc") from None


def listen(path: str, journal: Journal, *, packets: bool = False) -> int:
    """Listen on a unix socket of mode 0600.

    Args:
        path: Its path, of any length.
        journal: Of the sandbox to which it belongs.
        packets: It keeps the borders of messages (SOCK_SEQPACKET).

    Returns:
        The listening socket's descriptor.

    Raises:
        OSError: It cannot be made.
    """
    # `socket` costs 10 ms of imports around these three calls; `_socket` is what it wraps.
    import _socket

    entry = journal.begin("socket", path=path)
    kind = _socket.SOCK_SEQPACKET if packets else _socket.SOCK_STREAM
    sock = _socket.socket(_socket.AF_UNIX, kind | _socket.SOCK_CLOEXEC)
    # It is made with this mode but for the umask (net/unix/af_unix.c, unix_bind_bsd), so it is never open to others.
    # Changing the umask instead would change it for all threads of the caller.
    os.fchmod(sock.fileno(), 0o600)
    if len(os.fsencode(path)) <= paths.MAX_SOCKET_PATH:
        sock.bind(path)
    else:
        with sysio.SocketName(path) as name:
            sock.bind(name)
    os.chmod(path, 0o600)
    sock.listen(_BACKLOG)
    journal.commit(entry)
    return sock.detach()


def _write_settings(directory: str, settings: dict[str, Any]) -> None:
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC
    fd = os.open(os.path.join(directory, SETTINGS_NAME), flags, 0o600)
    try:
        sysio.write_all(fd, dumps(settings).encode())
    finally:
        os.close(fd)


def _take_waiting(
    directory: str,
    settings: SandboxSettings,
    plain: dict[str, Any],
    journal: Journal,
    fds: tuple[int, ...],
) -> int:
    """The pid of an engine that waited with a machine; 0 if there is none for this sandbox."""
    from kata.engine.factory import pool

    if pool.why_not(settings):
        return 0
    needs = pool.wanted(settings, plain)
    pid, plain["not_taken"] = pool.take(needs, environment(), plain, directory, fds[:_OWN_FDS])
    if pid:
        _transfer_ownership(journal, pid)
    return pid


def _spawn(
    directory: str, listener: int, settings: SandboxSettings, plain: dict[str, Any], journal: Journal
) -> Engine:
    """Have an engine for a sandbox: forked by the parent of engines, where there is one, or executed.

    Raises:
        OSError: It could not be executed.
    """
    log = os.open(
        os.path.join(directory, LOG_NAME), os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o600
    )
    null = os.open(os.devnull, os.O_RDWR | os.O_CLOEXEC)
    settings_fd = os.memfd_create("kata-settings")
    lifetime_read, lifetime_write = os.pipe()
    fds = (null, log, log, listener, lifetime_read, settings_fd)
    try:
        # Each way, the quickest first, either has an engine or leaves nothing; the last one is always there.
        for way in _ways(settings):
            os.ftruncate(settings_fd, 0)
            os.lseek(settings_fd, 0, os.SEEK_SET)
            sysio.write_all(settings_fd, marshal.dumps(plain))
            os.lseek(settings_fd, 0, os.SEEK_SET)
            pid = way(directory, settings, plain, journal, fds)
            if pid:
                return Engine(pid, directory, lifetime_write)
        raise OSError(errno.EIO, os.strerror(errno.EIO), directory)
    except BaseException:
        os.close(lifetime_write)
        raise
    finally:
        for fd in (log, null, settings_fd, lifetime_read):
            os.close(fd)


def _ways(settings: SandboxSettings) -> list[_Way]:
    """The ways to an engine that are wanted here."""
    ways: list[_Way] = [_execute]
    if os.environ.get("KATA_ENGINE_PARENT") or (settings.machine and settings.machine.engine_parent):
        from kata.engine import parent_client

        if parent_client.is_wanted(settings.machine):
            ways.insert(0, _fork_by_parent)
    if settings.machine is not None and settings.machine.hypervisor.pool:
        ways.insert(0, _take_waiting)
    return ways


def _fork_by_parent(
    directory: str,
    _settings: SandboxSettings,
    plain: dict[str, Any],
    journal: Journal,
    fds: tuple[int, ...],
) -> int:
    """The pid of an engine that was forked off the parent of engines; 0 if there is none to be had."""
    from kata.engine import parent_client

    try:
        run_dir = os.path.dirname(os.path.dirname(directory))
        pid, connection = parent_client.ask(run_dir, directory, environment(), fds)
        _transfer_ownership(journal, pid)
        parent_client.go(connection)
        return pid
    except parent_client.Unavailable as error:
        plain["not_forked"] = f"the engine was executed: {error}"
        return 0


def _execute(
    directory: str,
    _settings: SandboxSettings,
    _plain: dict[str, Any],
    journal: Journal,
    fds: tuple[int, ...],
) -> int:
    """The pid of an engine that was executed.

    Raises:
        OSError: It could not be.
    """
    exec_status_read, exec_status_write = map(sysio.Fd, os.pipe())
    status = b""
    argv = [*launcher.command(), "engine", directory]
    try:
        child = os.fork()
        if child == 0:
            _become_engine(argv, fds, exec_status_write.raw)
        exec_status_write.close()
        os.waitpid(child, 0)
        while piece := sysio.read_exec_status(exec_status_read.raw):
            if not status:
                _transfer_ownership(journal, int(piece.split()[0]))
            status += piece
    except TimeoutError:
        if status:  # it has not ended, so its number is nobody else's
            os.kill(int(status.split()[0]), sysio.SIGKILL)
        raise
    finally:
        exec_status_read.close()
        exec_status_write.close()
    pid, _, failure = status.decode().partition(" ")
    if failure or not pid:
        number = int(failure or errno.EIO)
        raise OSError(number, os.strerror(number), argv[0])
    return int(pid)


def _transfer_ownership(journal: Journal, pid: int) -> None:
    """Name the engine as the owner in the sandbox's journal, for those who look whether it still lives."""
    try:
        journal.set_owner(pid)
    except ProcessLookupError:
        pass  # it has ended, and we still answer


def _become_engine(argv: list[str], fds: tuple[int, ...], exec_status_fd: int) -> None:
    """In the child: detach from the launcher and execute. Never returns.

    Forked twice, so that the engine belongs to init and no client has to reap it; in a session of its own, so
    that neither Ctrl-C nor the end of a terminal reaches it.
    """
    report = exec_status_fd
    try:
        os.setsid()
        if os.fork():
            os._exit(0)
        os.write(exec_status_fd, str(os.getpid()).encode())
        report = sysio.dup_above(exec_status_fd, len(fds))
        sysio.take_descriptors(fds, report)
        os.chdir("/")
        os.umask(0o077)
        sysio.reset_signals()
        os.execve(argv[0], argv, environment())
    except OSError as error:
        os.write(report, f" {error.errno or errno.EIO}".encode())
    finally:
        os._exit(1)


def environment() -> dict[str, str]:
    """Only what says where things live: a client's environment may hold secrets and strange settings."""
    kept = {
        key: value
        for key, value in os.environ.items()
        if key.startswith(("KATA_", "OTEL_")) or key == "TRACEPARENT"
    }
    return {
        "PATH": "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin",
        "LC_ALL": "C.UTF-8",
        **kept,
    }
