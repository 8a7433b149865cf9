"""One sandbox: the virtual machine, the agent, the containers in it, and how it all ends."""

from __future__ import annotations

import asyncio
import os
import sys
import time
from concurrent.futures import ThreadPoolExecutor

from kata.agent.client import AgentClient, Watcher
from kata.agent.text import escape_line
from kata.engine import boot, prepare, spec, watch
from kata.engine.container import REMOVE_S, Container
from kata.engine.fitting import Fitting
from kata.engine.guestnet import GuestNetwork
from kata.engine.sandbox_state import Lifecycle, SandboxState
from kata.engine.timings import Timings
from kata.errors import (
    AgentTimeoutError,
    AlreadyExistsError,
    GuestProtocolError,
    KataError,
    NotFoundError,
    StateError,
    UnsupportedError,
    VMLostError,
)
from kata.ttrpc.client import Client

TYPE_CHECKING = False
if TYPE_CHECKING:
    import socket
    from collections.abc import Awaitable, Callable, Coroutine
    from typing import Any, TypeVar

    from kata.agent.client import Dial
    from kata.engine import forward, names, sockets
    from kata.engine.boot import Machine
    from kata.engine.hostroot import HostRoot
    from kata.engine.logger import Logger
    from kata.engine.process import Process, Stdio
    from kata.hypervisor.base import DiskError, Ended, Hypervisor
    from kata.hypervisor.virtiofsd import FileServer
    from kata.journal import Journal
    from kata.network import sk_lookup
    from kata.network.user import NetworkPlan
    from kata.proto.codec import Message
    from kata.settings import SandboxSettings

    T = TypeVar("T")

NOTABLE_NS = 1_000_000
"""A shorter wait for a turn is none."""
_FULL_DISK = "the host's disk is full"
LOST_NOTICE_S = 2.0
"""How long a broken agent connection waits for the machine's own account of what happened."""


class _Watcher(Watcher):
    """Tells the sandbox what becomes of the connection to its agent."""

    def __init__(self, sandbox: Sandbox) -> None:
        self._sandbox = sandbox

    async def on_connection_lost(self, error: VMLostError) -> KataError:
        return await self._sandbox.await_exit_reason(error.message)

    def on_protocol_violation(self, error: GuestProtocolError) -> None:
        self._sandbox.fail(error.message)


def _open_log_fifo(path: str) -> int:
    """Where containerd looks for a shim's log; -1 when there is none, or no reader."""
    try:
        return os.open(path, os.O_WRONLY | os.O_NONBLOCK | os.O_CLOEXEC) if path else -1
    except OSError:
        return -1


class Sandbox:
    """Everything of one engine.

    Args:
        settings: What its client wants.
        run_dir: The sandbox's directory.
        journal: Its journal.
        machine: What was started before the event loop.
        failed: Why that did not succeed, or None.
        publish: Is given (topic, event) for every event of a task; must not block.
    """

    def __init__(
        self,
        settings: SandboxSettings,
        run_dir: str,
        journal: Journal,
        machine: Machine,
        failed: KataError | None,
        publish: Callable[[str, Message], None] | None = None,
    ) -> None:
        from kata.journal import process_identity

        self.settings = settings
        self.id = settings.id
        self.run_dir = run_dir
        self.journal = journal
        self.machine = machine
        self.share = machine.share
        self.publish = publish or (lambda topic, event: None)
        me = process_identity(os.getpid())
        self.identity = {"pid": me["pid"], "starttime": me["start"], "boot_id": me["boot"]}
        self.timings = Timings(settings.request_started_ns or time.monotonic_ns())
        self.containers: dict[str, Container] = {}
        self.vm: Hypervisor | None = None
        self.network: asyncio.Future[None] | None = None
        self.life = Lifecycle(self.id)
        self.had_container = False
        self.saw_stale_client = False  # a client has asked about a container since there is none (any more)
        self.disk_error = ""  # what of the host's disks failed first, for those who look
        self.disk_errors = 0
        self.fitting = Fitting(self)
        self.guest_network = GuestNetwork(self)
        self._start_error = failed
        self._agent: AgentClient | None = None
        self._guest: AgentClient | None = None  # the same, from READY on
        self._exit: Ended | None = None
        self._booted: asyncio.Task[AgentClient] | None = None
        self._forwarder: forward.Forwarder | None = None
        self._loopback_redirect: sk_lookup.LoopbackRedirect | None = None
        self._names: names.Names | None = None  # once a container asks Docker's resolver
        self.socket_forwarding: sockets.SocketForwardingState | None = (
            None  # once a container has a socket of the host's
        )
        self._end_task: asyncio.Task[None] | None = None
        self._tasks: set[asyncio.Task[Any]] = set()
        self._loggers: set[Logger] = set()
        self._log_fifo = _open_log_fifo(settings.client.log_fifo)
        self._thread = ThreadPoolExecutor(1, "helper")
        self.client = settings.client
        self.is_pod = settings.pod is not None

    @property
    def auto_remove(self) -> bool:
        """Whether the container's directory goes with the sandbox."""
        return self.settings.container is not None and self.settings.container.auto_remove

    # ---- start ----

    def power_on(self) -> None:
        """Start the machine of a pod, which has only now been described. Blocks; before the first call of
        `run_blocking`.

        Raises:
            KataError: Something is missing on this host.
        """
        self.fitting = Fitting(self)
        self.guest_network = GuestNetwork(self)
        self.had_container = True  # from now on somebody has to say when it is no longer wanted
        began = time.monotonic_ns()
        try:
            boot.power_on(self.settings, self.run_dir, self.journal, self.machine)
        except KataError as error:
            self._start_error = error
        self.share = self.machine.share
        self.start(began, time.monotonic_ns())
        if self._start_error is not None:
            raise self._start_error

    def start(self, began_ns: int, done_ns: int) -> None:
        """Take the machine over and bring it up; `ready` tells how that went.

        Args:
            began_ns: When its start was begun, by CLOCK_MONOTONIC.
            done_ns: When it was started, or had failed to.
        """
        self._enter(SandboxState.BOOTING)
        machine = self.machine
        self.timings.add("engine", began_ns, machine.ready_ns or done_ns)
        if machine.started_ns - machine.ready_ns > NOTABLE_NS:
            self.timings.add("turn", machine.ready_ns, machine.started_ns)
        self._booted = asyncio.create_task(self._boot())
        # Whoever asks gets the error; until then it is no surprise.
        self._booted.add_done_callback(lambda task: task.cancelled() or task.exception())

    async def _boot(self) -> AgentClient:
        for note in self.settings.notes:
            self.log(note)
        self.vm = self._take_over()
        if self.vm is not None:
            self.vm.on_disk_error(self._disk_failed)
            self.create_task(self._watch_machine(self.vm))
        if self.machine.cgroup is not None:
            for warning in self.machine.cgroup.warnings:
                self.log(warning)
        if self.machine.network is not None:
            self._watch_network(self.machine.network)
        if self.machine.files is not None:
            self._watch_files(self.machine.files)
        if self._start_error is not None:
            self.machine.end_turn()
            self._terminate(self._start_error)
            raise self._start_error
        try:
            agent = await boot.bring_up(self)
            self._forward(agent)
        except KataError as error:
            self._terminate(error)
            raise
        if self.life.may(SandboxState.READY):  # it may have been stopped, or be closing, meanwhile
            self._enter(SandboxState.READY)
        self._guest = agent
        self.create_task(self._watch_agent(agent))
        self.create_task(self._watch_memory(agent))
        return agent

    def _forward(self, agent: AgentClient) -> None:
        """Pass connections to published ports and to the namespace's loopback on to the guest, where both can do that.

        Raises:
            UnsupportedError: The guest's agent cannot, and a published port needs it.
        """
        from kata.agent import dial

        plan = self.machine.network
        if plan is None or not (plan.listeners or plan.external_netns):
            return
        from kata.engine import forward

        if plan.listeners:
            if dial.INTERNET_FEATURE not in agent.features:
                raise UnsupportedError(
                    "neither this host's passt nor the guest's agent can publish TCP ports as it should be",
                    "use the guest that this program builds (kata guest build), or a newer passt",
                )
            self._forwarder = forward.published(self, plan)
        if not plan.external_netns or dial.FEATURE not in agent.features:
            return
        from kata.network import sk_lookup

        try:
            self._loopback_redirect = sk_lookup.LoopbackRedirect()
        except KataError as error:
            self.log(f"{error.message}. {error.hint}")
        else:
            self._forwarder = forward.to_loopback(self, self._loopback_redirect.listeners)

    def _take_over(self) -> Hypervisor | None:
        """The machine that was started before the event loop was."""
        from kata.hypervisor.qemu.machine import Qemu

        process = self.machine.process
        if process is None:
            return None
        return Qemu(process, self.journal, os.path.join(self.run_dir, boot.CONSOLE_NAME))

    async def connect_agent(self, timeout_s: float) -> AgentClient:
        """The connection to the agent; on a serial channel it is there before the guest is.

        Raises:
            AgentTimeoutError: It did not listen on its vsock in time.
            KataError: The machine's end.
        """
        import socket

        assert self.vm is not None
        dial: Dial | None = None
        if self.vm.agent_cid is None:
            sock: socket.socket = socket.socket(fileno=self.vm.take_agent_fd())
            sock.setblocking(False)
        else:
            from kata.hypervisor import vsock

            cid = self.vm.agent_cid

            async def further() -> Client:
                return await Client.connect(await vsock.connect(cid))

            dial = further
            waiting = asyncio.wait_for(vsock.connect(cid), timeout_s)
            try:
                sock = await self.race_vm_exit(waiting)
            except TimeoutError:
                raise AgentTimeoutError(
                    f"the agent did not listen on vsock {self.vm.agent_cid}:{vsock.AGENT_PORT}"
                    f" within {timeout_s:g} s"
                ) from None
        self._agent = AgentClient(await Client.connect(sock), _Watcher(self), dial)
        return self._agent

    async def ready(self) -> AgentClient:
        """The agent, once the guest is up.

        Raises:
            KataError: It did not come up, or is gone.
        """
        if self._booted is None:
            raise StateError(f"sandbox {self.id!r} has not been created")
        if self._guest is None:
            return await asyncio.shield(self._booted)  # whose error says more than that there is no machine
        if self.life.is_lost:
            raise self.life.lost_error()
        return self._guest

    async def network_up(self) -> None:
        """Return when the guest's network is as it should be.

        Raises:
            KataError: It could not be set up.
        """
        if self.network is not None:
            await self.race_vm_exit(self.network)
        await self.guest_network.come_up()

    async def names_up(self, config: dict[str, Any]) -> None:
        """Return when a container can ask for names, of whom its ``resolv.conf`` says. What fails is told in the log.

        Args:
            config: Its specification.
        """
        from kata.agent import dial
        from kata.network import resolver

        plan = self.machine.network
        if plan is None or not plan.external_netns:
            return
        if self._names is None and resolver.DOCKER not in await self.run_blocking(
            prepare.name_servers, config, self.dns
        ):
            return
        try:
            if self._names is None:
                agent = await self.ready()
                if dial.INTERNET_FEATURE not in agent.features:
                    raise UnsupportedError("the guest's agent cannot do that", "kata guest build")
                from kata.engine import names

                self._names = names.Names(self)
                try:
                    await self.race_vm_exit(self._names.start(agent))
                except BaseException:
                    # The next container that asks there has it tried again.
                    self._names.close()
                    self._names = None
                    raise
            await self.run_blocking(plan.let_replies_in)
        except KataError as error:
            self.log(f"not all names are found ({resolver.DOCKER}): {error.message}")

    async def race_vm_exit(self, work: Awaitable[T]) -> T:
        """See `Lifecycle.race_vm_exit`."""
        return await self.life.race_vm_exit(work)

    @property
    def dns(self) -> list[str]:
        """Lines of the guest's resolv.conf; empty without a network."""
        if self.settings.resolv_conf is not None:
            return self.settings.resolv_conf
        plan = self.machine.network
        return plan.resolv_conf().splitlines() if plan is not None else []

    @property
    def address(self) -> str:
        """The guest's address for ``/etc/hosts``; empty if it has none."""
        plan = self.machine.network
        if plan is None or plan.interface is None:
            return ""
        addresses = plan.interface["IPAddresses"]
        return str(addresses[0]["address"]) if addresses else ""

    # ---- containers ----

    async def create(
        self,
        container_id: str,
        bundle: str,
        config: dict[str, Any],
        stdio: Stdio,
        root: HostRoot | None = None,
    ) -> Container:
        """Make a container; *root* is its root directory on the host, where a client hands one over.

        Raises:
            AlreadyExistsError: The id is taken.
            KataError: Anything that went wrong; nothing of it is left then.
        """
        if container_id in self.containers:
            raise AlreadyExistsError(f"container {container_id!r} exists already")
        if self.life.is_ending:
            raise self.life.lost_error()
        container = Container(self, container_id, bundle, config, stdio, root)
        self.containers[container_id] = container
        self.saw_stale_client = False
        try:
            await container.create()
        except BaseException:
            self.containers.pop(container_id, None)
            raise
        self.had_container = True
        self._update_oom_score()
        return container

    def _update_oom_score(self) -> None:
        """A pod's machine is as expendable to the host as the most expendable of its containers."""
        scores = [
            spec.oom_score_adj(one.config)
            for one in self.containers.values()
            if spec.container_type(one.config) == "pod_container"
        ]
        if scores:
            from kata.resources import oom_score

            oom_score.set_machine(max(scores))

    def container(self, container_id: str, *, may_come: bool = False) -> Container:
        """The container with this id.

        Args:
            container_id: Its id.
            may_come: Whether a client may ask before its Create has arrived (for one whose input ends at once);
                else who asks for what there is not has lost the thread.

        Raises:
            NotFoundError: There is none, or it is still being made, as with runc: who deleted it now would wait for
                the end of a process that nobody has told to end.
        """
        found = self.containers.get(container_id)
        if found is None or not found.created_at_ns:
            # A pod of the Sandbox API is one without a container as well.
            self.saw_stale_client |= self.client.ends_when_stale and not (
                may_come or self.is_pod or self.containers
            )
            raise NotFoundError(f"container {container_id!r} does not exist in sandbox {self.id!r}")
        return found

    def has_others(self, container: Container) -> bool:
        """Whether a container shares the machine with others that run, and is not the one that stands for the pod."""
        if spec.container_type(container.config) == "pod_sandbox":
            return False
        return any(
            one is not container and one.init.alive and spec.container_type(one.config) != "pod_sandbox"
            for one in self.containers.values()
        )

    def process_ended(self, container: Container, process: Process) -> None:
        """A process's end has been reported; the sandbox may have to end with its container's init."""
        if self.client.ends_with_init and not process.exec_id and container.id == self.id:
            self.end()

    @property
    def host_pid(self) -> int:
        """The host process that stands for the processes in the guest: the hypervisor's."""
        return self.vm.pid if self.vm is not None else os.getpid()

    def start_logger(self, uri: str, container_id: str) -> Logger:
        """Start the logging program that a client wants a container's output to go to.

        Raises:
            KataError: It cannot be started.
        """
        from kata.engine.logger import Logger

        logger = Logger(uri, container_id, self.client.namespace, self.journal)
        self._loggers.add(logger)
        self.create_task(self._watch_logger(logger))
        return logger

    async def _watch_logger(self, logger: Logger) -> None:
        await logger.ended.wait()
        self._loggers.discard(logger)
        failure = logger.failure()
        if failure:
            self.log(failure)

    # ---- losing the machine ----

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
    def living_agent(self) -> AgentClient | None:
        """The agent, if it can still be asked."""
        return None if self.life.is_lost else self._agent

    def fail(self, reason: str) -> None:
        """Give the machine up for *reason*: every live process ends as 137."""
        self._terminate(VMLostError(reason, "kata logs shows the container's output"))

    async def await_exit_reason(self, otherwise: str) -> KataError:
        """The agent is gone: wait a moment for the machine's own account, else give it up; the reason."""
        try:
            await asyncio.wait_for(asyncio.shield(self.life.exit_reason), LOST_NOTICE_S)
        except TimeoutError:
            self.fail(otherwise)
        return self.life.lost_error()

    async def wait_terminated(self) -> None:
        """Return when there is no machine any more."""
        await asyncio.shield(self.life.exit_reason)

    async def stop_machine(self) -> None:
        """End the machine on request; the engine goes on answering."""
        self._terminate(VMLostError(f"sandbox {self.id} was stopped"), SandboxState.STOPPED)
        if self.vm is not None:
            await self.vm.stop()

    def _terminate(self, error: KataError, state: SandboxState = SandboxState.FAILED) -> None:
        """There is no machine any more, or there is to be none. The first reason stands.

        Args:
            error: Why.
            state: What the sandbox is then, unless its end has begun.
        """
        if self.life.is_lost:
            return
        self._enter(SandboxState.ENDING if self.life.is_ending else state, error)
        if self._agent is not None:
            self._agent.close()
        if self.vm is not None:
            self.create_task(self.vm.stop())

    def _enter(self, state: SandboxState, reason: KataError | None = None) -> None:
        self.life.enter(state, reason)
        if state is SandboxState.FAILED and reason is not None:
            self.log(reason.message)

    async def _watch_machine(self, vm: Hypervisor) -> None:
        ended = self._exit = await vm.wait()
        if ended.status < 0 and self.machine.cgroup is not None and self.machine.cgroup.oom_kills():
            ended.error = VMLostError(
                "the host's kernel killed the virtual machine: with its helpers it reached the limit on memory"
                f" of its cgroup {self.machine.cgroup.paths['memory']}",
                "The limit is the machine's memory and what running it takes: docs/architecture.md.",
            )
        self._terminate(ended.error or VMLostError("the virtual machine was stopped"))

    def _watch_network(self, plan: NetworkPlan) -> None:
        """The network helper's death is told, not fatal: the container may not need it any more."""
        for warning in plan.warnings:
            self.log(warning)

        def ended() -> None:
            failure = plan.failure()
            if failure is not None and not (self.life.is_ending or self.life.is_lost):
                self.log(f"{failure.message}: the guest has no network now")

        if plan.child is not None:
            plan.child.on_exit(ended)

    def _watch_files(self, server: FileServer) -> None:
        """Without its file server a guest would hang at its next look at a file of the host: end it instead."""

        def ended() -> None:
            failure = server.failure()
            if failure is not None and not (self.life.is_ending or self.life.is_lost):
                self._terminate(VMLostError(failure.message, failure.hint))

        server.child.on_exit(ended)

    async def _watch_agent(self, agent: AgentClient) -> None:
        assert self.vm is not None
        self.fail(await watch.watch(agent, self.vm.pid))

    async def _watch_memory(self, agent: AgentClient) -> None:
        """Out-of-memory kills in the guest."""
        while True:
            try:
                container_id = await agent.oom_event()
            except KataError:
                return  # without it an exit of 137 is not explained; no reason to end anything
            if container_id in self.containers:
                self.containers[container_id].out_of_memory()

    def _disk_failed(self, error: DiskError) -> None:
        """Tell of the first, and count: the guest decides how many there are.

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
        self.log(self.disk_error)
        for container in self.containers.values():
            container.record(disk_error=self.disk_error)

    # ---- the end ----

    def end(self, grace_s: float = REMOVE_S) -> None:
        """End the sandbox: its state is ENDED when nothing of it is left but this process.

        Args:
            grace_s: How long the guest has to write back what its containers have written, in seconds.
        """
        if self._end_task is None:
            has_machine = self.life.may(SandboxState.CLOSING)
            self._enter(SandboxState.CLOSING if has_machine else SandboxState.ENDING)
            self._end_task = asyncio.create_task(self._end(grace_s))

    @property
    def is_ending(self) -> bool:
        """Whether the end has begun."""
        return self.life.is_ending

    @property
    def ended(self) -> asyncio.Event:
        """Is set when nothing of the sandbox is left but this process."""
        return self.life.ended

    async def _end(self, grace_s: float) -> None:
        try:
            await self._take_down(grace_s)
        except Exception as error:  # whatever happens here, the engine must not stay for ever
            self.log(f"the sandbox was not taken down whole: {error!r}")
        finally:
            self._terminate(VMLostError(f"sandbox {self.id} has ended"))
            self._enter(SandboxState.ENDED)

    async def _take_down(self, grace_s: float) -> None:
        if not self.auto_remove and not self.life.is_lost:
            # What the container wrote has to reach its disk; of one that is removed nobody will read it.
            removing = asyncio.gather(*(container.remove() for container in self.containers.values()))
            try:
                await self.race_vm_exit_quietly(asyncio.wait_for(removing, grace_s))
            except TimeoutError:
                self.log(f"the guest did not write back its containers' files within {grace_s:g} s")
        if self._booted is not None and not self._booted.done():
            self._booted.cancel()
        if self._forwarder is not None:
            self._forwarder.close()
        if self._loopback_redirect is not None:
            self._loopback_redirect.close()
        if self._names is not None:
            self._names.close()
        self.guest_network.close()
        self._terminate(VMLostError(f"sandbox {self.id} has ended"))
        # Out of what is about to be removed. It takes as long as the machine takes to end.
        leaving = self.run_blocking(self.machine.cgroup.leave) if self.machine.cgroup is not None else None
        if self.vm is not None:
            await self.vm.stop()
            self.vm.close()
        files = self.machine.files
        if files is not None:
            files.child.unwatch()
            await self.run_blocking(files.stop)
        if leaving is not None:
            await leaving
        plan = self.machine.network
        if plan is not None:
            if plan.child is not None:
                plan.child.unwatch()
            await self.run_blocking(plan.stop)
        for container in self.containers.values():
            # Whoever was not told by the guest is told now: no client waits for ever.
            for process in (container.init, *container.execs.values()):
                if process.watcher is not None:
                    await asyncio.wait([process.watcher], timeout=5.0)
                elif process.streams is not None:
                    process.streams.close()
        await asyncio.gather(*(logger.leave() for logger in self._loggers))
        await self.run_blocking(self._undo)

    async def race_vm_exit_quietly(self, work: Awaitable[object]) -> None:
        """As `race_vm_exit`, for work whose failure has been told already."""
        try:
            await self.race_vm_exit(work)
        except KataError:
            pass

    def _undo(self) -> None:
        """Undo what the journals name: the container's lasting one if it is not to be kept, then the
        sandbox's."""
        from kata import journal_undo
        from kata.errors import JournalError
        from kata.journal import FILE_NAME, Journal

        problems: list[str] = []
        own = self.settings.container
        directory = own.directory if own is not None and own.auto_remove else ""
        if directory:
            try:
                problems += journal_undo.undo(Journal.open(os.path.join(directory, FILE_NAME)))
            except (JournalError, OSError) as error:
                problems.append(f"cannot remove {directory}: {error}")
        problems += journal_undo.undo(self.journal)
        for problem in problems:
            self.log(problem)

    async def drain_output(self, limit_s: float | None = None) -> None:
        """Wait for readers that take their time with what ended processes wrote.

        Args:
            limit_s: Seconds; None as long as they are there.
        """
        waiting = [
            delivery
            for container in self.containers.values()
            for process in (container.init, *container.execs.values())
            if process.streams is not None
            for delivery in process.streams.lingering
        ]
        if waiting:
            await asyncio.wait(waiting, timeout=limit_s)

    # ---- small services ----

    async def run_blocking(self, work: Callable[..., T], *arguments: Any) -> T:
        """Run something that blocks, in the one helper thread: in the order of the calls."""
        return await asyncio.get_running_loop().run_in_executor(self._thread, work, *arguments)

    def create_task(self, work: Coroutine[Any, Any, Any]) -> asyncio.Task[Any]:
        """Let *work* run on its own; what it raises is written to the engine's log."""
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._done)
        return task

    def _done(self, task: asyncio.Task[Any]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            self.log(f"{type(error).__name__}: {escape_line(str(error))}")

    def log(self, text: str) -> None:
        """Write a line to the engine's log."""
        stamp = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
        sys.stderr.write(f"{stamp} {text}\n")
        sys.stderr.flush()
        if self._log_fifo >= 0:
            try:
                os.write(self._log_fifo, f"{stamp} kata {self.id}: {text}\n".encode())
            except OSError:
                pass  # full, or nobody reads: the engine does not wait for a reader, and our own log has it
