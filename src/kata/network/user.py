"""The network that needs no set-up of the host: a process (passt) translates between the guest's packets and
ordinary sockets of the host.

The guest's addresses are ours to choose, because nobody outside ever sees them. Outgoing connections appear to
come from the host; incoming ones reach only published ports. The host's loopback is out of the guest's reach:
passt's mapping of the gateway to it is switched off, and `kata.network.egress_filter` holds where passt does not.
"""

from __future__ import annotations

import os

from kata import children, confinement, sysio
from kata.errors import HostError, KataError, UnsupportedError, UsageError
from kata.hypervisor.base import Nic
from kata.network import egress_filter, resolver

TYPE_CHECKING = False
if TYPE_CHECKING:
    import socket
    from collections.abc import Sequence
    from typing import Any

    from kata.journal import Entry, Journal
    from kata.network import own_names, routing

ADDRESS4, PREFIX4, GATEWAY4, DNS4 = "10.0.2.15", 24, "10.0.2.2", "10.0.2.3"
ADDRESS6, PREFIX6, GATEWAY6, DNS6 = "fd6b:6174:6100::15", 64, "fd6b:6174:6100::2", "fd6b:6174:6100::3"
HELPER_MAC = "52:54:00:6b:61:01"
MTU = 65520
"""The largest that passt's frames allow: fewer, bigger packets are what makes a user network fast."""
INTERFACE = "eth0"
PROGRAM = "passt"
INSTALL = "apt-get install passt"
_BACKLOG = 128


CAPABILITIES = (sysio.CAP_SETUID, sysio.CAP_SETGID, sysio.CAP_NET_BIND_SERVICE)
"""What passt starts with: to publish ports below 1024, and to become nobody, after which it has none."""


class Port:
    """A published port.

    Args:
        host_ip: Address on the host it is published at; empty is all of them.
        host_port: Port on the host.
        guest_port: Port in the guest.
        proto: ``"tcp"`` or ``"udp"``.
    """

    __slots__ = ("guest_port", "host_ip", "host_port", "proto")

    def __init__(self, host_ip: str, host_port: int, guest_port: int, proto: str) -> None:
        self.host_ip = host_ip
        self.host_port = host_port
        self.guest_port = guest_port
        self.proto = proto

    @property
    def everywhere(self) -> bool:
        """Whether it is published at all of the host's addresses."""
        return self.host_ip in ("", "0.0.0.0", "::", "*")

    def __str__(self) -> str:
        at = f"{self.host_ip}:" if self.host_ip else ""
        return f"{at}{self.host_port}->{self.guest_port}/{self.proto}"

    @property
    def outer_spec(self) -> str:
        """The port on the host alone, in the words of passt's ``--tcp-ports`` and ``--udp-ports``."""
        at = "" if self.everywhere else f"{self.host_ip}/"
        return f"{at}{self.host_port}"

    @property
    def spec(self) -> str:
        """The port on the host and in the guest, in these words."""
        return f"{self.outer_spec}:{self.guest_port}"


class HostNetwork:
    """What matters about the host's network.

    Args:
        ipv4: There is an IPv4 default route.
        ipv6: There is an IPv6 default route.
        resolver: What its ``resolv.conf`` says.
    """

    __slots__ = ("ipv4", "ipv6", "resolver")

    def __init__(self, ipv4: bool, ipv6: bool, names: resolver.Resolver) -> None:
        self.ipv4 = ipv4
        self.ipv6 = ipv6
        self.resolver = names

    @classmethod
    def look(cls) -> HostNetwork:
        """Look at this host (in the network namespace of the calling thread)."""
        names = resolver.read()
        if not names.reachable:
            better = resolver.read((resolver.SYSTEMD_RESOLV_CONF,))
            if better.reachable:
                names = better
        return cls(_default_route4(), _default_route6(), names)


def _default_route4() -> bool:
    try:
        with open("/proc/thread-self/net/route", encoding="ascii") as lines:
            next(lines, None)
            # Interface, destination, gateway, flags, ..., mask: the default is all zeroes, and is up (1).
            return any(f[1] == f[7] == "00000000" and int(f[3], 16) & 1 for f in map(str.split, lines))
    except OSError:
        return False


def _default_route6() -> bool:
    try:
        with open("/proc/thread-self/net/ipv6_route", encoding="ascii") as lines:
            for line in lines:
                fields = line.split()
                # RTF_REJECT (0x200) marks the "unreachable default" that is there without any network.
                if fields[0] == "0" * 32 and fields[1] == "00" and not int(fields[8], 16) & 0x200:
                    return fields[9] != "lo"
    except OSError:
        pass
    return False


class NetworkPlan:
    """The network of one sandbox, before and while it runs. Made by `kata.network.plan.plan`.

    In this order: `setup_nics` (which the machine is connected to), start the hypervisor, `place` for each of them,
    `start` (the helper, while the machine boots), then tell the guest `interface` and `routes`, and check `failure`
    before saying that all is well.
    """

    backend = ""
    """What the machine's interfaces have to be connected to (`kata.hypervisor.base.Nic.backend`); empty for nothing."""
    external_netns = False
    """Whether interfaces may appear while the sandbox runs: then `rescan` before a container starts."""

    def __init__(self, mac: str, ports: Sequence[Port] = ()) -> None:
        self.mac = mac
        self.ports = list(ports)
        self.interfaces: list[dict[str, Any]] = []
        """types.Interface values for UpdateInterface, as dicts; empty when the guest gets no network."""
        self.addresses: list[str] = []
        """The guest's addresses of the machine's interfaces, as `place` was told."""
        self.hotplug_nics = 0
        """After `setup_nics`: how many interfaces may come while the machine runs, beside those."""
        self.keeps_ports = False
        """Whether the machine is to have ports for further interfaces although it starts with one: all that wait for a
        sandbox are alike. Set before `setup_nics`, as is `wire`."""
        self.stays_empty = False
        """Whether no interface is likely to come into a namespace that is made: then the machine starts without one, if
        it can be given one later. Set before `setup_nics`."""
        self.wire: sysio.Fd | None = None
        """The helper's end of the interface, of a machine that is there already."""
        self.journal: Journal | None = None
        """The sandbox's; set before `setup_nics`."""
        self.routes: list[dict[str, Any]] = []
        """types.Route values for UpdateRoutes, as dicts."""
        self.neighbors: list[dict[str, Any]] = []
        """types.ARPNeighbor values for AddARPNeighbors, as dicts."""
        self.routing: list[routing.Entry] | None = None
        """In place of `routes`: all of a namespace's, and its rules."""
        self.rules: list[routing.Entry] = []
        self.names: dict[int, str] = {}
        """The interfaces that `routing` means, by their number in the namespace."""
        self.left_out: list[str] = []
        """Sentences about what the guest does not get of its network."""
        self.dns: list[str] = []
        """Name servers for the guest's ``/etc/resolv.conf``."""
        self.search: list[str] = []
        self.options: list[str] = []
        self.warnings: list[str] = []
        """Sentences that the user should see once."""
        self.own_names: own_names.OwnNames | None = None
        """What the engine answers at `kata.network.resolver.DOCKER` in the guest; None leaves it to dockerd."""
        self.listeners: list[tuple[socket.socket, Port]] = []
        """After `start`: published ports whose connections the engine itself carries into the guest."""

    @property
    def interface(self) -> dict[str, Any] | None:
        """The first interface, if there is one."""
        return self.interfaces[0] if self.interfaces else None

    def resolv_conf(self) -> str:
        """Text of the guest's ``/etc/resolv.conf``."""
        lines = [f"nameserver {server}" for server in self.dns]
        if self.search:
            lines.append("search " + " ".join(self.search))
        if self.options:
            lines.append("options " + " ".join(self.options))
        return "".join(line + "\n" for line in lines)

    def setup_nics(self, most: int, *, hotplug: bool = False) -> list[Nic]:
        """Make the host's ends of the virtual machine's network interfaces.

        Args:
            most: How many interfaces a machine may have.
            hotplug: Further ones can be given to it while it runs.

        Returns:
            The interfaces that it is to be started with; their descriptors are the caller's.
        """
        return [Nic(self.mac)][:most]

    def place(self, index: int, address: str) -> None:
        """Learn where an interface of the machine is in the guest.

        Args:
            index: Which of the machine's interfaces, from 0.
            address: The guest's address of it, from the hypervisor.
        """
        self.addresses[index:] = [address]
        if index < len(self.interfaces):
            self.interfaces[index]["devicePath"] = address

    def start(self, journal: Journal, name: str) -> None:
        """Start what the network needs on the host. Main thread."""

    def let_go(self) -> None:
        """Close what is held of the interfaces beside the hypervisor, of a start that has failed. Idempotent."""

    def rescan(self, *, is_running: bool = False) -> bool:
        """Whether what the guest has to know has changed since it was last told. Blocks briefly."""
        return False

    def idle(self) -> list[str]:
        """Addresses of the machine's interfaces that stand for nothing."""
        return [] if self.interfaces else self.addresses[:1]

    def sysctls(self) -> list[dict[str, str]]:
        """For each of `interfaces` the kernel parameters, by their path below ``/proc/sys/net``, that are to be set
        before it comes up; with the first those of the guest as a whole. Blocks briefly.
        """
        return []

    def take_pending_hotplugs(self) -> list[tuple[int, Nic]]:
        """What `rescan` has found for the machine's ports: for each which interface of the machine it is, and the
        interface, which is to be attached and then to be given a `place`. They are told once, and their taps are the
        caller's.
        """
        return []

    def guest_address(self, client: str) -> bytes:
        """Where in the guest a connection to a published port goes: four or sixteen bytes.

        Args:
            client: The address that it comes from.

        Raises:
            UnsupportedError: No ports are published by this kind of network.
        """
        raise UnsupportedError(
            f"a connection from {client} has nowhere to go: this network publishes no ports",
            "kata run -p needs --network user.",
        )

    def let_replies_in(self) -> None:
        """Let programs of the host that have sockets in the sandbox's network namespace ask servers of names outside.
        Blocks briefly.

        Raises:
            HostError: This kernel cannot do that.
        """

    def failure(self) -> KataError | None:
        """Why the network has ended, or None while it has not."""
        return None

    @property
    def child(self) -> children.SupervisedChild | None:
        """The network's helper, if it has one."""
        return None

    def stop(self) -> None:
        """End it. Idempotent; blocks for milliseconds."""


class UserPlan(NetworkPlan):
    """A network by passt.

    Args:
        mac: Hardware address of the guest's interface.
        ports: What is published.
        host: The host's network.
        dns: Name servers that were asked for; empty is the host's.
        program: Path of passt.
        carries_tcp: Published TCP ports are the engine's (see `kata.network.passt`).
    """

    backend = "stream"

    def __init__(
        self,
        mac: str,
        ports: Sequence[Port],
        host: HostNetwork,
        dns: Sequence[str] = (),
        program: str = "",
        *,
        carries_tcp: bool = False,
    ) -> None:
        super().__init__(mac, ports)
        self._program = program
        self._carries_tcp = carries_tcp
        self._host = host
        self._fd: sysio.Fd | None = None
        self._child = children.SupervisedChild("the user network (passt)")
        self._cgroup: Entry | None = None
        # Without any route out there is still what is published, and the host's own subnets.
        self._ipv4 = host.ipv4 or not host.ipv6
        self._ipv6 = host.ipv6
        self._forward4 = self._forward6 = ""
        self._plan_names(dns)
        udp = next((port for port in self.ports if port.proto == "udp"), None)
        if udp is not None:
            # Under --no-map-gw, passt does not take a guest's answer back to a loopback address; and the
            # guard would refuse it.
            self.warnings.append(
                f"port {udp} cannot be reached through this host's loopback address, only others"
            )
        addresses = []
        if self._ipv4:
            addresses.append({"family": 0, "address": ADDRESS4, "mask": str(PREFIX4)})
            self.routes.append(_default_route(GATEWAY4, 0))
        if self._ipv6:
            addresses.append({"family": 1, "address": ADDRESS6, "mask": str(PREFIX6)})
            self.routes.append(_default_route(GATEWAY6, 1))
        interface = {
            "device": INTERFACE,
            "name": INTERFACE,
            "IPAddresses": addresses,
            "mtu": MTU,
            "hwAddr": mac,
            "devicePath": "",
            "type": "",
            "raw_flags": 0,
        }
        self.interfaces = [interface]

    def _plan_names(self, dns: Sequence[str]) -> None:
        names = self._host.resolver
        self.search, self.options = list(names.search), list(names.options)
        if dns:
            self.dns = list(dns)
            return
        self.dns = names.reachable
        if self.dns:
            return
        # Only a loopback resolver: passt hands on what is sent to an address of ours.
        loopback = [resolver.pack(s) for s in names.servers if resolver.is_loopback(s)]
        if self._ipv4 and any(len(s) == 4 for s in loopback):
            self._forward4, self.dns = DNS4, [DNS4]
        elif self._ipv6 and any(len(s) == 16 for s in loopback):
            self._forward6, self.dns = DNS6, [DNS6]
        else:
            self.warnings.append(
                "the host names no DNS server, so the container has none; --dns gives it one"
            )

    def command(self, *wire: str) -> list[str]:
        """passt's argument vector. Source: passt(1).

        Args:
            wire: The options that say where the guest's frames are.
        """
        argv = [self._program, "--foreground", "--quiet", *wire, "--no-map-gw", "-M", HELPER_MAC]
        # The guest is told its addresses by its agent; what is not served cannot be attacked.
        argv += ["--no-dhcp", "--no-dhcpv6", "--no-ra", "--mtu", str(MTU)]
        if self._ipv4:
            argv += ["-a", ADDRESS4, "-n", str(PREFIX4), "-g", GATEWAY4]
        if self._ipv6:
            argv += ["-a", ADDRESS6, "-g", GATEWAY6]
        if not self._ipv6:
            # All addresses being given, any interface will do for passt's own look at the host: this one
            # is there also where no default route is.
            argv += ["-4", "-i", "lo"]
        elif not self._ipv4:
            argv += ["-6"]
        for address in (self._forward4, self._forward6):
            if address:
                argv += ["--dns-forward", address]
        for proto, option in (("tcp", "-t"), ("udp", "-u")):
            carried = proto == "tcp" and self._carries_tcp
            specs = [self.port_spec(port) for port in self.ports if port.proto == proto and not carried]
            # Without an explicit "none", passt publishes the UDP port beside each TCP port as well.
            for spec in specs or ["none"]:
                argv += [option, spec]
        return argv

    def port_spec(self, port: Port) -> str:
        """How passt is told a port that it publishes."""
        return port.spec

    def sysctls(self) -> list[dict[str, str]]:
        """See `NetworkPlan.sysctls`: nobody on this network may say who the router is."""
        one = {f"ipv6/conf/{interface}/accept_ra": "0" for interface in ("all", "default", INTERFACE)}
        return [one]

    def guest_address(self, client: str) -> bytes:
        """See `NetworkPlan.guest_address`: of the client's family where the guest has both, as with passt."""
        is_ipv6 = ":" in client and not client.startswith("::ffff:")
        return resolver.pack(ADDRESS6 if self._ipv6 and (is_ipv6 or not self._ipv4) else ADDRESS4)

    def setup_nics(self, most: int, *, hotplug: bool = False) -> list[Nic]:
        """One interface, connected to where passt will be; see `NetworkPlan.setup_nics`."""
        if self.wire is not None:
            self._fd = self.wire
            return [Nic(self.mac)]
        ours, theirs = children.socketpair()
        self._fd = sysio.Fd(ours)
        return [Nic(self.mac, sysio.Fd(theirs))]

    def start(self, journal: Journal, name: str) -> None:
        """Start passt.

        Args:
            journal: The sandbox's.
            name: The sandbox's id.

        Raises:
            HostError: A port is taken, passt cannot be started, or the loopback cannot be guarded.
        """
        if self._fd is None:
            raise HostError("the user network has no interface to serve")
        try:
            self.start_helper(
                self.command("--fd", str(self._fd.raw)),
                journal,
                name,
                pass_fds=[self._fd.raw],
                capabilities=CAPABILITIES,
                namespaces=sysio.CLONE_NEWPID,
                confinement=confinement.helper(),
            )
        finally:
            self._fd.close()  # so that passt sees the end of the machine, and the machine that of passt

    def start_helper(self, argv: Sequence[str], journal: Journal, name: str, **how: Any) -> None:
        """Publish the ports, and start passt where the host's loopback is out of its reach.

        Args:
            argv: What is executed.
            journal: The sandbox's.
            name: The sandbox's id.
            how: Further arguments of `kata.children.spawn`.

        Raises:
            HostError: See `start`.
        """
        check_ports(self.ports)
        if self._carries_tcp:
            self.listeners = listen([port for port in self.ports if port.proto == "tcp"])
        self.journal = journal
        cgroups = self.guard(journal, name)
        try:
            self._child.start(argv, journal, "passt", cgroups=cgroups, **how)
        except OSError as error:
            raise HostError(f"cannot start the user network: {error.strerror}", INSTALL) from error

    def guard(self, journal: Journal, name: str) -> list[str]:
        """Make what keeps passt from the host's loopback services.

        Args:
            journal: The sandbox's.
            name: The sandbox's id.

        Returns:
            The cgroups that passt has to be in.

        Raises:
            HostError: They cannot be guarded.
        """
        names = [s for s in map(resolver.pack, self._host.resolver.servers) if s]
        cgroup = egress_filter.make_cgroup(
            journal,
            f"kata-{name}-net",
            next((s for s in names if len(s) == 4), b"") if self._forward4 else b"",
            next((s for s in names if len(s) == 16), b"") if self._forward6 else b"",
        )
        self._cgroup = journal.entries[-1]
        return [cgroup]

    def failure(self) -> KataError | None:
        """Why passt has ended, or None while it runs."""
        status = self._child.poll()
        if status is None:
            return None
        said = [line for line in self._child.said().splitlines() if "syslog" not in line]
        words = f": {said[-1]}" if said else ""
        if self.ports and "bind" in words:
            published = ", ".join(str(port) for port in self.ports)
            return HostError(f"cannot publish {published}{words}", "Is one of the ports in use (ss -lntup)?")
        return HostError(f"{self._child.label} {children.ending(status)}{words}", "kata doctor")

    @property
    def child(self) -> children.SupervisedChild | None:
        """passt."""
        return self._child

    def stop(self) -> None:
        """End passt and remove its cgroup."""
        while self.listeners:
            self.listeners.pop()[0].close()
        if self._fd is not None:
            self._fd.close()
        self._child.stop()
        if self._cgroup is not None and self.journal is not None:
            try:
                os.rmdir(self._cgroup.params["path"])
            except FileNotFoundError:
                pass
            except OSError:
                return  # undoing the journal tries harder
            self.journal.mark_gone(self._cgroup)
            self._cgroup = None


def _default_route(gateway: str, family: int) -> dict[str, Any]:
    return {"dest": "", "gateway": gateway, "device": INTERFACE, "source": "", "scope": 0, "family": family}


def check_ports(ports: Sequence[Port]) -> None:
    """Find out whether ports can be published, by taking them for an instant.

    passt would say so, too; but only after it has been started, and less clearly.

    Raises:
        HostError: One is in use, or may not be taken, or is at an address that this host does not have.
        UsageError: Two of them contradict each other.
    """
    if not ports:
        return
    seen: dict[tuple[str, int, str], Port] = {}
    for port in ports:
        other = seen.setdefault((port.proto, port.host_port, ""), port)
        if other is not port and other.guest_port != port.guest_port:
            raise UsageError(
                f"host port {port.host_port}/{port.proto} is published as both {other} and {port}",
                "Publish one guest port at each host port.",
            )
        _bound(port, ipv6=":" in port.host_ip).close()


def listen(ports: Sequence[Port]) -> list[tuple[socket.socket, Port]]:
    """Listen on TCP ports of this host: on every address of both families where none is named.

    Raises:
        HostError: One is in use, or may not be taken.
    """
    made: list[tuple[socket.socket, Port]] = []
    try:
        for port in sorted(ports, key=lambda port: not port.everywhere):
            # Another address of a port that is published on every one, for the same port of the guest.
            if not any(other.everywhere and other.host_port == port.host_port for _, other in made):
                made.append((_listening(port), port))
    except BaseException:
        for one, _ in made:
            one.close()
        raise
    return made


def _listening(port: Port) -> socket.socket:
    import socket

    if port.everywhere:
        try:
            socket.socket(socket.AF_INET6, socket.SOCK_STREAM).close()
            return _bound(port, ipv6=True)
        except OSError:
            pass  # a host without IPv6
    return _bound(port, ipv6=":" in port.host_ip)


def _bound(port: Port, *, ipv6: bool) -> socket.socket:
    """A socket that has a port, and listens there where that is its kind; it does not block.

    Raises:
        HostError: It is in use, or may not be taken, or is at an address that this host does not have.
    """
    import errno
    import socket

    is_tcp = port.proto == "tcp"
    kind = socket.SOCK_STREAM if is_tcp else socket.SOCK_DGRAM
    sock = socket.socket(socket.AF_INET6 if ipv6 else socket.AF_INET, kind | socket.SOCK_NONBLOCK)
    try:
        if is_tcp:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if ipv6 and port.everywhere:
            sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)
        sock.bind(("" if port.everywhere else port.host_ip, port.host_port))
        if is_tcp:
            sock.listen(_BACKLOG)
    except OSError as error:
        sock.close()
        hint = {
            errno.EADDRINUSE: f"See who has it: ss -lntup 'sport = :{port.host_port}'",
            errno.EADDRNOTAVAIL: "Use an address that this host has (ip address).",
            errno.EACCES: "Run as root, or publish a port from 1024 on.",
        }.get(error.errno or 0, "")
        raise HostError(f"cannot publish port {port}: {error.strerror}", hint) from error
    return sock
