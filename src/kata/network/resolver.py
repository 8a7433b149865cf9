"""Reads the host's name servers and selects those that a guest can reach."""

from __future__ import annotations

import os
import stat

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Sequence

RESOLV_CONF = "/etc/resolv.conf"
SYSTEMD_RESOLV_CONF = "/run/systemd/resolve/resolv.conf"
"""Lists the upstream servers of systemd-resolved, which itself listens only at a loopback address."""


DOCKER = "127.0.0.11"
"""Address at which dockerd answers DNS queries in the namespaces of containers on user-defined networks."""


class Resolver:
    """The content of a ``resolv.conf`` (resolv.conf(5)).

    Args:
        servers: Addresses of the name servers, in order.
        search: Search domains.
        options: Words of the ``options`` lines.
    """

    __slots__ = ("options", "search", "servers")

    def __init__(self, servers: list[str], search: list[str], options: list[str]) -> None:
        self.servers = servers
        self.search = search
        self.options = options

    @property
    def reachable(self) -> list[str]:
        """The servers that can be reached from outside this host's loopback."""
        return [s for s in self.servers if not is_loopback(s) and "%" not in s]


def parse(text: str) -> Resolver:
    """Parse the text of a ``resolv.conf``. Invalid lines are ignored, as by the C library."""
    resolver = Resolver([], [], [])
    for line in text.split("\n"):
        words = line.split()
        if len(words) < 2 or words[0][0] in "#;":
            continue
        if words[0] == "nameserver" and is_address(words[1]):
            resolver.servers.append(words[1])
        elif words[0] in ("search", "domain"):
            resolver.search = words[1:]
        elif words[0] == "options":
            resolver.options += words[1:]
    return resolver


def read(paths: Sequence[str] = (RESOLV_CONF,)) -> Resolver:
    """Read the first of these files that exists; an empty `Resolver` if none does.

    Only a regular file is read: a fifo or a device that a guest may have put there must not block the reader.
    """
    for path in paths:
        try:
            fd = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC)
            try:
                if stat.S_ISREG(os.fstat(fd).st_mode):
                    return parse(os.read(fd, 65536).decode(errors="replace"))
            finally:
                os.close(fd)
        except OSError:
            continue
    return Resolver([], [], [])


def is_address(text: str) -> bool:
    """Whether *text* is an IPv4 or IPv6 address, possibly with a scope."""
    return bool(pack(text.partition("%")[0]))


def is_loopback(text: str) -> bool:
    """Whether *text* is an address of the host itself: a loopback or unspecified one."""
    packed = pack(text.partition("%")[0])
    if len(packed) == 4:
        return packed[0] in (0, 127)
    return packed in (bytes(16), bytes(15) + b"\x01") or packed[:13] == bytes(10) + b"\xff\xff\x7f"


def pack(text: str) -> bytes:
    """The address as 4 or 16 bytes; empty if *text* is not an address."""
    import _socket

    for family in (_socket.AF_INET, _socket.AF_INET6):
        try:
            return _socket.inet_pton(family, text)
        except (OSError, ValueError):
            continue
    return b""
