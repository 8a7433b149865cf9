"""The namespace of a network with a name, which lives as long as one of its members.

It is bind-mounted nowhere: an ordinary user's commands have a mount namespace each, so that none would find another's
mount; and what nobody has to remove cannot be left behind. Each member's engine holds a descriptor of it, and so does
each command that is about to start one. Where to find one of these is written down, by commands in the network's record
(`kata.cli.networks`), by engines in their members' files. Who opens it from there holds it, too: ``/proc/PID/fd`` leads
to the namespace itself. When the last has gone, the kernel ends it with the bridge in it, and the next member makes
another.

Sources: proc(5), "/proc/pid/fd"; namespaces(7), "Namespace lifetime".
"""

from __future__ import annotations

import os

from kata import sysio, threads
from kata.network import rtnetlink

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterable
    from typing import Any

BRIDGE = "bridge0"
MTU = 1500


class Holder:
    """A descriptor of a namespace in some process.

    Args:
        pid: The process.
        starttime: When that began (proc(5)).
        fd: The descriptor's number.
        inode: The namespace's.
    """

    __slots__ = ("fd", "inode", "pid", "starttime")

    def __init__(self, pid: int, starttime: int, fd: int, inode: int) -> None:
        self.pid = pid
        self.starttime = starttime
        self.fd = fd
        self.inode = inode

    @classmethod
    def own(cls, namespace: sysio.Fd) -> Holder:
        """This process, with a descriptor that stays open as long as the holder is written down."""
        starttime = sysio.proc_starttime(os.getpid())
        assert starttime is not None
        return cls(os.getpid(), starttime, namespace.raw, os.fstat(namespace.raw).st_ino)

    @classmethod
    def read(cls, value: Any) -> Holder | None:
        """What `plain` has written; None for anything else."""
        if isinstance(value, list) and len(value) == 4 and all(isinstance(one, int) for one in value):
            return cls(*value)
        return None

    @property
    def path(self) -> str:
        """Where the namespace can be opened while that process has it."""
        return f"/proc/{self.pid}/fd/{self.fd}"

    @property
    def plain(self) -> list[int]:
        """Itself as a JSON value."""
        return [self.pid, self.starttime, self.fd, self.inode]

    def alive(self) -> bool:
        """Whether the process is still there."""
        return sysio.process_alive(self.pid, self.starttime, sysio.boot_id())

    def open(self) -> sysio.Fd | None:
        """A descriptor of one's own; None where that process has ended, or let go of it.

        Raises:
            PermissionError: The process is in a user namespace that this one cannot look into.
        """
        if not self.alive():
            return None
        try:
            found = sysio.Fd(os.open(self.path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC))
        except PermissionError:
            raise
        except OSError:
            return None
        if os.fstat(found.raw).st_ino != self.inode or not self.alive():
            found.close()  # it has ended, and its number is another's
            return None
        return found


def open_any(holders: Iterable[Holder]) -> sysio.Fd | None:
    """A descriptor of a namespace that one of these has; None where nobody has it any more.

    Raises:
        PermissionError: Somebody has it who is in a user namespace that this one cannot look into.
    """
    for holder in holders:
        found = holder.open()
        if found is not None:
            return found
    return None


def make() -> sysio.Fd:
    """Make a namespace with nothing but a bridge in it, which ends with its last descriptor.

    Raises:
        OSError: The kernel refused.
    """
    return threads.aside(_make)


def _make() -> sysio.Fd:
    sysio.unshare(sysio.CLONE_NEWNET)
    # The host's end of it says nothing on it by itself.
    for which in ("all", "default"):
        try:
            sysio.write_existing(f"/proc/sys/net/ipv6/conf/{which}/disable_ipv6", "1")
        except FileNotFoundError:
            pass  # without IPv6
    with rtnetlink.Rtnl() as rtnl:
        rtnl.add_bridge(BRIDGE)
        rtnl.bring_up(rtnl.index_of(BRIDGE), MTU)
    return sysio.Fd(os.open("/proc/thread-self/ns/net", os.O_RDONLY | os.O_CLOEXEC))
