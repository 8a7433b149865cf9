"""One container of a sandbox: from the bundle to the last of its processes.

The one place where create, start, exec, kill and delete happen; every client ends up here.
"""

from __future__ import annotations

import asyncio
import contextlib
import time

from kata.agent.client import DEVICE_LIMITS, NULL_STDIN, PIDS_OF, Encoded, create_request
from kata.agent.text import escape_line
from kata.engine import binds, disks, etc_files, nodes, rootfs, spec, stream_setup
from kata.engine.attached_disks import AttachedDisks
from kata.engine.container_kill import SIGKILL, Killer
from kata.engine.container_record import ContainerRecord
from kata.engine.process import CREATED, DELETED, PAUSED, RUNNING, Process
from kata.engine.process_end import EndOfProcesses
from kata.engine.records import rfc3339
from kata.engine.resize import merged
from kata.engine.taskpid import TaskPid, of_path
from kata.errors import (
    AgentError,
    AlreadyExistsError,
    KataError,
    NotFoundError,
    StateError,
    UnsupportedError,
)
from kata.proto import agent_pb, events_pb

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from typing import Any, Protocol

    from kata.agent.client import AgentClient
    from kata.engine.access import EtcAccess, StreamAccess
    from kata.engine.hostroot import HostRoot
    from kata.engine.machine_runtime import MachineRuntime
    from kata.engine.resize import MachineResizer
    from kata.engine.sockets import SocketForwardingState
    from kata.engine.stdio import Stdio
    from kata.engine.tasks import Tasks
    from kata.engine.timings import Timings
    from kata.proto.codec import Message
    from kata.settings import ClientPolicy, SandboxSettings

    class ContainerHost(StreamAccess, EtcAccess, Protocol):
        """What a container takes of its sandbox."""

        id: str
        client: ClientPolicy
        identity: dict[str, Any]
        runtime: MachineRuntime
        tasks: Tasks
        timings: Timings
        resizer: MachineResizer
        publish: Callable[[str, Message], None]

        @property
        def settings(self) -> SandboxSettings:
            """What the client wants."""

        @property
        def containers(self) -> Mapping[str, Container]:
            """The containers of the same machine, by their ids."""

        def has_others(self, container: Container) -> bool:
            """Whether the machine is shared with others that run."""

        def process_ended(self, container: Container, process: Process) -> None:
            """The end of a process has been reported."""

        def socket_forwarding(self) -> SocketForwardingState:
            """What all sockets of the host that containers reach have in common."""

        async def network_up(self) -> None:
            """Return when the guest's network is as it should be."""

        async def names_up(self, config: dict[str, Any]) -> None:
            """Return when a container of this specification can ask for names."""


REMOVE_S = 20
"""How long the guest may take to write back what a container has written, in seconds."""
PLACEHOLDER_PROCESS = {"args": ["/proc/self/exe"], "cwd": "/"}
"""The process of a container without one: the protocol wants a command, it is never started, and this one is found
in any root file system (it is the agent's own child that looks)."""
HOOKS_BEFORE = ("prestart", "createRuntime", "createContainer")
"""Hooks on the host when a container is made, in this order; ``startContainer`` runs in the guest."""


def _has_no_input(process: Process) -> bool:
    """Whether nobody will ever write to a process: neither a client nor, with a terminal, whoever attaches."""
    return process.streams is not None and process.streams.input is None and not process.stdio.terminal


class Container:
    """A container.

    Args:
        sandbox: Whose it is.
        container_id: Its id.
        bundle: Directory of its ``config.json``.
        config: The content of that.
        stdio: Where its init's streams go.
        root: Its root directory on the host, where a client hands one over; else the settings say.
    """

    def __init__(
        self,
        sandbox: ContainerHost,
        container_id: str,
        bundle: str,
        config: dict[str, Any],
        stdio: Stdio,
        root: HostRoot | None = None,
    ) -> None:
        self.sandbox = sandbox
        self.id = container_id
        self.bundle = bundle
        self.config = config
        self.init = Process(container_id, "", stdio)
        self.execs: dict[str, Process] = {}
        self.created_at_ns = 0
        described = sandbox.settings.container if container_id == sandbox.id else None
        self.record = ContainerRecord(container_id, described, sandbox.identity, sandbox.tasks)
        self._killer = Killer(
            self.init,
            self.execs,
            sandbox.runtime,
            sandbox.tasks,
            sandbox.client,
            lambda: sandbox.has_others(self),
        )
        self._ends = EndOfProcesses(
            self.init,
            self.execs,
            sandbox.runtime,
            sandbox.tasks,
            self.record,
            self._killer,
            lambda topic, event: sandbox.publish(topic, event),
            on_init_gone=self._close_relay,
            on_reported=lambda process: sandbox.process_ended(self, process),
        )
        self._root = root
        self._rootfs: rootfs.Rootfs | None = None
        if root is not None:
            self._rootfs = rootfs.HostDirectory(root.path, mounted_by_host=root.mounted_by_host)
        elif sandbox.settings.container is not None:
            self._rootfs = sandbox.settings.container.rootfs
        self._shared = binds.ContainerMounts(
            sandbox.settings, sandbox.runtime, sandbox.tasks, sandbox.socket_forwarding, container_id
        )
        self._resources: dict[str, Any] = dict((config.get("linux") or {}).get("resources") or {})
        self._disks = AttachedDisks(sandbox.runtime, sandbox.tasks)
        self._removed = False
        self._task_pid: TaskPid | None = None

    @property
    def task_pid(self) -> int:
        """The number on the host that stands for its processes, and for their namespaces."""
        return self._task_pid.pid if self._task_pid is not None else self.sandbox.runtime.host_pid

    # ---- create ----

    async def create(self) -> None:
        """Make it in the guest, up to the point where only `start` is missing.

        Raises:
            KataError: Whatever went wrong; nothing of the container is left then.
        """
        sandbox = self.sandbox
        self.init.streams = stream_setup.open_streams(sandbox, self.init, self.record.log)
        try:
            await self.init.streams.ready()
            await self.record.reserve()
            if sandbox.runtime.machine.started is None:
                await sandbox.runtime.ready()  # which says why there is no machine
            # All that can be worked out before the guest is there is: its kernel boots meanwhile.
            if self._root is not None:
                await self._mount_root(self._root)
            self.config, volumes = await sandbox.tasks.run_blocking(nodes.of_guest, self.config)
            shown = await sandbox.tasks.run_blocking(self._shared.add_all, self.config, self._rootfs)
            files = etc_files.EtcFiles(sandbox, self.config, self.id, self._shared)
            storages = [
                *rootfs.storages(self.id, self._rootfs, sandbox.runtime.machine.disk_addresses),
                *self._shared.storages,
            ]
            limited = await self._limited(volumes)
            message = spec.to_message(self._guest_spec(shown, files.mounts, volumes, limited))
            pids_path = spec.pids_path(self.config)
            pids_of = self._whose_pids(pids_path)
            devices = await self._insert_devices(volumes)
            request = Encoded(
                create_request(
                    self.id,
                    message,
                    storages,
                    devices,
                    shares_pids=bool(pids_path) and not pids_of,
                    no_stdin=_has_no_input(self.init),
                    pids_of=pids_of,
                ).encode()
            )
            agent = await sandbox.runtime.ready()
            if pids_of and PIDS_OF not in agent.features:
                raise UnsupportedError(
                    f"cannot show the container the processes of container {pids_of!r}:"
                    " the guest's agent has no call for that",
                    "Use a guest of this version of kata, or share the whole pod's processes (shareProcessNamespace).",
                )
            is_pause_container = spec.container_type(self.config) == "pod_sandbox"
            await sandbox.resizer.admit(self.id, self._resources, is_sandbox=is_pause_container)
            for kind in HOOKS_BEFORE:
                await self._run_hooks(kind, "creating")
            began = time.monotonic_ns()
            await files.write(agent)
            if self._shared.relay is not None:
                await self._shared.relay.listen(agent)
            try:
                await agent.create_container(request, sandbox.settings.described().guest.create_s)
            except AgentError as error:
                raise spec.explain_size(error, f"container {self.id!r}", self.config) from None
            sandbox.timings.add("root file system", began)
        except BaseException:
            sandbox.resizer.forget(self.id)
            self.init.streams.abandon()
            self.record.close_log()
            self._close_relay()
            await self._disks.remove_all()
            await sandbox.tasks.run_blocking(self._remove_shared)
            raise
        self.created_at_ns = time.time_ns()
        if spec.container_type(self.config) == "pod_container":
            self._task_pid = TaskPid()
        self.init.pid = self.task_pid
        if self.has_process:
            self.init.watcher = asyncio.create_task(self._ends.watch(self.init, agent))
            sandbox.tasks.create_task(self._close_unused_stdin(self.init, agent))
        self.record.write_later(status=CREATED, pid=self.init.pid, created_at=rfc3339(self.created_at_ns))
        stdio = self.init.stdio
        sandbox.publish(
            "/tasks/create",
            events_pb.TaskCreate(
                container_id=self.id,
                bundle=self.bundle,
                io=events_pb.TaskIO(
                    stdin=stdio.stdin.text,
                    stdout=stdio.stdout.text,
                    stderr=stdio.stderr.text,
                    terminal=stdio.terminal,
                ),
                pid=self.init.pid,
            ),
        )

    def _whose_pids(self, path: str) -> str:
        """The container whose PID namespace a path means; empty where it is the pod's own, or none.

        Raises:
            UnsupportedError: It is no process of this sandbox.
        """
        pid = of_path(path)
        if not path or pid == self.sandbox.runtime.host_pid or spec.created_by_crio(self.config):
            return ""  # CRI-O names the pod's by a path of its own making
        for one in self.sandbox.containers.values():
            if one is not self and one.task_pid == pid:
                return one.id
        raise UnsupportedError(
            f"the container asks for the PID namespace {path}, and no container of its pod has that one",
            "The container whose processes are wanted has to be running, and in the same pod.",
        )

    async def _mount_root(self, root: HostRoot) -> None:
        if root.disk is None:
            await self.sandbox.tasks.run_blocking(root.mount)
            return
        address = await self._disks.insert(root.disk.path, readonly=root.disk.readonly)
        self._rootfs = rootfs.DiskRoot(address, root.disk.fstype, root.disk.options)

    async def _insert_devices(self, volumes: list[disks.Device]) -> list[agent_pb.Device]:
        """Make the host's block devices that the specification lists, or mounts, disks of the machine."""
        found = []
        for device in (*disks.devices_of(self.config), *volumes):
            path = await self.sandbox.tasks.run_blocking(device.host_path)
            address = await self._disks.insert(path, readonly=device.readonly)
            found.append(agent_pb.Device(type="blk", id=address, container_path=device.container_path))
        return found

    async def _run_hooks(self, kind: str, status: str) -> None:
        """Run the hooks of one kind on the host.

        Raises:
            HostError: One failed.
        """
        wanted = (self.config.get("hooks") or {}).get(kind)
        host = self.sandbox.runtime.machine.host
        if not wanted or host is None:
            return
        from kata.engine import hooks

        state = hooks.state(self.id, self.bundle, self.sandbox.runtime.host_pid, status, self.config)
        await self.sandbox.tasks.run_blocking(hooks.run, kind, wanted, state, host)

    async def _run_late_hooks(self, kind: str, status: str) -> None:
        """The same when the container is there: a failure changes nothing any more, and is told in the log."""
        try:
            await self._run_hooks(kind, status)
        except KataError as error:
            self.sandbox.tasks.log(f"container {self.id}: {error.message}")

    def _close_relay(self) -> None:
        """Nobody of the container is left to reach the host's sockets."""
        if self._shared.relay is not None:
            self._shared.relay.close()

    def _remove_shared(self) -> None:
        self._shared.remove_all()
        if self._root is not None:
            self._root.unmount()

    async def _limited(self, volumes: list[disks.Device]) -> set[tuple[int, int]]:
        """The host's numbers of the container's disks for which there are limits that the guest can keep."""
        numbers = {device.numbers for device in (*disks.devices_of(self.config), *volumes)}
        block_io = ((self.config.get("linux") or {}).get("resources") or {}).get("blockIO") or {}
        if not any(spec.limits_of(block_io.get(key), numbers) for key in spec.OF_HOST_DEVICES):
            return set()
        agent = await self.sandbox.runtime.ready()
        return numbers if DEVICE_LIMITS in agent.features else set()

    def _guest_spec(
        self,
        shown: list[spec.GuestBind],
        files: dict[str, str],
        volumes: list[disks.Device],
        limited: set[tuple[int, int]],
    ) -> dict[str, Any]:
        for what in sorted(set(spec.dropped(self.config, limited))):
            self.sandbox.tasks.log(f"container {self.id}: {what} cannot be carried into the guest")
        config = spec.for_guest(
            nodes.with_volumes(nodes.with_guests(disks.drop_host_devices(self.config)), volumes),
            rootfs=rootfs.path(self.id),
            bundle=self.bundle,
            container_type=spec.container_type(self.config),
            binds=shown,
            files=files,
            cgroups_path=f"/{self.id}",
            disks=limited,
        )
        if self.sandbox.settings.described().guest.no_seccomp:
            config["linux"].pop("seccomp", None)
        config["process"] = {
            **(config.get("process") or PLACEHOLDER_PROCESS),
            "terminal": self.init.stdio.terminal,
        }
        return config

    @property
    def has_process(self) -> bool:
        """Whether it has more than files: a spec without a process is for looking at those."""
        return bool(self.config.get("process"))

    async def _close_unused_stdin(self, process: Process, agent: AgentClient) -> None:
        """An agent that cannot give /dev/null to a process without input has given it a pipe: its end comes at once."""
        if _has_no_input(process) and NULL_STDIN not in agent.features:
            try:
                await agent.close_stdin(self.id, process.exec_id or self.id)
            except KataError:
                pass  # it has ended already

    # ---- start, exec ----

    def process(self, exec_id: str) -> Process:
        """The init for an empty id, else that exec.

        Raises:
            NotFoundError: There is none.
        """
        if not exec_id:
            return self.init
        found = self.execs.get(exec_id)
        if found is None:
            raise NotFoundError(f"process {exec_id!r} does not exist in container {self.id!r}")
        return found

    def add_exec(self, exec_id: str, stdio: Stdio, process_spec: dict[str, Any]) -> Process:
        """Take an exec down; `start` makes it.

        Raises:
            AlreadyExistsError: The id is taken.
            StateError: The container is paused or has ended.
            KataError: A stream cannot be opened (said at the start where fifos are held), or the specification is
                malformed.
        """
        if not exec_id or exec_id in self.execs or exec_id == self.id:
            raise AlreadyExistsError(f"process id {exec_id!r} is taken in container {self.id!r}")
        if self.init.state not in (CREATED, RUNNING):
            raise StateError(f"cannot exec in a {self.init.state} container: {self.id!r}")
        spec.process_message(process_spec)  # what is malformed is said now, not at the start
        process = Process(self.id, exec_id, stdio, process_spec)
        if not self.sandbox.client.holds_fifos:
            process.streams = stream_setup.open_streams(self.sandbox, process, None)
        self.execs[exec_id] = process
        self.sandbox.publish(
            "/tasks/exec-added", events_pb.TaskExecAdded(container_id=self.id, exec_id=exec_id)
        )
        return process

    async def start(self, exec_id: str) -> Process:
        """Start the init or an exec; its pid is set when this returns.

        Raises:
            NotFoundError: No such process.
            StateError: It was started before.
            KataError: The command cannot be executed, the guest refused, or the machine is gone.
        """
        process = self.process(exec_id)
        async with process.lock:
            process.require_startable()
            agent = await self.sandbox.runtime.ready()
            if exec_id:
                await self._start_exec(process, agent)
            else:
                await self._start_init(process, agent)
        return process

    async def _start_init(self, process: Process, agent: AgentClient) -> None:
        if not self.has_process:
            raise StateError(f"container {self.id!r} has no process to start")
        await self.sandbox.network_up()
        await self.sandbox.names_up(self.config)
        began = time.monotonic_ns()
        starting = asyncio.ensure_future(agent.start_container(self.id))
        if process.streams is not None:
            process.streams.start()  # right behind the start, not a round trip later
        await starting
        self.sandbox.timings.add("process", began)
        self.sandbox.runtime.machine.free_boot_slot()
        process.start(self.task_pid)
        self.sandbox.publish("/tasks/start", events_pb.TaskStart(container_id=self.id, pid=process.pid))
        # Before the answer: whoever asks about the container next looks there.
        started_at = rfc3339(process.started_at_ns)
        failure = await self.record.write(status=RUNNING, pid=process.pid, started_at=started_at)
        if failure is not None:
            # It would be taken for one that does not run, by `kata ps` as by `kata gc`.
            with contextlib.suppress(KataError):  # it may have ended already
                await self._killer.kill_init()
            raise self.record.unwritable(failure)
        await self._run_late_hooks("poststart", "running")

    async def _start_exec(self, process: Process, agent: AgentClient) -> None:
        config = dict(process.spec or {})
        config["terminal"] = process.stdio.terminal
        try:
            if process.streams is None:
                # Not before, as with runc: a client whose containerd dies between the two calls would wait for
                # the end of fifos that we hold, and nobody would ever start or delete the exec.
                process.streams = stream_setup.open_streams(self.sandbox, process, None)
            await process.streams.ready()
            message = spec.process_message(config)
            try:
                await agent.exec_process(self.id, process.exec_id, message, no_stdin=_has_no_input(process))
            except AgentError as error:
                what = f"process {process.exec_id!r} of container {self.id!r}"
                raise spec.explain_size(error, what, {"process": config}) from None
        except BaseException as error:
            # As with runc: it can be deleted, and never ran.
            process.stop(getattr(error, "exit_code", 255), time.time_ns(), str(error))
            process.ended.set()
            if process.streams is not None:
                process.streams.abandon()
            raise
        process.start(self.sandbox.runtime.host_pid)
        if process.streams is not None:
            process.streams.start()
        process.watcher = asyncio.create_task(self._ends.watch(process, agent))
        self.sandbox.publish(
            "/tasks/exec-started",
            events_pb.TaskExecStarted(container_id=self.id, exec_id=process.exec_id, pid=process.pid),
        )
        self.sandbox.tasks.create_task(self._close_unused_stdin(process, agent))

    # ---- what else one can do to it ----

    def out_of_memory(self) -> None:
        """The guest's kernel killed something of this container for want of memory."""
        self._ends.out_of_memory(self.bundle if spec.created_by_crio(self.config) else "")

    async def kill(self, exec_id: str, signal: int, everything: bool) -> None:
        """Send a signal to the init (empty *exec_id*) or an exec; see `Killer.kill`.

        Raises:
            NotFoundError: No such process, or ``process already finished``.
            KataError: As by `Killer.kill`.
        """
        await self._killer.kill(self.process(exec_id), signal, everything=everything)

    async def pause(self) -> None:
        """Freeze every process.

        Raises:
            StateError: It does not run.
            KataError: The guest refused.
        """
        async with self.init.lock:
            self.init.require_pausable()
            agent = await self.sandbox.runtime.ready()
            await agent.pause(self.id)
            self.init.transition(PAUSED)
        self.record.write_later(status=PAUSED)
        self.sandbox.publish("/tasks/paused", events_pb.TaskPaused(container_id=self.id))

    async def resume(self) -> None:
        """Thaw every process.

        Raises:
            StateError: It is not paused.
            KataError: The guest refused.
        """
        async with self.init.lock:
            self.init.require_resumable()
            agent = await self.sandbox.runtime.ready()
            await agent.resume(self.id)
            self.init.transition(RUNNING)
        self.record.write_later(status=RUNNING)
        self.sandbox.publish("/tasks/resumed", events_pb.TaskResumed(container_id=self.id))

    async def resize(self, exec_id: str, rows: int, columns: int) -> None:
        """Tell a process's terminal its size. A process that has ended does not care.

        Raises:
            KataError: It has no terminal, or the guest refused.
        """
        process = self.process(exec_id)
        process.require_terminal()
        if process.alive or (process.state == CREATED and not exec_id):
            agent = await self.sandbox.runtime.ready()
            await agent.resize(self.id, exec_id or self.id, rows, columns)

    async def update(self, resources: dict[str, Any]) -> None:
        """Change the limits of the container in the guest, and the machine with them.

        Raises:
            KataError: They are malformed, the machine cannot become so large, or the guest refused; nothing is changed
                then.
        """
        spec.resources_message(resources)  # what is malformed is said before anything is done
        if self.init.state not in (CREATED, RUNNING, PAUSED):
            raise StateError(f"cannot update a {self.init.state} container: {self.id!r}")
        agent = await self.sandbox.runtime.ready()
        change = spec.resources_message(resources)
        after = merged(self._resources, resources)
        await self.sandbox.resizer.update(self.id, after, lambda: agent.update(self.id, change))
        self._resources = after

    async def delete_exec(self, exec_id: str) -> Process:
        """Forget an exec that has ended or was never started.

        Raises:
            KataError: No such process, or it lives.
        """
        process = self.process(exec_id)
        async with process.lock:
            process.require_deletable()
            process.transition(DELETED)
            if process.streams is not None:
                process.streams.close()
            self.execs.pop(exec_id, None)
            process.stdio.close()
        return process

    async def stop_unstarted(self) -> None:
        """End an init that was created and never started, so that the container can be deleted."""
        if self.has_process and self.init.state == CREATED and not self.init.ended.is_set():
            try:
                await self.kill("", SIGKILL, everything=True)
            except KataError:
                pass  # it has ended meanwhile, or the machine has
            await self.init.ended.wait()

    async def remove(self) -> None:
        """Take what is left of it out of the guest: its mounts are synced and undone. Once; never raises."""
        if self._removed:
            return
        self._removed = True
        self.sandbox.resizer.forget(self.id)
        self._close_relay()
        agent = self.sandbox.runtime.living_agent
        if agent is not None:
            try:
                await agent.remove_container(self.id, REMOVE_S)
            except KataError as error:
                self.sandbox.tasks.log(
                    f"container {self.id} was not removed in the guest: {escape_line(error.message)}"
                )
        await self._disks.remove_all()
        try:
            await self.sandbox.tasks.run_blocking(self._remove_shared)
        except OSError as error:
            self.sandbox.tasks.log(f"a volume of container {self.id} is still mounted: {error}")
        await self._run_late_hooks("poststop", "stopped")
        if self._task_pid is not None:
            self._task_pid.end()

    def close(self) -> None:
        """Let go of every stream, delivered or not."""
        self._close_relay()
        for process in (self.init, *self.execs.values()):
            if process.streams is not None:
                process.streams.close()
