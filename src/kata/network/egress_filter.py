"""Keeps a network helper away from the host's loopback.

A user-mode network helper runs on the host and opens sockets to addresses that the guest chooses. Only its own checks,
which differ between versions, would keep the guest from services on the host's loopback. So the helper runs in a cgroup
with BPF programs that refuse connections and datagrams to loopback and unspecified addresses. The host's kernel
enforces this, at no cost per byte, and the programs disappear with the cgroup. The only exception is the host's own
resolver, when DNS is forwarded to it.

Source: ``linux/bpf.h`` (struct bpf_sock_addr); the kernel's ``Documentation/bpf/libbpf/program_types.rst``.
"""

from __future__ import annotations

import os

from kata import bpf, mount_table
from kata.bpf import AND, EXIT, JUMP, JUMP_EQ32, JUMP_NE32, LOAD, MOV, assemble
from kata.errors import HostError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from kata.bpf import Line
    from kata.journal import Journal

_CGROUP_SOCK_ADDR = 18
_INET4_CONNECT, _INET6_CONNECT, _UDP4_SENDMSG, _UDP6_SENDMSG = 10, 11, 14, 15

# Offsets in struct bpf_sock_addr; addresses and port are in network byte order.
_IP4, _IP6, _PORT = 4, 8, 24


def _load(register: int, offset: int) -> Line:
    return (LOAD, register, 1, offset, 0)


def _mask(register: int, mask: int) -> Line:
    return (AND, register, 0, 0, mask)


def _jump(code: int, register: int, value: int, label: str) -> Line:
    return (code, register, 0, label, value)


_VERDICTS: list[Line] = [
    *("allow", (MOV, 0, 0, 0, 1), (EXIT, 0, 0, 0, 0)),
    *("deny", (MOV, 0, 0, 0, 0), (EXIT, 0, 0, 0, 0)),
]
"""The end of each program; reaching it allows the connection. Register 1 holds the context, as the kernel passes it."""


def _word(data: bytes) -> int:
    """The value of a 32-bit load of these bytes on a little-endian machine."""
    return int.from_bytes(data, "little")


_DNS_PORT = _word(b"\x00\x35\x00\x00")


def program4(resolver: bytes = b"") -> bytes:
    """Return the BPF program for IPv4: 127.0.0.0/8 and 0.0.0.0/8 are refused.

    Args:
        resolver: Four bytes of a loopback address whose port 53 is allowed, or empty.
    """
    lines: list[Line] = []
    if resolver:
        lines += [
            _load(3, _PORT),
            _mask(3, 0xFFFF),
            _jump(JUMP_NE32, 3, _DNS_PORT, "other"),
            _load(2, _IP4),
            _jump(JUMP_EQ32, 2, _word(resolver), "allow"),
            "other",
        ]
    lines += [
        _load(2, _IP4),
        _mask(2, 0xFF),
        _jump(JUMP_EQ32, 2, 127, "deny"),
        _jump(JUMP_EQ32, 2, 0, "deny"),
    ]
    return assemble([*lines, *_VERDICTS])


def program6(resolver: bytes = b"") -> bytes:
    """Return the BPF program for IPv6: ::1, :: and the IPv4-mapped forms of what `program4` refuses are refused.

    Args:
        resolver: The sixteen bytes of ::1 if its port 53 is allowed, or empty.
    """
    lines: list[Line] = [
        *(_load(2, _IP6), _jump(JUMP_NE32, 2, 0, "allow")),
        *(_load(2, _IP6 + 4), _jump(JUMP_NE32, 2, 0, "allow")),
        *(_load(3, _IP6 + 8), _load(2, _IP6 + 12)),
        _jump(JUMP_EQ32, 3, _word(b"\x00\x00\xff\xff"), "mapped"),
        _jump(JUMP_NE32, 3, 0, "allow"),
        _jump(JUMP_EQ32, 2, 0, "deny"),
        _jump(JUMP_NE32, 2, _word(b"\x00\x00\x00\x01"), "allow"),
    ]
    if resolver:
        lines += [_load(3, _PORT), _mask(3, 0xFFFF), _jump(JUMP_EQ32, 3, _DNS_PORT, "allow")]
    lines += [
        _jump(JUMP, 0, 0, "deny"),
        "mapped",
        *(_mask(2, 0xFF), _jump(JUMP_EQ32, 2, 127, "deny"), _jump(JUMP_EQ32, 2, 0, "deny")),
    ]
    return assemble([*lines, *_VERDICTS])


def make_cgroup(journal: Journal, name: str, resolver4: bytes = b"", resolver6: bytes = b"") -> str:
    """Make a cgroup with the filter below our own cgroup, in the version 2 hierarchy.

    Args:
        journal: The sandbox's journal; also records a mount of the hierarchy, if the host has none.
        name: Name of the cgroup, unique on this host.
        resolver4: See `program4`.
        resolver6: See `program6`.

    Returns:
        The cgroup's directory. A process is moved into it by writing to its ``cgroup.procs``.

    Raises:
        HostError: This host does not support it.
    """
    try:
        mounted, own = _hierarchy(journal)
        inside = f"{own}/{name}"
        path = mounted + inside
        entry = journal.begin("cgroup", path=path, inside=inside)
        try:
            os.mkdir(path, 0o755)
        except OSError:
            journal.mark_gone(entry)
            raise
        journal.commit(entry)
        code4, code6 = program4(resolver4), program6(resolver6)
        for attach_type, code in (
            (_INET4_CONNECT, code4),
            (_UDP4_SENDMSG, code4),
            (_INET6_CONNECT, code6),
            (_UDP6_SENDMSG, code6),
        ):
            bpf.on_cgroup(path, _CGROUP_SOCK_ADDR, attach_type, code, "kata_egress")
    except OSError as error:
        raise HostError(
            "cannot keep the user network away from this host's loopback services: "
            f"{error.strerror}{f' ({error.filename})' if error.filename else ''}",
            "It needs root and a kernel with cgroup v2 and CONFIG_CGROUP_BPF; or use --network none.",
        ) from error
    return path


def _hierarchy(journal: Journal) -> tuple[str, str]:
    """Return where the version 2 hierarchy is mounted and our place in it. If the host has not mounted it, it is
    mounted for this sandbox."""
    mounted = next((m.target for m in mount_table.mounts() if m.fstype == "cgroup2" and m.root == "/"), "")
    if not mounted:
        mounted = os.path.join(os.path.dirname(journal.path), "cgroup2")
        journal.make_directory(mounted)
        journal.make_mount("cgroup2", mounted, "cgroup2")
    with open("/proc/self/cgroup", encoding="utf-8") as lines:
        own = next((line.rstrip("\n")[3:] for line in lines if line.startswith("0::")), "/")
    own = own.rstrip("/")
    # A cgroup that hands controllers down may not hold processes, but any may have children that do not
    # take part in that. Where ours is not to be seen (another cgroup namespace; its unit was stopped while
    # we run), the top will do.
    return (mounted, own) if "/../" not in own + "/" and os.path.isdir(mounted + own) else (mounted, "")
