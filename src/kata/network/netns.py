"""The network of a network namespace that somebody else wires (CNI, Docker, `ctr run --cni`), given to the guest.

The engine and the hypervisor run in that namespace. A tap device there is the other end of the guest's
interface, from the start and whether anything is wired yet or not; traffic between it and the interface that
is found in the namespace is redirected in both directions by tc, below the namespace's own IP stack. So the
guest has the interface's hardware address, addresses, MTU, routes and permanent neighbours, and the kind of the
interface does not matter. The tap is not persistent: it ends with the hypervisor, however that ends.

An interface that appears only after the machine was started (Docker 26 and newer, `ctr run --cni`) is taken by
`look_again`.
"""

from __future__ import annotations

import os
import struct

from kata import sysio
from kata.errors import HostError, UnsupportedError
from kata.hypervisor import slots
from kata.hypervisor.settings import Nic
from kata.network import rtnetlink
from kata.network.user import NetworkPlan

TYPE_CHECKING = False
if TYPE_CHECKING:
    from kata.network.rtnetlink import Link

TAP = "tap0_kata"
_TUNSETIFF = 0x400454CA
_IFF_TAP, _IFF_NO_PI, _IFF_VNET_HDR = 0x0002, 0x1000, 0x4000
_FAMILIES = {2: 0, 10: 1}  # AF_INET, AF_INET6 -> types.IPFamily
_LINK_SCOPE = 253
_TUNNELS = frozenset({"sit", "ipip", "gre", "gretap", "ip6tnl", "ip6gre", "vti", "vti6", "erspan", "dummy"})
"""Kinds that a kernel puts into every namespace by itself; down, they mean nothing."""


class NetnsPlan(NetworkPlan):
    """The network of a namespace.

    Args:
        mac: Hardware address of the guest's interface until one is found.
        path: The namespace's path; empty makes a new one, which ends with the engine.
    """

    wired_by_others = True

    def __init__(self, mac: str, path: str) -> None:
        super().__init__(mac)
        self._path = path
        self._tap = 0
        self._source: Link | None = None

    def wire(self) -> Nic:
        """Enter the namespace, make the tap and connect it to what is there. Main thread, before any other.

        Raises:
            HostError: The namespace cannot be entered, or the kernel lacks what is needed.
            UnsupportedError: There are several interfaces.
        """
        self._enter()
        fd = self._make_tap()
        try:
            self.look_again()
        except BaseException:
            os.close(fd)
            raise
        return Nic(self.mac, tap_fd=fd)

    def _enter(self) -> None:
        try:
            if not self._path:
                sysio.unshare(sysio.CLONE_NEWNET)
                return
            fd = os.open(self._path, os.O_RDONLY | os.O_CLOEXEC)
            try:
                sysio.setns(fd, sysio.CLONE_NEWNET)
            finally:
                os.close(fd)
        except OSError as error:
            where = f"the network namespace {self._path}" if self._path else "a network namespace"
            raise HostError(f"cannot enter {where}: {error.strerror}") from error

    def _make_tap(self) -> int:
        import fcntl

        try:
            fd = os.open("/dev/net/tun", os.O_RDWR | os.O_CLOEXEC | os.O_NONBLOCK)
            try:
                flags = _IFF_TAP | _IFF_NO_PI | _IFF_VNET_HDR
                fcntl.ioctl(fd, _TUNSETIFF, struct.pack("16sH22x", TAP.encode(), flags))
                with rtnetlink.Rtnl() as rtnl:
                    self._tap = next(link.index for link in rtnl.links() if link.name == TAP)
                    rtnl.bring_up(self._tap)
            except BaseException:
                os.close(fd)
                raise
        except OSError as error:
            raise rtnetlink.refused(f"cannot make the tap device {TAP}", error) from error
        return fd

    def look_again(self) -> bool:
        """Take the interface that has been put into the namespace, or what has changed of it. Blocks briefly.

        Returns:
            Whether there is something new: `interface`, `routes` and `neighbors` tell the guest of it.

        Raises:
            UnsupportedError: There are several interfaces, or one that carries no Ethernet frames.
            HostError: The kernel refused to redirect.
        """
        with rtnetlink.Rtnl() as rtnl:
            if self._source is not None:
                return self._describe(rtnl, self._source)
            found = [link for link in rtnl.links() if self._counts(link)]
            if not found:
                return False
            if len(found) > 1:
                names = ", ".join(link.name for link in found)
                raise UnsupportedError(
                    f"the network namespace has {len(found)} interfaces ({names}), and a sandbox takes one so far",
                    "Attach one network to the container.",
                )
            source = found[0]
            if len(source.mac) != 17:
                raise UnsupportedError(
                    f"the interface {source.name} ({source.kind or 'hardware'}) carries no Ethernet frames"
                )
            try:
                rtnl.bring_up(self._tap, source.mtu)
                rtnl.redirect(source.index, self._tap)
                rtnl.redirect(self._tap, source.index)
            except OSError as error:
                raise rtnetlink.refused(f"cannot redirect the traffic of {source.name}", error) from error
            self._describe(rtnl, source)
        self._source = source
        self.mac = source.mac
        return True

    def _counts(self, link: Link) -> bool:
        if link.flags & rtnetlink.LOOPBACK or link.index == self._tap:
            return False
        return bool(link.flags & rtnetlink.UP) or link.kind not in _TUNNELS

    def _describe(self, rtnl: rtnetlink.Rtnl, source: Link) -> bool:
        before = (self.interface, self.routes, self.neighbors)
        self.interface = {
            "device": source.name,
            "name": source.name,
            "IPAddresses": [
                {"family": int(":" in one.ip), "address": one.ip, "mask": str(one.prefix)}
                for one in rtnl.addresses()
                # The guest makes its own link-local address, from the same hardware address.
                if one.index == source.index and not (":" in one.ip and one.scope == _LINK_SCOPE)
            ],
            "mtu": source.mtu,
            "hwAddr": source.mac,
            "devicePath": slots.nic_path(),
            "raw_flags": source.flags & rtnetlink.NOARP,
        }
        self.routes = [
            {
                "dest": route.destination,
                "gateway": route.gateway,
                "device": source.name,
                "source": route.source,
                "scope": route.scope,
                "family": _FAMILIES[route.family],
            }
            for route in rtnl.routes()
            if route.index == source.index
        ]
        self.neighbors = [
            {
                "toIPAddress": {"family": int(":" in one.ip), "address": one.ip},
                "device": source.name,
                "lladdr": one.mac,
                "state": rtnetlink.PERMANENT,
            }
            for one in rtnl.neighbors()
            if one.index == source.index
        ]
        return before != (self.interface, self.routes, self.neighbors)

    def stop(self) -> None:
        """Let the interface go. What it is part of may be gone already."""
        if self._source is None:
            return
        try:
            with rtnetlink.Rtnl() as rtnl:
                rtnl.stop_redirecting(self._source.index)
        except OSError:
            pass  # with its namespace, or about to be
        self._source = None
