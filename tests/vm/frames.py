"""A guest that forges packets: Ethernet frames made by hand, on the guest's end of a network helper's wire.

Layouts: RFC 791 (IPv4), RFC 8200 (IPv6), RFC 9293 (TCP), RFC 768 (UDP); each frame goes after its length, as
QEMU's ``-netdev stream`` sends it.
"""

from __future__ import annotations

import ipaddress
import os
import socket
import struct

from kata.network import user

GUEST_MAC = bytes.fromhex("525400123456")
HELPER_MAC = bytes.fromhex(user.HELPER_MAC.replace(":", ""))


def _sum(data: bytes) -> int:
    total = sum(struct.unpack(f"!{len(data) // 2}H", data)) if len(data) % 2 == 0 else _sum(data + b"\0")
    while total >> 16:
        total = (total & 0xFFFF) + (total >> 16)
    return total


def _packet(destination: str, protocol: int, payload: bytes, checksum_at: int) -> bytes:
    to = ipaddress.ip_address(destination)
    source = ipaddress.ip_address(user.ADDRESS4 if to.version == 4 else user.ADDRESS6)
    pseudo = source.packed + to.packed + struct.pack("!HH", protocol, len(payload))
    checksum = ~_sum(pseudo + payload) & 0xFFFF
    payload = payload[:checksum_at] + struct.pack("!H", checksum) + payload[checksum_at + 2 :]
    if to.version == 4:
        head = struct.pack("!BBHHHBBH", 0x45, 0, 20 + len(payload), 1, 0, 64, protocol, 0)
        head += source.packed + to.packed
        head = head[:10] + struct.pack("!H", ~_sum(head) & 0xFFFF) + head[12:]
        kind = 0x0800
    else:
        head = struct.pack("!IHBB", 0x60000000, len(payload), protocol, 64) + source.packed + to.packed
        kind = 0x86DD
    return HELPER_MAC + GUEST_MAC + struct.pack("!H", kind) + head + payload


def syn(destination: str, port: int) -> bytes:
    """A frame that asks for a TCP connection."""
    source_port = 20000 + int.from_bytes(os.urandom(2), "big") % 20000
    option = struct.pack("!BBH", 2, 4, 1460)
    payload = struct.pack("!HHIIBBHHH", source_port, port, 1000, 0, 6 << 4, 0x02, 65535, 0, 0) + option
    return _packet(destination, 6, payload, 16)


def datagram(destination: str, port: int, data: bytes) -> bytes:
    """A frame with a UDP datagram."""
    source_port = 20000 + int.from_bytes(os.urandom(2), "big") % 20000
    return _packet(destination, 17, struct.pack("!HHHH", source_port, port, 8 + len(data), 0) + data, 6)


def neighbour_claims() -> list[bytes]:
    """Frames that make the helper know who and where the guest is: an ARP request and an ICMPv6 one."""
    arp = struct.pack("!HHBBH", 1, 0x0800, 6, 4, 1) + GUEST_MAC + ipaddress.ip_address(user.ADDRESS4).packed
    arp += bytes(6) + ipaddress.ip_address(user.GATEWAY4).packed
    target = ipaddress.ip_address(user.GATEWAY6).packed
    solicit = struct.pack("!BBHI", 135, 0, 0, 0) + target + b"\x01\x01" + GUEST_MAC
    return [
        b"\xff" * 6 + GUEST_MAC + b"\x08\x06" + arp,
        _packet(user.GATEWAY6, 58, solicit, 2),
    ]


def send(wire: socket.socket, frame: bytes) -> None:
    """Put a frame on the wire, unpadded: passt drops a packet that is shorter than its frame."""
    wire.sendall(struct.pack("!I", len(frame)) + frame)


def receive(wire: socket.socket, timeout_s: float) -> bytes:
    """The next frame that comes, or nothing."""
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
