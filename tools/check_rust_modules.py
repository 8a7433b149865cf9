"""Checks that the modules of the agent form no circle, and that each type's methods stand in its own module.

A module is a file below ``agent/src``; what a file names with ``crate::``, ``self::`` or ``super::``, in ``use`` or in
the middle of the code, is an arrow to the module that it leads to. Code for tests only (``#[cfg(test)]``) does
not count. Two things are reported:

* a circle: modules that can be reached from each other (a strongly connected component);
* an inherent ``impl`` of a type that another file defines. A method call needs no ``use``: with methods of one
  type spread over the files, any file reaches any other and the first check sees nothing of it.

Runs on the standard library alone.

Usage: check_rust_modules.py [DIRECTORY OF THE SOURCES]; exits with 1 and one line for each finding.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path

_NOISE = re.compile(
    r"""
      //[^\n]*                                  # a comment
    | /\*.*?\*/                                 # another (nested ones do not occur)
    | b?r(?P<hashes>\#*)".*?"(?P=hashes)        # a raw string
    | [bc]?"(?:\\.|[^"\\])*"                    # a string
    | b?'(?:\\[^\n]+?|[^'\\])'                  # a character; a lifetime has no second quote
    """,
    re.VERBOSE | re.DOTALL,
)
_TEST = re.compile(r"#\[cfg\(test\)\]\s*(?:#\[[^\]]*\]\s*)*")
_PATH = re.compile(r"(?<![\w:$])(?:crate|self|super)(?:::(?:super|\w+))+")
_USE = re.compile(r"(?<![\w])use\s+([^;]+);")
_IMPL = re.compile(r"^impl(?:\s*<[^{;]*?>)?\s+(?P<head>[^{;]*)\{", re.MULTILINE)
_TYPE = re.compile(r"^\s*(?:pub(?:\([^)]*\))?\s+)?(?:struct|enum|union|trait|type)\s+(\w+)", re.MULTILINE)


def code_of(text: str) -> str:
    """The source without comments, texts and what is compiled for tests only; the lines stay where they are."""
    text = _NOISE.sub(lambda match: re.sub(r"[^\n]", " ", match[0]), text)
    while found := _TEST.search(text):
        end = _end_of_item(text, found.end())
        text = text[: found.start()] + re.sub(r"[^\n]", " ", text[found.start() : end]) + text[end:]
    return text


def _end_of_item(text: str, start: int) -> int:
    """Where the item that begins at *start* ends: behind its semicolon, or the brace that closes it."""
    depth = 0
    for at in range(start, len(text)):
        if text[at] == "{":
            depth += 1
        elif text[at] == "}":
            depth -= 1
            if depth == 0:
                return at + 1
        elif text[at] == ";" and depth == 0:
            return at + 1
    return len(text)


def _unfold(tree: str, prefix: str = "") -> Iterator[str]:
    """The paths in a ``use`` declaration, its braces taken apart."""
    tree = re.split(r"\s+as\s+", tree.strip())[0] if "{" not in tree else tree.strip()
    if "{" not in tree:
        yield prefix + tree
        return
    head, _, body = tree.partition("{")
    body = body[: body.rindex("}")]
    depth, part = 0, ""
    for character in body + ",":
        depth += (character == "{") - (character == "}")
        if character == "," and depth == 0:
            if part.strip():
                yield from _unfold(part, prefix + head.strip())
            part = ""
        else:
            part += character


def modules_of(source: Path) -> dict[str, Path]:
    """The modules below *source* by their path (``runtime::launch``); the crate's root is the empty one."""
    found = {}
    for path in sorted(source.rglob("*.rs")):
        parts = list(path.relative_to(source).with_suffix("").parts)
        if parts[-1] == "mod":
            parts.pop()
        found["" if parts == ["lib"] else "::".join(parts)] = path
    found.pop("main", None)
    return found


def arrows(
    module: str, code: str, modules: Mapping[str, Path], is_directory: bool
) -> Iterator[tuple[int, str]]:
    """Line and target of every path in *code* that leads to another module of the crate."""
    here = module.split("::") if module else []
    paths = [(match.start(), path) for match in _USE.finditer(code) for path in _unfold(match[1])]
    paths += [(match.start(), match[0]) for match in _PATH.finditer(code)]
    children = {name.rsplit("::", 1)[-1] for name in modules if name.rpartition("::")[0] == module and name}
    for at, path in paths:
        names = [name.strip() for name in path.split("::")]
        if names[0] == "crate":
            base: list[str] = []
        elif names[0] == "self" or (is_directory and names[0] in children) or names[0] == "super":
            base = here
        else:
            continue
        for name in names:
            if name == "super":
                base = base[:-1]
            elif name not in ("crate", "self"):
                if "::".join([*base, name]) not in modules:
                    break
                base = [*base, name]
        target = "::".join(base)
        if target not in (module, ""):
            yield code.count("\n", 0, at) + 1, target


def circles(graph: Mapping[str, set[str]]) -> list[list[str]]:
    """The strongly connected components of more than one module (Tarjan's algorithm)."""
    index: dict[str, int] = {}
    low: dict[str, int] = {}
    stack: list[str] = []
    found: list[list[str]] = []

    def visit(node: str) -> None:
        index[node] = low[node] = len(index)
        stack.append(node)
        for target in sorted(graph[node]):
            if target not in index:
                visit(target)
                low[node] = min(low[node], low[target])
            elif target in stack:
                low[node] = min(low[node], index[target])
        if low[node] == index[node]:
            members = stack[stack.index(node) :]
            del stack[stack.index(node) :]
            if len(members) > 1:
                found.append(sorted(members))

    for node in sorted(graph):
        if node not in index:
            visit(node)
    return found


def foreign_impls(code: str) -> Iterator[tuple[int, str]]:
    """Line and type of every inherent ``impl`` whose type *code* does not define."""
    defined = set(_TYPE.findall(code))
    for match in _IMPL.finditer(code):
        head = match["head"]
        name = re.match(r"\w+", head)
        if re.search(r"\bfor\b", head) or name is None or name[0] in defined:
            continue
        yield code.count("\n", 0, match.start()) + 1, name[0]


def violations(source: Path) -> Iterator[str]:
    """One line for each circle and each impl that stands elsewhere, below *source*."""
    modules = modules_of(source)
    graph: dict[str, set[str]] = {module: set() for module in modules}
    where: dict[tuple[str, str], int] = {}
    for module, path in modules.items():
        code = code_of(path.read_text())
        for line, target in arrows(module, code, modules, path.name in ("mod.rs", "lib.rs")):
            graph[module].add(target)
            where.setdefault((module, target), line)
        for line, name in foreign_impls(code):
            yield f"{path}:{line}: methods of {name}, which is defined elsewhere"
    for members in circles(graph):
        inside = [
            f"{origin} -> {target} ({modules[origin].name}:{where[origin, target]})"
            for origin in members
            for target in sorted(graph[origin] & set(members))
        ]
        yield f"circle of {len(members)} modules: " + ", ".join(inside)


def main() -> int:
    """Check the sources named on the command line, or this checkout's."""
    default = Path(__file__).resolve().parent.parent / "agent" / "src"
    found = list(violations(Path(sys.argv[1]).resolve() if len(sys.argv) > 1 else default))
    for line in found:
        print(line)
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
