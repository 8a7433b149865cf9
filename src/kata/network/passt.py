"""Finds out what this host's passt supports."""

from __future__ import annotations

import os
import re

from kata import children, host_cache, paths

_FIRST = 2023_09_27
"""Date of the first passt that completes the handshake of a published port's connection by itself (its commit 9178a9e,
"tcp: Always send an ACK segment once the handshake is completed")."""
_LATER_OPTION = b"--map-host-loopback"
"""An option added in August 2024; identifies newer builds whose version has no date."""
_DATE = re.compile(rb"\b(?:0\.0~git)?(20\d\d)_?(\d\d)_?(\d\d)\b")
_CACHE = "passt"


def waits_for_clients(program: str) -> bool:
    """Whether this passt connects a published port to the guest's server only after the client has sent data.

    With such a passt, protocols in which the server speaks first do not work. The answer is cached until the program
    changes.

    Args:
        program: Absolute path of passt. If it cannot be executed, the answer is True.
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
