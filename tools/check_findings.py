"""Checks that each script in findings/ can be run and says what it shows (findings/README.md).

Usage: check_findings.py [DIRECTORY]; exits with 1 and a line for each fault.
"""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
HEADER = ("What", "Version", "Source")
"""What the comment at the top of a script has to say, each as ``# Word: text``."""


def faults(path: Path) -> Iterator[str]:
    """What is wrong with one script."""
    if not os.access(path, os.X_OK):
        yield "it has no run bit (chmod +x)"
    lines = path.read_text(errors="replace").splitlines()
    if not lines or not lines[0].startswith("#!"):
        yield "its first line does not say what runs it (#!)"
    head = []
    for line in lines[1:]:
        if not line.startswith("#"):
            break
        head.append(line)
    for word in HEADER:
        if not any(re.match(rf"# {word}: \S", line) for line in head):
            yield f"its header has no line '# {word}: ...'"


def check(directory: Path) -> list[str]:
    """A line for each fault of a script in *directory*; what is in directories below it belongs to one of them."""
    scripts = [
        path for path in sorted(directory.iterdir()) if path.is_file() and path.suffix not in (".md", ".txt")
    ]
    return [f"{path.name}: {fault}" for path in scripts for fault in faults(path)]


def main() -> int:
    """Check the directory that is named, or this checkout's."""
    found = check(Path(sys.argv[1]) if len(sys.argv) > 1 else ROOT / "findings")
    for line in found:
        print(line)
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
