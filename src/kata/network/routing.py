"""Copies the routes and rules of a network namespace for the guest that takes its place.

They are passed on as the kernel's own messages (``struct rtmsg`` or ``struct fib_rule_hdr`` with attributes), so that
metrics, nexthops, table and type of a route are preserved. Only interface indexes differ in the guest.
Constants: ``linux/rtnetlink.h``, ``linux/fib_rules.h``.
"""

from __future__ import annotations

import _socket as socket  # `socket` makes enumerations, which take 10 ms before the machine starts
import errno
import struct

from kata.network.rtnetlink import attribute, attributes

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from typing import Any

    from kata.network.rtnetlink import Rtnl

_NEW_ROUTE, _GET_ROUTE = 24, 26
_NEW_RULE, _GET_RULE = 32, 34
_HEADER = 12
_FAMILIES = {socket.AF_INET: 0, socket.AF_INET6: 1}  # -> types.IPFamily
_MAIN, _LOCAL, _DEFAULT = 254, 255, 253
_PROTO_REDIRECT, _PROTO_KERNEL = 1, 2
_CLONED = 0x200
_SETTABLE = 0x2 | 0x4
"""Flags of a nexthop that users can set: pervasive and on-link."""
_UNICAST = 1
_KINDS = ("unspec", "unicast", "local", "broadcast", "anycast", "multicast")
_KINDS_WITHOUT_WAY = {6: "blackhole", 7: "unreachable", 8: "prohibit", 9: "throw"}
_DST, _SRC, _IIF, _OIF, _GATEWAY, _PRIORITY, _PREFSRC, _METRICS, _MULTIPATH = range(1, 10)
_CACHEINFO, _TABLE, _VIA, _ENCAP, _EXPIRES = 12, 15, 18, 22, 23
_OF_THE_KERNEL = frozenset({_CACHEINFO, 17, _EXPIRES, 24, 25, 30})
"""Attributes with a route's state, or the id of a nexthop object whose content is in the message as well."""
_METRIC_MTU = 2
_TICKS = 100
"""USER_HZ: ticks per second in the kernel's messages."""

_FRA_PRIORITY, _FRA_SUPPRESS_PREFIX, _FRA_SUPPRESS_GROUP, _FRA_TABLE = 6, 14, 13, 15
_FRA_PAD, _FRA_PROTOCOL = 18, 21
_FRA_NAMES = {3: "iif", 10: "fwmark", 17: "oif", 20: "uidrange", 22: "ipproto", 23: "sport", 24: "dport"}
_INVERT = 2
_TO_TABLE = 1
_NONE = b"\xff" * 4
MOST = 8192
"""Maximum number of routes that are passed on, and of rules."""
MOST_BYTES = 960 << 10
"""Maximum size of either. Routes and rules, those to add and those to remove, go to the agent in one frame of 4 MiB."""


class Entry:
    """A route or a rule.

    Attributes:
        body: The kernel's message without its header.
        text: Description in the style of ip(8).
        family: ``AF_INET`` or ``AF_INET6``.
    """

    __slots__ = ("body", "text")

    def __init__(self, body: bytes, text: str) -> None:
        self.body = body
        self.text = text

    @property
    def family(self) -> int:
        return self.body[0]

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Entry) and self.body == other.body

    def __hash__(self) -> int:
        return hash(self.body)


def routes(rtnl: Rtnl, names: Mapping[int, str], left_out: list[str]) -> list[Entry]:
    """The routes of all tables, except those that the kernel derives from addresses.

    Args:
        rtnl: A socket in the namespace.
        names: Names of the guest's interfaces, by their index in the namespace.
        left_out: A sentence is appended for each route that cannot be passed on.
    """
    found = []
    for kind, body in rtnl.dump(_GET_ROUTE, bytes(_HEADER)):
        if kind != _NEW_ROUTE or len(body) < _HEADER or body[0] not in _FAMILIES:
            continue
        family, length, source_length, tos, table, protocol, scope, sort, flags = struct.unpack_from(
            "=8BI", body
        )
        if protocol in (_PROTO_KERNEL, _PROTO_REDIRECT) or flags & _CLONED:
            continue
        header = (family, length, source_length, tos, table, protocol, scope, sort, flags & _SETTABLE)
        message = struct.pack("=8BI", *header)
        used = set()
        for name, value in attributes(body[_HEADER:]):
            if name in (_IIF, _OIF):
                used.add(int.from_bytes(value, "little"))
            elif name == _MULTIPATH:
                value, more = _ways(value)
                used |= more
            elif name == _CACHEINFO and family == socket.AF_INET6:
                (left,) = struct.unpack_from("=i", value, 8)
                if left > 0:
                    message += attribute(_EXPIRES, struct.pack("=I", max(1, left // _TICKS)))
            if name not in _OF_THE_KERNEL:
                message += attribute(name, value)
        entry = Entry(message, _describe_route(message, names))
        if used - names.keys():
            left_out.append(f"the route {entry.text} is not in the guest: it has not this interface")
        else:
            found.append(entry)
    return _bounded(found, "routes", left_out)


def rules(rtnl: Rtnl, left_out: list[str]) -> list[Entry]:
    """The routing rules, including the kernel's default ones. See `routes` for the arguments."""
    found = []
    for family in _FAMILIES:
        try:
            for kind, body in rtnl.dump(_GET_RULE, struct.pack("=B11x", family)):
                if kind == _NEW_RULE and len(body) >= _HEADER and body[0] == family:
                    found.append(_rule(body))
        except OSError as error:
            if error.errno != errno.EOPNOTSUPP:  # a kernel without rules, or without IPv6
                raise
    return _bounded(found, "rules", left_out)


def _bounded(found: list[Entry], what: str, left_out: list[str]) -> list[Entry]:
    """The first of *found*, up to the limits `MOST` and `MOST_BYTES`."""
    count = size = 0
    for entry in found[:MOST]:
        size += len(entry.body)
        if size > MOST_BYTES:
            break
        count += 1
    if count < len(found):
        left_out.append(
            f"{len(found) - count} of {len(found)} {what} are not in the guest, beginning with"
            f" {found[count].text}: at most {MOST} {what} of {MOST_BYTES >> 10} KiB are carried"
        )
    return found[:count]


def _rule(body: bytes) -> Entry:
    header = bytearray(body[:_HEADER])
    header[8:12] = struct.pack("=I", struct.unpack_from("=I", body, 8)[0] & _INVERT)
    message = bytes(header)
    for name, value in sorted(attributes(body[_HEADER:])):
        absent = name in (_FRA_SUPPRESS_GROUP, _FRA_SUPPRESS_PREFIX) and value == _NONE
        if not absent and name not in (_FRA_PAD, _FRA_PROTOCOL):
            message += attribute(name, value)
    return Entry(message, _describe_rule(message))


def _default_rule(family: int, priority: int, table: int) -> Entry:
    message = struct.pack("=8BI", family, 0, 0, 0, table, 0, 0, _TO_TABLE, 0)
    if priority:
        message += attribute(_FRA_PRIORITY, struct.pack("=I", priority))
    message += attribute(_FRA_TABLE, struct.pack("=I", table))
    return Entry(message, _describe_rule(message))


def _ways(value: bytes) -> tuple[bytes, set[int]]:
    """The nexthops of a multipath route without their state, and the indexes of their interfaces."""
    cleaned, used = bytearray(value), set()
    at = 0
    while at + 8 <= len(cleaned):
        length, flags, _weight, index = struct.unpack_from("=HBBi", cleaned, at)
        if length < 8:
            break
        cleaned[at + 2] = flags & _SETTABLE
        used.add(index)
        at += (length + 3) & ~3
    return bytes(cleaned), used


def _number(value: bytes | None) -> int:
    return int.from_bytes(value or b"", "little")


def _ip(family: int, value: bytes | None) -> str:
    return socket.inet_ntop(family, value) if value else ""


def _network(family: int, value: bytes | None, length: int, everything: str) -> str:
    return f"{_ip(family, value)}/{length}" if value else everything


def _describe_route(body: bytes, names: Mapping[int, str]) -> str:
    family, length, source_length, tos, table, _protocol, _scope, sort = struct.unpack_from("=8B", body)
    found = dict(attributes(body[_HEADER:]))
    text = _network(family, found.get(_DST), length, "default")
    if sort != _UNICAST:
        kind = _KINDS[sort] if sort < len(_KINDS) else _KINDS_WITHOUT_WAY.get(sort, sort)
        text = f"{kind} {text}"
    if source_length:
        text += f" from {_network(family, found.get(_SRC), source_length, 'all')}"
    if tos:
        text += f" tos {tos:#x}"
    if _GATEWAY in found:
        text += f" via {_ip(family, found[_GATEWAY])}"
    if _OIF in found:
        number = _number(found[_OIF])
        text += f" dev {names.get(number, f'number {number}')}"
    if _MULTIPATH in found:
        text += " with several ways"
    if _ENCAP in found:
        text += " encapsulated"
    table = _number(found.get(_TABLE)) or table
    if table != _MAIN:
        text += f" table {table}"
    if _PRIORITY in found:
        text += f" metric {_number(found[_PRIORITY])}"
    return text


def _describe_rule(body: bytes) -> str:
    family, length, source_length, tos, table = struct.unpack_from("=5B", body)
    found = dict(attributes(body[_HEADER:]))
    text = f"{_number(found.get(_FRA_PRIORITY))}:"
    text += f" from {_network(family, found.get(2), source_length, 'all')}"
    if length:
        text += f" to {_network(family, found.get(1), length, 'all')}"
    if tos:
        text += f" tos {tos:#x}"
    for number, name in _FRA_NAMES.items():
        if number in found:
            value = found[number]
            text += f" {name} " + (value.rstrip(b"\0").decode() if name in ("iif", "oif") else value.hex())
    return f"{text} table {_number(found.get(_FRA_TABLE)) or table}"


DEFAULT_RULES = tuple(
    _default_rule(family, priority, table)
    for family, priority, table in (
        (socket.AF_INET, 0, _LOCAL),
        (socket.AF_INET, 32766, _MAIN),
        (socket.AF_INET, 32767, _DEFAULT),
        (socket.AF_INET6, 0, _LOCAL),
        (socket.AF_INET6, 32766, _MAIN),
    )
)
"""The rules that every new network namespace has."""


def in_stock_protocol(
    entries: Sequence[Entry], names: Mapping[int, str], left_out: list[str]
) -> list[dict[str, Any]]:
    """Convert routes for an agent without our extension, as far as Kata's own protocol can express them.

    Args:
        entries: The routes.
        names: Names of the guest's interfaces, by their index in the namespace.
        left_out: A sentence is appended for each route that loses something.

    Returns:
        types.Route values, as dicts.
    """
    stock_routes = []
    for entry in entries:
        family, length, source_length, tos, table, _protocol, scope, sort, flags = struct.unpack_from(
            "=8BI", entry.body
        )
        by_type = dict(attributes(entry.body[_HEADER:]))
        table = _number(by_type.get(_TABLE)) or table
        if sort != _UNICAST or table != _MAIN or source_length or tos or _OIF not in by_type:
            left_out.append(f"the route {entry.text} is not in the guest: its agent cannot say it")
            continue
        metrics = dict(attributes(by_type.get(_METRICS, b"")))
        mtu = _number(metrics.pop(_METRIC_MTU, None))
        usual = {0} if family == socket.AF_INET else {0, 1024}
        if metrics or _ENCAP in by_type or _number(by_type.get(_PRIORITY)) not in usual:
            left_out.append(
                f"the route {entry.text} is in the guest without its metrics: its agent cannot say them"
            )
        via = by_type.get(_VIA, b"")
        gateway = (
            _ip(int.from_bytes(via[:2], "little"), via[2:]) if via else _ip(family, by_type.get(_GATEWAY))
        )
        stock_routes.append(
            {
                "dest": _network(family, by_type.get(_DST), length, ""),
                "gateway": gateway,
                "device": names[_number(by_type[_OIF])],
                "source": _ip(family, by_type.get(_PREFSRC)),
                "scope": scope,
                "family": _FAMILIES[family],
                "flags": flags,
                "mtu": mtu,
            }
        )
    return stock_routes
