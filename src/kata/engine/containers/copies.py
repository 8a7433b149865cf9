"""Files of the host that a container mounts, where nothing is shared with its machine: they are copied into it.

What is small and is not written to is copied, once, when the container is made: files and directories that are mounted
read-only, and the files below ``/etc`` and the termination log, which clients mount writable by habit. All else is
refused by name: a copy of it would lose what the container writes, or take too long.
"""

from __future__ import annotations

import os
import stat

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
    if not readonly and not (stat.S_ISREG(about.st_mode) and os.path.normpath(destination) in _LOSABLE):
        raise UnsupportedError(
            f"cannot mount {named} writable: this machine shares no files with the host", _HINT
        )
    try:
        found: list[Copy] = []
        _walk(source, about, place, named, found, [MOST_BYTES])
    except OSError as error:
        raise UnsupportedError(f"cannot copy {named} into the machine: {error.strerror}", _HINT) from error
    return found


def _walk(
    source: str, about: os.stat_result, place: str, named: str, found: list[Copy], room: list[int]
) -> None:
    if len(found) >= MOST_FILES:
        raise UnsupportedError(
            f"cannot copy {named} into the machine, which shares no files with the host: there are more than"
            f" {MOST_FILES} files",
            _HINT,
        )
    if stat.S_ISDIR(about.st_mode):
        found.append(Copy(place, about))
        with os.scandir(source) as entries:
            names = sorted(entry.name for entry in entries)
        for name in names:
            inner = f"{source}/{name}"
            _walk(inner, os.lstat(inner), f"{place}/{name}", named, found, room)
        return
    if stat.S_ISLNK(about.st_mode):
        found.append(Copy(place, about, os.fsencode(os.readlink(source))))
        return
    if not stat.S_ISREG(about.st_mode):
        raise UnsupportedError(
            f"cannot copy {named} into the machine, which shares no files with the host:"
            f" {os.path.basename(source)!r} in it is no file",
            _HINT,
        )
    room[0] -= about.st_size
    if room[0] >= 0:
        with open(source, "rb") as file:
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
