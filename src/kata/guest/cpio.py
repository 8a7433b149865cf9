"""Writes "newc" cpio archives, the format of Linux's initial root file system.

The same members always give the same bytes: times are zero, owners are root and inode numbers count up, so the
digest of an initrd says whether anything in it changed.

Source: Documentation/driver-api/early-userspace/buffer-format.rst in the Linux sources.
"""

from __future__ import annotations

import stat

from kata.errors import GuestAssetError

_MAGIC = b"070701"
_TRAILER = "TRAILER!!!"
_MAX_FILE = 0xFFFFFFFF
_BLOCK = 512


class Archive:
    """An archive that is built in memory; its members are in the order in which they were added."""

    __slots__ = ("_inode", "_names", "_parts")

    def __init__(self) -> None:
        self._parts: list[bytes] = []
        self._names: set[str] = set()
        self._inode = 0

    def directory(self, path: str, mode: int = 0o755) -> None:
        """Add a directory and whichever of its parents are missing.

        Args:
            path: Where it lies, relative to the root of the archive.
            mode: Permission bits.

        Raises:
            GuestAssetError: The path is not relative and plain, or was added before.
        """
        self._add(path, stat.S_IFDIR | mode)

    def file(self, path: str, data: bytes, mode: int = 0o644) -> None:
        """Add a regular file, and whichever of its parent directories are missing.

        Args:
            path: Where it lies, relative to the root of the archive.
            data: What it holds.
            mode: Permission bits.

        Raises:
            GuestAssetError: The path is not relative and plain or was added before, or the data is 4 GiB or more.
        """
        self._add(path, stat.S_IFREG | mode, data)

    def symlink(self, path: str, target: str) -> None:
        """Add a symbolic link.

        Args:
            path: Where it lies, relative to the root of the archive.
            target: What it points to, word for word.

        Raises:
            GuestAssetError: The path is not relative and plain, or was added before.
        """
        self._add(path, stat.S_IFLNK | 0o777, target.encode())

    def character_device(self, path: str, major: int, minor: int, mode: int = 0o600) -> None:
        """Add a character device node.

        Args:
            path: Where it lies, relative to the root of the archive.
            major: Major number.
            minor: Minor number.
            mode: Permission bits.

        Raises:
            GuestAssetError: The path is not relative and plain, or was added before.
        """
        self._add(path, stat.S_IFCHR | mode, device=(major, minor))

    def finish(self) -> bytes:
        """Return the complete archive: all members and the trailer, padded to a full block."""
        out = b"".join([*self._parts, _member(_TRAILER, 0, 0, b"", (0, 0))])
        return out + bytes(-len(out) % _BLOCK)

    def _add(self, path: str, mode: int, data: bytes = b"", device: tuple[int, int] = (0, 0)) -> None:
        steps = path.split("/")
        if any(step in ("", ".", "..") for step in steps) or "\0" in path or path == _TRAILER:
            raise GuestAssetError(f"cannot put {path!r} into an initrd: the path must be relative and plain")
        if path in self._names:
            raise GuestAssetError(f"cannot put {path!r} into an initrd twice")
        if len(data) > _MAX_FILE:
            raise GuestAssetError(f"cannot put {path!r} into an initrd: a member is limited to 4 GiB")
        # The kernel does not make parent directories; it silently drops a member without one.
        for depth in range(1, len(steps)):
            parent = "/".join(steps[:depth])
            if parent not in self._names:
                self._append(parent, stat.S_IFDIR | 0o755, b"", (0, 0))
        self._append(path, mode, data, device)

    def _append(self, path: str, mode: int, data: bytes, device: tuple[int, int]) -> None:
        self._inode += 1
        self._names.add(path)
        self._parts.append(_member(path, self._inode, mode, data, device))


def _member(path: str, inode: int, mode: int, data: bytes, device: tuple[int, int]) -> bytes:
    name = path.encode() + b"\0"
    links = 2 if stat.S_ISDIR(mode) else 1
    fields = (inode, mode, 0, 0, links, 0, len(data), 0, 0, *device, len(name), 0)
    head = _MAGIC + b"".join(b"%08X" % field for field in fields) + name
    return b"".join((head, bytes(-len(head) % 4), data, bytes(-len(data) % 4)))
