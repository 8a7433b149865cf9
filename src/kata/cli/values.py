"""Parses the values of options: sizes, CPUs, ports, volumes, environment.

Each function raises a `UsageError` that repeats the value and shows the expected form.
"""

from __future__ import annotations

import math
import os

from kata import paths
from kata.errors import UsageError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

_UNITS = {"": 1, "b": 1, "k": 1 << 10, "m": 1 << 20, "g": 1 << 30, "t": 1 << 40}
_DIGITS = frozenset("0123456789.")


def size(text: str, option: str) -> int:
    """Parse a size (``512m``, ``1.5g``, ``64MiB``, ``1000000``) to bytes; units are powers of 1024, as in Docker.

    Args:
        text: As the user wrote it.
        option: The option it belongs to, for errors.
    """
    lowered = text.strip().lower()
    digits = lowered.rstrip("bikmgt")
    unit = lowered[len(digits) :].removesuffix("ib") if lowered.endswith("ib") else lowered[len(digits) :]
    if len(unit) == 2 and unit.endswith("b"):
        unit = unit[0]
    try:
        # Digits and a point: what float() takes besides (1e9, 1_0, inf) is a slip of the pen in a size.
        number = float(digits) if set(digits) <= _DIGITS else math.nan
    except ValueError:
        number = math.nan
    if unit not in _UNITS or not math.isfinite(number) or number * _UNITS[unit] < 1:
        raise UsageError(
            f"{option} {text!r} is not a size", "a number with an optional unit b, k, m, g or t: 512m"
        )
    return int(number * _UNITS[unit])


def limit(text: str | None) -> str | None:
    """The value of a limit's option; None for no limit, which is also what 0 means."""
    return None if text == "0" else text


def container_memory(text: str) -> int:
    """Parse a limit on a container's memory to bytes."""
    found = size(text, "--memory")
    if found < 6 << 20:
        raise UsageError(f"--memory {text!r} is below the minimum for a container, 6m", "-m 6m, or more")
    return found


def no_swap(swap: str, memory: str | None) -> None:
    """Check a ``--memory-swap``, which is memory and swap together: the machine has none.

    Args:
        swap: Its value; -1 is as much swap as there is.
        memory: That of ``--memory``; None without it.
    """
    total = -1 if swap == "-1" else size(swap, "--memory-swap")
    if memory is None:
        raise UsageError("--memory-swap needs the limit of the memory, too", "add -m SIZE")
    limit = container_memory(memory)
    if total != -1 and total < limit:
        raise UsageError(f"--memory-swap {swap} is below the limit, -m {memory}", f"--memory-swap {memory}")
    if total > limit:
        raise UsageError(
            f"--memory-swap {swap}: the machine has no swap",
            f"--memory-swap {memory}, which is no swap, or leave it out",
        )


def cpus(text: str) -> float:
    """Parse a number of CPUs of at least 0.01, the minimum of the kernel's quota."""
    try:
        number = float(text)
    except ValueError:
        number = math.nan
    if not math.isfinite(number) or number < 0.01:
        raise UsageError(f"--cpus {text!r} is not a number of CPUs", "at least 0.01, e.g. --cpus 1.5")
    return number


def whole(text: str, option: str, *, least: int) -> int:
    """Parse a decimal integer of at least *least*.

    Args:
        text: As the user wrote it.
        option: The option it belongs to, for errors.
        least: The smallest one that is allowed.
    """
    try:
        number = int(text)
    except ValueError:
        number = least - 1
    if number < least:
        raise UsageError(f"{option} {text!r} is not a whole number of at least {least}", f"{option} {least}")
    return number


def port(text: str, option: str = "-p") -> list[dict[str, Any]]:
    """Parse ``[[IP:]HOST:]GUEST[/tcp|udp]``; each side is a port or a range, of equal length.

    Args:
        text: As the user wrote it.
        option: The option it belongs to, for errors.

    Returns:
        One entry for each port: host_ip ("" for all addresses), host_port (0 where any free one will do: without a host
        side, as in Docker), guest_port, proto.
    """
    spec, _, proto = text.partition("/")
    proto = proto.lower() or "tcp"
    host_ip = ""
    if spec.startswith("["):
        host_ip, _, spec = spec[1:].partition("]:")
        parts = [host_ip, *spec.split(":")]
    else:
        parts = spec.split(":")
    if proto not in ("tcp", "udp") or not 1 <= len(parts) <= 3:
        raise UsageError(f"{option} {text!r} is not a port mapping", _PORT_FORMS[option])
    if len(parts) == 3:
        host_ip = parts[0]
        _check_address(host_ip, text)
    guest = _port_range(parts[-1], text, option)
    outer = parts[-2] if len(parts) > 1 else ""
    host = [0] * len(guest) if outer in ("", "0") else _port_range(outer, text, option)
    if len(guest) != len(host):
        raise UsageError(f"{option} {text!r}: the two port ranges differ in length", _PORT_FORMS[option])
    return [
        {"host_ip": host_ip, "host_port": number, "guest_port": inner, "proto": proto}
        for number, inner in zip(host, guest, strict=True)
    ]


_PORT_FORMS = {
    "-p": "the form is [IP:]HOST_PORT:GUEST_PORT[/tcp|/udp], e.g. -p 127.0.0.1:8080:80",
    "--expose": "the form is PORT[/tcp|/udp], e.g. --expose 8080",
}


def _port_range(text: str, whole_text: str, option: str) -> range:
    first, dash, last = text.partition("-")
    try:
        low = int(first)
        high = int(last) if dash else low
    except ValueError:
        low, high = 0, 0
    if not 0 < low <= high < 65536:
        raise UsageError(f"{option} {whole_text!r}: {text!r} is not a port", _PORT_FORMS[option])
    return range(low, high + 1)


def _check_address(address: str, text: str) -> None:
    import socket

    for family in (socket.AF_INET, socket.AF_INET6):
        try:
            socket.inet_pton(family, address)
        except OSError:
            continue
        return
    raise UsageError(
        f"-p {text!r}: {address!r} is not an IP address", "host names are not resolved; give an address"
    )


_PROPAGATIONS = ("private", "rprivate", "slave", "rslave", "shared", "rshared", "unbindable", "runbindable")
_MOUNT_FLAGS = ("noexec", "nodev", "nosuid")
_NO_EFFECT = ("z", "Z", "cached", "delegated", "consistent", "nocopy", "copy", "bind", "rbind", "exec")
"""Options of Docker and Podman without effect here: a share with a virtual machine does not need them, or always works
that way. They are about SELinux labels, consistency, copying into an empty named volume, and recursive binds."""
_ELSEWHERE = {
    "U": "kata does not change shared files: chown -R UID:GID SRC",
    "O": "kata has no overlay over a volume: share SRC with ro, and write elsewhere",
    "dev": "devices of the host mean nothing in another kernel",
    "suid": "what is shared with a virtual machine is nosuid",
    "idmap": "kata maps no users: inside, owners are those of the host",
}


def volume(text: str) -> tuple[str, str, list[str]]:
    """Parse ``SRC:DST[:OPTION,...]``; a relative SRC is relative to the working directory.

    Returns:
        Source (absolute), destination, mount options as in the runtime specification.
    """
    parts = text.split(":")
    hint = "the form is SRC:DST[:OPTION,...], both paths absolute or SRC starting with ./, or NAME:DST, or DST alone"
    if len(parts) not in (2, 3) or not parts[0] or not parts[1]:
        raise UsageError(f"-v {text!r} is not a volume", hint)
    source, destination = parts[0], parts[1]
    options = parts[2].split(",") if len(parts) == 3 else []
    if len(parts) == 2 and set(destination.split(",")) <= {"ro", "rw", *_MOUNT_FLAGS, *_NO_EFFECT}:
        raise UsageError(
            f"-v {text!r}: a volume of its own has no options here",
            f"--mount type=volume,dst={source}{',ro' if 'ro' in destination.split(',') else ''}",
        )
    return bind(source, destination, options, f"-v {text!r}")


def bind(source: str, destination: str, options: list[str], given: str) -> tuple[str, str, list[str]]:
    """Check a bind mount of a directory or file of the host.

    Args:
        source: Path on the host; a relative one is relative to the working directory.
        destination: Path in the container.
        options: Options as in Docker and Podman.
        given: The option as the user wrote it, for errors.

    Returns:
        Source (absolute), destination, mount options as in the runtime specification.
    """
    chosen = _volume_options(given, options)
    if not destination.startswith("/"):
        raise UsageError(
            f"{given}: the destination {destination!r} is not absolute",
            f"the container's path: /{destination}",
        )
    if os.path.normpath(destination) == "/":
        raise UsageError(f"{given}: the destination cannot be the root", "use rootfs:DIR as the image")
    source = os.path.abspath(source)
    if not os.path.exists(source):
        raise UsageError(f"{given}: {source} does not exist on the host", f"mkdir -p {source}")
    if not os.access(source, os.R_OK):
        raise UsageError(f"{given}: {source} cannot be read", "check its permissions")
    return source, os.path.normpath(destination), chosen


def _volume_options(given: str, options: list[str]) -> list[str]:
    access, propagation, flags = "rw", "rprivate", []
    for option in options:
        if option in ("ro", "rw"):
            access = option
        elif option in _PROPAGATIONS:
            propagation = option
        elif option in _MOUNT_FLAGS:
            flags.append(option)
        elif option.partition("=")[0] in _ELSEWHERE:
            raise UsageError(
                f"{given}: the option {option!r} is not offered", _ELSEWHERE[option.partition("=")[0]]
            )
        elif option not in _NO_EFFECT:
            raise UsageError(
                f"{given}: unknown option {option!r}",
                "the options are " + ", ".join(("ro", "rw", *_PROPAGATIONS, *_MOUNT_FLAGS, *_NO_EFFECT)),
            )
    if len({"ro", "rw"} & set(options)) > 1 or len(set(_PROPAGATIONS) & set(options)) > 1:
        raise UsageError(f"{given}: the options {','.join(options)} contradict each other")
    return ["rbind", propagation, access, *flags]


def tmpfs(text: str) -> tuple[str, list[str]]:
    """Parse ``DST[:OPTION,...]``, with options as in mount(8) for tmpfs."""
    destination, _, options = text.partition(":")
    if not destination.startswith("/") or os.path.normpath(destination) == "/":
        raise UsageError(
            f"--tmpfs {text!r}: the destination has to be absolute and not the root", "--tmpfs /tmp:size=64m"
        )
    return os.path.normpath(destination), [option for option in options.split(",") if option]


def environment(assignments: list[str], files: list[str]) -> list[str]:
    """Return the ``KEY=VALUE`` strings of ``-e`` and ``--env-file``; those of ``-e`` come last and so override files.

    ``-e KEY`` copies the value from our own environment and is dropped if that has none. Files have one assignment a
    line, and are read as by Docker: a line ends only at a newline (with one carriage return before it), a byte order
    mark at the beginning is dropped, empty lines and lines that start with ``#`` are skipped.

    Args:
        assignments: Values of ``-e``.
        files: Values of ``--env-file``.
    """
    lines: list[tuple[str, str]] = []
    for path in files:
        try:
            with open(path, encoding="utf-8-sig", newline="\n") as file:
                content = file.read()
        except (OSError, UnicodeDecodeError) as error:
            reason = error.strerror if isinstance(error, OSError) else "it is not UTF-8 text"
            raise UsageError(
                f"--env-file {path} cannot be read: {reason}", "give a text file of KEY=VALUE lines"
            ) from None
        for number, line in enumerate(content.split("\n"), 1):
            stripped = line.removesuffix("\r").lstrip()
            if stripped and not stripped.startswith("#"):
                lines.append((stripped, f"{path}:{number}"))
    lines += [(text, "-e") for text in assignments]
    out = []
    for text, where in lines:
        key, equals, value = text.partition("=")
        if not key or any(character in " \t\n" for character in key) or "\0" in text:
            raise UsageError(
                f"{where}: {text!r} is not KEY=VALUE", "a name without spaces, '=', and the value"
            )
        if not equals:
            inherited = os.environ.get(key)
            if inherited is None:
                continue
            value = inherited
        out.append(f"{key}={value}")
    return out


def name(text: str, given: str, whose: str, *, least: int = 2, hint: str = "") -> str:
    """Check a name: a letter or digit, then letters, digits, ``_``, ``.`` and ``-``; returns it.

    Args:
        text: The name.
        given: The option or argument that it belongs to, for errors.
        whose: What is to have it, for errors: ``container``.
        least: How many characters it has at least.
        hint: What else may have been meant.
    """
    if len(text) < least or not paths.may_be_name(text):
        raise UsageError(
            f"{given} {text!r} cannot be a {whose}'s name",
            f"{least} to {paths.MAX_NAME} of a-z A-Z 0-9 _ . -, starting with a letter or digit{hint}",
        )
    return text


def hostname(text: str) -> str:
    """Check a host name: at most 64 characters (Linux's limit), without white space or '/'."""
    if not 0 < len(text) <= 64 or any(character.isspace() or character in "/\0" for character in text):
        raise UsageError(f"--hostname {text!r} is not a host name", "at most 64 characters without spaces")
    return text
