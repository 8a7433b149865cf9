"""Checks the form of commit messages: those after BASE, so that older history passes.

A title has at most 72 characters, begins with a capital letter and ends without a full stop; an empty line follows, and
then a body which says why; what changes documents alone may do without. Merges, and what `git revert` writes, are left
out.

Usage: check_commits.py [BASE]; BASE defaults to KATA_COMMITS_BASE, else to the commit with which this check came. Exits
with 1 and a line for each fault. Where BASE is not in this clone (a shallow one) it says so, and that is no fault.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
TITLE = 72
FIRST_BASE = "43ccf5c4bd32091cd1e5217719c9c607db4e139c"
"""What came before was written without this check."""


def faults(message: str, changed: Sequence[str] = ()) -> Iterator[str]:
    """What is wrong with a commit's message.

    Args:
        message: All of it.
        changed: The files that the commit changes, as far as they are known.
    """
    title, _, rest = message.strip("\n").partition("\n")
    if title.startswith("Revert "):
        return
    if len(title) > TITLE:
        yield f"the title has {len(title)} characters, {TITLE} at most"
    if not title[:1].isupper():
        yield "the title does not begin with a capital letter"
    if title.endswith("."):
        yield "the title ends with a full stop"
    if not rest.strip():
        if changed and all(name.endswith(".md") for name in changed):
            return
        yield "there is no body: say why"
    elif not rest.startswith("\n"):
        yield "no empty line follows the title"


def git(*words: str, directory: Path = ROOT) -> subprocess.CompletedProcess[str]:
    """Run git in a directory."""
    return subprocess.run(["git", "-C", str(directory), *words], capture_output=True, text=True, check=False)


def check(base: str, directory: Path = ROOT) -> tuple[list[str], str]:
    """Look at the commits after *base*.

    Returns:
        A line for each fault, and why nothing could be looked at (else empty).
    """
    if git("rev-parse", "--verify", "--quiet", f"{base}^{{commit}}", directory=directory).returncode:
        return [], f"there is no commit {base} in this clone"
    done = git("log", "--no-merges", "--format=%h%x00%B%x00%x00", f"{base}..HEAD", directory=directory)
    if done.returncode:
        return [done.stderr.strip()], ""
    lines = []
    for commit in filter(None, (part.strip("\n") for part in done.stdout.split("\0\0"))):
        name, _, message = commit.partition("\0")
        title = message.partition("\n")[0]
        changed = git("show", "--format=", "--name-only", name, directory=directory).stdout.splitlines()
        lines += [f"{name} {title[:TITLE]!r}: {fault}" for fault in faults(message, changed)]
    return lines, ""


def main() -> int:
    """Check the commits of this checkout."""
    base = sys.argv[1] if len(sys.argv) > 1 else os.environ.get("KATA_COMMITS_BASE") or FIRST_BASE
    found, reason = check(base)
    if reason:
        print(f"commit messages are not checked: {reason}")
    for line in found:
        print(line)
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
