"""One look at a sandbox: its processes on the host, and what its guest says of itself and its containers.

Nothing is measured between two looks. A guest that does not answer in time (it boots, is paused, is stuck or has
ended) has no figures; the host's are there without it.
"""

from __future__ import annotations

import asyncio
import os
import time

from kata.engine.containers.process import CREATED, PAUSED, RUNNING
from kata.errors import KataError
from kata.metrics.procfs import ProcessFigures

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    from kata.agent.client import AgentClient
    from kata.engine.lifecycle.sandbox import Sandbox
    from kata.proto import agent_pb

GUEST_S = 2.0
"""How long the guest may take for all its answers, in seconds: whoever scrapes waits three."""
MAX_CONTAINERS = 128
"""Further containers of a sandbox are not asked about."""


class Figures:
    """What one look has found.

    Attributes:
        at_s: When, in seconds since the Epoch.
        guest_text: The agent's answer to GetMetrics, which is not to be trusted; None without one.
        containers: The agent's answer to StatsContainer, by container.
        processes: The engine, the hypervisor and the helpers.
        returned_bytes: How much of the guest's memory takes none of the host's; None where that is not known.
        is_whole: Whether every container that runs has answered.
        cpu_s: Processor time of the whole sandbox on the host, in seconds.
        memory_bytes: Memory of the whole sandbox on the host.
    """

    __slots__ = (
        "at_s",
        "containers",
        "cpu_s",
        "guest_text",
        "is_whole",
        "memory_bytes",
        "processes",
        "returned_bytes",
    )

    def __init__(self) -> None:
        self.at_s = time.time()
        self.guest_text: str | None = None
        self.containers: dict[str, agent_pb.StatsContainerResponse] = {}
        self.is_whole = False
        self.processes: list[ProcessFigures] = []
        self.returned_bytes: int | None = None
        self.cpu_s = 0.0
        self.memory_bytes = 0


async def look(sandbox: Sandbox) -> Figures:
    """Take the figures of a sandbox. Never fails; ends within `GUEST_S` and what the host takes."""
    found = Figures()
    agent = sandbox.runtime.living_agent
    if agent is not None and not sandbox.is_ending and sandbox.life.state.value == "ready":
        await _ask(agent, sandbox, found)
    found.processes = [
        figures for figures in (ProcessFigures(pid, role) for role, pid in _pids(sandbox)) if figures.threads
    ]
    if sandbox.runtime.vm is not None and not sandbox.runtime.is_lost:
        resident = (await sandbox.runtime.vm.metrics()).get("guest_resident_bytes")
        if resident is not None:
            has_mib = sandbox.resizer.memory_mib + sandbox.machine.extra_memory_mib
            found.returned_bytes = max(0, (has_mib << 20) - resident)
    cgroup = sandbox.machine.cgroup
    cpu_ns, memory = cgroup.usage() if cgroup is not None else (0, 0)
    found.cpu_s = cpu_ns / 1e9 or sum(one.cpu_s for one in found.processes)
    found.memory_bytes = memory or sum(one.resident_bytes for one in found.processes)
    found.at_s = time.time()
    return found


async def _ask(agent: AgentClient, sandbox: Sandbox, found: Figures) -> None:
    """Ask for all that the guest has to say, at the same time.

    A question that a former look has asked, and that is not answered yet, is not asked again: a guest that hangs or is
    paused for hours would otherwise have a longer queue to answer with each scrape. Looks at the same time share
    their questions.
    """
    living = [
        one
        for one in list(sandbox.containers.values())[:MAX_CONTAINERS]
        if one.init.state in (CREATED, RUNNING, PAUSED)
    ]
    open_questions = sandbox.open_questions
    asked: dict[str, asyncio.Future[Any]] = {}
    for key in ("", *(one.id for one in living)):
        question = open_questions.get(key)
        if question is None:
            question = asyncio.ensure_future(agent.stats(key, None) if key else agent.metrics(None))
            open_questions[key] = question
            question.add_done_callback(lambda done, key=key: _answered(sandbox, key, done))  # type: ignore[misc]
        asked[key] = question
    await asyncio.wait(asked.values(), timeout=GUEST_S)
    for key, question in asked.items():
        if not question.done() or question.cancelled() or question.exception() is not None:
            continue
        if key:
            found.containers[key] = question.result()
        else:
            found.guest_text = question.result()
    for one in living:
        answer = found.containers.get(one.id)
        memory = answer.cgroup_stats.memory_stats if answer is not None and answer.cgroup_stats else None
        if memory is not None:
            one.oom_kills_counted = memory.stats.get("oom_kill", 0)
    found.is_whole = len(found.containers) == len(living) and found.guest_text is not None


def _answered(sandbox: Sandbox, key: str, question: asyncio.Future[Any]) -> None:
    sandbox.open_questions.pop(key, None)
    error = None if question.cancelled() else question.exception()
    if error is not None and not isinstance(error, KataError):
        sandbox.tasks.log(f"a figure of the guest could not be had: {type(error).__name__}: {error}")


def _pids(sandbox: Sandbox) -> list[tuple[str, int]]:
    """Role and process id of every process of the sandbox on the host."""
    found = [("engine", os.getpid())]
    machine = sandbox.machine
    if sandbox.runtime.vm is not None and not sandbox.runtime.is_lost:
        found.append(("hypervisor", sandbox.runtime.vm.pid))
    helpers = [("virtiofsd", machine.files.child if machine.files is not None else None)]
    helpers.append(("passt", machine.network.child if machine.network is not None else None))
    helpers += [("logger", one.child) for one in sandbox.loggers]
    found += [(role, child.pid) for role, child in helpers if child is not None and child.poll() is None]
    return found
