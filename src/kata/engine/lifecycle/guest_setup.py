"""How a guest comes up once its machine runs: the second half of a start, when the event loop is there.

`kata.engine.lifecycle.boot` is the first half.
"""

from __future__ import annotations

import asyncio
import os
import time

from kata import sysio
from kata.agent.client import boot_times
from kata.agent.text import last_lines
from kata.engine.lifecycle import first_calls, watch
from kata.engine.lifecycle.first_calls import READY_S, SEED_BYTES
from kata.engine.lifecycle.sandbox_state import SandboxState
from kata.errors import AgentTimeoutError, HypervisorError, KataError, StarvedError, VMLostError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Awaitable, Coroutine
    from typing import Any, Protocol

    from kata.agent.client import AgentClient
    from kata.engine.factory.waiting_machine import Waiting
    from kata.engine.forwarding.guestnet import GuestNetwork
    from kata.engine.forwarding.network_services import NetworkServices
    from kata.engine.lifecycle.machine_runtime import MachineRuntime
    from kata.engine.tasks import Tasks
    from kata.engine.timings import Timings
    from kata.settings import SandboxSettings

    class BootingSandbox(Protocol):
        """What setting a guest up takes of its sandbox."""

        id: str
        settings: SandboxSettings
        runtime: MachineRuntime
        tasks: Tasks
        timings: Timings
        guest_network: GuestNetwork
        network_services: NetworkServices


PROCESSORS_S = 3.0
"""How long the report of a guest that does not answer waits for its monitor."""
BOOT_SLOT_S = 1.0
"""How long a machine that is up keeps its boot slot for a first container, in seconds."""
SETTING_UP = "setting up the guest"
_KILLED = (-sysio.SIGKILL, -sysio.SIGTERM, -1, -2)
"""Exit statuses of a monitor that somebody has ended, as with SIGHUP and SIGINT."""


async def bring_up(sandbox: BootingSandbox) -> AgentClient:
    """Wait for the agent and set the guest up, all at once where one thing does not need the other.

    Returns:
        The agent, ready for CreateContainer. The network may still be on its way (`NetworkServices.configured`).

    Raises:
        KataError: With the last step that was reached, whether the machine lives, and what its console said.
    """
    step = _Step()
    try:
        agent = await _bring_up(sandbox, step)
        sandbox.runtime.machine.is_up = True
        return agent
    except KataError as error:
        # It never answered, and nobody has ended it.
        asked = sandbox.runtime.life.state not in (SandboxState.BOOTING, SandboxState.FAILED)
        if step.name != SETTING_UP and not asked and not _ended_otherwise(sandbox.runtime, error):
            sandbox.runtime.machine.distrust_template(error)
        raise explain(sandbox, step.name, error, await _processors(sandbox.runtime, error)) from error
    finally:
        # Its first container's start frees the boot slot, for which a client may take its time.
        machine = sandbox.runtime.machine
        asyncio.get_running_loop().call_later(BOOT_SLOT_S, machine.free_boot_slot)


async def _processors(runtime: MachineRuntime, error: KataError) -> list[str]:
    """Where the processors of a machine stand whose agent does not answer, a line each; none if nobody can tell."""
    if not isinstance(error, AgentTimeoutError) or runtime.vm is None or not runtime.vm_runs:
        return []
    try:
        return await asyncio.wait_for(runtime.vm.processors(), PROCESSORS_S)
    except (KataError, TimeoutError):
        return []


def _ended_otherwise(runtime: MachineRuntime, error: KataError) -> bool:
    """Whether it is known of a machine that did not come up that its template is not why.

    Args:
        runtime: The machine's.
        error: What came of its start.
    """
    if isinstance(error, StarvedError):
        return True
    files = runtime.machine.files
    ended = runtime.vm_ended
    if ended is None or ended.reason == "stopped":  # it stood still; or it was given up
        return files is not None and files.failure() is not None
    if ended.status in _KILLED:
        cgroup = runtime.machine.cgroup
        return cgroup is None or not cgroup.oom_kills()
    # Of the host's memory, say, there was not enough.
    return ended.reason == "ended" or not isinstance(ended.error, (HypervisorError, VMLostError))


class _Step:
    __slots__ = ("name",)

    def __init__(self) -> None:
        self.name = "starting the hypervisor"


async def _bring_up(sandbox: BootingSandbox, step: _Step) -> AgentClient:
    # What is needed only later is loaded now, while there is nothing to do but wait.
    from kata import journal_undo  # noqa: F401
    from kata.engine.lifecycle import teardown  # noqa: F401
    from kata.proto import types_pb  # noqa: F401

    runtime = sandbox.runtime
    machine = runtime.machine
    step.name = "waiting for the agent in the guest"
    assert runtime.vm is not None
    patience = watch.Patience(runtime.vm.pid, sandbox.settings.described().guest.ready_s or READY_S)
    agent = await runtime.connect_agent(patience)
    has_waited = machine.waiting is not None
    seeds_first = (
        machine.is_clone and not has_waited
    )  # one that waited has drawn nothing since it was seeded
    if machine.calls_made:
        await _answered(
            agent.reseed(b"", None), runtime.life.exit_reason, patience
        )  # with what it was given
    elif not has_waited:  # otherwise it has just answered
        await _answered(agent.check(None), runtime.life.exit_reason, patience)
    answered_ns = time.monotonic_ns()

    step.name = SETTING_UP
    if seeds_first and not machine.calls_made:
        # Before anything else draws from what it has of its template's.
        await agent.reseed(os.urandom(SEED_BYTES))
    features = asyncio.ensure_future(_learn_features(agent, machine.waiting))
    _begin_network(sandbox, agent, features)
    calls: list[Awaitable[object]] = [
        runtime.vm.confined(),
        agent.create_sandbox(first_calls.sandbox_request(machine, sandbox.settings)),
        features,
        agent.set_time(time.time_ns()),
    ]
    if not seeds_first:
        calls.append(agent.reseed(os.urandom(SEED_BYTES)))
    await runtime.race_vm_exit(asyncio.gather(*calls))
    if runtime.machine.is_clone:
        sandbox.timings.add("restore", runtime.machine.started_ns, answered_ns)
    else:
        sandbox.tasks.create_task(_guest_times(sandbox, agent, answered_ns))
    sandbox.timings.add("agent", answered_ns)
    return agent


async def _learn_features(agent: AgentClient, waiting: Waiting | None) -> None:
    """Have the agent's extensions of the protocol known; of a machine that waited they are."""
    if waiting is not None:
        agent.features = waiting.features
    else:
        await agent.negotiate_features()


async def _answered(
    call: Coroutine[Any, Any, None], exit_reason: asyncio.Future[KataError], patience: watch.Patience
) -> None:
    """Return when the agent has answered its first call.

    On a serial channel the question waits in the pipe until the guest's driver takes it: one call is enough,
    no polling, and the answer comes the moment that the agent can give it.
    """
    check = asyncio.ensure_future(call)
    try:
        await patience.wait(check, exit_reason)
        if exit_reason.done():
            raise exit_reason.result()
        await check
    finally:
        check.cancel()


def _begin_network(sandbox: BootingSandbox, agent: AgentClient, features: asyncio.Future[None]) -> None:
    """Begin to give the guest its network, once it is known what its agent can do."""

    async def configure() -> None:
        await features
        await sandbox.guest_network.configure(agent)

    configured = asyncio.ensure_future(configure())
    # A start that never comes does not ask how it went.
    configured.add_done_callback(lambda task: task.cancelled() or task.exception())
    sandbox.network_services.configured = configured


async def _guest_times(sandbox: BootingSandbox, agent: AgentClient, answered_ns: int) -> None:
    """Split the time until the agent's first answer by what the guest's own clock says."""
    times = await boot_times(agent)
    if times is None:
        return
    started = sandbox.runtime.machine.started_ns
    # The guest's clock began with its kernel; the answer was on its way for less than a millisecond.
    kernel_began = max(started, answered_ns - times.ready_ns)
    agent_began = min(answered_ns, kernel_began + times.kernel_ns)
    sandbox.timings.add("hypervisor process", started, kernel_began)
    sandbox.timings.add("kernel", kernel_began, agent_began)
    sandbox.timings.add("agent start", agent_began, answered_ns)


def explain(sandbox: BootingSandbox, step: str, error: KataError, processors: list[str]) -> KataError:
    """*error* with what helps to find out why a guest did not come up; the class stays.

    Args:
        sandbox: Whose guest it is.
        step: What was waited for, as a clause.
        error: What came of it.
        processors: Where those of the machine stand, a line each, if that is known.
    """
    guest = sandbox.settings.described().guest
    vm = sandbox.runtime.vm
    if vm is None:
        return error
    state = "still running" if sandbox.runtime.vm_runs else "gone"
    text = (
        f"{error.message} (while {step}; the virtual machine is {state};"
        f" kernel {guest.kernel}, initrd {guest.initrd})"
    )
    lines = last_lines(vm.console_tail().encode())
    if lines:
        text += "\nthe guest's console ends with:\n" + "\n".join(f"  {line}" for line in lines)
    else:
        text += "; the guest wrote nothing to its console"
    if processors:
        text += "\nits processors:\n" + "\n".join(f"  {line}" for line in processors)
    error.message = text
    error.args = (text,)
    error.hint = error.hint or "kata guest info shows the guest's files, kata doctor checks the host"
    return error
