"""Keeps a network helper away from the host's loopback.

A user-mode network helper opens host sockets to addresses that the guest chooses, and runs on the host: its own
checks are all that keeps the guest from services on the host's loopback, and they differ between versions. So the
helper runs in a cgroup whose BPF programs refuse it connections and datagrams to loopback and unspecified
addresses: checked by the host's kernel, at no cost per byte, released with the cgroup. Its one
exception is the host's own resolver, when DNS is forwarded to it.

Source: ``linux/bpf.h`` (struct bpf_sock_addr); the kernel's ``Documentation/bpf/libbpf/program_types.rst``.
"""

from __future__ import annotations

import os

from kata import sysio
from kata.errors import HostError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from kata.journal import Journal

_CGROUP_SOCK_ADDR = 18
_INET4_CONNECT, _INET6_CONNECT, _UDP4_SENDMSG, _UDP6_SENDMSG = 10, 11, 14, 15

# Offsets in struct bpf_sock_addr; addresses and port are in network byte order.
_IP4, _IP6, _PORT = 4, 8, 24

# Instruction codes: loads of 32 bits, and 32-bit comparisons (Linux 5.1) with a constant.
_LOAD = 0x61
_MOV = 0xB7
_AND = 0x57
_JUMP = 0x05
_JUMP_EQ = 0x16
_JUMP_NE = 0x56
_EXIT = 0x95

# One line of a program: (code, register, offset in the context, label to jump to, constant), or a label.
_Line = tuple[int, int, int, str, int] | str


def _load(register: int, offset: int) -> _Line:
    return (_LOAD, register, offset, "", 0)


def _mask(register: int, mask: int) -> _Line:
    return (_AND, register, 0, "", mask)


def _jump(code: int, register: int, value: int, label: str) -> _Line:
    return (code, register, 0, label, value)


def _assemble(lines: list[_Line]) -> bytes:
    """Machine code; falling off the end allows. Register 1 holds the context, as the kernel passes it."""
    labels: dict[str, int] = {}
    code: list[tuple[int, int, int, str, int]] = []
    verdicts: list[_Line] = ["allow", (_MOV, 0, 0, "", 1), (_EXIT, 0, 0, "", 0)]
    verdicts += ["deny", (_MOV, 0, 0, "", 0), (_EXIT, 0, 0, "", 0)]
    for line in [*lines, *verdicts]:
        if isinstance(line, str):
            labels[line] = len(code)
        else:
            code.append(line)
    out = b""
    for index, (number, register, offset, label, value) in enumerate(code):
        source = 1 if number == _LOAD else 0
        distance = labels[label] - index - 1 if label else offset
        out += bytes((number, register | source << 4)) + distance.to_bytes(2, "little", signed=True)
        out += value.to_bytes(4, "little")
    return out


def _word(data: bytes) -> int:
    """What a 32-bit load of these bytes gives on the little-endian machines we run on."""
    return int.from_bytes(data, "little")


_DNS_PORT = _word(b"\x00\x35\x00\x00")


def program4(resolver: bytes = b"") -> bytes:
    """Code for IPv4: 127.0.0.0/8 and 0.0.0.0/8 are refused.

    Args:
        resolver: Four bytes of a loopback address whose port 53 is allowed, or empty.
    """
    lines: list[_Line] = []
    if resolver:
        lines += [
            _load(3, _PORT),
            _mask(3, 0xFFFF),
            _jump(_JUMP_NE, 3, _DNS_PORT, "other"),
            _load(2, _IP4),
            _jump(_JUMP_EQ, 2, _word(resolver), "allow"),
            "other",
        ]
    lines += [_load(2, _IP4), _mask(2, 0xFF), _jump(_JUMP_EQ, 2, 127, "deny"), _jump(_JUMP_EQ, 2, 0, "deny")]
    return _assemble(lines)


def program6(resolver: bytes = b"") -> bytes:
    """Code for IPv6: ::1, ::, and the IPv4-mapped forms of what `program4` refuses.

    Args:
        resolver: The sixteen bytes of ::1 if its port 53 is allowed, or empty.
    """
    lines: list[_Line] = [
        *(_load(2, _IP6), _jump(_JUMP_NE, 2, 0, "allow")),
        *(_load(2, _IP6 + 4), _jump(_JUMP_NE, 2, 0, "allow")),
        *(_load(3, _IP6 + 8), _load(2, _IP6 + 12)),
        _jump(_JUMP_EQ, 3, _word(b"\x00\x00\xff\xff"), "mapped"),
        _jump(_JUMP_NE, 3, 0, "allow"),
        _jump(_JUMP_EQ, 2, 0, "deny"),
        _jump(_JUMP_NE, 2, _word(b"\x00\x00\x00\x01"), "allow"),
    ]
    if resolver:
        lines += [_load(3, _PORT), _mask(3, 0xFFFF), _jump(_JUMP_EQ, 3, _DNS_PORT, "allow")]
    lines += [
        _jump(_JUMP, 0, 0, "deny"),
        "mapped",
        *(_mask(2, 0xFF), _jump(_JUMP_EQ, 2, 127, "deny"), _jump(_JUMP_EQ, 2, 0, "deny")),
    ]
    return _assemble(lines)


def make_cgroup(journal: Journal, name: str, resolver4: bytes = b"", resolver6: bytes = b"") -> str:
    """Make a guarded cgroup beneath our own, in the version 2 hierarchy.

    Args:
        journal: The sandbox's; also of the hierarchy's mount, where the host has none.
        name: Of the cgroup: unique on this host.
        resolver4: As for `program4`.
        resolver6: As for `program6`.

    Returns:
        The cgroup's directory: a process is put into it by writing to its ``cgroup.procs``.

    Raises:
        HostError: This host cannot do that.
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
            sysio.bpf_on_cgroup(path, _CGROUP_SOCK_ADDR, attach_type, code, "kata_egress")
    except OSError as error:
        raise HostError(
            "cannot keep the user network away from this host's loopback services: "
            f"{error.strerror}{f' ({error.filename})' if error.filename else ''}",
            "It needs root and a kernel with cgroup v2 and CONFIG_CGROUP_BPF; or use --network none.",
        ) from error
    return path


def _hierarchy(journal: Journal) -> tuple[str, str]:
    """Where the version 2 hierarchy is mounted (for this sandbox, if nowhere else), and our place in it."""
    mounted = next((m.target for m in sysio.mounts() if m.fstype == "cgroup2" and m.root == "/"), "")
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
