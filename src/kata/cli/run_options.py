"""The options of `kata run` and `kata create` that few containers are given: labels, limits, names, security.

They are read before anything is made, and put into the specification and the container's record afterwards. Each
function that reads one raises a `UsageError` that repeats the value and shows the form. This module is imported only
where one of them was given.

Source: docker-run(1) and podman-run(1) for the forms; runtime-spec 1.1, config-linux.md for what becomes of them.
"""

from __future__ import annotations

import os
import stat

from kata.cli import values
from kata.errors import HostError, UsageError
from kata.sysio import Fd

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterable
    from typing import Any

    from kata.cli.args import Arguments

_LIMITS = frozenset(
    "core cpu data fsize locks memlock msgqueue nice nofile nproc rss rtprio rttime sigpending stack".split()  # noqa: SIM905
)
"""The names of --ulimit, as in Docker (getrlimit(2))."""
_UNLIMITED = (1 << 64) - 1
_LABEL_FORM = "KEY=VALUE, or KEY alone for an empty value"
_WITHOUT_EFFECT = ("label=disable", "apparmor=unconfined")
"""Values of --security-opt that ask for what is so anyway: the guest's kernel has neither SELinux nor AppArmor."""
_ZONES = "/usr/share/zoneinfo"
_MOST_PORTS = 100
"""That ``-P`` publishes."""


class RunOptions:
    """What these options ask for, checked.

    Args:
        arguments: The command line of `kata run` or `kata create`.

    Attributes:
        env: ``KEY=VALUE`` strings, weaker than those of ``-e``.
        binds: Mounts besides those of ``-v``, as `values.volume` returns them.

    Raises:
        UsageError: One of them is malformed, or cannot be had.
    """

    __slots__ = (
        "_devices",
        "_dns",
        "_expose",
        "_hosts",
        "_init",
        "_labels",
        "_log",
        "_resources",
        "_restart",
        "_security",
        "_shm_size",
        "_stop_timeout",
        "_sysctls",
        "_ulimits",
        "binds",
        "env",
        "groups",
    )

    def __init__(self, arguments: Arguments) -> None:
        a = arguments
        self._labels = labels(a.many("label"), a.many("label_file"))
        self._expose = [
            f"{one['guest_port']}/{one['proto']}" for text in a.many("expose") for one in exposed(text)
        ]
        self._log = dict(map(log_option, a.many("log_opt")))
        self._ulimits = [ulimit(text) for text in a.many("ulimit")]
        self._sysctls = dict(map(sysctl, a.many("sysctl")))
        shm_size, stop_timeout, tz = a.value("shm_size"), a.value("stop_timeout"), a.value("tz")
        shm_size = values.limit(shm_size)
        self._shm_size = None if shm_size is None else values.size(shm_size, "--shm-size")
        self._stop_timeout = (
            None if stop_timeout is None else values.whole(stop_timeout, "--stop-timeout", least=-1)
        )
        self.groups = [group(text) for text in a.many("group_add")]
        self._hosts = [line for text in a.many("add_host") for line in host_lines(text)]
        self._dns = {
            "dns_servers": [address(text, "--dns") for text in a.many("dns")],
            "dns_searches": [_word(text, "--dns-search") for text in a.many("dns_search")],
            "dns_options": [_word(text, "--dns-option") for text in a.many("dns_option")],
        }
        policy = a.value("restart")
        self._restart = None
        if policy is not None:
            from kata.cli import restart

            self._restart = restart.parse(policy)
        if any(a.value(f"health_{name}") for name in ("interval", "timeout", "start_period", "retries")):
            from kata.cli import health

            health.wanted(a, {})  # what is malformed is told before the image is fetched
        self._security = [security(text) for text in a.many("security_opt")]
        self._resources = _resources(a)
        self.env = [f"{key}={value}" for key, value in os.environ.items()] if a.flag("env_host") else []
        self.binds = [] if tz is None else [(zone_file(tz), "/etc/localtime", ["rbind", "rprivate", "ro"])]
        self._devices = [one for text in a.many("device") for one in devices(text)]
        init_path = a.value("init_path")
        self._init = bool(a.flag("init") or init_path)
        if self._init:
            self.binds.append((init_program(init_path), _INIT, ["rbind", "rprivate", "ro"]))
        if self._shm_size is not None and any("/dev/shm" in text for text in a.many("tmpfs")):
            raise UsageError("--shm-size and a --tmpfs at /dev/shm contradict each other", "leave out one")

    def apply(self, spec: dict[str, Any], record: dict[str, Any]) -> None:
        """Put them into what describes a container.

        Args:
            spec: Its specification; changed.
            record: Its container.json; changed.
        """
        record["labels"] = {**record["labels"], **self._labels}
        if self._stop_timeout is not None:
            record["stop_timeout"] = self._stop_timeout
        further = {
            "expose": self._expose,
            "log": self._log and {**record["log"], **self._log},
            "restart": self._restart,
            **self._dns,
            "extra_hosts": self._hosts,
        }
        record.update({key: asked for key, asked in further.items() if asked})
        process, linux = spec["process"], spec["linux"]
        if self._init:
            process["args"] = [_INIT, "--", *process["args"]]
        if self._devices:
            self._apply_devices(linux)
            record["devices"] = [
                {"source": source, "path": device["path"], "access": access}
                for source, device, access in self._devices
            ]
        if self._ulimits:
            # The last one of a kind counts.
            process["rlimits"] = list({one["type"]: one for one in self._ulimits}.values())
        numbers = [one for one in self.groups if isinstance(one, int)]
        names = [one for one in self.groups if isinstance(one, str)]
        if numbers:
            process["user"]["additionalGids"] = numbers
        if names:
            # No member of the specification: like the user's name, the agent looks them up in the container's files.
            process["user"]["additionalGroups"] = names
        if self._sysctls:
            linux["sysctl"] = self._sysctls
        for key, limits in self._resources.items():
            linux["resources"][key] = {**linux["resources"].get(key, {}), **limits}
        for mount in spec["mounts"]:
            if mount["destination"] == "/dev/shm" and self._shm_size is not None:
                kept = [option for option in mount["options"] if not option.startswith("size=")]
                mount["options"] = [*kept, f"size={self._shm_size}"]
        self._apply_security(process, linux)

    def _apply_security(self, process: dict[str, Any], linux: dict[str, Any]) -> None:
        if "no-new-privileges" in self._security:
            process["noNewPrivileges"] = True
        if "seccomp=unconfined" in self._security:
            linux.pop("seccomp", None)
        if "systempaths=unconfined" in self._security:
            linux.pop("maskedPaths", None)
            linux.pop("readonlyPaths", None)

    def _apply_devices(self, linux: dict[str, Any]) -> None:
        for _, device, access in self._devices:
            linux.setdefault("devices", []).append(device)
            allowed = {"allow": True, "access": access, **{k: device[k] for k in ("type", "major", "minor")}}
            linux["resources"].setdefault("devices", []).append(allowed)


def labels(given: list[str], files: list[str]) -> dict[str, str]:
    """Read ``--label`` and ``--label-file``; those of the command line win.

    Args:
        given: Values of --label.
        files: Paths of files with one label a line, as for ``--env-file``.
    """
    lines: list[tuple[str, str]] = []
    for path in files:
        try:
            with open(path, encoding="utf-8-sig") as file:
                content = file.read()
        except (OSError, UnicodeDecodeError) as error:
            reason = error.strerror if isinstance(error, OSError) else "it is not UTF-8 text"
            raise UsageError(
                f"--label-file {path} cannot be read: {reason}", "give a text file of KEY=VALUE lines"
            ) from None
        for number, line in enumerate(content.splitlines(), 1):
            if line.strip() and line.strip()[0] != "#":
                lines.append((line.strip(), f"--label-file {path}:{number}:"))
    found = {}
    for text, where in [*lines, *((text, "--label") for text in given)]:
        key, _, value = text.partition("=")
        if not key or any(character.isspace() for character in key):
            raise UsageError(f"{where} {text!r} is not a label", _LABEL_FORM)
        found[key] = value
    return found


def ulimit(text: str) -> dict[str, Any]:
    """Parse ``NAME=SOFT[:HARD]`` to an entry of the specification's ``rlimits``; -1 is no limit."""
    name, equals, numbers = text.partition("=")
    soft_text, colon, hard_text = numbers.partition(":")
    name = name.lower().removeprefix("rlimit_")
    hint = "NAME=SOFT[:HARD], -1 for no limit: --ulimit nofile=1024:4096"
    if name not in _LIMITS:
        raise UsageError(
            f"--ulimit {text!r}: there is no limit {name!r}", "one of " + " ".join(sorted(_LIMITS))
        )
    if not equals:
        raise UsageError(f"--ulimit {text!r} is not a limit", hint)
    both = []
    for one in (soft_text, hard_text if colon else soft_text):
        try:
            number = int(one)
        except ValueError:
            number = -2
        if not -1 <= number < _UNLIMITED:
            raise UsageError(f"--ulimit {text!r}: {one!r} is not a number", hint)
        both.append(_UNLIMITED if number == -1 else number)
    soft, hard = both
    if soft > hard:
        raise UsageError(f"--ulimit {text!r}: the soft limit is above the hard one", hint)
    return {"type": f"RLIMIT_{name.upper()}", "soft": soft, "hard": hard}


def log_option(text: str) -> tuple[str, int]:
    """Parse a ``--log-opt`` to an entry of the record's ``log``."""
    name, _, value = text.partition("=")
    if name == "max-size":
        return "max_bytes", values.size(value, "--log-opt max-size")
    if name == "max-file":
        return "files", values.whole(value, "--log-opt max-file", least=1)
    raise UsageError(f"--log-opt {text!r} is not offered", "max-size=10m and max-file=3 are")


def exposed(text: str) -> list[dict[str, Any]]:
    """Parse an ``--expose``, as `values.port` returns it."""
    if ":" in text:
        raise UsageError(f"--expose {text!r} is about a port of the container alone", "-p HOST:GUEST")
    return values.port(text, "--expose")


def sysctl(text: str) -> tuple[str, str]:
    """Parse ``NAME=VALUE``."""
    name, equals, value = text.partition("=")
    if not name or not equals or ".." in name or any(c.isspace() or c == "\0" for c in name):
        raise UsageError(f"--sysctl {text!r} is not NAME=VALUE", "--sysctl net.core.somaxconn=1024")
    return name, value


def group(text: str) -> int | str:
    """Parse a supplementary group: a number, or a name, which is looked up in the container's /etc/group."""
    is_number = text.isascii() and text.isdecimal()
    if (is_number and int(text) >= 1 << 32) or not text or not set(text).isdisjoint(":,\n\0"):
        raise UsageError(
            f"--group-add {text!r} is not a group", "a number, or a name of the image's /etc/group"
        )
    return int(text) if is_number else text


def address(text: str, option: str) -> str:
    """Check an address of IPv4 or IPv6.

    Args:
        text: As the user wrote it.
        option: The option it belongs to, for errors.
    """
    import ipaddress

    try:
        return str(ipaddress.ip_address(text))
    except ValueError:
        raise UsageError(f"{option}: {text!r} is not an IP address", f"{option} 192.0.2.1") from None


def host_lines(text: str) -> list[str]:
    """Parse ``NAME:ADDRESS`` (or ``NAME=ADDRESS``; several names with ``;``) to lines of hosts(5)."""
    split = next((position for position, character in enumerate(text) if character in ":="), -1)
    names, target = text[:split], text[split + 1 :]
    names_given = [name for name in names.split(";") if name] if split > 0 else []
    if not names_given or any(c.isspace() or not c.isprintable() for c in names):
        raise UsageError(f"--add-host {text!r} is not NAME:ADDRESS", "--add-host db:192.0.2.7")
    if target == "host-gateway":
        raise UsageError(
            f"--add-host {text!r}: a machine has no fixed address of its host",
            "give one that the host listens on",
        )
    bare = target.removeprefix("[").removesuffix("]") if target.startswith("[") else target
    return [f"{address(bare, '--add-host')}\t{name}" for name in names_given]


def _word(text: str, option: str) -> str:
    if not text or any(c.isspace() or not c.isprintable() for c in text):
        raise UsageError(f"{option} {text!r} has characters that resolv.conf cannot hold", "give one a time")
    return text


def devices(text: str) -> list[tuple[str, dict[str, Any], str]]:
    """Parse ``HOST[:CONTAINER][:ACCESS]``, where HOST is a device or a directory with devices.

    Returns:
        For each device, its path on the host, an entry of the specification's ``devices``, and what may be done with it
        (``rwm``).
    """
    source, *more = text.split(":")
    access = more.pop() if more and more[-1] and not set(more[-1]) - set("rwm") else "rwm"
    target = more.pop(0) if more else source
    if more or not source.startswith("/") or not target.startswith("/"):
        raise UsageError(f"--device {text!r} is not HOST[:CONTAINER][:rwm]", "--device /dev/fuse")
    try:
        mode = os.stat(source).st_mode
        names = sorted(os.listdir(source)) if stat.S_ISDIR(mode) else [""]
        found = []
        for name in names:
            path = os.path.join(source, name) if name else source
            status = os.stat(path)
            kind = {stat.S_IFCHR: "c", stat.S_IFBLK: "b"}.get(stat.S_IFMT(status.st_mode))
            if kind is None:
                continue
            device = {
                "path": os.path.normpath(os.path.join(target, name)),
                "type": kind,
                "major": os.major(status.st_rdev),
                "minor": os.minor(status.st_rdev),
                "fileMode": stat.S_IMODE(status.st_mode),
                "uid": status.st_uid,
                "gid": status.st_gid,
            }
            found.append((path, device, access))
    except OSError as error:
        raise UsageError(f"--device {source}: {error.strerror}", "name a device of this host") from None
    if not found:
        raise UsageError(f"--device {source} is no device", "-v shares files; --device /dev/fuse")
    return found


_INIT = "/dev/init"
"""Where the program of ``--init`` is in the container."""
_INIT_PROGRAMS = ("tini-static", "catatonit", "docker-init", "tini")
_MORE_PLACES = "/usr/libexec/podman:/usr/lib/podman:/usr/libexec/docker"


def init_program(path: str | None) -> str:
    """The program of this host that reaps processes and passes signals on as process 1 of a container.

    Args:
        path: Of the one that was asked for (``--init-path``); None for any that is installed.

    Raises:
        UsageError: There is none that runs without libraries, which the container may not have.
    """
    import shutil

    places = f"{os.environ.get('PATH', '')}:/usr/local/bin:/usr/bin:/bin:{_MORE_PLACES}"
    found = [path] if path else [shutil.which(name, path=places) for name in _INIT_PROGRAMS]
    for program in found:
        if program and _is_static(program):
            return os.path.realpath(program)
    if path:
        raise UsageError(
            f"--init-path {path} is no program that runs without libraries", "--init-path /usr/bin/catatonit"
        )
    raise UsageError("--init: this machine has no program for it", "apt-get install catatonit")


def _is_static(path: str) -> bool:
    """Whether a file is an ELF program without an interpreter (elf(5), ``PT_INTERP``)."""
    import struct

    try:
        with open(path, "rb") as file:
            head = file.read(64)
            if len(head) < 64 or head[:6] != b"\x7fELF\x02\x01":
                return False
            at, size, count = *struct.unpack_from("<Q", head, 32), *struct.unpack_from("<HH", head, 54)
            file.seek(at)
            table = file.read(size * count)
        return all(struct.unpack_from("<I", table, size * number)[0] != 3 for number in range(count))
    except (OSError, struct.error):
        return False


def security(text: str) -> str:
    """Parse one ``--security-opt``; returns it in the form ``KEY`` or ``KEY=VALUE``."""
    form = text.replace(":", "=", 1) if "=" not in text else text
    if form in ("no-new-privileges", "no-new-privileges=true"):
        return "no-new-privileges"
    if form == "unmask=ALL":
        return "systempaths=unconfined"
    if form in (
        "no-new-privileges=false",
        "seccomp=unconfined",
        "systempaths=unconfined",
        *_WITHOUT_EFFECT,
    ):
        return form
    key = form.partition("=")[0]
    hints = {
        "seccomp": "seccomp=unconfined, or leave it out for the default profile",
        "apparmor": "the guest's kernel has no AppArmor: leave it out",
        "label": "the guest's kernel has no SELinux: leave it out",
    }
    raise UsageError(
        f"--security-opt {text!r} is not offered",
        hints.get(key, "one of no-new-privileges, seccomp=unconfined, systempaths=unconfined"),
    )


def zone_file(name: str) -> str:
    """The host's file of a time zone (``Europe/Paris``), or its own one for ``local``."""
    if name == "local":
        path = os.path.realpath("/etc/localtime")
    else:
        path = os.path.realpath(os.path.join(_ZONES, name))
        if not path.startswith(f"{_ZONES}/"):
            path = ""
    if not os.path.isfile(path):
        raise UsageError(
            f"--tz {name!r} is no time zone of this host",
            f"a file below {_ZONES}: --tz Europe/Paris, or --tz local",
        )
    return path


def _resources(a: Arguments) -> dict[str, Any]:
    """The limits of the specification's ``resources``."""
    found: dict[str, Any] = {}
    shares = values.limit(a.value("cpu_shares"))
    if shares is not None:
        found["cpu"] = {"shares": values.whole(shares, "--cpu-shares", least=2)}
    reservation, swap, memory = (
        values.limit(a.value(key)) for key in ("memory_reservation", "memory_swap", "memory")
    )
    limit = None if memory is None else values.size(memory, "--memory")
    if reservation is not None:
        wanted = values.size(reservation, "--memory-reservation")
        if limit is not None and wanted > limit:
            raise UsageError(
                f"--memory-reservation {reservation} is above the limit, -m {memory}", "give less of it"
            )
        found["memory"] = {"reservation": wanted}
    if swap is not None:
        values.no_swap(swap, memory)
    return found


def exposed_ports(exposed: Iterable[str], published: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The ports that an image exposes and ``-p`` does not publish, as `values.port` returns them.

    Args:
        exposed: ``PORT`` or ``PORT/PROTO``, as in an image's configuration.
        published: Ports that are published already.

    Raises:
        UsageError: The image's configuration has what is no port, or too many of them.
    """
    taken = {(one["guest_port"], one["proto"]) for one in published}
    found = [
        entry
        for text in sorted(exposed)
        for entry in values.port(text)
        if (entry["guest_port"], entry["proto"]) not in taken
    ]
    if len(found) > _MOST_PORTS:
        raise UsageError(
            f"the image exposes more than {_MOST_PORTS} ports", "-p HOST:GUEST for those that are needed"
        )
    return found


def with_host_ports(ports: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Choose a free port of the host for each port that has none.

    Args:
        ports: As `values.port` returns them.

    Raises:
        UsageError: There is no free one, or no such address on this host.
    """
    import socket

    taken = {one["host_port"] for one in ports}
    found, held = [], []
    try:
        for one in ports:
            number = one["host_port"]
            while number == 0 or (number in taken and one["host_port"] == 0):
                kind = socket.SOCK_DGRAM if one["proto"] == "udp" else socket.SOCK_STREAM
                family = socket.AF_INET6 if ":" in one["host_ip"] else socket.AF_INET
                held.append(socket.socket(family, kind))  # held, so that none is chosen twice
                held[-1].bind((one["host_ip"], 0))
                number = held[-1].getsockname()[1]
            found.append({**one, "host_port": number})
    except OSError as error:
        where = f" of {one['host_ip']}" if one["host_ip"] else ""
        raise UsageError(
            f"-p {one['guest_port']}: no free port{where} can be had: {error.strerror}", "-p HOST:GUEST"
        ) from error
    finally:
        for each in held:
            each.close()
    return found


class IdFile:
    """A file that gets an id (``--cidfile``, ``--iidfile``). It is opened before anything is made.

    Args:
        path: Where it is to be.
        option: The option, for errors.
        replaces: A file that is there is overwritten; false refuses one.

    Raises:
        UsageError: It is there already.
        HostError: It cannot be made or written.
    """

    __slots__ = ("_fd", "_option", "_path")

    def __init__(self, path: str, option: str = "--cidfile", *, replaces: bool = False) -> None:
        self._path = path
        self._option = option
        how = os.O_TRUNC if replaces else os.O_EXCL
        try:
            # Held open: later another may stand there, in a directory that is somebody else's.
            self._fd = Fd(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC | how, 0o644))
        except FileExistsError:
            raise UsageError(
                f"{option} {path} is there already: it may be of another container", f"rm {path}"
            ) from None
        except OSError as error:
            raise HostError(
                f"{option} {path}: {error.strerror}", "name a file in a directory of yours"
            ) from error

    def write(self, identity: str) -> None:
        """Write the id.

        Raises:
            HostError: It cannot be written.
        """
        try:
            with self._fd:
                os.write(self._fd.raw, identity.encode())
        except OSError as error:
            raise HostError(f"{self._option} {self._path}: {error.strerror}", "check its disk") from error

    def discard(self) -> None:
        """Remove it: nothing was made that has an id."""
        self._fd.close()
        try:
            about = os.stat(self._path, follow_symlinks=False)
            if stat.S_ISREG(about.st_mode):
                os.unlink(self._path)
        except OSError:
            pass
