"""Who is in a network with a name: one file for each running sandbox, in the network's directory.

A sandbox's engine writes the file and holds a lock on it (flock(2)) as long as it lives. Who reads a file that nobody
has locked has found that of an engine which was killed, and passes it over; `kata gc` removes it with the journal of
that sandbox. So names need neither a daemon nor a message between engines.
"""

from __future__ import annotations

import errno
import fcntl
import json
import os

from kata.errors import HostError
from kata.network.held import Holder
from kata.sysio import Fd

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Sequence

    from kata.journal import Entry, Journal

_MOST_BYTES = 65536


class Member:
    """A sandbox in a network.

    Attributes:
        addresses: Its IPv4 address, and its IPv6 address if it has one.
        names: By which it is found, its container's own first.
        holder: Its engine, which has the network's namespace open.
    """

    __slots__ = ("addresses", "holder", "names")

    def __init__(self, addresses: Sequence[str], names: Sequence[str], holder: Holder | None = None) -> None:
        self.addresses = list(addresses)
        self.names = list(names)
        self.holder = holder


class Joined:
    """A sandbox's place among the members, as long as it is open.

    Args:
        fd: The member's file, locked.
        entry: The file's in the sandbox's journal.
    """

    __slots__ = ("_entry", "_fd")

    def __init__(self, fd: Fd, entry: Entry) -> None:
        self._fd = fd
        self._entry = entry

    def close(self) -> None:
        """Be found no longer. The file goes with the journal."""
        self._fd.close()

    def leave(self, journal: Journal) -> None:
        """Be found no longer, and remove the file; *journal* is the sandbox's."""
        try:
            os.unlink(self._entry.params["path"])
        except FileNotFoundError:
            pass
        journal.mark_gone(self._entry)
        self._fd.close()


def directory(network: str) -> str:
    """Where the files of a network are; *network* is its directory."""
    return os.path.join(network, "members")


def join(network: str, sandbox: str, member: Member, journal: Journal) -> Joined:
    """Have a sandbox found in a network.

    Args:
        network: The network's directory.
        sandbox: The sandbox's id.
        member: What is said of it.
        journal: The sandbox's.

    Returns:
        Its place, which has to stay open as long as it is to be found.

    Raises:
        HostError: The network is gone, or the file cannot be written.
    """
    path = os.path.join(directory(network), sandbox)
    try:
        try:
            os.unlink(path)  # of an engine of the same container that was killed
        except FileNotFoundError:
            pass
        entry = journal.begin("file", path=path)
        fd = Fd(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600))
        try:
            journal.commit(entry)
            fcntl.flock(fd.raw, fcntl.LOCK_EX)
            holder = member.holder.plain if member.holder is not None else None
            said = {"addresses": member.addresses, "names": member.names, "holder": holder}
            os.write(fd.raw, json.dumps(said).encode())
        except BaseException:
            fd.close()
            raise
    except OSError as error:
        raise HostError(
            f"cannot join the network at {network}: {error.strerror}", "kata network ls; kata gc"
        ) from error
    return Joined(fd, entry)


def living(network: str) -> list[Member]:
    """Those of a network whose engines are alive, in the order of their sandboxes' ids. Blocks briefly."""
    found = []
    try:
        names = sorted(os.listdir(directory(network)))
    except FileNotFoundError:
        return []
    for name in names:
        member = _read(os.path.join(directory(network), name))
        if member is not None:
            found.append(member)
    return found


def _read(path: str) -> Member | None:
    try:
        with Fd(os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)) as fd:
            try:
                fcntl.flock(fd.raw, fcntl.LOCK_SH | fcntl.LOCK_NB)
                return None  # nobody holds it: its engine is dead
            except OSError as error:
                if error.errno != errno.EWOULDBLOCK:
                    return None
            said = json.loads(os.read(fd.raw, _MOST_BYTES))
            return Member(said["addresses"], said["names"], Holder.read(said.get("holder")))
    except (OSError, ValueError, KeyError):
        return None  # it has just left, or is about to join
