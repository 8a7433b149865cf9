"""Parses signals as users write them: ``KILL``, ``SIGTERM``, ``9``, ``RTMIN+3``."""

from __future__ import annotations

import signal

from kata.errors import UsageError


def name_of(value: int) -> str:
    """A signal's name: ``SIGTERM``."""
    return signal.Signals(value).name


def number(text: str) -> int:
    """The signal's number.

    Raises:
        UsageError: There is no such signal.
    """
    name = text.strip().upper().removeprefix("SIG")
    if name.isdigit():
        value = int(name)
        if 1 <= value <= signal.SIGRTMAX:
            return value
    base, sign, offset = name.partition("+") if "+" in name else name.partition("-")
    if base in ("RTMIN", "RTMAX"):
        value = int(signal.SIGRTMIN if base == "RTMIN" else signal.SIGRTMAX)
        if offset.isdigit():
            value += int(offset) if sign == "+" else -int(offset)
        if signal.SIGRTMIN <= value <= signal.SIGRTMAX:
            return value
    elif f"SIG{name}" in signal.Signals.__members__:
        return int(signal.Signals[f"SIG{name}"])
    import difflib

    known = [member.removeprefix("SIG") for member in signal.Signals.__members__]
    near = difflib.get_close_matches(name, known, 1)
    raise UsageError(
        f"unknown signal {text!r}",
        f"did you mean {near[0]}?" if near else "a name such as TERM, or a number; see signal(7)",
    )
