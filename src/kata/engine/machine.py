"""What every client tells an engine of the machine to start: its size, its accelerator, and the guest in it.

Here the configuration (`kata.config.files`) becomes settings of an engine (`kata.settings`).
"""

from __future__ import annotations

import os

from kata.config import files
from kata.errors import ConfigError, GuestAssetError, HostError, UnsupportedError, UsageError
from kata.guest import manifest
from kata.hypervisor import accel
from kata.resources import sizing
from kata.settings import (
    GuestSettings,
    HypervisorSettings,
    MachineSettings,
    NetworkSettings,
    ShareSettings,
    SizeSettings,
    SnapshotSettings,
    TracingSettings,
)

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Mapping
    from typing import Any

    from kata.config.files import Configuration
    from kata.hypervisor.base import Capabilities
    from kata.hypervisor.protocols import Monitor

SECRET = frozenset({"runtime.jaeger_password"})
"""Keys that nobody is shown; who needs one reads the configuration."""
VHOST_USER_STORE = "/var/run/kata-containers/vhost-user"
"""Where disks are that other processes serve, unless the host says otherwise (the original's default)."""
MAPPED = ("virtio-pmem", "nvdimm")
"""Values of ``block_device_driver`` by which images are mapped; the second is the older name of the same."""
BOOT_TIMEOUT = "KATA_BOOT_TIMEOUT"
"""Variable with the seconds that a guest may take to come up; the engine has a default."""
SHARED_FS = "KATA_SHARED_FS"
"""Variable that says how files of the host reach the guest: ``virtio-fs``, ``virtio-9p``, or whichever there is."""


def machine_settings(
    asked: sizing.ResourceRequest, configuration: Configuration | None = None, *, grows: bool = False
) -> tuple[MachineSettings, list[tuple[str, str]]]:
    """The machine of a sandbox, from what was asked for and what is configured.

    Args:
        asked: CPUs and memory that were asked for.
        configuration: What the host, and the pod, have configured; None reads the host's files.
        grows: The machine may grow while it runs: containers may come, and limits change.

    Returns:
        The machine, and what the user should be told once: topic and sentence (that there is only software emulation).

    Raises:
        GuestAssetError: There is no guest to boot, or it lacks an extension.
        ConfigError: A configuration file is wrong.
        HostError: The hypervisor is not installed, or cannot do without KVM.
        UsageError: More CPUs than the host has, or a variable is malformed.
        ResourceExhaustedError: More memory than the host has.
    """
    conf = files.load() if configuration is None else configuration
    guest, kind = _guest(conf)
    bounds = limits(conf)
    size = sizing.plan(asked, kind, bounds)
    choice = accel.choose(str(conf.get("hypervisor.accelerator", "")))
    monitor = _monitor(conf, choice.accel) if conf.values else None  # otherwise the defaults hold
    made = MachineSettings(
        hypervisor=_hypervisor(conf, choice.accel),
        guest=guest,
        size=SizeSettings(
            vcpus=size.vcpus,
            memory_mib=size.memory_mib,
            max_vcpus=size.max_vcpus if grows else 0,
            max_memory_mib=size.max_memory_mib if grows else 0,
            fixed_memory=bounds.fixed or bounds.fixed_memory,
            default_memory_mib=size.default_mib,
            kernel=size.kernel,
            asked_cpus=asked.cpus,
            asked_memory=asked.memory,
            asked_by=asked.source,
        ),
        share=_share(conf),
        snapshots=SnapshotSettings(
            upper_layer=conf.get("runtime.rootfs_upper_layer", "auto"),
            upper_mib=conf.get("runtime.rootfs_upper_layer_size", 10240),
            images_mib=conf.get("runtime.layer_images_size", 20480),
        ),
        configuration={name: list(pair) for name, pair in conf.values.items() if name not in SECRET},
    )
    made.log_format = str(conf.get("runtime.log_format", "") or "text")
    made.log_level = _log_level(conf)
    made.engine_parent = conf.get("factory.enable_engine_parent", False)
    if _switch(conf, "runtime.enable_tracing"):
        named = conf.files[0] if conf.files else ""
        made.tracing = TracingSettings(agent=_switch(conf, "agent.enable_tracing"), config=named)
    notes = [("software-emulation", choice.reason)] if choice.accel == "tcg" else []
    if monitor is not None:  # otherwise the engine asks
        capabilities = _ask_monitor(monitor, conf, made)
        if not capabilities.shares:
            notes.append(
                (
                    f"no-share-{monitor.name}",
                    f"{monitor.title} shares no files with the host: what a container mounts is copied when it is"
                    " made, if it is small and read-only, and refused otherwise",
                )
            )
        elif made.share.protocol == "virtio-fs" and "virtio-fs" not in capabilities.shares:
            instead = f"virtio-fs was asked for; files are shared by 9p: {capabilities.share_note}"
            notes.append(("shared-fs", f"{instead} (kata guest build --kernel small makes one that can)"))
    return made, notes + [("configuration", note) for note in conf.notes]


def _log_level(conf: Configuration) -> str:
    """What the engine's log shows; the original's two runtimes have a key each for that."""
    if conf.get("runtime.enable_debug", False):
        return "debug"
    return {"trace": "debug", "debug": "debug", "": "info", "info": "info"}.get(
        str(conf.get("runtime.log_level", "")), "warning"
    )


def limits(conf: Configuration) -> sizing.Limits:
    """What the configuration says about sizes."""
    return sizing.Limits(
        default_vcpus=conf.get("hypervisor.default_vcpus", 0),
        default_memory_mib=conf.get("hypervisor.default_memory", 0),
        max_vcpus=conf.get("hypervisor.default_maxvcpus", 0),
        max_memory_mib=conf.get("hypervisor.default_maxmemory", 0),
        fixed=conf.get("runtime.static_sandbox_resource_mgmt", False),
        fixed_memory=not conf.get("hypervisor.enable_virtio_mem", True),
    )


def _guest(conf: Configuration) -> tuple[GuestSettings, str]:
    """What boots, and the kind of its kernel."""
    kernel, initrd = conf.get("hypervisor.kernel", ""), conf.get("hypervisor.initrd", "")
    names = [str(name) for name in conf.get("agent.guest_extensions", ())]
    if kernel or initrd:
        for name, path in (("kernel", kernel), ("initrd", initrd)):
            if not path:
                other = conf.origin("hypervisor.initrd" if name == "kernel" else "hypervisor.kernel")
                raise ConfigError(f"the configuration names no {name}, and the other of the two ({other})")
            if not os.path.isfile(path):
                raise GuestAssetError(
                    f"the guest's {name} {path} does not exist ({conf.origin(f'hypervisor.{name}')})",
                    "Without kernel and initrd in the configuration, that of `kata guest build` is used.",
                )
        if names:
            raise ConfigError(
                "guest extensions need the guest of `kata guest build`", "leave out kernel and initrd"
            )
        # What a kernel keeps for itself is not known of somebody else's: the larger of ours is assumed.
        guest, kind = GuestSettings(kernel=kernel, initrd=initrd), "distro"
    else:
        built = manifest.installed()
        guest, kind = GuestSettings(kernel=built.kernel, initrd=built.initrd), built.kernel_kind
        if (
            conf.get("agent.debug_console_enabled")
            and manifest.SHELL not in names
            and built.has_extension(manifest.SHELL)
        ):
            names.append(manifest.SHELL)
        guest.extensions = [built.extension(name) for name in names]
        guest.kernel_version = built.kernel_version
        guest.bounces = built.bounces
        guest.scans_ports = built.scans_ports
    guest.cmdline = _kernel_parameters(conf)
    guest.verbose = bool(conf.get("hypervisor.enable_debug", False))
    guest.modules = [text.split() for text in conf.get("agent.kernel_modules", ()) if text.strip()]
    guest.no_seccomp = bool(conf.get("runtime.disable_guest_seccomp"))
    guest.ready_s = boot_timeout() or _ready_s(conf)
    guest.create_s = conf.get("runtime.create_container_timeout", 0)
    return guest, kind


def _kernel_parameters(conf: Configuration) -> str:
    parameters = [str(conf.get("hypervisor.kernel_params", "")).strip()]
    if conf.get("agent.enable_debug"):
        parameters.append("agent.log=debug")
    if _switch(conf, "runtime.enable_tracing") and _switch(conf, "agent.enable_tracing"):
        parameters.append("agent.trace")
    if conf.get("agent.debug_console_enabled"):
        parameters.append("agent.debug_console agent.debug_console_vport=1026")
    if conf.get("agent.container_pipe_size"):
        parameters.append(f"agent.container_pipe_size={conf.get('agent.container_pipe_size')}")
    return " ".join(filter(None, parameters))


def _switch(conf: Configuration, name: str) -> bool:
    """A key that a variable of the environment may set as well.

    Raises:
        ConfigError: The variable says neither yes nor no.
    """
    value = conf.get(name, False)
    word = value.lower() if isinstance(value, str) else value
    if word in (True, "true", "yes"):
        return True
    if word in (False, "false", "no"):
        return False
    raise ConfigError(f"{name} is {value!r} ({conf.origin(name)})", "It may be 1 or 0.")


def _hypervisor(conf: Configuration, chosen: str) -> HypervisorSettings:
    """What the configuration changes of the machine itself; *chosen* is its accelerator."""
    return HypervisorSettings(
        accel=chosen,
        name=str(conf.get("runtime.hypervisor_name", "")),
        console="" if conf.get("hypervisor.use_legacy_serial", True) else "virtio",
        prealloc=conf.get("hypervisor.enable_mem_prealloc", False),
        huge_pages=conf.get("hypervisor.enable_hugepages", False),
        ksm=conf.get("hypervisor.enable_ksm", False),
        reclaim=conf.get("hypervisor.reclaim_guest_freed_memory", True),
        templates=conf.get("factory.enable_template", True),
        template_path=str(conf.get("factory.template_path", "")),
        pool=conf.get("factory.vm_cache_number", 0),
        pool_free_mib=conf.get("factory.vm_cache_least_free", 1024),
        vhost_user_store=conf.get("hypervisor.vhost_user_store_path", VHOST_USER_STORE)
        if conf.get("hypervisor.enable_vhost_user_store", False)
        else "",
        map_images=conf.get("hypervisor.block_device_driver", "") in MAPPED,
    )


def require_hypervisor(name: str) -> None:
    """Refuse a hypervisor that cannot start a machine here, before anything is made.

    Args:
        name: As the user gave it.

    Raises:
        ConfigError: There is none of that name.
        HostError: It is not installed, or cannot do without KVM.
    """
    conf = files.load("", name, "--hypervisor")
    _monitor(conf, accel.choose(str(conf.get("hypervisor.accelerator", ""))).accel)


def _monitor(conf: Configuration, chosen: str) -> Monitor:
    """The configured hypervisor, which can start machines here; *chosen* is the accelerator.

    Raises:
        ConfigError: There is no such hypervisor.
        HostError: It is not installed, or cannot do without KVM.
    """
    from kata.hypervisor import registry

    monitor = registry.find(str(conf.get("runtime.hypervisor_name", "")))
    if chosen not in monitor.accelerators:
        asked = conf.get("hypervisor.accelerator", "") == chosen
        reason = f"{chosen} is asked for" if asked else "it does not work on this host"
        by = f" ({conf.origin('hypervisor.accelerator')})" if asked else ""
        raise HostError(
            f"{monitor.title} needs KVM, and {reason}{by}",
            f"kata doctor has the reason; --hypervisor {registry.DEFAULT} can do without KVM",
        )
    path = conf.get("hypervisor.path", "")
    own = {"path": path} if path else {}
    if not monitor.program(own):
        missing = next((check for check in monitor.checks(own) if not check.ok), None)
        raise HostError(
            missing.text if missing else f"{monitor.title} is not installed",
            missing.hint if missing else "kata doctor",
        )
    return monitor


def _ask_monitor(monitor: Monitor, conf: Configuration, made: MachineSettings) -> Capabilities:
    """What the hypervisor can do here; its own options are added to the settings.

    Raises:
        ConfigError: One of its options makes no sense.
    """
    hypervisor = made.hypervisor
    table = "hypervisor."
    own = {
        key.removeprefix(table): value for key, (value, _) in conf.values.items() if key.startswith(table)
    }
    hypervisor.options = monitor.options(own, lambda key: conf.origin(table + key))
    return monitor.capabilities(hypervisor.accel, hypervisor.options, bounces=made.guest.bounces)


def _share(conf: Configuration) -> ShareSettings:
    """What the configuration says about the share."""
    configured = conf.get("hypervisor.shared_fs", "")
    protocol = shared_fs() or configured
    return ShareSettings(
        disabled=configured == "none",
        protocol="" if protocol == "none" else protocol,
        daemon=conf.get("hypervisor.virtio_fs_daemon", ""),
        cache=conf.get("hypervisor.virtio_fs_cache", ""),
        msize=conf.get("hypervisor.msize_9p") if "hypervisor.msize_9p" in conf.values else 0,
    )


def network_settings(conf: Configuration, path: str, *, stays_empty: bool = False) -> NetworkSettings:
    """The network settings of a client that has a network namespace.

    Args:
        conf: The configuration.
        path: The namespace's; empty makes one.
        stays_empty: No interface is likely to come into one that is made.

    Raises:
        ConfigError: The settings contradict each other.
        UnsupportedError: The namespace is the host's own, or named as some process's.
    """
    if path and _is_host_network(path):
        # Its interfaces would be redirected to the guest, and the host be cut off.
        raise UnsupportedError(
            f"the container asks for the host's network namespace ({path}), and it runs on a kernel of its own",
            "Give it a network namespace of its own.",
        )
    if path.startswith("/proc/") and path.split("/")[2].isdecimal():
        # As with Docker's `--network container:NAME`: the machine would take all that process's traffic.
        raise UnsupportedError(
            f"the container asks for the network namespace {path} of another process on this host",
            "A virtual machine cannot share it: what arrives there would reach the machine alone. If that process only"
            " keeps the namespace, give it a path of its own (ip netns attach).",
        )
    model = conf.get("runtime.internetworking_model", "tcfilter")
    if conf.get("runtime.disable_new_netns"):
        if model != "none":
            raise ConfigError(
                f"{conf.origin('runtime.disable_new_netns')}: disable_new_netns needs internetworking_model"
                f" 'none', and that is {model!r} ({conf.origin('runtime.internetworking_model')})"
            )
        return NetworkSettings()
    return NetworkSettings(mode="netns", path=path, model=model, stays_empty=stays_empty and not path)


def host_devices(conf: Configuration, config: Mapping[str, Any]) -> list[int]:
    """Numbers of the IOMMU groups that the machine of a container is to be given (`cold_plug_vfio`).

    Args:
        conf: What is configured.
        config: The container's specification: ``/dev/vfio/N`` of its devices.
    """
    if conf.get("hypervisor.cold_plug_vfio", "no-port") == "no-port":
        return []
    from kata.hypervisor import vfio

    devices = (config.get("linux") or {}).get("devices") or ()
    numbers = (
        vfio.number_of(str(one.get("path") or "")) for one in devices if one.get("type") in ("c", "u")
    )
    return sorted({number for number in numbers if number is not None})


def _is_host_network(path: str) -> bool:
    """Whether a network namespace is that of the machine, or of whoever started us. One that cannot be looked at is
    not: to enter it fails as well.
    """
    for own in ("/proc/self/ns/net", "/proc/1/ns/net"):
        try:
            if os.path.samefile(path, own):
                return True
        except OSError:
            continue
    return False


def _ready_s(conf: Configuration) -> float:
    """Seconds that a guest may take to come up, as configured; 0 is the engine's default."""
    if "agent.reconnect_timeout_ms" in conf.values:
        return float(conf.get("agent.reconnect_timeout_ms")) / 1000
    return float(conf.get("agent.dial_timeout", 0))


def shared_fs() -> str:
    """``virtio-fs``, ``virtio-9p``, or nothing: virtio-fs where the host has its program, and the guest can.

    Raises:
        UsageError: The variable says something else.
    """
    wanted = os.environ.get(SHARED_FS, "")
    if wanted not in ("", "virtio-fs", "virtio-9p"):
        raise UsageError(f"{SHARED_FS} is {wanted!r}", "It may be virtio-fs or virtio-9p.")
    return wanted


def boot_timeout() -> int:
    """Seconds that a guest may take to come up, as the environment says; 0 where it says nothing.

    Raises:
        UsageError: The variable is no number of seconds.
    """
    text = os.environ.get(BOOT_TIMEOUT) or "0"
    if not (text.isdecimal() and len(text) < 6):
        raise UsageError(f"{BOOT_TIMEOUT} is {text!r}, which is no number of seconds", "For example 120.")
    return int(text)
