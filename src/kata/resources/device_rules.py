"""Device rules for a cgroup of version 2, which has no devices controller: a BPF program allows or refuses access.

Rules are written as for version 1's controller (``c 10:232 rw``). They only allow: access that no rule allows is
refused. As with version 1, a descriptor that a process had opened before it entered the cgroup stays usable.

Source: ``linux/bpf.h`` (struct bpf_cgroup_dev_ctx); the kernel's ``Documentation/admin-guide/cgroup-v2.rst``, "Device
controller", and ``cgroup-v1/devices.rst``; Linux 4.15.
"""

from __future__ import annotations

from kata import bpf
from kata.bpf import AND, EXIT, JUMP_NE, JUMP_SET, LOAD, MOV, MOV_REGISTER, SHIFT_RIGHT, assemble

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterable

    from kata.bpf import Line

_PROGRAM_TYPE = 15
_ATTACH_TYPE = 6
_KINDS = {"b": 1, "c": 2}
_ACCESS = {"m": 1, "r": 2, "w": 4}
_ALL = 7

# Offsets in struct bpf_cgroup_dev_ctx. The first field has the device type in its lower half, the access in its upper.
_ASKED, _MAJOR, _MINOR = 0, 4, 8

# Registers: 0 holds the answer, 1 the context, then these.
_KIND_IN, _ASKED_IN, _MAJOR_IN, _MINOR_IN = 2, 3, 4, 5


def _parse(rule: str) -> tuple[tuple[int, str, str], int]:
    """Parse a rule: its devices (type, major, minor) and the access that it allows."""
    try:
        kind, numbers, access = rule.split()
        major, minor = numbers.split(":")
        for number in (major, minor):
            if number != "*":
                int(number)
        permissions = 0
        for letter in access:
            permissions |= _ACCESS[letter]
        return (_KINDS[kind], major, minor), permissions
    except (KeyError, ValueError):
        raise ValueError(f"{rule!r} is no device rule") from None


def program(rules: Iterable[str]) -> bytes:
    """Return the BPF program that allows what *rules* allow, and nothing else.

    Args:
        rules: ``TYPE MAJOR:MINOR ACCESS``; a number may be ``*``. The accesses of rules with the same devices are
            combined. Of rules with different devices, one alone has to allow all that a call requests at once.

    Raises:
        ValueError: A rule is malformed.
    """
    allowed: dict[tuple[int, str, str], int] = {}
    for rule in rules:
        key, permissions = _parse(rule)
        allowed[key] = allowed.get(key, 0) | permissions
    lines: list[Line] = [
        (LOAD, _KIND_IN, 1, _ASKED, 0),
        (MOV_REGISTER, _ASKED_IN, _KIND_IN, 0, 0),
        (SHIFT_RIGHT, _ASKED_IN, 0, 0, 16),
        (AND, _KIND_IN, 0, 0, 0xFFFF),
        (LOAD, _MAJOR_IN, 1, _MAJOR, 0),
        (LOAD, _MINOR_IN, 1, _MINOR, 0),
    ]
    for index, ((number, major, minor), permissions) in enumerate(allowed.items()):
        following = f"after {index}"
        lines.append((JUMP_NE, _KIND_IN, 0, following, number))
        if major != "*":
            lines.append((JUMP_NE, _MAJOR_IN, 0, following, int(major)))
        if minor != "*":
            lines.append((JUMP_NE, _MINOR_IN, 0, following, int(minor)))
        if permissions != _ALL:
            lines.append((JUMP_SET, _ASKED_IN, 0, following, _ALL & ~permissions))
        lines += [(MOV, 0, 0, 0, 1), (EXIT, 0, 0, 0, 0), following]
    return assemble([*lines, (MOV, 0, 0, 0, 0), (EXIT, 0, 0, 0, 0)])


def attach(directory: str, rules: Iterable[str]) -> None:
    """Apply *rules* to the processes of a cgroup and of those below it, in addition to rules that apply already.

    Args:
        directory: Directory of the cgroup. The rules disappear with it.
        rules: See `program`.

    Raises:
        OSError: Not permitted, or the kernel has no CONFIG_CGROUP_BPF.
    """
    bpf.on_cgroup(directory, _PROGRAM_TYPE, _ATTACH_TYPE, program(rules), "kata_devices")
