"""What the OCI command line keeps of a container: one directory below ``--root`` with ``state.json`` in it.

It says where the container's engine is, so that ``kill``, ``state`` and ``delete`` find it without an environment.
Whether the container runs, the engine says; where there is none any more, the container has stopped.
"""

from __future__ import annotations

import os
import time

from kata import paths
from kata.errors import AlreadyExistsError, HostError, NotFoundError
from kata.json_text import dumps, loads

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Mapping
    from typing import Any

    from kata.sysio import Fd

_STATE = "state.json"
_SOCKET = "pid.sock"
_ID_CHARACTERS = paths.NAME_CHARACTERS | {"+"}
"""runc's."""
_MAX_BYTES = 1 << 20


class Record:
    """One container.

    Attributes:
        directory: Its directory below ``--root``.
        id: Its id.
        bundle: Its bundle's absolute path.
        rootfs: Its root directory's.
        created: When it was created, in RFC 3339's form.
        sandbox: The directory of the sandbox it is in, which has its engine's socket.
        pid: The process that stands for it; 0 while it is being made.
        started: The start time of that process, which with the pid names it (proc(5), field 22).
        annotations: Of its specification.
    """

    __slots__ = (
        "annotations",
        "bundle",
        "created",
        "directory",
        "id",
        "pid",
        "rootfs",
        "sandbox",
        "started",
    )

    def __init__(self, root: str, container_id: str) -> None:
        self.id = container_id
        self.directory = os.path.join(root, container_id)
        self.bundle = ""
        self.rootfs = ""
        self.created = ""
        self.sandbox = ""
        self.pid = 0
        self.started = 0
        self.annotations: Mapping[str, Any] = {}

    def reserve(self) -> Fd:
        """Make the directory: the id is taken from now on.

        Returns:
            The directory, locked (flock(2)). As long as that is open, `kata gc` leaves alone what is not recorded yet.

        Raises:
            AlreadyExistsError: It is taken.
            HostError: The directory cannot be made.
        """
        import fcntl

        from kata import paths, sysio

        self.created = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
        try:
            paths.make_dirs(os.path.dirname(self.directory), 0o700)
            os.mkdir(self.directory, 0o700)
            held = sysio.Fd(os.open(self.directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC))
            fcntl.flock(held.raw, fcntl.LOCK_EX)
            return held
        except FileExistsError:
            raise AlreadyExistsError(
                f"container with id exists: {self.id}", f"kata-runtime delete {self.id}"
            ) from None
        except OSError as error:
            raise HostError(f"cannot make {self.directory}: {error.strerror}", "--root DIR") from None

    def write(self) -> None:
        """Write what is known, as a whole."""
        from kata import sysio

        kept = {name: getattr(self, name) for name in self.__slots__ if name != "directory"}
        sysio.replace_file(os.path.join(self.directory, _STATE), dumps(kept).encode(), mode=0o600)

    def socket_path(self, exec_id: str = "") -> str:
        """Where the process that stands for the container, or for one of its execs, waits for the engine."""
        return os.path.join(self.directory, f"{exec_id}.sock" if exec_id else _SOCKET)

    def remove(self) -> None:
        """Remove the directory and what is in it."""
        try:
            for name in os.listdir(self.directory):
                os.unlink(os.path.join(self.directory, name))
            os.rmdir(self.directory)
        except FileNotFoundError:
            pass

    def kill(self) -> None:
        """Kill the process that stands for it, if it still lives."""
        if not self.pid:
            return
        from kata import sysio

        try:
            with sysio.Fd(sysio.pidfd_open(self.pid)) as process:
                if sysio.proc_starttime(self.pid) == self.started:
                    sysio.pidfd_send_signal(process.raw, sysio.SIGKILL)
        except ProcessLookupError:
            pass


def is_id(text: str) -> bool:
    """Whether a container may be called that: the name of a directory, in runc's characters."""
    return 0 < len(text) <= paths.MAX_NAME and _ID_CHARACTERS.issuperset(text) and text not in (".", "..")


def find(root: str, container_id: str) -> Record | None:
    """A container's record; None where there is no such container.

    Args:
        root: The directory of all of them.
        container_id: Its id.
    """
    record = Record(root, container_id)
    if not is_id(container_id):
        return None
    try:
        with open(os.path.join(record.directory, _STATE), "rb") as file:
            kept = loads(file.read(_MAX_BYTES))
    except FileNotFoundError:
        return record if os.path.isdir(record.directory) else None
    except (OSError, ValueError):
        return record
    for name in record.__slots__:
        if (
            isinstance(kept, dict)
            and name != "directory"
            and type(kept.get(name)) is type(getattr(record, name))
        ):
            setattr(record, name, kept[name])
    return record


def require(root: str, container_id: str) -> Record:
    """A container's record.

    Raises:
        NotFoundError: There is no such container.
    """
    record = find(root, container_id)
    if record is None:
        raise NotFoundError(f"container {container_id!r} does not exist", "kata-runtime list")
    return record


def every(root: str) -> list[Record]:
    """The records of all containers, by their ids."""
    try:
        names = sorted(os.listdir(root))
    except FileNotFoundError:
        return []
    found = (find(root, name) for name in names)
    return [record for record in found if record is not None]


def of_pid(root: str, pid: int) -> Record | None:
    """The container for which a process of the host stands."""
    return next((record for record in every(root) if record.pid == pid), None)
