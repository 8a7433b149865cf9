"""Access control lists of files, for one more user who may open a file for a while.

Sources: acl(5), and the layout of ``system.posix_acl_access`` in the kernel's ``linux/posix_acl_xattr.h``.
"""

from __future__ import annotations

import errno
import os
import stat

from kata import paths

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Mapping

READ, WRITE = 4, 2
_ACL = "system.posix_acl_access"
_VERSION = 2
_OWNER, _USER, _GROUP, _NAMED_GROUP, _MASK, _OTHERS = 0x01, 0x02, 0x04, 0x08, 0x10, 0x20
_NOBODYS = 0xFFFF_FFFF
_LOCK = "access.lock"


def add(fd: int, user: int, rights: int) -> None:
    """Add a user to an open file's list. Nobody else gets more rights by that.

    Args:
        fd: The file, or its place (``O_PATH``).
        user: Whose entry.
        rights: `READ`, and `WRITE`.

    Raises:
        PermissionError: The mask of the list that the file has forbids it: a wider one would allow others more.
        OSError: The file system has no such lists, or they cannot be changed.
    """
    with _Locked():
        _write(fd, _with(_read(fd), user, rights))


def take_out(path: str, user: int, identity: Mapping[str, int]) -> None:
    """Take a user out of a file's access control list; nothing happens if it is another file meanwhile, or gone.

    Args:
        path: The file's.
        user: Whose entry.
        identity: Its device and inode: ``dev``, ``ino``.

    Raises:
        OSError: The list cannot be changed.
    """
    try:
        # By its place, whatever it is: what else may have that name by now is not opened.
        fd = os.open(path, os.O_PATH | os.O_CLOEXEC | os.O_NOFOLLOW)
    except FileNotFoundError:
        return
    try:
        status = os.fstat(fd)
        if (status.st_dev, status.st_ino) == (identity.get("dev"), identity.get("ino")):
            with _Locked():
                _write(fd, _without(_read(fd), user))
    finally:
        os.close(fd)


class _Locked:
    """Of all sandboxes one at a time changes lists: each reads one and writes it again."""

    __slots__ = ("_fd",)

    def __enter__(self) -> None:
        import fcntl

        directory = paths.run_dir()
        paths.make_dirs(directory, 0o711)
        flags = os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW
        self._fd = os.open(os.path.join(directory, _LOCK), flags, 0o600)
        fcntl.flock(self._fd, fcntl.LOCK_EX)

    def __exit__(self, *_error: object) -> None:
        os.close(self._fd)


def _read(fd: int) -> dict[tuple[int, int], int]:
    """The list of a file: rights by kind and id. One that has none has its mode."""
    try:
        data = os.getxattr(f"/proc/self/fd/{fd}", _ACL)
    except OSError as error:
        if error.errno != errno.ENODATA:
            raise
        mode = stat.S_IMODE(os.fstat(fd).st_mode)
        return {
            (_OWNER, _NOBODYS): mode >> 6 & 7,
            (_GROUP, _NOBODYS): mode >> 3 & 7,
            (_OTHERS, _NOBODYS): mode & 7,
        }
    found = {}
    for at in range(4, len(data) - 7, 8):
        kind, rights = (int.from_bytes(data[at + 2 * i : at + 2 * i + 2], "little") for i in range(2))
        found[kind, int.from_bytes(data[at + 4 : at + 8], "little")] = rights
    return found


def _write(fd: int, entries: Mapping[tuple[int, int], int]) -> None:
    data = bytearray(_VERSION.to_bytes(4, "little"))
    for (kind, who), rights in sorted(entries.items()):
        data += kind.to_bytes(2, "little") + rights.to_bytes(2, "little") + who.to_bytes(4, "little")
    os.setxattr(f"/proc/self/fd/{fd}", _ACL, bytes(data))


def _with(entries: dict[tuple[int, int], int], user: int, rights: int) -> dict[tuple[int, int], int]:
    """A list with one more user.

    Raises:
        PermissionError: The mask of a list that has one would forbid it, and a wider one would allow others more.
    """
    mask = entries.get((_MASK, _NOBODYS))
    if mask is None:
        entries[_MASK, _NOBODYS] = entries[_GROUP, _NOBODYS] | rights
    elif mask & rights != rights:
        raise PermissionError(errno.EACCES, "the mask of its access control list forbids it")
    entries[_USER, user] = rights
    return entries


def _without(entries: dict[tuple[int, int], int], user: int) -> dict[tuple[int, int], int]:
    """A list without a user; nothing but the mode where nobody else is named."""
    entries.pop((_USER, user), None)
    if not any(kind in (_USER, _NAMED_GROUP) for kind, _ in entries):
        entries.pop((_MASK, _NOBODYS), None)
    return entries
