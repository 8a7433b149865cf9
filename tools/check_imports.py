"""Checks that imports between the parts of the package point downwards only.

The parts, top to bottom (docs/architecture.md); a part may import those in lower rows, never its own row's
others or a higher one::

    __main__
    agent_ctl
    cli shim
    engine, its client side (engine.launch and the like) included
    hypervisor agent network storage resources images guest
    children config
    ttrpc oci journal crash
    proto
    errors paths launcher host_cache settings sysio

Imports inside functions count, imports under ``if TYPE_CHECKING`` too: a type of a higher part in a
signature is a dependency like any other. Runs on the standard library alone.

Usage: check_imports.py [DIRECTORY OF THE PACKAGE]; exits with 1 and one line for each arrow that points up.
"""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from pathlib import Path

ROWS: tuple[tuple[str, ...], ...] = (
    ("__main__",),
    ("agent_ctl",),
    ("cli", "shim"),
    ("engine",),
    ("hypervisor", "agent", "network", "storage", "resources", "images", "guest"),
    ("children", "config"),
    ("ttrpc", "oci", "journal", "crash"),
    ("proto",),
    ("sysio", "paths", "launcher", "host_cache", "settings", "errors"),
    ("__init__",),
)
"""Parts (sub-packages or modules of ``kata``) by height."""

ALLOWED_SIDEWAYS: frozenset[tuple[str, str]] = frozenset(
    {
        ("sysio", "errors"),
        ("paths", "errors"),
        ("host_cache", "paths"),
        ("settings", "errors"),
        ("host_cache", "sysio"),
        ("images", "storage"),  # an image's layers become root file systems
        ("network", "hypervisor"),  # a network's end is a NIC in the machine's settings
    }
)
"""Arrows within one row that are wanted: (from, to)."""

HEIGHT = {part: len(ROWS) - row for row, parts in enumerate(ROWS) for part in parts}


def imported_modules(tree: ast.AST, module: str, is_package: bool) -> Iterator[tuple[int, str]]:
    """What a module imports.

    Args:
        tree: Its syntax tree.
        module: Its dotted name.
        is_package: Whether it is an ``__init__``, which relative imports start from differently.

    Yields:
        Line number and absolute dotted name; for ``from a import b`` it is ``a.b``: b may be a module.
    """
    package = module.split(".") if is_package else module.split(".")[:-1]
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield node.lineno, alias.name
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            origin = ".".join([*base, *([node.module] if node.module else [])])
            for alias in node.names:
                yield node.lineno, f"{origin}.{alias.name}"


def part_of(module: str, present: set[str]) -> str | None:
    """The part of the package that a dotted name belongs to; None when it is not ours.

    Args:
        module: A dotted name, possibly with an attribute as its last word.
        present: The modules and sub-packages that there are.
    """
    names = module.split(".")
    if names[0] != "kata":
        return None
    if len(names) == 1 or names[1] not in present:
        return "__init__"  # `from kata import __version__`
    topic = names[1].split("_")[0]  # journal_undo belongs to journal
    return topic if names[1] not in HEIGHT and topic in HEIGHT else names[1]


def violations(source: Path) -> Iterator[str]:
    """Every import below *source* (the directory ``kata``) that does not point down, as one line each."""
    present = {path.stem for path in source.iterdir()}
    for path in sorted(source.rglob("*.py")):
        relative = path.relative_to(source.parent).with_suffix("")
        is_package = relative.name == "__init__"
        module = ".".join(relative.parts[:-1] if is_package else relative.parts)
        here = part_of(module, present) or ""
        if here not in HEIGHT:
            yield f"{path}: part '{here}' has no row in tools/check_imports.py; give it one"
            continue
        for line, name in imported_modules(ast.parse(path.read_text(), str(path)), module, is_package):
            there = part_of(name, present)
            if there is None or there == here or (here, there) in ALLOWED_SIDEWAYS:
                continue
            if there not in HEIGHT:
                yield f"{path}:{line}: imports '{name}', whose part has no row in tools/check_imports.py"
            elif HEIGHT[there] >= HEIGHT[here]:
                yield f"{path}:{line}: '{here}' imports '{name}', which is not below it"


def main() -> int:
    """Check the package named on the command line, or this checkout's."""
    default = Path(__file__).resolve().parent.parent / "src" / "kata"
    found = list(violations(Path(sys.argv[1]).resolve() if len(sys.argv) > 1 else default))
    for line in found:
        print(line)
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
