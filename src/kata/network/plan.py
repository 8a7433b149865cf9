"""Makes a network plan from a sandbox's settings."""

from __future__ import annotations

from kata import children, sysio
from kata.errors import HostError, UnsupportedError, UsageError
from kata.hypervisor.base import random_mac
from kata.network import resolver, user

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Sequence

    from kata.settings import NetworkSettings


def plan(
    settings: NetworkSettings,
    host: user.HostNetwork | None = None,
    backends: Sequence[str] = ("stream", "tap"),
) -> user.NetworkPlan:
    """Plan the network of a sandbox. Nothing is created on the host yet.

    Args:
        settings: The sandbox's network settings.
        host: The host's network; None to examine it.
        backends: What the machine's interfaces can be connected to (`kata.hypervisor.base.Capabilities.nic_backends`).

    Returns:
        The plan that fits the settings' mode.

    Raises:
        UsageError: The settings contradict each other.
        HostError: passt is missing.
        UnsupportedError: A port cannot be published with this hypervisor.
    """
    mode, dns = settings.mode, settings.dns
    ports = [user.Port(port.host_ip, port.host_port, port.guest_port, port.proto) for port in settings.ports]
    for server in dns:
        if not resolver.is_address(server):
            raise UsageError(f"{server!r} is not the address of a DNS server")
    for port in ports:
        _check_port(port)
    if mode == "none":
        if ports:
            raise UsageError(
                f"port {ports[0]} cannot be published without a network", "Leave out --network none, or -p."
            )
        return user.NetworkPlan(random_mac())
    if mode == "netns":
        if settings.model == "macvtap":
            from kata.network.macvtap import MacvtapPlan

            return MacvtapPlan(random_mac(), settings.path)
        from kata.network.netns import NetnsPlan

        return NetnsPlan(random_mac(), settings.path, settings.model)
    if mode not in ("user", "tap"):
        raise UsageError(f"there is no network mode {mode!r}", "Use user, tap or none.")
    return _user_plan(mode, ports, dns, backends, host, settings)


def _user_plan(
    mode: str,
    ports: Sequence[user.Port],
    dns: Sequence[str],
    backends: Sequence[str],
    host: user.HostNetwork | None,
    settings: NetworkSettings,
) -> user.UserPlan:
    """The user network, by the way that hypervisor and user allow; see `plan`."""
    endpoints = settings.endpoints
    if ports and not settings.outside:
        raise UsageError(
            f"port {ports[0]} cannot be published: the network {endpoints[0].network} is internal",
            "Leave out -p, or give --network another one besides.",
        )
    if dns and not settings.outside:
        raise UsageError(
            f"--dns {dns[0]} cannot be asked: the network {endpoints[0].network} is internal",
            "Leave out --dns, or give --network another one besides.",
        )
    if endpoints and (mode == "tap" or not {"stream", "tap"} <= set(backends)):
        raise UnsupportedError(
            f"this hypervisor cannot connect a machine to the network {endpoints[0].network}",
            "docs/networks.md says which can.",
        )
    if mode == "tap" and sysio.in_user_namespace():
        raise UnsupportedError("an ordinary user has no network by a tap device", "--network user, or none")
    by_tap = mode == "tap" or ("stream" not in backends and "tap" in backends)
    name = "pasta" if by_tap else user.PROGRAM
    program = children.find_program(name)
    if program is None:
        raise HostError(
            f"the user network needs {name}, which is not installed",
            f"{user.INSTALL} (or use --network none)",
        )
    if by_tap:
        from kata.network.pasta import PastaPlan

        return PastaPlan(random_mac(), ports, host or user.HostNetwork.look(), dns, program)
    if sysio.in_user_namespace():
        from kata.network.nested import NestedPlan

        outer = children.find_program("pasta")
        if outer is None:
            raise HostError(
                "an ordinary user's network needs pasta, which is not installed",
                f"{user.INSTALL} (or use --network none)",
            )
        host = host or user.HostNetwork.look()
        if endpoints:
            from kata.network.bridge import BridgedNestedPlan

            return BridgedNestedPlan(
                random_mac(),
                ports,
                host,
                dns,
                program,
                outer=outer,
                endpoints=endpoints,
                outside=settings.outside,
            )
        return NestedPlan(random_mac(), ports, host, dns, program, outer)
    carries_tcp = False
    if any(port.proto == "tcp" for port in ports):
        from kata.network import passt

        carries_tcp = passt.waits_for_clients(program)
    host = host or user.HostNetwork.look()
    if endpoints:
        from kata.network.bridge import BridgedPlan

        return BridgedPlan(
            random_mac(),
            ports,
            host,
            dns,
            program,
            carries_tcp=carries_tcp,
            endpoints=endpoints,
            outside=settings.outside,
        )
    return user.UserPlan(random_mac(), ports, host, dns, program, carries_tcp=carries_tcp)


def _check_port(port: user.Port) -> None:
    if port.proto not in ("tcp", "udp"):
        raise UsageError(f"port {port}: there is no protocol {port.proto!r}", "Use tcp or udp.")
    for number in (port.host_port, port.guest_port):
        if not 0 < number < 65536:
            raise UsageError(f"port {port}: {number} is not a port number")
    if not port.everywhere and not resolver.is_address(port.host_ip):
        raise UsageError(f"port {port}: {port.host_ip!r} is not an address of this host")
    if port.proto == "udp" and not port.everywhere and resolver.is_loopback(port.host_ip):
        raise UsageError(
            f"port {port}: a UDP port cannot be published at the loopback address with --network user",
            "Publish it at another address of this host.",
        )
