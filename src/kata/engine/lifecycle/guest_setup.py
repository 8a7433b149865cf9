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
from kata.engine.containers.spec import GUEST_SHARE
from kata.engine.lifecycle.sandbox_state import SandboxState
from kata.errors import HypervisorError, KataError, VMLostError
from kata.proto import agent_pb

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any, Protocol

    from kata.agent.client import AgentClient
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

        @property
        def dns(self) -> list[str]:
            """Lines of the guest's resolv.conf; empty without a network."""


READY_S = 60.0
"""How long a guest may take to answer, in seconds; it takes one, but a host may be busy, or itself an emulated machine.
The sandbox's settings may say otherwise (`kata.settings.GuestSettings`)."""
BOOT_SLOT_S = 1.0
"""How long a machine that is up keeps its boot slot for a first container, in seconds."""
# Not nosuid: an image's sudo and ping work as they do elsewhere. (What the host exports is nosuid for the host itself.)
SHARE_MOUNT_OPTIONS = {
    "9p": ["trans=virtio", "version=9p2000.L", "nodev"],
    "virtio-fs": ["nodev"],
}
SHARE_MSIZE = 512000
SEED_BYTES = 512
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
        if step.name != SETTING_UP and not asked and not _ended_otherwise(sandbox.runtime):
            sandbox.runtime.machine.distrust_template(error)
        raise explain(sandbox, step.name, error) from error
    finally:
        # Its first container's start frees the boot slot, for which a client may take its time.
        machine = sandbox.runtime.machine
        asyncio.get_running_loop().call_later(BOOT_SLOT_S, machine.free_boot_slot)


def _ended_otherwise(runtime: MachineRuntime) -> bool:
    """Whether it is known of a machine that did not come up that its template is not why."""
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
    step.name = "waiting for the agent in the guest"
    ready_s = sandbox.settings.described().guest.ready_s or READY_S
    agent = await runtime.connect_agent(ready_s)
    has_waited = runtime.machine.waiting is not None
    if not has_waited:  # otherwise it has just answered, and drawn nothing since it was seeded
        await _healthy(agent, runtime.life.exit_reason, ready_s)
    answered_ns = time.monotonic_ns()

    step.name = SETTING_UP
    if runtime.machine.is_clone and not has_waited:
        # Before anything else draws from what it has of its template's.
        await agent.reseed(os.urandom(SEED_BYTES))
    features = asyncio.ensure_future(agent.negotiate_features())
    _begin_network(sandbox, agent, features)
    assert runtime.vm is not None
    await runtime.race_vm_exit(
        asyncio.gather(
            runtime.vm.confined(),
            agent.create_sandbox(_request(sandbox)),
            features,
            agent.set_time(time.time_ns()),
            agent.reseed(os.urandom(SEED_BYTES)),
        )
    )
    if runtime.machine.is_clone:
        sandbox.timings.add("restore", runtime.machine.started_ns, answered_ns)
    else:
        sandbox.tasks.create_task(_guest_times(sandbox, agent, answered_ns))
    sandbox.timings.add("agent", answered_ns)
    return agent


async def _healthy(agent: AgentClient, exit_reason: asyncio.Future[KataError], timeout_s: float) -> None:
    """Return when the agent serves.

    On a serial channel the question waits in the pipe until the guest's driver takes it: one call is enough,
    no polling, and the answer comes the moment that the agent can give it.
    """
    check = asyncio.ensure_future(agent.check(timeout_s))
    both: set[asyncio.Future[Any]] = {check, exit_reason}
    try:
        await asyncio.wait(both, return_when=asyncio.FIRST_COMPLETED)
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


def _request(sandbox: BootingSandbox) -> agent_pb.CreateSandboxRequest:
    settings = sandbox.settings
    return agent_pb.CreateSandboxRequest(
        # A container without a name of its own has the host's, as with a runtime that shares the host's kernel.
        hostname=settings.hostname or os.uname().nodename,
        dns=sandbox.dns,
        storages=_share(sandbox),
        sandbox_id=sandbox.id,
        kernel_modules=[
            agent_pb.KernelModule(name=name, parameters=parameters)
            for name, *parameters in settings.described().guest.modules
        ],
    )


def _share(sandbox: BootingSandbox) -> list[agent_pb.Storage]:
    """The mount of the sandbox's share in the guest, if there is one."""
    machine, described = sandbox.runtime.machine, sandbox.settings.described()
    if machine.share is None:
        return []
    kind = "9p" if machine.files is None else "virtio-fs"
    options = list(SHARE_MOUNT_OPTIONS[kind])
    if kind == "9p":
        options += [
            f"msize={described.share.msize or SHARE_MSIZE}",
            f"cache={_9p_cache(described.guest.kernel_version)}",
        ]
    return [
        agent_pb.Storage(
            driver=kind,
            source=machine.started.share_tag if machine.started is not None else "",
            fstype=kind.replace("-", ""),
            options=options,
            mount_point=GUEST_SHARE,
        )
    ]


def _9p_cache(kernel_version: str) -> str:
    """What a guest keeps of files that it has by 9p (the kernel's Documentation/filesystems/9p.rst).

    Until Linux 6.4 ``mmap`` keeps what is mapped and nothing else. From then on it is a cache with write-back that
    nothing invalidates: what others change is not seen, and what is written arrives late or, when the machine is
    killed, never. Without a cache all that is right, and shared writable mappings are refused.
    """
    numbers = [int(part) for part in kernel_version.split(".")[:2] if part.isdecimal()]
    return "mmap" if len(numbers) == 2 and numbers < [6, 4] else "none"


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


def explain(sandbox: BootingSandbox, step: str, error: KataError) -> KataError:
    """*error* with what helps to find out why a guest did not come up; the class stays."""
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
    error.message = text
    error.args = (text,)
    error.hint = error.hint or "kata guest info shows the guest's files, kata doctor checks the host"
    return error
