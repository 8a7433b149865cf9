"""The host's name servers, as a guest can use them."""

from __future__ import annotations

import os
import stat

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Sequence

RESOLV_CONF = "/etc/resolv.conf"
SYSTEMD_RESOLV_CONF = "/run/systemd/resolve/resolv.conf"
"""Where systemd-resolved names the servers behind its own loopback address."""


DOCKER = "127.0.0.11"
"""Where dockerd answers in the namespaces of containers on networks that users have made."""


class Resolver:
    """What a ``resolv.conf`` says (resolv.conf(5)).

    Args:
        servers: Addresses, in order.
        search: Search domains.
        options: Words of its ``options`` lines.
    """

    __slots__ = ("options", "search", "servers")

    def __init__(self, servers: list[str], search: list[str], options: list[str]) -> None:
        self.servers = servers
        self.search = search
        self.options = options

    @property
    def reachable(self) -> list[str]:
        """The servers that somebody beyond this host's loopback can ask."""
        return [s for s in self.servers if not is_loopback(s) and "%" not in s]


def parse(text: str) -> Resolver:
    """Read the text of a ``resolv.conf``; lines that make no sense are passed over, as the C library does."""
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
    """Read the first of these files that there is; an empty answer if there is none.

    What a guest may have put there (a pipe, a device) holds nobody up: only a regular file is read.
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
    """Whether this is an IPv4 or IPv6 address, possibly with a scope."""
    return bool(pack(text.partition("%")[0]))


def is_loopback(text: str) -> bool:
    """Whether this address means the host itself."""
    packed = pack(text.partition("%")[0])
    if len(packed) == 4:
        return packed[0] in (0, 127)
    return packed in (bytes(16), bytes(15) + b"\x01") or packed[:13] == bytes(10) + b"\xff\xff\x7f"


def pack(text: str) -> bytes:
    """The address as 4 or 16 bytes, or nothing if it is none."""
    import _socket

    for family in (_socket.AF_INET, _socket.AF_INET6):
        try:
            return _socket.inet_pton(family, text)
        except (OSError, ValueError):
            continue
    return b""
