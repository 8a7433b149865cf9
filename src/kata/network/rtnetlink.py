"""A small rtnetlink(7) client: it examines a network namespace and redirects traffic within it.

Everything applies to the network namespace of the calling thread. The module knows only the messages that are used
here, and imports in a few milliseconds (pyroute2: 160 ms).

Constants and structures: ``linux/rtnetlink.h``, ``linux/if_link.h``, ``linux/pkt_cls.h``,
``linux/tc_act/tc_mirred.h``.
"""

from __future__ import annotations

import _socket as socket  # `socket` makes enumerations, which take 10 ms before the machine starts
import errno
import os
import struct

from kata.errors import HostError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterator
    from types import TracebackType
    from typing import Self

_REQUEST, _ACK, _DUMP, _CREATE, _EXCLUSIVE = 0x1, 0x4, 0x300, 0x400, 0x200
_ERROR, _DONE = 2, 3
_NEW_LINK, _DEL_LINK, _GET_LINK = 16, 17, 18
_NEW_ADDRESS, _GET_ADDRESS = 20, 22
_NEW_NEIGHBOR, _GET_NEIGHBOR = 28, 30
_NEW_QDISC, _DEL_QDISC = 36, 37
_NEW_FILTER = 44

UP, LOOPBACK, NOARP = 0x1, 0x8, 0x80
PERMANENT = 0x80
_INGRESS = 0xFFFF0000
_INGRESS_PARENT = 0xFFFFFFF1
_ETH_P_ALL = 0x0003
_U32_TERMINAL = 1
_ACT_STOLEN = 4
_EGRESS_REDIRECT = 1
_DIRECT_ACTION = 1
_REDIRECTION = 2
"""Priority of the redirecting filter. Filters with lower numbers come first; one of them may let frames in."""
_MACVLAN_PASSTHRU = 8
_TIMEOUT_S = 5.0


class Link:
    """A network interface.

    Attributes:
        index: Interface index in its namespace.
        name: Name.
        mac: Hardware address, ``52:54:00:12:34:56``; empty if it has none.
        mtu: Bytes.
        flags: ``IFF_*``.
        kind: ``veth``, ``macvlan``, ...; empty for hardware.
    """

    __slots__ = ("flags", "index", "kind", "mac", "mtu", "name")

    def __init__(self, index: int, flags: int) -> None:
        self.index = index
        self.flags = flags
        self.name = self.mac = self.kind = ""
        self.mtu = 0


class Address:
    """An address of an interface: text, prefix length, and the interface's index."""

    __slots__ = ("index", "ip", "prefix", "scope")

    def __init__(self, index: int, ip: str, prefix: int, scope: int) -> None:
        self.index = index
        self.ip = ip
        self.prefix = prefix
        self.scope = scope


class Neighbor:
    """A permanent entry of the neighbour table."""

    __slots__ = ("index", "ip", "mac")

    def __init__(self, index: int) -> None:
        self.index = index
        self.ip = self.mac = ""


class Rtnl:
    """A netlink socket in the calling thread's network namespace; a context manager."""

    def __init__(self) -> None:
        self._socket = socket.socket(
            socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_CLOEXEC, socket.NETLINK_ROUTE
        )
        self._socket.settimeout(_TIMEOUT_S)
        self._socket.bind((0, 0))
        self._sequence = 0

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Close it."""
        self._socket.close()

    # ---- looking ----

    def links(self) -> list[Link]:
        """All interfaces of the namespace."""
        found = []
        for kind, body in self.dump(_GET_LINK, bytes(16)):
            if kind != _NEW_LINK:
                continue
            link = Link(*struct.unpack_from("=iI", body, 4))
            for name, value in attributes(body[16:]):
                if name == 1:
                    link.mac = ":".join(f"{byte:02x}" for byte in value)
                elif name == 3:
                    link.name = value.rstrip(b"\0").decode()
                elif name == 4:
                    link.mtu = int.from_bytes(value, "little")
                elif name == 18:
                    link.kind = next((v.rstrip(b"\0").decode() for n, v in attributes(value) if n == 1), "")
            found.append(link)
        return found

    def index_of(self, name: str) -> int:
        """The number of the interface of this name.

        Raises:
            FileNotFoundError: There is none.
        """
        for link in self.links():
            if link.name == name:
                return link.index
        raise FileNotFoundError(errno.ENOENT, f"there is no interface {name}")

    def addresses(self) -> list[Address]:
        """All addresses of the namespace, IPv4 and IPv6."""
        found = []
        for kind, body in self.dump(_GET_ADDRESS, bytes(8)):
            if kind != _NEW_ADDRESS:
                continue
            family, prefix, _flags, scope, index = struct.unpack_from("=BBBBI", body)
            values = dict(attributes(body[8:]))
            raw = values.get(2) or values.get(1)  # the local address of a point-to-point link is IFA_LOCAL
            if raw and family in (socket.AF_INET, socket.AF_INET6):
                found.append(Address(index, _ip(raw), prefix, scope))
        return found

    def neighbors(self) -> list[Neighbor]:
        """The permanent entries of the neighbour tables."""
        found = []
        for kind, body in self.dump(_GET_NEIGHBOR, bytes(12)):
            if kind != _NEW_NEIGHBOR or body[0] not in (socket.AF_INET, socket.AF_INET6):
                continue
            index, state = struct.unpack_from("=iH", body, 4)
            if not state & PERMANENT:
                continue
            neighbor = Neighbor(index)
            for name, value in attributes(body[12:]):
                if name == 1:
                    neighbor.ip = _ip(value)
                elif name == 2:
                    neighbor.mac = ":".join(f"{byte:02x}" for byte in value)
            if neighbor.ip and neighbor.mac:
                found.append(neighbor)
        return found

    # ---- changing ----

    def bring_up(self, index: int, mtu: int = 0) -> None:
        """Bring an interface up, and set its MTU (bytes) unless that is 0.

        Raises:
            OSError: The kernel refused.
        """
        extra = attribute(4, struct.pack("=I", mtu)) if mtu else b""
        self._change(_NEW_LINK, 0, struct.pack("=BxHiII", 0, 0, index, UP, UP) + extra)

    def add_macvtap(self, name: str, lower: int) -> None:
        """Make a macvtap device that takes over all traffic of another interface (mode "passthru").

        Args:
            name: Name of the new device.
            lower: Index of the interface below it.

        Raises:
            OSError: The kernel refused, or has no macvtap.
        """
        data = attribute(1, struct.pack("=I", _MACVLAN_PASSTHRU))
        info = attribute(1, b"macvtap\0") + attribute(2, data)
        body = (
            attribute(3, name.encode() + b"\0")
            + attribute(5, struct.pack("=I", lower))
            + attribute(18, info)
        )
        self._change(_NEW_LINK, _CREATE | _EXCLUSIVE, bytes(16) + body)

    def add_bridge(self, name: str) -> None:
        """Make a bridge.

        Args:
            name: Its name.

        Raises:
            OSError: There is an interface of that name, or the kernel refused, or has no bridges.
        """
        info = attribute(18, attribute(1, b"bridge\0"))
        self._change(_NEW_LINK, _CREATE | _EXCLUSIVE, bytes(16) + attribute(3, name.encode() + b"\0") + info)

    def set_master(self, index: int, bridge: int) -> None:
        """Make an interface a port of a bridge.

        Args:
            index: The interface.
            bridge: The bridge's index; 0 for a port of none.

        Raises:
            OSError: The kernel refused.
        """
        body = struct.pack("=BxHiII", 0, 0, index, 0, 0) + attribute(10, struct.pack("=I", bridge))
        self._change(_NEW_LINK, 0, body)

    def move(self, index: int, namespace: int) -> None:
        """Move an interface into another network namespace, where it is down, and may have another number.

        Args:
            index: The interface.
            namespace: A descriptor of the namespace.

        Raises:
            OSError: The kernel refused, or there is an interface of that name.
        """
        body = struct.pack("=BxHiII", 0, 0, index, 0, 0) + attribute(28, struct.pack("=I", namespace))
        self._change(_NEW_LINK, 0, body)

    def delete_link(self, index: int) -> None:
        """Remove an interface.

        Raises:
            OSError: There is no such interface, or the kernel refused.
        """
        self._change(_DEL_LINK, 0, struct.pack("=BxHiII", 0, 0, index, 0, 0))

    def redirect(self, source: int, target: int) -> None:
        """Send all traffic that arrives at one interface out of another, before the namespace's own stack sees it.

        This uses an ingress qdisc, a u32 filter that matches every frame (more kernels have u32 than matchall), and
        the action mirred.

        Args:
            source: Index of the interface at which traffic arrives.
            target: Index of the interface to which it is sent.

        Raises:
            OSError: The kernel refused, or lacks one of the three.
        """
        qdisc = struct.pack("=BxHiIII", 0, 0, source, _INGRESS, _INGRESS_PARENT, 0)
        self._change(_NEW_QDISC, _CREATE | _EXCLUSIVE, qdisc + attribute(1, b"ingress\0"))
        key = struct.pack("=IIii", 0, 0, 0, 0)
        selector = struct.pack("=BBBxHHhhI", _U32_TERMINAL, 0, 1, 0, 0, 0, 0, 0) + key
        parameters = struct.pack("=IIiiiiI", 0, 0, _ACT_STOLEN, 0, 0, _EGRESS_REDIRECT, target)
        action = attribute(1, b"mirred\0") + attribute(2, attribute(2, parameters))
        options = attribute(5, selector) + attribute(7, attribute(1, action))
        priority = _REDIRECTION << 16 | socket.htons(_ETH_P_ALL)
        head = struct.pack("=BxHiIII", 0, 0, source, 0, _INGRESS, priority)
        self._change(
            _NEW_FILTER, _CREATE | _EXCLUSIVE, head + attribute(1, b"u32\0") + attribute(2, options)
        )

    def filter_before_redirection(self, source: int, program: int) -> None:
        """Install a BPF program in front of the redirection of an interface (see `redirect`).

        Args:
            source: Index of the interface. If it has such a program already, nothing changes.
            program: Descriptor of a program of type SCHED_CLS. Frames for which it continues (TC_ACT_UNSPEC) are
                redirected.

        Raises:
            OSError: The kernel refused, or has no cls_bpf.
        """
        options = attribute(6, struct.pack("=I", program)) + attribute(7, b"kata\0")
        options += attribute(8, struct.pack("=I", _DIRECT_ACTION))
        priority = (_REDIRECTION - 1) << 16 | socket.htons(_ETH_P_ALL)
        head = struct.pack("=BxHiIII", 0, 0, source, 1, _INGRESS, priority)
        try:
            self._change(
                _NEW_FILTER, _CREATE | _EXCLUSIVE, head + attribute(1, b"bpf\0") + attribute(2, options)
            )
        except FileExistsError:
            pass

    def stop_redirecting(self, source: int) -> None:
        """Undo `redirect`. It is no error if there is nothing to undo.

        Raises:
            OSError: The kernel refused for another reason.
        """
        try:
            self._change(_DEL_QDISC, 0, struct.pack("=BxHiIII", 0, 0, source, _INGRESS, _INGRESS_PARENT, 0))
        except OSError as error:
            if error.errno not in (errno.ENOENT, errno.ENODEV, errno.EINVAL):
                raise

    # ---- messages ----

    def _send(self, kind: int, flags: int, body: bytes) -> None:
        self._sequence += 1
        header = struct.pack("=IHHII", 16 + len(body), kind, flags | _REQUEST, self._sequence, 0)
        self._socket.send(header + body)

    def _messages(self) -> Iterator[tuple[int, bytes]]:
        while True:
            data = self._socket.recv(1 << 17)
            while len(data) >= 16:
                length, kind, _, sequence, _ = struct.unpack_from("=IHHII", data)
                body, data = data[16:length], data[(length + 3) & ~3 :]
                if sequence != self._sequence:
                    continue
                if kind == _ERROR:
                    number = -struct.unpack_from("=i", body)[0]
                    if number:
                        raise OSError(number, os.strerror(number))
                    return
                if kind == _DONE:
                    return
                yield kind, body

    def dump(self, kind: int, body: bytes) -> Iterator[tuple[int, bytes]]:
        """Yield type and body of each message of a dump request."""
        self._send(kind, _DUMP, body)
        yield from self._messages()

    def _change(self, kind: int, flags: int, body: bytes) -> None:
        self._send(kind, flags | _ACK, body)
        for _ in self._messages():
            pass


def attribute(kind: int, value: bytes) -> bytes:
    """Encode one attribute."""
    return struct.pack("=HH", 4 + len(value), kind) + value + bytes(-len(value) % 4)


def attributes(data: bytes) -> Iterator[tuple[int, bytes]]:
    """Yield type and value of each attribute in `data`."""
    while len(data) >= 4:
        length, kind = struct.unpack_from("=HH", data)
        if length < 4:
            return
        yield kind & 0x3FFF, data[4:length]
        data = data[(length + 3) & ~3 :]


def _ip(raw: bytes) -> str:
    return socket.inet_ntop(socket.AF_INET if len(raw) == 4 else socket.AF_INET6, raw)


def refused(what: str, error: OSError) -> HostError:
    """Make the error for an operation that the kernel refused; *what* describes the operation."""
    return HostError(
        f"{what}: {error.strerror}", "Check that the kernel has tun, sch_ingress, cls_u32, act_mirred."
    )
