"""The table of a run of `bench/performance`, and its place in docs/performance.md."""

from __future__ import annotations

import os
import statistics
import subprocess
from collections.abc import Sequence
from pathlib import Path

from kata.hypervisor import accel

Rounds = dict[str, list[float]]
"""What each contender took, by round."""
BEGIN, END = "<!-- written by bench/performance -->", "<!-- end of what bench/performance writes -->"

ROWS: tuple[tuple[str, str, str, str, str, float], ...] = (
    ("`ctr run --rm` / with runc", "ctr run, this", "ctr run, runc", "ms", "ratio", 4.0),
    (
        "`ctr run --rm` from the pool / with runc",
        "ctr run, pool",
        "ctr run, runc beside the pool",
        "ms",
        "ratio",
        2.0,
    ),
    (
        "`ctr run --rm` from the pool / from a template",
        "ctr run, pool",
        "ctr run, beside the pool",
        "ms",
        "",
        0,
    ),
    (
        "`kata run` with network, from the pool / from a template",
        "kata run user, pool",
        "kata run user, beside the pool",
        "ms",
        "",
        0,
    ),
    (
        "memory of a machine that waits, of containerd / of `kata run`",
        "one waits, ctr",
        "one waits, kata run",
        "MiB",
        "",
        0,
    ),
    ("`ctr run --rm` / other", "ctr run, this", "ctr run, other", "ms", "", 0),
    ("`kata run --network none` / cold", "kata run none, this", "kata run none, cold", "ms", "ratio", 0.35),
    (
        "the same with an engine parent / cold",
        "kata run none, parent",
        "kata run none, cold",
        "ms",
        "ratio",
        0.35,
    ),
    ("`kata run` with network / cold", "kata run user, this", "kata run user, cold", "ms", "ratio", 0.4),
    ("`kata run --network none` / other", "kata run none, this", "kata run none, other", "ms", "", 0),
    ("`kata run` with network / other", "kata run user, this", "kata run user, other", "ms", "", 0),
    ("cold `kata run --network none` / bare QEMU", "kata run none, cold", "bare QEMU", "ms", "ratio", 1.5),
    ("`kata run --network none` / `runc run`", "kata run none, this", "runc run", "ms", "", 0),
    ("`kata run --network none` / `crun run`", "kata run none, this", "crun run", "ms", "", 0),
    ("`podman run` with kata / with runc", "podman kata", "podman runc", "ms", "ratio", 2.5),
    ("`podman run` with kata / with crun", "podman kata", "podman crun", "ms", "", 0),
    ("`kata-runtime state` / runc's", "state, kata", "state, runc", "ms", "ratio", 2.0),
    ("`kata-runtime kill` / runc's", "kill, kata", "kill, runc", "ms", "ratio", 2.0),
    ("`kata-runtime delete` / runc's", "delete, kata", "delete, runc", "ms", "ratio", 2.0),
    ("`kata exec NAME true` / other", "exec, this", "exec, other", "ms", "value", 30),
    ("`kata exec NAME true` / `runc exec`", "exec, this", "exec, runc", "ms", "", 0),
    ("stop and removal of one / other", "removal, this", "removal, other", "ms", "value", 60),
    ("stop and removal of one / runc", "removal, this", "removal, runc", "ms", "", 0),
    ("20 at once, all run / other", "20 all, this", "20 all, other", "s", "ratio", 0.3),
    ("20 at once, p95 / p50", "20 p95, this", "20 p50, this", "s", "", 0),
    ("50 at once, all run / other", "50 all, this", "50 all, other", "s", "", 0),
    ("50 at once, p95 / p50", "50 p95, this", "50 p50, this", "s", "ratio", 3),
    (
        "20 at once, for each of which a machine waits / from a template",
        "20 all, pool",
        "20 all, no pool",
        "s",
        "",
        0,
    ),
    ("the same, p95 / p50", "20 p95, pool", "20 p50, pool", "s", "", 0),
    ("30 pods by `crictl run`, p95 / other", "pods p95, this", "pods p95, other", "s", "ratio", 0.35),
    ("30 pods by `crictl run`, p95 / runc", "pods p95, this", "pods p95, runc", "s", "", 0),
    *(
        (
            f"{about} / {beside}",
            f"{place}, {test}, kata",
            f"{place}, {test}, {kind}",
            "/s",
            "at least" if kind == "runc" else "",
            0.3 if kind == "runc" else 0,
        )
        for about, place, test in (
            ("a pod opens and reads files of 4 KiB of its image", "image", "open and read a file of 4 KiB"),
            ("stat of files of its image", "image", "stat"),
            (
                "a pod opens and reads files that it has written",
                "root file system",
                "open and read a file of 4 KiB",
            ),
            ("stat of files that it has written", "root file system", "stat"),
        )
        for kind, beside in (("runc", "with runc"), ("live", "root shared live"))
    ),
    (
        "unpack, read and remove 5 000 files of 2 KiB / with runc",
        "work, kata",
        "work, runc",
        "s",
        "ratio",
        3,
    ),
    ("unpack, read and remove 5 000 files / root shared live", "work, kata", "work, live", "s", "", 0),
    ("host memory of an idle sandbox of 20 / other", "sandbox, this", "sandbox, other", "MiB", "value", 30),
    (
        "with an engine parent, its own share included / without",
        "sandbox, parent",
        "sandbox, this",
        "MiB",
        "value",
        30,
    ),
    ("of it the hypervisor / other", "hypervisor, this", "hypervisor, other", "MiB", "", 0),
    ("of it the engine / other", "engine, this", "engine, other", "MiB", "value", 8),
    ("of it the engine with a parent / without", "engine, parent", "engine, this", "MiB", "value", 8),
)
"""Of the table: its name; the two whose ratio it is, of which the second may be missing where the first has an aim of
its own; unit; what the aim is about (the ratio, which is to be no more or, by ``at least``, no less; the median's
value; or there is none); the aim."""


def median(values: Sequence[float]) -> float:
    """The middle one."""
    return statistics.median(values)


def p95(values: Sequence[float]) -> float:
    """What 95 of 100 do not exceed."""
    return statistics.quantiles(values, n=20, method="inclusive")[18] if len(values) > 1 else values[0]


def table(took: Rounds) -> list[str]:
    """The table as lines of Markdown: medians, the 95th percentile, the median of the rounds' ratios, and the aim."""
    lines = ["| figure | | p95 | beside | ratio | aim | |", "|---|---|---|---|---|---|---|"]
    for title, left, right, unit, about, aim in ROWS:
        this, that = took.get(left), took.get(right)
        if not this or not (that or about == "value"):
            continue
        ratio = median([a / b for a, b in zip(this, that, strict=False)]) if that else None
        if that is None:
            title = title.partition(" / ")[0]
        digits = 2 if unit == "s" else 1
        bound = -p95([-one for one in this]) if unit == "/s" else p95(this)  # of rates, what 95 of 100 reach
        beside = f"{median(that):.{digits}f} {unit}" if that else ""
        shown = f"{ratio:.2f}" if ratio is not None else ""
        reached = median(this) if about == "value" or ratio is None else ratio
        wanted = f"{'≥ ' if about == 'at least' else ''}{aim:g}{f' {unit}' if about == 'value' else ''}"
        is_met = reached >= aim if about == "at least" else reached <= aim
        lines.append(
            f"| {title} | {median(this):.{digits}f} {unit} | {bound:.{digits}f} | {beside} | {shown}"
            f" | {wanted if about else ''} | {('met' if is_met else 'missed') if about else ''} |"
        )
    return lines


def machine() -> str:
    """Processors, memory, kernel and programs that the figures come from, as a sentence."""
    with open("/proc/cpuinfo") as file:
        models = {line.partition(": ")[2].strip() for line in file if line.startswith("model name")}
    memory_gib = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / (1 << 30)
    kvm = "KVM" if accel.choose().accel == "kvm" else "software emulation"
    programs = [_version(name) for name in ("qemu-system-x86_64", "containerd", "runc", "crun", "podman")]
    return (
        f"{os.cpu_count()} processors ({', '.join(sorted(models)) or os.uname().machine}), {memory_gib:.0f} GiB, Linux"
        f" {os.uname().release}, {kvm}; {', '.join(filter(None, programs))}"
    )


def _version(program: str) -> str:
    try:
        done = subprocess.run([program, "--version"], capture_output=True, text=True, check=False)
    except OSError:
        return ""
    words = (done.stdout.splitlines() or [""])[0].split()
    number = next((word for word in words if word.lstrip("v")[:1].isdigit()), "")
    return f"{program} {number.lstrip('v')}" if number else ""


def put(file: Path, text: str) -> None:
    """Replace what stands between the two marks of a document.

    Args:
        file: The document.
        text: What is to stand there.

    Raises:
        SystemExit: It has no such marks.
    """
    before, begin, rest = file.read_text().partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise SystemExit(f"error: {file} does not say where the table goes\nhint: {BEGIN} ... {END}")
    file.write_text(f"{before}{BEGIN}\n\n{text.strip()}\n\n{END}{after}")
