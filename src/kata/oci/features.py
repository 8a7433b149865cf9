"""What this runtime does of the OCI specification, in the specification's own form (``features``).

containerd 2 asks a runtime for it (``-info``) and tells Kubernetes what it says there: whether mounts can be read-only
with everything that is mounted below them (``rro``), and whether user namespaces of pods are possible.

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
"""Those that the agent knows itself; others go to the file system."""
_HOOKS = ("prestart", "createRuntime", "createContainer", "poststart", "poststop")
_NAMESPACES = ("cgroup", "ipc", "mount", "network", "pid", "user", "uts")


def features() -> dict[str, Any]:
    """The features structure.

    A user namespace can be in a guest, and nothing can be mounted with shifted owners there (``idmap``): so a pod with
    a user namespace of its own is not possible, and containerd reads that from it.
    """
    return {
        "ociVersionMin": "1.0.0",
        "ociVersionMax": "1.2.0",
        "hooks": list(_HOOKS),
        "mountOptions": list(MOUNT_OPTIONS),
        "linux": {
            "namespaces": list(_NAMESPACES),
            "capabilities": sorted(ALL),
            "seccomp": {"enabled": True},
            "apparmor": {"enabled": False},
            "selinux": {"enabled": False},
            "intelRdt": {"enabled": False},
            "mountExtensions": {"idmap": {"enabled": False}},
        },
    }
