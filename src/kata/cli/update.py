"""`kata update`: changes the limits of containers, running ones at once, and for later starts."""

from __future__ import annotations

import os

from kata.cli import records, values
from kata.cli.args import Command, Option
from kata.cli.lifecycle import each
from kata.engine.client import EngineClient
from kata.errors import UsageError
from kata.oci.spec import CPU_PERIOD
from kata.resources import sizing

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    from kata.cli.args import Arguments
    from kata.cli.records import Container

COMMANDS = {
    "update": Command(
        "update",
        "CONTAINER...",
        "Changes the limits of containers: of running ones at once, and for later starts.",
        [
            Option("--cpus", "N", "how many CPUs the container may use; 0 changes nothing"),
            Option(
                "-m --memory", "SIZE", "how much memory the container may use (512m, 2g); 0 changes nothing"
            ),
            Option("--memory-swap", "SIZE", "the same as -m: the machine has no swap"),
            Option("--pids-limit", "N", "how many processes the container may have; 0 or -1 for no limit"),
        ],
        least=1,
        notes="The virtual machine is resized: up to default_maxvcpus and default_maxmemory if the container was made\n"
        "with --cpus or -m, otherwise up to its size at the start. If a limit is not possible, that is an error and\n"
        "nothing is changed. 'kata explain CONTAINER' shows the machine's size and bounds.",
    )
}


def _wanted(arguments: Arguments) -> tuple[dict[str, Any], dict[str, Any]]:
    """The limits of the options: (resources of the specification, entries of the container's record)."""
    given = [arguments.value(name) for name in ("cpus", "memory", "memory_swap", "pids_limit")]
    if given == [None] * len(given):
        raise UsageError("no limit to change was given", "kata update -m 512m NAME")
    # As in Docker, a 0 leaves that limit as it is; of --pids-limit it is none.
    cpus, memory, swap = map(values.limit, given[:-1])
    pids = given[-1]
    if swap is not None:
        values.no_swap(swap, memory)
    resources: dict[str, Any] = {}
    record: dict[str, Any] = {}
    if cpus is not None:
        record["cpus"] = values.cpus(cpus)
        resources["cpu"] = {"quota": round(record["cpus"] * CPU_PERIOD), "period": CPU_PERIOD}
    if memory is not None:
        record["memory"] = size = values.container_memory(memory)
        # No swap, as for a new container.
        resources["memory"] = {"limit": size, "swap": size}
    if pids is not None:
        resources["pids"] = {"limit": values.whole(pids, "--pids-limit", least=-1) or -1}
    return resources, record


def _keep(container: Container, resources: dict[str, Any], record: dict[str, Any]) -> None:
    """Record the limits for later starts."""
    path = os.path.join(container.directory, "config.json")
    spec = records.read_json(path)
    kept = spec.setdefault("linux", {}).setdefault("resources", {})
    for kind, limits in resources.items():
        kept[kind] = {**(kept.get(kind) or {}), **limits}
    if (kept.get("pids") or {}).get("limit") == -1:
        del kept["pids"]
    records.write_json(path, spec)
    records.change(container, **record)


def _update(arguments: Arguments) -> int:
    resources, record = _wanted(arguments)

    def act(container: Container) -> None:
        if not resources:
            return
        if container.running():
            with EngineClient(container.socket) as engine:
                engine.update(container.id, resources)
        else:
            # There is no machine that could refuse the limits, so they are checked here.
            sizing.plan(
                sizing.ResourceRequest(record.get("cpus"), record.get("memory"), "--cpus and --memory")
            )
        _keep(container, resources, record)

    return each(arguments.rest, act)


HANDLERS = {"update": _update}
