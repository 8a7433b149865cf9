"""Every configuration key of Kata's two runtimes, and what becomes of it here.

A key *acts*; or it is *idle*: accepted, without effect, and the reason is said; or it is *refused*, where going on
without it would leave a machine less isolated or less protected than its owner believes. Values that mean what
happens here anyway are silent.

`docs/configuration.md` has the same tables; a test compares the two. Only read when there is a file or an
annotation: a start without either does not import this.

Sources: Kata's ``configuration-qemu.toml.in`` (Go) and ``kata-types`` (Rust) for names, kinds and defaults.
"""

from __future__ import annotations

from kata.errors import ConfigError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Sequence
    from typing import Any

BOOL, INT, NUMBER, TEXT, PATH, LIST, TABLE = "bool", "integer", "number", "string", "path", "list", "table"
ACTS, IDLE, REFUSED = "acts", "idle", "refused"

HYPERVISOR = "qemu"
"""The hypervisor whose table is read where nothing names another."""
HYPERVISORS = (HYPERVISOR, "cloud-hypervisor", "firecracker")
"""Those whose tables are known; `VARIANTS` has how the keys of each differ."""
SECTIONS = {
    "hypervisor": f"hypervisor.{HYPERVISOR}",
    "agent": "agent.kata",
    "runtime": "runtime",
    "factory": "factory",
}
"""Our name of a section, and its table in a file. That of another hypervisor that is named has the same keys."""
OTHER_HYPERVISORS = frozenset({"acrn", "dragonball", "openvmm", "remote", "stratovirt"})
"""Tables below ``hypervisor`` that belong to monitors which this program does not drive."""


class Key:
    """One key.

    Attributes:
        section: A key of `SECTIONS`.
        name: As written in the file.
        kind: Of its value.
        default: What happens without it, in words for the documentation.
        text: What it means; of an idle or refused one, why it has no effect here.
        status: `ACTS`, `IDLE` or `REFUSED`.
        silent: Values of an idle or refused key that mean what happens here anyway.
        acts_with: Values of an idle key that have an effect.
        choices: Allowed values; empty for any.
        least, most: Range of a number.
        table: Its table in a file.
    """

    __slots__ = (
        "acts_with",
        "choices",
        "default",
        "kind",
        "least",
        "most",
        "name",
        "section",
        "silent",
        "status",
        "table",
        "text",
    )

    def __init__(
        self,
        section: str,
        name: str,
        kind: str,
        default: str,
        text: str,
        status: str = ACTS,
        *,
        silent: Sequence[Any] = (),
        acts_with: Sequence[Any] = (),
        choices: Sequence[str] = (),
        least: float | None = None,
        most: float | None = None,
    ) -> None:
        self.section = section
        self.name = name
        self.kind = kind
        self.default = default
        self.text = text
        self.status = status
        self.silent = silent
        self.acts_with = acts_with
        self.choices = choices
        self.least = 0 if least is None and kind in (INT, NUMBER) else least
        self.most = most
        self.table = SECTIONS[section]

    @property
    def full_name(self) -> str:
        """``hypervisor.default_vcpus``: its name in `kata.config.files.Configuration`."""
        return f"{self.section}.{self.name}"

    @property
    def spelt(self) -> str:
        """``[hypervisor.qemu] default_vcpus``: as a person finds it in a file."""
        return f"[{self.table}] {self.name}"

    def check(self, value: object, where: str) -> Any:
        """*value*, if it is one of this key's.

        Args:
            value: As the file or annotation has it.
            where: Its place, for the message.

        Raises:
            ConfigError: Its kind or range is wrong, or the key is refused here with that value.
        """
        problem = self._wrong(value)
        if problem:
            raise ConfigError(
                f"{where}: {self.spelt} {problem}, and is {_shown(value)}", "docs/configuration.md"
            )
        if self.choices and value not in self.choices:
            raise ConfigError(
                f"{where}: {self.spelt} is {_shown(value)}, which is not offered",
                _nearest(str(value), self.choices) or "one of: " + ", ".join(filter(None, self.choices)),
            )
        if self.status == REFUSED and not self.means_nothing(value):
            raise ConfigError(
                f"{where}: {self.spelt} = {_shown(value)} is refused: {self.text}",
                "Take the key out; docs/configuration.md says what is offered instead.",
            )
        return value

    def means_nothing(self, value: object) -> bool:
        """Whether this value says what happens here anyway (or nothing at all)."""
        return value in ("", 0, False, [], {}) or value in self.silent

    def is_idle(self, value: object) -> bool:
        """Whether who has given this value should be told that it has no effect."""
        return self.status == IDLE and not self.means_nothing(value) and value not in self.acts_with

    def acts(self, value: object) -> bool:
        """Whether the key has an effect with this value, or would have one with another."""
        return self.status == ACTS or value in self.acts_with

    def _wrong(self, value: object) -> str:  # noqa: C901
        if self.kind == BOOL:
            return "" if isinstance(value, bool) else "has to be true or false"
        if self.kind in (INT, NUMBER):
            if isinstance(value, bool) or not isinstance(value, int | float):
                return "has to be a number"
            if self.kind == INT and not isinstance(value, int):
                return "has to be a whole number"
            if not (float("-inf") < value < float("inf")):
                return "has to be a number"
            if self.least is not None and value < self.least:
                return f"has to be at least {self.least:g}"
            if self.most is not None and value > self.most:
                return f"has to be at most {self.most:g}"
            return ""
        if self.kind == LIST:
            fits = isinstance(value, list) and all(isinstance(item, str) for item in value)
            return "" if fits else "has to be a list of strings"
        if self.kind == TABLE:
            return "" if isinstance(value, dict | list) else "has to be a table"
        if not isinstance(value, str):
            return "has to be a string"
        if "\0" in value or "\n" in value:
            return "has to be one line"
        if self.kind == PATH and value and not value.startswith("/"):
            return "has to be an absolute path"
        return ""


def _shown(value: object) -> str:
    text = str(value).lower() if isinstance(value, bool) else repr(value)
    return text if len(text) < 80 else text[:77] + "..."


def _nearest(word: str, known: Sequence[str]) -> str:
    """``did you mean ...?``, or nothing."""
    import difflib

    near = difflib.get_close_matches(word, known, 1)
    return f"did you mean {near[0]!r}?" if near else ""


def unknown(where: str, table: str, name: str) -> ConfigError:
    """The error for a key that nobody knows, with the nearest one that somebody does."""
    section = next((key for key, spelt in SECTIONS.items() if spelt == table), "")
    if not section and table.startswith("hypervisor."):
        section = "hypervisor"
    hint = _nearest(name, [key.name for key in KEYS.values() if key.section == section])
    if not hint:
        home = [key.spelt for key in KEYS.values() if key.name == name]
        hint = f"it belongs in {home[0].rpartition(' ')[0]}" if home else "kata config show lists the keys"
    return ConfigError(f"{where}: there is no key {name!r} in [{table}]", hint)


def unknown_table(where: str, table: str) -> ConfigError:
    """The error for a table that nobody knows."""
    hint = _nearest(table, [*SECTIONS.values(), *(f"hypervisor.{name}" for name in HYPERVISORS)])
    return ConfigError(
        f"{where}: there is no table [{table}]", hint or "tables: " + ", ".join(SECTIONS.values())
    )


class Variant:
    """How a key of one hypervisor differs from QEMU's; what is empty is the same.

    Attributes:
        status, text, default, silent, choices: As of `Key`.
    """

    __slots__ = ("choices", "default", "silent", "status", "text")

    def __init__(
        self,
        status: str,
        text: str,
        *,
        default: str = "",
        silent: Sequence[Any] = (),
        choices: Sequence[str] = (),
    ) -> None:
        self.status = status
        self.text = text
        self.default = default
        self.silent = silent
        self.choices = choices


_VIRTIOFS = "virtiofsd's further options are chosen here"
_NO_VFIO = "devices of the host are not passed through"
_NO_CC = "confidential guests are not offered, and an ordinary one would be no substitute"
_NO_LIMIT = "traffic is not limited here, and it would go on without the limit"
_NO_NUMA = "the guest has one memory node"
_OWN_FACTORY = "`[factory]` has what there is to say of templates, and they are made when they are needed"
_NO_POOL = "machines that wait have a socket each, in the run directory"
_NO_COCO = "images are not pulled in the guest"
_OWN_TIMEOUTS = "the engine has deadlines of its own for each call"
_NO_SELINUX = "the guest's kernel has no SELinux, and the container would run without the label"
_NO_JAILER = "it belongs to Firecracker"
_DISKS = "disks are virtio-blk with QEMU's thread pool"
_ONE_LOG = "[runtime] `log_level` is that of the engine's log, and the hypervisor has none"
_NO_SWAP = "the guest has no swap"

_H, _A, _R, _F = "hypervisor", "agent", "runtime", "factory"

_ALL = [
    # ---- [hypervisor.qemu]: what acts ----
    Key(_H, "path", PATH, "`$KATA_QEMU`, else `qemu-system-x86_64` on the PATH", "the QEMU program"),
    Key(_H, "kernel", PATH, "that of `kata guest build`", "the guest's kernel: bzImage, or ELF with a PVH entry;"
        " needs `initrd`"),
    Key(_H, "initrd", PATH, "that of `kata guest build`", "the guest's initial ramdisk, with the agent as `/init`"),
    Key(_H, "kernel_params", TEXT, "", "added to the kernel's command line"),
    Key(_H, "machine_type", TEXT, "`q35`", "QEMU's machine: `q35`, `pc` (or one's version, `pc-q35-7.2`), `microvm`"),
    Key(_H, "machine_accelerators", TEXT, "", "further options of QEMU's `-machine`, separated by commas"),
    Key(_H, "cpu_features", TEXT, "", "further options of QEMU's `-cpu`, separated by commas (`pmu=off`)"),
    Key(_H, "firmware", PATH, "`qboot.rom`", "the firmware image"),
    Key(_H, "default_vcpus", NUMBER, "1", "CPUs of a machine for which none are asked; rounded up; negative: the"
        " host's", least=-1e6, most=1024),
    Key(_H, "default_maxvcpus", INT, "the host's", "number of CPUs to which a running machine may grow; 0: the host's",
        most=1024),
    Key(_H, "default_memory", INT, "2048", "MiB of a machine for which no memory is asked; 0: the default"),
    Key(_H, "default_maxmemory", INT, "the host's", "MiB to which a running machine may grow; 0: the host's"),
    Key(_H, "enable_virtio_mem", BOOL, "true", "memory grows and shrinks with the pod; without it a machine keeps the"
        " memory it was started with"),
    Key(_H, "enable_mem_prealloc", BOOL, "false", "the guest's memory is allocated before it boots"),
    Key(_H, "disable_vhost_net", BOOL, "false", "QEMU itself moves the packets of an interface that is connected to a"
        " tap; otherwise the host's kernel does, under KVM, where there is a `/dev/vhost-net`"),
    Key(_H, "enable_hugepages", BOOL, "false", "the guest's memory is in huge pages of 2 MiB, which the host has set"
        " aside (`sysctl vm.nr_hugepages`); no memory cgroup counts them"),
    Key(_H, "enable_ksm", BOOL, "false", "*our own*: the host may merge equal pages of guests (KSM, where"
        " `/sys/kernel/mm/ksm/run` is 1): less memory, and guests may find out by time what others have in theirs"),
    Key(_H, "shared_fs", TEXT, "`virtio-fs` with a virtiofsd, else `virtio-9p`", "how files of the host"
        " reach the guest: `virtio-fs`, `virtio-9p`, or `none` (then only images that are disks can be run);"
        " an emulated machine whose kernel cannot has `virtio-9p` all the same;"
        " `virtio-fs-nydus` is not offered", choices=("virtio-fs", "virtio-9p", "none")),
    Key(_H, "virtio_fs_daemon", PATH, "where distributions have it", "the virtiofsd program"),
    Key(_H, "virtio_fs_cache", TEXT, "`auto`", "what the guest keeps of shared files: `never`, `auto`, `always`",
        choices=("", "never", "auto", "always")),
    Key(_H, "valid_virtio_fs_daemon_paths", LIST, "none", "patterns of what the annotation `virtio_fs_daemon`"
        " may name"),
    Key(_H, "msize_9p", INT, "512000", "largest message of the 9p share, in bytes", least=4096, most=16 << 20),
    Key(_H, "entropy_source", PATH, "QEMU's own", "the file that the guest's virtio-rng reads"),
    Key(_H, "valid_entropy_sources", LIST, "none", "patterns of what the annotation `entropy_source` may name"),
    Key(_H, "valid_hypervisor_paths", LIST, "none", "patterns of what the annotation `path` may name"),
    *(Key(_H, f"valid_{name}_paths", LIST, "none", f"*our own*: patterns of what the annotation `{name}` may name:"
          " QEMU shows that file to the guest") for name in ("kernel", "initrd", "firmware")),
    Key(_H, "enable_annotations", LIST, "`enable_iommu`, `kernel_params`, `kernel_verity_params`", "regular expressions"
        " of the `io.katacontainers.config.hypervisor.` annotations that pods may use; each has to match the whole"
        " name"),
    Key(_H, "enable_debug", BOOL, "false", "the guest's kernel writes its messages to the console's log"),
    Key(_H, "use_legacy_serial", BOOL, "true", "the console is a serial port, readable from the kernel's first message"
        " on; `false`: a virtio console"),
    Key(_H, "seccompsandbox", TEXT, "all but what QEMU needs denied", "QEMU's `-sandbox` option"),
    Key(_H, "reclaim_guest_freed_memory", BOOL, "true", "memory that the guest frees goes back to the host"),
    Key(_H, "accelerator", TEXT, "`auto`", "*our own*: `kvm`, `tcg` (software emulation) or `auto`: KVM where it works",
        choices=("auto", "kvm", "tcg")),
    # ---- refused ----
    Key(_H, "image", PATH, "", "the guest is booted from an initrd (`initrd`), not from a disk image", REFUSED),
    Key(_H, "kernel_verity_params", TEXT, "", "the guest has no disk image to be verified", REFUSED),
    Key(_H, "confidential_guest", BOOL, "false", _NO_CC, REFUSED),
    Key(_H, "sev_snp_guest", BOOL, "false", _NO_CC, REFUSED),
    Key(_H, "snp_id_block", TEXT, "", _NO_CC, REFUSED),
    Key(_H, "snp_id_auth", TEXT, "", _NO_CC, REFUSED),
    Key(_H, "snp_guest_policy", INT, "", _NO_CC, IDLE),
    Key(_H, "tdx_quote_generation_service_socket_port", INT, "", _NO_CC, IDLE),
    Key(_H, "measurement_algo", TEXT, "", _NO_CC, REFUSED),
    Key(_H, "initdata", TEXT, "", _NO_CC, REFUSED),
    Key(_H, "rootless", BOOL, "false", "QEMU has a user of its own anyway, but not with 9p", REFUSED),
    Key(_H, "rootless_user", TABLE, "", "QEMU has a user of its own anyway, but not with 9p", REFUSED),
    Key(_H, "firmware_volume", PATH, "", "firmware with variables is not offered", REFUSED),
    Key(_H, "pflashes", LIST, "none", "flash images are not offered", REFUSED),
    Key(_H, "guest_hook_path", PATH, "", "hooks that lie in the guest are not run", REFUSED),
    Key(_H, "jailer_path", PATH, "", _NO_JAILER, IDLE),
    Key(_H, "default_gpus", INT, "", "it belongs to remote hypervisors", IDLE),
    Key(_H, "default_gpu_model", TEXT, "", "it belongs to remote hypervisors", IDLE),
    *(Key(_H, name, INT, "0", _NO_LIMIT, REFUSED) for name in (
        "rx_rate_limiter_max_rate", "tx_rate_limiter_max_rate",
        "disk_rate_limiter_bw_max_rate", "disk_rate_limiter_ops_max_rate",
        "net_rate_limiter_bw_max_rate", "net_rate_limiter_ops_max_rate")),
    # ---- without effect ----
    *(Key(_H, name, INT, "0", _NO_LIMIT, IDLE) for name in (
        "disk_rate_limiter_bw_one_time_burst", "disk_rate_limiter_ops_one_time_burst",
        "net_rate_limiter_bw_one_time_burst", "net_rate_limiter_ops_one_time_burst")),
    Key(_H, "memory_slots", INT, "10", "memory grows by virtio-mem, which takes no slots", IDLE, silent=(10,)),
    Key(_H, "memory_offset", INT, "0", "there are no NVDIMMs", IDLE),
    Key(_H, "rootfs_type", TEXT, "", "it is about a guest image", IDLE, silent=("ext4",)),
    Key(_H, "vm_rootfs_driver", TEXT, "", "it is about a guest image", IDLE),
    Key(_H, "disable_image_nvdimm", BOOL, "false", "it is about a guest image", IDLE),
    Key(_H, "default_bridges", INT, "1", "devices sit on the root bus", IDLE, silent=(1,)),
    Key(_H, "disable_block_device_use", BOOL, "true", "a root file system on a block device is mounted on the host and"
        " shared", IDLE, silent=(True,)),
    Key(_H, "block_device_driver", TEXT, "virtio-blk", f"{_DISKS}; with `virtio-pmem`, or `nvdimm`, the guest maps the"
        " image of `kata run` instead: docs/storage.md", IDLE,
        silent=("virtio-blk", "virtio-blk-pci", "virtio-scsi"), acts_with=("virtio-pmem", "nvdimm"),
        choices=("", "virtio-scsi", "virtio-blk", "virtio-blk-pci", "virtio-blk-ccw", "virtio-blk-mmio",
                 "virtio-mmio", "nvdimm", "virtio-pmem")),
    Key(_H, "block_device_aio", TEXT, "threads", _DISKS, IDLE, silent=("threads", "io_uring"),
        choices=("", "threads", "native", "io_uring")),
    *(Key(_H, name, BOOL, "false", _DISKS, IDLE) for name in (
        "block_device_cache_set", "block_device_cache_direct", "block_device_cache_noflush", "enable_iothreads")),
    *(Key(_H, name, INT, "0", _DISKS, IDLE) for name in (
        "block_device_logical_sector_size", "block_device_physical_sector_size", "indep_iothreads")),
    *(Key(_H, name, INT, "", _DISKS, IDLE, silent=(1, 128)) for name in ("queue_size", "num_queues")),
    Key(_H, "network_queues", INT, "1", "an interface has one pair of queues", IDLE, silent=(1,)),
    Key(_H, "hugepage_type", TEXT, "", "they are those of hugetlbfs, of 2 MiB", IDLE, silent=("hugetlbfs",)),
    Key(_H, "enable_numa", BOOL, "false", _NO_NUMA, IDLE),
    Key(_H, "numa_mapping", LIST, "none", _NO_NUMA, IDLE),
    Key(_H, "file_mem_backend", TEXT, "", "the guest's memory is anonymous", IDLE),
    Key(_H, "valid_file_mem_backends", LIST, "none", "the guest's memory is anonymous", IDLE, silent=([""],)),
    Key(_H, "enable_iommu", BOOL, "false", "there is no virtual IOMMU", IDLE),
    Key(_H, "enable_iommu_platform", BOOL, "false", "there is no virtual IOMMU", IDLE),
    Key(_H, "virtio_fs_cache_size", INT, "0", _VIRTIOFS, IDLE),
    Key(_H, "virtio_fs_queue_size", INT, "128", _VIRTIOFS, IDLE, silent=(128, 1024)),
    Key(_H, "virtio_fs_extra_args", LIST, "none", _VIRTIOFS, IDLE),
    Key(_H, "virtio_fs_is_dax", BOOL, "false", _VIRTIOFS, IDLE),
    Key(_H, "enable_vhost_user_store", BOOL, "false", "containers can be given disks that other processes of the host"
        " serve (vhost-user-blk): docs/hypervisors.md"),
    Key(_H, "vhost_user_store_path", PATH, "`/var/run/kata-containers/vhost-user`", "where those are: sockets in"
        " `block/sockets`, and a block device of the same name for each in `block/devices`"),
    Key(_H, "valid_vhost_user_store_paths", LIST, "none", "patterns of that path for annotations"),
    Key(_H, "vhost_user_reconnect_timeout_sec", INT, "0", "a disk ends with its server", IDLE),
    Key(_H, "hotplug_vfio_on_root_bus", BOOL, "false", _NO_VFIO, IDLE),
    Key(_H, "cold_plug_vfio", TEXT, "no-port", "with anything but `no-port` a machine starts with the devices of the"
        " IOMMU groups (`/dev/vfio/N`) that its container lists; the port is always a root port: docs/hypervisors.md",
        choices=("no-port", "bridge-port", "root-port", "switch-port")),
    Key(_H, "hot_plug_vfio", TEXT, "no-port", "devices of the host come when a machine starts: `cold_plug_vfio`", IDLE,
        silent=("no-port",)),
    Key(_H, "pcie_root_port", INT, "0", _NO_VFIO, IDLE),
    Key(_H, "pcie_switch_port", INT, "0", _NO_VFIO, IDLE),
    Key(_H, "enable_guest_swap", BOOL, "false", _NO_SWAP, IDLE),
    Key(_H, "guest_swap_path", PATH, "", _NO_SWAP, IDLE),
    Key(_H, "guest_swap_size_percent", INT, "", _NO_SWAP, IDLE),
    Key(_H, "guest_swap_create_threshold_secs", INT, "", _NO_SWAP, IDLE),
    Key(_H, "guest_memory_dump_path", PATH, "", "a guest that panics is not dumped", IDLE),
    Key(_H, "guest_memory_dump_paging", BOOL, "false", "a guest that panics is not dumped", IDLE),
    Key(_H, "extra_monitor_socket", TEXT, "", "QEMU's monitor is the engine's alone", IDLE),
    Key(_H, "hypervisor_loglevel", INT, "", _ONE_LOG, IDLE),
    Key(_H, "log_level", TEXT, "", _ONE_LOG, IDLE),
    Key(_H, "disable_nesting_checks", BOOL, "false", "KVM is tried out, not guessed at", IDLE, silent=(True,)),
    Key(_H, "disable_selinux", BOOL, "false", "processes keep the label that they are started with", IDLE),
    Key(_H, "selinux_label", TEXT, "", "processes keep the label that they are started with", IDLE),
    Key(_H, "disable_guest_selinux", BOOL, "true", "the guest's kernel has no SELinux", IDLE, silent=(True,)),
    Key(_H, "disable_seccomp", BOOL, "false", "it belongs to other monitors; see `seccompsandbox`", IDLE),
    Key(_H, "seccomp_sandbox", TEXT, "", "it belongs to other monitors; see `seccompsandbox`", IDLE),
    Key(_H, "guest_extension_images", LIST, "none", "see `guest_extensions` in `[agent.kata]`", IDLE),
    Key(_H, "valid_jailer_paths", LIST, "none", _NO_JAILER, IDLE),
    Key(_H, "ctlpath", PATH, "", "it belongs to ACRN", IDLE),
    Key(_H, "valid_ctlpaths", LIST, "none", "it belongs to ACRN", IDLE),
    Key(_H, "remote_hypervisor_socket", PATH, "", "it belongs to remote hypervisors", IDLE),
    Key(_H, "remote_hypervisor_timeout", INT, "", "it belongs to remote hypervisors", IDLE),
    Key(_H, "prefetch_list_path", PATH, "", "images are not fetched in the guest", IDLE),
    Key(_H, "overhead_vcpus", NUMBER, "", "one formula for every machine: docs/sizing.md", IDLE),
    Key(_H, "overhead_memory", INT, "", "one formula for every machine: docs/sizing.md", IDLE),
    Key(_H, "boot_to_be_template", BOOL, "false", _OWN_FACTORY, IDLE),
    Key(_H, "boot_from_template", BOOL, "false", _OWN_FACTORY, IDLE),
    Key(_H, "memory_path", PATH, "", _OWN_FACTORY, IDLE),
    Key(_H, "device_state_path", PATH, "", _OWN_FACTORY, IDLE),
    Key(_H, "factory", TABLE, "", _OWN_FACTORY, IDLE),
    # ---- [agent.kata] ----
    Key(_A, "enable_debug", BOOL, "false", "the agent writes its debug messages to the console's log"),
    Key(_A, "debug_console_enabled", BOOL, "false", "`kata-runtime exec SANDBOX` is a shell of the"
        " guest, once `kata guest build --extension shell` has made one (under KVM also vsock port 1026)"),
    Key(_A, "dial_timeout", INT, "60", "seconds that a guest may take to answer", least=1, most=86400),
    Key(_A, "reconnect_timeout_ms", INT, "60000", "the same in milliseconds, as the Rust runtime has it", least=1000,
        most=86_400_000),
    Key(_A, "kernel_modules", LIST, "none", "modules to load in the guest, each with its parameters: `\"name a=1\"`"),
    Key(_A, "container_pipe_size", INT, "the kernel's", "bytes that the pipes of a container's streams hold"),
    Key(_A, "enable_tracing", BOOL, "false", "the agent reports what it spends the time of calls on; with"
        " `enable_tracing` in `[runtime]`: docs/tracing.md"),
    Key(_A, "guest_extensions", LIST, "none", "*our own*: archives after the initrd, made by `kata guest build"
        " --extension`"),
    Key(_A, "dial_timeout_ms", INT, "", _OWN_TIMEOUTS, IDLE),
    Key(_A, "request_timeout_ms", INT, "", _OWN_TIMEOUTS, IDLE),
    Key(_A, "health_check_request_timeout_ms", INT, "", _OWN_TIMEOUTS, IDLE),
    Key(_A, "create_container_timeout", INT, "", "see `create_container_timeout` in `[runtime]`", IDLE),
    Key(_A, "launch_process_timeout", INT, "", _NO_COCO, IDLE),
    Key(_A, "cdh_api_timeout", INT, "", _NO_COCO, IDLE),
    Key(_A, "cdh_api_timeout_ms", INT, "", _NO_COCO, IDLE),
    Key(_A, "visible_cdi_devices", LIST, "none", _NO_VFIO, IDLE),
    Key(_A, "server_port", INT, "1024", "the agent listens on port 1024", IDLE, silent=(1024,)),
    Key(_A, "log_port", INT, "1025", "the agent's log is in the console's", IDLE, silent=(1025,)),
    Key(_A, "passfd_listener_port", INT, "", "streams go over the agent's connection", IDLE),
    Key(_A, "policy", TEXT, "", "the agent's policies are JSON and not Rego: docs/agent-policy.md", REFUSED),
    Key(_A, "mem_agent", TABLE, "", "memory goes back by free page reporting", IDLE),
    # ---- [runtime] ----
    Key(_R, "internetworking_model", TEXT, "`tcfilter`", "how the guest is connected to the interfaces of its"
        " namespace: `tcfilter` (redirection by tc), `macvtap` (a device on each; not for interfaces that come late)"
        " or `none` (not at all); `l3forwarding` is not offered",
        choices=("tcfilter", "macvtap", "none")),
    Key(_R, "disable_new_netns", BOOL, "false", "the hypervisor stays in the host's network namespace; only with"
        " `internetworking_model = \"none\"`"),
    Key(_R, "disable_guest_seccomp", BOOL, "false", "containers get no seccomp filter in the guest"),
    Key(_R, "create_container_timeout", INT, "120", "seconds that the guest may take to make a container", least=1,
        most=86400),
    Key(_R, "static_sandbox_resource_mgmt", BOOL, "false", "a machine keeps the size that it was started with"),
    Key(_R, "hypervisor_name", TEXT, "qemu", "the hypervisor: `qemu`, `cloud-hypervisor` (`clh`) or"
        " `firecracker` (`fc`); without it that of the only hypervisor's table, or of the name of the file:"
        " docs/hypervisors.md"),
    Key(_R, "rootfs_upper_layer", TEXT, "`auto`", "*our own*: where what a container writes to its root file system is"
        " while it runs, if containerd hands over an overlay of directories: `live`, in the snapshot's upper directory,"
        " by the share; `block`, on a disk of the machine beside one with the read-only layers, from where it is"
        " carried back when the container has ended; or `auto`, which is `block` for containers of Kubernetes' pods:"
        " docs/storage.md", choices=("auto", "live", "block")),
    Key(_R, "rootfs_upper_layer_size", INT, "10240", "*our own*: MiB that a container can write to that disk",
        least=16, most=16 << 20),
    Key(_R, "layer_images_size", INT, "20480", "*our own*: MiB that the cached images of read-only layers may take on"
        " this host", least=1, most=1 << 30),
    Key(_R, "enable_tracing", BOOL, "false", "what starts and calls spend their time on goes to a collector of"
        " OpenTelemetry: docs/tracing.md"),
    Key(_R, "jaeger_endpoint", TEXT, "`OTEL_EXPORTER_OTLP_ENDPOINT`, else `http://localhost:4318`", "where the"
        " collector takes OTLP over HTTP, such as Jaeger"),
    Key(_R, "jaeger_user", TEXT, "", "the user for that, if it asks for one"),
    Key(_R, "jaeger_password", TEXT, "", "the user's password"),
    Key(_R, "agent_name", TEXT, "kata", "there is no other", choices=("", "kata")),
    Key(_R, "enable_debug", BOOL, "false", "the engine's log shows each call with its duration, and the"
        " guest's console"),
    Key(_R, "log_level", TEXT, "info", "what the engine's log shows: this and what is more severe",
        choices=("", "trace", "debug", "info", "warn", "error", "critical")),
    Key(_R, "log_format", TEXT, "text", "lines of the engine's log: for people, or logfmt or JSON for programs",
        choices=("", "text", "logfmt", "json")),
    Key(_R, "name", TEXT, "", "one program serves every kind of container", IDLE, silent=("virt_container",)),
    Key(_R, "sandbox_cgroup_only", BOOL, "true", "engine, hypervisor and helpers are in a cgroup of their sandbox's own"
        " always, with limits that follow from its size", IDLE, silent=(True,)),
    Key(_R, "enable_vcpus_pinning", BOOL, "false", "virtual CPUs run where the host's scheduler puts them", IDLE),
    Key(_R, "vfio_mode", TEXT, "", _NO_VFIO, IDLE, silent=("guest-kernel", "vfio")),
    Key(_R, "sandbox_bind_mounts", LIST, "none", "directories of the host are not shared behind a pod's back",
        REFUSED),
    Key(_R, "guest_selinux_label", TEXT, "", _NO_SELINUX, REFUSED),
    Key(_R, "experimental", LIST, "none", "there are no experimental features", IDLE),
    Key(_R, "experimental_force_guest_pull", BOOL, "false", _NO_COCO, REFUSED),
    Key(_R, "enable_pprof", BOOL, "false", "there is no profile to be had", IDLE),
    Key(_R, "disable_guest_empty_dir", BOOL, "true", "an emptyDir on disk is a directory of the host", IDLE,
        silent=(True,)),
    Key(_R, "emptydir_mode", TEXT, "shared-fs", "an emptyDir on disk is a directory of the host", IDLE,
        silent=("shared-fs",)),
    Key(_R, "dan_conf", PATH, "", "devices are not attached behind the network namespace's back", IDLE),
    Key(_R, "kubelet_root_dir", PATH, "", "paths of volumes are taken as they are given", IDLE,
        silent=("/var/lib/kubelet",)),
    Key(_R, "pod_resource_api_sock", PATH, "", _NO_VFIO, IDLE),
    Key(_R, "keep_abnormal", BOOL, "false", "a sandbox that has failed is cleared away; its words are in the log",
        IDLE),
    Key(_R, "shared_mounts", TABLE, "", "mounts are not shared between containers by configuration", IDLE),
    Key(_R, "use_passfd_io", BOOL, "false", "streams go over the agent's connection", IDLE, silent=(True,)),
    Key(_R, "passfd_listener_port", INT, "", "streams go over the agent's connection", IDLE),
    Key(_R, "vendor", TEXT, "", "it is a name only", IDLE),
    # ---- [factory] ----
    Key(_F, "enable_template", BOOL, "true", "machines go on from templates where they can, instead of booting"),
    Key(_F, "template_path", PATH, "`$KATA_STATE_DIR/templates`", "where templates are; below `/run` they are kept in"
        " memory and gone with the next boot"),
    Key(_F, "vm_cache_number", INT, "0", "how many machines wait for sandboxes (docs/templates.md); 0: none", most=64),
    Key(_F, "vm_cache_least_free", INT, "1024", "MiB that the host has to have available, so that machines wait"),
    Key(_F, "enable_engine_parent", BOOL, "false", "engines are forked off a process that has loaded what they"
        " need, and ends minutes after the last start"),
    Key(_F, "vm_cache_endpoint", PATH, "", _NO_POOL, IDLE),
]  # fmt: skip

KEYS = {key.full_name: key for key in _ALL}
"""``hypervisor.default_vcpus`` -> its `Key`."""

_OF_QEMU = "it belongs to QEMU"
_NOTHING_SHARED = "no files are shared with its machines"
_DIFFERS = {
    **{
        name: Variant(IDLE, _OF_QEMU)
        for name in (
            "machine_type",
            "machine_accelerators",
            "cpu_features",
            "msize_9p",
            "extra_monitor_socket",
        )
    },
    "firmware": Variant(REFUSED, "the kernel is booted without a firmware"),
    "entropy_source": Variant(
        IDLE, "its random numbers are those of `/dev/urandom`", silent=("/dev/urandom",)
    ),
    "seccompsandbox": Variant(IDLE, "its own filters are on always"),
    "disable_seccomp": Variant(IDLE, "its own filters are on always"),
    "disable_vhost_net": Variant(IDLE, "the monitor itself moves the packets", silent=(True,)),
    **{
        name: Variant(IDLE, "disks are virtio-blk, as the monitor has it")
        for name in (
            *(
                "block_device_driver",
                "block_device_aio",
                "block_device_cache_set",
                "block_device_cache_direct",
            ),
            *(
                "block_device_cache_noflush",
                "enable_iothreads",
                "indep_iothreads",
                "block_device_logical_sector_size",
            ),
            *("block_device_physical_sector_size", "queue_size", "num_queues"),
        )
    },
    "accelerator": Variant(
        ACTS, "*our own*: `kvm`, or `auto`, which is the same: it cannot do without", choices=("auto", "kvm")
    ),
}
"""What every hypervisor but QEMU has otherwise."""
VARIANTS: dict[str, dict[str, Variant]] = {
    "cloud-hypervisor": {
        **_DIFFERS,
        "path": Variant(ACTS, "the Cloud Hypervisor program",
                        default="`$KATA_CLOUD_HYPERVISOR`, else `cloud-hypervisor` on the PATH"),
        "shared_fs": Variant(ACTS, "how files of the host reach the guest: `virtio-fs`, or `none` (then what a"
                             " container needs of them is copied)", default="`virtio-fs` with a virtiofsd",
                             choices=("virtio-fs", "none")),
    },
    "firecracker": {
        **_DIFFERS,
        "path": Variant(ACTS, "the Firecracker program",
                        default="`$KATA_FIRECRACKER`, else `firecracker` on the PATH"),
        "shared_fs": Variant(ACTS, "there is no share: what a container needs of the host's files is copied",
                             default="`none`", choices=("none",)),
        **{
            name: Variant(IDLE, _NOTHING_SHARED)
            for name in ("virtio_fs_daemon", "virtio_fs_cache", "valid_virtio_fs_daemon_paths",
                         "virtio_fs_cache_size", "virtio_fs_queue_size", "virtio_fs_extra_args", "virtio_fs_is_dax")
        },
        "use_legacy_serial": Variant(IDLE, "the console is a serial port", silent=(True,)),
        "enable_mem_prealloc": Variant(IDLE, "the guest's memory is allocated as the guest touches it"),
        "enable_ksm": Variant(IDLE, "Firecracker does not offer its guests' memory to be merged"),
        **{
            f"{way}_rate_limiter_max_rate": Variant(ACTS, f"bits per second that each network interface may {does}")
            for way, does in (("rx", "receive"), ("tx", "send"))
        },
        "disk_rate_limiter_bw_max_rate": Variant(ACTS, "bits per second of each disk"),
        "disk_rate_limiter_bw_one_time_burst": Variant(ACTS, "bits that each disk has at first beside that"),
        "disk_rate_limiter_ops_max_rate": Variant(ACTS, "operations per second of each disk"),
        "disk_rate_limiter_ops_one_time_burst": Variant(ACTS, "operations that each disk has at first beside that"),
        "jailer_path": Variant(IDLE, "it is confined as the other hypervisors are, without the jailer"),
        "valid_jailer_paths": Variant(IDLE, "it is confined as the other hypervisors are, without the jailer"),
    },
}  # fmt: skip
"""Hypervisor -> key of its table -> how it differs from that of ``[hypervisor.qemu]``."""


def find(name: str, hypervisor: str = "") -> Key | None:
    """A key as a hypervisor has it.

    Args:
        name: ``hypervisor.default_vcpus``: as in `KEYS`.
        hypervisor: The hypervisor that is used; empty for the default one.

    Returns:
        The key; None if there is none of that name.
    """
    key = KEYS.get(name)
    if key is None or key.section != "hypervisor" or hypervisor in ("", HYPERVISOR):
        return key
    variant = VARIANTS.get(hypervisor, {}).get(key.name)
    made = Key(key.section, key.name, key.kind, key.default, key.text, key.status, silent=key.silent,
               choices=key.choices, least=key.least, most=key.most)  # fmt: skip
    if variant is not None:
        made.status, made.text = variant.status, variant.text
        made.default = variant.default or key.default
        made.silent = variant.silent or key.silent
        made.choices = variant.choices or key.choices
    made.table = f"hypervisor.{hypervisor}"
    return made


DEFAULT_ANNOTATIONS = ("enable_iommu", "kernel_params", "kernel_verity_params")
"""`enable_annotations` of a host that does not set it, as the original's packages have it."""
