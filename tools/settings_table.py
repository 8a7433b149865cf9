"""Writes docs/settings.md: the keys of ``sandbox.json``, from the classes in kata.settings.

Usage: settings_table.py [--check]; with --check it writes nothing, and exits with 1 where the page differs.
"""

from __future__ import annotations

import inspect
import sys

from made_page import ROOT, write_or_check

sys.path.insert(0, str(ROOT / "src"))

from kata import settings
from kata.settings_part import Part

PAGE = ROOT / "docs" / "settings.md"
HEAD = """# sandbox.json

What a client tells the engine of a sandbox. It is in the sandbox's directory
(`$KATA_RUN_DIR/sandboxes/ID/sandbox.json`) for people to read; the engine gets the same from its launcher. A key that
is unknown, missing or of the wrong type is an error. What is as by default is left out.

This page is made of `src/kata/settings.py` by `tools/settings_table.py`; change it there.
"""


def descriptions(cls: type) -> tuple[str, dict[str, str]]:
    """What a docstring says of its class, and of each parameter below ``Args:``."""
    text = inspect.cleandoc(cls.__doc__ or "")
    about, _, arguments = text.partition("\n\nArgs:\n")
    found: dict[str, str] = {}
    name = ""
    for line in arguments.splitlines():
        if line.startswith("    ") and not line.startswith("     "):
            name, _, rest = line.strip().partition(": ")
            found[name] = rest
        elif name and line.strip():
            found[name] += f" {line.strip()}"
    return " ".join(about.split()), found


def kind(annotation: str) -> str:
    """The type of a key, in JSON's words."""
    text = annotation.removesuffix(" | None")
    if text.startswith("Sequence["):
        return f"list of {kind(text[len('Sequence[') : -1])}"
    if text.startswith("Mapping["):
        return f"object of {kind(text[text.index(', ') + 2 : -1])}"
    names = {"str": "string", "int": "integer", "float": "number", "bool": "boolean", "Any": "any value"}
    return names.get(text) or f"[{text}](#{text.lower()})"


def default(cls: type, name: str) -> str:
    """What a key is where it is left out; empty where it must not be."""
    defaults = vars(cls)["__init__"].__kwdefaults__ or {}
    if name not in defaults:
        return "required"
    value = defaults[name]
    if value is None or value in ((), ""):
        return ""
    return f"`{str(value).lower() if isinstance(value, bool) else value}`"


def section(cls: type) -> list[str]:
    """The lines about one class."""
    about, keys = descriptions(cls)
    annotations: dict[str, str] = vars(cls)["__init__"].__annotations__
    names = [name for name in annotations if name != "return"]
    if names != list(keys):
        raise SystemExit(f"{cls.__name__}: its docstring describes {list(keys)}, and its keys are {names}")
    lines = [f"## {cls.__name__}", "", about, "", "| key | type | default | |", "|---|---|---|---|"]
    lines += [
        f"| `{name}` | {kind(annotations[name])} | {default(cls, name)} | {keys[name]} |" for name in names
    ]
    return [*lines, ""]


def page() -> str:
    """The whole page: the sandbox first, the rest in the order of the module."""
    parts = [cls for cls in vars(settings).values() if inspect.isclass(cls) and issubclass(cls, Part)]
    parts = [settings.SandboxSettings] + [
        cls for cls in parts if cls not in (Part, settings.SandboxSettings)
    ]
    return "\n".join([HEAD, *(line for cls in parts for line in section(cls))]).rstrip() + "\n"


if __name__ == "__main__":
    sys.exit(write_or_check(PAGE, page()))
