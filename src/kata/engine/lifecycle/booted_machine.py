"""What a start has made of a machine and around it, and what belongs to the two together: slot, template, way back."""

from __future__ import annotations

from kata import sysio

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from typing import Any

    from kata.engine import hostns
    from kata.engine.factory.template import Template
    from kata.engine.factory.waiting_machine import Waiting
    from kata.engine.lifecycle import boot_slots, volumes
    from kata.errors import KataError
    from kata.hypervisor import virtiofsd
    from kata.hypervisor.base import Capabilities, MachineShape
    from kata.hypervisor.protocols import Monitor, Started
    from kata.network.user import NetworkPlan
    from kata.resources import host_cgroup
    from kata.resources.host_cgroup import HostCgroup

COLD, TEMPLATE, POOL = "cold", "template", "pool"
"""Ways in which a machine comes up: it boots, goes on from a template, or has waited in the warm pool."""


class BootedMachine:
    """What `kata.engine.lifecycle.boot.power_on` has made. All of it is None or empty where that failed.

    Attributes:
        monitor: The hypervisor.
        capabilities: What it can do on this host.
        shape: What the machine is.
        started: The machine, until the sandbox takes it over.
        cgroup: Its leaves in the host's cgroups.
        files: The file server of the share, if the share is served by one.
        host: The host's namespaces, for hooks that a client's specification may have.
        host_mounts: The host's mount namespace, until the boot slot is free.
        host_network: The network namespace in which the engine was started, if it has left that; as long.
        network: The network, if the sandbox has one.
        share: The share, if the sandbox has one.
        ready_ns: When there was nothing more to do but wait for a boot slot.
        started_ns: When the hypervisor was started.
        boot_slot: The right to boot now, until the first container runs.
        disk_reason: Why the image is read from a disk although it should be mapped; empty if there is no reason.
        calls_made: Calls that are in the agent's channel already, method to stream (see `first_calls`).
        start_path: How the machine comes up: `COLD`, or what a step of the boot has told `came_by`.
        start_reason: Why by no faster way; empty if there is none.
        steps: Of the start: name, begin and end of each, in ns of CLOCK_MONOTONIC.
        template: What is known of the template of such machines; None before it was looked for.
        is_up: The guest has been set up.
        waiting: The machine waited for this sandbox, if it came from the pool.
        fill_pool: Has another one wait, once the guest has been set up.
    """

    __slots__ = (
        "boot_slot",
        "calls_made",
        "capabilities",
        "cgroup",
        "disk_reason",
        "files",
        "fill_pool",
        "host",
        "host_mounts",
        "host_network",
        "is_up",
        "monitor",
        "network",
        "ready_ns",
        "shape",
        "share",
        "start_path",
        "start_reason",
        "started",
        "started_ns",
        "steps",
        "template",
        "waiting",
    )

    def __init__(self) -> None:
        self.template: Template | None = None
        self.waiting: Waiting | None = None
        self.fill_pool: Callable[[], object] | None = None
        self.is_up = False
        self.monitor: Monitor | None = None
        self.capabilities: Capabilities | None = None
        self.shape: MachineShape | None = None
        self.started: Started | None = None
        self.cgroup: HostCgroup | None = None
        self.files: virtiofsd.FileServer | None = None
        self.host: hostns.Namespaces | None = None
        self.host_mounts: sysio.Fd | None = None
        self.host_network: sysio.Fd | None = None
        self.network: NetworkPlan | None = None
        self.share: volumes.Share | None = None
        self.ready_ns = 0
        self.started_ns = 0
        self.boot_slot: boot_slots.BootSlot | None = None
        self.calls_made: dict[str, int] = {}
        self.start_path = COLD
        self.start_reason = ""
        self.disk_reason = ""
        self.steps: list[tuple[str, int, int]] = []

    def came_by(self, path: str, reason: str = "") -> None:
        """Say for the start ledger how the machine comes up.

        Args:
            path: `COLD`, `TEMPLATE` or `POOL`.
            reason: Why by no faster one, as a part of a sentence: ``the sandbox has a share``.
        """
        self.start_path, self.start_reason = path, reason

    def free_boot_slot(self) -> None:
        """Let the next machine boot. If this one is up and had no template to go on from, one is made now."""
        if self.boot_slot is not None:
            self.boot_slot.end()
        if self.is_up and self.template is not None and self.template.is_missing:
            self.template.is_missing = False
            self._make_template(self.template)
        if self.is_up and self.fill_pool is not None:
            fill, self.fill_pool = self.fill_pool, None
            try:
                fill()
            except OSError:
                pass  # the next start tries
        for namespace in (self.host_mounts, self.host_network):
            if namespace is not None:
                namespace.close()
        self.host_mounts = self.host_network = None

    @property
    def is_clone(self) -> bool:
        """Whether it goes on from a template: its guest's clocks began with that."""
        return self.start_path in (TEMPLATE, POOL)

    def distrust_template(self, error: KataError) -> None:
        """The machine did not come up, and its template may be why: the next one boots.

        Args:
            error: What happened, of which the hint says so.
        """
        if self.start_path == TEMPLATE and self.template is not None:
            from kata.engine.factory import template as templates

            templates.discard(self.template, error)

    def _make_template(self, template: Template) -> None:
        from kata.engine.factory import maker

        assert self.monitor is not None
        assert self.shape is not None
        try:
            maker.launch(template, self.monitor, self.shape, self.leave_sandbox)
        except OSError:
            pass  # the next start tries

    def leave_sandbox(self) -> None:
        """In a process that outlives the sandbox: be in its cgroups no more, nor in its network or among its mounts."""
        if self.cgroup is not None:
            self.cgroup.leave()
        if self.host_network is not None:
            try:
                sysio.setns(self.host_network.raw, sysio.CLONE_NEWNET)
            except PermissionError:
                if not sysio.in_user_namespace():
                    raise
        if self.host_mounts is not None:
            sysio.setns(self.host_mounts.raw, sysio.CLONE_NEWNS)

    @property
    def disk_addresses(self) -> Sequence[str]:
        """Where its disks are in the guest, by slot."""
        return self.started.disk_addresses if self.started is not None else ()

    @property
    def maps_image(self) -> bool:
        """Whether the guest maps the disk in slot 0 (`kata.hypervisor.mapped`)."""
        return self.shape is not None and self.shape.mapped_mib > 0

    @property
    def nic_addresses(self) -> Sequence[str]:
        """Where its network interfaces are in the guest."""
        return self.started.nic_addresses if self.started is not None else ()

    def describe_monitor(self) -> dict[str, Any]:
        """Name of the hypervisor and what it can do here, as JSON values; empty before one was chosen."""
        if self.monitor is None or self.capabilities is None:
            return {}
        return {"name": self.monitor.name, "capabilities": self.capabilities.to_plain()}

    @property
    def host_overhead_mib(self) -> int:
        """What running the machine takes on the host beside the guest's memory; 0 where there is none."""
        if self.monitor is None or self.shape is None:
            return 0
        return self.monitor.host_overhead_mib(self.shape.accel)

    def host_limits(self, vcpus: int, memory_mib: int) -> host_cgroup.Limits:
        """What the machine may take of the host at some size.

        Args:
            vcpus: How many processors it uses.
            memory_mib: Its memory, without what its devices take.
        """
        from kata.resources import host_cgroup, sizing

        memory = sizing.host_memory(memory_mib + self.extra_memory_mib, self.host_overhead_mib)
        return host_cgroup.Limits(memory, sizing.host_cpus(vcpus))

    @property
    def extra_memory_mib(self) -> int:
        """Memory of the guest that its devices take, beside what was asked for."""
        return self.started.extra_memory_mib if self.started is not None else 0
