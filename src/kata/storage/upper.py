"""Puts what a container has written in its guest into the upper directory of its snapshot on the host.

The guest is hostile: everything that it sends is a claim. A name is one component; a directory was told before what is
in it; nothing is there twice. Each directory is opened beneath the top, never through a link or a mount, and each file
is made by this process or not at all. What is refused ends it all; the caller then empties the directory.

What comes out is what the same container could have made of the directory with runc: any mode, owner and time; fifos
and sockets; an overlay's whiteouts (character devices 0:0) and opaque directories (``trusted.overlay.opaque``). Other
devices need the capability MKNOD of the container, and file capabilities SETFCAP. All other attributes than the
user's and access control lists are dropped.
"""

from __future__ import annotations

import errno
import os
import stat

from kata import sysio
from kata.errors import GuestProtocolError, HostError, KataError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterable

    from kata.proto.agentext_pb import LayerEntry, LayerPart

_BENEATH = (
    sysio.RESOLVE_BENEATH | sysio.RESOLVE_NO_SYMLINKS | sysio.RESOLVE_NO_MAGICLINKS | sysio.RESOLVE_NO_XDEV
)
_MAX_PATH = 4095
_MAX_NAME = 255
_MAX_FILE = 16 << 40
"""The largest file of the guest's file system."""
_MAX_ATTRIBUTES = 64 << 10
MOST_LINKED = 64 << 20
"""Bytes of the paths of files that have several links, as the guest says; they are kept until all has come."""
_NO_ID = 0xFFFF_FFFF
_OPAQUE = b"trusted.overlay.opaque"
_ACLS = (b"system.posix_acl_access", b"system.posix_acl_default")
_ALL_GONE = "What the container has written is not on the host."


class UpperLayer:
    """A directory that is being filled.

    Args:
        fd: Descriptor of the directory, which stays the caller's.
        most_bytes: Of data, in all: no more than the guest's disk can hold.
        most_entries: Files and directories.
        capabilities: Those that the container may have had: ``CAP_MKNOD``, ``CAP_SETFCAP``.

    Attributes:
        entries: How many there are so far.
        bytes: How much data there is so far.
        dropped: How many devices and attributes were left out.
    """

    def __init__(
        self, fd: int, *, most_bytes: int, most_entries: int, capabilities: frozenset[str] = frozenset()
    ) -> None:
        self.entries = 0
        self.bytes = 0
        self.dropped = 0
        self._top = fd
        self._most_bytes = most_bytes
        self._most_entries = most_entries
        self._capabilities = capabilities
        self._directories: list[LayerEntry] = []  # from the top down to the present one
        self._parent: tuple[bytes, sysio.Fd] | None = None
        self._file: sysio.Fd | None = None
        self._entry: LayerEntry | None = None  # of that file
        self._data_end = 0
        self._skips_data = False
        self._links: dict[int, bytes] = {}
        self._linked_bytes = 0

    def add(self, parts: Iterable[LayerPart]) -> None:
        """Take a part of what the guest sends. Blocks.

        Raises:
            GuestProtocolError: It is none that can be taken.
            HostError: It cannot be written.
        """
        path = b""
        try:
            for part in parts:
                if part.entry is not None:
                    path = part.entry.path
                    self._finish_file()
                    self._add_entry(part.entry)
                if part.data:
                    self._add_data(part.offset, part.data)
        except (OSError, OverflowError, ValueError) as error:
            raise self._failed(path, error) from error

    def finish(self) -> None:
        """All has come: set what is still to be set. Blocks.

        Raises:
            HostError: It cannot be written.
        """
        try:
            self._finish_file()
            if not self._directories:
                raise GuestProtocolError("the guest has sent nothing of a layer", _ALL_GONE)
            while self._directories:
                self._leave()
        except (OSError, OverflowError, ValueError) as error:
            raise self._failed(b"", error) from error
        finally:
            self.close()

    def close(self) -> None:
        """Give the descriptors back."""
        if self._parent is not None:
            self._parent[1].close()
            self._parent = None
        if self._file is not None:
            self._file.close()
            self._file = None

    def _failed(self, path: bytes, error: Exception) -> KataError:
        if isinstance(error, OSError) and error.errno in (
            errno.ENOSPC,
            errno.EDQUOT,
            errno.EIO,
            errno.EROFS,
        ):
            return HostError(
                f"what a container has written cannot be kept: {error.strerror}",
                "Is the snapshotter's disk full?",
            )
        return self._refused(path, str(error))

    @staticmethod
    def _refused(path: bytes, why: str) -> GuestProtocolError:
        shown = path[:200].decode("utf-8", "backslashreplace")
        return GuestProtocolError(
            f"what the guest has sent of a container's files is refused: {shown}: {why}"
        )

    # ---- entries ----

    def _add_entry(self, entry: LayerEntry) -> None:
        path = entry.path
        self.entries += 1
        if self.entries > self._most_entries:
            raise self._refused(path, f"more than {self._most_entries} files")
        self._check(entry)
        if not path:
            self._begin(entry)
            return
        above, _, name = path.rpartition(b"/")
        if not self._directories or len(path) > _MAX_PATH:
            raise self._refused(
                path, "it has no directory" if not self._directories else "its path is too long"
            )
        if not 0 < len(name) <= _MAX_NAME or name in (b".", b"..") or b"\0" in name or path[:1] == b"/":
            raise self._refused(path, "this is no name")
        while self._directories[-1].path != above:
            self._leave()
            if not self._directories:
                raise self._refused(path, "it is not in the directory that was told last")
        parent = self._open(above)
        kind = stat.S_IFMT(entry.mode)
        if kind == stat.S_IFDIR:
            os.mkdir(name, 0o700, dir_fd=parent)
            self._directories.append(entry)
        elif kind == stat.S_IFREG:
            self._make_file(parent, name, entry)
        elif kind == stat.S_IFLNK:
            if not 0 < len(entry.link_target) <= _MAX_PATH or b"\0" in entry.link_target:
                raise self._refused(path, "it leads nowhere")
            os.symlink(entry.link_target, name, dir_fd=parent)
            self._own(parent, name, entry)
        elif kind in (stat.S_IFCHR, stat.S_IFBLK, stat.S_IFIFO, stat.S_IFSOCK):
            self._make_node(parent, name, kind, entry)
        else:
            raise self._refused(path, "there is no such kind of file")

    def _check(self, entry: LayerEntry) -> None:
        if _NO_ID in (entry.uid, entry.gid):
            raise self._refused(entry.path, "its owner is nobody's number")
        if not -(1 << 62) < entry.mtime_ns < 1 << 62:
            raise self._refused(entry.path, "its time is none")
        if sum(len(one.name) + len(one.value) for one in entry.attributes) > _MAX_ATTRIBUTES:
            raise self._refused(entry.path, "its attributes are too long")

    def _begin(self, entry: LayerEntry) -> None:
        if self._directories or self.entries != 1 or not stat.S_ISDIR(entry.mode):
            raise self._refused(b"", "the top is a directory, and comes first")
        self._directories.append(entry)

    def _make_file(self, parent: int, name: bytes, entry: LayerEntry) -> None:
        self._data_end = 0
        linked = self._links.get(entry.number) if entry.links > 1 else None
        self._skips_data = linked is not None
        if linked is not None:
            with sysio.Fd(self._open_below(linked, os.O_PATH | os.O_NOFOLLOW)) as file:
                # Python calls linkat(2), which can follow the link, only with a directory's descriptor.
                os.link(
                    f"/proc/self/fd/{file.raw}",
                    name,
                    src_dir_fd=parent,
                    dst_dir_fd=parent,
                    follow_symlinks=True,
                )
            self._entry = entry
            return
        if not 0 <= entry.size <= _MAX_FILE:
            raise self._refused(entry.path, "no file is that large")
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
        self._file = sysio.Fd(os.open(name, flags, 0o600, dir_fd=parent))
        self._entry = entry
        if entry.size:
            os.ftruncate(self._file.raw, entry.size)
        if entry.links > 1:
            self._linked_bytes += len(entry.path)
            if self._linked_bytes > MOST_LINKED:
                raise self._refused(
                    entry.path, f"more than {MOST_LINKED} bytes of names of files with several links"
                )
            self._links[entry.number] = entry.path

    def _make_node(self, parent: int, name: bytes, kind: int, entry: LayerEntry) -> None:
        number = 0
        if kind in (stat.S_IFCHR, stat.S_IFBLK):
            number = os.makedev(os.major(entry.rdev), os.minor(entry.rdev))
            is_whiteout = kind == stat.S_IFCHR and number == 0
            if not is_whiteout and "CAP_MKNOD" not in self._capabilities:
                self.dropped += 1
                return
        os.mknod(name, kind, number, dir_fd=parent)
        self._own(parent, name, entry)
        os.chmod(name, entry.mode & 0o7777, dir_fd=parent)  # what was just made is no link

    @staticmethod
    def _own(parent: int, name: bytes, entry: LayerEntry) -> None:
        os.chown(name, entry.uid, entry.gid, dir_fd=parent, follow_symlinks=False)
        os.utime(name, ns=(entry.mtime_ns, entry.mtime_ns), dir_fd=parent, follow_symlinks=False)

    def _describe(self, fd: int, entry: LayerEntry) -> None:
        """Owner before mode and attributes: a change of it takes set-user-id bits and capabilities away."""
        os.fchown(fd, entry.uid, entry.gid)
        os.fchmod(fd, entry.mode & 0o7777)
        for one in entry.attributes:
            if not self._is_kept(one.name, one.value, stat.S_ISDIR(entry.mode)):
                continue
            try:
                os.setxattr(fd, one.name, one.value)
            except OSError as error:
                if error.errno not in (errno.ENOTSUP, errno.EINVAL, errno.E2BIG, errno.EPERM):
                    raise
                self.dropped += 1
        os.utime(fd, ns=(entry.mtime_ns, entry.mtime_ns))

    def _is_kept(self, name: bytes, value: bytes, is_directory: bool) -> bool:
        if name == _OPAQUE:
            return is_directory and value == b"y"
        if name.startswith(b"trusted.overlay."):
            return False  # the guest's overlay's own notes, which mean nothing here
        if name == b"security.capability" and "CAP_SETFCAP" in self._capabilities:
            return True
        if (name.startswith(b"user.") and not name.startswith(b"user.overlay.")) or name in _ACLS:
            return True
        self.dropped += 1
        return False

    # ---- data ----

    def _add_data(self, offset: int, data: bytes) -> None:
        entry = self._entry
        if entry is None:
            raise self._refused(b"", "these data are no file's")
        self.bytes += len(data)
        if self.bytes > self._most_bytes:
            raise self._refused(entry.path, f"more data than {self._most_bytes} bytes")
        if self._skips_data:
            return  # they came with the file's first name
        if offset < self._data_end or offset + len(data) > entry.size:
            raise self._refused(entry.path, "its data are not where they can be")
        assert self._file is not None
        self._data_end = offset + len(data)
        view = memoryview(data)
        while view:
            done = os.pwrite(self._file.raw, view, offset)
            offset += done
            view = view[done:]

    def _finish_file(self) -> None:
        if self._file is not None:
            assert self._entry is not None
            self._describe(self._file.raw, self._entry)
            self._file.close()
            self._file = None
        self._entry = None

    # ---- directories ----

    def _leave(self) -> None:
        """Nothing comes for the present directory any more. Only now does it get what files in it would inherit."""
        entry = self._directories.pop()
        with sysio.Fd(self._open_below(entry.path or b".", os.O_RDONLY | os.O_DIRECTORY)) as directory:
            self._describe(directory.raw, entry)

    def _open(self, path: bytes) -> int:
        """A directory, which stays open until another one is."""
        if self._parent is None or self._parent[0] != path:
            opened = sysio.Fd(self._open_below(path or b".", os.O_RDONLY | os.O_DIRECTORY))
            if self._parent is not None:
                self._parent[1].close()
            self._parent = (path, opened)
        return self._parent[1].raw

    def _open_below(self, path: bytes, flags: int) -> int:
        return sysio.openat2(self._top, os.fsdecode(path), flags, resolve=_BENEATH)
