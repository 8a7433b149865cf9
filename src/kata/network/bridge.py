"""Networks with a name: a bridge in a network namespace of the network's own.

The namespace has nothing but the bridge, and for each machine a tap that is a port of it. It has no address and no
route, so nothing goes from one network to another, nor to or from the host's own network, whose interfaces, firewall
and forwarding stay as they are. What leaves for the outside takes the machine's first interface, which is the user
network (`kata.network.user`); ports are published there. A tap ends with its hypervisor, and everything else with the
namespace.

Names are answered by each sandbox's own engine (`own_names`), which finds the others in the network's directory
(`members`).
"""

from __future__ import annotations

import os

from kata import sysio
from kata.errors import HostError, UnsupportedError
from kata.hypervisor.base import Nic
from kata.network import members, netns, own_names, resolver, rtnetlink
from kata.network.user import UserPlan

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Sequence
    from typing import Any

    from kata.journal import Journal
    from kata.network.user import HostNetwork, Port
    from kata.settings import EndpointSettings

BRIDGE = "bridge0"
MTU = 1500
_FIRST_INDEX = 1 << 20
"""Index of the first tap, above what the kernel hands out."""


def namespace(network: str) -> str:
    """Where the namespace of a network is bind-mounted; *network* is its directory."""
    return os.path.join(network, "netns")


def make(network: str, journal: Journal) -> None:
    """Make the namespace of a network, with the bridge in it. Only in a process with one thread.

    Args:
        network: The network's directory, which has neither yet.
        journal: The network's.

    Raises:
        HostError: The kernel refused.
    """
    path = namespace(network)
    try:
        os.mkdir(members.directory(network), 0o700)
        with sysio.Fd(os.open("/proc/thread-self/ns/net", os.O_RDONLY | os.O_CLOEXEC)) as before:
            entry = journal.begin("netns", path=path)
            os.close(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600))
            sysio.unshare(sysio.CLONE_NEWNET)
            try:
                # The host's end of it says nothing on it by itself.
                for which in ("all", "default"):
                    _write(f"/proc/sys/net/ipv6/conf/{which}/disable_ipv6", "1")
                with rtnetlink.Rtnl() as rtnl:
                    rtnl.add_bridge(BRIDGE)
                    rtnl.bring_up(_index_of(rtnl, BRIDGE), MTU)
                sysio.mount("/proc/thread-self/ns/net", path, None, sysio.MS_BIND)
            finally:
                sysio.setns(before.raw, sysio.CLONE_NEWNET)
            journal.commit(entry)
    except OSError as error:
        raise HostError(
            f"cannot make the network at {network}: {error.strerror}",
            "It needs root, and a kernel with network namespaces and bridges (modprobe bridge).",
        ) from error


def is_made(network: str) -> bool:
    """Whether the namespace of a network is there; *network* is its directory."""
    found = sysio.mount_at(os.path.realpath(namespace(network)))
    return found is not None and found.fstype == "nsfs"


class BridgedPlan(UserPlan):
    """A user network by passt, and networks with a name.

    Args:
        mac: Hardware address of the guest's first interface.
        ports: What is published.
        host: The host's network.
        dns: Name servers that were asked for, for names outside; empty is the host's.
        program: Path of passt.
        carries_tcp: See `UserPlan`.
        endpoints: The networks with a name.
    """

    def __init__(
        self,
        mac: str,
        ports: Sequence[Port],
        host: HostNetwork,
        dns: Sequence[str] = (),
        program: str = "",
        *,
        carries_tcp: bool = False,
        endpoints: Sequence[EndpointSettings] = (),
    ) -> None:
        super().__init__(mac, ports, host, dns, program, carries_tcp=carries_tcp)
        self._endpoints = list(endpoints)
        self._joined: list[sysio.Fd] = []
        networks = [(one.path, one.address, one.prefix) for one in endpoints]
        self.own_names = own_names.OwnNames(networks, list(dns) or host.resolver.servers)
        for number, one in enumerate(endpoints, 1):
            self.interfaces.append(_interface(f"eth{number}", one))

    def _plan_names(self, dns: Sequence[str]) -> None:
        """See `UserPlan`: the engine answers, and asks the servers that the user network has."""
        self.search, self.options = list(self._host.resolver.search), list(self._host.resolver.options)
        self.dns = [resolver.DOCKER]

    def setup_nics(self, most: int, *, hotplug: bool = False) -> list[Nic]:
        """Make the taps beside the user network's interface; see `NetworkPlan.setup_nics`.

        Only in the main thread, before there is any other.

        Raises:
            HostError: A network is gone, or the kernel refused.
            UnsupportedError: There are more networks than a machine has interfaces for.
        """
        if 1 + len(self._endpoints) > most:
            raise UnsupportedError(
                f"a machine has {most} network interfaces at most, one of them for what is outside,"
                f" and {len(self._endpoints)} networks were asked for",
                "Leave out some --network.",
            )
        nics = super().setup_nics(most, hotplug=hotplug)
        try:
            with sysio.Fd(os.open("/proc/thread-self/ns/net", os.O_RDONLY | os.O_CLOEXEC)) as before:
                for one in self._endpoints:
                    nics.append(Nic(one.mac, tap_fd=_port(one, before)))
        except BaseException:
            for nic in nics:
                nic.close()
            raise
        return nics

    def start(self, journal: Journal, name: str) -> None:
        """Start passt, and have the others of each network find this sandbox; see `UserPlan.start`."""
        super().start(journal, name)
        for one in self._endpoints:
            member = members.Member(one.address, one.names)
            self._joined.append(members.join(one.path, name, member, journal))

    def sysctls(self) -> list[dict[str, str]]:
        """See `UserPlan.sysctls`."""
        own = [{f"ipv6/conf/{one['name']}/accept_ra": "0"} for one in self.interfaces[1:]]
        return [*super().sysctls(), *own]

    def stop(self) -> None:
        """Leave the networks, and end passt. The files of the members go with the journal."""
        while self._joined:
            self._joined.pop().close()
        super().stop()


def _interface(name: str, one: EndpointSettings) -> dict[str, Any]:
    return {
        "device": name,
        "name": name,
        "IPAddresses": [{"family": 0, "address": one.address, "mask": str(one.prefix)}],
        "mtu": MTU,
        "hwAddr": one.mac,
        "devicePath": "",
        "type": "",
        "raw_flags": 0,
    }


def _port(one: EndpointSettings, before: sysio.Fd) -> sysio.Fd:
    """Make a tap that is a port of a network's bridge, and come back to the namespace *before*."""
    host_part = int.from_bytes(resolver.pack(one.address), "big") & (1 << 32 - one.prefix) - 1
    try:
        with sysio.Fd(os.open(namespace(one.path), os.O_RDONLY | os.O_CLOEXEC)) as there:
            sysio.setns(there.raw, sysio.CLONE_NEWNET)
        try:
            index = _FIRST_INDEX + host_part
            tap = sysio.Fd(netns.make_tap(f"port{host_part}", index))
            try:
                with rtnetlink.Rtnl() as rtnl:
                    rtnl.set_master(index, _index_of(rtnl, BRIDGE))
            except BaseException:
                tap.close()
                raise
        finally:
            sysio.setns(before.raw, sysio.CLONE_NEWNET)
    except OSError as error:
        raise HostError(
            f"cannot connect the machine to the network {one.network}: {error.strerror}",
            f"kata network inspect {one.network}",
        ) from error
    return tap


def _index_of(rtnl: rtnetlink.Rtnl, name: str) -> int:
    for link in rtnl.links():
        if link.name == name:
            return link.index
    raise FileNotFoundError(2, f"there is no interface {name}")


def _write(path: str, text: str) -> None:
    try:
        with sysio.Fd(os.open(path, os.O_WRONLY | os.O_CLOEXEC)) as fd:
            os.write(fd.raw, text.encode())
    except FileNotFoundError:
        pass  # without IPv6
