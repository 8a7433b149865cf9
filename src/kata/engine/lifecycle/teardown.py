"""The end of a sandbox, as a list of named steps.

Their order is the point; each says why it is where it is. A step that fails is logged, and the next one runs: whatever
happens, what the journal names is undone at the end.
"""

from __future__ import annotations

import asyncio
import os

from kata.errors import KataError, VMLostError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Mapping
    from typing import Protocol

    from kata import sysio
    from kata.engine.containers.process import Process
    from kata.engine.forwarding.guestnet import GuestNetwork
    from kata.engine.forwarding.network_services import NetworkServices
    from kata.engine.lifecycle.machine_runtime import MachineRuntime
    from kata.engine.standard_streams.logger import Logger
    from kata.engine.tasks import Tasks
    from kata.journal import Journal
    from kata.resources.host_cgroup import HostCgroup

    class EndingContainer(Protocol):
        """What of a container counts at the end."""

        @property
        def init(self) -> Process:
            """Its first process."""

        @property
        def execs(self) -> Mapping[str, Process]:
            """Its others."""

        async def remove(self) -> None:
            """Take what is left of it out of the guest."""

    class EndingTrace(Protocol):
        """What of a trace has to end before its sandbox."""

        async def stop(self) -> None:
            """Leave the guest and the sandbox's cgroup alone from now on."""

    class EndingSandbox(Protocol):
        """What of a sandbox has an end of its own."""

        id: str
        journal: Journal
        runtime: MachineRuntime
        tasks: Tasks
        network_services: NetworkServices
        guest_network: GuestNetwork
        loggers: set[Logger]

        @property
        def containers(self) -> Mapping[str, EndingContainer]:
            """By their ids."""

        @property
        def trace(self) -> EndingTrace | None:
            """What records it, if anything does."""

        @property
        def is_discarded(self) -> bool:
            """Whether nobody will read what the containers wrote to their own disks."""

        @property
        def removed_directory(self) -> str:
            """The container's lasting directory, if it goes with the sandbox; otherwise empty."""

        def tell_of_removal(self) -> None:
            """Have it recorded that this directory has gone, if it has."""

        @property
        def held(self) -> list[sysio.Fd]:
            """Removed files whose space is freed when nobody waits for the end any more."""


WATCHER_S = 5.0
"""How long the end of a process may take to be recorded once its machine is gone, in seconds."""


class Teardown:
    """Takes one sandbox down.

    Args:
        sandbox: Which.
        grace_s: How long the guest has to write back what its containers have written, in seconds.
    """

    def __init__(self, sandbox: EndingSandbox, grace_s: float) -> None:
        self._sandbox = sandbox
        self._runtime = sandbox.runtime
        self._tasks = sandbox.tasks
        self._grace_s = grace_s
        self._leaving: asyncio.Future[None] | None = None

    def steps(self) -> tuple[Callable[[], Awaitable[None]], ...]:
        """What is done, in this order."""
        return (
            self.stop_trace,  # before anything: the guest's part is in the guest, and its helper in our cgroup
            self.remove_containers,  # first: what they wrote has to reach their disks
            self.stop_network_services,  # before a machine that was not discarded: nobody connects to what goes
            self.give_up_machine,  # from here on every call that waits for the guest ends
            self.leave_cgroup,  # out of what is about to be removed; takes as long as the machine takes to end
            self.hang_up_on_files,  # not before the hypervisor is killed, which would tell of it
            self.stop_machine,
            self.stop_file_server,  # after the hypervisor, whose end ends it at the latest
            self.await_left_cgroup,
            self.stop_network,  # after the hypervisor, which holds the other end of its wire
            self.report_ends,  # whoever was not told by the guest is told now: no client waits for ever
            self.stop_loggers,  # after the last output
            self.undo_journals,  # last: everything that the journal names has been closed
        )

    async def run(self) -> None:
        """Carry all steps out. Does not raise."""
        for step in self.steps():
            try:
                await step()
            except Exception as error:
                self._tasks.log(f"the end of the sandbox: {step.__name__} failed: {error!r}")

    async def stop_trace(self) -> None:
        """Take the guest's spans, and start no helper any more."""
        if self._sandbox.trace is not None:
            await self._sandbox.trace.stop()

    async def remove_containers(self) -> None:
        """Have the guest unmount and sync. Of a container that is removed, nobody will read what it wrote."""
        if self._sandbox.is_discarded or self._runtime.is_lost or not self._sandbox.containers:
            return
        removals = [asyncio.ensure_future(one.remove()) for one in self._sandbox.containers.values()]
        try:
            _, late = await self._runtime.race_vm_exit(asyncio.wait(removals, timeout=self._grace_s))
        except KataError:
            late = set(removals)  # the machine has gone, which has been logged
        else:
            if late:
                told = "the guest did not write back its containers' files within"
                self._tasks.log(f"{told} {self._grace_s:g} s")
        for removal in late:
            removal.cancel()

    async def stop_network_services(self) -> None:
        """Carry nothing into the guest any more."""
        self._runtime.abandon_boot()
        self._sandbox.network_services.close()
        self._sandbox.guest_network.close()

    async def give_up_machine(self) -> None:
        """Every live process ends as 137."""
        self._runtime.terminate(VMLostError(f"sandbox {self._sandbox.id} has ended"))

    async def leave_cgroup(self) -> None:
        """Begin to move the engine out of the sandbox's cgroups, and to load what the last step needs."""
        cgroup = self._runtime.machine.cgroup
        self._leaving = asyncio.ensure_future(self._tasks.run_blocking(_leave, cgroup))

    async def hang_up_on_files(self) -> None:
        """Have virtiofsd end beside the hypervisor, which is being killed."""
        files = self._runtime.machine.files
        if files is not None:
            await asyncio.sleep(0)  # by now it has been: `MachineRuntime.terminate` has a task for that
            files.child.unwatch()
            files.hang_up()

    async def stop_machine(self) -> None:
        """End the hypervisor."""
        if self._runtime.vm is not None:
            await self._runtime.vm.stop()
            self._runtime.vm.close()

    async def stop_file_server(self) -> None:
        """End virtiofsd."""
        files = self._runtime.machine.files
        if files is not None:
            files.child.unwatch()
            await self._tasks.run_blocking(files.stop)

    async def await_left_cgroup(self) -> None:
        """Return when the engine is out of the sandbox's cgroups."""
        if self._leaving is not None:
            await self._leaving

    async def stop_network(self) -> None:
        """End the network's helper."""
        plan = self._runtime.machine.network
        if plan is not None:
            if plan.child is not None:
                plan.child.unwatch()
            await self._tasks.run_blocking(plan.stop)

    async def report_ends(self) -> None:
        """Wait until the end of each process is on record, and close what has no end to record."""
        for container in self._sandbox.containers.values():
            for process in (container.init, *container.execs.values()):
                if process.watcher is not None:
                    await asyncio.wait([process.watcher], timeout=WATCHER_S)
                elif process.streams is not None:
                    process.streams.close()

    async def stop_loggers(self) -> None:
        """Let logging programs read to the end."""
        await asyncio.gather(*(logger.leave() for logger in self._sandbox.loggers))

    async def undo_journals(self) -> None:
        """Undo what the journals name: first the container's lasting one, if it is not to be kept; then the others."""
        await self._tasks.run_blocking(self._undo_lasting)
        self._sandbox.tell_of_removal()  # the command, which would do it otherwise, finds nothing any more
        await self._tasks.run_blocking(self._undo)

    def _undo_lasting(self) -> None:
        from kata import journal_undo
        from kata.errors import JournalError
        from kata.journal import FILE_NAME, Journal

        directory = self._sandbox.removed_directory
        if not directory:
            return
        try:
            lasting = Journal.open(os.path.join(directory, FILE_NAME))
            problems = journal_undo.undo(lasting, held=self._sandbox.held)
        except (JournalError, OSError) as error:
            problems = [f"cannot remove {directory}: {error}"]
        for problem in problems:
            self._tasks.log(problem)

    def _undo(self) -> None:
        from kata import journal_undo

        problems = journal_undo.undo(self._sandbox.journal, held=self._sandbox.held)
        waiting = self._runtime.machine.waiting
        if waiting is not None:
            problems += journal_undo.undo(waiting.journal)
        for problem in problems:
            self._tasks.log(problem)


def _leave(cgroup: HostCgroup | None) -> None:
    """Leave the sandbox's cgroups, and load what undoes the journals, and what that imports."""
    if cgroup is not None:
        cgroup.leave()
    from kata import journal_undo, mount_table  # noqa: F401
