#!/usr/bin/env python3
"""Checks the dependencies of the agent, or of the inspector: which crates, from where, under which licence.

``agent/Cargo.lock`` names everything that is built in. Each crate must be on the list below with the reason why it is
worth having, come from crates.io with a checksum, and declare one of the allowed licences in its own manifest, which
cargo has in its registry (without network: what was built is there). Runs on the standard library alone.

Usage: check_crates.py [CARGO.LOCK]; exits with 1 and one line for each complaint.
"""

from __future__ import annotations

import os
import re
import sys
import tomllib
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
LOCK = ROOT / "agent/Cargo.lock"
OURS = ("kata-agent", "kata-inspector")
CRATES_IO = "registry+https://github.com/rust-lang/crates.io-index"

ALLOWED = {
    "libc": "constants and structures of the kernel's interface; none of its code is linked into the agent",
    "miniz_oxide": "the inspector unpacks gzip with it: safe Rust, since what it unpacks is hostile",
    "adler2": "the checksum in miniz_oxide",
    "ruzstd": "the inspector unpacks zstd with it: safe Rust likewise",
}
"""Crate -> what it is good for."""
LICENCES = {
    "Apache-2.0",
    "MIT",
    "BSD-2-Clause",
    "BSD-3-Clause",
    "ISC",
    "Unicode-3.0",
    "Zlib",
    "0BSD",
    "CC0-1.0",
}
"""SPDX identifiers that go with Apache-2.0."""


def acceptable(expression: str) -> bool:
    """Whether an SPDX expression can be met with allowed licences alone (OR: one of them, AND: all of them)."""
    text = re.sub(r"\s+WITH\s+LLVM-exception", "", expression.replace("/", " OR "))
    if "(" in text:
        inner = re.sub(r"\(([^()]*)\)", lambda found: "MIT" if acceptable(found[1]) else "refused", text)
        return "(" not in inner and acceptable(inner)
    return any(
        all(part.strip() in LICENCES for part in re.split(r"\s+AND\s+", choice))
        for choice in re.split(r"\s+OR\s+", text.strip())
    )


def licence_of(name: str, version: str) -> str | None:
    """What the manifest of a crate in cargo's registry declares; None when it is not there."""
    home = Path(os.environ.get("CARGO_HOME") or Path.home() / ".cargo")
    for manifest in sorted(home.glob(f"registry/src/*/{name}-{version}/Cargo.toml")):
        return str(tomllib.loads(manifest.read_text())["package"].get("license", ""))
    return None


def complaints(lock: Path) -> list[str]:
    """What is wrong with the dependencies in *lock*."""
    found = []
    for package in tomllib.loads(lock.read_text())["package"]:
        name, version = package["name"], package["version"]
        if name in OURS:
            continue
        if name not in ALLOWED:
            found.append(
                f"{name} {version}: not on the list in tools/check_crates.py; is it worth its place?"
            )
        if package.get("source") != CRATES_IO or not package.get("checksum"):
            found.append(f"{name} {version}: does not come from crates.io with a checksum")
            continue
        licence = licence_of(name, version)
        if licence is None:
            found.append(
                f"{name} {version}: its source is not in cargo's registry (cargo fetch --locked in agent/)"
            )
        elif not acceptable(licence):
            found.append(f"{name} {version}: licence {licence!r} is not allowed")
    return found


def main() -> int:
    """Check, print, tell."""
    found = complaints(Path(sys.argv[1]) if len(sys.argv) > 1 else LOCK)
    for complaint in found:
        print(complaint)
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
