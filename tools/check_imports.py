"""Checks that imports between the parts of the package point downwards only, and that no modules import in a circle.

The parts, top to bottom (docs/architecture.md); a part may import those in lower rows, never its own row's
others or a higher one::

    __main__
    monitor log_parser
    agent_ctl oci_runtime
    cli shim
    engine, its client side (engine.launch and the like) included
    hypervisor agent network storage resources images guest
    trace_export rootless
    children config management
    ttrpc oci journal crash metrics confinement
    proto own_ids own_namespace given_paths seccomp
    acl bpf deferred errors events inotify paths pci_driver launcher host_cache mount_table settings sysio suppress
    json_text tracing

Within a part modules may import one another, but never in a circle, be it by way of types alone: whoever reads one of
them would have to read them all. `KNOTS` lists the arrows that still close circles; one that no longer does has to be
taken off the list.

Imports inside functions count, imports under ``if TYPE_CHECKING`` too: a type of a higher part in a
signature is a dependency like any other. Runs on the standard library alone.

Usage: check_imports.py [DIRECTORY OF THE PACKAGE]; exits with 1 and one line for each arrow that points up, each
circle, and each entry of `KNOTS` that is out of date.
"""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path

ROWS: tuple[tuple[str, ...], ...] = (
    ("__main__",),
    ("monitor", "log_parser"),
    ("agent_ctl", "oci_runtime"),
    ("cli", "shim"),
    ("engine",),
    ("hypervisor", "agent", "network", "storage", "resources", "images", "guest"),
    ("trace_export", "rootless"),
    ("children", "config", "management"),
    ("ttrpc", "oci", "journal", "crash", "metrics", "confinement"),
    ("proto", "own_ids", "own_namespace", "given_paths", "seccomp"),
    (
        "acl",
        "bpf",
        "deferred",
        "sysio",
        "json_text",
        "suppress",
        "threads",
        "paths",
        "pci_driver",
        "launcher",
        "host_cache",
        "mount_table",
        "settings",
        "errors",
        "events",
        "inotify",
        "tracing",
    ),
    ("__init__",),
)
"""Parts (sub-packages or modules of ``kata``) by height."""

ALLOWED_SIDEWAYS: frozenset[tuple[str, str]] = frozenset(
    {
        ("sysio", "errors"),
        ("bpf", "sysio"),
        ("paths", "errors"),
        ("acl", "paths"),
        ("host_cache", "paths"),
        ("settings", "errors"),
        ("host_cache", "sysio"),
        ("pci_driver", "sysio"),
        ("events", "json_text"),
        ("events", "paths"),
        ("events", "inotify"),
        ("inotify", "sysio"),
        ("images", "storage"),  # an image's layers become root file systems
        ("network", "hypervisor"),  # a network's end is a NIC in the machine's settings
    }
)
"""Arrows within one row that are wanted: (from, to)."""

KNOTS: frozenset[tuple[str, str]] = frozenset()
"""Arrows between modules that close a circle, still to be taken out: (from, to). The list may only become shorter."""

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


class Module:
    """A module of the package.

    Attributes:
        path: Its file.
        name: Its dotted name.
        imports: What it imports: line number and absolute dotted name, as of `imported_modules`.
    """

    def __init__(self, path: Path, source: Path) -> None:
        relative = path.relative_to(source.parent).with_suffix("")
        is_package = relative.name == "__init__"
        self.path = path
        self.name = ".".join(relative.parts[:-1] if is_package else relative.parts)
        tree = ast.parse(path.read_text(), str(path))
        self.imports = list(imported_modules(tree, self.name, is_package))


def violations(modules: Iterable[Module], present: set[str]) -> Iterator[str]:
    """Every import that does not point down, as one line each.

    Args:
        modules: Those of the package.
        present: The names of the modules and sub-packages directly below ``kata``.
    """
    for module in modules:
        here = part_of(module.name, present) or ""
        if here not in HEIGHT:
            yield f"{module.path}: part '{here}' has no row in tools/check_imports.py; give it one"
            continue
        for line, name in module.imports:
            there = part_of(name, present)
            if there is None or there == here or (here, there) in ALLOWED_SIDEWAYS:
                continue
            if there not in HEIGHT:
                yield f"{module.path}:{line}: imports '{name}', whose part has no row in tools/check_imports.py"
            elif HEIGHT[there] >= HEIGHT[here]:
                yield f"{module.path}:{line}: '{here}' imports '{name}', which is not below it"


def arrows_of(modules: Iterable[Module]) -> dict[str, set[str]]:
    """Which modules of the package each one imports; an ``__init__`` only where nothing else of it is named."""
    by_name = {module.name: module for module in modules}
    arrows: dict[str, set[str]] = {}
    for module in by_name.values():
        named = (name if name in by_name else name.rpartition(".")[0] for _, name in module.imports)
        arrows[module.name] = {name for name in named if name in by_name and name != module.name}
    return arrows


def reachable(start: str, arrows: dict[str, set[str]]) -> set[str]:
    """The modules that one leads to, itself only if there is a way back."""
    seen: set[str] = set()
    queue = [start]
    while queue:
        for name in arrows[queue.pop()] - seen:
            seen.add(name)
            queue.append(name)
    return seen


def circles(arrows: dict[str, set[str]], knots: frozenset[tuple[str, str]] = KNOTS) -> Iterator[str]:
    """A line for each set of modules that import in a circle, and for each known knot that is none any more.

    Args:
        arrows: Module -> the modules that it imports.
        knots: The arrows that are known to close a circle.
    """
    for here, there in sorted(knots):
        if there not in arrows.get(here, ()) or here not in reachable(there, arrows):
            yield f"'{here}' -> '{there}' closes no circle any more: take it off KNOTS in tools/check_imports.py"
    rest = {here: {there for there in names if (here, there) not in knots} for here, names in arrows.items()}
    leads_to = {name: reachable(name, rest) for name in rest}
    told: set[str] = set()
    for name in sorted(rest):
        circle = {other for other in leads_to[name] if name in leads_to[other]} - told
        if circle:
            told |= circle
            inside = (
                f"{here} -> {there}" for here in sorted(circle) for there in sorted(rest[here] & circle)
            )
            yield f"modules import in a circle: {', '.join(inside)}"


def problems(source: Path, knots: frozenset[tuple[str, str]] = frozenset()) -> list[str]:
    """What is wrong below *source*, the directory ``kata``, as one line each.

    Args:
        source: The package.
        knots: As of `circles`.
    """
    modules = [Module(path, source) for path in sorted(source.rglob("*.py"))]
    found = list(violations(modules, {path.stem for path in source.iterdir()}))
    return [*found, *circles(arrows_of(modules), knots)]


def main() -> int:
    """Check the package named on the command line, or this checkout's."""
    default = Path(__file__).resolve().parent.parent / "src" / "kata"
    source = Path(sys.argv[1]).resolve() if len(sys.argv) > 1 else default
    found = problems(source, KNOTS if source == default else frozenset())
    for line in found:
        print(line)
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
