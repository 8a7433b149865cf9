"""Tap devices for a monitor that opens them by their names.

A tap goes with the last descriptor of it, and has one at a time. So it is made persistent and closed, opened by the
monitor, which is in its network namespace as we are, and removed when the machine has ended: by us, or by the journal.
Sources: the kernel's ``drivers/net/tun.c`` and ``linux/if_tun.h``.
"""

from __future__ import annotations

import os
import struct

from kata.errors import HypervisorError, UnsupportedError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Sequence

    from kata.hypervisor.base import Nic
    from kata.journal import Entry, Journal

_TUNSETIFF, _TUNGETIFF = 0x400454CA, 0x800454D2
_TUNSETOWNER, _TUNSETPERSIST, _TUNGETDEVNETNS = 0x400454CC, 0x400454CB, 0x54E3
_FLAGS = 0x5002  # IFF_TAP | IFF_NO_PI | IFF_VNET_HDR
_NAMED = "/run/netns"


class Taps:
    """The taps of one machine that outlast their descriptors.

    Attributes:
        names: Name of each interface's tap, by the interface's number.
    """

    __slots__ = ("_entries", "_journal", "names")

    def __init__(self, journal: Journal) -> None:
        self.names: dict[int, str] = {}
        self._entries: list[Entry] = []
        self._journal = journal

    def take(self, nics: Sequence[Nic], user: int) -> None:
        """Take over the taps of a machine's interfaces, and close their descriptors.

        Args:
            nics: The interfaces.
            user: The monitor's, who may open them.

        Raises:
            UnsupportedError: One is connected to something else than a tap of our network namespace.
            HypervisorError: The kernel refuses.
        """
        from fcntl import ioctl

        for index, nic in enumerate(nics):
            if nic.tap_fd is None:
                continue
            fd = nic.tap_fd.raw
            try:
                name = ioctl(fd, _TUNGETIFF, bytes(40))[:16].rstrip(b"\0").decode()
                network = ioctl(fd, _TUNGETDEVNETNS)
            except OSError as error:
                raise UnsupportedError(
                    "Firecracker opens a tap device by its name, and this network has none",
                    "Use a network whose interfaces are taps, or none.",
                ) from error
            try:
                ours = os.path.samestat(os.fstat(network), os.stat("/proc/thread-self/ns/net"))
                where = _path_of(network)
            finally:
                os.close(network)
            if not ours:
                raise UnsupportedError(
                    f"the tap device {name} is in another network namespace than Firecracker"
                )
            entry = self._journal.begin("tap", name=name, netns=where)
            self._journal.commit(entry)
            self._entries.append(entry)
            self.names[index] = name
            try:
                ioctl(fd, _TUNSETOWNER, user or os.geteuid())
                ioctl(fd, _TUNSETPERSIST, 1)
            except OSError as error:
                raise HypervisorError(f"cannot keep the tap device {name}: {error.strerror}") from error
            nic.tap_fd.close()

    def remove(self) -> None:
        """Remove them, after the monitor's end. Idempotent. One that cannot be removed is left to the journal."""
        from fcntl import ioctl

        for entry in self._entries:
            try:
                fd = os.open("/dev/net/tun", os.O_RDWR | os.O_CLOEXEC)
                try:
                    ioctl(fd, _TUNSETIFF, struct.pack("16sH22x", entry.params["name"].encode(), _FLAGS))
                    ioctl(fd, _TUNSETPERSIST, 0)
                finally:
                    os.close(fd)
            except OSError:
                continue
            self._journal.mark_gone(entry)
        self._entries.clear()


def _path_of(network: int) -> str:
    """The name under which a network namespace is mounted; empty if it has none there."""
    own = os.fstat(network)
    try:
        names = os.listdir(_NAMED)
    except OSError:
        return ""
    for name in names:
        path = os.path.join(_NAMED, name)
        try:
            known = os.stat(path)
        except OSError:
            continue
        if (known.st_dev, known.st_ino) == (own.st_dev, own.st_ino):
            return path
    return ""
