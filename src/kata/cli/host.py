"""`kata doctor`, `gc`, `guest`, `version`."""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import subprocess
import sys

from kata import __version__, children, paths, sysio
from kata.cli import table
from kata.cli.args import Command, Option
from kata.errors import HostError, KataError, UsageError
from kata.hypervisor import kvmprobe

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any

    from kata.cli.args import Arguments
    from kata.config.files import Configuration
    from kata.hypervisor.protocols import Monitor

_JSON = Option("--json", "", "print JSON")

COMMANDS = {
    "doctor": Command(
        "doctor",
        "",
        "Checks what this machine supports. A failed check shows the command that fixes it.",
        [_JSON],
        most=0,
        notes="exit status: 0 if containers can be run, 1 if not.",
    ),
    "gc": Command(
        "gc",
        "",
        "Removes what crashed sandboxes left behind, and data of images and snapshots that is no longer needed.",
        [_JSON],
        most=0,
    ),
    "guest": Command(
        "guest",
        "build|info",
        "Builds the guest's kernel and initrd, or shows what is installed.",
        [
            Option("--kernel", "small|distro|auto", "'small': own configuration, takes minutes to build, boots fast;"
                   " 'distro': Debian's package, ready in seconds; 'auto': small if it is built already (auto)"),
            Option("--extension", "NAME", "also build an archive of further programs, for guests of sandboxes for which"
                   " KATA_GUEST_EXTENSIONS names it: 'iptables', for GetIPTables and SetIPTables; 'shell', which"
                   " debug_console_enabled asks for by itself", many=True),
            Option("--force", "", "rebuild what exists already"),
            _JSON,
        ],
        least=1,
        most=1,
    ),
    "version": Command(
        "version", "", "Shows the versions of kata, its hypervisor and its guest.",
        [Option("-f --format", "TEMPLATE|json", "print what a Go template picks: '{{.Server.Version}}'"), _JSON],
        most=0, exclusive=(("format", "json"),),
    ),
}  # fmt: skip


# ---- doctor ----

OK, WARN, FAIL = "ok", "warn", "fail"


class Check:
    """The result of one check: its subject, its state, and the command that fixes it."""

    __slots__ = ("blocking", "hint", "name", "result", "text")

    def __init__(self, name: str, result: str, text: str, hint: str = "", *, blocking: bool = False) -> None:
        self.name = name
        self.result = result
        self.text = text
        self.hint = hint
        self.blocking = blocking

    def to_dict(self) -> dict[str, Any]:
        """As JSON values."""
        return {name: getattr(self, name) for name in ("name", "result", "text", "hint", "blocking")}


SHIM = "containerd-shim-kata-v2"
_TUN = "/dev/net/tun"
_DOCKER_WITH_SHIMS = 23


def _permissions() -> Check:
    from kata import rootless

    if rootless.refusal is not None:
        return Check(
            "permissions", FAIL, rootless.refusal.message, rootless.refusal.hint or "", blocking=True
        )
    if rootless.user is None:
        return Check("permissions", OK, "running as root")
    ids = f"one id only: {rootless.lacks}" if rootless.lacks else "with subordinate ids"
    return Check(
        "permissions",
        WARN,
        f"user {rootless.user} in a user namespace, {ids}; no limits on the host where no cgroup is delegated"
        + (
            ""
            if os.access(_TUN, os.R_OK | os.W_OK)
            else f"; no user network, as {_TUN} is not for all users"
        ),
        "docs/rootless.md says what differs from root",
    )


def _kvm() -> Check:
    verdict = kvmprobe.probe()
    if verdict.works:
        return Check("kvm", OK, f"works: {verdict.reason}")
    return Check(
        "kvm",
        WARN,
        f"{verdict.state}: {verdict.reason}; software emulation is used instead, and slower",
        verdict.hint,
    )


def _vsock() -> Check:
    device = "/dev/vhost-vsock"
    if not os.path.exists(device):
        return Check(
            "vhost-vsock", WARN, "absent; the agent is reached over virtio-serial", "modprobe vhost_vsock"
        )
    if not os.access(device, os.R_OK | os.W_OK):
        return Check(
            "vhost-vsock", WARN, f"{device} cannot be opened; the agent is reached over virtio-serial"
        )
    return Check("vhost-vsock", OK, "usable")


def _confinement() -> Check:
    """What a hypervisor is left with on this host; docs/reference.md has all of it."""
    from kata import confinement, seccomp

    landlock = confinement.landlock_version()
    lacks = []
    if not landlock:
        lacks.append("no Landlock in this kernel, or it is switched off (lsm=)")
    elif landlock < confinement.SCOPES:
        lacks.append(
            f"Landlock {landlock}, of which {confinement.SCOPES} keeps from signals and abstract sockets"
        )
    if not seccomp.filter_code(()):
        lacks.append("no system call filter of ours on this architecture")
    if sysio.in_user_namespace() and not confinement.user_of(confinement.MONITOR):
        lacks.append("no other ids in this user namespace: hypervisors run as this user")
    elif os.geteuid() == 0 and not confinement.user_of(confinement.MONITOR):
        lacks.append(
            f"{confinement.VARIABLE} is 0: hypervisors are root's"
            if os.environ.get(confinement.VARIABLE) == "0"
            else f"no user ids from {confinement.FIRST_USER} on: hypervisors are root's"
        )
    if lacks:
        return Check("confinement", WARN, "; ".join(lacks))
    return Check("confinement", OK, f"a user for each hypervisor, system call filter, Landlock {landlock}")


def version_of(program: str) -> str:
    """The first line that ``PROGRAM --version`` prints; empty if that does not work."""
    try:
        done = subprocess.run(
            [program, "--version"], capture_output=True, text=True, timeout=10, check=False
        )
    except (OSError, subprocess.SubprocessError):
        return ""
    return done.stdout.partition("\n")[0].strip()


def _program(name: str, what: str, package: str, result: str, *, blocking: bool = False) -> Check:
    found = children.find_program(name)
    if not found:
        return Check(
            what, result, f"{name} is not installed", f"apt-get install {package}", blocking=blocking
        )
    version = version_of(found)
    return Check(what, OK, f"{version} ({found})" if version else found)


def _network_helper() -> Check:
    from kata.network import passt

    check = _program("passt", "passt", "passt", WARN)
    found = children.find_program("passt")
    if found and passt.waits_for_clients(found):
        check.text += (
            "; published TCP ports go through the engine: this passt (older than 2023-09-27) does not support servers"
            " that speak first"
        )
    return check


def _cgroups() -> Check:
    from kata.resources import host_cgroup

    found = host_cgroup.hierarchies()
    if not found:
        return Check(
            "cgroups",
            WARN,
            "no hierarchy with memory, cpu or pids is mounted: virtual machines run without limits on the host",
            "mount -t cgroup2 none /sys/fs/cgroup",
        )
    text = ", ".join(f"version {one.version}: {' and '.join(one.controllers)}" for one in found)
    missing = [name for name in host_cgroup.CONTROLLERS if not any(name in one.controllers for one in found)]
    if missing:
        return Check("cgroups", WARN, f"{text}; none with {' or '.join(missing)}")
    closed = [one.top for one in found if not host_cgroup.may_divide(one.base, one.version)]
    if closed:
        return Check(
            "cgroups",
            WARN,
            f"{text}; {' and '.join(closed)} {'is' if len(closed) == 1 else 'are'} not delegated to this user:"
            " virtual machines run without limits on the host but their own size",
            "with systemd: systemd-run --user --scope kata run ...; docs/rootless.md has more",
        )
    return Check("cgroups", OK, text)


def _guest() -> Check:
    from kata.guest import manifest

    try:
        guest = manifest.installed()
    except KataError as error:
        return Check("guest", FAIL, error.message, error.hint or "kata guest build", blocking=True)
    return Check("guest", OK, f"kernel {guest.kernel_version} ({guest.kernel_kind}), in {guest.directory}")


def _clients() -> list[Check]:
    """containerd, Docker and Podman, if they are installed; the `kata` command does not need them."""
    checks = []
    containerd = shutil.which("containerd")
    if containerd:
        # "containerd github.com/containerd/containerd 1.7.24~ds1 ..."
        words = version_of(containerd).split()
        version = words[2] if len(words) > 2 else "of unknown version"
        shim = shutil.which(SHIM)
        if shim:
            checks.append(_cri(f"{version}; its shim is {shim}"))
        else:
            checks.append(
                Check(
                    "containerd",
                    WARN,
                    f"{version}; {SHIM} is not on the PATH, so it cannot use kata",
                    "make install",
                )
            )
    docker = shutil.which("dockerd")
    if docker:
        match = re.search(r"version (\d+)\S*", version_of(docker))
        if match is None or int(match[1]) >= _DOCKER_WITH_SHIMS:
            checks.append(Check("docker", OK, match[0] if match else docker))
        else:
            text = f"{match[0].rstrip(',')} does not support shims as runtimes, so it cannot use kata"
            checks.append(
                Check(
                    "docker", WARN, text, f"install Docker {_DOCKER_WITH_SHIMS} or newer (Debian 13 has 26)"
                )
            )
    podman = shutil.which("podman")
    if podman:
        checks.append(_podman(version_of(podman).rpartition(" ")[2]))
    crio = shutil.which("crio")
    if crio:
        checks.append(_crio(version_of(crio).rpartition(" ")[2]))
    return checks


def _crio(version: str) -> Check:
    """Whether CRI-O has our handlers, their programs, and conmon, which the type "oci" needs."""
    from kata.cli import client_crio

    named = [one for one in client_crio.programs(client_crio.DEFAULT_PATH) if one]
    if not named:
        text = f"{version}; {client_crio.DEFAULT_PATH} names no handler {client_crio.HANDLER!r}"
        return Check("cri-o", OK, text, "kata install crio, if it is for CRI-O")
    for program in named:
        if not os.access(program, os.X_OK):
            text = f"{version}; {program}, which its handler names, cannot be executed"
            return Check("cri-o", WARN, text, "kata install crio")
    text = f"{version}; its handlers are {client_crio.HANDLER!r} and {client_crio.OCI_HANDLER!r}"
    if shutil.which("conmon") is None:
        text += f"; conmon is not on the PATH, so {client_crio.OCI_HANDLER!r} starts nothing"
        return Check("cri-o", WARN, text, "apt-get install conmon")
    return Check("cri-o", OK, text)


def _podman(version: str) -> Check:
    """Whether Podman has our runtime by name."""
    from kata.cli import client_podman

    number = version.partition(".")[0]
    if number.isdecimal() and int(number) < client_podman.LEAST:
        return Check(
            "podman",
            WARN,
            f"{version} is too old to use kata",
            f"install Podman {client_podman.LEAST} or newer",
        )
    program = client_podman.runtime(client_podman.DEFAULT_PATH)
    if not program:
        text = f"{version}; {client_podman.DEFAULT_PATH} names no runtime {client_podman.NAME!r}"
        return Check("podman", OK, text, "kata install podman, if it is for Podman")
    if not os.access(program, os.X_OK):
        return Check(
            "podman", WARN, f"{version}; its runtime {program} cannot be executed", "kata install podman"
        )
    text = f"{version}; its runtime {client_podman.NAME!r} is {program}"
    try:
        return Check("podman", OK, f"{text}; {client_podman.surroundings()}")
    except HostError as error:
        return Check("podman", WARN, f"{text}; {error.message}", error.hint or "")


def _cri(text: str) -> Check:
    """Whether containerd's CRI plugin has a handler for kata, which `ctr` and Docker do not need."""
    from kata.cli import client_containerd

    path = client_containerd.DEFAULT_PATH
    if client_containerd.is_installed(path):
        return Check("containerd", OK, f"{text}; CRI has the handler {client_containerd.HANDLER!r}")
    missing = f"Kubernetes' CRI has no handler {client_containerd.HANDLER!r} in {path}"
    return Check("containerd", OK, f"{text}; {missing}", "kata install containerd, if it is for Kubernetes")


def _file_server() -> Check:
    """How files of the host reach the guest."""
    from kata.guest import manifest
    from kata.hypervisor import accel, virtiofsd

    by_9p = "volumes and containerd's root file systems are shared by 9p, which is slow and incomplete"
    program = virtiofsd.find()
    if program is None:
        return Check("virtiofsd", WARN, f"not found: {by_9p}", "apt-get install virtiofsd")
    try:
        guest = manifest.installed()
        emulated = accel.choose().accel == "tcg"
    except KataError:  # there are rows for both
        return Check("virtiofsd", OK, program)
    if emulated and not guest.bounces:
        text = f"the {guest.kernel_kind} kernel cannot use {program} in an emulated machine: {by_9p}"
        return Check("virtiofsd", WARN, text, "kata guest build --kernel small")
    return Check("virtiofsd", OK, program)


def _memory() -> Check:
    from kata.resources import sizing

    available = sizing.host_available_mib()
    if available < 512:
        return Check(
            "memory", WARN, f"only {available} MiB are available", "stop something, or use -m with less"
        )
    return Check("memory", OK, f"{available} MiB available")


def _space() -> Check:
    place = paths.state_dir()
    while not os.path.exists(place):
        place = os.path.dirname(place)
    status = os.statvfs(place)
    free = status.f_bavail * status.f_frsize
    if free < 1 << 30:
        return Check(
            "disk space",
            WARN,
            f"{table.human_size(free)} free for {paths.state_dir()}",
            "kata gc, or move KATA_STATE_DIR",
        )
    return Check("disk space", OK, f"{table.human_size(free)} free for {paths.state_dir()}")


def _own_options(monitor: Monitor, conf: Configuration) -> dict[str, Any]:
    """What the configuration has for a hypervisor alone: `kata.hypervisor.protocols.Monitor.options`."""
    own = {
        key.partition(".")[2]: value
        for key, (value, _) in conf.values.items()
        if key.startswith("hypervisor.")
    }
    return monitor.options(own, lambda key: conf.origin(f"hypervisor.{key}"))


def hypervisors() -> list[dict[str, Any]]:
    """Each hypervisor that there is: whether it can be used here, why not, and what it can do.

    Raises:
        ConfigError: The configuration cannot be read, or one of its values makes no sense.
    """
    from kata.config import files
    from kata.hypervisor import accel, registry

    configured = files.load()
    chosen = str(configured.get("runtime.hypervisor_name", "")) or registry.DEFAULT
    registry.find(chosen)
    found = []
    for name in sorted(registry.names(), key=lambda name: (name != chosen, name)):
        monitor = registry.find(name)
        conf = configured if name == chosen else files.load("", name, "kata doctor")
        options = _own_options(monitor, conf)
        accelerator = accel.choose(str(conf.get("hypervisor.accelerator", ""))).accel
        bad = [check for check in monitor.checks(options) if not check.ok]
        reason, hint = (bad[0].text, bad[0].hint) if bad else ("", "")
        if not reason and accelerator not in monitor.accelerators:
            reason, hint = "it needs KVM, which does not work on this host", "see kvm"
        found.append(
            {
                "name": name,
                "title": monitor.title,
                "chosen": name == chosen,
                "usable": not reason,
                "reason": reason,
                "hint": hint,
                "program": monitor.program(options),
                "version": "" if bad else monitor.version(options),
                "accelerator": accelerator if accelerator in monitor.accelerators else "",
                "capabilities": monitor.capabilities(accelerator, options).to_plain(),
            }
        )
    return found


def _abilities(capabilities: dict[str, Any]) -> str:
    """What a hypervisor can do here, in a few words."""
    shares = " or ".join(capabilities["shares"])
    backends = " and ".join({"stream": "user"}.get(one, one) for one in capabilities["nic_backends"])
    words = [
        f"shares files by {shares}" if shares else "shares no files",
        f"networks: {backends}" if backends else "no network",
        *(
            text
            for name, text in (
                ("attach_disk", "disks later"),
                ("hotplug_nics", "interfaces later"),
                ("grow_memory", "memory grows"),
                ("spare_vcpus", "CPUs grow"),
                ("pause", "pauses"),
                ("snapshot", "snapshots"),
            )
            if capabilities[name]
        ),
    ]
    return ", ".join(words)


def _hypervisors() -> list[Check]:
    """One for each hypervisor; without the one that is used by default no container can be run."""
    try:
        found = hypervisors()
    except KataError as error:
        return [Check("hypervisor", FAIL, error.message, error.hint, blocking=True)]
    rows = []
    for one in found:
        text = f"{one['version']} ({one['program']})" if one["version"] else ""
        if one["usable"]:
            text += f"; {_abilities(one['capabilities'])}"
            rows.append(Check(one["name"], OK, text, blocking=one["chosen"]))
            continue
        text = f"{text}; {one['reason']}" if text else one["reason"]
        rows.append(
            Check(one["name"], FAIL if one["chosen"] else WARN, text, one["hint"], blocking=one["chosen"])
        )
    return rows


_CHECKS: tuple[Callable[[], Check | list[Check]], ...] = (
    _permissions,
    _kvm,
    _vsock,
    _confinement,
    _hypervisors,
    _network_helper,
    _file_server,
    lambda: _program("mkfs.ext4", "e2fsprogs", "e2fsprogs", FAIL, blocking=True),
    _guest,
    _cgroups,
    _memory,
    _space,
)


def checks() -> list[Check]:
    """Carry all checks out."""
    found: list[Check] = []
    for look in _CHECKS:
        verdict = look()
        found += verdict if isinstance(verdict, list) else [verdict]
    return found + _clients()


def _doctor(arguments: Arguments) -> int:
    found = checks()
    blocked = any(check.blocking and check.result == FAIL for check in found)
    if arguments.flag("json"):
        try:
            each = hypervisors()
        except KataError:  # it is among the checks
            each = []
        rows = [check.to_dict() for check in found]
        table.show_json({"usable": not blocked, "checks": rows, "hypervisors": each})
        return int(blocked)
    colour = sys.stdout.isatty() and not os.environ.get("NO_COLOR")
    paint = {OK: "\x1b[32m", WARN: "\x1b[33m", FAIL: "\x1b[31m"} if colour else {}
    off = "\x1b[0m" if colour else ""
    width = max(len(check.name) for check in found)
    for check in found:
        print(f"{paint.get(check.result, '')}{check.result:<4}{off}  {check.name:<{width}}  {check.text}")
        if check.hint:
            print(f"      {'':<{width}}  fix: {check.hint}")
    print("containers cannot be run yet" if blocked else "containers can be run")
    return int(blocked)


# ---- gc ----


def _gc(arguments: Arguments) -> int:
    from kata import journal_undo
    from kata.cli import image, records
    from kata.engine import oci_records
    from kata.engine.factory import pool
    from kata.images import changes
    from kata.storage import ext4, layer_images

    pool.count_killed()
    report = journal_undo.reconcile(paths.run_dir(), paths.state_dir())
    stale = [*records.clear_stale(), *oci_records.sweep()]
    removed = changes.gc(list(image.users()))
    half_made = ext4.clear_leftovers()
    layers = layer_images.sweep()
    try:
        clones = _sweep_templates()
    except (
        KataError,
        OSError,
    ) as error:  # a configuration that is wrong, a directory that cannot be written
        clones = []
        report.failures.append(f"machine templates: {error}")
    if arguments.flag("json"):
        table.show_json(
            {
                "undone": report.undone,
                "left": [{"directory": directory, "reason": reason} for directory, reason in report.left],
                "failed": report.failures,
                "names": stale,
                "images": removed,
                "templates": half_made,
                "layers": layers,
                "machine_templates": clones,
            }
        )
    else:
        for line in [*report.undone, *stale, *removed, *half_made, *layers, *clones]:
            print(f"cleared {line}")
        if not (report.undone or stale or removed or half_made or layers or clones or report.failures):
            print("nothing to remove")
    for line in report.failures:
        sys.stderr.write(f"error: {line}\n")
    return 1 if report.failures else 0


def _sweep_templates() -> list[str]:
    from kata.cli import factory
    from kata.config import files
    from kata.engine.factory import maker

    return maker.sweep(factory.directory(files.load()))


# ---- guest ----


def _guest_command(arguments: Arguments) -> int:
    verb = arguments.rest[0]
    from kata.guest import builder

    if verb == "info":
        if arguments.value("kernel") or arguments.many("extension") or arguments.flag("force"):
            raise UsageError(
                "kata guest info: --kernel, --extension and --force are options of 'build'", "leave them out"
            )
        found = builder.info()
        if arguments.flag("json"):
            table.show_json(found)
        else:
            _show_tree(found, "")
        return 0
    if verb != "build":
        raise UsageError(f"kata guest: unknown verb {verb!r}", "kata guest build, or kata guest info")
    kernel = arguments.value("kernel") or "auto"
    if kernel not in ("small", "distro", "auto"):
        raise UsageError(f"--kernel {kernel!r} is not offered", "choose one of: small, distro, auto")
    built = builder.build(kernel, force=arguments.flag("force"), extensions=arguments.many("extension"))
    if arguments.flag("json"):
        table.show_json(built)
    return 0


def _show_tree(content: dict[str, Any], indent: str) -> None:
    width = max((len(key) for key in content), default=0)
    for key, value in content.items():
        if isinstance(value, dict):
            print(f"{indent}{key}")
            _show_tree(value, indent + "  ")
        elif isinstance(value, list):
            print(f"{indent}{key:<{width}}  {', '.join(map(str, value)) or '-'}")
        else:
            shown = (
                f"{value} ({table.human_size(value)})" if key == "size" and isinstance(value, int) else value
            )
            print(f"{indent}{key:<{width}}  {shown}")


# ---- version ----


def versions() -> dict[str, str]:
    """The versions of this program, its hypervisor and its guest."""
    from kata.config import files
    from kata.guest import manifest
    from kata.hypervisor import registry

    found = {"kata": __version__, "python": sys.version.partition(" ")[0]}
    for name in registry.names():
        monitor = registry.find(name)
        options: dict[str, Any] = {}
        with contextlib.suppress(KataError):  # a configuration that cannot be read is kata doctor's to name
            options = _own_options(monitor, files.load("", name, "kata version"))
        version = monitor.version(options)
        if version or name == registry.DEFAULT:
            found[name] = version or "not installed"
    try:
        guest = manifest.installed()
        found["guest kernel"] = f"{guest.kernel_version} ({guest.kernel_kind})"
        found["agent"] = guest.agent_version
    except KataError:
        found["guest kernel"] = "not built"
    return found


def _as_docker(found: dict[str, str]) -> dict[str, Any]:
    """The versions by Docker's names. There is no daemon: client and server are one program."""
    from kata.images import platform

    own = {"Version": __version__, "Os": "linux", "Arch": platform.host().arch}
    parts = [{"Name": name, "Version": version} for name, version in found.items()]
    return {
        "Client": {**own, "Context": "default"},
        "Server": {**own, "KernelVersion": os.uname().release, "Components": parts},
    }


def _version(arguments: Arguments) -> int:
    found = versions()
    form = arguments.value("format")
    if form == "json":
        table.show_json_line(_as_docker(found))
    elif form:
        from kata.cli.template import Template, emit

        emit(Template(form).render(_as_docker(found)))
    elif arguments.flag("json"):
        table.show_json(found)
    else:
        _show_tree(found, "")
    return 0


HANDLERS = {"doctor": _doctor, "gc": _gc, "guest": _guest_command, "version": _version}
