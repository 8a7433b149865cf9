"""Networks with a name: a bridge in a network namespace of the network's own.

The namespace (`kata.network.held`) has nothing but the bridge, and for each machine a tap that is a port of it. It has
no address and no route, so nothing goes from one network to another, nor to or from the host's own network, whose
interfaces, firewall and forwarding stay as they are. What leaves for the outside takes the machine's first interface,
which is the user network (`kata.network.user`, for an ordinary user `kata.network.nested`); ports are published there.
Where all networks of a machine are internal, that interface is there and leads nowhere. A tap ends with its hypervisor,
and everything else with the namespace.

A machine that is in such a network starts with all the interfaces that it may have, so that one template does for all
and a network can be given to it while it runs. A spare one's tap is no port of any bridge. It is in the namespace of
the first network until it is needed, and the guest has its device without a driver (`NetworkPlan.idle`).

Names are answered by each sandbox's own engine (`own_names`), which finds the others in the network's directory
(`members`).
"""

from __future__ import annotations

import contextlib
import os
import socket

from kata import children, own_namespace, sysio, threads
from kata.errors import HostError, NotFoundError, UnsupportedError
from kata.hypervisor.base import Nic, random_mac
from kata.network import held, members, netns, own_names, resolver, rtnetlink
from kata.network.held import BRIDGE
from kata.network.nested import NestedPlan
from kata.network.user import INTERFACE, UserPlan

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from typing import Any

    from kata.errors import KataError
    from kata.journal import Journal
    from kata.network.user import HostNetwork, Port
    from kata.settings import EndpointSettings


class BridgedPlan(UserPlan):
    """A user network by passt, and networks with a name.

    Args:
        mac: Hardware address of the guest's first interface.
        ports: What is published.
        host: The host's network.
        dns: Name servers that were asked for, for names outside; empty is the host's.
        program: Path of passt.
        endpoints: The networks with a name.
        outside: Whether there is a way out; without it, neither passt nor a name server is.
        how: What the user network has to know besides (`UserPlan`, `NestedPlan`).
    """

    def __init__(
        self,
        mac: str,
        ports: Sequence[Port],
        host: HostNetwork,
        dns: Sequence[str] = (),
        program: str = "",
        *,
        endpoints: Sequence[EndpointSettings] = (),
        outside: bool = True,
        **how: Any,
    ) -> None:
        self._servers: list[str] = []
        super().__init__(mac, ports, host, dns, program, **how)
        self._wanted = list(endpoints)
        self._outside = outside
        self._taps: list[str] = []  # their names, by the interface's number less one
        self._places: list[_Place | None] = []
        self._home: sysio.Fd | None = None
        self._sandbox = ""
        self.own_names = own_names.OwnNames([], self._servers if outside else [])
        if not outside:
            self.interfaces, self.routes, self.warnings = [], [], []

    def _plan_names(self, dns: Sequence[str]) -> None:
        """See `UserPlan`: the engine answers, and asks the servers that the user network has."""
        self.search, self.options = list(self._host.resolver.search), list(self._host.resolver.options)
        self._servers = list(dns) or self._host.resolver.servers
        self.dns = [resolver.DOCKER]

    def setup_nics(self, most: int, *, hotplug: bool = False) -> list[Nic]:
        """Make the taps beside the user network's interface; see `NetworkPlan.setup_nics`.

        Only in the main thread, before there is any other.

        Raises:
            HostError: A network is gone, or the kernel refused.
            UnsupportedError: There are more networks than a machine has interfaces for.
        """
        if 1 + len(self._wanted) > most:
            raise UnsupportedError(
                f"a machine has {most} network interfaces at most, one of them for what is outside,"
                f" and {len(self._wanted)} networks were asked for",
                "Leave out some --network.",
            )
        nics = super().setup_nics(most, hotplug=hotplug) if self._outside else [Nic(self.mac)]
        try:
            if sysio.in_user_namespace():
                _stay()
            self._home = _open(self._wanted[0])
            for number, one in enumerate(self._wanted):
                self._places.append(None)
                self._take(number, one, _open(one))
            self._places += [None] * (most - 1 - len(self._places))
            threads.aside(lambda: self._make_taps(nics))
        except BaseException:
            for nic in nics:
                nic.close()
            raise
        return nics

    def _make_taps(self, nics: list[Nic]) -> None:
        """Make the taps, each a port of its network's bridge unless it is a spare one. In a thread of its own."""
        assert self._home is not None
        for place in self._places:
            mac = place.network.mac if place is not None else random_mac()
            name = _tap_name(mac)
            try:
                sysio.setns((place.namespace if place is not None else self._home).raw, sysio.CLONE_NEWNET)
                nics.append(Nic(mac, tap_fd=sysio.Fd(netns.make_tap(name))))
                if place is not None:
                    with rtnetlink.Rtnl() as rtnl:
                        rtnl.set_master(socket.if_nametoindex(name), socket.if_nametoindex(BRIDGE))
            except OSError as error:
                raise _refused(place.network if place is not None else self._wanted[0], error) from error
            self._taps.append(name)

    def _take(self, number: int, one: EndpointSettings, namespace: sysio.Fd) -> _Place:
        """Have an interface stand for a network."""
        interface = _interface(f"eth{number + 1}", one)
        if len(self.addresses) > number + 1:
            interface["devicePath"] = self.addresses[number + 1]
        place = self._places[number] = _Place(one, namespace, interface)
        self.interfaces.append(interface)
        if self.own_names is not None:
            self.own_names.enter(one.path, _addresses(one))
        return place

    def place(self, index: int, address: str) -> None:
        """See `NetworkPlan.place`."""
        self.addresses[index:] = [address]
        if index == 0:
            if self._outside:
                self.interfaces[0]["devicePath"] = address
        elif (place := self._places[index - 1]) is not None:
            place.interface["devicePath"] = address

    def idle(self) -> list[str]:
        """See `NetworkPlan.idle`."""
        used = {interface["devicePath"] for interface in self.interfaces}
        return [address for address in self.addresses if address not in used]

    def start(self, journal: Journal, name: str) -> None:
        """Start passt, and have the others of each network find this sandbox; see `UserPlan.start`."""
        if self._outside:
            super().start(journal, name)
        self.journal = journal
        self._sandbox = name
        for place in self._places:
            if place is not None:
                self._join(place)

    def _join(self, place: _Place) -> None:
        assert self.journal is not None
        holder = held.Holder.own(place.namespace)
        addresses = [address for address, _ in _addresses(place.network)]
        member = members.Member(addresses, place.network.names, holder)
        place.joined = members.join(place.network.path, self._sandbox, member, self.journal)

    def failure(self) -> KataError | None:
        """See `NetworkPlan.failure`."""
        return super().failure() if self._outside else None

    @property
    def child(self) -> children.SupervisedChild | None:
        """passt, where there is a way out."""
        return self._child if self._outside else None

    def connect(self, one: EndpointSettings) -> None:
        """Put the machine into a further network while it runs, before the guest is told. Blocks briefly.

        Args:
            one: The network.

        Raises:
            UnsupportedError: It has no interface left.
            HostError: The network is gone, or the kernel refused.
        """
        if any(place is not None and place.network.network == one.network for place in self._places):
            self.disconnect(one.network)  # of a command that was killed before it had written that down
        number = next((number for number, place in enumerate(self._places) if place is None), None)
        if number is None:
            raise UnsupportedError(
                f"the machine has no interface left for the network {one.network}: it is in"
                f" {len(self._places)}",
                "kata network disconnect takes it out of another.",
            )
        place = self._take(number, one, _open(one))
        try:
            self._plug(number, place)
            self._join(place)
        except BaseException:
            self.disconnect(one.network)
            raise

    def _plug(self, number: int, place: _Place) -> None:
        assert self._home is not None
        tap = self._taps[number]
        try:
            _move(tap, self._home, place.namespace)
            with _inside(place.namespace) as rtnl:
                index = rtnl.index_of(tap)
                rtnl.set_master(index, rtnl.index_of(BRIDGE))
                rtnl.bring_up(index)
        except OSError as error:
            raise _refused(place.network, error) from error

    def disconnect(self, network: str) -> None:
        """Take the machine out of a network, by its name, while it runs. Blocks briefly.

        Raises:
            NotFoundError: It is not in that network.
            HostError: The kernel refused.
        """
        for number, place in enumerate(self._places):
            if place is not None and place.network.network == network:
                self._leave(number, place)
                return
        raise NotFoundError(f"the machine is not in the network {network}", "kata inspect")

    def _leave(self, number: int, place: _Place) -> None:
        """See `disconnect`."""
        assert self._home is not None
        tap = self._taps[number]
        try:
            with _inside(place.namespace) as rtnl:
                if any(link.name == tap for link in rtnl.links()):
                    rtnl.set_master(rtnl.index_of(tap), 0)
                    _move(tap, place.namespace, self._home)
        except OSError as error:
            raise _refused(place.network, error) from error
        self._places[number] = None
        self.interfaces.remove(place.interface)
        if self.own_names is not None:
            self.own_names.leave(place.network.path)
        if place.joined is not None and self.journal is not None:
            place.joined.leave(self.journal)
        place.namespace.close()

    def sysctls(self) -> list[dict[str, str]]:
        """See `UserPlan.sysctls`."""
        [first] = super().sysctls()
        if not self._outside:
            first = {key: value for key, value in first.items() if f"/{INTERFACE}/" not in key}
        named = [one for one in self.interfaces if one["name"] != INTERFACE]
        own = [{f"ipv6/conf/{one['name']}/accept_ra": "0"} for one in named]
        if self._outside:
            return [first, *own]
        return [{**first, **own[0]}, *own[1:]] if own else []

    def stop(self) -> None:
        """Leave the networks, and end passt. The files of the members go with the journal."""
        for place in self._places:
            if place is not None:
                if place.joined is not None:
                    place.joined.close()
                place.namespace.close()
        if self._home is not None:
            self._home.close()
        super().stop()


class BridgedNestedPlan(BridgedPlan, NestedPlan):
    """The same for an ordinary user."""

    def _plan_names(self, dns: Sequence[str]) -> None:
        """See `BridgedPlan`: the engine asks from where passt is, so the servers that a guest would ask."""
        NestedPlan._plan_names(self, dns)
        self._servers, self.dns = self.dns, [resolver.DOCKER]


class _Place:
    """An interface of the machine that stands for a network."""

    __slots__ = ("interface", "joined", "namespace", "network")

    def __init__(self, network: EndpointSettings, namespace: sysio.Fd, interface: dict[str, Any]) -> None:
        self.network = network
        self.namespace = namespace
        self.interface = interface
        self.joined: members.Joined | None = None


def _addresses(one: EndpointSettings) -> list[tuple[str, int]]:
    """The guest's addresses in a network, with the lengths of their prefixes."""
    return [(one.address, one.prefix), *([(one.address6, one.prefix6)] if one.address6 else [])]


def _interface(name: str, one: EndpointSettings) -> dict[str, Any]:
    return {
        "device": name,
        "name": name,
        "IPAddresses": [
            {"family": int(":" in address), "address": address, "mask": str(prefix)}
            for address, prefix in _addresses(one)
        ],
        "mtu": held.MTU,
        "hwAddr": one.mac,
        "devicePath": "",
        "type": "",
        "raw_flags": 0,
    }


def _tap_name(mac: str) -> str:
    """A tap's name, which is another's in no namespace: it is moved from one to another."""
    return "tap" + mac.replace(":", "")


@contextlib.contextmanager
def _inside(there: sysio.Fd) -> Iterator[rtnetlink.Rtnl]:
    """A netlink socket in a network namespace. It stays in it; the thread that makes it ends."""

    def make() -> rtnetlink.Rtnl:
        sysio.setns(there.raw, sysio.CLONE_NEWNET)
        return rtnetlink.Rtnl()

    with threads.aside(make) as found:
        yield found


def _move(tap: str, here: sysio.Fd, there: sysio.Fd) -> None:
    """Move a tap from one namespace to another. It is down afterwards, unless they are the same."""
    if os.fstat(here.raw).st_ino == os.fstat(there.raw).st_ino:
        return
    with _inside(here) as rtnl:
        rtnl.move(rtnl.index_of(tap), there.raw)


def _stay() -> None:
    """Have later commands of this user come into the user namespace that this machine's networks belong to."""
    try:
        with own_namespace.Companions() as companions:
            companions.add()
    except OSError as error:
        raise HostError(
            f"cannot write down who is in this user's networks: {error.strerror}", "check KATA_RUN_DIR"
        ) from error


def _open(one: EndpointSettings) -> sysio.Fd:
    """A descriptor of a network's namespace."""
    try:
        return sysio.Fd(os.open(one.namespace, os.O_RDONLY | os.O_CLOEXEC))
    except OSError as error:
        raise _refused(one, error) from error


def _refused(one: EndpointSettings, error: OSError) -> HostError:
    return HostError(
        f"cannot connect the machine to the network {one.network}: {error.strerror}",
        f"kata network inspect {one.network}",
    )
