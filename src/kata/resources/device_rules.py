"""Device rules for a cgroup of version 2, which has no devices controller: a BPF program says yes or no.

The rules are written as version 1's controller takes them (``c 10:232 rw``), and only allow: what no rule allows is
refused. A descriptor that was open before a process came into the cgroup stays usable, as there.

Source: ``linux/bpf.h`` (struct bpf_cgroup_dev_ctx); the kernel's ``Documentation/admin-guide/cgroup-v2.rst``, "Device
controller", and ``cgroup-v1/devices.rst``; Linux 4.15.
"""

from __future__ import annotations

from kata import sysio
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

# Offsets in struct bpf_cgroup_dev_ctx: the kind in the lower half of the first, what is asked for in the upper.
_ASKED, _MAJOR, _MINOR = 0, 4, 8

# What registers hold: 0 the answer, 1 the context, then these.
_KIND_IN, _ASKED_IN, _MAJOR_IN, _MINOR_IN = 2, 3, 4, 5


def _parse(rule: str) -> tuple[tuple[int, str, str], int]:
    """A rule's devices, and what it allows."""
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
    """The machine code that allows what *rules* do, and nothing else.

    Args:
        rules: ``KIND MAJOR:MINOR ACCESS``; a number may be ``*``. What several rules say of the same devices is added
            up; of different rules each has to allow on its own all that is asked for at once.

    Raises:
        ValueError: A rule is none.
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
    """Hold the processes of a cgroup, and of those below it, to *rules*, in addition to whatever holds them already.

    Args:
        directory: Of the cgroup; the rules go with it.
        rules: As of `program`.

    Raises:
        OSError: Not permitted, or the kernel has no CONFIG_CGROUP_BPF.
    """
    sysio.bpf_on_cgroup(directory, _PROGRAM_TYPE, _ATTACH_TYPE, program(rules), "kata_devices")
