"""Writes an erofs file system in one pass over the data.

`Writer` takes file contents in the order of the layers and writes them to the image at once. The tree of `Node` objects
is kept in memory, and `finish` writes it after the data. The space of files that a later layer hides or replaces is
reused, so hidden files take (nearly) no space, and none of their content stays readable. The same calls give the same
bytes.

Small files are stored right after their inode ("inline"), which makes a tree of many small files compact and fast to
read; until `finish` their contents are in an unnamed spool file. A file of 16 KiB or more is never inline, so that it
can be mapped straight from the host's page cache (DAX); the waste in its last block is small.

Source of the format: `kata.storage.erofs_format`.
"""

from __future__ import annotations

import errno
import os
import stat
from bisect import bisect_left, insort

from kata.storage import erofs_format as fmt

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

BLOCK = fmt.BLOCK
_INLINE_BELOW = 4 * BLOCK
_FLUSH_AT = 1 << 20
_ZEROS = bytes(_FLUSH_AT)


class Node:
    """An inode: a file, link, device, or (with `children`) a directory. Hard links share one node."""

    __slots__ = (
        "blocks", "children", "device", "fresh", "gid", "mode", "mtime", "mtime_ns", "nid", "nlink", "size",
        "start", "tail", "target", "uid", "xattrs",
    )  # fmt: skip

    def __init__(self, mode: int, uid: int = 0, gid: int = 0, mtime: int = 0, mtime_ns: int = 0) -> None:
        self.mode = mode
        self.uid = uid
        self.gid = gid
        self.mtime = mtime
        self.mtime_ns = mtime_ns
        self.xattrs: dict[bytes, bytes] | None = None
        self.nlink = 0
        self.size = 0
        self.start = 0
        self.blocks = 0
        self.tail = -1
        """Offset of the last part of the data in the spool file, or -1."""
        self.target = b""
        self.device = 0
        self.nid = 0
        self.children: dict[bytes, Node] | None = {} if stat.S_ISDIR(mode) else None
        self.fresh: set[bytes] | None = None
        """Names that the layer being applied has added here (see `kata.storage.layers`)."""


class Writer:
    """An erofs image that is being written.

    Args:
        fd: An empty output file, open for reading and writing; the caller closes it.
        spool_fd: An empty file for the contents of small files; the caller closes it.
    """

    def __init__(self, fd: int, spool_fd: int) -> None:
        self._fd = fd
        self._spool = spool_fd
        self._spooled = 0
        self._spool_buffer = bytearray()
        self._end = 1  # in blocks; block 0 holds the superblock and the root
        self._high = BLOCK  # bytes from here on have never been written: a hole there reads as zeros
        self._free = _FreeSpace()
        self._buffer = bytearray()
        self._buffer_at = 0
        self.written = 0
        """Bytes of content stored so far."""

    # ---- contents ----

    def store(self, node: Node, size: int, chunks: Iterable[bytes]) -> None:
        """Store a regular file's content.

        Args:
            node: The file, with its attributes; `size`, `start`, `blocks` and `tail` are set here.
            size: Total number of bytes in `chunks`.
            chunks: The content.

        Raises:
            OSError: The output cannot be written (ENOSPC, EFBIG, ...).
        """
        node.size = size
        tail = size % BLOCK if size < _INLINE_BELOW else 0
        if tail and fmt.INODE + len(fmt.xattrs(node.xattrs or {})) + tail > BLOCK:
            tail = 0
        body = size - tail
        node.blocks = (body + BLOCK - 1) // BLOCK
        if tail:
            node.tail = self._spooled
            self._spooled += tail
        if not body:
            for chunk in chunks:
                self._spool_buffer += chunk
            if len(self._spool_buffer) >= _FLUSH_AT:
                self._flush_spool()
            self.written += size
            return
        node.start = self._allocate(node.blocks)
        at = node.start * BLOCK
        left = body
        for chunk in chunks:
            if left < len(chunk):
                self._spool_buffer += chunk[left:]
                chunk = chunk[:left]
            if chunk:
                self._put(at, chunk)
                at += len(chunk)
                left -= len(chunk)
        pad = -body % BLOCK
        if pad:
            self._put(at, bytes(pad))
        if len(self._spool_buffer) >= _FLUSH_AT:
            self._flush_spool()
        self.written += size

    def free(self, node: Node) -> None:
        """Free the space of a node that no name refers to any more."""
        if node.blocks:
            self._end = self._free.give(node.start, node.blocks, self._end)
            node.blocks = 0

    def _allocate(self, blocks: int) -> int:
        start = self._free.take(blocks)
        if start < 0:
            start = self._end
            self._end += blocks
            if self._end > 0xFFFFFFFF:
                raise OSError(errno.EFBIG, "the file system would exceed 16 TiB")
        return start

    def _put(self, at: int, data: bytes) -> None:
        end = self._buffer_at + len(self._buffer)
        if at != end or len(self._buffer) >= _FLUSH_AT:
            self._flush()
            self._buffer_at = at
        if len(data) < 1 << 16:
            self._buffer += data
            return
        self._flush()
        if at < self._high or data[0] or data[-1] or data != _ZEROS[: len(data)]:
            self._write(at, data)
        self._buffer_at = at + len(data)
        self._high = max(self._high, self._buffer_at)

    def _flush(self) -> None:
        if self._buffer:
            self._write(self._buffer_at, self._buffer)
            end = self._buffer_at + len(self._buffer)
            self._high = max(self._high, end)
            self._buffer_at = end
            self._buffer = bytearray()

    def _write(self, at: int, data: bytes | bytearray) -> None:
        view = memoryview(data)
        while view:
            done = os.pwrite(self._fd, view, at)
            at += done
            view = view[done:]

    def _flush_spool(self) -> None:
        view = memoryview(self._spool_buffer)
        while view:
            view = view[os.write(self._spool, view) :]
        self._spool_buffer = bytearray()

    # ---- metadata ----

    def finish(self, root: Node, uuid: bytes, tick: Callable[[int, int], None] | None = None) -> int:
        """Write the tree and the superblock; the image is complete afterwards (not yet synced).

        Args:
            root: The root directory. Every node below it must have been stored by this writer.
            uuid: 16 bytes for the superblock.
            tick: Called from time to time with (inodes written, total inodes).

        Returns:
            The size of the image in bytes.

        Raises:
            OSError: The output cannot be written.
        """
        self._flush()
        self._flush_spool()
        plan = _Plan(root)
        meta = self._allocate(plan.meta_blocks) if plan.meta_blocks else 0
        data = self._allocate(plan.data_blocks) if plan.data_blocks else 0
        if max(1, meta + plan.meta_blocks, data + plan.data_blocks) == self._end:
            self._end += 1  # fsck.erofs 1.5 reads 12 bytes behind an inode, even of the last one
        for node in plan.nodes:
            if node.nid >= fmt.SLOTS:  # everything but what lies in block 0
                node.nid += (meta - 1) * fmt.SLOTS
            if node.blocks and (node.children is not None or node.target):
                node.start += data
        for start, length in self._free.extents():
            self._clear(start, min(start + length, -(-self._high // BLOCK)))
        block0 = self._write_inodes(plan, tick)
        block0[fmt.SUPER_AT : fmt.SUPER_AT + 128] = fmt.superblock(
            inodes=len(plan.nodes), blocks=self._end, uuid=uuid
        )
        fmt.seal(block0)
        self._write(0, block0)
        os.ftruncate(self._fd, self._end * BLOCK)
        return self._end * BLOCK

    def _clear(self, start: int, end: int) -> None:
        """Overwrite the remains of hidden files in these blocks: their content must not be in the image."""
        at = start * BLOCK
        while at < end * BLOCK:
            step = min(len(_ZEROS), end * BLOCK - at)
            self._write(at, _ZEROS[:step])
            at += step

    def _write_inodes(self, plan: _Plan, tick: Callable[[int, int], None] | None) -> bytearray:
        nodes = sorted(plan.nodes, key=lambda node: node.nid)
        block0 = bytearray(BLOCK)
        at = -1
        buffer = bytearray()
        for number, node in enumerate(nodes, 1):
            raw = self._inode(node, number, plan.parents)
            where = node.nid * fmt.SLOT
            if where < BLOCK:
                block0[where : where + len(raw)] = raw
                continue
            if at < 0:
                at = where // BLOCK * BLOCK
            buffer += bytes(where - at - len(buffer))
            buffer += raw
            if len(buffer) >= _FLUSH_AT:
                self._write(at, buffer)
                at += len(buffer)
                buffer = bytearray()
                if tick is not None:
                    tick(number, len(nodes))
        if buffer:
            buffer += bytes(-(at + len(buffer)) % BLOCK)
            self._write(at, buffer)
        return block0

    def _inode(self, node: Node, number: int, parents: dict[int, Node]) -> bytes:
        """Encode an inode and its inline data; the blocks of directories and long links are written here."""
        attributes = fmt.xattrs(node.xattrs) if node.xattrs else b""
        address = node.start if node.blocks else node.device
        nlink = node.nlink
        tail = b""
        if node.children is not None:
            entries = [(name, child.nid, fmt.file_type(child.mode)) for name, child in node.children.items()]
            entries += [(b".", node.nid, 2), (b"..", parents[id(node)].nid, 2)]
            entries.sort()
            content = fmt.dir_data(entries)
            nlink = sum(kind == 2 for _, _, kind in entries)  # its subdirectories, "." and its own name
            body = node.blocks * BLOCK
            if body:
                self._write(address * BLOCK, content[:body].ljust(body, b"\0"))
            tail = content[body:]
        elif node.target:
            if node.blocks:
                self._write(address * BLOCK, node.target.ljust(BLOCK, b"\0"))
            else:
                tail = node.target
        elif node.tail >= 0:
            tail = os.pread(self._spool, node.size % BLOCK, node.tail)
        head = fmt.inode(
            layout=fmt.INLINE if tail else fmt.PLAIN, xattr_bytes=len(attributes), mode=node.mode,
            size=node.size, address=address, number=number, uid=node.uid, gid=node.gid, mtime=node.mtime,
            mtime_ns=node.mtime_ns, nlink=nlink,
        )  # fmt: skip
        return head + attributes + tail


class _FreeSpace:
    """Free runs of blocks. An allocation takes the smallest run that fits; adjacent runs are joined.

    Every operation is cheap, even with a hostile layer: the number of different lengths is bounded by the square root
    of the image's size.
    """

    def __init__(self) -> None:
        self._by_start: dict[int, int] = {}
        self._by_end: dict[int, int] = {}
        self._by_length: dict[int, list[int]] = {}  # may name runs that are gone: checked when taken
        self._lengths: list[int] = []

    def extents(self) -> list[tuple[int, int]]:
        return sorted(self._by_start.items())

    def take(self, blocks: int) -> int:
        """The start of a run of this many blocks, or -1."""
        index = bisect_left(self._lengths, blocks)
        while index < len(self._lengths):
            length = self._lengths[index]
            starts = self._by_length[length]
            while starts:
                start = starts.pop()
                if self._by_start.get(start) == length:
                    self._remove(start, length)
                    if length > blocks:
                        self._add(start + blocks, length - blocks)
                    return start
            del self._by_length[length]
            del self._lengths[index]
        return -1

    def give(self, start: int, blocks: int, end: int) -> int:
        """Free a run. Returns the new end of the file system, which is earlier if the run was at its end."""
        before = self._by_end.get(start)
        if before is not None:
            length = self._by_start[before]
            self._remove(before, length)
            start, blocks = before, blocks + length
        behind = self._by_start.get(start + blocks)
        if behind is not None:
            self._remove(start + blocks, behind)
            blocks += behind
        if start + blocks == end:
            return start
        self._add(start, blocks)
        return end

    def _add(self, start: int, blocks: int) -> None:
        self._by_start[start] = blocks
        self._by_end[start + blocks] = start
        if blocks not in self._by_length:
            self._by_length[blocks] = []
            insort(self._lengths, blocks)
        self._by_length[blocks].append(start)

    def _remove(self, start: int, blocks: int) -> None:
        del self._by_start[start]
        del self._by_end[start + blocks]


class _Plan:
    """The positions of all inodes. Blocks are counted from the start of their area until that is known.

    Args:
        root: The tree. `nid` of every node is set, and `size`, `start` and `blocks` of directories and links.
    """

    def __init__(self, root: Node) -> None:
        self.nodes: list[Node] = []
        self.parents: dict[int, Node] = {id(root): root}
        self.meta_blocks = 0
        self.data_blocks = 0
        # Open blocks by the number of free slots at their end; one bit for each list that is not empty.
        self._open: list[list[int]] = [[] for _ in range(fmt.SLOTS + 1)]
        self._mask = 0
        self._place(root, first=True)
        waiting = [root]
        while waiting:
            directory = waiting.pop()
            assert directory.children is not None
            below = []
            for name in sorted(directory.children):
                node = directory.children[name]
                if node.nid == 0:
                    self._place(node)
                    if node.children is not None:
                        self.parents[id(node)] = directory
                        below.append(node)
            waiting += reversed(below)

    def _place(self, node: Node, *, first: bool = False) -> None:
        self.nodes.append(node)
        head = fmt.INODE + (len(fmt.xattrs(node.xattrs)) if node.xattrs else 0)
        room = BLOCK - (fmt.ROOT_NID * fmt.SLOT if first else 0)
        tail = 0
        if node.children is not None:
            node.size = fmt.dir_size(sorted([b".", b"..", *node.children]))
            tail = node.size % BLOCK
        elif node.target:
            node.size = tail = len(node.target)
        elif node.tail >= 0:
            tail = node.size % BLOCK
        if node.children is not None or node.target:
            if head + tail > room:
                tail = 0
            node.blocks = (node.size - tail + BLOCK - 1) // BLOCK
            node.start = self.data_blocks
            self.data_blocks += node.blocks
        slots = (head + tail + fmt.SLOT - 1) // fmt.SLOT
        if first:
            node.nid = fmt.ROOT_NID
            if fmt.ROOT_NID + slots < fmt.SLOTS:
                self._offer(0, fmt.SLOTS - fmt.ROOT_NID - slots)
            elif fmt.ROOT_NID + slots > fmt.SLOTS:
                raise ValueError("the root directory's extended attributes exceed 2.8 KiB")
        else:
            node.nid = self._slots(slots)

    def _slots(self, slots: int) -> int:
        fitting = self._mask >> slots << slots if slots <= fmt.SLOTS else 0
        if fitting:
            free = (fitting & -fitting).bit_length() - 1
            blocks = self._open[free]
            block = blocks.pop()
            if not blocks:
                self._mask &= ~(1 << free)
        else:
            block = self.meta_blocks + 1  # block 0 is not in the area
            count = -(-slots // fmt.SLOTS)
            self.meta_blocks += count
            free = count * fmt.SLOTS
        nid = (block + 1) * fmt.SLOTS - free if free <= fmt.SLOTS else block * fmt.SLOTS
        if free > slots:
            self._offer(block + (slots // fmt.SLOTS), free - slots)
        return nid

    def _offer(self, block: int, free: int) -> None:
        self._open[free].append(block)
        self._mask |= 1 << free
