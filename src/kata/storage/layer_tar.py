"""Writes what a guest sends of a directory tree as a tar stream (POSIX.1-2001 pax, with ``SCHILY.xattr`` records).

The guest is hostile: names are checked, and content is written only where the file's announced size has room for it.

Source: pax(1), "pax Interchange Format"; OCI image specification, ``layer.md``.
"""

from __future__ import annotations

import os
import stat
import tarfile

from kata.errors import GuestProtocolError, ImageError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from kata.proto.agentext_pb import LayerEntry, LayerPart

_MAX_PATH = 4095
_MAX_NAME = 255
_MAX_FILE = 16 << 40
_MOST_LINKED = 64 << 20
"""Bytes of the names of files that have several links, as the guest says; they are kept until all has come."""
_NO_ID = 0xFFFF_FFFF
_BLOCK = 512
_ZEROS = bytes(1 << 20)
_KINDS = {
    stat.S_IFDIR: tarfile.DIRTYPE,
    stat.S_IFREG: tarfile.REGTYPE,
    stat.S_IFLNK: tarfile.SYMTYPE,
    stat.S_IFIFO: tarfile.FIFOTYPE,
    stat.S_IFCHR: tarfile.CHRTYPE,
    stat.S_IFBLK: tarfile.BLKTYPE,
}
_KEPT = (b"security.capability", b"system.posix_acl_access", b"system.posix_acl_default")


def check_path(path: bytes) -> None:
    """Check the path of an entry as a guest sends it: relative, without empty components, "." and "..".

    Raises:
        GuestProtocolError: It is not such a path.
    """
    names = path.split(b"/")
    if (
        len(path) > _MAX_PATH
        or b"\0" in path
        or not all(0 < len(name) <= _MAX_NAME and name not in (b".", b"..") for name in names)
    ):
        shown = path[:200].decode("utf-8", "backslashreplace")
        raise GuestProtocolError(f"the guest has sent an impossible file name: {shown}")


class LayerTar:
    """A tar stream that is being written.

    Args:
        write: Takes the next bytes of it.
        most_bytes: Of it, in all; None for no limit.

    Attributes:
        sockets: How many were left out: a tar stream has no such kind.
    """

    def __init__(self, write: Callable[[bytes | memoryview], object], most_bytes: int | None = None) -> None:
        self.sockets = 0
        self._write = write
        self._left = most_bytes
        self._entry: LayerEntry | None = None  # the regular file whose content comes now
        self._at = 0
        self._skips_data = False
        self._links: dict[tuple[int, int], str] = {}
        self._linked_bytes = 0
        self._written = 0

    def add(self, parts: Iterable[LayerPart]) -> None:
        """Take what comes next.

        Raises:
            GuestProtocolError: It makes no sense.
            ImageError: It is more than may be written.
        """
        for part in parts:
            if part.entry is not None:
                self._finish_file()
                self._add_entry(part.entry)
            if part.data:
                self._add_data(part.offset, part.data)

    def finish(self) -> None:
        """All has come: write the end of the stream."""
        self._finish_file()
        self._put(bytes(2 * _BLOCK))
        self._put(bytes(-self._written % tarfile.RECORDSIZE))

    def _put(self, data: bytes | memoryview) -> None:
        if self._left is not None:
            self._left -= len(data)
            if self._left < 0:
                raise ImageError("its files are more than an image may hold", "raise KATA_IMAGE_MAX_SIZE")
        self._written += len(data)
        self._write(data)

    def _put_zeros(self, count: int) -> None:
        while count > 0:
            piece = min(count, len(_ZEROS))
            self._put(memoryview(_ZEROS)[:piece])
            count -= piece

    def _add_entry(self, entry: LayerEntry) -> None:
        self._skips_data = False
        if not entry.path:
            return  # the top: it is there wherever this is unpacked
        check_path(entry.path)
        kind = stat.S_IFMT(entry.mode)
        if kind == stat.S_IFSOCK:
            self.sockets += 1
            return
        if kind not in _KINDS:
            raise GuestProtocolError(f"the guest has sent a file of the unknown kind {kind:#o}")
        if _NO_ID in (entry.uid, entry.gid) or not -(1 << 62) < entry.mtime_ns < 1 << 62:
            raise GuestProtocolError("the guest has sent a file whose owner or time is none")
        member = self._member(entry, _KINDS[kind])
        self._put(member.tobuf(tarfile.PAX_FORMAT, "utf-8", "surrogateescape"))

    def _member(self, entry: LayerEntry, kind: bytes) -> tarfile.TarInfo:
        """The header of an entry."""
        name = os.fsdecode(entry.path)
        member = tarfile.TarInfo(name)
        member.mode, member.uid, member.gid = stat.S_IMODE(entry.mode), entry.uid, entry.gid
        member.mtime = entry.mtime_ns // 10**9
        member.type = kind
        if entry.links > 1 and kind != tarfile.DIRTYPE:
            first = self._first_name(entry, name)
            if first:
                member.type, member.linkname = tarfile.LNKTYPE, first
                self._skips_data = True
                return member
        member.pax_headers = _attributes(entry)
        if kind == tarfile.SYMTYPE:
            if not 0 < len(entry.link_target) <= _MAX_PATH or b"\0" in entry.link_target:
                raise GuestProtocolError("the guest has sent a symbolic link that leads nowhere")
            member.linkname = os.fsdecode(entry.link_target)
        elif kind in (tarfile.CHRTYPE, tarfile.BLKTYPE):
            member.devmajor, member.devminor = os.major(entry.rdev), os.minor(entry.rdev)
        elif kind == tarfile.REGTYPE:
            if entry.size > _MAX_FILE:
                raise GuestProtocolError("the guest has sent a file that is larger than its disk")
            member.size = entry.size
            self._entry, self._at = entry, 0
        return member

    def _first_name(self, entry: LayerEntry, name: str) -> str:
        """The name under which a file with several links was written before; empty if this is the first."""
        key = entry.device, entry.number
        if key in self._links:
            return self._links[key]
        self._linked_bytes += len(entry.path)
        if self._linked_bytes > _MOST_LINKED:
            raise GuestProtocolError("the guest has sent too many names of files with several links")
        self._links[key] = name
        return ""

    def _add_data(self, offset: int, data: bytes) -> None:
        if self._skips_data:
            return  # they came with the file's first name
        entry = self._entry
        if entry is None or offset < self._at or offset + len(data) > entry.size:
            # A file may grow while it is read; anything else is nonsense.
            if entry is None or offset < self._at:
                raise GuestProtocolError("the guest has sent content that no file has room for")
            data = data[: max(0, entry.size - offset)]
            if not data:
                return
        self._put_zeros(offset - self._at)
        self._put(data)
        self._at = offset + len(data)

    def _finish_file(self) -> None:
        entry, self._entry = self._entry, None
        if entry is not None:
            self._put_zeros(entry.size - self._at)  # a hole, or it was cut short while it was read
            self._put(bytes(-entry.size % _BLOCK))


def _attributes(entry: LayerEntry) -> dict[str, str]:
    """The records for the extended attributes that mean something elsewhere."""
    return {
        f"SCHILY.xattr.{os.fsdecode(one.name)}": os.fsdecode(one.value)
        for one in entry.attributes
        if one.name in _KEPT or (one.name.startswith(b"user.") and not one.name.startswith(b"user.overlay."))
    }
