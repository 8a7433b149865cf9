"""The cached erofs images of snapshots: one for each stack of read-only layers that a root file system is made of.

Below ``$KATA_STATE_DIR/layers``:

``<key>.erofs``
    The image, which appears whole or not at all.
``<key>.json``
    What it was made of: ``layers``, each with its path and identity. Written before the image.
``<key>.erofs.lock``
    Held while a process makes it.

The key is a digest of the layers' identities: path, inode number, time of birth and time of the last change of the
directory. A snapshotter never writes to a layer that others are built on, and numbers its directories without using a
number twice; a directory that was made anew, be it of the same name and inode, was born at another time. Where a file
system does not tell times of birth, nothing is cached.

An image may be removed at any time, for whoever uses it has it open. It is, once one of its layers is gone, and the
one that was used longest ago when all take more room than they may.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import tempfile

from kata import paths, sysio
from kata.errors import HostError, KataError, ResourceExhaustedError
from kata.storage import whole_file
from kata.storage.directories import Limits, Merged
from kata.storage.erofs import Writer

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Sequence
    from typing import Any

_VERSION = 1
"""Raised when images are written in another way: those of other versions are made anew."""
MOST_BYTES = 20 << 30
"""What all images may take, unless the configuration says otherwise."""
_FREE_SHARE = 10
"""An image is made only if a tenth of its file system stays free."""
OOM_SCORE = 1000
_NICE = 5


def directory() -> str:
    """Where they are."""
    return os.path.join(paths.state_dir(), "layers")


def path_of(key: str) -> str:
    """Path of the image with this key, whether it is there or not."""
    return os.path.join(directory(), f"{key}.erofs")


def identify(layers: Sequence[str]) -> list[dict[str, Any]]:
    """What tells these directories from all others that there have been; empty where their file system cannot tell.

    Args:
        layers: Paths of directories, the highest first.

    Raises:
        OSError: One is not there.
    """
    found = []
    for layer in layers:
        path = os.path.realpath(layer, strict=True)
        status = os.stat(path)
        born_ns = sysio.birth_ns(path)
        if not born_ns:
            return []
        found.append({"path": path, "inode": status.st_ino, "born": born_ns, "changed": status.st_ctime_ns})
    return found


def key_of(identities: Sequence[dict[str, Any]]) -> str:
    """The key of an image made of what `identify` has returned."""
    text = json.dumps([_VERSION, list(identities)], sort_keys=True)
    return hashlib.sha256(text.encode("utf-8", "surrogateescape")).hexdigest()


def find(key: str) -> str:
    """The path of the image if it is there, and marks it as used; otherwise empty. Blocks for a moment."""
    path = path_of(key)
    try:
        if whole_file.is_whole(path):
            os.utime(path)
            return path
    except OSError:
        pass  # it has just been removed
    return ""


def make(layers: Sequence[str], most_bytes: int = MOST_BYTES) -> str:
    """Make the image of these layers, unless it is there or another process makes it, which is waited for.

    Args:
        layers: Paths of directories, the highest first.
        most_bytes: What all images together may take.

    Returns:
        Its path.

    Raises:
        ImageError: There is something in the layers that cannot be carried over, or too much.
        ResourceExhaustedError: There is no room for it.
        HostError: A layer cannot be read, or the image not be written.
    """
    try:
        identities = identify(layers)
        if not identities:
            raise HostError(
                "the layers' file system does not say when a directory was made",
                "Have the snapshotter's directory on ext4, xfs or btrfs (statx(2), btime).",
            )
        key = key_of(identities)
        path = path_of(key)
        paths.make_dirs(directory(), 0o700)
        with whole_file.alone(f"{path}.lock", lambda: None):
            if not find(key):
                sweep()
                _write(path, identities)
                if identify(layers) != identities:
                    _unlink(path)
                    raise HostError(
                        "a layer was exchanged while its image was made",
                        "Try again once its snapshot is whole.",
                    )
        _make_room(most_bytes, path)
    except OSError as error:
        raise HostError(
            f"the image of a snapshot cannot be made: {error}", "Is there room, and are its layers there?"
        ) from error
    return path


def _write(path: str, identities: Sequence[dict[str, Any]]) -> None:
    sysio.replace_file(
        path.removesuffix(".erofs") + ".json", json.dumps({"layers": list(identities)}).encode(), mode=0o600
    )
    room = os.statvfs(directory())
    free = room.f_bavail * room.f_frsize - room.f_blocks * room.f_frsize // _FREE_SHARE
    if free <= 0:
        raise ResourceExhaustedError(
            f"less than a tenth of the disk with {directory()} is free",
            "Free some (kata gc, kata rmi), or set KATA_STATE_DIR to a larger one.",
        )
    with contextlib.ExitStack() as opened:
        fd = opened.enter_context(whole_file.nameless(path))
        spool = opened.enter_context(tempfile.TemporaryFile(dir=directory()))
        layers = [
            opened.enter_context(sysio.Fd(os.open(one["path"], os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)))
            for one in identities
        ]
        writer = Writer(fd, spool.fileno())
        merged = Merged([layer.raw for layer in layers], writer, Limits(size=free))
        merged.read()
        writer.finish(merged.root, bytes.fromhex(os.path.basename(path)[:32]))
        os.fsync(fd)


def _names() -> list[str]:
    try:
        return sorted(os.listdir(directory()))
    except FileNotFoundError:
        return []


def _make_room(most_bytes: int, spare: str) -> list[str]:
    """Remove the images that were used longest ago, until the others take no more than they may; but not *spare*."""
    sizes = {}
    for name in _names():
        if name.endswith(".erofs"):
            with contextlib.suppress(FileNotFoundError):
                status = os.stat(os.path.join(directory(), name))
                sizes[status.st_mtime_ns, name] = sysio.disk_bytes(status)
    total = sum(sizes.values())
    removed = []
    for (_, name), size in sorted(sizes.items()):
        path = os.path.join(directory(), name)
        if total <= most_bytes or path == spare:
            continue
        _remove(path)
        removed.append(path)
        total -= size
    return removed


def sweep() -> list[str]:
    """Remove images of which a layer is gone, and what interrupted work has left.

    Returns:
        The paths of what was removed.

    Raises:
        HostError: Something cannot be removed.
    """
    removed = []
    try:
        names = _names()
        busy = {name.removesuffix(".erofs.lock") for name in names if name.endswith(".lock") and _held(name)}
        for name in names:
            key = name.partition(".")[0]
            path = os.path.join(directory(), name)
            if key in busy:
                continue
            if name.endswith(".erofs"):
                if not _layers_are_there(key):
                    _remove(path)
                    removed.append(path)
            elif not (name.endswith(".json") and f"{key}.erofs" in names):
                _unlink(path)
                removed.append(path)
    except OSError as error:
        raise HostError(f"cannot clean {directory()}: {error.strerror}", "run kata as root") from error
    return removed


def _held(lock: str) -> bool:
    try:
        fd = os.open(os.path.join(directory(), lock), os.O_RDWR | os.O_CLOEXEC)
    except FileNotFoundError:
        return False
    try:
        return not whole_file.try_lock(fd)
    finally:
        os.close(fd)


def _layers_are_there(key: str) -> bool:
    try:
        with open(os.path.join(directory(), f"{key}.json"), "rb") as file:
            described = json.load(file)["layers"]
        return bool(identify([one["path"] for one in described]) == described)
    except (OSError, ValueError, LookupError, TypeError):
        return False


def _remove(image: str) -> None:
    _unlink(image)
    _unlink(image.removesuffix(".erofs") + ".json")


def _unlink(path: str) -> None:
    with contextlib.suppress(FileNotFoundError):
        os.unlink(path)


def main(arguments: Sequence[str]) -> int:
    """The program that an engine starts to have an image made: ``layer-image MOST-BYTES LAYER...``.

    It is the first that the host's kernel ends for want of memory: without the image a container is slower.

    Returns:
        0 when the image is there; otherwise 1, with the reason on standard error.
    """
    import sys

    with contextlib.suppress(OSError):
        os.nice(_NICE)
        with open("/proc/self/oom_score_adj", "w", encoding="ascii") as file:
            file.write(str(OOM_SCORE))
    try:
        make(arguments[1:], int(arguments[0]))
    except KataError as error:
        sys.stderr.write(error.message)
        return 1
    return 0
