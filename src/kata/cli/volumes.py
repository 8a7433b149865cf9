"""Volumes with a name: file systems in files that outlive the containers that mount them.

A volume is a directory, ``$KATA_STATE_DIR/volumes/<name>``::

    volume.json   its labels, size, time of creation
    disk.img      an ext4 file system in a sparse file, a disk of the machine
    journal       what has to be undone to remove it

It is filled with what the image has at its place when it is first mounted, as with Docker. Two machines cannot mount
one disk at the same time, so a container with a volume that another one has mounted is not started.
"""

from __future__ import annotations

import os

from kata import paths
from kata.cli import on_disk, records, values
from kata.errors import AlreadyExistsError, JournalError, NotFoundError, StateError
from kata.journal import Journal

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

_RECORD = "volume.json"


def directory() -> str:
    """The directory of all volumes."""
    return os.path.join(paths.state_dir(), "volumes")


def disk(name: str) -> str:
    """Path of a volume's file."""
    return os.path.join(directory(), name, "disk.img")


def check_name(name: str, given: str) -> str:
    """Check a volume's name; see `values.name`.

    Args:
        name: The name.
        given: The option or argument as the user wrote it, for errors.
    """
    return values.name(name, f"{given}:", "volume", hint="; a directory here is ./NAME")


def locked(*, shared: bool = False) -> records.DirectoryLock:
    """The lock of all volumes; see `records.DirectoryLock`."""
    return records.DirectoryLock(directory(), shared=shared)


def load(name: str) -> dict[str, Any] | None:
    """A volume's record; None if there is none of that name."""
    return records.read_json(os.path.join(directory(), name, _RECORD)) or None


def find(name: str) -> dict[str, Any]:
    """A volume's record.

    Raises:
        NotFoundError: There is none of that name.
    """
    found = load(name) if paths.may_be_name(name) else None
    if found is None:
        raise NotFoundError(f"there is no volume {name!r}", "kata volume ls")
    return found


def everything() -> list[dict[str, Any]]:
    """The records of all volumes, by name."""
    try:
        names = sorted(os.listdir(directory()))
    except FileNotFoundError:
        return []
    return [found for name in names if (found := load(name)) is not None]


def ensure(name: str, size: int, *, labels: dict[str, str] | None = None, anonymous: bool = False) -> None:
    """Make a volume, unless there is one of that name. The caller holds the lock.

    Args:
        name: Its name, checked.
        size: Size of its file system in bytes; a volume that is there keeps its own.
        labels: Its labels.
        anonymous: The user gave it no name.

    Raises:
        KataError: It cannot be made.
    """
    from kata.storage import ext4

    if load(name) is not None:
        return
    meta = {"client": "kata", "kind": "volume", "id": name}
    try:
        journal = Journal.create_dir(directory(), name, meta)
    except AlreadyExistsError:
        # Who holds the lock is alone, so another process has died while it made or removed it.
        _clear(name)
        journal = Journal.create_dir(directory(), name, meta)
    try:
        ext4.make_writable(disk(name), size, "volume", "volume-opt=size")
        record = {
            "name": name,
            "created_at": records.now(),
            "labels": labels or {},
            "size": size,
            "anonymous": anonymous,
        }
        records.write_json(os.path.join(directory(), name, _RECORD), record)
        journal.retain(_RECORD)
        journal.close()
    except BaseException:
        from kata import journal_undo

        journal_undo.undo(journal)
        raise


def _clear(name: str) -> None:
    """Remove a volume, or what is left of one.

    Raises:
        JournalError: It could not be removed completely.
    """
    from kata import journal_undo

    failures = journal_undo.undo(Journal.open(os.path.join(directory(), name, "journal")))
    if failures:
        raise JournalError(f"the volume {name} could not be removed completely: {failures[0]}", "kata gc")


def users() -> dict[str, list[records.Container]]:
    """The containers that have each volume, by its name."""
    found: dict[str, list[records.Container]] = {}
    for container in records.all_containers():
        for name in names_of(container.record):
            found.setdefault(name, []).append(container)
    return found


def names_of(record: dict[str, Any]) -> list[str]:
    """The names of the volumes that a container has.

    Args:
        record: Its container.json.
    """
    return [one["volume"] for one in record.get("disk_volumes") or () if one.get("volume")]


def remove(name: str) -> int:
    """Remove a volume. The caller holds the lock.

    Returns:
        The bytes that it has taken on the host's disk.

    Raises:
        NotFoundError: There is none of that name.
        StateError: A container has it.
        JournalError: It could not be removed completely.
    """
    find(name)
    if holders := users().get(name):
        raise StateError(
            f"the volume {name} is in use by the container {holders[0].name}", f"kata rm {holders[0].name}"
        )
    freed = on_disk.taken([disk(name)])
    _clear(name)
    return freed


def check_free(container: records.Container) -> None:
    """Refuse to start a container whose volume another one has mounted. The caller holds the lock, until its engine has
    its run directory.

    Raises:
        StateError: It is mounted, or gone.
    """
    own = set(names_of(container.record))
    for name in own:
        if not os.path.exists(disk(name)):
            raise StateError(
                f"the volume {name} of container {container.name} is gone", f"kata rm {container.name}"
            )
    for other in records.all_containers():
        shared = own & set(names_of(other.record))
        if shared and other.id != container.id and os.path.isdir(paths.sandbox_dir(other.id)):
            raise StateError(
                f"the volume {min(shared)} is mounted by the container {other.name}, and one machine at a time can"
                " have it",
                f"kata stop {other.name}, or share a directory of the host with both: -v ./DIR:PATH",
            )
