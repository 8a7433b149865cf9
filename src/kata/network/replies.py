"""Lets DNS answers for dockerd into a sandbox's network namespace.

To resolve an outside name, dockerd queries its upstream servers from sockets in the container's namespace. But traffic
that arrives at the namespace's interface is redirected to the guest, which knows nothing of these queries. A BPF
program in front of the redirection passes what belongs to a socket of the namespace: UDP and TCP from port 53, and ICMP
errors about packets to that port. ARP replies go to both sides, since the two have the same addresses and both resolve
their neighbours. All other traffic is redirected. The program is removed with the interface's qdisc.

Only for IPv4: for IPv6, the namespace would have to take part in neighbour discovery.

Source: ``linux/bpf.h`` (struct __sk_buff, bpf_sk_lookup_udp), tc-bpf(8).
"""

from __future__ import annotations

import os

from kata import bpf
from kata.bpf import (
    ADD,
    AND,
    CALL,
    EXIT,
    JUMP,
    JUMP_EQ,
    JUMP_NE,
    LOAD,
    LOAD_BYTE,
    LOAD_HALF,
    MOV,
    MOV_REGISTER,
    STORE,
    STORE_HALF,
)
from kata.network import rtnetlink

TYPE_CHECKING = False
if TYPE_CHECKING:
    from kata.bpf import Line

_SCHED_CLS = 3
_CLONE_REDIRECT, _LOAD_BYTES, _LOOKUP_TCP, _LOOKUP_UDP, _RELEASE = 13, 26, 84, 85, 86
_CURRENT_NAMESPACE = -1
_OK, _GO_ON = 0, -1
_PROTOCOL = 16
"""Offset in struct __sk_buff."""
_ICMP, _TCP, _UDP = 1, 6, 17
_UNREACHABLE = 3

# Offsets in a frame: the IPv4 header (without options) and what follows it; in an ICMP error, the header of the packet
# that it quotes.
_ARP_OPERATION, _IP, _PORTS = 20, 14, 34
# Offsets on the stack, to which these are copied.
_HEADER, _TWO_PORTS, _ERROR, _TUPLE = -32, -8, -80, -48
_QUOTED = _ERROR + 8
_QUOTED_PORTS = _QUOTED + 20


def _half(data: bytes) -> int:
    """The value of a 16-bit load of these bytes on a little-endian machine."""
    return int.from_bytes(data, "little")


_DNS = _half(b"\0\x35")


def _read(offset: int, place: int, length: int) -> list[Line]:
    """Copy bytes of the frame onto the stack; a frame that is too short is redirected."""
    return [
        (MOV_REGISTER, 1, 6, 0, 0),
        (MOV, 2, 0, 0, offset),
        (MOV_REGISTER, 3, 10, 0, 0),
        (ADD, 3, 0, 0, place),
        (MOV, 4, 0, 0, length),
        (CALL, 0, 0, 0, _LOAD_BYTES),
        (JUMP_NE, 0, 0, "on", 0),
    ]


def program(tap: int) -> bytes:
    """Return the BPF program.

    Args:
        tap: Index of the interface to which frames are redirected.
    """
    lookup: list[Line] = [
        (MOV_REGISTER, 1, 6, 0, 0),
        (MOV_REGISTER, 2, 10, 0, 0),
        (ADD, 2, 0, 0, _TUPLE),
        (MOV, 3, 0, 0, 12),
        (MOV, 4, 0, 0, _CURRENT_NAMESPACE),
        (MOV, 5, 0, 0, 0),
    ]
    lines: list[Line] = [
        (MOV_REGISTER, 6, 1, 0, 0),
        (LOAD, 2, 6, _PROTOCOL, 0),
        (JUMP_EQ, 2, 0, "arp", _half(b"\x08\x06")),
        (JUMP_NE, 2, 0, "on", _half(b"\x08\x00")),
        *_read(_IP, _HEADER, 20),
        (LOAD_BYTE, 2, 10, _HEADER, 0),
        (JUMP_NE, 2, 0, "on", 0x45),
        (LOAD_HALF, 2, 10, _HEADER + 6, 0),
        (AND, 2, 0, 0, _half(b"\x1f\xff")),
        (JUMP_NE, 2, 0, "on", 0),  # a later fragment
        (LOAD_BYTE, 8, 10, _HEADER + 9, 0),
        (JUMP_EQ, 8, 0, "error", _ICMP),
        # struct bpf_sock_tuple: from the server to us.
        *_read(_PORTS, _TWO_PORTS, 4),
        (LOAD_HALF, 2, 10, _TWO_PORTS, 0),
        (JUMP_NE, 2, 0, "on", _DNS),
        *((LOAD, 2, 10, _HEADER + 12, 0), (STORE, 10, 2, _TUPLE, 0)),
        *((LOAD, 2, 10, _HEADER + 16, 0), (STORE, 10, 2, _TUPLE + 4, 0)),
        *((LOAD, 2, 10, _TWO_PORTS, 0), (STORE, 10, 2, _TUPLE + 8, 0)),
        "look",
        *((JUMP_EQ, 8, 0, "tcp", _TCP), (JUMP_NE, 8, 0, "on", _UDP)),
        *(*lookup, (CALL, 0, 0, 0, _LOOKUP_UDP), (JUMP, 0, 0, "looked", 0)),
        *("tcp", *lookup, (CALL, 0, 0, 0, _LOOKUP_TCP)),
        "looked",
        (JUMP_EQ, 0, 0, "on", 0),
        (MOV_REGISTER, 1, 0, 0, 0),
        (CALL, 0, 0, 0, _RELEASE),
        (JUMP, 0, 0, "in", 0),
        "error",
        *_read(_PORTS, _ERROR, 32),
        *((LOAD_BYTE, 2, 10, _ERROR, 0), (JUMP_NE, 2, 0, "on", _UNREACHABLE)),
        *((LOAD_BYTE, 2, 10, _QUOTED, 0), (JUMP_NE, 2, 0, "on", 0x45)),
        (LOAD_BYTE, 8, 10, _QUOTED + 9, 0),
        # The quoted packet went from us to the server.
        *((LOAD_HALF, 2, 10, _QUOTED_PORTS + 2, 0), (JUMP_NE, 2, 0, "on", _DNS)),
        *(
            (LOAD, 3, 10, _QUOTED + 16, 0),
            (LOAD, 4, 10, _QUOTED + 12, 0),
            (LOAD_HALF, 5, 10, _QUOTED_PORTS, 0),
        ),
        *((STORE, 10, 3, _TUPLE, 0), (STORE, 10, 4, _TUPLE + 4, 0)),
        *((STORE_HALF, 10, 2, _TUPLE + 8, 0), (STORE_HALF, 10, 5, _TUPLE + 10, 0)),
        (JUMP, 0, 0, "look", 0),
        "arp",
        *_read(_ARP_OPERATION, _TWO_PORTS, 2),
        *((LOAD_HALF, 2, 10, _TWO_PORTS, 0), (JUMP_NE, 2, 0, "on", _half(b"\0\2"))),
        (MOV_REGISTER, 1, 6, 0, 0),
        (MOV, 2, 0, 0, tap),
        (MOV, 3, 0, 0, 0),
        (CALL, 0, 0, 0, _CLONE_REDIRECT),
        "in",
        (MOV, 0, 0, 0, _OK),
        (EXIT, 0, 0, 0, 0),
        "on",
        (MOV, 0, 0, 0, _GO_ON),
        (EXIT, 0, 0, 0, 0),
    ]
    return bpf.assemble(lines)


def let_in(source: int, tap: int) -> None:
    """Install the program in front of the redirection of an interface's traffic. Idempotent; blocks briefly.

    Args:
        source: Index of the interface.
        tap: Index of the interface to which its traffic is redirected.

    Raises:
        OSError: The kernel lacks a feature, or refused.
    """
    loaded = bpf.load(_SCHED_CLS, 0, program(tap), "kata_replies")
    try:
        with rtnetlink.Rtnl() as rtnl:
            rtnl.filter_before_redirection(source, loaded)
    finally:
        os.close(loaded)
