"""Puts the read-only layers of an overlay, which are directories of the host, into one erofs file system.

The result is what overlayfs shows of them: the directories are merged, the highest first; a character device 0:0 hides
what lower layers have of its name; ``trusted.overlay.opaque`` on a directory hides all that lower layers have in it.
Neither is in the result. Layers with ``redirect`` or ``metacopy`` attributes are refused: nothing that makes layers for
containers turns these on.

Of every file all is kept that erofs can hold: type, mode, owner, time to the nanosecond, attributes (but ``trusted.*``,
which would control an overlay above), hard links, device numbers. Holes are holes again where they are long.

What is in a layer came from an image. No symbolic link in it is followed, and nothing but regular files is opened.

Source: Linux, ``Documentation/filesystems/overlayfs.rst``.
"""

from __future__ import annotations

import errno
import os
import stat

from kata import sysio
from kata.errors import HostError, ImageError
from kata.storage import erofs_format
from kata.storage.erofs import Node

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from kata.storage.erofs import Writer

_STEP = 1 << 20
_BENEATH = sysio.RESOLVE_BENEATH | sysio.RESOLVE_NO_SYMLINKS | sysio.RESOLVE_NO_MAGICLINKS
_OPAQUE = "trusted.overlay.opaque"
_REFUSED = ("trusted.overlay.redirect", "trusted.overlay.metacopy")
_MAX_ROOT_XATTRS = 2048
_CHANGED = "The layers of a snapshot do not change: something writes to them that should not."


class Limits:
    """Limits of one file system; exceeding one is an `ImageError`.

    Args:
        size: Bytes of all files, holes included.
        entries: Files and directories. Each takes some 700 bytes of memory while the file system is written.
    """

    def __init__(self, size: int = 64 << 30, entries: int = 1_000_000) -> None:
        self.size = size
        self.entries = entries


class Merged:
    """The merged tree of some directories.

    Args:
        layers: Descriptors of the directories, the highest first; the caller closes them.
        writer: Stores the contents of files.
        limits: Limits of the result.

    Attributes:
        root: The tree, after `read`.
    """

    def __init__(self, layers: Sequence[int], writer: Writer, limits: Limits | None = None) -> None:
        self.root = Node(stat.S_IFDIR | 0o755)
        self._layers = list(layers)
        self._writer = writer
        self._limits = limits or Limits()
        self._size = 0
        self._entries = 0
        self._linked: dict[tuple[int, int], Node] = {}

    def read(self) -> None:
        """Read everything.

        Raises:
            ImageError: The layers have something in them that cannot be carried over, or too much.
            HostError: They change while they are read.
            OSError: They cannot be read, or the output not be written.
        """
        todo: list[tuple[Node, str, list[int]]] = [(self.root, ".", self._layers)]
        while todo:
            node, path, layers = todo.pop()
            todo += self._directory(node, path, layers)

    def _directory(self, node: Node, path: str, layers: list[int]) -> list[tuple[Node, str, list[int]]]:
        """Read one directory of these layers; returns those that are in it."""
        hidden: set[str] = set()
        below: dict[str, list[int]] = {}
        first = True
        for layer in layers:
            with sysio.Fd(
                sysio.openat2(layer, path, os.O_RDONLY | os.O_DIRECTORY, resolve=_BENEATH)
            ) as directory:
                attributes = _attributes(directory.raw)
                if first:
                    self._describe(node, os.fstat(directory.raw), attributes)
                    first = False
                for name in os.listdir(directory.raw):
                    if name in hidden:
                        continue
                    status = os.stat(name, dir_fd=directory.raw, follow_symlinks=False)
                    if stat.S_ISDIR(status.st_mode):
                        below.setdefault(name, []).append(layer)
                        continue
                    hidden.add(name)
                    if name in below or (stat.S_ISCHR(status.st_mode) and status.st_rdev == 0):
                        continue
                    self._place(node, name, self._file(directory.raw, name, status))
                if attributes.get(_OPAQUE) == b"y":
                    break
        if path == "." and len(erofs_format.xattrs(node.xattrs or {})) > _MAX_ROOT_XATTRS:
            raise ImageError("the root directory has too many extended attributes", "")
        found = []
        for name, having in below.items():
            child = Node(stat.S_IFDIR | 0o755)
            self._count(0)
            self._place(node, name, child)
            found.append((child, name if path == "." else f"{path}/{name}", having))
        return found

    def _place(self, parent: Node, name: str, node: Node) -> None:
        assert parent.children is not None
        parent.children[os.fsencode(name)] = node
        node.nlink += 1

    def _file(self, directory: int, name: str, status: os.stat_result) -> Node:
        linked = (status.st_dev, status.st_ino) if status.st_nlink > 1 else None
        if linked is not None and linked in self._linked:
            return self._linked[linked]
        self._count(status.st_size)
        node = Node(status.st_mode)
        if stat.S_ISREG(status.st_mode):
            flags = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
            fd = os.open(name, flags, dir_fd=directory)
            try:
                # What is there is what was looked at: the name cannot have been given to something else meanwhile.
                if not os.path.samestat(os.fstat(fd), status):
                    raise HostError(
                        f"{name!r} in a snapshot's layer was replaced while it was read", _CHANGED
                    )
                self._describe(node, status, _attributes(fd))
                self._writer.store(node, status.st_size, _content(fd, status.st_size))
            finally:
                os.close(fd)
        else:
            path = f"/proc/self/fd/{directory}/{name}"
            self._describe(node, status, _attributes(path))
            if stat.S_ISLNK(status.st_mode):
                node.target = os.fsencode(os.readlink(name, dir_fd=directory))
            elif stat.S_ISCHR(status.st_mode) or stat.S_ISBLK(status.st_mode):
                node.device = erofs_format.device_number(os.major(status.st_rdev), os.minor(status.st_rdev))
        if linked is not None:
            self._linked[linked] = node
        return node

    def _describe(self, node: Node, status: os.stat_result, attributes: dict[str, bytes]) -> None:
        node.mode = status.st_mode
        node.uid = status.st_uid
        node.gid = status.st_gid
        node.mtime, node.mtime_ns = divmod(status.st_mtime_ns, 10**9)
        kept = {}
        for name, value in attributes.items():
            raw = os.fsencode(name)
            if not name.startswith("trusted.") and erofs_format.xattr_kept(raw):
                kept[raw] = value
        node.xattrs = kept or None

    def _count(self, size: int) -> None:
        self._entries += 1
        self._size += size
        if self._entries > self._limits.entries or self._size > self._limits.size:
            raise ImageError(
                f"the layers have more than {self._limits.entries} files, or {self._limits.size} bytes", ""
            )


def _attributes(file: int | str) -> dict[str, bytes]:
    """All extended attributes of a file, by its descriptor or path.

    Raises:
        ImageError: One of them means that the file is elsewhere.
    """
    try:
        names = os.listxattr(file) if isinstance(file, int) else os.listxattr(file, follow_symlinks=False)
    except OSError as error:
        if error.errno == errno.ENOTSUP:
            return {}
        raise
    found = {}
    for name in names:
        if name in _REFUSED:
            raise ImageError(f"a layer has files with {name}: they are not where they seem to be", "")
        found[name] = (
            os.getxattr(file, name)
            if isinstance(file, int)
            else os.getxattr(file, name, follow_symlinks=False)
        )
    return found


def _content(fd: int, size: int) -> Iterator[bytes]:
    left = size
    while left:
        piece = os.read(fd, min(left, _STEP))
        if not piece:
            raise HostError("a file in a snapshot's layer became shorter while it was read", _CHANGED)
        left -= len(piece)
        yield piece
