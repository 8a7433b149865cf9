"""Members of Docker's answer about a container that programs look for, and of which a machine has little to tell.

What the specification says is read from it; the others have the value that they have in Docker where nothing was asked
for.

Source: the answer of ``GET /containers/{id}/json`` in the Docker Engine API 1.43.
"""

from __future__ import annotations

from kata.oci import capabilities

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

_SHM = "/dev/shm"
_THROTTLES = {
    "BlkioDeviceReadBps": "throttleReadBpsDevice",
    "BlkioDeviceReadIOps": "throttleReadIOPSDevice",
    "BlkioDeviceWriteBps": "throttleWriteBpsDevice",
    "BlkioDeviceWriteIOps": "throttleWriteIOPSDevice",
}


def top() -> dict[str, Any]:
    """Beside ``Id``: security labels, and files that are made in the guest and so have no path here."""
    files = dict.fromkeys(("HostnamePath", "HostsPath", "ResolvConfPath"), "")
    labels = dict.fromkeys(("AppArmorProfile", "MountLabel", "ProcessLabel"), "")
    return {**files, **labels, "ExecIDs": None}


def config() -> dict[str, Any]:
    """In ``Config``: ``Cmd`` has the whole command line, since that is what is kept of the image's."""
    attached = dict.fromkeys(("AttachStdin", "AttachStdout", "AttachStderr"), False)
    return {**attached, "Domainname": "", "Entrypoint": None, "OnBuild": None, "Volumes": None}


def network_settings() -> dict[str, Any]:
    """In ``NetworkSettings``: the addresses are the machine's own, and nobody here can reach them."""
    texts = (
        *("Bridge", "EndpointID", "Gateway", "GlobalIPv6Address", "IPv6Gateway", "LinkLocalIPv6Address"),
        *("MacAddress", "SandboxID", "SandboxKey"),
    )
    lengths = dict.fromkeys(("GlobalIPv6PrefixLen", "IPPrefixLen", "LinkLocalIPv6PrefixLen"), 0)
    return {**dict.fromkeys(texts, ""), **lengths, "HairpinMode": False}


def host_config(record: dict[str, Any], spec: dict[str, Any]) -> dict[str, Any]:
    """In ``HostConfig``.

    Args:
        record: The container's record.
        spec: Its specification; empty where it cannot be read.
    """
    linux = spec.get("linux") or {}
    resources = linux.get("resources") or {}
    cpu, block = resources.get("cpu") or {}, resources.get("blockIO") or {}
    bounding = set(((spec.get("process") or {}).get("capabilities") or {}).get("bounding") or ())
    added, dropped = bounding - set(capabilities.DEFAULT), set(capabilities.DEFAULT) - bounding
    # All capabilities are had by --cap-add ALL, too.
    confined = bool(linux.get("seccomp") or linux.get("maskedPaths") or linux.get("readonlyPaths"))
    privileged = bounding == set(capabilities.ALL) and not confined
    unmasked: list[str] | None = None if privileged or not spec else []
    return {
        "BlkioWeight": block.get("weight", 0),
        "BlkioWeightDevice": block.get("weightDevice") or [],
        **{name: block.get(key) or [] for name, key in _THROTTLES.items()},
        "CapAdd": sorted(added),
        "CapDrop": sorted(dropped) if bounding or spec else [],
        **dict.fromkeys(("Cgroup", "CgroupParent", "ContainerIDFile", "CpusetCpus", "CpusetMems"), ""),
        **dict.fromkeys(("Isolation", "PidMode", "UTSMode", "UsernsMode", "VolumeDriver"), ""),
        "ConsoleSize": [0, 0],
        **dict.fromkeys(("CpuCount", "CpuPercent", "CpuRealtimePeriod", "CpuRealtimeRuntime"), 0),
        **dict.fromkeys(("IOMaximumBandwidth", "IOMaximumIOps", "OomScoreAdj"), 0),
        "CpuPeriod": cpu.get("period", 0),
        "CpuQuota": cpu.get("quota", 0),
        "Devices": [
            {"PathOnHost": one["source"], "PathInContainer": one["path"], "CgroupPermissions": one["access"]}
            for one in record.get("devices") or ()
        ],
        "IpcMode": "private",
        "Links": None,
        "LogConfig": {
            "Type": "json-file",
            "Config": {"max-file": str(record["log"]["files"]), "max-size": str(record["log"]["max_bytes"])},
        },
        "MaskedPaths": linux.get("maskedPaths") or unmasked,
        "MemorySwap": record["memory"] or 0,
        "MemorySwappiness": None,
        "OomKillDisable": False,
        "Privileged": privileged,
        "PublishAllPorts": bool(record.get("publish_all")),
        "ReadonlyPaths": linux.get("readonlyPaths") or unmasked,
        "SecurityOpt": _security(spec, privileged=privileged) or None,
        "ShmSize": _shm_size(spec),
        "VolumesFrom": None,
    }


def _security(spec: dict[str, Any], *, privileged: bool) -> list[str]:
    """The values of ``--security-opt``; what `--privileged` brings is none of them.

    That of ``systempaths`` is told by the lists of paths, as in Docker.
    """
    found = ["no-new-privileges"] if (spec.get("process") or {}).get("noNewPrivileges") else []
    if spec and not privileged and not (spec.get("linux") or {}).get("seccomp"):
        found.append("seccomp=unconfined")
    return found


def _shm_size(spec: dict[str, Any]) -> int:
    """Bytes of the file system for shared memory; 0 where the specification says none."""
    for mount in spec.get("mounts") or ():
        if mount.get("destination") == _SHM:
            for option in mount.get("options") or ():
                name, _, value = str(option).partition("=")
                if name == "size" and value.isdecimal():
                    return int(value)
    return 0
