"""The runtime specification of a container of the `kata` command, for which no other runtime writes one.

`build` makes ``config.json`` from the user's options and the image's configuration. Where it makes sense inside a
virtual machine, the result is what Docker would produce: the same default capabilities, mounts, masked and read-only
paths and namespaces. The seccomp profile is our own (`kata.oci.seccomp`).

Source: runtime-spec 1.1, config.md and config-linux.md.
"""

from __future__ import annotations

from kata.errors import UsageError
from kata.oci import OCI_VERSION
from kata.oci import capabilities as caps
from kata.oci.seccomp import default_profile

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

DEFAULT_PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"

MASKED_PATHS = (
    "/proc/acpi",
    "/proc/asound",
    "/proc/interrupts",
    "/proc/kcore",
    "/proc/keys",
    "/proc/latency_stats",
    "/proc/scsi",
    "/proc/timer_list",
    "/proc/timer_stats",
    "/sys/devices/virtual/powercap",
    "/sys/firmware",
)
READONLY_PATHS = ("/proc/bus", "/proc/fs", "/proc/irq", "/proc/sys", "/proc/sysrq-trigger")

SYSTEMD = ("/sbin/init", "/usr/sbin/init", "/usr/local/sbin/init")
"""Commands that are taken for systemd, besides any program called ``systemd``; the same as Podman's."""
SYSTEMD_MOUNTS = (
    ("/run", ["nosuid", "nodev", "mode=755"]),
    ("/run/lock", ["nosuid", "nodev", "noexec", "mode=1777"]),
    ("/tmp", ["nosuid", "nodev", "mode=1777"]),
)
"""File systems in memory that systemd needs and may not mount itself."""
SYSTEMD_STOP = "SIGRTMIN+3"
"""The signal that makes systemd shut down; on SIGTERM it would re-execute itself."""

CPU_PERIOD = 100_000
"""Period of the CPU quota, in microseconds; the default of the kernel and of Docker."""


ROOT = "0"
"""The user of a container for which neither the command line nor the image names one."""


class Request:
    """The user's options for a container.

    Every field but `hostname` is optional. Sizes are in bytes, `cpus` is a number of CPUs. `systemd` is ``always``,
    ``false``, or ``true``: only if the command is systemd (see `runs_systemd`).
    """

    __slots__ = (
        "cap_add",
        "cap_drop",
        "command",
        "cpus",
        "entrypoint",
        "env",
        "hostname",
        "memory",
        "pids_limit",
        "privileged",
        "read_only",
        "systemd",
        "terminal",
        "tmpfs",
        "user",
        "volumes",
        "workdir",
    )

    def __init__(self, hostname: str) -> None:
        self.hostname = hostname
        self.command: list[str] = []
        self.entrypoint: list[str] | None = None
        self.env: list[str] = []
        self.workdir = ""
        self.user = ""
        self.terminal = False
        self.read_only = False
        self.systemd = "false"
        self.privileged = False
        self.cap_add: list[str] = []
        self.cap_drop: list[str] = []
        self.cpus: float | None = None
        self.memory: int | None = None
        self.pids_limit: int | None = None
        self.tmpfs: list[tuple[str, list[str]]] = []
        self.volumes: list[tuple[str, str, list[str]]] = []


def command_line(entrypoint: list[str] | None, command: list[str], image: dict[str, Any]) -> list[str]:
    """Combine the user's command with the image's.

    An explicit entry point drops the image's arguments, as in Docker; an empty one clears the image's entry point. An
    image's entry point of one empty word counts as none: some builders write it to clear that of their base image.

    Args:
        entrypoint: The user's entry point; None if none was given, an empty list to clear the image's.
        command: The user's command; empty if none was given.
        image: The ``config`` object of the image's configuration.

    Returns:
        The argument vector.

    Raises:
        UsageError: Neither the request nor the image names a command.
    """
    if entrypoint is not None:
        argv = [*entrypoint, *command]
    else:
        own = image.get("Entrypoint") or []
        argv = [*([] if own == [""] else own), *(command or image.get("Cmd") or [])]
    if not argv:
        raise UsageError(
            "no command: neither the image nor the command line names one", "add a command after IMAGE"
        )
    return argv


def runs_systemd(request: Request, argv: list[str]) -> bool:
    """Whether a container is prepared for systemd as its init.

    Args:
        request: The user's options.
        argv: The container's argument vector.
    """
    if request.systemd == "true":
        return argv[0] in SYSTEMD or argv[0].rpartition("/")[2] == "systemd"
    return request.systemd == "always"


def environment(asked: list[str], image: dict[str, Any], *, hostname: str, terminal: bool) -> list[str]:
    """Merge the environment: defaults, then the image's, then *asked*. The last value of a name wins.

    Args:
        asked: ``KEY=VALUE`` strings; the caller has resolved those without a value.
        image: The ``config`` object of the image's configuration.
        hostname: The container's host name.
        terminal: Whether its init has a terminal.

    Returns:
        ``KEY=VALUE`` strings.
    """
    merged = {"PATH": DEFAULT_PATH, "HOSTNAME": hostname}
    if terminal:
        merged["TERM"] = "xterm"
    for item in [*(image.get("Env") or []), *asked]:
        key, _, value = item.partition("=")
        merged[key] = value
    return [f"{key}={value}" for key, value in merged.items()]


def _mounts(request: Request, systemd: bool) -> list[dict[str, Any]]:
    kernel_access = "rw" if request.privileged else "ro"
    # The container sees its own part of the guest's cgroup tree, and cannot change its own limits (nsdelegate).
    cgroup_access = "rw" if request.privileged or systemd else "ro"
    strict = ["nosuid", "noexec", "nodev"]
    table: list[tuple[str, str, str, list[str]]] = [
        ("/proc", "proc", "proc", strict),
        ("/dev", "tmpfs", "tmpfs", ["nosuid", "strictatime", "mode=755", "size=65536k"]),
        (
            "/dev/pts",
            "devpts",
            "devpts",
            ["nosuid", "noexec", "newinstance", "ptmxmode=0666", "mode=0620", "gid=5"],
        ),
        ("/sys", "sysfs", "sysfs", [*strict, kernel_access]),
        ("/sys/fs/cgroup", "cgroup", "cgroup", [*strict, "relatime", cgroup_access]),
        ("/dev/mqueue", "mqueue", "mqueue", strict),
        ("/dev/shm", "tmpfs", "shm", [*strict, "mode=1777", "size=67108864"]),
    ]
    mounts: list[dict[str, Any]] = [
        {"destination": destination, "type": kind, "source": source, "options": options}
        for destination, kind, source, options in table
    ]
    for destination, options in request.tmpfs:
        chosen = ["nosuid", "nodev", "noexec", *options] if options else [*strict, "mode=1777"]
        mounts.append({"destination": destination, "type": "tmpfs", "source": "tmpfs", "options": chosen})
    for source, destination, options in request.volumes:
        mounts.append({"destination": destination, "type": "bind", "source": source, "options": options})
    given = {mount["destination"] for mount in mounts}
    for destination, options in SYSTEMD_MOUNTS if systemd else ():
        if destination not in given:
            mounts.append(
                {"destination": destination, "type": "tmpfs", "source": "tmpfs", "options": list(options)}
            )
    # A mount has to come after the one that contains it, whatever the order of the options.
    fixed, asked = mounts[: len(table)], mounts[len(table) :]
    asked.sort(key=lambda mount: mount["destination"].rstrip("/").count("/"))
    replaced = {mount["destination"] for mount in asked}
    return [mount for mount in fixed if mount["destination"] not in replaced] + asked


def _resources(request: Request) -> dict[str, Any]:
    resources: dict[str, Any] = {}
    if request.privileged:
        resources["devices"] = [{"allow": True, "access": "rwm"}]
    else:
        resources["devices"] = [{"allow": False, "access": "rwm"}]
    if request.memory is not None:
        # A swap limit equal to the memory limit means no swap: the guest has none.
        resources["memory"] = {"limit": request.memory, "swap": request.memory}
    if request.cpus is not None:
        resources["cpu"] = {"quota": round(request.cpus * CPU_PERIOD), "period": CPU_PERIOD}
    if request.pids_limit is not None and request.pids_limit > 0:
        resources["pids"] = {"limit": request.pids_limit}
    return resources


def capability_sets(granted: list[str], user: str) -> dict[str, list[str]]:
    """Return the process's capability sets; none are inheritable or ambient (CVE-2022-24769).

    An unprivileged user starts without effective capabilities, as after an execve by that user. If a user *name* turns
    out to be uid 0, the kernel grants them again from the bounding set when it executes the command.

    Args:
        granted: Kernel names of the container's capabilities.
        user: The user as written; empty for root.
    """
    if user.partition(":")[0] in ("", "0", "root"):
        return {"bounding": granted, "effective": granted, "permitted": granted}
    return {"bounding": granted}


def build(request: Request, image: dict[str, Any]) -> dict[str, Any]:
    """Build the runtime specification.

    Args:
        request: The user's options.
        image: The ``config`` object of the image's configuration (``Env``, ``Cmd``, ``User``, ...), or an
            empty dict for a plain directory.

    Returns:
        The content of ``config.json``; ``root.path`` is left to the engine. ``process.user.username`` holds
        the user as written (``name``, ``uid``, ``name:group``): the agent resolves it against the container's
        own ``/etc/passwd``.

    Raises:
        UsageError: No command, or an unknown capability.
    """
    argv = command_line(request.entrypoint, request.command, image)
    systemd = runs_systemd(request, argv)
    env = environment(request.env, image, hostname=request.hostname, terminal=request.terminal)
    if systemd and not any(item.startswith("container=") for item in env):
        env.append("container=kata")  # tells systemd that it runs in a container
    granted = caps.resolve(request.cap_add, request.cap_drop, privileged=request.privileged)
    user = request.user or image.get("User") or ""
    linux: dict[str, Any] = {
        "namespaces": [{"type": kind} for kind in ("pid", "ipc", "uts", "mount", "cgroup", "network")],
        "resources": _resources(request),
        "rootfsPropagation": "private",
    }
    if not request.privileged:
        linux["maskedPaths"] = list(MASKED_PATHS)
        linux["readonlyPaths"] = list(READONLY_PATHS)
        linux["seccomp"] = default_profile(granted)
    process: dict[str, Any] = {
        "terminal": request.terminal,
        # Also root's groups are those of the image's files.
        "user": {"uid": 0, "gid": 0, "username": user or ROOT},
        "args": argv,
        "env": env,
        "cwd": request.workdir or image.get("WorkingDir") or "/",
        "capabilities": capability_sets(granted, user),
        "oomScoreAdj": 0,
    }
    return {
        "ociVersion": OCI_VERSION,
        "process": process,
        "root": {"path": "rootfs", "readonly": request.read_only},
        "hostname": request.hostname,
        "mounts": _mounts(request, systemd),
        "linux": linux,
    }
