#!/usr/bin/python3
"""The notes of a release: the part of CHANGELOG.md that is about this version.

A release is a tag whose text they are (docs/packages.md). Usage: release_notes.py [--check]

``--check`` says what keeps this commit from being a release, and exits with 1 then: the version's heading has no date,
the crates have other versions, something is not committed, or the tag exists.
"""

from __future__ import annotations

import re
import subprocess
import sys
import tomllib
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
CHANGELOG = ROOT / "CHANGELOG.md"
CRATES = ("agent", "inspector")


def version() -> str:
    """This version, from the one place that has it."""
    source = (ROOT / "src/kata/__init__.py").read_text()
    return str(re.findall(r'^__version__ = "([^"]+)"$', source, flags=re.M)[0])


def part(changelog: str, release: str) -> tuple[str, str]:
    """What a changelog says of a version: (what stands behind it in its heading, the text below that).

    Raises:
        LookupError: Nothing.
    """
    found = re.search(
        rf"^## {re.escape(release)} \(([^)\n]*)\)\n(.*?)(?=^## |\Z)", changelog, flags=re.M | re.S
    )
    if found is None:
        raise LookupError(f"CHANGELOG.md has no heading '## {release} (...)'")
    return found[1], found[2].strip()


def notes(changelog: str, release: str) -> str:
    """The notes of a version. Links into the documents become their texts: a tag has no documents beside it."""
    when, text = part(changelog, release)
    plain = re.sub(r"\[([^\]]*)\]\((?![a-z]+://)[^)]*\)", r"\1", text)
    return f"kata {release} ({when})\n\n{plain}\n"


def crate_versions() -> dict[str, str]:
    """The versions of what is written in Rust, by crate."""
    return {
        crate: str(tomllib.loads((ROOT / crate / "Cargo.toml").read_text())["package"]["version"])
        for crate in CRATES
    }


def obstacles() -> list[str]:
    """What keeps this commit from being a release, a sentence each."""
    found = []
    release = version()
    try:
        when, text = part(CHANGELOG.read_text(), release)
        if not re.fullmatch(r"\d{4}-\d{2}-\d{2}", when):
            found.append(f"the CHANGELOG's heading of {release} has no date, but '{when}'")
        if not text:
            found.append(f"the CHANGELOG says nothing of {release}")
    except LookupError as error:
        found.append(str(error))
    found += [
        f"{crate}/Cargo.toml has version {other}, not {release}"
        for crate, other in crate_versions().items()
        if other != release
    ]
    if _git("status", "--porcelain"):
        found.append("something is not committed")
    if _git("tag", "--list", f"v{release}"):
        found.append(f"the tag v{release} exists")
    return found


def _git(*arguments: str) -> str:
    done = subprocess.run(["git", "-C", str(ROOT), *arguments], capture_output=True, text=True, check=True)
    return done.stdout.strip()


def main() -> int:
    """Print the notes, or say what is in the way."""
    if sys.argv[1:] not in ([], ["--check"]):
        print(__doc__, file=sys.stderr)
        return 2
    try:
        if not sys.argv[1:]:
            print(notes(CHANGELOG.read_text(), version()), end="")
            return 0
        found = obstacles()
    except (LookupError, OSError, subprocess.CalledProcessError) as error:
        found = [str(error)]
    for line in found:
        print(f"error: {line}", file=sys.stderr)
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
