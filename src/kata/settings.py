"""What an engine is told of its sandbox: ``sandbox.json``, as classes.

A client (`kata.cli.session`, `kata.shim.start`) makes a `SandboxSettings`; `kata.engine.launch` hands it to the engine
as plain values (`Part.to_plain`), and the engine makes the same object of them (`Part.from_plain`).

What a class describes below ``Args`` makes the table in docs/settings.md (`tools/settings_table.py`). Imported before
the hypervisor is started.
"""

from __future__ import annotations

from kata.errors import StateError
from kata.settings_part import Part

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from typing import Any

# ---- the machine ----


class HypervisorSettings(Part):
    """The hypervisor, and what the configuration changes of the machine that it emulates.

    Args:
        accel: `kvm` or `tcg` (software emulation).
        name: Which hypervisor, as in `[hypervisor.NAME]`; empty is the default one.
        console: `serial` or `virtio`: the device that the guest's console is; empty is `serial`.
        prealloc: Allocate the guest's memory before it boots.
        huge_pages: The guest's memory is in huge pages of the host, which are set aside for such use.
        ksm: The host may merge equal pages of the guest's memory and others'.
        reclaim: Give the host back what the guest frees.
        vhost_user_store: Where disks are that other processes serve; empty where containers get none.
        map_images: The guest maps the image of its container from the host's page cache (virtio-pmem with DAX).
        options: The hypervisor's own, such as the path of its program: name and value.
        templates: Machines go on from templates where they can.
        template_path: Directory of these; empty is the default one.
        pool: How many machines wait for sandboxes (the warm pool).
        pool_free_mib: MiB that the host has to have available, so that any waits.
    """

    __slots__ = (
        "accel",
        "console",
        "huge_pages",
        "ksm",
        "map_images",
        "name",
        "options",
        "pool",
        "pool_free_mib",
        "prealloc",
        "reclaim",
        "template_path",
        "templates",
        "vhost_user_store",
    )

    def __init__(
        self,
        *,
        accel: str,
        name: str = "",
        console: str = "",
        prealloc: bool = False,
        huge_pages: bool = False,
        ksm: bool = False,
        reclaim: bool = True,
        vhost_user_store: str = "",
        map_images: bool = False,
        options: Mapping[str, Any] | None = None,
        templates: bool = True,
        template_path: str = "",
        pool: int = 0,
        pool_free_mib: int = 1024,
    ) -> None:
        self.pool = pool
        self.pool_free_mib = pool_free_mib
        self.templates = templates
        self.template_path = template_path
        self.accel = accel
        self.name = name
        self.console = console
        self.prealloc = prealloc
        self.huge_pages = huge_pages
        self.ksm = ksm
        self.reclaim = reclaim
        self.vhost_user_store = vhost_user_store
        self.map_images = map_images
        self.options = dict(options or {})


class GuestSettings(Part):
    """What boots in the machine.

    Args:
        kernel: Path of the kernel.
        initrd: Path of the initrd.
        extensions: Paths of archives that are put behind the initrd.
        kernel_version: Of the kernel, such as `6.1.192`; empty where it is not known.
        bounces: The kernel can use virtio-fs in an emulated machine (bounce pages).
        scans_ports: The agent finds a share that is plugged into a port, where nothing announces that.
        cmdline: Parameters of the kernel behind the engine's own.
        verbose: The kernel writes all its messages to the console (no `quiet`).
        modules: Kernel modules to load, each with its parameters behind its name.
        no_seccomp: No seccomp filters for containers.
        ready_s: Seconds that the guest may take to come up; 0 is the engine's default.
        create_s: Seconds that making a container may take; 0 is the engine's default.
    """

    __slots__ = (
        "bounces",
        "cmdline",
        "create_s",
        "extensions",
        "initrd",
        "kernel",
        "kernel_version",
        "modules",
        "no_seccomp",
        "ready_s",
        "scans_ports",
        "verbose",
    )

    def __init__(
        self,
        *,
        kernel: str,
        initrd: str,
        extensions: Sequence[str] = (),
        kernel_version: str = "",
        bounces: bool = False,
        scans_ports: bool = False,
        cmdline: str = "",
        verbose: bool = False,
        modules: Sequence[Sequence[str]] = (),
        no_seccomp: bool = False,
        ready_s: float = 0,
        create_s: float = 0,
    ) -> None:
        self.kernel = kernel
        self.initrd = initrd
        self.extensions = list(extensions)
        self.kernel_version = kernel_version
        self.bounces = bounces
        self.scans_ports = scans_ports
        self.cmdline = cmdline
        self.verbose = verbose
        self.modules = [list(module) for module in modules]
        self.no_seccomp = no_seccomp
        self.ready_s = ready_s
        self.create_s = create_s


class SizeSettings(Part):
    """How large the machine is, and what was asked for (`kata.resources.sizing`).

    Args:
        vcpus: Processors at the start.
        memory_mib: Memory at the start, in MiB.
        max_vcpus: Processors up to which it may grow while it runs; 0 is not at all.
        max_memory_mib: Memory in MiB up to which it may grow while it runs; 0 is not at all.
        fixed_memory: Memory neither grows nor shrinks, whatever is asked for later.
        default_memory_mib: Memory in MiB for containers without a limit.
        kernel: Kind of the guest's kernel, `small` or `distro`: how much it keeps for itself.
        asked_cpus: Processors that were asked for, which may be a fraction.
        asked_memory: Bytes of memory that were asked for.
        asked_by: Who asked, in words.
    """

    __slots__ = (
        "asked_by",
        "asked_cpus",
        "asked_memory",
        "default_memory_mib",
        "fixed_memory",
        "kernel",
        "max_memory_mib",
        "max_vcpus",
        "memory_mib",
        "vcpus",
    )

    def __init__(
        self,
        *,
        vcpus: int,
        memory_mib: int,
        max_vcpus: int = 0,
        max_memory_mib: int = 0,
        fixed_memory: bool = False,
        default_memory_mib: int = 0,
        kernel: str = "small",
        asked_cpus: float | None = None,
        asked_memory: int | None = None,
        asked_by: str = "",
    ) -> None:
        self.vcpus = vcpus
        self.memory_mib = memory_mib
        self.max_vcpus = max_vcpus
        self.max_memory_mib = max_memory_mib
        self.fixed_memory = fixed_memory
        self.default_memory_mib = default_memory_mib
        self.kernel = kernel
        self.asked_cpus = asked_cpus
        self.asked_memory = asked_memory
        self.asked_by = asked_by


class ShareSettings(Part):
    """How files of the host reach the guest.

    Args:
        disabled: Not at all: a container that needs it is refused.
        protocol: `virtio-fs` or `virtio-9p`; empty is virtio-fs where host and guest can do that, otherwise 9p.
        daemon: The program that serves virtio-fs; empty looks for it.
        cache: What a guest may keep with virtio-fs: `auto`, `always`, `never`; empty is `auto`.
        msize: Largest message of 9p in bytes; 0 is the engine's default.
    """

    __slots__ = ("cache", "daemon", "disabled", "msize", "protocol")

    def __init__(
        self,
        *,
        disabled: bool = False,
        protocol: str = "",
        daemon: str = "",
        cache: str = "",
        msize: int = 0,
    ) -> None:
        self.disabled = disabled
        self.protocol = protocol
        self.daemon = daemon
        self.cache = cache
        self.msize = msize


class SnapshotSettings(Part):
    """Root file systems that a client's snapshotter has made of directories.

    Args:
        upper_layer: Where what a container writes is while it runs: `live` (in the snapshot's upper directory, by the
            share), `block` (on a disk of its own, from where it is carried back when the container ends), or `auto`:
            `block` for containers of Kubernetes' pods.
        upper_mib: Size of that disk, in MiB.
        images_mib: What the cached images of snapshots' layers may take on this host, in MiB.
    """

    __slots__ = ("images_mib", "upper_layer", "upper_mib")

    def __init__(
        self, *, upper_layer: str = "auto", upper_mib: int = 10240, images_mib: int = 20480
    ) -> None:
        self.upper_layer = upper_layer
        self.upper_mib = upper_mib
        self.images_mib = images_mib


class TracingSettings(Part):
    """Tracing (docs/tracing.md).

    Args:
        agent: The agent reports what it spends its time on as well.
        config: The configuration file that was named for the sandbox, which has the collector's address; empty is the
            host's.
    """

    __slots__ = ("agent", "config")

    def __init__(self, *, agent: bool = False, config: str = "") -> None:
        self.agent = agent
        self.config = config


class MachineSettings(Part):
    """The virtual machine (`kata.engine.machine` makes this of the configuration).

    Args:
        hypervisor: The hypervisor.
        guest: What boots.
        size: How large it is.
        share: How files of the host reach it.
        snapshots: How root file systems of snapshots reach it.
        configuration: What is not as by default: name of the key -> its value and where it was found. Only shown.
        tracing: What starts and calls spend their time on is traced; absent is not at all.
        log_format: What the lines of the engine's log are: `text`, `logfmt` or `json`.
        log_level: What the engine's log shows at the start: `debug`, `info` or `warning`, and what is more severe.
        engine_parent: The engine is forked off the parent of engines, where there is one.
    """

    __slots__ = (
        "configuration",
        "engine_parent",
        "guest",
        "hypervisor",
        "log_format",
        "log_level",
        "share",
        "size",
        "snapshots",
        "tracing",
    )

    def __init__(
        self,
        *,
        hypervisor: HypervisorSettings,
        guest: GuestSettings,
        size: SizeSettings,
        share: ShareSettings | None = None,
        snapshots: SnapshotSettings | None = None,
        configuration: Mapping[str, Sequence[Any]] | None = None,
        tracing: TracingSettings | None = None,
        log_format: str = "text",
        log_level: str = "info",
        engine_parent: bool = False,
    ) -> None:
        self.engine_parent = engine_parent
        self.hypervisor = hypervisor
        self.guest = guest
        self.size = size
        self.share = share or ShareSettings()
        self.snapshots = snapshots or SnapshotSettings()
        self.configuration = dict(configuration or {})
        self.tracing = tracing
        self.log_format = log_format
        self.log_level = log_level


class DiskSettings(Part):
    """A disk that the machine has from the start.

    Args:
        path: A raw image or block device.
        readonly: The guest cannot write.
        serial: Serial number that the guest sees, at most 20 characters.
        ephemeral: It does not outlive the machine, so nothing has to reach the host's disk.
    """

    __slots__ = ("ephemeral", "path", "readonly", "serial")

    def __init__(self, *, path: str, readonly: bool, serial: str = "", ephemeral: bool = False) -> None:
        self.path = path
        self.readonly = readonly
        self.serial = serial
        self.ephemeral = ephemeral


# ---- the network ----


class PortSettings(Part):
    """A published port.

    Args:
        host_port: On the host.
        guest_port: In the guest.
        host_ip: Address of the host; empty is all.
        proto: `tcp` or `udp`.
    """

    __slots__ = ("guest_port", "host_ip", "host_port", "proto")

    def __init__(self, *, host_port: int, guest_port: int, host_ip: str = "", proto: str = "tcp") -> None:
        self.host_port = host_port
        self.guest_port = guest_port
        self.host_ip = host_ip
        self.proto = proto


class EndpointSettings(Part):
    """A sandbox's place in a network with a name (`kata.network.bridge`).

    Args:
        network: The network's name.
        path: The network's directory.
        namespace: Where the network's namespace can be opened until this sandbox has joined it.
        address: IPv4 address of the guest in it.
        prefix: Length of the network's prefix, bits.
        mac: Hardware address of the guest's interface.
        names: By which the others of the network find it, the container's own first.
        address6: IPv6 address of the guest in it; empty for none.
        prefix6: Length of that one's prefix, bits.
    """

    __slots__ = ("address", "address6", "mac", "names", "namespace", "network", "path", "prefix", "prefix6")

    def __init__(
        self,
        *,
        network: str,
        path: str,
        namespace: str,
        address: str,
        prefix: int,
        mac: str,
        names: Sequence[str] = (),
        address6: str = "",
        prefix6: int = 0,
    ) -> None:
        self.address6 = address6
        self.prefix6 = prefix6
        self.network = network
        self.path = path
        self.namespace = namespace
        self.address = address
        self.prefix = prefix
        self.mac = mac
        self.names = list(names)


class NetworkSettings(Part):
    """The sandbox's network.

    Args:
        mode: `none`, `user` (passt), `tap` (the same by a tap device, from pasta) or `netns` (what a network
            namespace has).
        ports: Published ports; with `user` and `tap`.
        dns: Addresses of name servers with `user` and `tap`; none are the host's.
        path: The network namespace with `netns`; empty makes one.
        model: How interfaces of that are connected: `tcfilter`, `macvtap` or `none`.
        endpoints: Networks with a name that it is in besides, with `user`.
        outside: There is a way out; without, it has those networks alone.
        stays_empty: No interface is likely to come into a namespace that is made. An emulated machine starts without
            one then, and is given one if it comes all the same.
    """

    __slots__ = ("dns", "endpoints", "mode", "model", "outside", "path", "ports", "stays_empty")

    def __init__(
        self,
        *,
        mode: str = "none",
        ports: Sequence[PortSettings] = (),
        dns: Sequence[str] = (),
        path: str = "",
        model: str = "tcfilter",
        endpoints: Sequence[EndpointSettings] = (),
        outside: bool = True,
        stays_empty: bool = False,
    ) -> None:
        self.mode = mode
        self.ports = list(ports)
        self.dns = list(dns)
        self.path = path
        self.model = model
        self.endpoints = list(endpoints)
        self.outside = outside
        self.stays_empty = stays_empty


# ---- the container that a sandbox is made for ----


class RootfsSettings(Part):
    """A container's root file system: a layer that is read only, and a writable one over it.

    Args:
        kind: `erofs` (a disk) or `share` (a directory of the host).
        lower_slot: Number of the disk with the erofs image.
        source: The directory, with `share`.
        upper: The writable layer: `tmpfs`, or `disk`; empty with `share` is none, and what is written reaches the host.
        upper_slot: Number of the disk with the writable layer.
    """

    __slots__ = ("kind", "lower_slot", "source", "upper", "upper_slot")

    def __init__(
        self,
        *,
        kind: str,
        lower_slot: int | None = None,
        source: str = "",
        upper: str = "",
        upper_slot: int | None = None,
    ) -> None:
        self.kind = kind
        self.lower_slot = lower_slot
        self.source = source
        self.upper = upper
        self.upper_slot = upper_slot


class VolumeSettings(Part):
    """A directory or file of the host that the container sees; its specification has the mount.

    Args:
        source: On the host.
        destination: In the container.
        readonly: The container cannot write.
    """

    __slots__ = ("destination", "readonly", "source")

    def __init__(self, *, source: str, destination: str, readonly: bool = False) -> None:
        self.source = source
        self.destination = destination
        self.readonly = readonly


class DiskVolumeSettings(Part):
    """A volume of the container that is one of the machine's disks, with an ext4 file system.

    Args:
        name: Its file in the container's directory, which is the source of its bind mount in the specification.
        slot: Number of the disk.
        copy: It is filled with what the image has at its place when it is first mounted.
        stays: It outlives its container, so the guest always gets time to write it back.
    """

    __slots__ = ("copy", "name", "slot", "stays")

    def __init__(self, *, name: str, slot: int, copy: bool = True, stays: bool = False) -> None:
        self.name = name
        self.slot = slot
        self.copy = copy
        self.stays = stays


class LogSettings(Part):
    """Where the container's output is kept.

    Args:
        path: The file.
        max_bytes: How large it may become before the next one is begun.
        files: How many are kept.
    """

    __slots__ = ("files", "max_bytes", "path")

    def __init__(self, *, path: str, max_bytes: int, files: int) -> None:
        self.path = path
        self.max_bytes = max_bytes
        self.files = files


class HealthSettings(Part):
    """A command that is run in the container again and again, whose outcome says whether it is healthy.

    Args:
        command: The command, with its arguments.
        interval_s: Seconds between two checks.
        timeout_s: Seconds after which a check has failed.
        start_period_s: Seconds in which failures do not count, before the first success.
        retries: How many failures in a row make it unhealthy.
    """

    __slots__ = ("command", "interval_s", "retries", "start_period_s", "timeout_s")

    def __init__(
        self,
        *,
        command: Sequence[str],
        interval_s: float = 30.0,
        timeout_s: float = 30.0,
        start_period_s: float = 0.0,
        retries: int = 3,
    ) -> None:
        self.command = list(command)
        self.interval_s = interval_s
        self.timeout_s = timeout_s
        self.start_period_s = start_period_s
        self.retries = retries


class ContainerSettings(Part):
    """The container with the sandbox's own id, where the client has no other place to describe it.

    Args:
        directory: Its directory: bundle, state, writable layer, log.
        rootfs: Its root file system; none where the client hands one over with Create.
        volumes: What it sees of the host.
        disk_volumes: Its volumes on disks of their own.
        log: Where its output is kept; none keeps none.
        open_stdin: Keep its standard input open for a later `attach`.
        stdin_once: The end of an attached client's input ends the container's.
        record_state: Write `state.json`; not for a stopped container that is opened to copy files.
        auto_remove: Remove the directory at the end.
        extra_hosts: Lines of its `/etc/hosts`, besides its own.
        dns_servers: Name servers of its `/etc/resolv.conf`, instead of the host's.
        dns_searches: Domains there that are searched, instead of the host's; `.` for none.
        dns_options: Options there, instead of the host's.
        health: Its health check; none has none.
    """

    __slots__ = (
        "auto_remove",
        "directory",
        "disk_volumes",
        "dns_options",
        "dns_searches",
        "dns_servers",
        "extra_hosts",
        "health",
        "log",
        "open_stdin",
        "record_state",
        "rootfs",
        "stdin_once",
        "volumes",
    )

    def __init__(
        self,
        *,
        directory: str,
        rootfs: RootfsSettings | None = None,
        volumes: Sequence[VolumeSettings] = (),
        disk_volumes: Sequence[DiskVolumeSettings] = (),
        log: LogSettings | None = None,
        open_stdin: bool = False,
        stdin_once: bool = False,
        record_state: bool = True,
        auto_remove: bool = False,
        extra_hosts: Sequence[str] = (),
        dns_servers: Sequence[str] = (),
        dns_searches: Sequence[str] = (),
        dns_options: Sequence[str] = (),
        health: HealthSettings | None = None,
    ) -> None:
        self.health = health
        self.directory = directory
        self.rootfs = rootfs
        self.volumes = list(volumes)
        self.disk_volumes = list(disk_volumes)
        self.log = log
        self.open_stdin = open_stdin
        self.stdin_once = stdin_once
        self.record_state = record_state
        self.auto_remove = auto_remove
        self.extra_hosts = list(extra_hosts)
        self.dns_servers = list(dns_servers)
        self.dns_searches = list(dns_searches)
        self.dns_options = list(dns_options)


# ---- the client ----


class ClientPolicy(Part):
    """What a client expects of an engine. Each client decides each of them; none follows from another, or from a name.

    Args:
        name: What descriptions and journals call the client: `kata`, `containerd`. Nothing depends on it.
        idle_s: Seconds that the engine stays without a living container and without a connection.
        keeps_ended_containers: A container that has ended keeps the engine, until the client deletes it.
        ends_when_stale: A question about a container ends an engine that has none: its client has restarted since, and
            takes it for a task.
        sweeps_dead_engines: Undo what engines of this client (by `name`) that were killed have left.
        ends_with_init: The sandbox ends with the init of the container that has its id.
        holds_fifos: Hold both ends of fifos, so that a reader, or a terminal's writer, may go and come again.
        makes_etc_files: Write `/etc/hosts`, `/etc/hostname` and `/etc/resolv.conf` for containers.
        foreign_specs: Specification and root directory come from another program with Create: they are checked, and the
            root directory is the bundle's.
        keeps_host_mounts: Containers may come at any time: look their sources and hooks up in the host's namespaces as
            they are then, not as they were at the start.
        shares_from_start: Have a share from the start, since containers that come may need one.
        recursive_readonly: Which read-only bind mounts mean all mounts below as well: `never`, `rbind` (those with that
            option) or `always`. (An explicit `rro` always does.)
        signal_s: Seconds that the guest may take for a signal other than SIGKILL.
        late_signals_fail: A signal that is late is an error; otherwise a line in the log.
        host_shaped_stats: Statistics have the shape of the host's cgroup version; otherwise of version 1.
        all_controllers: Have a cgroup in the hierarchy of every controller; otherwise of those with limits.
        namespace: containerd's namespace of the sandbox, for events and logging programs.
        events_address: The socket that takes events (`TTRPC_ADDRESS`); empty sends none.
        log_fifo: Where containerd reads a shim's log; empty writes the engine's own alone.
    """

    __slots__ = (
        "all_controllers",
        "ends_when_stale",
        "ends_with_init",
        "events_address",
        "foreign_specs",
        "holds_fifos",
        "host_shaped_stats",
        "idle_s",
        "keeps_ended_containers",
        "keeps_host_mounts",
        "late_signals_fail",
        "log_fifo",
        "makes_etc_files",
        "name",
        "namespace",
        "recursive_readonly",
        "shares_from_start",
        "signal_s",
        "sweeps_dead_engines",
    )

    def __init__(
        self,
        *,
        name: str,
        idle_s: float,
        keeps_ended_containers: bool,
        ends_when_stale: bool,
        sweeps_dead_engines: bool,
        ends_with_init: bool,
        holds_fifos: bool,
        makes_etc_files: bool,
        foreign_specs: bool,
        keeps_host_mounts: bool,
        shares_from_start: bool,
        recursive_readonly: str,
        signal_s: float,
        late_signals_fail: bool,
        host_shaped_stats: bool,
        all_controllers: bool,
        namespace: str = "",
        events_address: str = "",
        log_fifo: str = "",
    ) -> None:
        self.name = name
        self.idle_s = idle_s
        self.keeps_ended_containers = keeps_ended_containers
        self.ends_when_stale = ends_when_stale
        self.sweeps_dead_engines = sweeps_dead_engines
        self.ends_with_init = ends_with_init
        self.holds_fifos = holds_fifos
        self.makes_etc_files = makes_etc_files
        self.foreign_specs = foreign_specs
        self.keeps_host_mounts = keeps_host_mounts
        self.shares_from_start = shares_from_start
        self.recursive_readonly = recursive_readonly
        self.signal_s = signal_s
        self.late_signals_fail = late_signals_fail
        self.host_shaped_stats = host_shaped_stats
        self.all_controllers = all_controllers
        self.namespace = namespace
        self.events_address = events_address
        self.log_fifo = log_fifo


# ---- all of it ----


class PodSettings(Part):
    """A pod of containerd's Sandbox API.

    Args:
        config_path: The configuration file that the client names; empty names none.
    """

    __slots__ = ("config_path",)

    def __init__(self, *, config_path: str) -> None:
        self.config_path = config_path


class SandboxSettings(Part):
    """A sandbox. Paths are absolute.

    Args:
        id: Its id.
        client: What its client expects.
        machine: Its machine; absent for a pod that CreateSandbox has yet to describe.
        pod: It is a pod of containerd's Sandbox API.
        container: The container with the sandbox's own id; absent where Create describes all containers.
        network: Its network.
        disks: What is in the disk slots of the machine, from the first on; null leaves one empty.
        host_devices: Numbers of the IOMMU groups whose devices the machine is given.
        all_disk_slots: Have as many disk slots as a machine can have, for containers that come; otherwise a few.
        hostname: The guest's; empty is the host's.
        resolv_conf: Lines of the guest's; absent is what belongs to the network.
        sysctls: Kernel parameters of a pod, for its containers.
        cgroups_path: The `cgroupsPath` of the specification; empty is a place of our own.
        oom_score_adj: How readily the host's kernel kills the machine when memory is short.
        notes: Sentences for the engine's log.
        request_started_ns: CLOCK_MONOTONIC when the user's command began, from which timings count; 0 is the launch.
        launched_ns: CLOCK_MONOTONIC when the client began to start the engine; 0 is not known.
        not_forked: Why the engine was executed although there should be a parent of engines to fork it.
        not_taken: Why no machine that waited was taken, where some should wait.
    """

    __slots__ = (
        "all_disk_slots",
        "cgroups_path",
        "client",
        "container",
        "disks",
        "host_devices",
        "hostname",
        "id",
        "launched_ns",
        "machine",
        "network",
        "not_forked",
        "not_taken",
        "notes",
        "oom_score_adj",
        "pod",
        "request_started_ns",
        "resolv_conf",
        "sysctls",
    )

    def __init__(
        self,
        *,
        id: str,
        client: ClientPolicy,
        machine: MachineSettings | None = None,
        pod: PodSettings | None = None,
        container: ContainerSettings | None = None,
        network: NetworkSettings | None = None,
        disks: Sequence[DiskSettings | None] = (),
        host_devices: Sequence[int] = (),
        all_disk_slots: bool = False,
        hostname: str = "",
        resolv_conf: Sequence[str] | None = None,
        sysctls: Mapping[str, str] | None = None,
        cgroups_path: str = "",
        oom_score_adj: int = 0,
        notes: Sequence[str] = (),
        request_started_ns: int = 0,
        launched_ns: int = 0,
        not_forked: str = "",
        not_taken: str = "",
    ) -> None:
        self.id = id
        self.client = client
        self.machine = machine
        self.pod = pod
        self.container = container
        self.network = network or NetworkSettings()
        self.disks = list(disks)
        self.host_devices = list(host_devices)
        self.all_disk_slots = all_disk_slots
        self.hostname = hostname
        self.resolv_conf = None if resolv_conf is None else list(resolv_conf)
        self.sysctls = dict(sysctls or {})
        self.cgroups_path = cgroups_path
        self.oom_score_adj = oom_score_adj
        self.notes = list(notes)
        self.request_started_ns = request_started_ns
        self.launched_ns = launched_ns
        self.not_forked = not_forked
        self.not_taken = not_taken

    def described(self) -> MachineSettings:
        """The machine of a sandbox that has been described.

        Raises:
            StateError: It is a pod that CreateSandbox has not described yet.
        """
        if self.machine is None:
            raise StateError(f"sandbox {self.id!r} has not been created")
        return self.machine

    def image_path(self) -> str:
        """The image of the store that the machine starts with, in its first disk slot; empty if it has none."""
        own, first = self.container, self.disks[0] if self.disks else None
        if own is None or own.rootfs is None or own.rootfs.kind != "erofs" or own.rootfs.lower_slot != 0:
            return ""
        return first.path if first is not None and first.readonly else ""

    def needs_share(self) -> bool:
        """Whether anything of the host is to be seen in the guest.

        Raises:
            StateError: See `described`.
        """
        if self.described().share.disabled:  # who needs it is told so
            return False
        own = self.container
        return self.client.shares_from_start or (
            own is not None
            and (bool(own.volumes) or (own.rootfs is not None and own.rootfs.kind == "share"))
        )
