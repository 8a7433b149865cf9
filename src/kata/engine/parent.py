"""The parent of engines: a process that has an engine's modules loaded, and forks engines that are ready.

An engine that is forked shares the pages of Python and of its modules with all others of the same parent, and begins
without the start of an interpreter and without imports. There is one parent for each combination of program, user and
namespaces (`parent_client.name`), in ``$KATA_RUN_DIR/factory/engines-HASH``, with a journal. The start of an engine
that finds none leaves one behind, if that is wanted (`parent_client.is_wanted`); it ends `IDLE_S` after its last
engine.

It is never needed: who cannot reach it, or is refused, or has no answer within `ANSWER_S`, executes an engine
(`kata.engine.launch`). And nothing needs it afterwards: an engine is forked twice, belongs to init, and has no
descriptor of the parent's.

A request is one message: a marshalled tuple (`parent_client.ask`) with the engine's descriptors. The answer is the new
engine's pid, for which the client then answers `GO`; an engine that does not get it ends before it has done anything.
Or it is `REFUSED` and the reason. Everything else is taken from the process that asks, as exec would pass it on
(`_inherit`). What cannot be taken over has to be the same in both (`_identity`).

Source: unix(7) (SO_PEERCRED, SCM_RIGHTS), proc(5), prctl(2) (PR_SET_MM), Python's documentation of `gc.freeze`.
"""

from __future__ import annotations

import errno
import gc
import marshal
import os
import signal
import sys

from kata import launcher, paths, sysio
from kata.engine import launch
from kata.engine.parent_client import (
    FORMAT,
    GO,
    MOST_BYTES,
    NAMESPACES,
    REFUSED,
    ROOM,
    SCHED_IDLE,
    SOCKET_NAME,
    namespace,
    peer,
    program,
)
from kata.errors import AlreadyExistsError, JournalError, KataError
from kata.journal import FILE_NAME, Journal

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

IDLE_S = 300.0
"""How long a parent stays after the last engine that was asked for."""
LOOK_S = 3.0
"""How often it looks whether its directory is still there."""
REQUEST_S = 0.2
"""How long a client has to send what it asks for, once it is connected."""
GO_S = 5.0
"""How long a new engine waits for its client's word."""
_FDS = 6
_STATUS = (
    *(b"Uid", b"Gid", b"Groups", b"NoNewPrivs", b"Seccomp", b"Seccomp_filters"),
    *(b"CapInh", b"CapPrm", b"CapEff", b"CapBnd", b"CapAmb"),
)
"""Lines of ``/proc/PID/status`` that have to be the same."""
_arguments = (0, 0)
"""Where the arguments of the process are that was executed (`_arguments_area`)."""
_PR_SET_MM = 35
_PR_SET_MM_ARG_END = 9


class _Told(BaseException):
    """SIGTERM has come."""


def main() -> bool:
    """The process that `start` starts. Where its program has changed, it executes itself anew.

    Returns:
        Whether this is an engine now: `sys.argv` and the descriptors are an engine's.
    """
    global _arguments
    run_dir, name = sys.argv[2:4]
    argv = [*launcher.command(), *sys.argv[1:4]]
    _arguments = _arguments_area()
    _show(argv)
    journal = _own_directory(os.path.join(run_dir, paths.FACTORY), name)
    if journal is None:
        return False
    gc.disable()  # nothing of this is garbage, and what looks for some writes to every object
    forked = stale = False
    try:
        signal.signal(signal.SIGTERM, _on_terminate)
        files = _load()
        path = os.path.join(os.path.dirname(journal.path), SOCKET_NAME)
        listener = launch.listen(path, journal, packets=True)
        gc.collect()
        gc.freeze()
        os.sched_setscheduler(0, os.SCHED_OTHER, os.sched_param(0))
        forked = _serve(listener, path, files)
        stale = not forked and _has_changed(files)
    except _Told:
        pass
    finally:
        if not forked:
            from kata import journal_undo

            signal.signal(signal.SIGTERM, signal.SIG_IGN)
            journal_undo.undo(journal)
    if stale:
        os.sched_setscheduler(0, SCHED_IDLE, os.sched_param(0))
        os.execv(argv[0], [*argv, ROOM])
    if forked:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGTERM})
        gc.enable()
    return forked


def _on_terminate(_number: int, _frame: object) -> None:
    raise _Told


def _own_directory(base: str, name: str) -> Journal | None:
    """Make the parent's directory; None if another one has it. What a dead one has left is undone."""
    meta = {"client": "factory", "id": name}
    for _ in range(2):
        try:
            return Journal.create_dir(base, name, meta)
        except AlreadyExistsError:
            try:
                old = Journal.open(os.path.join(base, name, FILE_NAME))
            except JournalError:
                continue
            try:
                if old.owner_alive():
                    return None
                from kata import journal_undo

                journal_undo.undo(old)
            finally:
                old.close()
        except KataError:
            return None
    return None


def _load() -> dict[bytes, tuple[int, int, int]]:
    """Import what an engine does, in its way.

    Returns:
        The files of which this process consists, and their state (`_state_of`).
    """
    sys.modules["ssl"] = None  # type: ignore[assignment]  # as `kata.engine.main` does
    from importlib import import_module

    from kata import deferred
    from kata.hypervisor import registry

    deferred.defer()
    deferred.defer_parts()
    for module in (*_MODULES, *registry.modules()):
        import_module(module)
    sysio.preload()
    sysio.boot_id()
    names = {sys.executable, __file__}
    for one in list(sys.modules.values()):
        path = getattr(one, "__dict__", {}).get("__file__")
        if path:
            names.add(path)
    # Copies of the names, since a look at them writes to them (reference counts), and each module's own name is on
    # another page, which would not be shared any more.
    return {os.fsencode(path): _state_of(path) for path in names}


_MODULES = (
    *("asyncio", "encodings.ascii", "fcntl", "functools", "marshal", "mmap", "resource"),
    *("select", "signal", "socket", "struct"),
    *("kata.engine.main", "kata.engine.lifecycle.boot", "kata.engine.lifecycle.sandbox"),
    *(
        "kata.engine.lifecycle.guest_clock",
        "kata.engine.lifecycle.guest_setup",
        "kata.engine.lifecycle.idle",
    ),
    *("kata.engine.lifecycle.teardown", "kata.engine.factory.template", "kata.engine.signals"),
    *("kata.engine.services.sandbox_service", "kata.engine.services.task_service"),
    *("kata.engine.services.management_socket", "kata.agent.clock", "kata.agent.dial"),
    *("kata.hypervisor.registry", "kata.hypervisor.channel", "kata.hypervisor.root"),
    *("kata.journal_undo", "kata.network.resolver"),
    *("kata.proto.oci_pb", "kata.proto.sandbox_pb", "kata.proto.task_pb", "kata.ttrpc.server"),
    *("kata.resources.host_cgroup", "kata.resources.oom_score", "kata.resources.systemd_scope"),
)
"""What every engine imports. The rest is imported by the engines that need it."""


def _state_of(path: str | bytes) -> tuple[int, int, int]:
    try:
        status = os.stat(path)
    except OSError:
        return (0, 0, 0)
    return status.st_ino, status.st_size, status.st_mtime_ns


def _has_changed(files: dict[bytes, tuple[int, int, int]]) -> bool:
    return any(_state_of(file) != state for file, state in files.items())


def _serve(listener: int, path: str, files: dict[bytes, tuple[int, int, int]]) -> bool:
    """Fork engines until it is time to end.

    Returns:
        Whether this is one of them.
    """
    import _socket
    import select
    import time

    mine = _identity("self")
    own = _state_of(path)
    server: Any = _socket.socket(fileno=listener)
    poller = select.poll()
    poller.register(listener, select.POLLIN)
    until = time.monotonic() + IDLE_S
    while time.monotonic() < until and _state_of(path)[0] == own[0] > 0:
        if not poller.poll(LOOK_S * 1000):
            continue
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
        try:
            connection = _socket.socket(fileno=server._accept()[0])
        except OSError:  # the client has gone, or no descriptor is free: it comes by itself
            signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGTERM})
            time.sleep(0.01)
            continue
        if _has_changed(files):
            _refuse(connection, "this program has changed since it was loaded")
            break
        if _answer(connection, mine):
            server.detach()  # the number belongs to a descriptor of the engine's now
            return True  # with SIGTERM still blocked: `main` first takes the handler away
        connection.close()
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGTERM})
        until = time.monotonic() + IDLE_S
    return False


def _refuse(connection: Any, reason: str) -> None:
    try:
        connection.send(REFUSED + reason.encode()[:200])
    except OSError:
        pass
    connection.close()


def _answer(connection: Any, mine: dict[str, object]) -> bool:
    """Handle one connection.

    Returns:
        Whether this process is the new engine.
    """
    pid, user = peer(connection)
    if user != os.geteuid():
        return False
    try:
        fds, request = _receive(connection)
    except (OSError, ValueError) as error:
        _refuse(connection, str(error))
        return False
    child = -1
    try:
        reason = _objection(pid, request, fds, mine)
        if reason:
            _refuse(connection, reason)
        else:
            child = os.fork()
    except OSError as error:
        _refuse(connection, str(error))
    if child == 0:
        try:
            os.setsid()
            if os.fork():
                os._exit(0)
            _become(connection, pid, request[2], request[3], fds)
        except BaseException:
            os._exit(1)  # the client has no answer, or one engine that has ended
        return True
    if child > 0:
        os.waitpid(child, 0)
    for fd in fds:
        os.close(fd)
    return False


def _objection(pid: int, request: object, fds: list[int], mine: dict[str, object]) -> str:
    """Why a request is refused; empty if it is not."""
    if not isinstance(request, tuple) or request[:2] != (FORMAT, program()) or len(fds) != _FDS:
        return "it is of another version"
    theirs = _identity(str(pid))
    differs = next((key for key in mine if theirs.get(key) != mine[key]), "")
    return f"it has another {differs} than who asks" if differs else ""


def _receive(connection: Any) -> tuple[list[int], Any]:
    import _socket

    connection.settimeout(REQUEST_S)
    data, ancillary, _flags, _address = connection.recvmsg(
        MOST_BYTES + 1, _socket.CMSG_LEN(4 * _FDS), _socket.MSG_CMSG_CLOEXEC
    )
    fds = []
    for level, kind, rights in ancillary:
        if level == _socket.SOL_SOCKET and kind == _socket.SCM_RIGHTS:
            fds += [
                int.from_bytes(rights[at : at + 4], sys.byteorder) for at in range(0, len(rights) & ~3, 4)
            ]
    try:
        return fds, marshal.loads(data)
    except (EOFError, ValueError, TypeError) as error:
        for fd in fds:
            os.close(fd)
        raise ValueError(f"the request makes no sense: {error}") from None


def _identity(pid: str) -> dict[str, object]:
    """What an engine cannot take over from another process, and has to share with it."""
    found: dict[str, object] = {}
    for kind in NAMESPACES:
        found[f"{kind} namespace"] = namespace(kind, pid)
    root = os.stat(f"/proc/{pid}/root")
    found["root directory"] = (root.st_dev, root.st_ino)
    for line in _read(f"/proc/{pid}/status").splitlines():
        key, _, value = line.partition(b":")
        if key in _STATUS:
            found[key.decode()] = value.split()
    for name in ("attr/current", "personality"):
        try:
            found[name] = _read(f"/proc/{pid}/{name}")
        except OSError as error:
            found[name] = error.errno
    return found


# ---- in the new engine ----


def _become(connection: Any, pid: int, directory: str, environment: dict[str, str], fds: list[int]) -> None:
    """Make an engine of this process, as `kata.engine.launch` does before it executes one. Ends the process if the
    client does not want it any more.
    """
    _inherit(pid)
    connection.settimeout(GO_S)
    connection.send(str(os.getpid()).encode())
    if connection.recv(1) != GO:
        os._exit(0)
    connection.close()
    sysio.take_descriptors(fds)
    os.chdir("/")
    os.umask(0o077)
    os.environ.clear()
    os.environ.update(environment)
    sys.argv = [sys.argv[0], "engine", directory]
    _show([*launcher.command(), "engine", directory])


def _inherit(pid: int) -> None:
    """Take from another process what exec would have passed on.

    Raises:
        OSError: It has ended, or that may not be done here.
    """
    import resource

    for number in range(16):  # RLIM_NLIMITS
        theirs = resource.prlimit(pid, number)
        if theirs != resource.getrlimit(number):
            resource.setrlimit(number, theirs)
    for name in ("oom_score_adj", "coredump_filter"):
        text = _read(f"/proc/{pid}/{name}")
        if text != _read(f"/proc/self/{name}"):
            value = text.strip().decode()
            sysio.write_existing(f"/proc/self/{name}", value if name == "oom_score_adj" else f"0x{value}")
    policy = os.sched_getscheduler(pid)
    if policy != os.sched_getscheduler(0):
        os.sched_setscheduler(0, policy, os.sched_getparam(pid))
    nice = os.getpriority(os.PRIO_PROCESS, pid)
    if nice != os.getpriority(os.PRIO_PROCESS, 0):
        os.setpriority(os.PRIO_PROCESS, 0, nice)
    processors = os.sched_getaffinity(pid)
    if processors != os.sched_getaffinity(0):
        os.sched_setaffinity(0, processors)
    if _read(f"/proc/{pid}/cgroup") != _read("/proc/self/cgroup"):
        from kata.resources import host_cgroup

        host_cgroup.join_cgroups_of(pid)


def _read(path: str) -> bytes:
    with open(path, "rb", 0) as file:
        return file.read()


def _arguments_area() -> tuple[int, int]:
    """Where this process's arguments are in its memory."""
    fields = _read("/proc/self/stat").rpartition(b") ")[2].split()
    return int(fields[45]), int(fields[46])  # arg_start and arg_end: 48 and 49 in proc(5)


def _show(argv: list[str]) -> None:
    """Have /proc/self/cmdline say what it would if this process had been executed; without CAP_SYS_RESOURCE, empty
    arguments follow.
    """
    wanted = b"".join(os.fsencode(word) + b"\0" for word in argv)
    begin, end = _arguments
    try:
        if len(wanted) > end - begin:
            sysio.set_command_line(os.getpid(), " ".join(argv))
            return
        memory = os.open("/proc/self/mem", os.O_RDWR | os.O_CLOEXEC)
        try:
            os.pwrite(memory, wanted + bytes(end - begin - len(wanted)), begin)
        finally:
            os.close(memory)
        sysio.prctl(_PR_SET_MM, _PR_SET_MM_ARG_END, begin + len(wanted))
    except OSError as error:
        if error.errno not in (errno.EPERM, errno.EACCES, errno.EINVAL):  # it is only for people
            raise
