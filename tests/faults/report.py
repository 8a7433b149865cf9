"""The page that a run writes: what was killed where, and what came of it, with each containerd."""

from __future__ import annotations

import re
import statistics
from collections import Counter
from typing import Any

from faults import oci_points, stops
from faults.rounds import VICTIMS, podman_rounds

TYPE_CHECKING = False
if TYPE_CHECKING:
    from faults.rounds import Record

HEAD = """\
# Faults

Written by `make faults`, which replaces what is said of the client that it was run with; do not edit. Processes are
killed (SIGKILL) at named points of a container's life and at random moments, with real virtual machines: by ctr and
crictl with containerd, by podman with `kata-runtime`. After every single fault this has to hold, or the round fails:

* containerd's view is right: without engine or hypervisor the task is stopped or absent, with its exit event if a start
  had been told; with both alive, after containerd was killed and started again, the task answers an exec;
* the same container is made and started again at once;
* `ctr task rm`, `ctr container rm`, `crictl rmp -f`, `podman rm -f`, `podman system prune` and `kata-runtime delete
  --force` succeed;
* podman's view: without engine, hypervisor or the process that stands for the container it has exited with 137, and
  there is an event for it, if it had been told of a start; a container that runs answers an exec;
* the host is as before the first round: processes, mounts, links and addresses, tc, network namespaces, cgroups, run
  and state directories, bundles, addresses of pods, loop devices.

The victims are the engine, the hypervisor, the file server of the share (virtiofsd), containerd itself, and the shim's
command where one runs. A network helper there is only with `kata run`: in containerd's networks tc carries the packets.
With podman they are, besides the first three, `kata-runtime` itself (`runtime`), the process whose number podman has
for the container (`standing`), and conmon, also that of an exec. An undisturbed container of podman's is `podman run
-d`, `exec`, `kill`, `rm`; `run.*` are points of `kata-runtime run`. At the points `pool.*` a machine waits, or is taken
by the container that it has waited for; the `waiter` is the process that waits with it. Who asks for one that is killed
starts another one. In the end nobody waits any more.

At the points `template.*` a process makes a template (the `maker`) for a machine that has started, at `clone.*` a
machine goes on from one, and at those of disks the root file system is the image of its layers and a disk, of which
what was written is carried back. Afterwards the next container gets a whole template, and goes on from it; and the
snapshot's directory has all that was written, or nothing.

A hypervisor is also stopped instead of killed (`hang`): it answers nothing any more, nor does its guest. What waits for
them ends by its time limit, with an error; the task is removed as if it were alive. Only who waits for the end of a
command that runs has no limit: they are let go when the container is removed.

Cloud Hypervisor and Firecracker also answer wrongly (`nonsense`, `refuse`), by a program between the engine and the
API of the real one (`tests/faults/answers.py`): the client is told of it by name, but at the end, when there is nothing
to tell. Root file systems are disks then, on containerd's devmapper snapshotter; with Firecracker they always are.

When the shim's command that clears up is killed, containerd keeps its bundle until it is started the next time,
whatever the runtime; so it is started anew there before anything is checked.

An engine that is killed after the shim's command has answered and before containerd has dialled it, a few milliseconds,
is cleared up by no containerd (1.6 and 2.4 alike): it runs the shim's `delete` for engines that it was connected to.
The next sandbox does it, or `kata gc`.

Points lie outside the product (`tests/faults/stops.py`): a program that takes the place of the shim puts them around
its steps. Who reaches an armed point stands still there, so the victim is hit exactly then. The tables of points say
what the task was said to be afterwards. `-`: there is no such process at that point.
"""
SECTION = "## "


def page(record: Record, takes: dict[str, float], before: str) -> str:
    """The page, in Markdown.

    Args:
        record: The results with one client.
        takes: Seconds of an undisturbed life, by scenario.
        before: The page so far: what it says of other clients is kept.
    """
    took = " and ".join(f"{seconds:.1f} s with {name}" for name, seconds in takes.items())
    lines = [
        f"{SECTION}{record.title}\n",
        f"Run of {record.began} (UTC), seed {record.seed}. An undisturbed life took {took}.\n",
        *_points(record),
        *_random(record),
    ]
    sections = {**_sections(before), record.title: "\n".join(lines).rstrip("\n") + "\n"}
    ordered = sorted(
        sections,
        key=lambda title: (title.split()[0], [int(n) for n in re.findall(r"\d+", title.partition(":")[0])]),
    )
    return "\n".join([HEAD, *(sections[title] for title in ordered)])


def _sections(text: str) -> dict[str, str]:
    """What a page says of each client: its title -> the section, heading included."""
    found = re.split(rf"^(?={SECTION})", text, flags=re.MULTILINE)[1:]
    return {one.partition("\n")[0].removeprefix(SECTION): one.rstrip("\n") + "\n" for one in found}


def _cell(result: dict[str, Any] | None) -> str:
    if result is None:
        return ""
    if result["ok"] is None:
        return "-"
    if result["ok"] is False:
        return "**failed**"
    return str(result.get("became") or "ok")


def _points(record: Record) -> list[str]:
    results = record.results
    rows = []
    victims = [one for one in VICTIMS if any(key.endswith(f" {one}") for key in results)]
    for point in stops.POINTS:
        cells = [_cell(results.get(f"{point.name} {victim}")) for victim in victims]
        if any(cells):
            rows.append(f"| `{point.name}` | {point.what} | {' | '.join(cells)} |")
    if not rows:
        return []
    return [
        "### At named points\n",
        *_how_many(record),
        f"| point | when | {' | '.join(victims)} |",
        f"|---|---|{'---|' * len(victims)}",
        *rows,
        "",
        *_failures(results, lambda key: not key.startswith("random ")),
    ]


def _how_many(record: Record) -> list[str]:
    """How many of all the rounds at points were carried out, where not all have to be: one by podman takes long."""
    if not record.title.startswith("podman"):
        return []
    every = [one.key for one in podman_rounds(oci_points.names())]
    done = sum(key in record.results for key in every)
    if done == len(every):
        return [f"All {done} rounds.\n"]
    return [
        f"{done} of {len(every)} rounds; of the others the cells are empty, as where there is no such process.\n"
    ]


def _random(record: Record) -> list[str]:
    chosen = {key: one for key, one in record.results.items() if key.startswith("random ")}
    if not chosen:
        return []
    counts = Counter((one["scenario"], one["victim"]) for one in chosen.values() if one["ok"] is not None)
    late = sum(one["ok"] is None for one in chosen.values())
    seconds = [one["seconds"] for one in chosen.values()]
    choice = " --containerd 2" if record.title.startswith("containerd 2.") else ""
    choice = " --podman" if record.title.startswith("podman") else choice
    _, _, hypervisor = record.title.partition(" with ")
    choice += f" --hypervisor {hypervisor}" if hypervisor else ""
    lines = [
        "### At random moments\n",
        f"{len(chosen)} rounds, {sum(counts.values())} with a victim ({late} found none: the client was done before"
        f" there was one), {sum(one['ok'] is False for one in chosen.values())} failed;"
        f" median {statistics.median(seconds):.1f} s a round, with all checks."
        f" `tools/faults{choice} --points none --seed {record.seed} --first N --rounds 1` repeats round N.\n",
        "| client | victim | rounds | during |",
        "|---|---|---|---|",
    ]
    for (scenario, victim), count in sorted(counts.items()):
        steps = Counter(
            str(one.get("at"))
            for one in chosen.values()
            if (one["scenario"], one["victim"]) == (scenario, victim) and one["ok"] is not None
        )
        during = ", ".join(f"{step} {number}" for step, number in steps.most_common())
        lines.append(f"| {scenario} | {victim} | {count} | {during} |")
    return [*lines, "", *_failures(record.results, lambda key: key.startswith("random "))]


def _failures(results: dict[str, dict[str, Any]], wanted: Any) -> list[str]:
    failed = [(key, one) for key, one in results.items() if one["ok"] is False and wanted(key)]
    return [line for key, one in failed for line in (f"* `{key}`: {one['why']}", "")]
