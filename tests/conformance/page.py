"""docs/conformance.md: what critest says of runc and of kata, test by test."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from critest import Result

HANDLERS = ("runc", "kata")
CLIENTS = "What clients can do"
"""The heading of the section that `matrix` writes."""
OCI = "What the OCI's runtime-tools find"
"""The heading of the section that `oci_suite` writes."""
RUNC = "What of runc's own tests passes"
"""The heading of the section that `runc_suite` writes."""
CRIO = "What of critest passes with CRI-O"
"""The heading of the section that `crio_suite` writes."""
BESIDE = (CRIO, OCI, RUNC)


class Key(NamedTuple):
    """What a result is of.

    Attributes:
        containerd: Its version.
        handler: The runtime handler.
        test: The test's name.
    """

    containerd: str
    handler: str
    test: str


OWN_KERNEL = (
    "A guest has a kernel of its own: the host's namespaces are refused by name before anything is made."
)
REASONS = {
    "NamespaceOption runtime should support HostPID": OWN_KERNEL,
    "NamespaceOption runtime should support HostIpc is true": OWN_KERNEL,
    "NamespaceOption runtime should support HostNetwork is true": OWN_KERNEL,
    "runtime should support portforward in host network": OWN_KERNEL,
    "mount with 'rshared' should support propagation": (
        "What a container mounts is mounted in the guest's kernel, and the host cannot see it; the other way works."
    ),
    "runtime should support MaskedPaths": (
        "The test masks /bin/ls, and in these images that is all of busybox, the shell too. (tests/vm tests the paths.)"
    ),
    "public image with digest": "The digest is that of an image built elsewhere, which is not to be had here.",
}
"""Part of a test's name -> why it does not pass."""

SKIPPED = {
    "runtime does not implement recursive readonly mounts": "containerd 2 offers them, this one does not",
    "No kubelet support for user namespaces": "containerd 2 offers them, this one does not",
}
"""Part of what a skipped test says -> the same for this page."""


@dataclass(frozen=True)
class Versions:
    """What the results are of."""

    critest: str
    runc: str
    kata: str


def reason(test: str) -> str:
    """Why a test does not pass with kata; empty if that is not known."""
    return next((text for part, text in REASONS.items() if part in test), "")


def unexplained(results: Mapping[Key, Result]) -> list[str]:
    """The tests that runc passes, and kata does not for no known reason."""
    return [
        f"{key.test} (containerd {key.containerd})"
        for key, result in sorted(results.items())
        if key.handler == "kata"
        and result.outcome == "failed"
        and not reason(key.test)
        and results.get(key._replace(handler="runc"), result).outcome != "failed"
    ]


def sections(text: str) -> dict[str, list[str]]:
    """The lines of each section of a page, by its heading, which is the first of them."""
    found: dict[str, list[str]] = {}
    heading = ""
    for line in text.splitlines():
        if line.startswith("## "):
            heading = line.removeprefix("## ")
        found.setdefault(heading, []).append(line)
    return found


def table(lines: Iterable[str]) -> dict[str, list[str]]:
    """The first table of a page's lines: the first cell of each row, and those behind it. The heading comes first."""
    found: dict[str, list[str]] = {}
    for line in lines:
        if line.startswith("|"):
            if not set(line) <= set("|-: "):
                first, *others = (cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1])
                found[first] = others
        elif found:
            break
    return found


def replace(path: Path, heading: str, lines: list[str]) -> None:
    """Put a section into a page: in the place of the one with this heading, or behind that about clients.

    Args:
        path: The page.
        heading: The section's.
        lines: The section, which begins with its heading.
    """
    known = sections(path.read_text())
    if heading in known:
        known[heading] = lines
    else:
        known[CLIENTS] = [*known[CLIENTS], *lines]
    path.write_text("".join(f"{line}\n" for section in known.values() for line in section))


def page(results: Mapping[Key, Result], versions: Versions, clients: list[str]) -> str:
    """The page's text.

    Args:
        results: Of critest.
        versions: What they are of.
        clients: The lines about clients (`matrix.section`), and of the sections `BESIDE`.
    """
    tests = sorted({key.test for key in results})
    daemons = sorted({key.containerd for key in results}, key=_numbers)
    columns = [(daemon, handler) for daemon in daemons for handler in HANDLERS]
    counts = {
        column: Counter(result.outcome for key, result in results.items() if key[:2] == column)
        for column in columns
    }
    lines = [
        "# Conformance",
        "",
        "Written by `make conformance`; do not edit. critest is the conformance suite of Kubernetes' CRI tools: it",
        "speaks to containerd as a kubelet does. With each containerd it was run twice, with the same images and",
        "network, once with runc as runtime handler and once with kata. The images are made of Debian's programs and",
        "served under their original names (`tests/conformance/images.py`).",
        "",
        f"critest {versions.critest}, runc {versions.runc}, {versions.kata}",
        "",
        f"| containerd | {' | '.join(f'{daemon}, {handler}' for daemon, handler in columns)} |",
        "|" + "---|" * (len(columns) + 1),
        *(
            f"| {outcome} | {' | '.join(str(counts[column][outcome]) for column in columns)} |"
            for outcome in ("passed", "failed", "skipped")
        ),
        "",
        "## What of critest does not pass with kata",
        "",
        "| test | containerd | runc | why |",
        "|---|---|---|---|",
    ]
    for test in tests:
        failed = [
            daemon
            for daemon in daemons
            if (result := results.get(Key(daemon, "kata", test))) and result.outcome == "failed"
        ]
        if failed:
            first = Key(failed[0], "kata", test)
            runc = [results.get(Key(daemon, "runc", test)) for daemon in failed]
            outcomes = ", ".join(sorted({one.outcome for one in runc if one}))
            known = "with runc as well" if outcomes == "failed" else "not known"
            why = reason(test) or f"{known}: {first_words(results[first].message)}"
            lines.append(f"| {title(test)} | {', '.join(failed)} | {outcomes} | {why} |")
    lines += [
        "",
        *clients,
        *([] if not clients or clients[-1] == "" else [""]),
        "## All tests of critest",
        "",
        "With runc and with kata, where the two differ.",
        "",
        f"| test | {' | '.join(daemons)} | note |",
        "|" + "---|" * (len(daemons) + 2),
    ]
    for test in tests:
        cells, notes = [], []
        for daemon in daemons:
            one, other = (results.get(Key(daemon, handler, test)) for handler in HANDLERS)
            both = [result.outcome if result else "not run" for result in (one, other)]
            cells.append(both[0] if both[0] == both[1] else f"{both[0]}, {both[1]}")
            notes.append(_note(test, one, other))
        lines.append(
            f"| {title(test)} | {' | '.join(cells)} | {'; '.join(dict.fromkeys(filter(None, notes)))} |"
        )
    return "\n".join(lines) + "\n"


def _note(test: str, runc: Result | None, kata: Result | None) -> str:
    """What there is to say of a test that was not passed by both."""
    if kata and kata.outcome == "failed":
        return "see above"
    for result in (runc, kata):
        if result and result.outcome == "skipped":
            return next(
                (text for part, text in SKIPPED.items() if part in result.message), _short(result.message)
            )
    if runc and runc.outcome == "failed":
        return f"runc: {reason(test) or _short(runc.message)}"
    return ""


def _numbers(version: str) -> list[int]:
    return [int(number) for number in re.findall(r"\d+", version)]


def lacking(results: Mapping[Key, Result], text: str) -> list[str]:
    """The containerds of whose results a page tells, and of which there are none here.

    Args:
        results: Of critest.
        text: The page.
    """
    told = [one.rpartition(", ")[0] for one in next(iter(table(text.splitlines()).values()), [])]
    # A later one of the same series is told of in its place.
    there = [_numbers(version)[:2] for version in {key.containerd for key in results}]
    return [one for one in dict.fromkeys(told) if _numbers(one)[:2] not in there]


def title(test: str) -> str:
    """A test's name as the page has it."""
    return (
        test.removeprefix("[k8s.io] ")
        .replace("[Conformance]", "")
        .replace("  ", " ")
        .replace("|", "\\|")
        .strip()
    )


def first_words(message: str) -> str:
    """The beginning of what an error of gRPC's says in *message*; of *message* where there is none."""
    return _short(message.partition("rpc error: ")[2] or message)


def _short(message: str) -> str:
    first = message.strip().split("\n")[0]
    return first[:120].replace("|", "\\|")
