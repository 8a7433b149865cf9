"""The user network through a tap device, for hypervisors that take nothing else.

The machine runs in a network namespace of the sandbox's own. In it, pasta (passt's other form, of the same package)
serves a tap device of its own, which tc connects with the machine's as it does for interfaces of a client's namespace
(`kata.network.netns`). The guest sees what it sees with passt. The namespace is never named: it ends with its last
process, and with it everything in it.

To open its device pasta needs capabilities over the namespace, so this one belongs to a user namespace that a user of
the sandbox's own has made; pasta runs as that user, enters both, and has no capability on the host at any time. Hence
it publishes no UDP port that is for root alone. Published TCP ports are the engine's: pasta would deliver connections
from the host's loopback to the namespace and not to the guest.

Sources: pasta(1), user_namespaces(7), the kernel's ``linux/if_tun.h``.
"""

from __future__ import annotations

import os
import struct

from kata import confinement, sysio
from kata.errors import HostError, UnsupportedError
from kata.hypervisor.base import Nic
from kata.network import rtnetlink
from kata.network.netns import TAP_FLAGS, TUNSETIFF, Redirected
from kata.network.user import INTERFACE, MTU, HostNetwork, Port, UserPlan

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Sequence

    from kata.journal import Journal

_TUN = "/dev/net/tun"
_TUNSETPERSIST = 0x400454CB
_NOBODY = 65534
_NO_SETUID_FIXUP = 1 << 2
_NETWORK_PATH, _USER_PATH = "/dev/network", "/dev/user"
"""Where pasta finds the namespaces: in a ``/dev`` of its own. Newer versions close descriptors that they inherit."""


class PastaPlan(UserPlan):
    """A user network by pasta.

    Args:
        mac: Hardware address of the guest's interface.
        ports: What is published.
        host: The host's network.
        dns: Name servers that were asked for; empty is the host's.
        program: Path of pasta.

    Raises:
        UnsupportedError: A UDP port cannot be published so.
    """

    backend = "tap"

    def __init__(
        self, mac: str, ports: Sequence[Port], host: HostNetwork, dns: Sequence[str] = (), program: str = ""
    ) -> None:
        super().__init__(mac, ports, host, dns, program, carries_tcp=True)
        self._child.label = "the user network (pasta)"
        self._namespaces: list[sysio.Fd] = []
        first = _first_port_for_all()
        for port in ports:
            if port.proto == "udp" and port.host_port < first:
                raise UnsupportedError(
                    f"port {port}: a UDP port below {first} cannot be published through a tap device",
                    f"Publish it at a port from {first} on, or have another hypervisor (docs/hypervisors.md).",
                )

    def setup_nics(self, most: int, *, hotplug: bool = False) -> list[Nic]:
        """Make the namespace, enter it, and make in it one tap for the machine and one for pasta.

        Only in the main thread, before there is any other.

        Raises:
            HostError: This kernel cannot do that.
        """
        user = confinement.user_of(confinement.NETWORK) or _NOBODY
        host = sysio.Fd(os.open("/proc/thread-self/ns/net", os.O_RDONLY | os.O_CLOEXEC))
        self._namespaces = [host]
        self._namespaces += _make_namespaces(user)
        sysio.setns(self._namespaces[1].raw, sysio.CLONE_NEWNET)
        for which in ("all", "default"):
            # Its own kernel is not to say anything on these interfaces.
            try:
                sysio.write_existing(f"/proc/sys/net/ipv6/conf/{which}/disable_ipv6", "1")
            except OSError:
                pass  # without IPv6
        endpoint = Redirected(0, self.mac)
        try:
            _make_persistent(INTERFACE)
            with rtnetlink.Rtnl() as rtnl:
                [link] = [link for link in rtnl.links() if link.name == INTERFACE]
                try:
                    rtnl.bring_up(link.index, MTU)
                except OSError as error:
                    raise rtnetlink.refused(f"cannot bring {INTERFACE} up", error) from error
                link.mtu = MTU
                endpoint.connect(rtnl, link, None, "")
        except BaseException:
            if endpoint.fd is not None:
                endpoint.fd.close()
            raise
        return [Nic(self.mac, tap_fd=endpoint.fd)]

    def start(self, journal: Journal, name: str) -> None:
        """Start pasta, in the network namespace that we come from. See `UserPlan.start`."""
        host, network, owner = self._namespaces
        user = confinement.user_of(confinement.NETWORK) or _NOBODY
        wire = ["--netns", _NETWORK_PATH, "--userns", _USER_PATH, "--no-netns-quit", "-I", INTERFACE]
        wire += ["--ns-mac-addr", self.mac, "-T", "none", "-U", "none"]
        sysio.setns(host.raw, sysio.CLONE_NEWNET)
        try:
            self.start_helper(
                self.command(*wire),
                journal,
                name,
                capabilities=(),
                namespaces=sysio.CLONE_NEWPID | sysio.CLONE_NEWNS,
                confinement=confinement.helper(
                    user=user,
                    devices=[_TUN],
                    binds=[(network.raw, _NETWORK_PATH), (owner.raw, _USER_PATH)],
                ),
            )
        finally:
            sysio.setns(network.raw, sysio.CLONE_NEWNET)
            self._close_namespaces()

    def stop(self) -> None:
        """See `UserPlan.stop`."""
        super().stop()
        self._close_namespaces()

    def _close_namespaces(self) -> None:
        while self._namespaces:
            self._namespaces.pop().close()


def _first_port_for_all() -> int:
    """The first port that programs without privileges may take."""
    try:
        return int(sysio.read_file("/proc/sys/net/ipv4/ip_unprivileged_port_start"))
    except (OSError, ValueError):
        return 1024


def _make_namespaces(user: int) -> list[sysio.Fd]:
    """Make a network namespace, and the user namespace that it belongs to, whose only user this one is.

    Returns:
        The network namespace and the user namespace.

    Raises:
        HostError: The kernel refused.
    """
    made_read, made_write = map(sysio.Fd, os.pipe2(os.O_CLOEXEC))
    end_read, end_write = map(sysio.Fd, os.pipe2(os.O_CLOEXEC))
    found: list[sysio.Fd] = []
    pid = 0
    try:
        pid = os.fork()
        if pid == 0:
            _be_made(user, made_write.raw, end_read.raw, end_write)
        made_write.close()
        said = os.read(made_read.raw, 16)
        if said != b"0":
            raise OSError(int(said or b"5"), os.strerror(int(said or b"5")))
        for name in ("uid_map", "gid_map"):
            sysio.write_existing(f"/proc/{pid}/{name}", f"0 {user} 1")
        found += [
            sysio.Fd(os.open(f"/proc/{pid}/ns/{kind}", os.O_RDONLY | os.O_CLOEXEC))
            for kind in ("net", "user")
        ]
    except OSError as error:
        for one in found:
            one.close()
        raise HostError(
            f"cannot make a network namespace for the user network: {error.strerror}",
            "It needs root, and user namespaces (sysctl user.max_user_namespaces); or use --network none.",
        ) from error
    finally:
        for end in (made_read, made_write, end_read, end_write):
            end.close()
        if pid > 0:
            os.waitpid(pid, 0)
    return found


def _be_made(user: int, made: int, end: int, end_write: sysio.Fd) -> None:
    """The process whose namespaces these are at first, until it is told to end."""
    number = 0
    try:
        end_write.close()
        # It keeps its capabilities, so that no rule for users without any applies to it (user_namespaces(7)).
        sysio.prctl(sysio.PR_SET_SECUREBITS, _NO_SETUID_FIXUP)
        os.setgroups([])
        os.setresgid(user, user, user)
        os.setresuid(user, user, user)
        sysio.unshare(sysio.CLONE_NEWUSER | sysio.CLONE_NEWNET)
    except OSError as error:
        number = error.errno or 5
    finally:
        os.write(made, str(number).encode())
        os.read(end, 1)
        os._exit(0)


def _make_persistent(name: str) -> None:
    """Make a tap device that is there before the program that serves it, without headers before its frames."""
    import fcntl

    try:
        with sysio.Fd(os.open(_TUN, os.O_RDWR | os.O_CLOEXEC | os.O_NONBLOCK)) as fd:
            fcntl.ioctl(fd.raw, TUNSETIFF, struct.pack("16sH22x", name.encode(), TAP_FLAGS))
            fcntl.ioctl(fd.raw, _TUNSETPERSIST, 1)
    except OSError as error:
        raise rtnetlink.refused(f"cannot make the tap device {name}", error) from error
