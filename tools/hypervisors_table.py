"""Writes the tables of docs/hypervisors.md: what each hypervisor can do, and what the tests found of it.

Usage: hypervisors_table.py [--check] [--suite FILE... | --versions FILE...]; with --check it writes nothing, and exits
with 1 where the page differs. ``--suite`` makes the table of the tests anew, of files that runs have written
(``KATA_MONITOR_RESULTS``); ``--versions`` that of QEMU's versions, one run with each.
"""

from __future__ import annotations

import inspect
import json
import sys
from pathlib import Path

from made_page import ROOT, write_or_check

sys.path.insert(0, str(ROOT / "src"))

from kata.hypervisor import registry
from kata.hypervisor.base import Capabilities

PAGE = ROOT / "docs" / "hypervisors.md"


def between(text: str, name: str, made: str) -> str:
    """A page with another content between the marks of this name."""
    before, start, rest = text.partition(f"<!-- {name} -->\n")
    _, end, after = rest.partition(f"<!-- /{name} -->")
    if not start or not end:
        raise SystemExit(f"{PAGE.name} has no place for {name}")
    return f"{before}{start}{made.rstrip()}\n{end}{after}"


def capabilities() -> str:
    """The table of what each can do, by the attributes of `Capabilities`."""
    monitors = [
        registry.find(name) for name in sorted(registry.names(), key=lambda n: (n != registry.DEFAULT, n))
    ]
    each = [monitor.capabilities(monitor.accelerators[0], {}).to_plain() for monitor in monitors]
    lines = [
        "| | " + " | ".join(monitor.title for monitor in monitors) + " |",
        "|---|" + "---|" * len(monitors),
        "| accelerators | " + " | ".join(", ".join(monitor.accelerators) for monitor in monitors) + " |",
    ]
    for name, text in descriptions().items():
        if name != "share_note":
            lines.append(f"| {text} | " + " | ".join(cell(one[name]) for one in each) + " |")
    return "\n".join(lines)


def descriptions() -> dict[str, str]:
    """The first sentence that `Capabilities` says of each attribute."""
    _, _, arguments = inspect.cleandoc(Capabilities.__doc__ or "").partition("\n\nArgs:\n")
    found: dict[str, str] = {}
    name = ""
    for line in arguments.splitlines():
        if not line.startswith("     "):
            name, _, rest = line.strip().partition(": ")
            found[name] = rest
        else:
            found[name] += f" {line.strip()}"
    return {
        name: text.partition(". ")[0].partition(" (`")[0].partition(": ``")[0].rstrip(".")
        for name, text in found.items()
    }


def cell(value: object) -> str:
    """One value in a table."""
    if isinstance(value, bool):
        return "yes" if value else "-"
    if isinstance(value, list):
        return ", ".join(map(str, value)) or "-"
    return str(value)


def suite(paths: list[str]) -> str:
    """The table of what passed with which hypervisor."""
    found: dict[str, dict[str, tuple[str, str]]] = {}
    columns: dict[str, str] = {}
    for path in paths:
        for line in Path(path).read_text().splitlines():
            row = json.loads(line)
            if "module" in row:
                continue  # of the rest of the lane
            column = f"{row['title']} ({row['accelerator']})"
            columns[column] = row["version"] or columns.get(column, "")
            tests = found.setdefault(row["test"].removeprefix("test_").replace("_", " "), {})
            tests[column] = (row["outcome"], row["reason"])  # that of a later file prevails
    reasons = list(
        dict.fromkeys(
            reason for cells in found.values() for said, reason in cells.values() if said == "skipped"
        )
    )

    def shown(outcome: tuple[str, str] | None) -> str:
        if outcome is None:
            return "not run"
        return f"- ({reasons.index(outcome[1]) + 1})" if outcome[0] == "skipped" else outcome[0]

    order = sorted(columns)
    lines = [
        "| | " + " | ".join(order) + " |",
        "|---|" + "---|" * len(order),
        "| version | " + " | ".join(columns[column] or "not installed" for column in order) + " |",
    ]
    lines += [
        f"| {test} | " + " | ".join(shown(cells.get(column)) for column in order) + " |"
        for test, cells in found.items()
    ]
    lines += ["", *(f"{number}. {reason}" for number, reason in enumerate(reasons, 1))]
    return "\n".join(lines).strip()


def versions(paths: list[str]) -> str:
    """The table of what passed with which version of QEMU: each test with every machine type, then whole modules."""
    tests: dict[str, dict[str, dict[str, str]]] = {}
    modules: dict[str, dict[str, dict[str, str]]] = {}
    columns: set[str] = set()
    for path in paths:
        for line in Path(path).read_text().splitlines():
            row = json.loads(line)
            version, _, _ = row["version"].removeprefix("QEMU emulator version ").partition(" ")
            if version == row["version"] or not row.get("title", "QEMU").startswith("QEMU"):
                continue  # another hypervisor's
            columns.add(version)
            # That of a later file prevails.
            if "module" in row:
                cells = modules.setdefault(f"`{row['module']}`", {}).setdefault(version, {})
                cells[row["test"]] = row["outcome"]
            else:
                name = row["test"].removeprefix("test_").replace("_", " ")
                cells = tests.setdefault(name, {}).setdefault(version, {})
                machine = row["title"].removeprefix("QEMU").strip() or "q35"
                cells[machine] = row["outcome"] if row["outcome"] != "skipped" else "-"

    def of_test(cells: dict[str, str]) -> str:
        """What is the same for all machine types is said once."""
        each = [f"{machine}: {outcome}" for machine, outcome in sorted(cells.items())]
        return each[0].partition(": ")[2] if len(set(cells.values())) == 1 else ", ".join(each)

    def of_module(cells: dict[str, str]) -> str:
        found = list(cells.values())
        counts = {outcome: found.count(outcome) for outcome in ("passed", "failed", "skipped")}
        return ", ".join(f"{count} {outcome}" for outcome, count in counts.items() if count)

    order = sorted(
        columns, key=lambda text: [int(part) if part.isdecimal() else 0 for part in text.split(".")]
    )
    lines = ["| | " + " | ".join(order) + " |", "|---|" + "---|" * len(order)]
    for rows, shown in ((tests, of_test), (modules, of_module)):
        for name, found in sorted(rows.items()):
            each = (shown(found[version]) if version in found else "not run" for version in order)
            lines.append(f"| {name} | " + " | ".join(each) + " |")
    return "\n".join(lines)


def page(suites: list[str], runs: list[str]) -> str:
    """The whole page."""
    text = between(PAGE.read_text(), "capabilities", capabilities())
    if suites:
        text = between(text, "suite", suite(suites))
    return between(text, "versions", versions(runs)) if runs else text


if __name__ == "__main__":
    arguments = [argument for argument in sys.argv[1:] if argument != "--check"]
    option, given = arguments[:1], arguments[1:]
    if option not in ([], ["--suite"], ["--versions"]):
        raise SystemExit(__doc__)
    sys.exit(
        write_or_check(
            PAGE, page(given if option == ["--suite"] else [], given if option == ["--versions"] else [])
        )
    )
