"""Parses signals as users write them: ``KILL``, ``SIGTERM``, ``9``, ``RTMIN+3``."""

from __future__ import annotations

import _signal  # type: ignore[import-not-found]  # `signal` makes enumerations, for 3 ms of every `kill`

from kata.errors import UsageError

_FIRST_REAL_TIME, _LAST_REAL_TIME = int(_signal.SIGRTMIN), int(_signal.SIGRTMAX)


def name_of(value: int) -> str:
    """A signal's name: ``SIGTERM``."""
    import signal

    return signal.Signals(value).name


def number(text: str) -> int:
    """The signal's number.

    Raises:
        UsageError: There is no such signal.
    """
    name = text.strip().upper().removeprefix("SIG")
    if name.isdigit():
        value = int(name)
        if 1 <= value <= _LAST_REAL_TIME:
            return value
    base, sign, offset = name.partition("+") if "+" in name else name.partition("-")
    if base in ("RTMIN", "RTMAX"):
        value = _FIRST_REAL_TIME if base == "RTMIN" else _LAST_REAL_TIME
        if offset.isdigit():
            value += int(offset) if sign == "+" else -int(offset)
        if _FIRST_REAL_TIME <= value <= _LAST_REAL_TIME:
            return value
    elif name.isalnum() and f"SIG{name}" in vars(_signal):  # SIG_DFL and its like are no signals
        return int(vars(_signal)[f"SIG{name}"])
    import difflib

    known = [one.removeprefix("SIG") for one in vars(_signal) if one[:3] == "SIG" and one[3:].isalnum()]
    near = difflib.get_close_matches(name, known, 1)
    raise UsageError(
        f"unknown signal {text!r}",
        f"did you mean {near[0]}?" if near else "a name such as TERM, or a number; see signal(7)",
    )
