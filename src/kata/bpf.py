"""BPF programs: written down line by line, assembled, and given to the kernel.

Sources: the kernel's ``Documentation/bpf/standardization/instruction-set.rst``; bpf(2) and ``linux/bpf.h``.
"""

from __future__ import annotations

import os

from kata import sysio

Line = tuple[int, int, int, int | str, int] | str
"""Code, destination register, source register, offset or label, constant; or a label by itself."""

LOAD, LOAD_HALF, LOAD_BYTE = 0x61, 0x69, 0x71
STORE, STORE_HALF, STORE_VALUE = 0x63, 0x6B, 0x62
LOAD_MAP = 0x18
MOV, MOV_REGISTER, ADD, AND = 0xB7, 0xBF, 0x07, 0x57
SHIFT_RIGHT = 0x77
JUMP, JUMP_EQ, JUMP_NE, JUMP_SET = 0x05, 0x15, 0x55, 0x45
JUMP_EQ32, JUMP_NE32 = 0x16, 0x56
"""These compare 32 bits (Linux 5.1); the others extend the constant's sign to 64."""
CALL, EXIT = 0x85, 0x95


def assemble(lines: list[Line]) -> bytes:
    """Machine code.

    Args:
        lines: Instructions and labels, in order. A label that an instruction jumps to stands after it.
    """
    labels: dict[str, int] = {}
    code: list[tuple[int, int, int, int | str, int]] = []
    for line in lines:
        if isinstance(line, str):
            labels[line] = len(code)
        else:
            code.append(line)
    out = b""
    for index, (number, target, source, where, value) in enumerate(code):
        offset = labels[where] - index - 1 if isinstance(where, str) else where
        out += bytes((number, target | source << 4)) + offset.to_bytes(2, "little", signed=True)
        out += value.to_bytes(4, "little", signed=value < 0)
    return out


def call(command: int, attributes: bytes) -> int:
    """bpf(2) with the command's packed `union bpf_attr`. Returns what the command returns."""
    import ctypes

    number = sysio.number_of("bpf(2)", {"x86_64": 321, "aarch64": 280})
    buffer = ctypes.create_string_buffer(attributes, len(attributes))
    return sysio.syscall(number, command, buffer, ctypes.c_uint(len(attributes)))


def load(kind: int, attach_type: int, code: bytes, name: str) -> int:
    """Load a BPF program (BPF_PROG_LOAD, see ``linux/bpf.h``).

    Args:
        kind: BPF_PROG_TYPE_*.
        attach_type: BPF_* attach type for which the program is verified.
        code: Its instructions, eight bytes each.
        name: At most 15 characters.

    Returns:
        The program's descriptor.
    """
    import ctypes

    instructions = ctypes.create_string_buffer(code, len(code))
    licence = ctypes.create_string_buffer(b"Apache-2.0")
    fields = (
        kind.to_bytes(4, "little")
        + (len(code) // 8).to_bytes(4, "little")
        + ctypes.addressof(instructions).to_bytes(8, "little")
        + ctypes.addressof(licence).to_bytes(8, "little")
        + bytes(24)  # no log, no version, no flags
        + name.encode()[:15].ljust(16, b"\0")
        + bytes(4)
        + attach_type.to_bytes(4, "little")
    )
    fd = call(5, fields)
    os.set_inheritable(fd, False)
    return fd


def on_cgroup(directory: str, kind: int, attach_type: int, code: bytes, name: str) -> None:
    """Load a program and attach it to a cgroup (BPF_PROG_ATTACH).

    It replaces one that was attached there in the same way, and is released with the cgroup.

    Args:
        directory: Directory of the cgroup.
        kind: BPF_PROG_TYPE_*.
        attach_type: BPF_* attach type.
        code: Its instructions, eight bytes each.
        name: At most 15 characters.
    """
    program = load(kind, attach_type, code, name)
    try:
        cgroup = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            values = (cgroup, program, attach_type, 0)
            call(8, b"".join(value.to_bytes(4, "little") for value in values))
        finally:
            os.close(cgroup)
    finally:
        os.close(program)
