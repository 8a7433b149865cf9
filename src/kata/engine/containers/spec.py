"""What becomes of a container's runtime specification before it goes to the guest.

Two steps: `for_guest` changes what cannot mean the same in the guest (host paths, the namespaces that the
virtual machine itself stands for, hooks that run on the host), `to_message` turns the JSON object into the
agent protocol's message.

Sources: runtime-spec 1.1 config.md and config-linux.md; the agent protocol's notes on what a host changes.
Unlike the original, limits for pids and block I/O and the seccomp profile are kept: our agent applies them.
"""

from __future__ import annotations

import errno
import os

from kata.errors import ConfigError, ResourceExhaustedError, UnsupportedError
from kata.proto.codec import DecodeError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Collection, Iterator, Mapping, Sequence
    from typing import Any, TypeVar

    from kata.errors import AgentError, KataError
    from kata.proto import oci_pb
    from kata.proto.codec import Message

    M = TypeVar("M", bound=Message)

GUEST_RUN = "/run/kata-containers"
GUEST_SHARE = f"{GUEST_RUN}/shared/containers"
GUEST_RESOLV = f"{GUEST_RUN}/sandbox/resolv.conf"

BUNDLE_ANNOTATION = "io.katacontainers.pkg.oci.bundle_path"
TYPE_ANNOTATION = "io.katacontainers.pkg.oci.container_type"

_LARGE_BYTES = 1 << 20
"""From here on the texts of a specification may be why a request was refused as too large."""

_GUEST_NAMESPACES = ("mount", "ipc", "uts", "pid", "cgroup", "user")
"""The virtual machine is the network and time namespace; the rest is made in it."""

# JSON key -> field name, where it is not the key with a capital first letter. The names follow the Go
# structs.
_RENAMED = {
    "ociVersion": "Version",
    "uid": "UID",
    "gid": "GID",
    "uidMappings": "UIDMappings",
    "gidMappings": "GIDMappings",
    "oomScoreAdj": "OOMScoreAdj",
    "cpu": "CPU",
    "pageSize": "Pagesize",
    "errnoRet": "errnoret",
}
_MAPS = frozenset({"annotations", "sysctl"})

_KIND_ANNOTATIONS = ("io.kubernetes.cri.container-type", "io.kubernetes.cri-o.ContainerType")
_SANDBOX_ANNOTATIONS = ("io.kubernetes.cri.sandbox-id", "io.kubernetes.cri-o.SandboxID")
"""How containerd's and CRI-O's CRI say what a container is to its pod, and which pod that is."""


def _annotation(spec: Mapping[str, Any], names: tuple[str, ...]) -> str:
    annotations = spec.get("annotations") or {}
    return next((str(annotations[name]) for name in names if annotations.get(name)), "")


def container_type(spec: Mapping[str, Any]) -> str:
    """``pod_sandbox``, ``pod_container`` or, without a word from a CRI, ``single_container``."""
    kind = _annotation(spec, _KIND_ANNOTATIONS)
    return {"sandbox": "pod_sandbox", "container": "pod_container"}.get(kind, "single_container")


def created_by_crio(spec: Mapping[str, Any]) -> bool:
    """Whether CRI-O has made it."""
    return bool(_annotation(spec, _KIND_ANNOTATIONS[1:]))


def pod_of(spec: Mapping[str, Any]) -> str:
    """The id of the sandbox that a pod's container belongs in; empty for any other container."""
    return _annotation(spec, _SANDBOX_ANNOTATIONS) if container_type(spec) == "pod_container" else ""


def oom_score_adj(spec: Mapping[str, Any]) -> int:
    """The out-of-memory score of the container's process, 0 if it says none."""
    found = (spec.get("process") or {}).get("oomScoreAdj")
    return found if isinstance(found, int) else 0


def pids_path(spec: Mapping[str, Any]) -> str:
    """The PID namespace that a pod's container joins, as its client names it; empty for one of its own.

    It is the pod's (``shareProcessNamespace``) or that of another of its containers (``kubectl debug --target``).
    """
    if container_type(spec) != "pod_container":
        return ""
    namespaces = (spec.get("linux") or {}).get("namespaces") or ()
    return next((str(one["path"]) for one in namespaces if one.get("type") == "pid" and one.get("path")), "")


def refuse_foreign(spec: Mapping[str, Any]) -> None:
    """Refuse what would need the host's kernel: its namespaces, or those of a process there.

    A path is fine for the network namespace, into which the machine is put; and for a pod's IPC, UTS and PID
    namespaces, which are those of its own sandbox: the guest is the pod. CRI-O creates IPC and UTS namespaces for each
    pod before it calls the runtime; they are empty, so ignoring them is safe.

    Raises:
        UnsupportedError: With the namespace's name.
    """
    given = {str(one.get("type")): one for one in (spec.get("linux") or {}).get("namespaces") or ()}
    for kind, name in (("network", "network"), ("pid", "PID"), ("ipc", "IPC")):
        if kind not in given:
            raise UnsupportedError(
                f"the container asks for the host's {name} namespace, and it runs on a kernel of its own",
                "Leave the host namespace out (hostNetwork, hostPID, hostIPC, --net=host, --pid=host, --ipc=host).",
            )
    if container_type(spec) == "pod_container":
        return
    made_for_it = ("ipc", "uts") if _annotation(spec, _KIND_ANNOTATIONS[1:]) == "sandbox" else ()
    for kind in ("pid", "ipc", "uts", "mount", "user", "cgroup"):
        if kind not in made_for_it and given.get(kind, {}).get("path"):
            raise UnsupportedError(
                f"the container asks for the {kind} namespace {given[kind]['path']} of another process on this host",
                "A virtual machine cannot join it.",
            )


NOT_CARRIED = {
    "domainname": "the NIS domain name",
    "ioPriority": "the I/O priority",
    "scheduler": "the scheduling policy",
    "execCPUAffinity": "the CPU affinity of execs",
    "personality": "the execution domain",
    "timeOffsets": "time namespace offsets",
    "netDevices": "host network devices",
    "useHierarchy": "the memory hierarchy switch (always on)",
    "checkBeforeUpdate": "the check before a memory update",
    "idle": "the idle CPU class",
    "burst": "the CPU burst",
    "rdma": "RDMA limits",
    "unified": "raw cgroup v2 settings",
    "listenerPath": "the seccomp listener",
    "listenerMetadata": "the seccomp listener",
    "memoryPolicy": "the NUMA memory policy",
    "enableMonitoring": "resource monitoring",
    "closID": "a resource control group",
    "memBwSchema": "the memory bandwidth schema",
    "realtimeBudget": "the realtime budget",
    "zos": "z/OS settings",
    "vm": "virtual machine settings",
    "commandLine": "a Windows command line",
    "credentialSpec": "a Windows credential",
    "solaris": "Solaris settings",
    "windows": "Windows settings",
}
"""Keys that the agent protocol has no field for, and what a person calls them."""

OF_HOST_DEVICES = {
    "weightDevice": "weights of block I/O for the host's devices",
    "throttleReadBpsDevice": "limits of bytes read from the host's devices",
    "throttleWriteBpsDevice": "limits of bytes written to the host's devices",
    "throttleReadIOPSDevice": "limits of reads from the host's devices",
    "throttleWriteIOPSDevice": "limits of writes to the host's devices",
}
"""Keys of ``blockIO`` that name the host's devices by number: in the guest it is nobody's number, or another disk's."""
OF_HOST_SETS = {
    "cpus": "the numbers of the host's processors (how many they are is the size of the machine)",
    "mems": "the numbers of the host's memory nodes",
}
"""The same of ``cpu``."""
OF_HOST_NETWORK = {
    "classID": "the class of the host's network traffic control",
    "priorities": "priorities of the host's network interfaces",
}
"""The same of ``network``."""
LEFT_OUT = {**OF_HOST_DEVICES, **OF_HOST_SETS, **OF_HOST_NETWORK}


class GuestBind:
    """What a bind mount of the spec is in the guest.

    Args:
        source: The path there.
        options: Its options there.
    """

    __slots__ = ("options", "source")

    def __init__(self, source: str, options: list[str]) -> None:
        self.source = source
        self.options = options


def is_bind(mount: Mapping[str, Any]) -> bool:
    """Whether a mount of the spec takes its content from a path."""
    options = mount.get("options") or ()
    return mount.get("type") == "bind" or "bind" in options or "rbind" in options


def resolve_sources(config: dict[str, Any], bundle: str) -> None:
    """Make the sources of bind mounts absolute, in place: one that is not is relative to the bundle.

    Source: runtime-spec config.md, "Mounts".

    Args:
        config: A specification, whose members may be of any type.
        bundle: Absolute path of its directory.
    """
    mounts = config.get("mounts")
    for mount in mounts if isinstance(mounts, list) else ():
        if not isinstance(mount, dict) or not isinstance(mount.get("options") or [], list):
            continue  # whoever mounts it says what is wrong
        source = mount.get("source")
        if is_bind(mount) and isinstance(source, str) and source and not source.startswith("/"):
            mount["source"] = os.path.normpath(os.path.join(bundle, source))


def host_binds(spec: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The mounts whose source is a path of the host."""
    return [mount for mount in spec.get("mounts") or () if is_bind(mount)]


def for_guest(
    spec: Mapping[str, Any],
    *,
    rootfs: str,
    bundle: str,
    container_type: str,
    binds: Sequence[GuestBind],
    files: Mapping[str, str],
    cgroups_path: str,
    disks: Collection[tuple[int, int]] = (),
) -> dict[str, Any]:
    """The spec as the guest is to see it; *spec* is left as it is.

    Args:
        spec: ``config.json``.
        rootfs: The root directory in the guest.
        bundle: The bundle's path, for the annotation.
        container_type: ``single_container``, ``pod_sandbox`` or ``pod_container``.
        binds: What each of `host_binds` is in the guest, in their order.
        files: Destination -> guest path of files that every container gets (``/etc/hosts``), unless the spec
            mounts something there itself.
        cgroups_path: The container's cgroup in the guest.
        disks: Numbers of the host's block devices whose limits are carried: the container has them as disks.

    Without a process (which the specification allows until a start) the container is its files only.

    Raises:
        ConfigError: The spec is not one.
    """
    if not isinstance(spec.get("process") or {}, dict):
        raise ConfigError("the specification's process is not an object", "check config.json in the bundle")
    out = dict(spec)
    out["root"] = {"path": rootfs, "readonly": bool((spec.get("root") or {}).get("readonly"))}
    mounts = []
    remaining_binds = iter(binds)
    for mount in spec.get("mounts") or ():
        changed = {key: mount[key] for key in ("destination", "type", "source", "options") if mount.get(key)}
        if is_bind(mount):
            bind = next(remaining_binds)
            changed["source"], changed["options"] = bind.source, bind.options
        mounts.append(changed)
    taken = {mount.get("destination") for mount in mounts}
    mounts += [
        {
            "destination": destination,
            "type": "bind",
            "source": source,
            "options": ["rbind", "rprivate", "rw"],
        }
        for destination, source in files.items()
        if destination not in taken
    ]
    out["mounts"] = mounts
    if spec.get("process"):
        out["process"] = dict(spec["process"])
        for label in ("apparmorProfile", "selinuxLabel"):  # neither exists in the guest's kernel
            out["process"].pop(label, None)
    hooks = spec.get("hooks") or {}
    out["hooks"] = {"startContainer": hooks["startContainer"]} if hooks.get("startContainer") else None
    annotations = dict(spec.get("annotations") or {})
    annotations[BUNDLE_ANNOTATION] = bundle
    annotations[TYPE_ANNOTATION] = container_type
    out["annotations"] = annotations
    linux = dict(spec.get("linux") or {})
    linux.pop("mountLabel", None)
    linux.pop("intelRdt", None)
    linux["cgroupsPath"] = cgroups_path
    linux["namespaces"] = [
        {"type": namespace["type"]}
        for namespace in linux.get("namespaces") or ()
        if namespace.get("type") in _GUEST_NAMESPACES
    ]
    linux["resources"] = guest_resources(linux.get("resources") or {}, disks)
    out["linux"] = linux
    return out


def guest_resources(resources: Mapping[str, Any], disks: Collection[tuple[int, int]] = ()) -> dict[str, Any]:
    """Resource limits as the guest is to see them: the host's numbers of processors, memory nodes and block devices
    mean nothing there, but for those of *disks*, which the agent knows.
    """
    out = dict(resources)
    out.pop("network", None)
    for part, of_host in (("cpu", OF_HOST_SETS), ("blockIO", OF_HOST_DEVICES)):
        if out.get(part):
            kept = {
                key: limits_of(value, disks) for key, value in out[part].items() if key in OF_HOST_DEVICES
            }
            out[part] = {key: value for key, value in out[part].items() if key not in of_host}
            out[part].update({key: value for key, value in kept.items() if value})
    if out.get("devices"):
        # Absent numbers mean "any"; 0 is a number, so the message carries -1.
        out["devices"] = [
            {"major": -1, "minor": -1, **{key: value for key, value in rule.items() if value is not None}}
            for rule in out["devices"]
        ]
    return out


def limits_of(limits: object, disks: Collection[tuple[int, int]]) -> list[dict[str, Any]]:
    """Those entries of a list of limits by device that are about one of these."""
    return [
        one
        for one in (limits if isinstance(limits, list) else ())
        if isinstance(one, dict) and (one.get("major"), one.get("minor")) in disks
    ]


def dropped(spec: object, disks: Collection[tuple[int, int]] = ()) -> Iterator[str]:
    """Sentences about what a spec asks for that cannot be had in the guest; see `for_guest` for *disks*."""
    if isinstance(spec, dict):
        for key, value in spec.items():
            if value in (None, [], {}, "", 0, False):
                continue
            if key in NOT_CARRIED:
                yield NOT_CARRIED[key]
            elif key in LEFT_OUT:
                if key not in OF_HOST_DEVICES or limits_of(value, disks) != value:
                    yield LEFT_OUT[key]
            elif key == "options" and isinstance(value, list):
                if "rshared" in value or "shared" in value:
                    yield "mount propagation from the container to the host (the other direction works)"
            elif key not in _MAPS:
                yield from dropped(value, disks)
    elif isinstance(spec, list):
        for item in spec:
            yield from dropped(item, disks)


def default_errno(spec: Mapping[str, Any]) -> Iterator[str]:
    """As `dropped`, for an agent whose filters fail with EPERM what a profile does not name, whatever that says."""
    profile = (spec.get("linux") or {}).get("seccomp") or {}
    if profile.get("defaultErrnoRet") not in (None, errno.EPERM):
        yield "seccomp's default errno (EPERM is used)"


def _fields(value: Any, key: str = "") -> Any:
    """JSON object -> the same by the message's field names."""
    if isinstance(value, list):
        return [_fields(item, key) for item in value if item is not None]
    if not isinstance(value, dict):
        return value
    if key in _MAPS:
        return value
    out = {}
    for name, content in value.items():
        if content is None or name in NOT_CARRIED:
            continue
        if key == "mounts":
            if name in ("destination", "source", "type", "options"):
                out[name] = content
            continue
        out[_RENAMED.get(name) or name[:1].upper() + name[1:]] = _fields(content, name)
    return out


def to_message(spec: Mapping[str, Any], unknown: list[str] | None = None) -> oci_pb.Spec:
    """The protocol's message of a spec.

    Args:
        spec: See `for_guest`.
        unknown: Takes the members that the specification does not have. They are passed over (config.md,
            "Extensibility").

    Raises:
        ConfigError: A value has the wrong type; the message names it.
    """
    from kata.proto import oci_pb

    return _convert(oci_pb.Spec, spec, "the container's specification", unknown)


def process_message(process: Mapping[str, Any]) -> oci_pb.Process:
    """The protocol's message of an OCI process object (of an exec).

    Raises:
        ConfigError: As `to_message`.
    """
    from kata.proto import oci_pb

    kept = {key: value for key, value in process.items() if key not in ("apparmorProfile", "selinuxLabel")}
    return _convert(oci_pb.Process, kept, "the process's specification")


def resources_message(resources: Mapping[str, Any]) -> oci_pb.LinuxResources:
    """The protocol's message of OCI resource limits.

    Raises:
        ConfigError: As `to_message`.
    """
    from kata.proto import oci_pb

    return _convert(oci_pb.LinuxResources, guest_resources(resources), "the resource limits")


def _convert(kind: type[M], value: Mapping[str, Any], what: str, unknown: list[str] | None = None) -> M:
    try:
        return kind.from_dict(_fields(dict(value)), [] if unknown is None else unknown)
    except (DecodeError, AttributeError, TypeError) as error:
        raise ConfigError(
            f"{what} cannot be used: {error}", "compare it with the OCI runtime specification"
        ) from None


def explain_size(error: AgentError, what: str, config: Mapping[str, Any]) -> KataError:
    """The error to raise for one of a create or exec call: which part of the specification was too large.

    Args:
        error: As it came from the call.
        what: The container or process, for the sentence.
        config: The runtime specification; of an exec, one with nothing but ``process``.

    Returns:
        A `ResourceExhaustedError` with the largest parts and their sizes, or *error* itself where it is not
        about the size: a request is one frame of at most 4 MiB (ttRPC), and bounded in the number of its
        elements by the agent.
    """
    process = config.get("process") or {}
    annotations = config.get("annotations") or {}
    parts = {
        "environment": process.get("env") or (),
        "command line": process.get("args") or (),
        "annotations": [text for pair in annotations.items() for text in pair],
    }
    sizes = {name: sum(len(str(text).encode(errors="replace")) for text in parts[name]) for name in parts}
    if error.code != ResourceExhaustedError.grpc_code or sum(sizes.values()) < _LARGE_BYTES:
        return error
    named = ", ".join(
        f"{name} {size} bytes" for name, size in sorted(sizes.items(), key=lambda one: -one[1]) if size
    )
    return ResourceExhaustedError(
        f"{what} is described by more than a request to the guest may hold ({named}): {error.message}",
        "All of it together has to stay below 4 MiB. Look at the image's Env and Cmd (docker image inspect),"
        " at --env-file and at -e; hand large values over as a file or a volume.",
    )
