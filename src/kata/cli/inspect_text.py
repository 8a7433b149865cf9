"""The report of `kata inspect-image` for a terminal. Whatever comes from an image is escaped."""

from __future__ import annotations

import sys

from kata.cli import inspect_clamav, inspect_kinds, table

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Sequence
    from typing import Any

_SHOWN = 20
"""Rows of each list; all of them are in the JSON."""
_WIDTH = 160
_NAMES = {
    "deb": "Debian", "apk": "Alpine", "rpm": "RPM", "pypi": "Python", "npm": "npm", "golang": "Go", "maven": "Java",
}  # fmt: skip


def clean(text: str, most: int = _WIDTH) -> str:
    """A string from an image for a terminal: escaped, and cut in the middle if it is long."""
    text = table.printable(text)
    if len(text) > most:
        text = text[: most * 2 // 3] + "..." + text[-(most // 3 - 3) :]
    return text


class _Page:
    def __init__(self) -> None:
        self.lines: list[str] = []

    def head(self, text: str) -> None:
        self.lines += ["", text.upper()]

    def line(self, text: str, depth: int = 1) -> None:
        self.lines.append("  " * depth + text)

    def rows(self, rows: Sequence[Sequence[str]], total: int | None = None) -> None:
        """Aligned columns, the last one unpadded."""
        shown = rows[:_SHOWN]
        widths = [max(len(row[at]) for row in shown) for at in range(len(shown[0]))] if shown else []
        for row in shown:
            cells = [f"{cell:<{width}}" for cell, width in zip(row, widths, strict=True)]
            self.line("  ".join(cells).rstrip())
        left = (len(rows) if total is None else total) - len(shown)
        if left > 0:
            self.line(f"... and {left} more (--json has up to 500 of a kind)")


def show(report: dict[str, Any]) -> None:
    """Print a report.

    Args:
        report: The document that ``--json`` prints.
    """
    sys.stdout.write(text(report))


def text(report: dict[str, Any]) -> str:
    """The report as text; see `show`."""
    page = _Page()
    image = report["image"]
    size = table.human_size
    page.lines.append(f"IMAGE {clean(image['name'])}")
    if image["digest"]:
        page.line(f"manifest   {clean(image['digest'])}")
    if report["problem"]:
        page.line(f"PROBLEM    {clean(report['problem'], 400)}")
    if not report["found"]:
        return "\n".join(page.lines) + "\n"
    found = report["found"]
    system, totals = found["system"], found["totals"]
    page.line(
        f"platform   {clean(image['platform'])}, created {clean(image['created'] or 'at an unknown time')}"
    )
    page.line(f"system     {clean(system['name'] or system['id'] or 'none that says its name')}")
    page.line(
        f"content    {size(totals['bytes'])} in {totals['files']} files, {totals['directories']} directories,"
        f" {totals['links']} links; {totals['programs']} programs, {totals['libraries']} libraries"
    )
    _summary(page, report)
    if report.get("clamav"):
        page.line(f"scanned    {inspect_clamav.line(report['clamav'])}")
    _configuration(page, report)
    _layers(page, report)
    _packages(page, found)
    _findings(page, found)
    if found["folders"]:
        page.head("largest folders")
        page.rows(
            [(size(one["bytes"]), str(one["files"]), clean(one["path"])) for one in found["folders"][:15]]
        )
    if report.get("difference"):
        _difference(page, report)
    if report.get("trace"):
        _trace(page, report["trace"])
    return "\n".join(page.lines) + "\n"


def _summary(page: _Page, report: dict[str, Any]) -> None:
    counts: dict[str, int] = {}
    for kind, count in report["found"]["counts"].items():
        grade = inspect_kinds.severity(kind)
        counts[grade] = counts.get(grade, 0) + count
    said = [f"{counts[grade]} {grade}" for grade in inspect_kinds.SEVERITIES if grade in counts]
    page.line(f"findings   {', '.join(said) or 'none'}")


def _configuration(page: _Page, report: dict[str, Any]) -> None:
    config, start = report["configuration"], report["found"]["start"]
    page.head("configuration, and what is there")
    page.line(f"command    {clean(' '.join(start['command']) or 'none')}")
    if start["path"]:
        page.line(f"           -> {clean(start['path'])} ({clean(start['kind']) or 'missing'})")
    page.line(f"user       {clean(config['user'] or 'root')}")
    for key, values in (("variables", "environment"), ("ports", "ports"), ("volumes", "volumes")):
        for number, value in enumerate(config[values][:_SHOWN]):
            page.line(f"{key if number == 0 else '':<10} {clean(value)}")
    for script in start["scripts"]:
        page.line(f"script     {clean(script['path'])}")
        for line in script["text"].splitlines()[:12]:
            page.line(f"| {clean(line)}", 6)


def _layers(page: _Page, report: dict[str, Any]) -> None:
    found, size = report["found"], table.human_size
    page.head("layers")
    if not found["has_layers"]:
        page.line("the store keeps no layers of its images: inspect the archive or layout to see them")
        return
    steps = [step for step in report["history"] if not step["empty"]]
    rows = []
    for number, layer in enumerate(found["layers"]):
        step = clean(steps[number]["by"], 70) if number < len(steps) else ""
        whole = "" if layer["whole"] else "NOT WHOLE "
        rows.append(
            (
                str(number + 1),
                size(layer["bytes"]),
                f"{layer['entries']} entries",
                clean(layer["kind"]),
                whole + step,
            )
        )
    page.rows(rows)
    hidden = found["hidden"]
    if hidden["files"]:
        page.line(
            f"hidden by later layers, and still stored: {hidden['files']} files, {size(hidden['bytes'])}"
        )
        page.rows(
            [
                (size(one["bytes"]), f"layer {one['layer']}, hidden by {one['by']}", clean(one["path"]))
                for one in hidden["largest"]
            ],
            hidden["files"],
        )


def _packages(page: _Page, found: dict[str, Any]) -> None:
    page.head(f"packages: {found['packages_found']}")
    kinds: dict[str, list[str]] = {}
    for one in found["packages"]:
        kinds.setdefault(one["kind"], []).append(f"{one['name']} {one['version']}")
    for kind, names in kinds.items():
        page.line(f"{_NAMES.get(kind, clean(kind))} ({len(names)})")
        for name in names[:8]:
            page.line(clean(name, 90), 2)
        if len(names) > 8:
            page.line(f"... and {len(names) - 8} more (--json)", 2)


def _findings(page: _Page, found: dict[str, Any]) -> None:
    by_kind: dict[str, list[dict[str, Any]]] = {}
    for one in found["findings"]:
        by_kind.setdefault(one["kind"], []).append(one)
    order = sorted(
        by_kind, key=lambda kind: (inspect_kinds.SEVERITIES.index(inspect_kinds.severity(kind)), kind)
    )
    for kind in order:
        total = found["counts"].get(kind, len(by_kind[kind]))
        page.head(f"{inspect_kinds.severity(kind)}: {clean(kind)} ({total})")
        page.line(inspect_kinds.meaning(kind))
        page.rows(
            [
                (f"layer {one['layer']}" if one["layer"] else "", clean(one["path"]), clean(one["detail"]))
                for one in by_kind[kind]
            ],
            total,
        )


def _difference(page: _Page, report: dict[str, Any]) -> None:
    difference = report["difference"]
    page.head("changes")
    page.line(f"since {clean(report['against']['name'])}")
    for text_ in difference["configuration"]:
        page.line(clean(text_))
    page.line(f"{difference['packages_changed']} packages differ")
    page.rows(
        [
            (
                clean(one["kind"]),
                clean(one["name"]),
                f"{clean(one['was']) or '-'} -> {clean(one['is']) or '-'}",
            )
            for one in difference["packages"]
        ],
        difference["packages_changed"],
    )
    page.line(f"{difference['files_changed']} files differ")
    page.rows(
        [
            (clean(one["path"]), f"{clean(one['was']) or '-'} -> {clean(one['is']) or '-'}")
            for one in difference["files"]
        ],
        difference["files_changed"],
    )


def _trace(page: _Page, trace: dict[str, Any]) -> None:
    page.head("started once, without network")
    page.line(f"{clean(trace['ended'])}, after {trace['seconds']} s")
    for title, rows in (
        ("processes", [(str(one["pid"]), clean(one["command"])) for one in trace["processes"]]),
        ("files", [(clean(one["what"]), clean(one["path"])) for one in trace["files"]]),
        ("names asked for", [(clean(one),) for one in trace["names"]]),
        ("connections", [(clean(one),) for one in trace["connections"]]),
    ):
        page.line(f"{title}: {len(rows)}")
        page.rows(rows)
    if trace["output"]:
        page.line("its output:")
        for line in trace["output"].splitlines()[:20]:
            page.line(f"| {clean(line)}", 2)
