"""One sandbox: its containers, and what its client's policy makes of them.

Its machine is `kata.engine.lifecycle.machine_runtime`, its end `kata.engine.lifecycle.teardown`.
"""

from __future__ import annotations

import asyncio
import os
import time

from kata.engine.containers import spec
from kata.engine.containers.container import Container
from kata.engine.containers.container_parts import REMOVE_S
from kata.engine.forwarding.guestnet import GuestNetwork
from kata.engine.forwarding.network_services import NetworkServices
from kata.engine.lifecycle import boot, first_calls, guest_setup
from kata.engine.lifecycle.life_events import LifeEvents
from kata.engine.lifecycle.machine_runtime import MachineRuntime
from kata.engine.lifecycle.resize import MachineResizer
from kata.engine.lifecycle.sandbox_state import SandboxState
from kata.engine.log import LoggedDurations
from kata.engine.tasks import Tasks
from kata.engine.timings import Timings
from kata.errors import AlreadyExistsError, KataError, NotFoundError, VMLostError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any, TypeVar

    from kata import sysio
    from kata.agent.client import AgentClient
    from kata.engine.containers.hostroot import HostRoot
    from kata.engine.containers.process import Process
    from kata.engine.containers.snapshot_root import LayerDisks
    from kata.engine.forwarding.sockets import SocketForwardingState
    from kata.engine.lifecycle.booted_machine import BootedMachine
    from kata.engine.lifecycle.sandbox_state import Lifecycle
    from kata.engine.lifecycle.volumes import Share
    from kata.engine.services.trace import SandboxTrace
    from kata.engine.standard_streams.logger import Logger
    from kata.engine.standard_streams.stdio import Stdio
    from kata.journal import Journal
    from kata.metrics.overhead import Overhead
    from kata.proto.codec import Message
    from kata.settings import SandboxSettings

    T = TypeVar("T")

NOTABLE_NS = 1_000_000
"""A shorter wait for a boot slot is none."""


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
        machine: BootedMachine,
        failed: KataError | None,
        publish: Callable[[str, Message], None] | None = None,
    ) -> None:
        from kata.journal import process_identity

        self.settings = settings
        self.id = settings.id
        self.run_dir = run_dir
        self.journal = journal
        self.forward_event = publish
        me = process_identity(os.getpid())
        self.identity = {"pid": me["pid"], "starttime": me["start"], "boot_id": me["boot"]}
        self.timings = Timings(settings.request_started_ns or time.monotonic_ns())
        self.overhead: Overhead | None = None  # once somebody has asked for metrics
        # For figures, which the guest has yet to answer; and when they were asked, by CLOCK_MONOTONIC in seconds.
        self.open_questions: dict[str, tuple[asyncio.Future[Any], float]] = {}
        self.tasks = Tasks(self.id, settings.client.log_fifo)
        self._configure_log()
        # How long those took that the engine has answered.
        self.calls = LoggedDurations(self.tasks.lines, "the engine")
        self.life_events = LifeEvents(settings, run_dir, self.tasks.lines)
        self.runtime = self._make_runtime(machine)
        self.network_services = NetworkServices(self.runtime, self.tasks)
        self.containers: dict[str, Container] = {}
        self.loggers: set[Logger] = set()
        self.had_container = False
        self.saw_stale_client = False  # a client has asked about a container since there is none (any more)
        self._layer_disks: LayerDisks | None = None  # once a container's root file system is on disks
        self._forwarding: SocketForwardingState | None = None  # once a container has a socket of the host's
        self.resizer = self._make_resizer()
        self.guest_network = GuestNetwork(
            settings, self.runtime, self.tasks, self.timings, self.containers, self.names_up
        )
        self.trace: SandboxTrace | None = None
        self.on_trace: Callable[[SandboxTrace], None] = lambda trace: None
        self._start_error = failed
        self._is_discarded = False
        self._removed = ""  # the name of the container, if it goes with the sandbox
        self.held: list[sysio.Fd] = []  # removed files whose space is yet to be freed
        self._end_task: asyncio.Task[None] | None = None
        self.client = settings.client
        self.is_pod = settings.pod is not None

    @property
    def is_discarded(self) -> bool:
        """Whether nobody will read what the containers wrote to their own disks."""
        own = self.settings.container
        if own is not None and any(volume.stays for volume in own.disk_volumes):
            return False
        return self._is_discarded or (own is not None and own.auto_remove)

    def _make_runtime(self, machine: BootedMachine) -> MachineRuntime:
        return MachineRuntime(
            self.id,
            self.run_dir,
            self.journal,
            machine,
            self.tasks,
            on_oom=self._out_of_memory,
            on_disk_error=self._disk_failed,
            on_state=self.life_events.entered,
        )

    def _configure_log(self) -> None:
        if self.settings.machine is not None:
            self.tasks.lines.form = self.settings.machine.log_format
            self.tasks.lines.set_level(self.settings.machine.log_level)

    def _make_resizer(self) -> MachineResizer:
        resizer = MachineResizer(self.settings, self.runtime, self.tasks)
        resizer.on_resize = lambda vcpus, mib: self.life_events.record(
            "sandbox.resized", vcpus=vcpus, memory_mib=mib
        )
        return resizer

    def publish(self, topic: str, event: Message) -> None:
        """Tell what has happened to a task: the node's events, and containerd where it is the client."""
        self.life_events.of_task(topic, event, self.containers.get(getattr(event, "container_id", "")))
        if self.forward_event is not None:
            self.forward_event(topic, event)

    # ---- start ----

    def power_on(self) -> None:
        """Start the machine of a pod, which has only now been described. Blocks; before the first call of
        `run_blocking`.

        Raises:
            KataError: Something is missing on this host.
        """
        self._configure_log()
        self.resizer = self._make_resizer()
        self.had_container = True  # from now on somebody has to say when it is no longer wanted
        began = time.monotonic_ns()
        try:
            self.runtime.machine = boot.power_on(self.settings, self.run_dir, self.journal)
        except KataError as error:
            self._start_error = error
        self.start(began, time.monotonic_ns())
        if self._start_error is not None:
            raise self._start_error

    def start(self, began_ns: int, done_ns: int) -> None:
        """Take the machine over and bring it up; `ready` tells how that went.

        Args:
            began_ns: When its start was begun, by CLOCK_MONOTONIC.
            done_ns: When it was started, or had failed to.
        """
        machine = self.machine
        tracing = self.settings.described().tracing
        if tracing is not None:
            from kata.engine.services.trace import SandboxTrace

            self.trace = SandboxTrace(self, tracing)
            self.trace.began(machine.steps)
            self.on_trace(self.trace)
        self.timings.took(machine)
        self.timings.add("engine", began_ns, machine.ready_ns or done_ns)
        if machine.started_ns - machine.ready_ns > NOTABLE_NS:
            self.timings.add("boot slot", machine.ready_ns, machine.started_ns)
        if machine.started_ns:
            self.timings.add("start machine", machine.started_ns, done_ns)
        for note in self.settings.notes:
            self.tasks.log(note)
        self.runtime.start(self._bring_up, self._start_error)

    async def _bring_up(self) -> AgentClient:
        agent = await guest_setup.bring_up(self)
        self.network_services.start(agent)
        return agent

    def socket_forwarding(self) -> SocketForwardingState:
        """What all sockets of the host that containers reach have in common."""
        if self._forwarding is None:
            from kata.engine.forwarding import sockets

            self._forwarding = sockets.SocketForwardingState()
        return self._forwarding

    def layer_disks(self) -> LayerDisks:
        """The images of snapshots' layers that the machine has as disks."""
        if self._layer_disks is None:
            from kata.engine.containers import snapshot_root

            self._layer_disks = snapshot_root.LayerDisks(self.runtime, self.tasks, self.journal)
        return self._layer_disks

    async def network_up(self) -> None:
        """Return when the guest's network is as it should be.

        Raises:
            KataError: It could not be set up.
        """
        if self.network_services.configured is not None:
            await self.runtime.race_vm_exit(self.network_services.configured, outlives_caller=True)
        await self.guest_network.come_up()

    async def names_up(self, config: dict[str, Any]) -> None:
        """See `NetworkServices.names_up`."""
        await self.network_services.names_up(config, self.dns)

    @property
    def dns(self) -> list[str]:
        """Lines of the guest's resolv.conf; empty without a network."""
        return first_calls.dns(self.machine, self.settings)

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
                otherwise an unknown id means that the client's state is stale.

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
        if process.exec_id:
            return
        if self.client.ends_with_init and container.id == self.id:
            self.end()
        own = process.stdio.host_process
        if (
            own is not None
            and own.was_killed
            and not any(one.init.alive for one in self.containers.values())
        ):
            self.tasks.log(
                f"the process that stood for container {container.id} was killed, and no other runs"
            )
            self.end()

    def health_changed(self, container: Container, status: str) -> None:
        """A container's health check has come to another conclusion: ``healthy`` or ``unhealthy``."""
        self.life_events.record("container.health", container=container.id, health=status)

    def start_logger(self, uri: str, container_id: str) -> Logger:
        """Start the logging program that a client wants a container's output to go to.

        Raises:
            KataError: It cannot be started.
        """
        from kata.engine.standard_streams.logger import Logger

        logger = Logger(uri, container_id, self.client.namespace, self.journal)
        self.loggers.add(logger)
        self.tasks.create_task(self._watch_logger(logger))
        return logger

    async def _watch_logger(self, logger: Logger) -> None:
        await logger.ended.wait()
        self.loggers.discard(logger)
        failure = logger.failure()
        if failure:
            self.tasks.log(failure)

    def _out_of_memory(self, container_id: str) -> None:
        if container_id in self.containers:
            self.containers[container_id].out_of_memory()

    def _disk_failed(self, sentence: str) -> None:
        self.life_events.record("disk.error", error=sentence)
        for container in self.containers.values():
            container.record.write_later(disk_error=sentence)

    # ---- the end ----

    def discard(self, removed: str = "") -> None:
        """End the sandbox; the guest writes back what was written only if there is a volume that stays.

        Args:
            removed: The name of the sandbox's own container, if that is to be removed as well.
        """
        self._is_discarded = True
        self._removed = removed
        self.end()

    def end(self, grace_s: float = REMOVE_S) -> None:
        """End the sandbox: its state is ENDED when nothing of it is left but this process.

        Args:
            grace_s: How long the guest has to write back what its containers have written, in seconds.
        """
        if self._end_task is None:
            has_machine = self.life.may(SandboxState.CLOSING)
            is_up = self.life.state is SandboxState.READY
            self.runtime.enter(SandboxState.CLOSING if has_machine else SandboxState.ENDING)
            if is_up and self.is_discarded and self.trace is None:
                # Nothing is wanted of the guest any more: it goes while the rest of the end is loaded.
                self.runtime.terminate(VMLostError(f"sandbox {self.id} has ended"))
            self._end_task = asyncio.create_task(self._end(grace_s))

    async def _end(self, grace_s: float) -> None:
        from kata.engine.lifecycle.teardown import Teardown

        try:
            await Teardown(self, grace_s).run()
        finally:
            self.runtime.terminate(VMLostError(f"sandbox {self.id} has ended"))
            self.life_events.ended(self.journal.path)
            self.runtime.enter(SandboxState.ENDED)

    def tell_of_removal(self) -> None:
        """Have it recorded that the container's lasting directory has gone, if it has."""
        if self.removed_directory and not os.path.lexists(self.removed_directory):
            named = {"name": self._removed} if self._removed else {}
            self.life_events.record("container.deleted", container=self.id, **named)

    def free_space(self) -> None:
        """Free the space of what was removed at the end. Blocks."""
        while self.held:
            self.held.pop().close()

    @property
    def removed_directory(self) -> str:
        """The container's lasting directory, if it goes with the sandbox; otherwise empty."""
        own = self.settings.container
        return own.directory if own is not None and (own.auto_remove or self._removed) else ""

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
            for delivery in process.streams.undelivered
        ]
        if waiting:
            await asyncio.wait(waiting, timeout=limit_s)

    # ---- what others reach through the sandbox ----

    @property
    def life(self) -> Lifecycle:
        """The state."""
        return self.runtime.life

    @property
    def is_ending(self) -> bool:
        """Whether the end has begun."""
        return self.life.is_ending

    @property
    def ended(self) -> asyncio.Event:
        """Is set when nothing of the sandbox is left but this process."""
        return self.life.ended

    @property
    def machine(self) -> BootedMachine:
        """What the boot has made."""
        return self.runtime.machine

    @property
    def share(self) -> Share | None:
        """What of the host the guest sees, if the sandbox has a share."""
        return self.runtime.machine.share

    async def ready(self) -> AgentClient:
        """See `MachineRuntime.ready`."""
        return await self.runtime.ready()

    async def run_blocking(self, work: Callable[..., T], *arguments: Any) -> T:
        """See `Tasks.run_blocking`."""
        return await self.tasks.run_blocking(work, *arguments)
