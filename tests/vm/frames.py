"""Ethernet frames on the guest's end of a network helper's wire, in a test that needs no machine.

Layouts: RFC 826 (ARP), RFC 8200 (IPv6), RFC 4861 (neighbour discovery); each frame goes after its length, as
QEMU's ``-netdev stream`` sends it, or on a tap (a descriptor) after an empty header of offloads.
"""

from __future__ import annotations

import ipaddress
import os
import select
import socket
import struct

from kata.network import user

GUEST_MAC = bytes.fromhex("525400123456")
HELPER_MAC = bytes.fromhex(user.HELPER_MAC.replace(":", ""))


def _sum(data: bytes) -> int:
    total: int = sum(struct.unpack(f"!{len(data) // 2}H", data))
    while total >> 16:
        total = (total & 0xFFFF) + (total >> 16)
    return total


def _icmp6(destination: str, message: bytes) -> bytes:
    """A frame with an ICMPv6 message, whose checksum is bytes 2 and 3."""
    addresses = ipaddress.ip_address(user.ADDRESS6).packed + ipaddress.ip_address(destination).packed
    checksum = ~_sum(addresses + struct.pack("!II", len(message), 58) + message) & 0xFFFF
    message = message[:2] + struct.pack("!H", checksum) + message[4:]
    head = struct.pack("!IHBB", 0x60000000, len(message), 58, 255) + addresses
    return HELPER_MAC + GUEST_MAC + b"\x86\xdd" + head + message


def neighbour_claims() -> list[bytes]:
    """Frames that make the helper know who and where the guest is: an ARP request and an ICMPv6 one."""
    arp = struct.pack("!HHBBH", 1, 0x0800, 6, 4, 1) + GUEST_MAC + ipaddress.ip_address(user.ADDRESS4).packed
    arp += bytes(6) + ipaddress.ip_address(user.GATEWAY4).packed
    target = ipaddress.ip_address(user.GATEWAY6).packed
    solicit = struct.pack("!BBHI", 135, 0, 0, 0) + target + b"\x01\x01" + GUEST_MAC
    return [
        b"\xff" * 6 + GUEST_MAC + b"\x08\x06" + arp,
        _icmp6(user.GATEWAY6, solicit),
    ]


_TAP_HEADER = 10


def send(wire: socket.socket | int, frame: bytes) -> None:
    """Put a frame on the wire, unpadded: passt drops a packet that is shorter than its frame."""
    if isinstance(wire, int):
        os.write(wire, bytes(_TAP_HEADER) + frame)
        return
    wire.sendall(struct.pack("!I", len(frame)) + frame)


def receive(wire: socket.socket | int, timeout_s: float) -> bytes:
    """The next frame that comes, or nothing."""
    if isinstance(wire, int):
        return os.read(wire, 1 << 17)[_TAP_HEADER:] if select.select([wire], [], [], timeout_s)[0] else b""
    wire.settimeout(timeout_s)
    try:
        size = struct.unpack("!I", _exactly(wire, 4))[0]
        return _exactly(wire, size)
    except (TimeoutError, EOFError):
        return b""


def _exactly(wire: socket.socket, size: int) -> bytes:
    data = b""
    while len(data) < size:
        part = wire.recv(size - len(data))
        if not part:
            raise EOFError
        data += part
    return data
