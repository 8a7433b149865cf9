"""The running machine of a sandbox: hypervisor, connection to the agent, helpers; and how they end."""

from __future__ import annotations

import asyncio
import os

from kata import sysio
from kata.agent.client import AgentClient, Watcher
from kata.agent.text import escape_line
from kata.engine.lifecycle import boot, watch
from kata.engine.lifecycle.sandbox_state import Lifecycle, SandboxState
from kata.engine.log import GuestLines, LoggedDurations
from kata.errors import KataError, StateError, VMLostError
from kata.ttrpc.client import Client

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable
    from typing import TypeVar

    from kata.agent.client import CallSpan, Dial
    from kata.engine.lifecycle.booted_machine import BootedMachine
    from kata.engine.tasks import Tasks
    from kata.errors import GuestProtocolError
    from kata.hypervisor import protocols
    from kata.hypervisor.base import DiskError, Ended
    from kata.hypervisor.virtiofsd import FileServer
    from kata.journal import Journal
    from kata.network.user import NetworkPlan

    T = TypeVar("T")

LOST_NOTICE_S = 2.0
"""How long a broken agent connection waits for the hypervisor's own account of what happened, in seconds."""
FILES_NOTICE_S = 0.5
"""The same of the file server's end: where the hypervisor alone has its connection, it ends with that, and is reaped
first as often as not."""
CLOCK_AFTER_S = 1.0
"""How long after the guest is up its clock is looked at first, in seconds: it was set a moment ago, and a first
container is on its way."""
_FULL_DISK = "the host's disk is full"


class _Watcher(Watcher):
    """Tells the runtime what becomes of the connection to its agent."""

    def __init__(self, runtime: MachineRuntime) -> None:
        self._runtime = runtime

    async def on_connection_lost(self, error: VMLostError) -> KataError:
        return await self._runtime.await_exit_reason(error.message)

    def on_protocol_violation(self, error: GuestProtocolError) -> None:
        self._runtime.fail(error.message)


class MachineRuntime:
    """The machine, from the moment the event loop takes it over to its end.

    Args:
        sandbox_id: Its sandbox.
        run_dir: The sandbox's directory.
        journal: The sandbox's.
        machine: What was started before the event loop.
        tasks: The engine's.
        on_oom: Is given the id of a container in which the guest's kernel has killed something for want of memory.
        on_disk_error: Is given a sentence when a disk of the host fails: the first, and a full one.
        on_state: Is given each state that the sandbox enters, and why where that is said.

    Attributes:
        life: The sandbox's state, which this object and the sandbox's end change.
        vm: The hypervisor, once it has been taken over.
        machine: As given.
        agent_calls: How long the calls to the agent took.
        disk_error: What of the host's disks failed first; empty if nothing did.
        disk_errors: How many requests of the guest's failed so.
        trace: Of the agent's calls (`AgentClient.trace`).
    """

    def __init__(
        self,
        sandbox_id: str,
        run_dir: str,
        journal: Journal,
        machine: BootedMachine,
        tasks: Tasks,
        *,
        on_oom: Callable[[str], None],
        on_disk_error: Callable[[str], None],
        on_state: Callable[[SandboxState, KataError | None], None] = lambda state, reason: None,
    ) -> None:
        self.machine = machine
        self.trace: Callable[[str, str, float | None], CallSpan | None] | None = None
        self.life = Lifecycle(sandbox_id)
        self.vm: protocols.Machine | None = None
        self.agent_calls = LoggedDurations(tasks.lines, "the agent")
        tasks.lines.observers.append(self._show_traffic)
        self.disk_error = ""
        self.disk_errors = 0
        self._id = sandbox_id
        self._run_dir = run_dir
        self._journal = journal
        self._tasks = tasks
        self._on_oom = on_oom
        self._on_disk_error = on_disk_error
        self._on_state = on_state
        self._agent: AgentClient | None = None
        self._guest: AgentClient | None = None  # the same, from READY on
        self._exit: Ended | None = None
        self._boot: asyncio.Task[AgentClient] | None = None

    # ---- start ----

    def start(
        self, bring_up: Callable[[], Awaitable[AgentClient]], start_error: KataError | None = None
    ) -> None:
        """Take the machine over and bring its guest up; `ready` tells how that went.

        Args:
            bring_up: Sets the guest up, and returns its agent. It can use `vm` and `connect_agent`.
            start_error: Why the machine could not be started, if so.
        """
        self.enter(SandboxState.BOOTING)
        self._boot = asyncio.create_task(self._bring_up(bring_up, start_error))
        # Whoever asks gets the error; until then it is no surprise.
        self._boot.add_done_callback(lambda task: task.cancelled() or task.exception())

    async def _bring_up(
        self, bring_up: Callable[[], Awaitable[AgentClient]], start_error: KataError | None
    ) -> AgentClient:
        machine = self.machine
        self.vm = self._take_over()
        if self.vm is not None:
            self.vm.on_disk_error(self._disk_failed)
            self._show_traffic(self._tasks.lines.debugs)
            self._tasks.create_task(self._watch_machine(self.vm))
        if machine.cgroup is not None:
            for warning in machine.cgroup.warnings:
                self._tasks.log(warning)
        if machine.network is not None:
            self._watch_network(machine.network)
        if machine.files is not None:
            self._watch_files(machine.files)
        if start_error is not None:
            machine.free_boot_slot()
            self.terminate(start_error)
            raise start_error
        try:
            agent = await bring_up()
        except KataError as error:
            self.terminate(error)
            raise
        if self.life.may(SandboxState.READY):  # it may have been stopped, or be closing, meanwhile
            self.enter(SandboxState.READY)
        self._guest = agent
        self._tasks.create_task(self._watch_agent(agent))
        self._tasks.create_task(self._watch_memory(agent))
        self._tasks.create_task(self._keep_clock(agent))
        return agent

    def _show_traffic(self, shown: bool) -> None:
        """Write what the monitor and the guest's console say to the log, or no longer."""
        if self.vm is None:
            return
        if not shown:
            self.vm.on_traffic(None)
            return
        lines = GuestLines(self._tasks.lines)
        name = self.machine.monitor.name if self.machine.monitor is not None else ""

        def traffic(source: str, data: bytes) -> None:
            if source == "console":
                lines.feed(data)
            else:
                self._tasks.lines.write(f"{name} says {escape_line(data.decode(), 1024)}", "debug")

        self.vm.on_traffic(traffic)

    def _take_over(self) -> protocols.Machine | None:
        """The machine that was started before the event loop was."""
        machine = self.machine
        if machine.started is None or machine.monitor is None:
            return None
        if machine.waiting is not None:
            return machine.waiting.vm
        console = os.path.join(self._run_dir, boot.CONSOLE_NAME)
        return machine.monitor.adopt(machine.started, self._journal, console)

    async def connect_agent(self, patience: watch.Patience) -> AgentClient:
        """The connection to the agent; on a serial channel it is there before the guest is.

        Args:
            patience: How long the guest has, here and until its first answer.

        Raises:
            AgentTimeoutError: It did not listen in time.
            KataError: The machine's end.
        """
        assert self.vm is not None
        channel = self.vm.channel
        dial: Dial | None = None
        if not channel.is_single:

            async def further() -> Client:
                return await Client.connect(await channel.connect())

            dial = further
        if self.machine.waiting is not None:
            return self._agent_of(self.machine.waiting.client, dial)
        connecting = asyncio.ensure_future(channel.connect())
        try:
            await self.race_vm_exit(patience.wait(connecting, what=f"listen on {channel.url}"))
            sock = await connecting
        finally:
            connecting.cancel()
        made = self.machine.calls_made
        agent = self._agent_of(await Client.connect(sock, made=made.values()), dial)
        agent.calls_made = dict(made)
        return agent

    def _agent_of(self, client: Client, dial: Dial | None) -> AgentClient:
        self._agent = AgentClient(client, _Watcher(self), dial, self.agent_calls)
        self._agent.trace = self.trace
        return self._agent

    def abandon_boot(self) -> None:
        """Wait for the guest no longer, if it is not up yet."""
        if self._boot is not None and not self._boot.done():
            self._boot.cancel()

    # ---- use ----

    async def ready(self) -> AgentClient:
        """The agent, once the guest is up.

        Raises:
            StateError: No machine has been started yet.
            KataError: The guest did not come up, or is gone.
        """
        if self._boot is None:
            raise StateError(f"sandbox {self._id!r} has not been created")
        if self._guest is None:
            return await asyncio.shield(self._boot)  # whose error says more than that there is no machine
        if self.life.is_lost:
            raise self.life.lost_error()
        return self._guest

    async def race_vm_exit(self, work: Awaitable[T], *, outlives_caller: bool = False) -> T:
        """See `Lifecycle.race_vm_exit`."""
        return await self.life.race_vm_exit(work, outlives_caller=outlives_caller)

    @property
    def is_lost(self) -> bool:
        """Whether there is no machine any more."""
        return self.life.is_lost

    @property
    def lost_reason(self) -> str:
        """Why there is no machine any more; empty while there is."""
        return self.life.lost_reason

    @property
    def vm_runs(self) -> bool:
        """Whether the hypervisor's process is there, which ends a moment after a machine was given up."""
        return self.vm is not None and self._exit is None

    @property
    def vm_ended(self) -> Ended | None:
        """How the hypervisor's process ended; None while it is there."""
        return self._exit

    @property
    def living_agent(self) -> AgentClient | None:
        """The agent, if it can still be asked."""
        return None if self.life.is_lost else self._agent

    @property
    def host_pid(self) -> int:
        """The host process that stands for the processes in the guest: the hypervisor's."""
        return self.vm.pid if self.vm is not None else os.getpid()

    # ---- the end ----

    def fail(self, reason: str) -> None:
        """Give the machine up for *reason*: every live process ends as 137."""
        self.terminate(VMLostError(reason, "kata logs shows the container's output"))

    async def await_exit_reason(self, otherwise: str) -> KataError:
        """The agent is gone: wait a moment for the hypervisor's own account.

        Args:
            otherwise: Why the machine is given up if there is none.

        Returns:
            Why there is no machine any more.
        """
        try:
            await asyncio.wait_for(asyncio.shield(self.life.exit_reason), LOST_NOTICE_S)
        except TimeoutError:
            self.fail(otherwise)
        return self.life.lost_error()

    async def wait_terminated(self) -> None:
        """Return when there is no machine any more."""
        await asyncio.shield(self.life.exit_reason)

    async def stop(self) -> None:
        """End the machine on request; the engine goes on answering."""
        self.terminate(VMLostError(f"sandbox {self._id} was stopped"), SandboxState.STOPPED)
        if self.vm is not None:
            await self.vm.stop()

    def terminate(self, error: KataError, state: SandboxState = SandboxState.FAILED) -> None:
        """There is no machine any more, or there is to be none. The first reason stands.

        Args:
            error: Why.
            state: What the sandbox is then, unless its end has begun.
        """
        if self.life.is_lost:
            return
        self.enter(SandboxState.ENDING if self.life.is_ending else state, error)
        if self._agent is not None:
            self._agent.close()
        if self.vm is not None:
            self._tasks.create_task(self.vm.stop())

    def enter(self, state: SandboxState, reason: KataError | None = None) -> None:
        """See `Lifecycle.enter`; whoever was given as `on_state` is told."""
        self.life.enter(state, reason)
        self._on_state(state, reason)

    # ---- watching ----

    async def _watch_machine(self, vm: protocols.Machine) -> None:
        ended = self._exit = await vm.wait()
        cgroup = self.machine.cgroup
        if ended.status < 0 and cgroup is not None and cgroup.oom_kills():
            ended.error = VMLostError(
                "the host's kernel killed the virtual machine: with its helpers it reached the limit on memory"
                f" of its cgroup {cgroup.paths['memory']}",
                "The limit is the machine's memory and what running it takes: docs/architecture.md.",
            )
        self.terminate(ended.error or VMLostError("the virtual machine was stopped"))
        if self.machine.files is not None:
            self.machine.files.hang_up()

    def _watch_network(self, plan: NetworkPlan) -> None:
        """The death of the network's helper is logged, not fatal: the container may not need it any more."""
        for warning in plan.warnings:
            self._tasks.log(warning)

        def ended() -> None:
            failure = plan.failure()
            if failure is not None and not (self.life.is_ending or self.life.is_lost):
                self._tasks.log(f"{failure.message}: the guest has no network now")

        if plan.child is not None:
            plan.child.on_exit(ended)

    def _watch_files(self, server: FileServer) -> None:
        """Without its file server a guest would hang at its next look at a file of the host: end it instead."""

        def ended() -> None:
            failure = server.failure()
            if failure is not None and not (self.life.is_ending or self.life.is_lost):
                self._tasks.create_task(self._files_are_gone(failure))

        server.child.on_exit(ended)

    async def _files_are_gone(self, failure: KataError) -> None:
        """Give the machine up for want of its file server, unless it is the hypervisor that has ended."""
        try:
            await asyncio.wait_for(asyncio.shield(self.life.exit_reason), FILES_NOTICE_S)
        except TimeoutError:
            self.terminate(VMLostError(failure.message, failure.hint))

    async def _watch_agent(self, agent: AgentClient) -> None:
        assert self.vm is not None
        self.fail(await watch.watch(agent, self.vm.pid))

    async def _keep_clock(self, agent: AgentClient) -> None:
        """Keep the guest's clock right, from the moment on that the first container has most likely started."""
        with sysio.Fd(sysio.clock_change_timer()) as timer:
            await asyncio.sleep(CLOCK_AFTER_S)
            from kata.engine.lifecycle import guest_clock

            await guest_clock.keep(agent, timer, self._tasks.log)

    async def _watch_memory(self, agent: AgentClient) -> None:
        """Out-of-memory kills in the guest."""
        while True:
            try:
                container_id = await agent.oom_event()
            except KataError:
                return  # without it an exit of 137 is not explained; no reason to end anything
            self._on_oom(container_id)

    def _disk_failed(self, error: DiskError) -> None:
        """Log the first failure, and count all: the guest decides how many there are.

        A full disk stands for all others, because then what the guest has written is not there.
        """
        self.disk_errors += 1
        was = self.disk_error
        if was and (not error.full or _FULL_DISK in was):
            return
        if error.full:
            lost = "files that the container wrote may be incomplete"
            self.disk_error = f"{_FULL_DISK}: {error.path} could not be written, so {lost}"
        else:
            what = "written" if error.writes else "read"
            self.disk_error = f"{error.path} could not be {what} on the host: {error.reason}"
        self._on_disk_error(self.disk_error)
