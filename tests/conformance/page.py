"""docs/conformance.md: what critest says of runc and of kata, test by test."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass

from critest import Result

Key = tuple[str, str]
"""(runtime handler, test)."""

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


@dataclass(frozen=True)
class Versions:
    """What the results are of."""

    critest: str
    containerd: str
    runc: str
    kata: str


def reason(test: str) -> str:
    """Why a test does not pass with kata; empty if that is not known."""
    return next((text for part, text in REASONS.items() if part in test), "")


def unexplained(results: Mapping[Key, Result]) -> list[str]:
    """The tests that runc passes, and kata does not for no known reason."""
    return [
        test
        for (handler, test), result in sorted(results.items())
        if handler == "kata"
        and result.outcome == "failed"
        and not reason(test)
        and results.get(("runc", test), result).outcome != "failed"
    ]


def page(results: Mapping[Key, Result], versions: Versions, clients: list[str]) -> str:
    """The page's text.

    Args:
        results: Of critest.
        versions: What they are of.
        clients: The lines about clients (`matrix.section`).
    """
    tests = sorted({test for _, test in results})
    counts = {
        handler: Counter(result.outcome for (by, _), result in results.items() if by == handler)
        for handler in ("runc", "kata")
    }
    lines = [
        "# Conformance",
        "",
        "Written by `make conformance`; do not edit. critest is the conformance suite of Kubernetes' CRI tools: it",
        "speaks to containerd as a kubelet does. It was run twice against the same containerd, images and network,",
        "once with runc as runtime handler and once with kata. The images are made of Debian's programs and served",
        "under their original names (`tests/conformance/images.py`).",
        "",
        f"critest {versions.critest}, containerd {versions.containerd}, runc {versions.runc}, {versions.kata}",
        "",
        "| | runc | kata |",
        "|---|---|---|",
        *(
            f"| {outcome} | {counts['runc'][outcome]} | {counts['kata'][outcome]} |"
            for outcome in ("passed", "failed", "skipped")
        ),
        "",
        "## What of critest does not pass with kata",
        "",
        "| test | runc | why |",
        "|---|---|---|",
    ]
    for test in tests:
        result = results.get(("kata", test))
        if result is not None and result.outcome == "failed":
            runc = results.get(("runc", test))
            why = reason(test) or f"not known: {_short(result.message)}"
            lines.append(f"| {_title(test)} | {runc.outcome if runc else ''} | {why} |")
    lines += [
        "",
        *clients,
        "## All tests of critest",
        "",
        "| test | runc | kata | note |",
        "|---|---|---|---|",
    ]
    for test in tests:
        both = [results.get((handler, test)) for handler in ("runc", "kata")]
        outcomes = [result.outcome if result else "" for result in both]
        skipped = next((result.message for result in both if result and result.outcome == "skipped"), "")
        note = next((text for part, text in SKIPPED.items() if part in skipped), _short(skipped))
        if "failed" in outcomes:
            note = "see above" if outcomes[1] == "failed" else _short(both[0].message if both[0] else "")
        lines.append(f"| {_title(test)} | {' | '.join(outcomes)} | {note} |")
    return "\n".join(lines) + "\n"


def _title(test: str) -> str:
    return (
        test.removeprefix("[k8s.io] ")
        .replace("[Conformance]", "")
        .replace("  ", " ")
        .replace("|", "\\|")
        .strip()
    )


def _short(message: str) -> str:
    first = message.strip().split("\n")[0]
    return first[:120].replace("|", "\\|")
