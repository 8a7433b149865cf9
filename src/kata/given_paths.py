"""Files at paths that a caller gives, where another user may write to one of the directories on the way.

Root is asked to write a log into a user's directory, or to read a bundle that is there. What the user puts in the place
of such a file must not lead to one that only root may write, and must not hold root up.

Source: path_resolution(7), and `fs.protected_symlinks` of proc(5), which does the same in directories such as ``/tmp``.
"""

from __future__ import annotations

import errno
import os
import stat

from kata import sysio

_MOST_LINKS = 40
"""How many symbolic links a path may lead through, as with the kernel."""
_DIRECTORY = os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC


def open_written(path: str, flags: int, mode: int) -> int:
    """Open a file for writing. A symbolic link is followed only if it is root's or this user's.

    A fifo that nobody reads is an error, and does not block.

    Args:
        path: The file.
        flags: O_* flags besides O_CLOEXEC and O_NONBLOCK.
        mode: Permission bits of a file that is made.

    Returns:
        A descriptor.

    Raises:
        OSError: It cannot be opened, or a link is another user's (ELOOP).
    """
    flags |= os.O_CLOEXEC | os.O_NONBLOCK
    parts = _parts(path)
    links = 0
    place = sysio.Fd(os.open("/" if path.startswith("/") else ".", _DIRECTORY))
    try:
        while parts:
            name = parts.pop(0)
            try:
                about = os.stat(name, dir_fd=place.raw, follow_symlinks=False)
            except FileNotFoundError:
                if parts:
                    raise
                return os.open(name, flags | os.O_NOFOLLOW, mode, dir_fd=place.raw)
            follows = 0
            if stat.S_ISLNK(about.st_mode):
                links += 1
                if about.st_uid not in (0, os.geteuid()) or links > _MOST_LINKS:
                    raise OSError(errno.ELOOP, os.strerror(errno.ELOOP), path)
                if not _is_the_kernels(place.raw):
                    target = os.readlink(name, dir_fd=place.raw)
                    parts[:0] = _parts(target)
                    if target.startswith("/"):
                        place = _instead(place, os.open("/", _DIRECTORY))
                    continue
                follows = os.O_NOFOLLOW  # what /dev/stderr leads to is no path
            # Another may stand there by now.
            if not parts:
                return os.open(name, flags | os.O_NOFOLLOW & ~follows, mode, dir_fd=place.raw)
            place = _instead(place, os.open(name, _DIRECTORY | os.O_NOFOLLOW & ~follows, dir_fd=place.raw))
        raise OSError(errno.EISDIR, os.strerror(errno.EISDIR), path)
    finally:
        place.close()


def _parts(path: str) -> list[str]:
    return [part for part in path.split("/") if part not in ("", ".")]


def _instead(place: sysio.Fd, fd: int) -> sysio.Fd:
    place.close()
    return sysio.Fd(fd)


def _is_the_kernels(directory: int) -> bool:
    """Whether the links of a directory are the kernel's own: in ``/proc``."""
    return os.fstat(directory).st_dev == os.stat("/proc").st_dev


def read(path: str, most: int) -> bytes:
    """Read a file, which is one: a fifo would wait for its writer, a device may do anything.

    Args:
        path: The file.
        most: How many bytes of it are wanted.

    Raises:
        OSError: It cannot be read, or is none.
    """
    fd = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC)
    with os.fdopen(fd, "rb") as file:
        if not stat.S_ISREG(os.fstat(fd).st_mode):
            raise OSError(errno.EINVAL, "it is no file", path)
        return file.read(most)
