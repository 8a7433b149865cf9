"""Files of the host that a container mounts, where nothing is shared with its machine: they are copied into it.

What is small and is not written to is copied, once, when the container is made: files and directories that are mounted
read-only, and the files below ``/etc`` and the termination log, which clients mount writable by habit. All else is
refused by name: a copy of it would lose what the container writes, or take too long.
"""

from __future__ import annotations

import os
import stat

from kata import sysio
from kata.errors import UnsupportedError
from kata.proto import agent_pb

TYPE_CHECKING = False
if TYPE_CHECKING:
    from kata.agent.client import AgentClient

MOST_BYTES = 4 << 20
"""Of one mount."""
MOST_FILES = 1000
"""Of one mount, directories and links included."""
PIECE = 256 << 10
"""Bytes of one call to the agent."""
_LOSABLE = frozenset({"/etc/hostname", "/etc/hosts", "/etc/resolv.conf", "/dev/termination-log"})
"""Destinations to which clients mount a file writable, and of which the host needs nothing back."""
_HINT = (
    "Mount it read-only if it is small, make a volume on a disk (--mount type=volume), or use a hypervisor and a"
    " configuration with a share (shared_fs; docs/hypervisors.md)."
)


class Copy:
    """One file, directory or symbolic link.

    Args:
        path: Where it is to be in the guest.
        about: Its status on the host.
        data: Its content, or a link's target.
    """

    __slots__ = ("about", "data", "path")

    def __init__(self, path: str, about: os.stat_result, data: bytes = b"") -> None:
        self.path = path
        self.about = about
        self.data = data


def check(source: str, destination: str, *, readonly: bool) -> None:
    """Refuse what cannot be copied, before anything starts; what is neither file nor directory is not looked at.

    Args:
        source: On the host.
        destination: In the container.
        readonly: It is mounted read-only.

    Raises:
        UnsupportedError: It is writable, or too large.
    """
    try:
        mode = os.stat(source).st_mode
    except OSError:
        return  # told when it is mounted
    if stat.S_ISREG(mode) or (stat.S_ISDIR(mode) and os.path.normpath(destination) != "/dev/shm"):
        gather(source, "", destination, readonly=readonly)


def gather(source: str, place: str, destination: str, *, readonly: bool, named: str = "") -> list[Copy]:
    """Read a file or directory of the host. Blocks.

    Args:
        source: Its path.
        place: Where it is to be in the guest.
        destination: In the container.
        readonly: It is mounted read-only.
        named: Its path for people, where *source* is a descriptor's.

    Returns:
        What is to be copied, directories before what is in them.

    Raises:
        UnsupportedError: It is writable, too large, or has something in it that is no file.
    """
    named = named or source
    about = os.stat(source)
    if not stat.S_ISREG(about.st_mode) and not stat.S_ISDIR(about.st_mode):
        raise _no_file(named, source)
    if not readonly and not (stat.S_ISREG(about.st_mode) and os.path.normpath(destination) in _LOSABLE):
        raise UnsupportedError(
            f"cannot mount {named} writable: this machine shares no files with the host", _HINT
        )
    try:
        found: list[Copy] = []
        flags = os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC
        with sysio.Fd(os.open(source, flags)) as opened:
            _walk(opened.raw, os.path.basename(source), place, named, found, [MOST_BYTES])
    except OSError as error:
        raise UnsupportedError(f"cannot copy {named} into the machine: {error.strerror}", _HINT) from error
    return found


def _too_many(named: str) -> UnsupportedError:
    return UnsupportedError(
        f"cannot copy {named} into the machine, which shares no files with the host: there are more than"
        f" {MOST_FILES} files",
        _HINT,
    )


def _no_file(named: str, name: str) -> UnsupportedError:
    return UnsupportedError(
        f"cannot copy {named} into the machine, which shares no files with the host:"
        f" {os.path.basename(name)!r} in it is no file",
        _HINT,
    )


def _walk(opened: int, called: str, place: str, named: str, found: list[Copy], room: list[int]) -> None:
    """Read what a descriptor stands for, a file or a directory. What is in a directory is opened beneath it, and no
    link is followed: whoever may write there can put one in the place of a file at any time.
    """
    about = os.fstat(opened)
    if len(found) >= MOST_FILES:
        raise _too_many(named)
    if stat.S_ISDIR(about.st_mode):
        found.append(Copy(place, about))
        for name in sorted(os.listdir(opened)):
            inner, there = os.stat(name, dir_fd=opened, follow_symlinks=False), f"{place}/{name}"
            if stat.S_ISLNK(inner.st_mode):
                if len(found) >= MOST_FILES:
                    raise _too_many(named)
                found.append(Copy(there, inner, os.fsencode(os.readlink(name, dir_fd=opened))))
                continue
            if not stat.S_ISREG(inner.st_mode) and not stat.S_ISDIR(inner.st_mode):
                raise _no_file(named, name)
            flags = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
            with sysio.Fd(os.open(name, flags, dir_fd=opened)) as file:
                _walk(file.raw, name, there, named, found, room)
        return
    if not stat.S_ISREG(about.st_mode):
        raise _no_file(named, called)
    room[0] -= about.st_size
    if room[0] >= 0:
        with open(opened, "rb", closefd=False) as file:
            data = file.read(about.st_size + room[0] + 1)
        room[0] -= len(data) - about.st_size
    if room[0] < 0:
        raise UnsupportedError(
            f"cannot copy {named} into the machine, which shares no files with the host: it has more than"
            f" {MOST_BYTES >> 20} MiB",
            _HINT,
        )
    found.append(Copy(place, about, data))


async def send(agent: AgentClient, copies: list[Copy]) -> None:
    """Write them in the guest, in their order.

    Args:
        agent: The guest's.
        copies: What `gather` has found.

    Raises:
        KataError: One could not be written.
    """
    for one in copies:
        for offset in range(0, max(len(one.data), 1), PIECE):
            piece = one.data[offset : offset + PIECE]
            await agent.copy(
                agent_pb.CopyFileRequest(
                    path=one.path,
                    file_size=len(one.data),
                    file_mode=one.about.st_mode,
                    dir_mode=0o755,
                    uid=one.about.st_uid,
                    gid=one.about.st_gid,
                    offset=offset,
                    data=piece,
                )
            )
