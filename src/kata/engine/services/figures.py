"""One look at a sandbox: its processes on the host, and what its guest says of itself and its containers.

Nothing is measured between two looks. A guest that does not answer in time (it boots, is paused, is stuck or has
ended) has no figures; the host's are there without it.
"""

from __future__ import annotations

import asyncio
import functools
import os
import time

from kata.engine.containers.process import CREATED, PAUSED, RUNNING
from kata.engine.lifecycle.sandbox_state import SandboxState
from kata.errors import KataError
from kata.metrics.procfs import ProcessFigures

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine
    from typing import Any

    from kata.engine.containers.container import Container
    from kata.engine.lifecycle.sandbox import Sandbox
    from kata.proto import agent_pb

GUEST_S = 2.0
"""How long the guest may take for all its answers, in seconds: whoever scrapes waits three."""
MAX_CONTAINERS = 128
"""Further containers of a sandbox are not asked about."""

_LIVING = (CREATED, RUNNING, PAUSED)


class Figures:
    """What one look has found.

    Attributes:
        at_s: When, in seconds since the Epoch.
        guest_text: The agent's answer to GetMetrics, which is not to be trusted; None without one.
        containers: The agent's answer to StatsContainer, by container.
        processes: The engine, the hypervisor and the helpers.
        counters: What the hypervisor has counted (`kata.hypervisor.protocols.Machine.counters`).
        resident_bytes: How much of the guest's memory takes memory of the host; None where that is not known.
        returned_bytes: How much of the guest's memory takes none of the host's; None where that is not known.
        is_whole: Whether every container that runs has answered.
        cpu_s: Processor time of the whole sandbox on the host, in seconds.
        memory_bytes: Memory of the whole sandbox on the host.
    """

    __slots__ = (
        "at_s",
        "containers",
        "counters",
        "cpu_s",
        "guest_text",
        "is_whole",
        "memory_bytes",
        "processes",
        "resident_bytes",
        "returned_bytes",
    )

    def __init__(self) -> None:
        self.at_s = time.time()
        self.guest_text: str | None = None
        self.containers: dict[str, agent_pb.StatsContainerResponse] = {}
        self.counters: dict[str, dict[str, int]] = {}
        self.is_whole = False
        self.processes: list[ProcessFigures] = []
        self.resident_bytes: int | None = None
        self.returned_bytes: int | None = None
        self.cpu_s = 0.0
        self.memory_bytes = 0


async def look(sandbox: Sandbox) -> Figures:
    """Take the figures of a sandbox. Never fails; ends within `GUEST_S` and what /proc takes.

    All that takes time is asked at the same time. A question that a former look has asked, and that is not answered
    yet, is not asked again: a guest that hangs or is paused for hours would otherwise have a longer queue to answer
    with each scrape. Nor is it waited for any longer than it was. Looks at the same time share their questions.
    """
    found = Figures()
    agent, machine = sandbox.runtime.living_agent, sandbox.runtime.vm
    asked: dict[str, asyncio.Future[Any]] = {}
    living: list[Container] = []
    if agent is not None and sandbox.life.state is SandboxState.READY:
        containers = list(sandbox.containers.values())[:MAX_CONTAINERS]
        living = [one for one in containers if one.created_at_ns and one.init.state in _LIVING]
        asked[_GUEST] = _ask(sandbox, _GUEST, functools.partial(agent.metrics, None))
        for one in living:
            asked[one.id] = _ask(sandbox, one.id, functools.partial(agent.stats, one.id, None))
    if machine is not None and not sandbox.runtime.is_lost:
        asked[_MACHINE] = _ask(sandbox, _MACHINE, machine.metrics)
        asked[_COUNTERS] = _ask(sandbox, _COUNTERS, machine.counters)
    give_up_s = time.monotonic() - GUEST_S
    awaited = [asked[key] for key in asked if sandbox.open_questions.get(key, (None, 0.0))[1] > give_up_s]
    if awaited:
        await asyncio.wait(awaited, timeout=GUEST_S)
    answers = {
        key: question.result()
        for key, question in asked.items()
        if question.done() and not question.cancelled() and question.exception() is None
    }
    resident = found.resident_bytes = answers.pop(_MACHINE, {}).get("guest_resident_bytes")
    if resident is not None:
        has_mib = sandbox.resizer.memory_mib + sandbox.machine.extra_memory_mib
        found.returned_bytes = max(0, (has_mib << 20) - resident)
    found.counters = answers.pop(_COUNTERS, {})
    found.guest_text = answers.pop(_GUEST, None)
    found.containers = answers
    found.is_whole = found.guest_text is not None and len(answers) == len(living)
    for one in living:
        answer = found.containers.get(one.id)
        memory = answer.cgroup_stats.memory_stats if answer is not None and answer.cgroup_stats else None
        if memory is not None:
            one.oom_kills_counted = memory.stats.get("oom_kill", 0)
    _look_at_host(sandbox, found)
    return found


def _look_at_host(sandbox: Sandbox, found: Figures) -> None:
    found.processes = [
        figures for figures in (ProcessFigures(pid, role) for role, pid in _pids(sandbox)) if figures.threads
    ]
    cgroup = sandbox.machine.cgroup
    cpu_ns, memory = cgroup.usage() if cgroup is not None else (0, 0)
    found.cpu_s = cpu_ns / 1e9 or sum(one.cpu_s for one in found.processes)
    found.memory_bytes = memory or sum(one.resident_bytes for one in found.processes)
    found.at_s = time.time()


_GUEST, _MACHINE, _COUNTERS = "/guest", "/machine", "/counters"
"""Questions beside those about containers, whose ids have no slash."""


def _ask(sandbox: Sandbox, key: str, ask: Callable[[], Coroutine[Any, Any, Any]]) -> asyncio.Future[Any]:
    """The answer to a question, which is asked unless it is open already."""
    if key not in sandbox.open_questions:
        question = asyncio.ensure_future(ask())
        sandbox.open_questions[key] = (question, time.monotonic())
        question.add_done_callback(lambda done: _answered(sandbox, key, done))
    return sandbox.open_questions[key][0]


def _answered(sandbox: Sandbox, key: str, question: asyncio.Future[Any]) -> None:
    sandbox.open_questions.pop(key, None)
    error = None if question.cancelled() else question.exception()
    if error is not None and not isinstance(error, KataError):
        sandbox.tasks.log(f"a figure could not be had: {type(error).__name__}: {error}")


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
