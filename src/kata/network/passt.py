"""What this host's passt can do."""

from __future__ import annotations

import os
import re

from kata import children, host_cache, paths

_FIRST = 2023_09_27
"""From this day on passt completes the handshake of a published port's connection by itself (its commit 9178a9e, "tcp:
Always send an ACK segment once the handshake is completed")."""
_LATER_OPTION = b"--map-host-loopback"
"""Of August 2024; for builds whose version names no day."""
_DATE = re.compile(rb"\b(?:0\.0~git)?(20\d\d)_?(\d\d)_?(\d\d)\b")
_CACHE = "passt"


def waits_for_clients(program: str) -> bool:
    """Whether a published port's connection reaches the guest's server only when the client has said something.

    Then nobody reaches a server that speaks first. The answer is kept for as long as the program does not change.

    Args:
        program: passt's absolute path. Of one that cannot be executed it is the cautious answer.
    """
    try:
        key = host_cache.program_key(program)
        cache = os.path.join(paths.run_dir(), _CACHE)
        known = host_cache.read(cache, key)
        if not known:
            known = ["waits" if _waits(program) else "goes on"]
            host_cache.write(cache, key, *known)
    except OSError:
        return True
    return known[0] == "waits"


def _waits(program: str) -> bool:
    found = _DATE.search(children.output_of([program, "--version"]))
    if found is not None:
        return int(b"".join(found.groups())) < _FIRST
    return _LATER_OPTION not in children.output_of([program, "--help"])
