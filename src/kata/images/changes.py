"""Changes the image store: locks, atomic writing, removal, garbage collection."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import shutil
from contextlib import contextmanager
from typing import Any

from kata import paths, sysio
from kata.errors import HostError, NotFoundError, ResourceExhaustedError, StateError
from kata.images import store

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Collection, Iterator, Mapping


@contextmanager
def locked(name: str = "lock", *, shared: bool = False) -> Iterator[None]:
    """Hold one of the store's locks: ``lock`` to change the index, ``adding`` (shared) to add an image.

    Raises:
        HostError: The store's directory cannot be made or written.
    """
    try:
        paths.make_dirs(store.directory(), 0o700)
        fd = os.open(os.path.join(store.directory(), name), os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    except OSError as error:
        raise storage_error(error) from error
    try:
        fcntl.flock(fd, fcntl.LOCK_SH if shared else fcntl.LOCK_EX)
        yield
    finally:
        os.close(fd)


def storage_error(error: OSError) -> HostError:
    """Make our error for an operation below the state directory that failed."""
    what = "the image store cannot be written"
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        hint = f"free some space, `kata rmi` images or `kata gc`; KATA_STATE_DIR moves {paths.state_dir()}"
        return ResourceExhaustedError(f"{what}: no space left on the disk", hint)
    reason = error.strerror or str(error)
    if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
        hint = "run as root, or set KATA_STATE_DIR to a directory that you can write"
        return HostError(f"{what}: {error.filename or store.directory()}: {reason}", hint)
    return HostError(f"{what}: {reason}", f"check the disk that holds {store.directory()}")


def write_index(index: store.Index) -> None:
    """Replace ``index.json``; the caller has held the lock since before it read the index."""
    content = {"version": 1, "names": index.names, "digests": index.digests, "files": index.files}
    write_json(os.path.join(store.directory(), "index.json"), content)


def write_json(path: str, content: Any) -> None:
    """Replace a JSON file atomically: a reader sees the old content or the new, even after a crash.

    If the disk is full and the new content is no longer than the old, it is written over the old content, padded to the
    same length. Removing an image makes the index shorter, and has to work on a full disk since it frees space.

    Raises:
        HostError: It cannot be written.
    """
    data = json.dumps(content, sort_keys=True, separators=(",", ":")).encode()
    try:
        write_file(path, data)
    except ResourceExhaustedError:
        if not sysio.overwrite_file(path, data):
            raise


def write_file(path: str, data: bytes) -> None:
    """Replace a file atomically; a full disk is an error.

    Raises:
        HostError: It cannot be written.
    """
    try:
        paths.make_dirs(os.path.dirname(path), 0o700)
        sysio.replace_file(path, data, fsync=True)
    except OSError as error:
        raise storage_error(error) from error


def _unlink(path: str) -> None:
    try:
        os.unlink(path)
    except FileNotFoundError:
        pass


def remove(name_or_id: str, force: bool = False, in_use: Mapping[str, list[str]] | None = None) -> list[str]:
    """Remove a name of an image, and the image if it was its last name.

    Args:
        name_or_id: A name, or an id, which removes all names; if there are several, `force` is needed.
        force: Remove names even if containers use the image. Its data is then removed by `gc` after the containers.
        in_use: Names of the containers that use each image, by image id.

    Returns:
        The changes: ``Untagged: NAME`` and ``Deleted: ID``.

    Raises:
        NotFoundError: There is no such image.
        StateError: It is used, or has several names.
    """
    with locked():
        index = store.Index()
        image_id = store.find_id(name_or_id, index)
        if image_id is None:
            raise NotFoundError(f"there is no image {name_or_id}", "see `kata images`")
        names = index.names_of(image_id)
        name = store.canonical(name_or_id)
        gone = [name] if name in names else names
        if len(gone) > 1 and not force:
            hint = "remove its names one by one, or add --force"
            raise StateError(f"the image {name_or_id} has {len(names)} names: {', '.join(names)}", hint)
        users = (in_use or {}).get(image_id, [])
        last = len(gone) == len(names)
        if last and users and not force:
            more = f" and {len(users) - 1} more" if len(users) > 1 else ""
            raise StateError(
                f"the image {name_or_id} is used by the container {users[0]}{more}",
                f"kata rm {users[0]}, or add --force to remove only the name",
            )
        done = []
        for each in gone:
            del index.names[each]
            done.append(f"Untagged: {each}")
        if last and not users:
            _delete(image_id, index)
            done.append(f"Deleted: {image_id}")
        write_index(index)
        return done


def _delete(image_id: str, index: store.Index) -> None:
    """Remove an image's record and the files that no other image uses. The caller holds the lock and writes the
    index."""
    index.digests = {key: value for key, value in index.digests.items() if value != image_id}
    index.files = {key: value for key, value in index.files.items() if value["id"] != image_id}
    record = store.read_json(store.record_path(image_id))
    _unlink(store.record_path(image_id))
    if record is None:
        return
    others = _records()
    if all(other["chain"] != record["chain"] for other in others):
        _unlink(store.rootfs_path(record["chain"]))
    for digest in (record["id"], record["digest"]):
        if all(digest not in (other["id"], other["digest"]) for other in others):
            _unlink(store.blob_path(digest))


def _records() -> list[Any]:
    found = (store.read_json(store.record_path(image_id)) for image_id in store.ids())
    return [record for record in found if record is not None]


def gc(in_use: Collection[str] = ()) -> list[str]:
    """Remove images that have no name and are not used by a container, and leftovers of interrupted work.

    While another process adds an image, unfinished work is left alone.

    Args:
        in_use: Ids of the images that containers use.

    Returns:
        Paths and ids of what was removed.

    Raises:
        HostError: Something could not be removed.
    """
    done: list[str] = []
    if not os.path.isdir(store.directory()):
        return done
    with locked():
        index = store.Index()
        used = set(in_use) | {entry["id"] for entry in index.names.values()}
        for image_id in store.ids():
            if image_id not in used:
                _delete(image_id, index)
                done.append(image_id)
        if done:
            write_index(index)
        with _adding_stopped() as stopped:
            if stopped:
                done += _clear_unreferenced()
    return done


def _clear_unreferenced() -> list[str]:
    """Remove files that no record refers to."""
    done = []
    records = _records()
    kept = {store.rootfs_path(record["chain"]) for record in records}
    kept |= {store.blob_path(record[field]) for record in records for field in ("id", "digest")}
    kept |= {store.record_path(record["id"]) for record in records}
    for place in ("rootfs", "blobs/sha256", "records"):
        place = os.path.join(store.directory(), place)
        for name in sorted(os.listdir(place)) if os.path.isdir(place) else []:
            path = os.path.join(place, name)
            if path not in kept:
                _unlink(path)
                done.append(path)
    for name in sorted(os.listdir(store.directory())):
        path = os.path.join(store.directory(), name)
        if name == "pulls":
            shutil.rmtree(path, ignore_errors=True)
            done.append(path)
        elif name.endswith(".tmp"):
            _unlink(path)
            done.append(path)
    return done


@contextmanager
def _adding_stopped() -> Iterator[bool]:
    """Keep other processes from adding images; False if one is doing so."""
    path = os.path.join(store.directory(), "adding")
    try:
        fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    except OSError as error:
        raise storage_error(error) from error
    try:
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            yield False
        else:
            yield True
    finally:
        os.close(fd)
