"""The commands on a container that exists: start, state, kill, delete, pause, resume.

Podman executes them without PATH and HOME and waits for each, so this module imports what they need and no more;
`kata.oci_runtime.creation` has those that make something.
"""

from __future__ import annotations

import os
import sys

from kata.errors import HostError, KataError, NotFoundError, StateError, VMLostError
from kata.oci_runtime import records

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any, Protocol

    from kata.engine.client import EngineClient
    from kata.oci_runtime.global_options import GlobalOptions
    from kata.oci_runtime.records import Record

    class Arguments(Protocol):
        """What is read of a command line: of `kata.cli.args.Arguments`, or of `kata.oci_runtime.main.Plain`."""

        rest: list[str]

        def flag(self, key: str) -> bool: ...


ENGINE_SOCKET = "engine.sock"
CREATED, RUNNING, STOPPED, PAUSED = "created", "running", "stopped", "paused"
_STATUS = {1: CREATED, 2: RUNNING, 3: STOPPED, 4: PAUSED}
"""containerd.v1.types' Status, which the engine answers with."""
ASK_S = 10.0
"""How long an engine may take to answer what it knows by itself, in seconds."""
KILL_S, DELETE_S = 15.0, 30.0
"""How long it may take to kill a container, and to remove one, in seconds: it gives the guest less."""
TERM_S, GRACE_S, UNDO_S = 1.0, 0.5, 2.5
"""The same for an engine that does not: its own end, and that of what it left."""


def engine_of(record: Record) -> EngineClient:
    """A connection to the engine of a container.

    Raises:
        VMLostError: It has ended, and the container with it.
    """
    from kata.engine.client import EngineClient

    try:
        return EngineClient(os.path.join(record.sandbox, ENGINE_SOCKET))
    except (NotFoundError, HostError):
        raise VMLostError(
            f"container {record.id!r} is not running: its engine has ended",
            f"kata-runtime delete --force {record.id}",
        ) from None


def status_of(record: Record) -> str:
    """``creating``, ``created``, ``running``, ``paused`` or ``stopped``."""
    if not record.sandbox:
        return "creating"
    try:
        with engine_of(record) as engine:
            return _STATUS.get(engine.state(record.id, timeout=ASK_S).status, STOPPED)
    except (VMLostError, NotFoundError):
        return STOPPED


def state_of(record: Record) -> dict[str, Any]:
    """What ``state`` shows: the specification's members and runc's."""
    from kata.oci import OCI_VERSION

    status = status_of(record)
    return {
        "ociVersion": OCI_VERSION,
        "id": record.id,
        "pid": 0 if status == STOPPED else record.pid,
        "status": status,
        "bundle": record.bundle,
        "rootfs": record.rootfs,
        "created": record.created,
        "annotations": dict(record.annotations),
        "owner": "",
    }


def _state(arguments: Arguments, options: GlobalOptions) -> int:
    from kata.json_text import dumps

    record = records.require(options.state_root, arguments.rest[0])
    sys.stdout.write(dumps(state_of(record)) + "\n")
    return 0


def _start(arguments: Arguments, options: GlobalOptions) -> int:
    record = records.require(options.state_root, arguments.rest[0])
    with engine_of(record) as engine:
        engine.start(record.id)
    return 0


def _kill(arguments: Arguments, options: GlobalOptions) -> int:
    name = arguments.rest[1] if len(arguments.rest) > 1 else "15"
    if name.isdigit() and name.isascii() and int(name[:3]) <= 64:
        number = int(name)
    else:
        from kata.cli import signals

        number = signals.number(name)
    record = records.require(options.state_root, arguments.rest[0])
    if not number:  # it is only asked whether there is somebody, kill(2)
        if status_of(record) == STOPPED and not arguments.flag("all"):
            raise StateError(f"container not running: {record.id}", f"kata-runtime state {record.id}")
        return 0
    try:
        with engine_of(record) as engine:
            engine.kill(record.id, number, everything=arguments.flag("all"))
    except (NotFoundError, VMLostError) as error:
        if arguments.flag("all"):  # nobody is left to be signalled, as with runc
            return 0
        raise StateError(f"container not running: {record.id}", error.message) from None
    return 0


def _pause(arguments: Arguments, options: GlobalOptions) -> int:
    record = records.require(options.state_root, arguments.rest[0])
    with engine_of(record) as engine:
        engine.pause(record.id)
    return 0


def _resume(arguments: Arguments, options: GlobalOptions) -> int:
    record = records.require(options.state_root, arguments.rest[0])
    with engine_of(record) as engine:
        engine.resume(record.id)
    return 0


def _delete(arguments: Arguments, options: GlobalOptions) -> int:
    force = arguments.flag("force")
    root, container_id = options.state_root, arguments.rest[0]
    record = records.find(root, container_id)
    if record is None:
        if force:
            return 0
        raise NotFoundError(f"container {container_id!r} does not exist", "kata-runtime list")
    delete(root, record, force=force)
    return 0


def delete(root: str, record: Record, *, force: bool) -> None:
    """Remove a container, and its sandbox if it was the last one there.

    Args:
        root: The directory of all records.
        record: The container's.
        force: Kill it first, and do without an engine that does not answer.

    Raises:
        StateError: It runs, and is not to be killed.
        KataError: Something of it is left.
    """
    engine_left = bool(record.sandbox)
    try:
        if record.sandbox:
            with engine_of(record) as engine:
                _delete_in(engine, record, force=force, alone=not _is_shared(root, record))
                engine_left = False
    except VMLostError:
        pass  # its engine has ended
    except StateError:
        raise
    except KataError:
        if not force:
            raise
    if engine_left and not _is_shared(root, record):
        _undo(record)
    record.kill()
    record.remove()


def _delete_in(engine: EngineClient, record: Record, *, force: bool, alone: bool) -> None:
    from kata import sysio
    from kata.engine.client import TASK
    from kata.proto import task_pb
    from kata.proto.google_pb import Empty

    at_once = False
    try:
        status = _STATUS.get(engine.state(record.id, timeout=ASK_S).status, STOPPED)
        if status in (RUNNING, PAUSED):
            if not force:
                raise StateError(
                    f"cannot delete container {record.id} that is not stopped: {status}",
                    f"kata-runtime delete --force {record.id}",
                )
            try:
                engine.kill(record.id, sysio.SIGKILL, timeout=KILL_S)
            except NotFoundError:
                pass  # it has just ended
            engine.wait(record.id, timeout=KILL_S)
        engine.call(TASK, "Delete", task_pb.DeleteRequest(id=record.id), task_pb.DeleteResponse, DELETE_S)
    except NotFoundError:
        at_once = alone  # its `create` was killed, and the engine may still be making it
    # It ends if this was the last container.
    engine.call(TASK, "Shutdown", task_pb.ShutdownRequest(id=record.id, now=at_once), Empty, DELETE_S)


def _is_shared(root: str, record: Record) -> bool:
    return any(one.sandbox == record.sandbox and one.id != record.id for one in records.every(root))


def _undo(record: Record) -> None:
    """End an engine that does not answer, and undo what a dead one has left.

    Raises:
        HostError: Something could not be undone; the next attempt tries again.
    """
    from kata import journal_undo

    left = journal_undo.end_and_undo(record.sandbox, TERM_S, GRACE_S, UNDO_S)
    if left:
        raise HostError(f"container {record.id} left something behind: {left[0]}", "kata gc")


HANDLERS = {
    "state": _state,
    "start": _start,
    "kill": _kill,
    "delete": _delete,
    "pause": _pause,
    "resume": _resume,
}
