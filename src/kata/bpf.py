"""BPF programs written down line by line, and assembled: `kata.sysio` loads them.

Source: the kernel's ``Documentation/bpf/standardization/instruction-set.rst``.
"""

from __future__ import annotations

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
