"""The container that runs in a machine before that waits: that it runs, and that nothing of it is left."""

from __future__ import annotations

import asyncio
import os
import socket
from pathlib import Path

import pytest
from agent_host import HostAgent
from agent_support import STATE
from conftest import Kata
from test_agent_debug import connected
from test_pool import configure, one_waiting
from test_pool_clients import how_of
from waiting import until

from kata.agent.client import VERSION
from kata.engine.factory import warm_up
from kata.proto.agent_pb import CreateSandboxRequest

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="needs root")


def all_below(top: str) -> set[str]:
    return {os.path.join(place, name) for place, dirs, files in os.walk(top) for name in dirs + files}


def traces(agent_pid: int) -> dict[str, set[str]]:
    """Where a container leaves something: mounts, processes, files, cgroups."""
    children = Path(f"/proc/{agent_pid}/task/{agent_pid}/children").read_text().split()
    mounts = Path(f"/proc/{agent_pid}/mountinfo").read_text().splitlines()
    descriptors = {f"{len(os.listdir(f'/proc/{agent_pid}/fd'))} descriptors"}
    cgroups = {path for path in all_below("/sys/fs/cgroup") if warm_up.ID in path}
    files = {path for path in all_below(STATE) if warm_up.ID in path}
    return {
        "children": set(children),
        "mounts": set(mounts),
        "descriptors": descriptors,
        "cgroups": cgroups,
        "files": files,
    }


def namespaces_held(pid: int) -> set[tuple[str, str]]:
    """The kinds and numbers of the namespaces that a process has open."""
    links = (os.readlink(f"/proc/{pid}/fd/{name}") for name in os.listdir(f"/proc/{pid}/fd"))
    return {
        (link.split(":[")[0], link) for link in links if ":[" in link and link.startswith(("ipc", "uts"))
    }


def namespaces_of(pid: int) -> set[tuple[str, str]]:
    """Its own IPC and UTS namespaces."""
    return {(kind, os.readlink(f"/proc/{pid}/ns/{kind}")) for kind in ("ipc", "uts")}


def test_nothing_of_it_is_left(run_directory: Path) -> None:
    """With the agent as a process of this host, where everybody can look."""
    with HostAgent(run_directory) as host:

        async def run() -> None:
            async with connected(host.path) as agent:
                await agent.check(30)
                await warm_up.run(agent, "")
                # What stays is the agent's own, and ready for the next: its device program, and new namespaces.
                until(lambda: not traces(host.process.pid)["children"], "the end of its processes")
                before = traces(host.process.pid)
                ready = namespaces_held(host.process.pid)
                assert [kind for kind, _number in sorted(ready)] == ["ipc", "uts"]
                assert not ready & namespaces_of(host.process.pid)
                seen: list[dict[str, set[str]]] = []
                start = agent.start_container

                async def watched(container_id: str) -> None:
                    seen.append(traces(host.process.pid))
                    (child,) = seen[0]["children"]
                    assert not ready & namespaces_of(
                        int(child)
                    )  # they are a sandbox's, not this container's
                    await start(container_id)

                agent.start_container = watched  # type: ignore[method-assign]
                await warm_up.run(agent, "")
                assert VERSION in agent.features
                assert seen[0]["children"] > before["children"]  # it can be seen when it is there
                # The process that has taken it away is reaped a moment after its answer.
                until(lambda: not traces(host.process.pid)["children"], "the end of its processes")
                assert traces(host.process.pid) == before
                # They become those of the sandbox, and no others are made.
                await agent.create_sandbox(CreateSandboxRequest(sandbox_id="sandbox", hostname="guest"))
                assert namespaces_held(host.process.pid) == ready
                assert socket.gethostname() != "guest"

        asyncio.run(run())


LOOK = (
    "awk '/^processes/ {print $2}' /proc/stat; awk 'NR > 1 {s += $3} END {print s}' /proc/cgroups;"
    " wc -l </proc/self/mountinfo; ls -R /sys/fs/cgroup | grep -c warm; grep -c warm /proc/self/mountinfo; true"
)


def test_it_has_run_in_a_machine_that_waits(kata_env: Kata, busybox_image: str) -> None:
    """A machine that waited has had more processes than one that goes on from a template, and is like it otherwise."""
    kata = kata_env
    kata.env["KATA_TEMPLATES"] = "on"
    configure(kata, vm_cache_number=1, vm_cache_least_free=64)
    kata.ok("factory", "init")
    run = ("--network", "none", busybox_image, "sh", "-c", LOOK)
    how, (processes, *cold) = how_of(kata, *run)
    assert how == "start: template: none was waiting"
    one_waiting(kata)
    how, (more, *warm) = how_of(kata, *run)
    assert how == "start: pool"
    assert int(more) > int(processes)
    assert warm == cold
    kata.ok("factory", "destroy")
