"""What a container consists of besides its processes: its root file system, mounts, disks and sockets.

Some of it is on the host, some in the guest; it is made together, rolled back together, and removed together.
"""

from __future__ import annotations

import os
import time

from kata.agent.client import DEFAULT_ERRNO, DEVICE_LIMITS, PIDS_OF, Encoded, create_request
from kata.agent.text import escape_line
from kata.engine.containers import binds, copies, disks, etc_files, nodes, rootfs, spec
from kata.engine.containers.attached_disks import AttachedDisks
from kata.engine.lifecycle.resize import merged
from kata.errors import AgentError, KataError, UnsupportedError
from kata.proto import agent_pb

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Iterable
    from typing import Any, Protocol

    from kata.agent.client import AgentClient
    from kata.engine.access import EtcAccess, MachineControl
    from kata.engine.containers.hostroot import HostRoot
    from kata.engine.containers.process import Process
    from kata.engine.containers.snapshot_root import LayerDisks, SnapshotRoot
    from kata.engine.forwarding.sockets import SocketForwardingState
    from kata.engine.lifecycle.resize import MachineResizer
    from kata.engine.tasks import Tasks
    from kata.engine.timings import Timings
    from kata.journal import Journal

    class PartsHost(EtcAccess, Protocol):
        """What making a container takes of its sandbox."""

        tasks: Tasks
        timings: Timings
        journal: Journal

        @property
        def runtime(self) -> MachineControl:
            """The machine."""

        @property
        def resizer(self) -> MachineResizer:
            """The size of the machine."""

        def layer_disks(self) -> LayerDisks:
            """The images of snapshots' layers that the machine has as disks."""

        def socket_forwarding(self) -> SocketForwardingState:
            """What all sockets of the host that containers reach have in common."""


DEVICES_BESIDE = 2
"""With more disks of its own than these a container's root file system is none: the machine has few slots."""
REMOVE_S = 20
"""How long the guest may take to write back what a container has written, in seconds."""
PLACEHOLDER_PROCESS = {"args": ["/proc/self/exe"], "cwd": "/"}
"""The process of a container without one: the protocol wants a command, it is never started, and this one is found
in any root file system (it is the agent's own child that looks)."""
HOOKS_BEFORE = ("prestart", "createRuntime", "createContainer")
"""Hooks on the host when a container is made, in this order; ``startContainer`` runs in the guest."""
IN_ROOT = "createContainer"
"""The hooks that start in the container's root directory."""


def has_no_input(process: Process) -> bool:
    """Whether nobody will ever write to a process: neither a client nor, with a terminal, whoever attaches."""
    return process.streams is not None and process.streams.input is None and not process.stdio.terminal


def _pid_of(process: Process) -> int:
    return process.stdio.host_process.pid if process.stdio.host_process is not None else 0


class ContainerParts:
    """The parts of one container.

    Args:
        host: Its sandbox.
        container_id: Its id.
        bundle: Directory of its ``config.json``.
        config: The content of that.
        root: Its root directory on the host, where a client hands one over; otherwise the settings say.

    Attributes:
        config: Its specification; `create` takes out of it what comes in another way.
    """

    def __init__(
        self,
        host: PartsHost,
        container_id: str,
        bundle: str,
        config: dict[str, Any],
        root: HostRoot | None,
    ) -> None:
        self._host = host
        self._runtime = host.runtime
        self._tasks = host.tasks
        self._id = container_id
        self._bundle = bundle
        self.config = config
        self._root = root
        self._snapshot: SnapshotRoot | None = None
        self._rootfs: rootfs.Rootfs | None = None
        if root is not None:
            self._rootfs = rootfs.HostDirectory(root.path, mounted_by_host=root.mounted_by_host)
        elif host.settings.container is not None:
            self._rootfs = host.settings.container.rootfs
        self._shared = binds.ContainerMounts(
            host.settings, host.runtime, host.tasks, host.socket_forwarding, container_id
        )
        self._resources: dict[str, Any] = dict((config.get("linux") or {}).get("resources") or {})
        self._disks = AttachedDisks(host.runtime, host.tasks)
        self._disk_numbers: set[tuple[int, int]] = set()
        self._removed = False
        self._told: set[str] = set()
        self._volumes: dict[str, str] = {}  # source of a bind mount, absolute -> where it is in the guest

    # ---- create ----

    async def create(self, init: Process, whose_pids: Callable[[str], str]) -> AgentClient:
        """Make them all, and the container in the guest of them.

        Args:
            init: Its first process, whose streams are open.
            whose_pids: Gives the container whose PID namespace a path means; empty for the pod's own, or none.

        Returns:
            The agent that has made it.

        Raises:
            KataError: Whatever went wrong; nothing of it is left then.
        """
        try:
            return await self._create(init, whose_pids)
        except BaseException:
            await self._roll_back()
            raise

    async def _create(self, init: Process, whose_pids: Callable[[str], str]) -> AgentClient:
        if self._runtime.machine.started is None:
            await self._runtime.ready()  # which says why there is no machine
        # All that can be worked out before the guest is there is: its kernel boots meanwhile.
        await self._mount_root()
        self.config, volumes = await self._tasks.run_blocking(
            nodes.of_guest, self.config, self._host.settings.host_devices
        )
        shown = await self._tasks.run_blocking(self._shared.add_all, self.config, self._rootfs)
        for mount, bind in zip(spec.host_binds(self.config), shown, strict=True):
            source = os.path.join(self._bundle, str(mount.get("source") or ""))
            self._volumes[os.path.normpath(source)] = bind.source
        files = etc_files.EtcFiles(self._host, self.config, self._id, self._shared)
        limited = await self._limited(volumes)
        guest_spec = self._guest_spec(shown, files.mounts, volumes, limited, terminal=init.stdio.terminal)
        unknown: list[str] = []
        message = spec.to_message(guest_spec, unknown)
        self._tell_of(f"the member {name!r}, which the specification does not have," for name in unknown)
        pids_of = whose_pids(spec.pids_path(self.config))
        request = Encoded(
            create_request(
                self._id,
                message,
                [
                    *rootfs.storages(
                        self._id,
                        self._rootfs,
                        self._runtime.machine.disk_addresses,
                        mapped=self._runtime.machine.maps_image,
                    ),
                    *self._shared.storages,
                ],
                await self._insert_devices(volumes),
                shares_pids=bool(spec.pids_path(self.config)) and not pids_of,
                no_stdin=has_no_input(init),
                pids_of=pids_of,
            ).encode()
        )
        agent = await self._runtime.ready()
        if DEFAULT_ERRNO not in agent.features:
            self._tell_of(spec.default_errno(guest_spec))
        if pids_of and PIDS_OF not in agent.features:
            raise UnsupportedError(
                f"cannot show the container the processes of container {pids_of!r}:"
                " the guest's agent has no call for that",
                "Use a guest of this version of kata, or share the whole pod's processes (shareProcessNamespace).",
            )
        is_pause_container = spec.container_type(self.config) == "pod_sandbox"
        await self._host.resizer.admit(self._id, self._resources, is_sandbox=is_pause_container)
        for kind in HOOKS_BEFORE:
            await self.run_hooks(kind, "creating", _pid_of(init) or self._runtime.host_pid)
        began = time.monotonic_ns()
        await files.write(agent)
        if self._shared.copies:
            await copies.send(agent, self._shared.copies)
            self._shared.copies.clear()
        if self._shared.relay is not None:
            await self._shared.relay.listen(agent)
        try:
            await agent.create_container(request, self._host.settings.described().guest.create_s)
        except AgentError as error:
            raise spec.explain_size(error, f"container {self._id!r}", self.config) from None
        self._host.timings.add("root file system", began)
        return agent

    def volume_in_guest(self, path: str) -> str:
        """Where a volume of the container is in the guest; empty if there is none of that path on the host."""
        return self._volumes.get(os.path.normpath(path), "")

    async def _roll_back(self) -> None:
        self._host.resizer.remove_container(self._id)
        self.close_relay()
        await self._remove_disks()
        await self._tasks.run_blocking(self._remove_shared)

    async def _remove_disks(self) -> None:
        await self._disks.remove_all()
        if self._snapshot is not None:
            await self._snapshot.remove()

    async def _mount_root(self) -> None:
        root = self._root
        if root is None:
            return
        if root.disk is None:
            if not await self._mount_snapshot(root):
                await self._tasks.run_blocking(root.mount)
            return
        address = await self._disks.insert(root.disk.path, readonly=root.disk.readonly)
        self._rootfs = rootfs.DiskRoot(address, root.disk.fstype, root.disk.options)

    async def _mount_snapshot(self, root: HostRoot) -> bool:
        """Have the guest mount a snapshot from disks, where that is wanted and can be."""
        host = self._host
        described = host.settings.described().snapshots
        if root.mounted_by_host:
            return False
        if host.share is not None:
            if described.upper_layer == "live" or len(disks.devices_of(self.config)) > DEVICES_BESIDE:
                return False
            from kata.engine.containers import snapshot_root

            if not snapshot_root.is_wanted(described.upper_layer, self.config):
                return False
        else:  # there is no other way
            from kata.engine.containers import snapshot_root
        self._snapshot = snapshot_root.SnapshotRoot(
            self._id, host.runtime, host.tasks, host.journal, host.layer_disks(), described
        )
        made = await self._snapshot.make(root.mounts, is_only_way=host.share is None)
        if made is None:
            self._snapshot = None
            return False
        self._rootfs = made
        return True

    async def carry_back(self) -> None:
        """The container's first process has ended: what was written where only the guest sees it goes to the host.
        Never raises."""
        if self._snapshot is not None:
            await self._snapshot.carry_back(self.config)

    async def _insert_devices(self, volumes: list[disks.Device]) -> list[agent_pb.Device]:
        """Make the host's block devices that the specification lists, or mounts, disks of the machine."""
        found = []
        for device in (*disks.devices_of(self.config), *volumes):
            path, served = await self._tasks.run_blocking(self._place_of, device)
            address = await self._disks.insert(path, readonly=device.readonly, vhost_user=served)
            found.append(agent_pb.Device(type="blk", id=address, container_path=device.container_path))
        return found

    def _place_of(self, device: disks.Device) -> tuple[str, bool]:
        """Where a device is on the host, and whether that is a vhost-user server's socket. Blocks."""
        store = self._host.settings.described().hypervisor.vhost_user_store
        if store:
            from kata.engine.containers import vhost_user

            socket = vhost_user.socket_of(store, device.numbers)
            if socket:
                return socket, True
        return device.host_path(), False

    async def _limited(self, volumes: list[disks.Device]) -> set[tuple[int, int]]:
        """The host's numbers of the container's disks for which there are limits that the guest can keep."""
        numbers = {device.numbers for device in (*disks.devices_of(self.config), *volumes)}
        self._disk_numbers = numbers
        block_io = ((self.config.get("linux") or {}).get("resources") or {}).get("blockIO") or {}
        if not any(spec.limits_of(block_io.get(key), numbers) for key in spec.OF_HOST_DEVICES):
            return set()
        agent = await self._runtime.ready()
        return numbers if DEVICE_LIMITS in agent.features else set()

    def _guest_spec(
        self,
        shown: list[spec.GuestBind],
        files: dict[str, str],
        volumes: list[disks.Device],
        limited: set[tuple[int, int]],
        *,
        terminal: bool,
    ) -> dict[str, Any]:
        self._tell_of(spec.dropped(self.config, limited))
        config = spec.for_guest(
            nodes.with_volumes(nodes.with_guests(disks.drop_host_devices(self.config)), volumes),
            rootfs=rootfs.path(self._id),
            bundle=self._bundle,
            container_type=spec.container_type(self.config),
            binds=shown,
            files=files,
            cgroups_path=f"/{self._id}",
            disks=limited,
        )
        if self._host.settings.described().guest.no_seccomp:
            config["linux"].pop("seccomp", None)
        config["process"] = {**(config.get("process") or PLACEHOLDER_PROCESS), "terminal": terminal}
        return config

    def _tell_of(self, dropped: Iterable[str]) -> None:
        """Say in the log, once for the container, what of a specification or a change of it the guest does not get."""
        for what in sorted(set(dropped) - self._told):
            self._told.add(what)
            self._tasks.log(f"container {self._id}: {what} cannot be carried into the guest")

    # ---- hooks ----

    async def run_hooks(self, kind: str, status: str, pid: int) -> None:
        """Run the hooks of one kind on the host.

        Args:
            kind: Their name in the specification.
            status: The container's, for them.
            pid: The process of the host that stands for the container; 0 when it has ended.

        Raises:
            HostError: One failed; those behind it have not run.
        """
        wanted = (self.config.get("hooks") or {}).get(kind)
        host = self._runtime.machine.host
        if not wanted or host is None:
            return
        from kata.engine.containers import hooks

        state = hooks.state(self._id, self._bundle, pid, status, self.config)
        own = self._root if kind == IN_ROOT else None
        root = (
            own.path if own is not None and own.mounted_by_host else "/"
        )  # otherwise the host does not see it
        await self._tasks.run_blocking(hooks.run, kind, wanted, state, host, root)

    async def _run_last_hooks(self) -> None:
        """Run the hooks of a container that has ended: a failure is told in the log and changes nothing, not even for
        the hooks behind it (config.md, "poststop")."""
        wanted = (self.config.get("hooks") or {}).get("poststop")
        host = self._runtime.machine.host
        if not wanted or host is None:
            return
        from kata.engine.containers import hooks

        state = hooks.state(self._id, self._bundle, 0, "stopped", self.config)
        for one in wanted:
            try:
                await self._tasks.run_blocking(hooks.run, "poststop", [one], state, host)
            except KataError as error:
                self._tasks.log(f"container {self._id}: {error.message}")

    # ---- change, remove ----

    async def update(self, resources: dict[str, Any]) -> None:
        """Change the limits in the guest, and the machine with them.

        Args:
            resources: Of the OCI specification; well-formed.

        Raises:
            UnsupportedError: A limit is about one of the container's disks.
            KataError: The machine cannot become so large, or the guest refused; nothing is changed then.
        """
        block_io = resources.get("blockIO") or {}
        for key, meaning in spec.OF_HOST_DEVICES.items():
            if spec.limits_of(block_io.get(key), self._disk_numbers):
                raise UnsupportedError(
                    f"cannot change {meaning}: those of a container's disks are set when it is created",
                    f"Create the container anew with the new value of blockIO.{key}.",
                )
        agent = await self._runtime.ready()
        change = spec.resources_message(resources)
        after = merged(self._resources, resources)
        await self._host.resizer.update(self._id, after, lambda: agent.update(self._id, change))
        self._resources = after
        self._tell_of(spec.dropped(resources))

    async def remove(self) -> None:
        """Take what is left of it out of the guest: its mounts are synced and undone. Once; never raises."""
        if self._removed:
            return
        self._removed = True
        self._host.resizer.remove_container(self._id)
        self.close_relay()
        agent = self._runtime.living_agent
        if agent is not None:
            try:
                await agent.remove_container(self._id, REMOVE_S)
            except KataError as error:
                self._tasks.log(
                    f"container {self._id} was not removed in the guest: {escape_line(error.message)}"
                )
        await self._remove_disks()
        try:
            await self._tasks.run_blocking(self._remove_shared)
        except OSError as error:
            self._tasks.log(f"a volume of container {self._id} is still mounted: {error}")
        await self._run_last_hooks()

    def close_relay(self) -> None:
        """Nobody of the container is left to reach the host's sockets."""
        if self._shared.relay is not None:
            self._shared.relay.close()

    def _remove_shared(self) -> None:
        self._shared.remove_all()
        if self._root is not None:
            self._root.unmount()
