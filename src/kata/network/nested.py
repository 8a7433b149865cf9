"""The user network of an ordinary user: passt in a network namespace that pasta connects with the host's.

passt opens the connections of a guest as a process of the host, so it must not reach what listens on the host's
loopback. For root a filter sees to that (`kata.network.egress_filter`), which only root may install. Here passt is in a
network namespace of the sandbox's own, whose loopback has nobody on it, and pasta carries what leaves that namespace:
its kernel sends nothing for 127.0.0.0/8 or ::1 out, and pasta maps no address to the host (``--no-map-gw``).

Published TCP ports are the engine's, whose sockets are the host's from before. UDP ports are pasta's on the host, which
hands on what comes there to the same port in the namespace, where passt has it.

Sources: pasta(1), user_namespaces(7), network_namespaces(7).
"""

from __future__ import annotations

import os
import time

from kata import children, confinement, sysio
from kata.errors import HostError
from kata.network import rtnetlink
from kata.network.user import HostNetwork, Port, UserPlan

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Sequence

    from kata.errors import KataError
    from kata.journal import Journal

_TUN = "/dev/net/tun"
_PATH = "/dev/network"
"""Where pasta finds the namespace: in a ``/dev`` of its own."""
_CAPABILITIES = (sysio.CAP_SYS_ADMIN, sysio.CAP_NET_ADMIN, sysio.CAP_SETUID, sysio.CAP_SETGID)
"""In the user namespace alone: to enter the network namespace and set its interface up."""
_GLOBAL = 0
"""The scope of addresses that are not of a link or a host (linux/rtnetlink.h, RT_SCOPE_UNIVERSE)."""
_READY_S = 5.0
_POLL_S = 0.005


class NestedPlan(UserPlan):
    """A user network by passt and pasta.

    Args:
        mac: Hardware address of the guest's interface.
        ports: What is published.
        host: The host's network.
        dns: Name servers that were asked for; empty is the host's.
        program: Path of passt.
        outer: Path of pasta.
    """

    def __init__(
        self,
        mac: str,
        ports: Sequence[Port],
        host: HostNetwork,
        dns: Sequence[str] = (),
        program: str = "",
        outer: str = "",
    ) -> None:
        super().__init__(mac, ports, host, dns, program, carries_tcp=True)
        self._outer_program = outer
        self._outer = children.SupervisedChild("the user network (pasta)")
        # Where the host's only resolver is on its loopback, pasta hands on what is sent to this address, and passt
        # carries it there like anything else.
        self._names = [address for address in (self._forward4, self._forward6) if address]
        self._forward4 = self._forward6 = ""

    def port_spec(self, port: Port) -> str:
        """See `UserPlan.port_spec`: in the namespace, whose addresses are not those of the host for long."""
        return f"{port.host_port}:{port.guest_port}"

    def guard(self, journal: Journal, name: str) -> list[str]:
        """Enter a network namespace without the host's loopback, for good; see `UserPlan.guard`.

        Raises:
            HostError: It cannot be made, or pasta cannot be started.
        """
        try:
            namespace = _make_namespace()
        except OSError as error:
            raise HostError(
                f"cannot make a network namespace for the user network: {error.strerror}",
                "sysctl user.max_net_namespaces; or use --network none.",
            ) from error
        try:
            self._start_outer(namespace.raw, journal)
            sysio.setns(namespace.raw, sysio.CLONE_NEWNET)
        except OSError as error:
            raise HostError(
                f"cannot start the user network: {error.strerror}",
                f"{_TUN} has to be open to all users; or use --network none.",
            ) from error
        finally:
            namespace.close()
        self._wait_for_interface()
        return []

    def _start_outer(self, namespace: int, journal: Journal) -> None:
        argv = [
            self._outer_program,
            "--foreground",
            "--quiet",
            "--config-net",
            "--no-map-gw",
            "--no-netns-quit",
        ]
        argv += ["--netns-only", "--netns", _PATH]
        for option in ("-t", "-T", "-U"):
            argv += [option, "none"]
        for spec in [port.outer_spec for port in self.ports if port.proto == "udp"] or ["none"]:
            argv += ["-u", spec]
        for address in self._names:
            argv += ["--dns-forward", address]
        self._outer.start(
            argv,
            journal,
            "pasta",
            capabilities=_CAPABILITIES,
            namespaces=sysio.CLONE_NEWPID | sysio.CLONE_NEWNS,
            confinement=confinement.helper(devices=[_TUN], binds=[(namespace, _PATH)]),
        )

    def _wait_for_interface(self) -> None:
        """Wait until pasta has set the interface of the namespace up, in which this thread is."""
        deadline = time.monotonic() + _READY_S
        with rtnetlink.Rtnl() as rtnl:
            while not any(address.scope == _GLOBAL for address in rtnl.addresses()):
                if self._outer.poll() is not None:
                    raise self.failure() or HostError("pasta has ended")
                if time.monotonic() > deadline:
                    raise HostError(f"pasta has set no interface up within {_READY_S:g} s", "kata doctor")
                time.sleep(_POLL_S)

    def failure(self) -> KataError | None:
        """See `UserPlan.failure`; or why pasta has ended."""
        said = self._outer.failure()
        if said:
            hint = f"{_TUN} has to be open to all users (chmod 666)." if "tun" in said else "kata doctor"
            return HostError(said, hint)
        return super().failure()

    def stop(self) -> None:
        """See `UserPlan.stop`."""
        super().stop()
        self._outer.stop()


def _make_namespace() -> sysio.Fd:
    """Make a network namespace without entering it.

    Raises:
        OSError: The kernel refused.
    """
    made_read, made_write = map(sysio.Fd, os.pipe2(os.O_CLOEXEC))
    end_read, end_write = map(sysio.Fd, os.pipe2(os.O_CLOEXEC))
    pid = 0
    try:
        pid = os.fork()
        if pid == 0:
            number = 0
            try:
                end_write.close()
                sysio.unshare(sysio.CLONE_NEWNET)
            except OSError as error:
                number = error.errno or 5
            finally:
                os.write(made_write.raw, str(number).encode())
                os.read(end_read.raw, 1)
                os._exit(0)
        made_write.close()
        said = os.read(made_read.raw, 16)
        if said != b"0":
            raise OSError(int(said or b"5"), os.strerror(int(said or b"5")))
        return sysio.Fd(os.open(f"/proc/{pid}/ns/net", os.O_RDONLY | os.O_CLOEXEC))
    finally:
        for end in (made_read, made_write, end_read, end_write):
            end.close()
        if pid > 0:
            os.waitpid(pid, 0)
