"""How a sandbox comes up, from top to bottom: the first half, up to the start of its machine.

`power_on` runs before anything heavy is imported: the virtual machine boots while Python loads the rest of the engine.
The second half is `kata.engine.lifecycle.guest_setup`.
"""

from __future__ import annotations

import os
import time

from kata import sysio
from kata.engine.lifecycle import boot_slots, volumes
from kata.engine.lifecycle.booted_machine import COLD, POOL, TEMPLATE, BootedMachine
from kata.errors import HostError, SavedMachineError, UnsupportedError
from kata.hypervisor import registry
from kata.hypervisor.base import Attachments, Disk, MachineShape, Nic, random_mac

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from kata.engine.factory.template import Template
    from kata.engine.factory.waiting_machine import Waiting
    from kata.hypervisor.base import Capabilities
    from kata.hypervisor.protocols import Monitor, Started
    from kata.hypervisor.vfio import Given
    from kata.journal import Journal
    from kata.resources import host_cgroup
    from kata.resources.host_cgroup import HostCgroup
    from kata.settings import MachineSettings, SandboxSettings

KERNEL_PARAMETERS = (
    "quiet",  # a console line costs an emulated guest a third of a millisecond
    "panic=-1",  # a guest that panics ends its machine at once, with its reason on the console
    "net.ifnames=0",
    "dummy.numdummies=0",  # the driver would put an interface into every guest
    "cgroup_no_v1=all",
    "rcupdate.rcu_expedited=1",
    "cryptomgr.notests",
    "random.trust_cpu=on",
)
"""Parameters of every guest's kernel; a monitor adds those that its machines need."""
CONSOLE_NAME = "console.log"
BY_9P = "files of the host are shared by 9p, which is slow and lacks much (docs/clients.md)"
DISK_SLOTS = 4
"""Disk slots of a sandbox that does not want all."""


def power_on(
    settings: SandboxSettings, run_dir: str, journal: Journal, waiting: Waiting | None = None
) -> BootedMachine:
    """Start the hypervisor and its helpers. This is the recipe.

    Args:
        settings: The sandbox's; what its log is to say is added to its ``notes``.
        run_dir: Its directory.
        journal: Its journal.
        waiting: A machine that waited for it, and has its disks. If it does not fit it is ended, and another started.

    Raises:
        KataError: Something is missing on this host. Nothing is left open then; what is in the journal is undone
            with it.
    """
    reason = ""
    if waiting is not None:
        if not waiting.reason:
            try:
                return _power_on(Boot(settings, run_dir, journal, waiting))
            except Unfit:
                pass
        waiting.go_home()  # what was mounted where we were is gone with that
        waiting.discard()
        reason = waiting.reason
    return _power_on(Boot(settings, run_dir, journal, unfit=reason))


class Unfit(Exception):
    """The machine that waited is none for this sandbox, for its `Waiting.reason`."""


def _power_on(boot: Boot) -> BootedMachine:
    """Carry out the steps of a start."""
    steps = (
        boot.choose_monitor,
        boot.keep_host_namespaces,
        boot.enter_namespace,
        boot.prepare_share,
        boot.set_devices_aside,
        boot.plan_network,
        boot.prepare_file_server,
        boot.describe_machine,
        boot.take_boot_slot,
        boot.start_monitor,
        boot.join_cgroup,
        boot.start_file_server,
        boot.start_network,
        boot.set_oom_scores,
        boot.complete_monitor,
        boot.give_first_calls,
    )
    try:
        began = time.monotonic_ns()
        for step in steps:
            step()
            ended = time.monotonic_ns()
            boot.machine.steps.append((step.__name__, began, ended))
            began = ended
    except BaseException:
        boot.undo()
        raise
    return boot.machine


class Boot:
    """The steps of `power_on`, in their order. Each leaves in `undo` what takes back what it has made.

    Args:
        settings: The sandbox's.
        run_dir: Its directory.
        journal: Its journal.
        waiting: See `power_on`.
        unfit: Why one that waited could not be used; empty if none did.
    """

    __slots__ = (
        "_attachments",
        "_described",
        "_given",
        "_journal",
        "_nics",
        "_run_dir",
        "_settings",
        "_share",
        "_undo",
        "_unfit",
        "_waiting",
        "capabilities",
        "machine",
        "monitor",
    )

    def __init__(
        self,
        settings: SandboxSettings,
        run_dir: str,
        journal: Journal,
        waiting: Waiting | None = None,
        unfit: str = "",
    ) -> None:
        self.machine = BootedMachine()
        self._waiting = waiting
        self._unfit = unfit
        self.monitor: Monitor
        self.capabilities: Capabilities
        self._settings = settings
        self._described = settings.described()
        self._run_dir = run_dir
        self._journal = journal
        self._share = volumes.Share(run_dir, journal)
        self._nics: list[Nic] = []
        self._given: Given | None = None  # devices of the host
        self._attachments: Attachments
        self._undo: list[Callable[[], object]] = []

    def note(self, sentence: str) -> None:
        """Have the sandbox's log say something."""
        self._settings.notes.append(sentence)

    def undo(self) -> None:
        """Take back what the steps have made so far, the last first."""
        while self._undo:
            try:
                self._undo.pop()()
            except Exception as error:  # the others are taken back all the same
                self.note(f"a start that failed was not taken back whole: {error}")

    def choose_monitor(self) -> None:
        """Ask the hypervisor what it can do here, before anything is made.

        Raises:
            ConfigError: There is no such hypervisor.
            HostError: It cannot do without KVM.
            UnsupportedError: It cannot do what the sandbox needs.
        """
        hypervisor, disks = self._described.hypervisor, self._settings.disks
        monitor = registry.find(hypervisor.name)
        capabilities = monitor.capabilities(
            hypervisor.accel, hypervisor.options, bounces=self._described.guest.bounces
        )
        if hypervisor.accel not in monitor.accelerators:
            raise HostError(f"{monitor.title} needs KVM, which does not work on this host", "kata doctor")
        if len(disks) > capabilities.disk_slots:
            raise UnsupportedError(
                f"{monitor.title} gives a machine {capabilities.disk_slots} disks, and"
                f" {len(disks)} are needed",
                "Give the container fewer volumes that are disks.",
            )
        if not capabilities.shares or self._described.share.disabled:
            self._check_without_share(monitor.title)
        self.monitor = self.machine.monitor = monitor
        self.capabilities = self.machine.capabilities = capabilities

    def _check_without_share(self, title: str) -> None:
        """Refuse a container that needs files of the host which cannot be copied."""
        own = self._settings.container
        if own is None:
            return
        if own.rootfs is not None and own.rootfs.kind == "share":
            raise UnsupportedError(
                f"the root file system {own.rootfs.source} is a directory, and this machine of {title} shares no files"
                " with the host",
                "Use an image of the image store, or a hypervisor and a configuration with a share (shared_fs;"
                " docs/hypervisors.md).",
            )
        if own.volumes:
            from kata.engine.containers import copies

            for volume in own.volumes:
                copies.check(volume.source, volume.destination, readonly=volume.readonly)

    def keep_host_namespaces(self) -> None:
        """Hold the host's namespaces open, for what a client's specification may have done there."""
        if not self._settings.client.keeps_host_mounts:
            return
        from kata.engine import hostns

        self.machine.host = hostns.Namespaces()
        self._undo.append(self.machine.host.close)

    def enter_namespace(self) -> None:
        """Go into a mount namespace of our own, and find there what the machine brings along that waited.

        Raises:
            HostError: Not permitted.
            Unfit: What it has brought could not be put in its place.
        """
        flags = os.O_RDONLY | os.O_CLOEXEC
        self.machine.host_mounts = sysio.Fd(os.open("/proc/self/ns/mnt", flags))
        self._undo.append(self.machine.host_mounts.close)
        if self._settings.network.mode == "netns":
            self.machine.host_network = sysio.Fd(os.open("/proc/self/ns/net", flags))
            self._undo.append(self.machine.host_network.close)
        volumes.own_namespace()
        if self._waiting is not None and not self._waiting.bring_share(self._journal):
            raise Unfit

    def prepare_share(self) -> None:
        """Make the directory that is shared with the guest, if anything is to be."""
        if not (self.capabilities.shares and self._settings.needs_share()):
            return
        share = self._waiting.around.share if self._waiting is not None else None
        if share is not None:
            self._share = share
        else:
            self._share.prepare()
        self.machine.share = self._share

    def set_devices_aside(self) -> None:
        """Take the devices that the machine is given away from the host.

        Raises:
            KataError: See `kata.hypervisor.vfio.give`.
            UnsupportedError: The hypervisor cannot give a machine any.
        """
        numbers = self._settings.host_devices
        if not numbers:
            return
        if not self.capabilities.host_devices:
            raise UnsupportedError(
                f"{self.monitor.title} cannot give a machine devices of the host"
                f" (/dev/vfio/{numbers[0]}) here",
                "docs/hypervisors.md says which hypervisors can; none without KVM.",
            )
        from kata.hypervisor import vfio

        self._given = vfio.give(numbers, self._journal)

    def plan_network(self) -> None:
        """Work out the network, and make the host's ends of the guest's interfaces.

        Raises:
            KataError: See `kata.network.plan.plan` and `NetworkPlan.setup_nics`.
            UnsupportedError: The hypervisor cannot connect a machine so.
        """
        network = self._settings.network
        if network.mode == "none":
            if has_idle_nic(self._described) and self.capabilities.nics:
                self._nics = [Nic(random_mac())]
            return
        from kata.network.plan import plan

        made = plan(network, backends=self.capabilities.nic_backends)
        if made.backend and made.backend not in self.capabilities.nic_backends:
            raise UnsupportedError(
                f"{self.monitor.title} cannot connect a machine to a network of the mode {network.mode!r}",
                "With kata run: --network none. Networks of containerd, Docker and pods are taps.",
            )
        made.journal = self._journal
        made.keeps_ports = bool(self._described.hypervisor.pool)
        made.stays_empty = network.stays_empty and does_without_idle_nic(self._described)
        if self._waiting is not None:
            self._waiting.connect(made)
        self._undo += (made.stop, made.let_go)
        self._nics = made.setup_nics(self.capabilities.nics, hotplug=self.capabilities.hotplug_nics)
        self._undo += [nic.close for nic in self._nics]
        self.machine.network = made

    def prepare_file_server(self) -> None:
        """Choose how files are shared. A file server listens at once, and is started when the machine boots.

        Raises:
            HostError: virtio-fs was asked for, and there is no virtiofsd.
            HypervisorError: Its socket cannot be made.
        """
        if self.machine.share is None:
            return
        if self._waiting is not None and self._waiting.around.files is not None:
            self.machine.files = self._waiting.around.files
            return
        program = self._file_server()
        if not program:
            return
        from kata.hypervisor import virtiofsd

        cache = self._described.share.cache or "auto"
        files = virtiofsd.FileServer(program, self._share.path, self._run_dir, self._journal, cache)
        self._undo.append(files.stop)
        self.machine.files = files

    def _file_server(self) -> str:
        """The program that serves the share by virtio-fs; empty where the hypervisor itself shall do so, by 9p. That
        is noted for the log, unless it was asked for.
        """
        from kata.hypervisor import virtiofsd

        wanted = self._described.share.protocol
        by_9p = "9p" in self.capabilities.shares
        if wanted == "virtio-9p" and by_9p:
            return ""
        if "virtio-fs" not in self.capabilities.shares:
            self.note(f"{BY_9P}: {self.capabilities.share_note}")
            return ""
        program = virtiofsd.find(self._described.share.daemon)
        if program is None:
            if wanted or not by_9p:
                raise HostError(
                    f"there is no virtiofsd on this host, and {wanted or self.monitor.title} needs it",
                    "apt-get install virtiofsd",
                )
            self.note(f"{BY_9P}: this host has no virtiofsd")
            return ""
        return program

    def describe_machine(self) -> None:
        """Say what the machine is, and what it is connected to."""
        files, network = self.machine.files, self.machine.network
        share = ""
        if self.capabilities.shares:
            share = "virtio-fs" if files is not None else self.capabilities.shares[-1]
        taps = sum(nic.tap_fd is not None for nic in self._nics)
        if self._waiting is not None and self._waiting.around.spare is not None:
            taps += 1  # the machine has its first one already
        self.machine.shape = shape_of(
            self._settings,
            self.capabilities,
            nics=len(self._nics),
            taps=taps,
            host_devices=len(self._given.addresses) if self._given is not None else 0,
            hotplug_nics=network.hotplug_nics if network is not None else 0,
            share=share,
            mapped_mib=self._map_image(),
        )
        self._attachments = Attachments(
            sandbox_id=self._settings.id,
            run_dir=self._run_dir,
            disks=disks_of(self._settings),
            nics=self._nics,
            host_devices=self._given.addresses if self._given is not None else (),
            host_nodes=self._given.nodes if self._given is not None else (),
            share_dir=self._share.path if self.machine.share is not None else "",
            share_server=files,
            serves_files=self.machine.share is not None and files is None,
        )

    def _map_image(self) -> int:
        """Have the image of the container be mapped by the guest, if it is to be.

        Returns:
            MiB of the device; 0 where the image is a disk, with the reason in the start ledger if it should not be.
        """
        path = self._settings.image_path()
        if not path or not self._described.hypervisor.map_images:
            return 0
        from kata.hypervisor import mapped

        if not self.capabilities.maps_image:
            mib, reason = 0, f"this machine of {self.monitor.title} has no virtio-pmem"
        else:
            mib, reason = mapped.prepare(path, self._described.size.memory_mib)
        self.machine.disk_reason = f"the image is a disk: {reason}" if reason else ""
        return mib

    def take_boot_slot(self) -> None:
        """Wait until this machine may boot."""
        self.machine.ready_ns = time.monotonic_ns()
        self.machine.boot_slot = boot_slots.BootSlot(self.note)
        self._undo.append(self.machine.free_boot_slot)

    def start_monitor(self) -> None:
        """Start the machine: it boots from here on.

        Raises:
            Unfit: The machine that waited is none for this sandbox.
            KataError: See `kata.hypervisor.protocols.Monitor.start`.
        """
        assert self.machine.shape is not None
        self.machine.started_ns = time.monotonic_ns()
        started = self._from_template() or self.monitor.start(
            self.machine.shape, self._attachments, self._journal
        )
        if self.machine.waiting is not None:
            self._attachments.close()
        self._undo.append(started.close)
        self._undo.append(lambda: started.status(END_S))
        self._undo.append(started.kill)
        self.machine.started = started
        if self.machine.network is not None:
            for index, address in enumerate(started.nic_addresses):
                self.machine.network.place(index, address)

    def _from_template(self) -> Started | None:
        """Have the machine go on from its template; None where it has to boot."""
        from kata.engine.factory import template as templates

        hypervisor, shape = self._described.hypervisor, self.machine.shape
        assert shape is not None
        found = self.machine.template = templates.find(
            templates.root_of(hypervisor.template_path),
            templates.mode_of(enabled=hypervisor.templates),
            self.monitor,
            self.capabilities,
            shape,
        )
        waiting = self._waiting
        if waiting is not None:
            if not waiting.fits(found):
                raise Unfit
            self.machine.came_by(POOL)
            self.machine.waiting = waiting
            self._fill_pool(found, shape)
            return waiting.started
        if found.reason:
            self.machine.came_by(COLD, found.reason)
            return None
        reason = self._fill_pool(found, shape)
        self.machine.came_by(TEMPLATE, self._unfit or reason)
        try:
            return self.monitor.restore(found.path, self._attachments, self._journal, shape)
        except SavedMachineError as error:
            self.machine.distrust_template(error)
            if self._attachments.is_closed:
                raise
            self.note(f"the machine boots, since its template was of no use: {error.message}")
            self.machine.fill_pool = None  # which would wait for machines of that template
            self.machine.came_by(COLD, f"its template was of no use: {error.message}")
            return None

    def _fill_pool(self, template: Template, shape: MachineShape) -> str:
        """Have another such machine wait when this one is up, if the configuration says so.

        Returns:
            Why none had waited for this sandbox; empty where none is to.
        """
        hypervisor = self._described.hypervisor
        if not hypervisor.pool:
            return ""
        from kata.engine.factory import pool, pool_counts

        if not self.capabilities.waits:
            return f"machines of {self.monitor.title} do not wait for sandboxes"
        files = self.machine.files
        reason = pool.why_not(self._settings)
        if self.machine.share is not None and files is None:
            reason = "its files of the host are shared by 9p"
        if reason:
            return reason
        needs = pool.wanted(self._settings, self._settings.to_plain())
        missed = self._waiting is None and not self._unfit

        def fill() -> None:
            if missed:
                pool_counts.count(pool_counts.MISSED)
            pool.fill(
                *(needs, template, self.monitor, shape, hypervisor.pool, hypervisor.pool_free_mib),
                self.machine.leave_sandbox,
                file_server=(files.program, files.cache) if files is not None else None,
            )

        self.machine.fill_pool = fill
        return self._settings.not_taken or pool.NONE

    def join_cgroup(self) -> None:
        """Put machine and engine into cgroups of their own: after the start, since it takes the host a while, and
        before the helpers are started, which are born into them.
        """
        started, shape = self.machine.started, self.machine.shape
        assert started is not None
        assert shape is not None
        limits = self.machine.host_limits(shape.vcpus, shape.memory_mib)
        name = os.path.basename(self._run_dir)
        pids: tuple[int, ...] = (started.pid, os.getpid())
        if self.machine.waiting is not None:
            pids = (*pids, *self.machine.waiting.around.helpers())
        nodes = self._given.numbers() if self._given is not None else []
        cgroup = limit(self._settings, name, limits, self._journal, pids, nodes)
        self._undo.append(cgroup.leave)
        self.machine.cgroup = cgroup

    def start_file_server(self) -> None:
        """Start what serves the share, if it is not the hypervisor.

        Raises:
            HypervisorError: It cannot be executed.
        """
        if self.machine.files is not None and self.machine.waiting is None:
            self.machine.files.start()

    def start_network(self) -> None:
        """Start what the network needs on the host.

        Raises:
            KataError: See `NetworkPlan.start`.
        """
        if self.machine.network is not None:
            self.machine.network.start(self._journal, self._settings.id)

    def set_oom_scores(self) -> None:
        """When the host has no memory left, the machine is to go before the engine."""
        from kata.resources import oom_score

        oom_score.protect_engine()
        oom_score.set_machine(self._settings.oom_score_adj)

    def complete_monitor(self) -> None:
        """Wait for what the start of the machine has begun beside: the copy of a template's memory.

        Raises:
            HypervisorError: It failed.
            SavedMachineError: The template is of no use.
        """
        assert self.machine.started is not None
        try:
            self.machine.started.complete()
        except SavedMachineError as error:
            self.machine.distrust_template(error)
            raise

    def give_first_calls(self) -> None:
        """Have a machine that goes on from a template set up its guest while the rest of the engine is loaded."""
        if self.machine.start_path == TEMPLATE:
            from kata.engine.lifecycle import first_calls

            first_calls.give(self.machine, self._settings)


END_S = 5.0
"""How long a machine that was killed is waited for."""


def limit(
    settings: SandboxSettings,
    name: str,
    limits: host_cgroup.Limits,
    journal: Journal,
    pids: tuple[int, ...],
    nodes: Sequence[tuple[int, int]] = (),
) -> HostCgroup:
    """Put processes of a sandbox into cgroups with the limits that belong to its size.

    Args:
        settings: The sandbox's.
        name: Of its cgroup where its specification names none.
        limits: What they may take of the host.
        journal: The sandbox's.
        pids: The processes.
        nodes: Numbers of further character devices of the host that they may open.
    """
    from kata.resources import host_cgroup, systemd_scope

    cgroup = host_cgroup.HostCgroup()
    cgroup.allow_nodes(nodes)
    cgroup.make(
        journal,
        host_cgroup.place_of(settings.cgroups_path, name),
        limits,
        all_controllers=settings.client.all_controllers,
        unit=systemd_scope.unit_of(settings.cgroups_path),
    )
    cgroup.join(pids)
    return cgroup


def has_idle_nic(described: MachineSettings) -> bool:
    """Whether a machine without a network has an interface all the same, as those have that wait for sandboxes of
    either kind. Elsewhere there is none: it would only have to be hidden in the guest.
    """
    return bool(described.hypervisor.pool)


def does_without_idle_nic(described: MachineSettings) -> bool:
    """Whether a machine starts without an interface in a network namespace that is likely to stay empty: under software
    emulation, where all that the guest does to hide one has to be translated. With KVM that costs next to nothing, and
    an interface that comes later all the same would have no vhost.
    """
    return described.hypervisor.accel == "tcg"


def disks_of(settings: SandboxSettings) -> list[Disk | None]:
    """The disks that a sandbox starts with, by slot."""
    return [
        None if disk is None else Disk(disk.path, disk.readonly, disk.serial, disk.ephemeral)
        for disk in settings.disks
    ]


def shape_of(
    settings: SandboxSettings,
    capabilities: Capabilities,
    *,
    nics: int = 0,
    taps: int = 0,
    hotplug_nics: int = 0,
    host_devices: int = 0,
    share: str = "",
    mapped_mib: int = 0,
) -> MachineShape:
    """The machine that a sandbox's settings describe.

    Args:
        settings: The sandbox's.
        capabilities: What the hypervisor can do: the machine has no room to grow where it cannot.
        nics: See `MachineShape`.
        taps: See `MachineShape`.
        hotplug_nics: See `MachineShape`.
        host_devices: See `MachineShape`; all memory of such a machine is there from the start, and stays.
        share: See `MachineShape`.
        mapped_mib: See `MachineShape`.
    """
    described = settings.described()
    hypervisor, guest, size = described.hypervisor, described.guest, described.size
    kinds = [
        "spare" if disk is None else "readonly" if disk.readonly else "writable" for disk in settings.disks
    ]
    most = capabilities.disk_slots
    room = (most if settings.all_disk_slots else min(DISK_SLOTS, most)) - len(kinds)
    memory_mib = size.memory_mib
    if hypervisor.huge_pages:
        from kata.hypervisor import huge_pages

        memory_mib = huge_pages.whole(memory_mib)
    parameters = KERNEL_PARAMETERS[1:] if guest.verbose else KERNEL_PARAMETERS
    return MachineShape(
        kernel=guest.kernel,
        initrd=guest.initrd,
        extensions=guest.extensions,
        # Those of the configuration last, so that they prevail.
        parameters=" ".join((*parameters, guest.cmdline)).strip(),
        accel=hypervisor.accel,
        vcpus=size.vcpus,
        max_vcpus=size.max_vcpus if capabilities.spare_vcpus else 0,
        memory_mib=memory_mib,
        max_memory_mib=size.max_memory_mib if capabilities.grow_memory and not host_devices else 0,
        disks=[*kinds, *["spare"] * room],
        nics=nics,
        taps=taps,
        hotplug_nics=hotplug_nics,
        scans_ports=guest.scans_ports,
        share=share,
        console=hypervisor.console or "serial",
        prealloc=hypervisor.prealloc,
        huge_pages=hypervisor.huge_pages,
        ksm=hypervisor.ksm,
        reclaim=hypervisor.reclaim and not host_devices,
        host_devices=host_devices,
        mapped_mib=mapped_mib,
        shared_memory=bool(hypervisor.vhost_user_store) and capabilities.vhost_user_disks,
        options=hypervisor.options,
    )
