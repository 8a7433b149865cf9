"""Makes erofs images that are whole or not there, by one process at a time."""

from __future__ import annotations

import fcntl
import os
import time
from contextlib import contextmanager

from kata.storage import erofs_format
from kata.storage.erofs import BLOCK

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

_POLL_S = 0.1


def is_whole(path: str) -> bool:
    """Whether the image exists with the length in its superblock at least: one that machines map is longer
    (`kata.hypervisor.mapped`). One that a power failure has cut short is removed.

    Raises:
        OSError: It cannot be read.
    """
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except FileNotFoundError:
        return False
    try:
        if 0 < erofs_format.size_of(os.pread(fd, BLOCK, 0)) <= os.fstat(fd).st_size:
            return True
    finally:
        os.close(fd)
    os.unlink(path)
    return False


def size_of(path: str) -> int:
    """The length of an image without what was added at its end, in bytes.

    Raises:
        OSError: It cannot be read.
    """
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        return erofs_format.size_of(os.pread(fd, BLOCK, 0))
    finally:
        os.close(fd)


@contextmanager
def alone(path: str, waiting: Callable[[], None]) -> Iterator[None]:
    """Let only one process at a time make the same image.

    Args:
        path: The lock's file, which is removed with the lock.
        waiting: Called from time to time while another process holds it.
    """
    while True:
        fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            while not try_lock(fd):
                waiting()
                time.sleep(_POLL_S)
            try:
                if os.stat(path).st_ino != os.fstat(fd).st_ino:
                    continue  # the previous holder removed the file while we waited
            except FileNotFoundError:
                continue
            try:
                yield
            finally:
                os.unlink(path)
            return
        finally:
            os.close(fd)


def try_lock(fd: int) -> bool:
    """Lock an open file for this process alone; False if another process holds it."""
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


@contextmanager
def nameless(path: str) -> Iterator[int]:
    """A file that gets its name when the block ends without an error."""
    directory = os.path.dirname(path)
    temporary = ""
    try:
        fd = os.open(directory, os.O_RDWR | os.O_TMPFILE | os.O_CLOEXEC, 0o400)
    except OSError:  # NFS, FUSE, old overlayfs: use a name that `gc` recognises as unfinished
        temporary = f"{path}.{os.getpid()}.tmp"
        fd = os.open(temporary, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o400)
    try:
        yield fd
        at = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            if temporary:
                os.replace(temporary, path)
            else:  # Python calls linkat, which can follow the link, only with a directory descriptor
                os.link(f"/proc/self/fd/{fd}", path, src_dir_fd=at, follow_symlinks=True)
            os.fsync(at)
        finally:
            os.close(at)
    except BaseException:
        if temporary:
            try:
                os.unlink(temporary)
            except FileNotFoundError:
                pass
        raise
    finally:
        os.close(fd)
