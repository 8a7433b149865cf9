"""The cache of kernels: each has a directory of its own, which is made once and atomically."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import json
import os
import shutil
import time
from collections.abc import Callable, Iterator
from typing import Any

from kata import paths
from kata.errors import GuestAssetError, ResourceExhaustedError
from kata.guest.progress import Progress

KERNEL = "vmlinux"
RECORD = "kernel.json"
UNUSED_S = 60 * 86400
"""How long (in seconds) a kernel in the cache is kept after its last use."""
MODULES = "modules"


class Kernel:
    """A kernel in the cache.

    Args:
        directory: Directory of the kernel and its modules.
        record: Its record, see below.
        name: Name of its file in that directory.

    Attributes:
        directory: Directory of the kernel and its modules.
        path: The file that a hypervisor boots.
        record: Its properties: ``kind``, ``version``, ``release``, ``sha256``, ``size``, ``config_hash``,
            ``source_package``, ``boot`` (``pvh`` or ``bzimage``), and what its builder adds.
    """

    __slots__ = ("directory", "path", "record")

    def __init__(self, directory: str, record: dict[str, Any], name: str = KERNEL) -> None:
        self.directory = directory
        self.path = os.path.join(directory, name)
        self.record = record

    def modules(self) -> list[tuple[str, bytes]]:
        """Its modules in the order of loading, as returned by `kata.guest.modules.Tree.resolve`."""
        found = []
        for path in self.record.get("modules", []):
            with open(os.path.join(self.directory, MODULES, path), "rb") as file:
                found.append((path, file.read()))
        return found


def directory() -> str:
    """Directory of the cache."""
    return os.path.join(paths.cache_dir(), "kernels")


def find(key: str) -> Kernel | None:
    """The cached kernel with a key; None if it is missing or incomplete."""
    place = os.path.join(directory(), key)
    try:
        with open(os.path.join(place, RECORD), encoding="utf-8") as file:
            record = json.load(file)
        if os.stat(os.path.join(place, KERNEL)).st_size != record["size"]:
            return None
        os.utime(place)  # it is in use, so it must not be removed for its age
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return Kernel(place, record)


def obtain(key: str, progress: Progress, force: bool, make: Callable[[str], dict[str, Any]]) -> Kernel:
    """Return the kernel with a key, and make it if necessary. Of several concurrent callers only one makes it.

    Args:
        key: Identifies its sources; the name of its directory.
        progress: Reports waiting.
        force: Make it even if it exists.
        make: Called with an empty directory; writes the kernel there as ``vmlinux`` and returns its record without
            ``sha256`` and ``size``.

    Raises:
        GuestAssetError: It could not be made; nothing is left of the attempt.
        ResourceExhaustedError: There is not enough space in the cache.
    """
    paths.make_dirs(directory(), 0o755)
    with _locked(key, progress):
        kernel = None if force else find(key)
        if kernel is not None:
            return kernel
        _sweep()
        work = os.path.join(directory(), f".{key}.{os.getpid()}")
        place = os.path.join(directory(), key)
        try:
            os.mkdir(work)
            record = make(work)
            record["size"], record["sha256"] = digest(os.path.join(work, KERNEL))
            with open(os.path.join(work, RECORD), "w", encoding="utf-8") as file:
                json.dump(record, file, indent=1)
            shutil.rmtree(place, ignore_errors=True)
            os.rename(work, place)
        except OSError as error:
            if error.errno in (errno.ENOSPC, errno.EDQUOT):
                raise ResourceExhaustedError(
                    f"no space left in {paths.cache_dir()} to make a kernel",
                    "set KATA_CACHE_DIR to a larger disk",
                ) from None
            raise GuestAssetError(f"cannot make a kernel in {directory()}: {error}") from error
        finally:
            shutil.rmtree(work, ignore_errors=True)
        return Kernel(place, record)


def digest(path: str) -> tuple[int, str]:
    """Size and SHA-256 of a file."""
    with open(path, "rb") as file:
        return os.fstat(file.fileno()).st_size, hashlib.file_digest(file, "sha256").hexdigest()


@contextlib.contextmanager
def _locked(key: str, progress: Progress) -> Iterator[None]:
    path = os.path.join(directory(), f".{key}.lock")
    with lock_held(path, lambda: progress.note("another build of this kernel is going on; waiting for it")):
        yield


@contextlib.contextmanager
def lock_held(path: str, on_wait: Callable[[], None]) -> Iterator[None]:
    """Hold the lock of a build.

    Args:
        path: The lock's file. It is not removed: otherwise a third caller could lock a new file of the same name.
        on_wait: Called if somebody else holds it.
    """
    with open(path, "w", encoding="utf-8") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            on_wait()
            fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _sweep() -> None:
    """Remove leftovers of killed builds (work directories whose process is gone), and kernels unused for long."""
    for name in os.listdir(directory()):
        path = os.path.join(directory(), name)
        pid = name.rpartition(".")[2]
        if name.startswith("."):
            stale = pid.isdigit() and not os.path.exists(f"/proc/{pid}")
        else:
            stale = os.path.isdir(path) and time.time() - os.stat(path).st_mtime > UNUSED_S
        if stale:
            shutil.rmtree(path, ignore_errors=True)
