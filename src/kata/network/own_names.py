"""Answers questions for the names of a network's members. No daemon and no socket of its own: an engine asks it.

Source: RFC 1035, section 4.1 (messages), 3.5 (in-addr.arpa); RFC 3596 (AAAA, ip6.arpa); RFC 2308 (a name without such a
record).
"""

from __future__ import annotations

import struct

from kata.network import members, resolver

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Sequence

_HEADER = 12
_A, _PTR, _AAAA, _ANY = 1, 12, 28, 255
_REVERSE4, _REVERSE6 = ".in-addr.arpa", ".ip6.arpa"
_INTERNET = 1
_NXDOMAIN = 3
_TTL_S = 0
"""Who is away in a moment is not to be found in anybody's cache."""
_MOST_ADDRESSES = 16


class OwnNames:
    """The names that one sandbox can ask for.

    Args:
        networks: For each network that it is in the directory, and the own addresses with the lengths of their prefixes
            (bits).
        servers: Addresses of the name servers for all other names.
    """

    __slots__ = ("_networks", "servers")

    def __init__(
        self, networks: Sequence[tuple[str, Sequence[tuple[str, int]]]], servers: Sequence[str]
    ) -> None:
        self._networks = list(networks)
        self.servers = [server for server in servers if "%" not in server]

    def enter(self, path: str, own: Sequence[tuple[str, int]]) -> None:
        """Find the members of a further network: its directory, the own addresses in it with their prefixes (bits)."""
        self._networks = [*self._networks, (path, own)]

    def leave(self, path: str) -> None:
        """Find those of a network no longer."""
        self._networks = [one for one in self._networks if one[0] != path]

    def answer(self, question: bytes) -> bytes:
        """The answer to a question; empty if it is not about a member. Blocks briefly.

        Args:
            question: A message from the guest, which may be anything.
        """
        asked = parse(question)
        if asked is None:
            return b""
        name, kind, end = asked
        if name.endswith((_REVERSE4, _REVERSE6)):
            return self._reverse(question, name, kind, end)
        found: list[bytes] | None = None
        for path, _ in self._networks:
            for member in members.living(path):
                if name in (one.lower() for one in member.names):
                    found = [*(found or ()), *map(resolver.pack, member.addresses)]
        if found is None:
            return b""
        records = [(_A if len(address) == 4 else _AAAA, address) for address in found]
        wanted = [one for one in records if kind in (one[0], _ANY)]
        return _message(question, end, wanted[:_MOST_ADDRESSES])

    def _reverse(self, question: bytes, name: str, kind: int, end: int) -> bytes:
        address = _meant(name)
        for path, own in self._networks:
            if not any(_is_beside(address, resolver.pack(one), prefix) for one, prefix in own):
                continue
            for member in members.living(path):
                if address in map(resolver.pack, member.addresses):
                    records = [(_PTR, _encoded(member.names[0]))] if kind in (_PTR, _ANY) else []
                    return _message(question, end, records)
            # Nobody outside knows of that network.
            return _message(question, end, [], _NXDOMAIN)
        return b""


def parse(question: bytes) -> tuple[str, int, int] | None:
    """Read an ordinary question with one name.

    Returns:
        The name in lower case, the kind of record, and where the question ends; None for anything else.
    """
    if len(question) < _HEADER or question[2] & 0xF8 or question[4:6] != b"\0\1":
        return None
    labels = []
    at = _HEADER
    while at < len(question) and 0 < question[at] < 64:
        labels.append(question[at + 1 : at + 1 + question[at]])
        at += 1 + question[at]
    end = at + 5  # the root's label, type and class
    if len(question) < end or question[at]:
        return None
    kind, family = struct.unpack_from(">HH", question, at + 1)
    if family != _INTERNET or not labels:
        return None
    return b".".join(labels).decode("ascii", "replace").lower(), kind, end


def _message(question: bytes, end: int, records: Sequence[tuple[int, bytes]], code: int = 0) -> bytes:
    # An authoritative answer; "recursion desired" as asked, and recursion available.
    flags = bytes((0x84 | question[2] & 1, 0x80 | code))
    head = question[:2] + flags + struct.pack(">HHHH", 1, len(records), 0, 0)
    body = b"".join(
        struct.pack(">HHHIH", 0xC000 | _HEADER, kind, _INTERNET, _TTL_S, len(data)) + data
        for kind, data in records
    )
    return head + question[_HEADER:end] + body


def _encoded(name: str) -> bytes:
    labels = [label.encode() for label in name.split(".") if label]
    return b"".join(bytes((len(label),)) + label for label in labels if len(label) < 64) + b"\0"


def _meant(name: str) -> bytes:
    """The address that a name for the other way means; empty for no address."""
    labels = name.rpartition(_REVERSE4 if name.endswith(_REVERSE4) else _REVERSE6)[0].split(".")
    labels.reverse()
    if name.endswith(_REVERSE4):
        return resolver.pack(".".join(labels))
    if len(labels) != 32 or not all(len(label) == 1 for label in labels):
        return b""
    digits = "".join(labels)
    return resolver.pack(":".join(digits[at : at + 4] for at in range(0, 32, 4)))


def _is_beside(address: bytes, other: bytes, prefix: int) -> bool:
    """Whether two addresses are of one subnet, whose prefix has so many bits."""
    if len(address) != len(other):
        return False
    return (int.from_bytes(address, "big") ^ int.from_bytes(other, "big")) >> len(address) * 8 - prefix == 0
