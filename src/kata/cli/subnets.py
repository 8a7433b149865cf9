"""The addresses of networks with a name: which subnets they have, and which addresses are given out.

A network has an IPv4 subnet and may have one of IPv6. Only IPv4 addresses are chosen: the IPv6 address of a member has
the same number in its subnet.

Sources: RFC 4193 (unique local addresses); proc(5), "/proc/net/route".
"""

from __future__ import annotations

import ipaddress
import os

from kata.errors import UsageError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from typing import Any

    _Network = ipaddress.IPv4Network | ipaddress.IPv6Network

_POOL = "10.210.{}.0/24"
"""The IPv4 subnets of networks for which none was asked; there may be 256 of them."""
_LARGEST4, _SMALLEST4 = 16, 30
"""Lengths of prefixes: a network has two members at least."""
_LARGEST6, _SMALLEST6 = 32, 112
"""Every IPv4 address has to have its counterpart."""
_USER_NETWORK = ("10.0.2.0/24", "fd6b:6174:6100::/64")
_LIST = "kata network ls --format '{{.Name}} {{.Subnet}}'"


def choose(
    given: Sequence[str], others: Sequence[dict[str, Any]], *, ipv6: bool, ip_range: str = ""
) -> dict[str, str]:
    """The subnets of a new network.

    Args:
        given: What was asked for, at most one of each family.
        others: The records of all networks.
        ipv6: One of IPv6 is wanted.
        ip_range: A part of the IPv4 subnet, or empty.

    Returns:
        Members of its record: ``subnet``, and those of ``subnet6`` and ``ip_range`` that it has.

    Raises:
        UsageError: One is malformed or another's, or there is none left.
    """
    taken = [ipaddress.ip_network(one) for one in _USER_NETWORK]
    for record in others:
        taken += [ipaddress.ip_network(record[key]) for key in ("subnet", "subnet6") if record.get(key)]
    asked: dict[int, _Network] = {}
    for text in given:
        subnet = _parsed(text)
        if subnet.version in asked:
            raise UsageError(
                f"--subnet {text!r} is a second one of IPv{subnet.version}", "one of each family"
            )
        _check(text, subnet, taken)
        asked[subnet.version] = subnet
    if 6 in asked and not ipv6:
        raise UsageError(
            f"--subnet {str(asked[6])!r} is one of IPv6", "kata network create --ipv6 --subnet ..."
        )
    subnet4 = asked.get(4) or _free(taken)
    found = {"subnet": str(subnet4)}
    if ipv6:
        found["subnet6"] = str(asked.get(6) or _unique())
    if ip_range:
        found["ip_range"] = _range(ip_range, subnet4)
    return found


def _parsed(text: str) -> _Network:
    try:
        return ipaddress.ip_network(text)
    except ValueError as error:
        raise UsageError(f"--subnet {text!r}: {error}", "--subnet 172.30.0.0/24") from None


def _check(text: str, subnet: _Network, taken: Sequence[_Network]) -> None:
    largest, smallest = (_LARGEST4, _SMALLEST4) if subnet.version == 4 else (_LARGEST6, _SMALLEST6)
    if not largest <= subnet.prefixlen <= smallest:
        raise UsageError(
            f"--subnet {text!r} is too {'large' if subnet.prefixlen < largest else 'small'}",
            f"from /{largest} to /{smallest}",
        )
    if _overlaps(subnet, taken):
        own = _USER_NETWORK[subnet.version == 6]
        raise UsageError(
            f"--subnet {text!r} overlaps another network, or {own}, which every machine has", _LIST
        )


def _overlaps(subnet: _Network, others: Sequence[_Network]) -> bool:
    first, last = subnet[0], subnet[-1]
    return any(
        one.version == subnet.version and int(one[0]) <= int(last) and int(first) <= int(one[-1])
        for one in others
    )


def _free(taken: Sequence[_Network]) -> _Network:
    """A subnet that neither another network has nor the host a route to, which members could not reach otherwise."""
    apart = [*taken, *_routes()]
    for number in range(256):
        chosen = ipaddress.ip_network(_POOL.format(number))
        if not _overlaps(chosen, apart):
            return chosen
    raise UsageError("all subnets for networks are taken", "kata network create --subnet 172.30.0.0/24")


def _routes() -> list[_Network]:
    """Where the host's IPv4 routes lead, without the default one."""
    found: list[_Network] = []
    try:
        with open("/proc/net/route", encoding="ascii") as lines:
            next(lines, None)
            for fields in map(str.split, lines):
                # The kernel prints the addresses' bytes as one number of this machine, little-endian.
                target, mask = (int.from_bytes(bytes.fromhex(fields[at]), "little") for at in (1, 7))
                if mask:
                    found.append(ipaddress.IPv4Network((target & mask, mask.bit_count())))
    except OSError:
        pass
    return found


def _unique() -> _Network:
    """A subnet that nobody else is likely to have. Source: RFC 4193, section 3.2."""
    return ipaddress.IPv6Network((b"\xfd" + os.urandom(5) + bytes(10), 64))


def _range(text: str, subnet: _Network) -> str:
    try:
        found = ipaddress.IPv4Network(text)
    except ValueError as error:
        raise UsageError(f"--ip-range {text!r}: {error}", f"a part of {subnet}") from None
    if not found.subnet_of(subnet):  # type: ignore[arg-type]
        raise UsageError(f"--ip-range {text!r} is not a part of the subnet {subnet}", "leave it out")
    return str(found)


def addresses(record: dict[str, Any]) -> Iterator[str]:
    """The IPv4 addresses that members of a network may be given, whether they are taken or not."""
    subnet = ipaddress.IPv4Network(record["subnet"])
    # The first is where a gateway would be.
    reserved = (subnet[0], subnet[1], subnet[-1])
    for one in ipaddress.IPv4Network(record.get("ip_range") or record["subnet"]):
        if one not in reserved:
            yield str(one)


def address6(record: dict[str, Any], address: str) -> tuple[str, int]:
    """The IPv6 address that belongs to a member's IPv4 address, and its prefix (bits); empty and 0 without IPv6."""
    if not record.get("subnet6"):
        return "", 0
    subnet = ipaddress.IPv6Network(record["subnet6"])
    number = int(ipaddress.IPv4Address(address)) - int(ipaddress.IPv4Network(record["subnet"])[0])
    return str(subnet[number]), subnet.prefixlen
