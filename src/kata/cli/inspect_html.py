"""The report of `kata inspect-image` as one HTML file: no script, nothing loaded, every string escaped."""

from __future__ import annotations

from html import escape

from kata.cli import inspect_clamav, inspect_kinds, table

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence
    from typing import Any

_POLICY = "default-src 'none'; style-src 'unsafe-inline'"
_STYLE = """
:root { color-scheme: light dark; --line: #d7dbe0; --soft: #f4f6f8; --text: #1c2733; --dim: #5b6875; --page: #fff;
  --high: #b3261e; --medium: #a15c00; --low: #2f5f8f; --note: #5b6875; }
@media (prefers-color-scheme: dark) { :root { --line: #37424e; --soft: #1d252d; --text: #e4e9ee; --dim: #9fadba;
  --page: #141a20; --high: #ff8a80; --medium: #ffb95c; --low: #8ec5ff; --note: #9fadba; } }
* { box-sizing: border-box }
body { margin: 0 auto; max-width: 76rem; padding: 1.5rem; font: 15px/1.5 system-ui, sans-serif; color: var(--text);
  background: var(--page) }
h1 { font-size: 1.5rem; margin: 0; overflow-wrap: anywhere } h2 { font-size: 1.1rem; margin: 2rem 0 .5rem }
code, pre, td.name { font-family: ui-monospace, monospace; font-size: 13px }
pre { background: var(--soft); padding: .75rem; overflow: auto; max-height: 24rem; white-space: pre-wrap;
  overflow-wrap: anywhere }
.dim { color: var(--dim) } .problem { border: 2px solid var(--high); padding: .75rem; margin: 1rem 0 }
.cards { display: flex; flex-wrap: wrap; gap: .75rem; margin: 1rem 0 }
.card { border: 1px solid var(--line); border-radius: 6px; padding: .5rem .9rem; min-width: 7rem }
.card b { display: block; font-size: 1.35rem }
table { border-collapse: collapse; width: 100% } th { text-align: left; color: var(--dim); font-weight: 600 }
td, th { border-bottom: 1px solid var(--line); padding: .3rem .6rem .3rem 0; vertical-align: top;
  overflow-wrap: anywhere }
.number { text-align: right; white-space: nowrap; padding-right: 1rem; width: 1% }
details { border-top: 1px solid var(--line); padding: .4rem 0 } summary { cursor: pointer; font-weight: 600 }
.high { color: var(--high) } .medium { color: var(--medium) } .low { color: var(--low) } .note { color: var(--note) }
"""


def _safe(text: object) -> str:
    """Any string, for the text of an element: no markup, nothing that cannot be seen."""
    return escape(table.printable(str(text)), quote=True)


def _table(headings: Sequence[str], rows: Iterable[Sequence[object]], numbers: Sequence[int] = ()) -> str:
    head = "".join(
        f"<th{' class=number' if at in numbers else ''}>{_safe(heading)}</th>"
        for at, heading in enumerate(headings)
    )
    body = []
    for row in rows:
        cells = "".join(
            f'<td class="{"number" if at in numbers else "name"}">{_safe(cell)}</td>'
            for at, cell in enumerate(row)
        )
        body.append(f"<tr>{cells}</tr>")
    return f"<table><thead><tr>{head}</tr></thead><tbody>{''.join(body)}</tbody></table>"


def page(report: dict[str, Any]) -> str:
    """The whole file.

    Args:
        report: The document of ``--json``.
    """
    image, found = report["image"], report["found"]
    parts = [
        "<!doctype html>",
        '<html lang="en"><head><meta charset="utf-8">',
        f'<meta http-equiv="Content-Security-Policy" content="{escape(_POLICY)}">',
        '<meta name="viewport" content="width=device-width, initial-scale=1">',
        f"<title>{_safe(image['name'])}</title><style>{_STYLE}</style></head><body>",
        f"<h1>{_safe(image['name'])}</h1>",
        f'<p class="dim">{_safe(image["digest"])}<br>{_safe(image["platform"])}, created '
        f"{_safe(image['created'] or 'at an unknown time')}; read in a virtual machine by {_safe(report['tool'])}</p>",
    ]
    if report["problem"]:
        parts.append(f'<p class="problem">The report is not whole: {_safe(report["problem"])}</p>')
    if found:
        parts.append(_cards(found))
        if report.get("clamav"):
            parts.append(f'<p class="dim">Scanned: {_safe(inspect_clamav.line(report["clamav"]))}.</p>')
        parts += [_findings(found), _configuration(report), _layers(report), _packages(found)]
        parts.append("<h2>Largest folders</h2>")
        parts.append(
            _table(
                ("size", "files", "folder"),
                [(table.human_size(one["bytes"]), one["files"], one["path"]) for one in found["folders"]],
                (0, 1),
            )
        )
        if report.get("difference"):
            parts.append(_difference(report))
        if report.get("trace"):
            parts.append(_trace(report["trace"]))
    parts.append("</body></html>\n")
    return "\n".join(parts)


def _cards(found: dict[str, Any]) -> str:
    grades = dict.fromkeys(inspect_kinds.SEVERITIES, 0)
    for kind, count in found["counts"].items():
        grades[inspect_kinds.severity(kind)] += count
    cards = [
        ("", _safe(found["system"]["name"] or found["system"]["id"] or "unknown"), "system"),
        ("", _safe(table.human_size(found["totals"]["bytes"])), f"in {found['totals']['files']} files"),
        ("", str(found["packages_found"]), "packages"),
        *((grade, str(count), f"findings: {grade}") for grade, count in grades.items() if count),
    ]
    inner = "".join(f'<div class="card {kind}"><b>{big}</b>{small}</div>' for kind, big, small in cards)
    return f'<div class="cards">{inner}</div>'


def _findings(found: dict[str, Any]) -> str:
    by_kind: dict[str, list[dict[str, Any]]] = {}
    for one in found["findings"]:
        by_kind.setdefault(one["kind"], []).append(one)
    parts = ["<h2>Findings</h2>"]
    order = sorted(
        by_kind, key=lambda one: (inspect_kinds.SEVERITIES.index(inspect_kinds.severity(one)), one)
    )
    for kind in order:
        grade = inspect_kinds.severity(kind)
        total = found["counts"].get(kind, len(by_kind[kind]))
        rows = [(one["layer"] or "", one["path"], one["detail"]) for one in by_kind[kind]]
        is_open = " open" if grade == inspect_kinds.HIGH else ""
        parts.append(
            f'<details{is_open}><summary><span class="{grade}">{grade}</span> {_safe(kind)} ({total})'
            f' <span class="dim">{_safe(inspect_kinds.meaning(kind))}</span></summary>'
            + _table(("layer", "path", "detail"), rows, (0,))
            + "</details>"
        )
    return "".join(parts) if order else '<h2>Findings</h2><p class="dim">None.</p>'


def _configuration(report: dict[str, Any]) -> str:
    config, start = report["configuration"], report["found"]["start"]
    rows = [
        ("command", " ".join(start["command"]) or "none"),
        (
            "what that is",
            f"{start['path']} ({start['kind'] or 'missing'})" if start["path"] else "not there",
        ),
        ("user", config["user"] or "root"),
        ("working directory", config["working_directory"] or "/"),
        *(("variable", one) for one in config["environment"]),
        *(("port", one) for one in config["ports"]),
        *(("volume", one) for one in config["volumes"]),
        *(("label", one) for one in config["labels"]),
    ]
    scripts = "".join(
        f"<details><summary>{_safe(one['path'])}</summary><pre>"
        + "\n".join(_safe(line) for line in one["text"].splitlines())
        + "</pre></details>"
        for one in start["scripts"]
    )
    return "<h2>Configuration, and what is there</h2>" + _table(("", ""), rows) + scripts


def _layers(report: dict[str, Any]) -> str:
    found = report["found"]
    if not found["has_layers"]:
        return '<h2>Layers</h2><p class="dim">The store keeps none of its images.</p>'
    steps = [step for step in report["history"] if not step["empty"]]
    size = table.human_size
    rows = [
        (
            number + 1,
            size(layer["bytes"]),
            layer["entries"],
            layer["kind"],
            "" if layer["whole"] else "not whole",
            steps[number]["by"] if number < len(steps) else "",
        )
        for number, layer in enumerate(found["layers"])
    ]
    hidden = found["hidden"]
    text = "<h2>Layers</h2>" + _table(("", "size", "members", "packed", "", "made by"), rows, (0, 1, 2))
    if hidden["files"]:
        text += (
            f"<details><summary>Hidden by later layers, and still stored: {hidden['files']} files,"
            f" {_safe(size(hidden['bytes']))}</summary>"
            + _table(
                ("size", "layer", "hidden by", "path"),
                [(size(one["bytes"]), one["layer"], one["by"], one["path"]) for one in hidden["largest"]],
                (0, 1, 2),
            )
            + "</details>"
        )
    return text


def _packages(found: dict[str, Any]) -> str:
    kinds: dict[str, list[dict[str, Any]]] = {}
    for one in found["packages"]:
        kinds.setdefault(one["kind"], []).append(one)
    parts = [f"<h2>Packages: {found['packages_found']}</h2>"]
    for kind, packages in kinds.items():
        rows = [(one["name"], one["version"], one["licence"], one["path"]) for one in packages]
        parts.append(
            f"<details><summary>{_safe(kind)} ({len(packages)})</summary>"
            + _table(("name", "version", "licence", "recorded in"), rows)
            + "</details>"
        )
    return "".join(parts)


def _difference(report: dict[str, Any]) -> str:
    difference = report["difference"]
    return (
        f"<h2>Since {_safe(report['against']['name'])}</h2>"
        + _table(("configuration",), [(one,) for one in difference["configuration"]])
        + f"<p>{difference['packages_changed']} packages differ</p>"
        + _table(
            ("", "name", "was", "is"),
            [(one["kind"], one["name"], one["was"], one["is"]) for one in difference["packages"]],
        )
        + f"<p>{difference['files_changed']} files differ</p>"
        + _table(
            ("path", "was", "is"), [(one["path"], one["was"], one["is"]) for one in difference["files"]]
        )
    )


def _trace(trace: dict[str, Any]) -> str:
    return (
        f"<h2>Started once, without network</h2><p>{_safe(trace['ended'])}, after {trace['seconds']} s</p>"
        + _table(
            ("process", "of", "command"),
            [(one["pid"], one["parent"], one["command"]) for one in trace["processes"]],
            (0, 1),
        )
        + _table(("file", "what"), [(one["path"], one["what"]) for one in trace["files"]])
        + _table(("name asked for",), [(one,) for one in trace["names"]])
        + _table(("connection",), [(one,) for one in trace["connections"]])
        + "<pre>"
        + "\n".join(_safe(line) for line in trace["output"].splitlines())
        + "</pre>"
    )
