"""Hostile input to everything that reads some: archives, registries, agents, command lines.

Damage is chosen by a seed, so an input can be made again: --seed and --only with its part. No virtual machine is
started. Nothing may end in a traceback, by a signal, without a word, after more than half a minute or with more than
400 MB; the figures of each part are printed at the end.
"""

from __future__ import annotations

import argparse
import os
import shutil
import sys
import tempfile
import time
from pathlib import Path

import agents
import archives
import child
import commands
import registries

_PARTS = {
    "archives": (archives.sweep, 3000),
    "registries": (registries.sweep, 1500),
    "agents": (agents.sweep, 4000),
    "commands": (commands.sweep, 3000),
}


def main() -> int:
    """Run the parts.

    Returns:
        1 when something has failed.
    """
    parser = argparse.ArgumentParser(prog="tools/hostile", description=__doc__)
    parser.add_argument("--short", action="store_true", help="a fifteenth of the inputs")
    parser.add_argument("--seed", type=int, default=1, help="another choice of damage (1)")
    parser.add_argument("--only", choices=(*_PARTS, "programs"), help="one part alone")
    options = parser.parse_args()
    directory = Path(tempfile.mkdtemp(prefix="kh-", dir="/tmp"))
    for name in ("KATA_STATE_DIR", "KATA_RUN_DIR", "KATA_GUEST_DIR", "DOCKER_CONFIG"):
        os.environ[name] = str(directory / name.lower())
    # A name that looks like an image's is not looked up anywhere.
    os.environ.update(
        HTTPS_PROXY="http://127.0.0.1:1", HTTP_PROXY="http://127.0.0.1:1", NO_PROXY="127.0.0.1"
    )
    inputs = directory / "inputs"
    inputs.mkdir()
    tallies: list[child.Tally] = []
    started = time.monotonic()
    try:
        for title, (sweep, count) in _PARTS.items():
            if options.only in (None, title):
                tallies.append(sweep(inputs, count // 15 if options.short else count, options.seed))
        if options.only in (None, "programs"):
            tallies.append(commands.programs(inputs, options.seed))
        left = [str(path) for place in ("sandboxes", "containers") for path in directory.rglob(f"{place}/*")]
    finally:
        shutil.rmtree(directory, ignore_errors=True)
    for tally in tallies:
        print(tally.line())
    for path in left:
        print(f"left behind: {path}")
    failed = sum(len(tally.failures) for tally in tallies) + len(left)
    passed = sum(tally.count for tally in tallies) - failed
    print(f"hostile: {passed} passed, {failed} failed in {time.monotonic() - started:.0f} s")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
