"""Gives the guest the network of a namespace that a client configures (CNI, Docker, `ctr run --cni`).

The engine and the hypervisor run in that namespace, but for the hypervisor of a machine that waited for its sandbox
(`SpareTap`), of which only the tap comes there. For each interface of the guest it has a tap device; the first tap
is made at the start, even if the namespace has no interface yet, unless none is expected. tc redirects all traffic
between a tap and an interface of the namespace in both directions, below the namespace's own IP stack. So the guest
gets the interface's hardware address, addresses, MTU, routes and permanent neighbours, and any kind of Ethernet
interface works. A tap is not persistent: it disappears with the hypervisor, however that ends. In a namespace of the
engine's own it stays until the engine ends, too (`NetnsPlan.let_go`).

Interfaces may appear only after the machine has started (Docker 26 and newer, `ctr run --cni`); `rescan` finds them.
The first one uses the slot that a machine has for it. Further ones are hot-plugged into ports, which a machine has if
its namespace was empty when it started; so is the first one where none was expected (`NetworkPlan.stays_empty`). An
interface that is removed from the namespace frees its slot.
"""

from __future__ import annotations

import _socket as socket  # `socket` makes enumerations, which take 10 ms before the machine starts
import errno
import os
import struct
from abc import ABC, abstractmethod

from kata import sysio
from kata.errors import HostError, UnsupportedError
from kata.hypervisor.base import Nic
from kata.network import routing, rtnetlink, sysctls
from kata.network.user import NetworkPlan

TYPE_CHECKING = False
if TYPE_CHECKING:
    from kata.journal import Entry, Journal
    from kata.network.rtnetlink import Link

TAP = "tap{}_kata"
TUNSETIFF, _TUNSETIFINDEX = 0x400454CA, 0x400454DA
_FIRST_INDEX = 0x3FFFFFFC
"""Index of the first tap, far above the indexes that the kernel hands out. Some clients (nerdctl) assume that the first
interface which is up belongs to the container. An interface that CNI makes later would come after a tap with an
ordinary index, and clients would take the tap. Interfaces are listed by index; before Linux 6.8, by its lowest byte."""
_IFF_VNET_HDR = 0x4000
TAP_FLAGS = 0x1002
"""IFF_TAP and IFF_NO_PI: Ethernet frames with nothing before them."""
_TUNNELS = frozenset({"sit", "ipip", "gre", "gretap", "ip6tnl", "ip6gre", "vti", "vti6", "erspan", "dummy"})
"""Kinds of interfaces that the kernel creates in every namespace; they are ignored while they are down."""


class Endpoint(ABC):
    """One interface of the guest: its tap, and the interface of the namespace behind it.

    Attributes:
        index: Index among the machine's interfaces, from 0.
        tap: Interface index of the tap device.
        fd: The tap's descriptor, until the hypervisor or a caller takes it.
        mac: Hardware address with which the guest's interface is started.
        path: Address of the interface in the guest, after `NetnsPlan.place`.
        source: The namespace's interface that it is connected to, once there is one.
        entry: The journal's entry of what was made in the namespace.
    """

    __slots__ = ("entry", "fd", "index", "mac", "path", "source", "tap")

    def __init__(self, index: int, mac: str) -> None:
        self.index = index
        self.path = ""
        self.mac = mac
        self.source: Link | None = None
        self.entry: Entry | None = None
        self.fd: sysio.Fd | None = None
        self.tap = -1

    @abstractmethod
    def disconnect(self, rtnl: rtnetlink.Rtnl) -> None:
        """Undo what was made in the namespace.

        Raises:
            OSError: The kernel refused.
        """


class Redirected(Endpoint):
    """An endpoint whose traffic is redirected; the journal's entry records the redirection."""

    __slots__ = ()

    def __init__(self, index: int, mac: str, *, is_made: bool = False) -> None:
        super().__init__(index, mac)
        self.tap = _FIRST_INDEX + index
        if not is_made:
            self.fd = sysio.Fd(make_tap(TAP.format(index), self.tap))

    def disconnect(self, rtnl: rtnetlink.Rtnl) -> None:
        assert self.source is not None
        rtnl.stop_redirecting(self.source.index)

    def connect(self, rtnl: rtnetlink.Rtnl, source: Link, journal: Journal | None, path: str) -> None:
        """Connect the tap to an interface of the namespace.

        Args:
            rtnl: A socket in the namespace.
            source: The interface.
            journal: The sandbox's journal; None for a namespace that ends with the engine.
            path: Path of the namespace.

        Raises:
            UnsupportedError: The interface carries no Ethernet frames.
            HostError: The kernel refused to redirect.
        """
        if not is_ethernet(source):
            raise UnsupportedError(
                f"the interface {source.name} ({source.kind or 'hardware'}) carries no Ethernet frames",
                "Attach a network with Ethernet interfaces: veth, macvlan, ipvlan in L2 mode, tap.",
            )
        try:
            rtnl.bring_up(self.tap, source.mtu)
            if journal is not None:
                self.entry = journal.begin("redirect", name=source.name, netns=path)
                journal.commit(self.entry)
            rtnl.redirect(source.index, self.tap)
            rtnl.redirect(self.tap, source.index)
        except OSError as error:
            raise rtnetlink.refused(f"cannot redirect the traffic of {source.name}", error) from error
        self.source = source
        self.mac = source.mac


class SpareTap:
    """The tap of a machine that waits for a sandbox, in a network namespace of its own. Making one moves this thread
    there; before there is any other.

    Attributes:
        namespace: The namespace.
        fd: The tap's descriptor, which the hypervisor takes.
        held: Another one of the same tap, which a plan may take.

    Raises:
        HostError: It cannot be made.
    """

    __slots__ = ("_rtnl", "fd", "held", "namespace")

    def __init__(self) -> None:
        try:
            sysio.unshare(sysio.CLONE_NEWNET)
        except OSError as error:
            raise HostError(f"cannot make a network namespace: {error.strerror}", "Run as root.") from error
        self.namespace = sysio.Fd(os.open("/proc/thread-self/ns/net", os.O_RDONLY | os.O_CLOEXEC))
        self._rtnl = rtnetlink.Rtnl()
        self.fd = sysio.Fd(make_tap(TAP.format(0), _FIRST_INDEX))
        self.held = sysio.Fd(os.dup(self.fd.raw))

    def bring_here(self, mac: str, *, moves: bool) -> Redirected:
        """The endpoint of a machine that is there already, in this thread's network namespace.

        Args:
            mac: Of the interface of the namespace.
            moves: This is another namespace than that in which it was made.

        Raises:
            HostError: The kernel refused.
            UnsupportedError: Another machine is in this network namespace.
        """
        endpoint = Redirected(0, mac, is_made=True)
        if not moves:
            return endpoint
        try:
            with sysio.Fd(os.open("/proc/thread-self/ns/net", os.O_RDONLY | os.O_CLOEXEC)) as here:
                self._rtnl.move(endpoint.tap, here.raw)
            endpoint.tap = socket.if_nametoindex(TAP.format(0))
            with rtnetlink.Rtnl() as rtnl:
                rtnl.bring_up(endpoint.tap)
        except OSError as error:
            if error.errno == errno.EEXIST:
                raise _is_taken(TAP.format(0)) from error
            raise rtnetlink.refused("cannot move a tap device", error) from error
        return endpoint

    def close(self) -> None:
        """Let go of the namespace, which ends with the last thing in it."""
        self.fd.close()
        self.held.close()
        self._rtnl.close()
        self.namespace.close()


def is_ethernet(link: Link) -> bool:
    """Whether an interface carries Ethernet frames."""
    return len(link.mac) == 17


def link_local(mac: str) -> str:
    """The IPv6 link-local address that the kernel derives from a hardware address by default."""
    raw = bytearray.fromhex(mac.replace(":", ""))
    raw[0] ^= 2
    return socket.inet_ntop(socket.AF_INET6, b"\xfe\x80" + bytes(6) + raw[:3] + b"\xff\xfe" + raw[3:])


class NetnsPlan(NetworkPlan):
    """The network of a namespace.

    Args:
        mac: Hardware address of the guest's interface until the namespace has an interface.
        path: Path of the namespace; empty makes a new one, which ends with the engine.
        model: ``tcfilter``; or ``none``: the hypervisor runs in the namespace, but the guest is not connected to it.
    """

    external_netns = True

    def __init__(self, mac: str, path: str, model: str = "tcfilter") -> None:
        super().__init__(mac)
        self.path = path
        self._connects = model != "none"
        self.backend = "tap" if self._connects else ""
        self._most_nics = 0
        self.spare: SpareTap | None = None
        """The tap of a machine that is there already. Set before `setup_nics`."""
        self._held: list[sysio.Fd] = []
        self.endpoints: list[Endpoint] = []
        self._pending_hotplugs: list[Endpoint] = []
        self.routing = []
        self.rules = []

    def setup_nics(self, most: int, *, hotplug: bool = False) -> list[Nic]:
        """Enter the namespace, make the taps and connect them to its interfaces. See `NetworkPlan.setup_nics`.

        Only in the main thread, before there is any other.

        Raises:
            HostError: The namespace cannot be entered, or the kernel lacks a feature.
            UnsupportedError: An interface carries no Ethernet frames, or there are too many.
        """
        self.enter()
        self._most_nics = most
        if not self._connects:
            return super().setup_nics(most)
        try:
            with rtnetlink.Rtnl() as rtnl:
                found = self.new_links(rtnl)
            if hotplug and not (found or self.path or self.keeps_ports) and self.stays_empty:
                self.hotplug_nics = most
                return []
            for index in range(max(1, min(len(found), most))):
                mac = found[index].mac if found else self.mac
                if self.spare is not None and index == 0:
                    self.endpoints.append(self.spare.bring_here(mac, moves=bool(self.path)))
                    self._hold(self.spare.held)
                else:
                    self.endpoints.append(self._tap(index, mac))
            self.rescan()
        except BaseException:
            self.close_taps()
            raise
        if hotplug and (not found or (self.keeps_ports and len(found) == 1)):
            # The client that configures it later may attach several networks.
            self.hotplug_nics = most - 1
        return [Nic(endpoint.mac, tap_fd=endpoint.fd) for endpoint in self.endpoints]

    def close_taps(self) -> None:
        """Close the taps whose descriptors were not taken, and those that are held."""
        self.let_go()
        for endpoint in self.endpoints:
            if endpoint.fd is not None:
                endpoint.fd.close()

    def let_go(self) -> None:
        """See `NetworkPlan.let_go`.

        The last to close a tap waits until nothing in the kernel still reads the device, 37 to 53 ms on a busy machine.
        It is not to be the hypervisor, for whose end clients wait. So in a namespace of its own, which nobody looks
        into and no other machine comes to, the engine holds the tap as well, until it ends itself.
        """
        while self._held:
            self._held.pop().close()

    def take_pending_hotplugs(self) -> list[tuple[int, Nic]]:
        """See `NetworkPlan.take_pending_hotplugs`."""
        found, self._pending_hotplugs = self._pending_hotplugs, []
        return [(one.index, Nic(one.mac, tap_fd=one.fd)) for one in found]

    def place(self, index: int, address: str) -> None:
        """See `NetworkPlan.place`."""
        self.addresses[index:] = [address]
        if index >= len(self.endpoints):
            return
        endpoint = self.endpoints[index]
        endpoint.path = address
        for interface in self.interfaces:
            if endpoint.source is not None and interface["name"] == endpoint.source.name:
                interface["devicePath"] = address

    def enter(self) -> None:
        """Move this thread into the namespace, or into a new one.

        Raises:
            HostError: The namespace is gone, or this process may not enter it.
        """
        try:
            if not self.path:
                if self.spare is not None:
                    sysio.setns(self.spare.namespace.raw, sysio.CLONE_NEWNET)
                    return
                sysio.unshare(sysio.CLONE_NEWNET)
                return
            fd = os.open(self.path, os.O_RDONLY | os.O_CLOEXEC)
            try:
                sysio.setns(fd, sysio.CLONE_NEWNET)
            finally:
                os.close(fd)
        except OSError as error:
            where = f"the network namespace {self.path}" if self.path else "a network namespace"
            raise HostError(
                f"cannot enter {where}: {error.strerror}",
                "Has whoever made it taken it away again (ip netns)?" if self.path else "Run as root.",
            ) from error

    def new_links(self, rtnl: rtnetlink.Rtnl) -> list[Link]:
        """The interfaces of the namespace that no endpoint is connected to yet, in the order of their indexes."""
        ours = {endpoint.tap for endpoint in self.endpoints}
        ours |= {endpoint.source.index for endpoint in self.endpoints if endpoint.source is not None}
        return [
            link
            for link in rtnl.links()
            if not link.flags & rtnetlink.LOOPBACK
            and link.index not in ours
            and (link.flags & rtnetlink.UP or link.kind not in _TUNNELS)
        ]

    def rescan(self, *, is_running: bool = False) -> bool:
        """Look for new interfaces in the namespace and for changes of the known ones. Blocks briefly.

        Args:
            is_running: Whether containers are running. If so, an interface that is not up yet is left for a later
                scan, and one that cannot be used is reported in `left_out` instead of raising an error.

        Returns:
            Whether something has changed. If so, the caller hot-plugs what `take_pending_hotplugs` returns and sends
            `interfaces`, routes and neighbours to the guest.

        Raises:
            UnsupportedError: An interface carries no Ethernet frames, or the machine has no slot left for it.
            HostError: The kernel refused to redirect.
        """
        if not self._connects:
            return False
        before = self._described()
        with rtnetlink.Rtnl() as rtnl:
            self._refresh(rtnl)
            free = [one for one in self.endpoints if isinstance(one, Redirected) and one.source is None]
            new = self.new_links(rtnl)
            refused: list[str] = []
            if is_running:
                new = [link for link in new if link.flags & rtnetlink.UP]
                refused = [
                    f"the interface {link.name} carries no Ethernet frames"
                    for link in new
                    if not is_ethernet(link)
                ]
                new = [link for link in new if is_ethernet(link)]
            if len(new) > len(free) + self.hotplug_nics:
                late = new[len(free) + self.hotplug_nics :]
                error = self._no_plug(", ".join(link.name for link in late))
                if not is_running:
                    raise error
                refused.append(f"{error.message}; it is there from the container's next start on")
                new = new[: len(free) + self.hotplug_nics]
            for source in new[len(free) :]:
                free.append(self._late(source.mac))
            for endpoint, source in zip(free, new, strict=False):
                endpoint.connect(rtnl, source, self.journal if self.path else None, self.path)
            self.describe(rtnl)
            self.left_out += refused
        return before != self._described()

    def _described(self) -> tuple[object, ...]:
        return self.interfaces, self.routing, self.rules, self.neighbors, self.left_out

    def _no_plug(self, names: str) -> UnsupportedError:
        return UnsupportedError(
            f"there is no plug for the network interface {names}: this machine has"
            f" {len(self.endpoints) + self.hotplug_nics}",
            f"At most {self._most_nics} networks. A machine that starts with one cannot be given more.",
        )

    def _refresh(self, rtnl: rtnetlink.Rtnl) -> None:
        """Look again at the known interfaces: one may have changed, or be gone."""
        links = {link.index: link for link in rtnl.links()}
        for endpoint in self.endpoints:
            if endpoint.source is None:
                continue
            link = links.get(endpoint.source.index)
            if link is None:
                self._release(rtnl, endpoint)
                continue
            if isinstance(endpoint, Redirected) and link.mtu != endpoint.source.mtu:
                rtnl.bring_up(endpoint.tap, link.mtu)
            endpoint.source = link

    def _release(self, rtnl: rtnetlink.Rtnl, endpoint: Endpoint) -> None:
        if not isinstance(endpoint, Redirected):
            return  # it ended with the interface below it
        rtnl.stop_redirecting(endpoint.tap)
        endpoint.source = None
        if endpoint.entry is not None and self.journal is not None:
            self.journal.mark_gone(endpoint.entry)
            endpoint.entry = None

    def idle(self) -> list[str]:
        """See `NetworkPlan.idle`."""
        if not self.endpoints:
            return super().idle()
        return [endpoint.path for endpoint in self.endpoints if endpoint.source is None]

    def sysctls(self) -> list[dict[str, str]]:
        """See `NetworkPlan.sysctls`."""
        of_all = sysctls.of_namespace()
        found = [sysctls.of_interface(interface["name"]) for interface in self.interfaces]
        if found:
            found[0] = {**of_all, **found[0]}
        return found

    def let_replies_in(self) -> None:
        """See `NetworkPlan.let_replies_in`."""
        from kata.network import replies

        try:
            for endpoint in self.endpoints:
                if isinstance(endpoint, Redirected) and endpoint.source is not None:
                    replies.let_in(endpoint.source.index, endpoint.tap)
        except OSError as error:
            raise HostError(
                f"cannot let answers into the sandbox's network namespace: {error.strerror}",
                "Check that the kernel has cls_bpf (CONFIG_NET_CLS_BPF).",
            ) from error

    def _late(self, mac: str) -> Redirected:
        """Make a further endpoint, for a hotplug port of the machine."""
        endpoint = self._tap(len(self.endpoints), mac)
        self.hotplug_nics -= 1
        self.endpoints.append(endpoint)
        self._pending_hotplugs.append(endpoint)
        return endpoint

    def _tap(self, index: int, mac: str) -> Redirected:
        endpoint = Redirected(index, mac)
        if endpoint.fd is not None:
            self._hold(endpoint.fd)
        return endpoint

    def _hold(self, tap: sysio.Fd) -> None:
        if not self.path:
            self._held.append(sysio.Fd(os.dup(tap.raw)))

    def describe(self, rtnl: rtnetlink.Rtnl) -> None:
        """Set the attributes that describe the network to the guest: interfaces, routes, neighbours, names."""
        named = {one.source.index: one for one in self.endpoints if one.source is not None}
        addresses, neighbors = rtnl.addresses(), rtnl.neighbors()
        self.interfaces = [
            {
                "device": source.name,
                "name": source.name,
                "IPAddresses": [
                    {"family": int(":" in one.ip), "address": one.ip, "mask": str(one.prefix)}
                    for one in addresses
                    # The guest makes its own link-local address, from the same hardware address.
                    if one.index == source.index and one.ip != link_local(source.mac)
                ],
                "mtu": source.mtu,
                "hwAddr": source.mac,
                "devicePath": endpoint.path,
                "raw_flags": source.flags & rtnetlink.NOARP,
            }
            for endpoint in self.endpoints
            if (source := endpoint.source) is not None
        ]
        names = {index: one.source.name for index, one in named.items() if one.source is not None}
        self.names = {
            link.index: link.name for link in rtnl.links() if link.flags & rtnetlink.LOOPBACK
        } | names
        self.left_out = []
        self.routing = routing.routes(rtnl, self.names, self.left_out)
        self.rules = routing.rules(rtnl, self.left_out)
        self.neighbors = [
            {
                "toIPAddress": {"family": int(":" in one.ip), "address": one.ip},
                "device": names[one.index],
                "lladdr": one.mac,
                "state": rtnetlink.PERMANENT,
            }
            for one in neighbors
            if one.index in names
        ]
        if len(self.neighbors) > routing.MOST:
            self.left_out.append(
                f"{len(self.neighbors) - routing.MOST} of {len(self.neighbors)} permanent neighbours are not"
                f" in the guest: at most {routing.MOST} are carried"
            )
            del self.neighbors[routing.MOST :]

    def stop(self) -> None:
        """Disconnect the interfaces. The namespace may be gone already."""
        for endpoint in self.endpoints:
            if endpoint.source is None:
                continue
            try:
                with rtnetlink.Rtnl() as rtnl:
                    endpoint.disconnect(rtnl)
            except OSError:
                continue  # it is gone with its namespace; otherwise undoing the journal tries again
            endpoint.source = None
            if endpoint.entry is not None and self.journal is not None:
                self.journal.mark_gone(endpoint.entry)


def make_tap(name: str, index: int = 0) -> int:
    """Make a tap device in this namespace and bring it up. Returns its descriptor.

    Args:
        name: Its name.
        index: Its number, which nothing else in the namespace may have; 0 leaves that to the kernel.

    Raises:
        HostError: It cannot be made.
        UnsupportedError: There is one of that name.
    """
    import fcntl

    try:
        fd = os.open("/dev/net/tun", os.O_RDWR | os.O_CLOEXEC | os.O_NONBLOCK)
        try:
            flags = TAP_FLAGS | _IFF_VNET_HDR
            if index:
                fcntl.ioctl(fd, _TUNSETIFINDEX, struct.pack("I", index))
            fcntl.ioctl(fd, TUNSETIFF, struct.pack("16sH22x", name.encode(), flags))
            with rtnetlink.Rtnl() as rtnl:
                rtnl.bring_up(index or socket.if_nametoindex(name))
        except BaseException:
            os.close(fd)
            raise
    except OSError as error:
        if error.errno in (errno.EBUSY, errno.EEXIST):
            raise _is_taken(name) from error
        raise rtnetlink.refused(f"cannot make the tap device {name}", error) from error
    return fd


def _is_taken(name: str) -> UnsupportedError:
    return UnsupportedError(
        f"another virtual machine is in this network namespace: it has the device {name} already",
        "Each sandbox needs a network namespace of its own; the containers of a pod share their pod's.",
    )
