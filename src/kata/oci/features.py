"""Which parts of the OCI specification this runtime supports, as the specification's ``features`` structure.

containerd 2 asks a runtime for it (``-info``) and reports two parts to Kubernetes: whether mounts can be recursively
read-only (``rro``), and whether pods can have user namespaces.

Source: runtime-spec ``features.md`` and ``features-linux.md``.
"""

from __future__ import annotations

from kata.oci.capabilities import ALL

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

MOUNT_OPTIONS = (
    "async",
    "atime",
    "bind",
    "defaults",
    "dev",
    "diratime",
    "dirsync",
    "exec",
    "iversion",
    "lazytime",
    "loud",
    "mand",
    "noatime",
    "nodev",
    "nodiratime",
    "noexec",
    "noiversion",
    "nolazytime",
    "nomand",
    "norelatime",
    "nostrictatime",
    "nosuid",
    "nosymfollow",
    "private",
    "ratime",
    "rbind",
    "rdev",
    "rdiratime",
    "relatime",
    "remount",
    "rexec",
    "rnoatime",
    "rnodev",
    "rnodiratime",
    "rnoexec",
    "rnorelatime",
    "rnostrictatime",
    "rnosuid",
    "rnosymfollow",
    "ro",
    "rprivate",
    "rrelatime",
    "rro",
    "rrw",
    "rshared",
    "rslave",
    "rstrictatime",
    "rsuid",
    "rsymfollow",
    "runbindable",
    "rw",
    "shared",
    "silent",
    "slave",
    "strictatime",
    "suid",
    "symfollow",
    "sync",
    "unbindable",
)
"""Mount options that the agent handles itself; all others are passed to the file system."""
_HOOKS = ("prestart", "createRuntime", "createContainer", "startContainer", "poststart", "poststop")
_NAMESPACES = ("cgroup", "ipc", "mount", "network", "pid", "user", "uts")


_SECCOMP = {
    "enabled": True,
    "actions": [
        f"SCMP_ACT_{name}"
        for name in ("ALLOW", "ERRNO", "KILL", "KILL_PROCESS", "KILL_THREAD", "LOG", "TRACE", "TRAP")
    ],
    "operators": [f"SCMP_CMP_{name}" for name in ("EQ", "GE", "GT", "LE", "LT", "MASKED_EQ", "NE")],
    "archs": [f"SCMP_ARCH_{name}" for name in ("X32", "X86", "X86_64")],
    "knownFlags": [f"SECCOMP_FILTER_FLAG_{name}" for name in ("LOG", "SPEC_ALLOW", "TSYNC")],
    "supportedFlags": [f"SECCOMP_FILTER_FLAG_{name}" for name in ("LOG", "SPEC_ALLOW", "TSYNC")],
}
"""What the agent makes filters of (``agent/src/seccomp.rs``)."""


def features() -> dict[str, Any]:
    """Return the features structure.

    User namespaces work in a guest, but idmapped mounts do not. containerd concludes from this that pods cannot have
    user namespaces of their own.
    """
    return {
        "ociVersionMin": "1.0.0",
        "ociVersionMax": "1.2.0",
        "hooks": list(_HOOKS),
        "mountOptions": list(MOUNT_OPTIONS),
        "linux": {
            "namespaces": list(_NAMESPACES),
            "capabilities": sorted(ALL),
            "cgroup": {"v1": True, "v2": True, "systemd": True, "systemdUser": False, "rdma": False},
            "seccomp": dict(_SECCOMP),
            "apparmor": {"enabled": False},
            "selinux": {"enabled": False},
            "intelRdt": {"enabled": False},
            "mountExtensions": {"idmap": {"enabled": False}},
        },
    }
