"""BPF programs: the assembler, and that no program of ours jumps out of itself."""

from __future__ import annotations

import pytest

from kata import bpf
from kata.network import egress_filter, sk_lookup
from kata.resources import device_rules

JUMPS = (bpf.JUMP, bpf.JUMP_EQ, bpf.JUMP_NE, bpf.JUMP_SET, bpf.JUMP_EQ32, bpf.JUMP_NE32)


def instructions(code: bytes) -> list[tuple[int, int, int, int, int]]:
    """Code, destination, source, offset, constant of each."""
    assert len(code) % 8 == 0
    return [
        (
            code[at],
            code[at + 1] & 15,
            code[at + 1] >> 4,
            int.from_bytes(code[at + 2 : at + 4], "little", signed=True),
            int.from_bytes(code[at + 4 : at + 8], "little"),
        )
        for at in range(0, len(code), 8)
    ]


def test_an_instruction_is_eight_bytes_and_a_label_none() -> None:
    code = bpf.assemble(
        [
            (bpf.LOAD, 2, 1, 40, 0),
            (bpf.JUMP_EQ32, 2, 0, "end", 0xFFFF0000),
            (bpf.ADD, 2, 0, 0, -4),
            (bpf.STORE, 10, 2, -4, 0),
            "end",
            (bpf.EXIT, 0, 0, 0, 0),
        ]
    )
    assert instructions(code) == [
        (0x61, 2, 1, 40, 0),
        (0x16, 2, 0, 2, 0xFFFF0000),
        (0x07, 2, 0, 0, 0xFFFFFFFC),
        (0x63, 10, 2, -4, 0),
        (0x95, 0, 0, 0, 0),
    ]
    with pytest.raises(KeyError):
        bpf.assemble([(bpf.JUMP, 0, 0, "nowhere", 0)])


@pytest.mark.parametrize(
    "code",
    [
        egress_filter.program4(),
        egress_filter.program4(b"\x7f\0\0\x35"),
        egress_filter.program6(),
        egress_filter.program6(bytes(16)),
        sk_lookup.program(3),
        device_rules.program([]),
        device_rules.program(["c 10:232 rw", "b *:* m", "c 1:* rwm", "c 1:3 r", "c 1:3 w"]),
    ],
)
def test_no_jump_leaves_the_program(code: bytes) -> None:
    lines = instructions(code)
    for index, (number, _, _, offset, _) in enumerate(lines):
        if number in JUMPS:
            assert 0 <= offset < len(lines) - index - 1
    assert lines[-1][0] == bpf.EXIT
