"""What every door tells an engine of the machine to start: its size, its accelerator, and the guest in it.

Here the configuration (`kata.config.files`) becomes settings of an engine. What is not configured is left out, so
that the engine's own default holds.
"""

from __future__ import annotations

import os

from kata import paths
from kata.config import files
from kata.errors import ConfigError, GuestAssetError, UnsupportedError, UsageError
from kata.guest import manifest
from kata.hypervisor import accel
from kata.resources import sizing

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    from kata.config.files import Configuration

BOOT_TIMEOUT = "KATA_BOOT_TIMEOUT"
"""Variable with the seconds that a guest may take to come up; the engine has a default."""
EMULATED_SHARE = (
    "virtio-fs was asked for; files are shared by 9p, since the guest's kernel cannot have virtio-fs in an emulated"
    " machine (kata guest build --kernel small makes one that can)"
)
SHARED_FS = "KATA_SHARED_FS"
"""Variable that says how files of the host reach the guest: ``virtio-fs``, ``virtio-9p``, or whichever there is."""

_ARGUMENT = frozenset("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789_.,=+-")
"""Characters of options that are handed to QEMU: none that could name a file."""


def settings(
    asked: sizing.ResourceRequest, configuration: Configuration | None = None, *, grows: bool = False
) -> tuple[dict[str, Any], list[tuple[str, str]]]:
    """The keys of ``sandbox.json`` that are about the machine.

    Args:
        asked: CPUs and memory that were asked for.
        configuration: What the host, and the pod, have configured; None reads the host's files.
        grows: The machine may grow while it runs: containers may come, and limits change.

    Returns:
        The keys, and what the user should be told once: topic and sentence (that there is only software emulation).

    Raises:
        GuestAssetError: There is no guest to boot, or it lacks an extension.
        ConfigError: A configuration file is wrong.
        UsageError: More CPUs than the host has, or a variable is malformed.
        ResourceExhaustedError: More memory than the host has.
    """
    conf = files.load() if configuration is None else configuration
    kernel, initrd, kind, extensions, about_kernel = _guest(conf)
    bounds = limits(conf)
    size = sizing.plan(asked, kind, bounds)
    choice = accel.choose(str(conf.get("hypervisor.accelerator", "")))
    hypervisor = {
        "accel": choice.accel,
        "kernel": kernel,
        "initrd": initrd,
        "extensions": extensions,
        **about_kernel,
        "ready_s": boot_timeout() or _ready_s(conf),
        **_hypervisor(conf),
    }
    found: dict[str, Any] = {
        "hypervisor": hypervisor,
        "vcpus": size.vcpus,
        "memory_mib": size.memory_mib,
        "sizing": size.record(),
        **_sandbox(conf),
    }
    if bounds.fixed or bounds.fixed_memory:
        found["fixed_memory"] = True
    if grows:
        found |= {"max_vcpus": size.max_vcpus, "max_memory_mib": size.max_memory_mib}
    if conf.values:
        found["configuration"] = {name: list(pair) for name, pair in conf.values.items()}
    notes = [("software-emulation", choice.reason)] if choice.accel == "tcg" else []
    if (
        choice.accel == "tcg"
        and hypervisor.get("shared_fs") == "virtio-fs"
        and not hypervisor.get("bounces")
    ):
        notes.append(("shared-fs", EMULATED_SHARE))
    return found, notes + [("configuration", note) for note in conf.notes]


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


def _guest(conf: Configuration) -> tuple[str, str, str, list[str], dict[str, Any]]:
    """Kernel, initrd, kind of kernel, archives behind the initrd, and what else the engine has to know of them."""
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
        return kernel, initrd, "distro", [], {}
    guest = manifest.load(paths.guest_dir())
    about = {"kernel_version": guest.kernel_version, "bounces": guest.bounces}
    return guest.kernel, guest.initrd, guest.kernel_kind, [guest.extension(name) for name in names], about


def _hypervisor(conf: Configuration) -> dict[str, Any]:
    """What the configuration changes of the machine itself."""
    found: dict[str, Any] = {}
    for key, name in (("path", "path"), ("firmware", "firmware"), ("sandbox", "seccompsandbox")):
        if conf.get(f"hypervisor.{name}"):
            found[key] = conf.get(f"hypervisor.{name}")
    shared = shared_fs() or conf.get("hypervisor.shared_fs", "")
    if shared not in ("", "none"):
        found["shared_fs"] = shared
    for name in ("virtio_fs_daemon", "virtio_fs_cache"):
        if conf.get(f"hypervisor.{name}"):
            found[name] = conf.get(f"hypervisor.{name}")
    for name in ("path", "firmware", "entropy_source"):
        path = conf.get(f"hypervisor.{name}", "")
        if path and not os.path.exists(path):
            raise ConfigError(f"{conf.origin(f'hypervisor.{name}')}: {name} {path} does not exist")
    if conf.get("hypervisor.entropy_source"):
        found["entropy"] = conf.get("hypervisor.entropy_source")
    for key, name in (("machine_options", "machine_accelerators"), ("cpu_features", "cpu_features")):
        text = str(conf.get(f"hypervisor.{name}", "")).strip(",")
        if not _ARGUMENT.issuperset(text):
            raise ConfigError(
                f"{conf.origin(f'hypervisor.{name}')}: {name} {text!r} has characters that no option has"
            )
        if text:
            found[key] = text
    machine = str(conf.get("hypervisor.machine_type", ""))
    if machine:
        found["machine"] = _machine_type(machine, conf.origin("hypervisor.machine_type"))
    parameters = [str(conf.get("hypervisor.kernel_params", "")).strip()]
    if conf.get("agent.enable_debug"):
        parameters.append("agent.log=debug")
    if conf.get("agent.debug_console_enabled"):
        parameters.append("agent.debug_console agent.debug_console_vport=1026")
    if conf.get("agent.container_pipe_size"):
        parameters.append(f"agent.container_pipe_size={conf.get('agent.container_pipe_size')}")
    if any(parameters):
        found["cmdline"] = " ".join(filter(None, parameters))
    for key, name, default in (
        ("verbose", "enable_debug", False),
        ("prealloc", "enable_mem_prealloc", False),
        ("reclaim", "reclaim_guest_freed_memory", True),
    ):
        if conf.get(f"hypervisor.{name}", default) != default:
            found[key] = not default
    if not conf.get("hypervisor.use_legacy_serial", True):
        found["console"] = "virtio"
    return found


def _machine_type(text: str, origin: str) -> str:
    """*text*, if it is a machine on which our devices have their places.

    Raises:
        ConfigError: It is another.
    """
    base = text.removeprefix("pc-")
    if text in ("q35", "pc") or base.startswith(("q35-", "i440fx-")):
        return text
    raise ConfigError(f"{origin}: there is no machine type {text!r} here", "q35 or pc")


def _sandbox(conf: Configuration) -> dict[str, Any]:
    """What the configuration changes of the sandbox around the machine."""
    found: dict[str, Any] = {"create_s": conf.get("runtime.create_container_timeout", 0)}
    if conf.get("hypervisor.shared_fs") == "none":
        found["share"] = False
    if "hypervisor.msize_9p" in conf.values:
        found["share_msize"] = conf.get("hypervisor.msize_9p")
    if conf.get("runtime.disable_guest_seccomp"):
        found["no_seccomp"] = True
    modules = [text.split() for text in conf.get("agent.kernel_modules", ()) if text.strip()]
    if modules:
        found["kernel_modules"] = modules
    return found


def network(conf: Configuration, path: str) -> dict[str, Any]:
    """The network settings of a client that has a network namespace.

    Args:
        conf: The configuration.
        path: The namespace's; empty makes one.

    Raises:
        ConfigError: The settings contradict each other.
        UnsupportedError: The namespace is the host's own, or named as some process's.
    """
    if path and _is_hosts_network(path):
        # Its interfaces would be redirected to the guest, and the host be cut off.
        raise UnsupportedError(
            f"the container asks for the host's network namespace ({path}), and it runs on a kernel of its own",
            "Give it a network namespace of its own.",
        )
    if path.startswith("/proc/") and path.split("/")[2].isdecimal():
        # As of Docker's `--network container:NAME`: the machine would take all that process's traffic.
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
        return {"mode": "none"}
    found = {"mode": "netns", "path": path}
    if model != "tcfilter":
        found["model"] = model
    return found


def _is_hosts_network(path: str) -> bool:
    """Whether a network namespace is that of the machine, or of whoever started us. One that cannot be looked at is
    not: to enter it fails as well."""
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
