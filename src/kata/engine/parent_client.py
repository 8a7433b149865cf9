"""The parent of engines (`kata.engine.parent`), for those who ask it for one, start it, or look after it.

Imported by starts where it is wanted: few imports.
"""

from __future__ import annotations

import marshal
import os
import sys

from kata import launcher, paths, sysio
from kata.errors import JournalError
from kata.journal import Journal, find

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from typing import Any

    from kata.settings import MachineSettings

COMMAND = "engine-parent"
VARIABLE = "KATA_ENGINE_PARENT"
"""Variable that says ``on`` or ``off`` instead of the configuration."""
PREFIX = "engines-"
SOCKET_NAME = "parent.sock"
ANSWER_S = 0.5
"""How long a client waits for an engine before it executes one: about as long as that takes on a busy host."""
GO = b"g"
REFUSED = b"!"
FORMAT = 1
MOST_BYTES = 1 << 17
"""Of a request: an environment, mostly."""
ROOM = "-" * 400
"""An argument of the parent's: an engine's command line is written over the parent's, and has to have room there."""
NAMESPACES = ("cgroup", "ipc", "mnt", "net", "pid", "time", "user", "uts")
SCHED_IDLE = 5
"""Of sched(7)."""
END_S = 2.0
"""How long one may take to end after SIGTERM, and again after SIGKILL."""
LOADING_S = 30.0
"""How long a parent may take to load what engines need: until then no other one is started."""


class Unavailable(Exception):
    """No engine could be had from a parent; the text says why, as a clause."""


# ---- the client's side ----


def is_wanted(machine: MachineSettings | None) -> bool:
    """Whether engines are to be forked off a parent: as the environment says, else the configuration.

    Not for an ordinary user, each of whose commands makes namespaces: a parent in these would serve nobody else.
    """
    said = os.environ.get(VARIABLE, "")
    if sysio.in_user_namespace():
        return False
    return said == "on" if said in ("on", "off") else machine is not None and machine.engine_parent


def ask(run_dir: str, directory: str, environment: dict[str, str], fds: Sequence[int]) -> tuple[int, Any]:
    """Have the parent fork an engine, which waits for `go`.

    Args:
        run_dir: See `kata.paths.run_dir`.
        directory: The sandbox's.
        environment: The engine's.
        fds: Its descriptors, from 0 on.

    Returns:
        Its pid, and the connection on which it waits.

    Raises:
        Unavailable: There is none; one is started for the next time if none answers at all.
    """
    import _socket

    where = os.path.join(run_dir, paths.FACTORY, name(), SOCKET_NAME)
    connection = _socket.socket(_socket.AF_UNIX, _socket.SOCK_SEQPACKET | _socket.SOCK_CLOEXEC)
    try:
        connection.settimeout(ANSWER_S)
        try:
            _connect(connection, where)
        except (FileNotFoundError, ConnectionRefusedError):
            if _is_loading(os.path.dirname(where)):
                raise Unavailable("its parent is being loaded") from None
            try:
                start(run_dir, environment)
            except OSError as error:
                raise Unavailable(f"its parent could not be started: {error.strerror}") from None
            raise Unavailable("its parent was not there, and is being started") from None
        if peer(connection)[1] != os.geteuid():
            raise Unavailable("its parent belongs to another user")
        request = marshal.dumps((FORMAT, program(), directory, environment))
        if len(request) > MOST_BYTES:
            raise Unavailable("the environment is too large to be sent to its parent")
        rights = b"".join(fd.to_bytes(4, sys.byteorder) for fd in fds)
        connection.sendmsg([request], [(_socket.SOL_SOCKET, _socket.SCM_RIGHTS, rights)])
        answer = connection.recv(256)
    except OSError as error:  # TimeoutError as well
        connection.close()
        raise Unavailable(f"its parent does not answer: {error.strerror or error}") from None
    except Unavailable:
        connection.close()
        raise
    if answer.isdigit():
        return int(answer), connection
    connection.close()
    if answer.startswith(REFUSED):
        raise Unavailable(f"its parent refused: {answer[1:].decode(errors='replace')}")
    raise Unavailable("its parent ended")


def go(connection: Any) -> None:
    """Let an engine begin that `ask` has returned.

    Raises:
        Unavailable: It has ended.
    """
    try:
        connection.send(GO)
    except OSError as error:
        raise Unavailable(f"it ended before it began: {error.strerror or error}") from None
    finally:
        connection.close()


def start(run_dir: str, environment: Mapping[str, str]) -> None:
    """Start a parent, and return at once. It has the lowest priority until it is ready.

    Args:
        run_dir: See `kata.paths.run_dir`.
        environment: The parent's.

    Raises:
        OSError: It could not be started.
    """
    argv = [*launcher.command(), COMMAND, run_dir, name(), ROOM]

    from kata import children

    def prepare() -> None:
        os.umask(0o077)
        os.sched_setscheduler(0, SCHED_IDLE, os.sched_param(0))

    with sysio.Fd(os.open(os.devnull, os.O_RDWR | os.O_CLOEXEC)) as null:
        children.in_background(argv, environment, (null.raw,) * 3, prepare)


def _is_loading(directory: str) -> bool:
    """Whether a parent has just begun: its directory is there, and its socket was not yet."""
    import time

    try:
        made = os.stat(directory).st_mtime
    except OSError:
        return False
    return 0 <= time.time() - made < LOADING_S and not os.path.lexists(os.path.join(directory, SOCKET_NAME))


def _connect(connection: Any, path: str) -> None:
    if len(os.fsencode(path)) <= paths.MAX_SOCKET_PATH:
        connection.connect(path)
        return
    with sysio.SocketName(path) as name:
        connection.connect(name)


def namespace(kind: str, pid: str = "self") -> int:
    """Inode of a namespace of a process; 0 where the kernel has none of that kind.

    Raises:
        OSError: There is no such process.
    """
    try:
        return sysio.namespace_inode(kind, pid)
    except FileNotFoundError:
        os.stat(f"/proc/{pid}/ns")
        return 0


def program() -> tuple[str, ...]:
    """What has to be the same in a parent and in who asks it: interpreter and package."""
    return (*launcher.command(), sys.version)


def name() -> str:
    """The name of the directory of this process's parent of engines. The parent checks the whole (`_identity`)."""
    import binascii

    words = [*program(), str(os.geteuid())]
    words += [str(namespace(kind)) for kind in NAMESPACES]
    return f"{PREFIX}{binascii.crc32(chr(0).join(words).encode()):08x}"


def peer(connection: Any) -> tuple[int, int]:
    """Pid and user of the process at the other end."""
    import _socket

    told = connection.getsockopt(_socket.SOL_SOCKET, _socket.SO_PEERCRED, 12)
    return int.from_bytes(told[:4], sys.byteorder), int.from_bytes(told[4:8], sys.byteorder)


# ---- for those who look after it ----


def listed(run_dir: str) -> list[dict[str, Any]]:
    """The parents that run: ``name``, ``pid``, ``memory`` (bytes that are theirs alone and shared ones, as PSS)."""
    found = []
    for path in find(os.path.join(run_dir, paths.FACTORY)):
        if not os.path.basename(os.path.dirname(path)).startswith(PREFIX):
            continue
        try:
            opened = Journal.open(path)
        except JournalError:
            continue
        if opened.owner is not None and opened.owner_alive():
            pid = int(opened.owner["pid"])
            found.append({"name": os.path.basename(os.path.dirname(path)), "pid": pid, "bytes": _pss(pid)})
        opened.close()
    return found


def _pss(pid: int) -> int:
    try:
        with open(f"/proc/{pid}/smaps_rollup", "rb") as file:
            return next((int(line.split()[1]) << 10 for line in file if line.startswith(b"Pss:")), 0)
    except OSError:
        return 0


def end_all(run_dir: str) -> list[str]:
    """End the parents that run. Engines that were forked off them go on.

    Returns:
        Their names.
    """
    from kata import journal_undo

    return [
        one["name"]
        for one in listed(run_dir)
        if journal_undo.end_and_undo(os.path.join(run_dir, paths.FACTORY, one["name"]), END_S, END_S)
        is not None
    ]
