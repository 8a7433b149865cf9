"""Kernels in the cache: each in a directory of its own, made once, complete or not there at all."""

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
"""How long something in the cache is kept after its last use."""
MODULES = "modules"


class Kernel:
    """A kernel in the cache.

    Args:
        directory: Where it and its modules lie.
        record: What is known of it.
        name: Its file in that directory.

    Attributes:
        directory: Where it lies.
        path: The file that a hypervisor boots.
        record: What is known of it: ``kind``, ``version``, ``release``, ``sha256``, ``size``, ``config_hash``,
            ``source_package``, ``boot`` (``pvh`` or ``bzimage``), and what its builder adds.
    """

    __slots__ = ("directory", "path", "record")

    def __init__(self, directory: str, record: dict[str, Any], name: str = KERNEL) -> None:
        self.directory = directory
        self.path = os.path.join(directory, name)
        self.record = record

    def modules(self) -> list[tuple[str, bytes]]:
        """Its modules in the order of insertion, as `kata.guest.modules.Tree.resolve` gave them."""
        found = []
        for path in self.record.get("modules", []):
            with open(os.path.join(self.directory, MODULES, path), "rb") as file:
                found.append((path, file.read()))
        return found


def directory() -> str:
    """Where kernels are cached."""
    return os.path.join(paths.cache_dir(), "kernels")


def find(key: str) -> Kernel | None:
    """The cached kernel of a key, if it is there and whole."""
    place = os.path.join(directory(), key)
    try:
        with open(os.path.join(place, RECORD), encoding="utf-8") as file:
            record = json.load(file)
        if os.stat(os.path.join(place, KERNEL)).st_size != record["size"]:
            return None
        os.utime(place)  # it is in use: not one to be removed for its age
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return Kernel(place, record)


def obtain(key: str, progress: Progress, force: bool, make: Callable[[str], dict[str, Any]]) -> Kernel:
    """The kernel of a key, made if need be; of several callers at once only one makes it.

    Args:
        key: What it is made from, as a name for its directory.
        progress: Told about waiting.
        force: Make it although it is there.
        make: Called with an empty directory; leaves the kernel there as ``vmlinux`` and returns its record
            without ``sha256`` and ``size``.

    Raises:
        GuestAssetError: It could not be made; nothing is left of the attempt.
        ResourceExhaustedError: No room in the cache.
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
    # The lock file stays: removing it would let a third caller lock another file of the same name.
    with open(os.path.join(directory(), f".{key}.lock"), "w", encoding="utf-8") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            progress.note("another build of this kernel is going on; waiting for it")
            fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _sweep() -> None:
    """Remove what killed builds left (work directories whose process is gone), and kernels long unused."""
    for name in os.listdir(directory()):
        path = os.path.join(directory(), name)
        pid = name.rpartition(".")[2]
        if name.startswith("."):
            stale = pid.isdigit() and not os.path.exists(f"/proc/{pid}")
        else:
            stale = os.path.isdir(path) and time.time() - os.stat(path).st_mtime > UNUSED_S
        if stale:
            shutil.rmtree(path, ignore_errors=True)
