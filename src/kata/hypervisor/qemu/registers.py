"""What of a machine's registers tells why its guest does not answer, from the text of QEMU's monitor.

QMP has no structured form of them (qapi/machine.json, ``human-monitor-command``). The text is that of
``info registers -a`` (target/i386/cpu-dump.c) and of ``info lapic``, for the first processor.
"""

from __future__ import annotations

import re

_WHICH = re.compile(r"^CPU#(\d+)", re.MULTILINE)
_NUMBERS = ("RIP", "EIP", "RFL", "EFL", "CPL", "HLT")
_LAPIC = ("LVTT", "Timer", "ISR", "IRR")
_LONGEST = 160


def lines(registers: str, lapic: str) -> list[str]:
    """A line for each processor, and what the first one's interrupt controller waits for.

    Args:
        registers: What ``info registers -a`` said; without ``CPU#N`` lines it is of one processor.
        lapic: What ``info lapic`` said.

    Returns:
        ``"0: RIP=ffffffff81a0b0cb RFL=00000246 CPL=0 HLT=1"`` and so on; empty if nothing is known in the text.
    """
    parts = _WHICH.split(registers)
    # Text before the first heading, and then number and text in turn.
    texts = list(zip(parts[1::2], parts[2::2], strict=True)) or [("0", registers)]
    found = []
    for number, text in texts:
        values = [match[0] for name in _NUMBERS if (match := re.search(rf"\b{name}=[0-9a-f]+", text))]
        if values:
            found.append(f"{number}: {' '.join(values)}")
    for line in lapic.splitlines():
        words = " ".join(line.split())
        if words.startswith(_LAPIC):
            found.append(words[:_LONGEST])
    return found
