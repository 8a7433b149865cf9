"""A sandbox that containerd makes as a pod (Sandbox API): what its CRI asks for, as settings of the engine."""

from __future__ import annotations

from kata.config import annotations as pod_annotations
from kata.engine import machine
from kata.errors import ConfigError, UnsupportedError
from kata.proto.codec import DecodeError
from kata.proto.cri_pb import PodSandboxConfig
from kata.resources import sizing

TYPE_CHECKING = False
if TYPE_CHECKING:
    from kata.proto.podsandbox_pb import CreateSandboxRequest
    from kata.settings import SandboxSettings

_CONFIG_TYPE = "runtime.v1.PodSandboxConfig"
_NODE = 2
_CPU = "io.kubernetes.cri.sandbox-cpu-"
_MEMORY = "io.kubernetes.cri.sandbox-memory"


def describe(settings: SandboxSettings, request: CreateSandboxRequest) -> None:
    """Complete the settings of a pod that has been started empty, with what its CreateSandbox says.

    Args:
        settings: The pod's; unchanged where this fails.
        request: CreateSandbox's.

    Raises:
        ConfigError: The pod's configuration cannot be read, or ours is wrong.
        UnsupportedError: The pod asks for a namespace of the host.
        KataError: What `machine.machine_settings` raises.
    """
    pod = _config(request)
    linux = pod.linux
    options = linux.security_context.namespace_options if linux and linux.security_context else None
    namespace_modes = (
        (("network", options.network), ("PID", options.pid), ("IPC", options.ipc)) if options else ()
    )
    for name, mode in namespace_modes:
        if mode == _NODE:
            raise UnsupportedError(
                f"the pod asks for the host's {name} namespace, and it runs on a kernel of its own",
                "Leave the host namespace out (hostNetwork, hostPID, hostIPC).",
            )
    annotations = {**pod.annotations, **request.annotations}
    conf = pod_annotations.load(settings.pod.config_path if settings.pod is not None else "", annotations)
    asked = sizing.request_of({"annotations": {**annotations, **_sizes(pod)}})
    described, notes = machine.machine_settings(asked, conf, grows=True)
    network = machine.network_settings(conf, request.netns_path)
    settings.machine = described
    settings.notes += [note for _, note in notes]
    settings.network = network
    settings.cgroups_path = _cgroups_path(linux.cgroup_parent if linux else "", request.sandbox_id)
    settings.hostname = pod.hostname
    dns = pod.dns_config
    settings.resolv_conf = _resolv_conf(dns.servers, dns.searches, dns.options) if dns else []
    settings.sysctls = dict(linux.sysctls) if linux else {}


def _config(request: CreateSandboxRequest) -> PodSandboxConfig:
    if request.options is None or not request.options.value:
        return PodSandboxConfig()  # a client without a CRI
    if request.options.type_url.rpartition("/")[2] != _CONFIG_TYPE:
        raise ConfigError(f"the pod's configuration is of an unknown type: {request.options.type_url!r}")
    try:
        return PodSandboxConfig.decode(request.options.value)
    except DecodeError as error:
        raise ConfigError(f"the pod's configuration cannot be decoded: {error}") from None


def _sizes(pod: PodSandboxConfig) -> dict[str, str]:
    """What containerd puts into the annotations of a pod's own container, where there is one."""
    wanted = pod.linux.resources if pod.linux else None
    if wanted is None:
        return {}
    return {
        f"{_CPU}quota": str(wanted.cpu_quota),
        f"{_CPU}period": str(wanted.cpu_period),
        _MEMORY: str(wanted.memory_limit_in_bytes),
    }


def _cgroups_path(parent: str, sandbox_id: str) -> str:
    """As containerd's CRI makes it for a pod's own container, of systemd's slice or of a path."""
    if not parent:
        return ""
    base = parent.rstrip("/").rpartition("/")[2]
    return f"{base}:cri-containerd:{sandbox_id}" if base.endswith(".slice") else f"{parent}/{sandbox_id}"


def _resolv_conf(servers: list[str], searches: list[str], options: list[str]) -> list[str]:
    lines = [f"search {' '.join(searches)}"] if searches else []
    lines += [f"nameserver {server}" for server in servers]
    return lines + ([f"options {' '.join(options)}"] if options else [])
