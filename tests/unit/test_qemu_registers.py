"""What the report of a silent guest says of its processors, from the text of QEMU's monitor."""

from __future__ import annotations

import asyncio

import pytest

from kata.engine.lifecycle import guest_setup
from kata.errors import AgentError, AgentTimeoutError, HypervisorError, KataError
from kata.hypervisor.qemu import registers

TWO = """
CPU#0
RAX=0000000000000000 RBX=ffffffff82011940
RIP=ffffffff81a0b0cb RFL=00000246 [---Z-P-] CPL=0 II=0 A20=1 SMM=0 HLT=1
CPU#1
RIP=0000000000401000 RFL=00000202 [-------] CPL=3 II=0 A20=1 SMM=0 HLT=0
"""
LAPIC = """dumping local APIC state for CPU 0

LVT0\t 0x00010700 active-hi edge  masked
LVTT\t 0x000400ec active-hi edge  tsc-deadline Fixed  (vec 236)
Timer\t DCR=0x0 (divide by 2) initial_count = 0 current_count = 0
ISR\t (none)
IRR\t 35 236
"""


def test_each_processor_has_a_line() -> None:
    assert registers.lines(TWO, LAPIC) == [
        "0: RIP=ffffffff81a0b0cb RFL=00000246 CPL=0 HLT=1",
        "1: RIP=0000000000401000 RFL=00000202 CPL=3 HLT=0",
        "LVTT 0x000400ec active-hi edge tsc-deadline Fixed (vec 236)",
        "Timer DCR=0x0 (divide by 2) initial_count = 0 current_count = 0",
        "ISR (none)",
        "IRR 35 236",
    ]


def test_without_a_heading_it_is_the_only_processor() -> None:
    assert registers.lines("EIP=0000fff0 EFL=00000002 [-------] CPL=0 HLT=0", "") == [
        "0: EIP=0000fff0 EFL=00000002 CPL=0 HLT=0"
    ]
    assert registers.lines("", "") == []
    assert registers.lines("unknown command", "unknown command") == []


class _Runtime:
    vm_runs = True

    def __init__(self, said: list[str] | KataError | None) -> None:
        self.said = said
        self.vm = self

    async def processors(self) -> list[str]:
        if self.said is None:
            await asyncio.sleep(60)
        if isinstance(self.said, KataError):
            raise self.said
        return self.said or []


@pytest.mark.parametrize(
    ("said", "error", "expected"),
    [
        (["0: HLT=1"], AgentTimeoutError("silent"), ["0: HLT=1"]),
        (["0: HLT=1"], AgentError("it said no"), []),
        (HypervisorError("gone"), AgentTimeoutError("silent"), []),
        (None, AgentTimeoutError("silent"), []),
    ],
    ids=["told", "the agent answered", "the monitor is gone", "the monitor hangs"],
)
def test_a_monitor_that_cannot_tell_holds_nothing_up(
    said: list[str] | KataError | None,
    error: KataError,
    expected: list[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(guest_setup, "PROCESSORS_S", 0.05)
    assert asyncio.run(guest_setup._processors(_Runtime(said), error)) == expected  # type: ignore[arg-type]
