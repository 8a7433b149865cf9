"""Applies an image's layers, lowest first, to a tree that becomes an erofs image.

Other tools extract the layers of an image over each other into a directory. Here this happens in memory: no name, link
or device of an image ever exists on the host. Paths are resolved like in containerd's chroot-like root, but against our
tree:

* a name is cleaned lexically (``a/./b``, ``//a``, ``a/../b``); one that climbs out of the root is an error;
* a symbolic link as a *parent* of an entry is followed within the tree (``..`` stops at the root, absolute
  targets begin at the root), the last component is never followed;
* missing parents are made: root's, mode 0755, with the time of the entry that needed them;
* an entry replaces what is there, except that a directory over a directory keeps the children;
* ``.wh.NAME`` and ``.wh..wh..opq`` hide only what lower layers brought, wherever in the layer they stand;
* ``trusted.*`` and ``user.overlay.*`` attributes are dropped (they would control the guest's overlay), as are those for
  which erofs has no index; a character device 0:0, which overlayfs uses as a whiteout, is treated as one.

Sources: OCI image specification, ``layer.md``; containerd ``archive/tar.go``.
"""

from __future__ import annotations

import os
import stat

from kata.errors import ImageError
from kata.storage import erofs_format, layers_tar
from kata.storage.erofs import Node
from kata.storage.layers_codec import STEP, Stream

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import BinaryIO

    from kata.storage.erofs import Writer

_MAX_NAME = 255
_MAX_PATH = 4096
_MAX_LINKS = 40
_MAX_TARGET = 4095
_MAX_ROOT_XATTRS = 2048
_DROPPED_XATTRS = (b"trusted.", b"user.overlay.")
_WHITEOUT = b".wh."
_OPAQUE = b".wh..wh..opq"

_MOUNTED_FILES = (b"etc/hostname", b"etc/hosts", b"etc/resolv.conf")
_MOUNT_POINTS = (b"dev", b"etc", b"proc", b"sys", *_MOUNTED_FILES)

_TYPES = {
    layers_tar.FILE: stat.S_IFREG,
    layers_tar.SYMLINK: stat.S_IFLNK,
    layers_tar.CHAR: stat.S_IFCHR,
    layers_tar.BLOCK_DEVICE: stat.S_IFBLK,
    layers_tar.DIRECTORY: stat.S_IFDIR,
    layers_tar.FIFO: stat.S_IFIFO,
}

_MALFORMED = "the image is malformed; have it built again, or pull it from a source that you trust"


class Limits:
    """Limits of an image; exceeding one is an `ImageError`.

    Args:
        size: Bytes of uncompressed content in all layers, including holes; ``KATA_IMAGE_MAX_SIZE`` sets it.
        entries: Archive members in all layers; ``KATA_IMAGE_MAX_ENTRIES`` sets it. Each takes about 600 bytes of memory
            while the image is converted.
        names: Bytes of names, link targets and extended attributes in all layers.
        work: Steps along paths and through directories; an ordinary image needs a hundredth of it.
    """

    def __init__(
        self, size: int = 64 << 30, entries: int = 2_000_000, names: int = 512 << 20, work: int = 200_000_000
    ) -> None:
        self.size = size
        self.entries = entries
        self.names = names
        self.work = work


class LayerTree:
    """The merged tree of the layers applied so far.

    Args:
        writer: Stores the contents of files.
        limits: Limits of the image.
    """

    def __init__(self, writer: Writer, limits: Limits | None = None) -> None:
        self.root = Node(stat.S_IFDIR | 0o755)
        self._writer = writer
        self._limits = limits or Limits()
        self._size = 0
        self._entries = 0
        self._names = 0
        self._work = 0
        self._layer = ""
        self._touched: list[Node] = []
        self._last: tuple[list[bytes], Node] | None = None
        """Path and directory of the last entry; a cache. Adding entries does not change where a path leads."""

    def apply(self, source: BinaryIO, layer: str, tick: Callable[[int], None] | None = None) -> str:
        """Apply one layer on top.

        Args:
            source: The stored layer: tar, plain or compressed.
            layer: Its name in errors.
            tick: Called with the number of stored bytes consumed at each step, in another thread.

        Returns:
            The diff id: ``sha256:...`` of the uncompressed archive. The caller compares it.

        Raises:
            ImageError: The layer is malformed, hostile or too large.
            OSError: The image cannot be written, or the source not be read.
        """
        self._layer = layer
        limits = self._limits
        stream = Stream(source, limits.size + limits.names + 2048 * limits.entries, tick)
        try:
            reader = layers_tar.Reader(stream)
            name = b""
            try:
                while (entry := reader.next()) is not None:
                    name = entry.name
                    self._apply(entry, reader)
                while stream.skip(STEP):  # data after the end of the archive is part of the digest
                    pass
            except ImageError as error:
                where = f", entry {layers_tar.text(name)}" if name else ""
                raise ImageError(f"layer {layer}{where}: {error.message}", error.hint) from error.__cause__
            return stream.digest()
        finally:
            stream.close()
            for node in self._touched:
                node.fresh = None
            self._touched = []

    def add_mount_points(self) -> None:
        """Add the mount points of every container, unless the layers have something there.

        Docker adds the same names in a layer of its own. Without them the guest would make them at each start, in the
        container's writable layer. Existing names of any type are left alone, and so is everything below a parent that
        is a link or not a directory.
        """
        for path in _MOUNT_POINTS:
            *parents, name = path.split(b"/")
            node: Node | None = self.root
            for part in parents:
                node = node.children.get(part) if node is not None and node.children is not None else None
            if node is None or node.children is None or name in node.children:
                continue
            if path in _MOUNTED_FILES:
                new = Node(stat.S_IFREG | 0o644)
                self._writer.store(new, 0, ())
            else:
                new = Node(stat.S_IFDIR | 0o755)
            self._place(node, name, new)

    # ---- one entry ----

    def _apply(self, entry: layers_tar.Entry, reader: layers_tar.Reader) -> None:  # noqa: C901, PLR0912
        self._count(entry)
        parts = _clean(entry.name)
        if not parts:
            if entry.type != layers_tar.DIRECTORY:
                raise ImageError("the root of the file system is not a directory", _MALFORMED)
            self._describe(self.root, entry)
            if len(erofs_format.xattrs(self.root.xattrs or {})) > _MAX_ROOT_XATTRS:
                raise ImageError("the root directory has too many extended attributes", _MALFORMED)
            return
        name = parts.pop()
        if name.startswith(_WHITEOUT):
            self._whiteout(parts, name)
            return
        parent = self._directory(parts, entry)
        if entry.type == layers_tar.LINK:
            self._link(parent, name, entry)
            return
        if entry.type == layers_tar.CHAR and entry.major == entry.minor == 0:
            self._remove(parent, name)
            return
        assert parent.children is not None
        old = parent.children.get(name)
        if old is not None and old.children is not None and entry.type == layers_tar.DIRECTORY:
            self._describe(old, entry)
            self._mark(parent, name)
            return
        node = Node(_TYPES[entry.type])
        self._describe(node, entry)
        if entry.type == layers_tar.SYMLINK:
            if not 0 < len(entry.link) <= _MAX_TARGET:
                raise ImageError(f"a symbolic link's target has {len(entry.link)} bytes", _MALFORMED)
            node.target = entry.link
        elif entry.type in (layers_tar.CHAR, layers_tar.BLOCK_DEVICE):
            if not (0 <= entry.major < 1 << 12 and 0 <= entry.minor < 1 << 20):
                raise ImageError(f"the device number {entry.major}:{entry.minor} does not exist", _MALFORMED)
            node.device = erofs_format.device_number(entry.major, entry.minor)
        if old is not None:
            self._remove(parent, name)  # before the content is stored, so that its space is used again
        if entry.type == layers_tar.FILE:
            self._writer.store(node, entry.size, reader.pieces())
        self._place(parent, name, node)

    def _count(self, entry: layers_tar.Entry) -> None:
        limits = self._limits
        self._entries += 1
        if self._entries > limits.entries:
            raise ImageError(
                f"the image has more than {limits.entries} entries",
                "raise KATA_IMAGE_MAX_ENTRIES if you trust it",
            )
        self._size += entry.size
        if self._size > limits.size:
            raise ImageError(
                f"the image has more than {limits.size} bytes uncompressed",
                "raise KATA_IMAGE_MAX_SIZE if you trust it",
            )
        self._names += len(entry.name) + len(entry.link)
        if entry.xattrs:
            self._names += sum(len(key) + len(value) for key, value in entry.xattrs.items())
        if self._names > limits.names:
            raise ImageError(
                f"the image has more than {limits.names} bytes of names and attributes", _MALFORMED
            )

    def _describe(self, node: Node, entry: layers_tar.Entry) -> None:
        """Set a node's owner, mode, time and attributes from the entry."""
        if not (0 <= entry.uid < 0xFFFFFFFF and 0 <= entry.gid < 0xFFFFFFFF):
            raise ImageError(f"the owner {entry.uid}:{entry.gid} is not a user and group", _MALFORMED)
        if not -(1 << 63) <= entry.mtime < 1 << 63:
            raise ImageError("the modification time is out of range", _MALFORMED)
        mode = entry.mode & 0o7777
        node.mode = stat.S_IFMT(node.mode) | (0o777 if entry.type == layers_tar.SYMLINK else mode)
        node.uid = entry.uid
        node.gid = entry.gid
        node.mtime = entry.mtime
        node.mtime_ns = entry.mtime_ns
        node.xattrs = _attributes(entry.xattrs) if entry.xattrs else None

    def _link(self, parent: Node, name: bytes, entry: layers_tar.Entry) -> None:
        parts = _clean(entry.link)
        if not parts:
            raise ImageError("a hard link names the root directory", _MALFORMED)
        last = parts.pop()
        directory = self._find(parts)
        target = (
            directory.children.get(last)
            if directory is not None and directory.children is not None
            else None
        )
        if target is None:
            raise ImageError(
                f"its hard link target {layers_tar.text(entry.link)} does not exist", _MALFORMED
            )
        if target.children is not None:
            raise ImageError(
                f"its hard link target {layers_tar.text(entry.link)} is a directory", _MALFORMED
            )
        assert parent.children is not None
        if parent.children.get(name) is target:
            self._mark(parent, name)
            return
        self._remove(parent, name)
        self._place(parent, name, target)

    # ---- the tree ----

    def _directory(self, parts: list[bytes], entry: layers_tar.Entry) -> Node:
        """Return the directory of a path, following links, and make it if it is missing."""
        if self._last is not None and self._last[0] == parts:
            return self._last[1]
        node = self._walk(parts, entry)
        assert node is not None
        self._last = (parts, node)
        return node

    def _find(self, parts: list[bytes]) -> Node | None:
        """The directory of a path, or None."""
        return self._walk(parts, None)

    def _walk(self, parts: list[bytes], entry: layers_tar.Entry | None) -> Node | None:
        node = self.root
        above: list[Node] = []
        todo = parts[::-1]
        links = 0
        self._charge(len(todo))
        while todo:
            part = todo.pop()
            if part == b"..":
                node = above.pop() if above else node
                continue
            assert node.children is not None
            child = node.children.get(part)
            if child is None:
                if entry is None:
                    return None
                child = Node(stat.S_IFDIR | 0o755, 0, 0, entry.mtime, entry.mtime_ns)
                self._entries += 1
                self._place(node, part, child)
            elif child.target:
                links += 1
                if links > _MAX_LINKS:
                    raise ImageError("there are too many symbolic links on the way to it", _MALFORMED)
                if child.target.startswith(b"/"):
                    node = self.root
                    above = []
                steps = [step for step in child.target.split(b"/")[::-1] if step not in (b"", b".")]
                self._charge(len(steps))
                todo += steps
                continue
            elif child.children is None:
                if entry is None:
                    return None
                raise ImageError(f"its parent {layers_tar.text(part)} is not a directory", _MALFORMED)
            above.append(node)
            node = child
        return node

    def _charge(self, steps: int) -> None:
        self._work += steps
        if self._work > self._limits.work:
            raise ImageError("its paths, links and whiteouts are made to be slow", _MALFORMED)

    def _place(self, parent: Node, name: bytes, node: Node) -> None:
        if len(name) > _MAX_NAME:
            raise ImageError(f"a name has more than {_MAX_NAME} bytes", _MALFORMED)
        assert parent.children is not None
        parent.children[name] = node
        node.nlink += 1
        self._mark(parent, name)

    def _mark(self, parent: Node, name: bytes) -> None:
        """Record that the present layer has added this name, so that its own whiteouts do not apply to it."""
        if parent.fresh is None:
            parent.fresh = set()
            self._touched.append(parent)
        parent.fresh.add(name)

    def _remove(self, parent: Node, name: bytes) -> None:
        """Remove a name with all that is below it."""
        self._last = None
        assert parent.children is not None
        node = parent.children.pop(name, None)
        if parent.fresh is not None:
            parent.fresh.discard(name)
        waiting = [node] if node is not None else []
        while waiting:
            node = waiting.pop()
            if node.children is not None:
                waiting += node.children.values()
                node.children = {}
                continue
            node.nlink -= 1
            if node.nlink == 0:
                self._writer.free(node)

    # ---- whiteouts ----

    def _whiteout(self, parts: list[bytes], name: bytes) -> None:
        directory = self._find(parts)
        if directory is None:
            return
        if name == _OPAQUE:
            self._prune(directory)
            return
        if name.startswith(b".wh..wh."):
            return  # aufs's own bookkeeping (.wh..wh.plnk, .wh..wh.aufs)
        hidden = name[len(_WHITEOUT) :]
        if hidden in (b"", b".", b".."):
            raise ImageError("a whiteout names no file", _MALFORMED)
        assert directory.children is not None
        child = directory.children.get(hidden)
        if child is None:
            return
        if directory.fresh is None or hidden not in directory.fresh:
            if child.children is None or not self._prune(child):
                self._remove(directory, hidden)
            else:  # the layer has added files below a directory that it did not describe
                child.mode = stat.S_IFDIR | 0o755
                child.uid = child.gid = 0
                child.xattrs = None
        elif child.children is not None:
            self._prune(child)

    def _prune(self, top: Node) -> bool:
        """Remove everything below a directory that is from lower layers.

        Returns:
            Whether anything of the present layer is left in it.
        """
        order = [top]
        for node in order:  # grows while it is walked: parents first
            assert node.children is not None
            self._charge(1 + len(node.fresh or ()))
            order += [child for child in node.children.values() if child.children is not None]
        kept: set[int] = set()
        for node in reversed(order):
            assert node.children is not None
            fresh = node.fresh or ()
            for name in [n for n, c in node.children.items() if n not in fresh and id(c) not in kept]:
                self._remove(node, name)
            if node.children:
                kept.add(id(node))
        return bool(top.children)


def _clean(name: bytes) -> list[bytes]:
    """The components of a name within the root, cleaned like Go's ``filepath.Clean``.

    Raises:
        ImageError: The name leads out of the root, or is too long.
    """
    if len(name) > _MAX_PATH:
        raise ImageError(f"a path has more than {_MAX_PATH} bytes", _MALFORMED)
    split = name.split(b"/")
    if b"" not in split and b"." not in split and b".." not in split:
        return split
    parts: list[bytes] = []
    for part in split:
        if part == b"..":
            if not parts:
                raise ImageError(f"the path {layers_tar.text(name)} leads out of the image", _MALFORMED)
            parts.pop()
        elif part not in (b"", b"."):
            parts.append(part)
    return parts


def _attributes(given: dict[bytes, bytes]) -> dict[bytes, bytes] | None:
    """The extended attributes that are kept."""
    kept = {}
    total = 0
    for name, value in given.items():
        if name.startswith(_DROPPED_XATTRS) or not erofs_format.xattr_kept(name):
            continue
        if len(name) > 255 or len(value) > 0xFFFF:
            raise ImageError(f"the extended attribute {layers_tar.text(name)} is too long", _MALFORMED)
        total += len(name) + len(value) + 8
        if total > 200_000:
            raise ImageError("the extended attributes are too long", _MALFORMED)
        kept[name] = value
    return kept or None


def limits_from_environment() -> Limits:
    """The limits, as set by ``KATA_IMAGE_MAX_SIZE`` (bytes) and ``KATA_IMAGE_MAX_ENTRIES``.

    Raises:
        ImageError: One of them is not a number.
    """
    limits = Limits()
    for variable, field in (("KATA_IMAGE_MAX_SIZE", "size"), ("KATA_IMAGE_MAX_ENTRIES", "entries")):
        given = os.environ.get(variable)
        if given:
            if not given.isdigit():
                raise ImageError(
                    f"{variable}={given!r} is not a number", f"unset {variable}, or give a whole number"
                )
            setattr(limits, field, int(given))
    return limits
