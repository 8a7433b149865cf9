"""Connects a guest to the network of a namespace by a macvtap device on each interface: the alternative to
`kata.network.netns`.

In mode "passthru" a macvtap takes over the whole interface: all incoming traffic goes to the guest, under the
interface's own hardware address, as with the redirection of `kata.network.netns` but with one device less in between. A
macvtap cannot be made on a macvlan or ipvlan interface, nor on one that appears after the machine has started.

Source: ``drivers/net/macvlan.c`` and ``macvtap.c``; ``linux/if_link.h`` for the messages.
"""

from __future__ import annotations

import os
import socket

from kata import sysio
from kata.errors import HostError, UnsupportedError
from kata.hypervisor.base import Nic
from kata.network import rtnetlink
from kata.network.netns import Endpoint, NetnsPlan

TYPE_CHECKING = False
if TYPE_CHECKING:
    from kata.journal import Journal
    from kata.network.rtnetlink import Link

NAME = "mvtap{}_kata"
_HINT = 'internetworking_model = "tcfilter" does with any interface that carries Ethernet frames.'


class _Macvtap(Endpoint):
    """A macvtap on an interface; the journal's entry records the device.

    Args:
        index: Index among the machine's interfaces, from 0.
        rtnl: A socket in the namespace.
        source: The interface below the macvtap.
        journal: The sandbox's journal; None for a namespace that ends with the engine.
        path: Path of the namespace.

    Raises:
        HostError: The kernel refused.
    """

    __slots__ = ()

    def __init__(
        self, index: int, rtnl: rtnetlink.Rtnl, source: Link, journal: Journal | None, path: str
    ) -> None:
        super().__init__(index, source.mac)
        name = NAME.format(index)
        if journal is not None:
            self.entry = journal.begin("tap", name=name, netns=path)
        try:
            rtnl.add_macvtap(name, source.index)
            if journal is not None and self.entry is not None:
                journal.commit(self.entry)
            self.tap = next(link.index for link in rtnl.links() if link.name == name)
            rtnl.bring_up(self.tap)
            self.fd = sysio.Fd(_open(name, self.tap))
        except OSError as error:
            # What was made before the error is undone with the journal.
            raise HostError(
                f"cannot make a macvtap on {source.name} ({source.kind or 'hardware'}): {error.strerror}",
                _HINT,
            ) from error
        self.source = source

    def disconnect(self, rtnl: rtnetlink.Rtnl) -> None:
        rtnl.delete_link(self.tap)


class MacvtapPlan(NetnsPlan):
    """The network of a namespace by macvtap. See `NetnsPlan` for its parameters."""

    def setup_nics(self, most: int, *, hotplug: bool = False) -> list[Nic]:
        """Enter the namespace and make a macvtap on each of its interfaces. See `NetworkPlan.setup_nics`.

        Only in the main thread, before there is any other.

        Raises:
            HostError: The namespace cannot be entered, or the kernel refused.
            UnsupportedError: There are more interfaces than a machine has plugs.
        """
        self.enter()
        with rtnetlink.Rtnl() as rtnl:
            found = self.new_links(rtnl)
            if len(found) > most:
                raise UnsupportedError(
                    f"the namespace has {len(found)} interfaces", f"A machine has {most} at most."
                )
            journal = self.journal if self.path else None
            try:
                for index, source in enumerate(found):
                    self.endpoints.append(_Macvtap(index, rtnl, source, journal, self.path))
                self.describe(rtnl)
            except BaseException:
                self.close_taps()
                raise
        nics = [Nic(endpoint.mac, tap_fd=endpoint.fd) for endpoint in self.endpoints]
        return nics or [Nic(self.mac)][:most]

    def rescan(self, *, is_running: bool = False) -> bool:
        """Look for changes of the interfaces; see `NetnsPlan.rescan`.

        Raises:
            UnsupportedError: There is a new interface.
        """
        before = self._described()
        with rtnetlink.Rtnl() as rtnl:
            self._refresh(rtnl)
            late = self.new_links(rtnl)
            self.describe(rtnl)
        for link in late:
            error = f"the interface {link.name} was attached after the machine's start, which macvtap cannot follow"
            if not is_running:
                raise UnsupportedError(error, _HINT)
            self.left_out.append(error)
        return before != self._described()


def _open(name: str, index: int) -> int:
    """Open the character device of a macvtap in this namespace.

    The node in the host's /dev cannot be used: its name is made of the interface's index, which is unique only within
    its namespace. So a child looks up the device number in a sysfs of this namespace and makes a node of its own.

    Raises:
        OSError: One of these steps failed.
    """
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    child = os.fork()
    if child == 0:
        try:
            sysio.unshare(sysio.CLONE_NEWNS)
            sysio.mount(None, "/", None, sysio.MS_REC | sysio.MS_PRIVATE)
            sysio.mount("sysfs", "/sys", "sysfs", sysio.MS_NOSUID | sysio.MS_NOEXEC)
            with open(f"/sys/class/net/{name}/macvtap/tap{index}/dev", encoding="ascii") as file:
                major, minor = map(int, file.read().split(":"))
            sysio.mount("tmpfs", "/sys", "tmpfs")
            os.mknod("/sys/tap", 0o600 | 0o020000, os.makedev(major, minor))
            fd = os.open("/sys/tap", os.O_RDWR | os.O_CLOEXEC | os.O_NONBLOCK)
            socket.send_fds(theirs, [b"\0"], [fd])
        except OSError as error:
            theirs.send(bytes([error.errno or 5]))
        finally:
            os._exit(0)
    theirs.close()
    with ours:
        word, fds, _, _ = socket.recv_fds(ours, 1, 1)
    os.waitpid(child, 0)
    if not fds:
        number = word[0] if word else 5
        raise OSError(number, os.strerror(number), name)
    return fds[0]
