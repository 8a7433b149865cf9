"""`--restart`: a unit of systemd that starts a container again when it has ended, and when the host has booted.

`kata` has no daemon that could do it. The unit's process is ``kata start -a ID``, which ends as the container ends, so
the unit's rules for restarts are the container's. A container that somebody stops by hand is marked first; then that
process ends with `STOPPED`, which the unit takes for its end.

Sources: docker-run(1), "Restart policies"; systemd.service(5), systemd.unit(5); sd_booted(3).
"""

from __future__ import annotations

import contextlib
import os
import subprocess

from kata import launcher, sysio
from kata.cli import records
from kata.errors import HostError, UnsupportedError, UsageError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    from kata.cli.records import Container, PendingContainer

POLICIES = ("no", "always", "unless-stopped", "on-failure")
STOPPED = 250
"""The exit status of ``kata start -a`` in a unit when the container was stopped by hand."""
_VARIABLE = records.RESTART_UNIT
_DIRECTORY = "/etc/systemd/system"
_WANTS = f"{_DIRECTORY}/multi-user.target.wants"
_MARK = "stopped-by-hand"
_MANAGER_S = 60.0
"""How long systemd may take to answer what it does at once, in seconds."""


def parse(text: str) -> dict[str, Any] | None:
    """Parse a ``--restart``.

    Args:
        text: ``no``, ``always``, ``unless-stopped``, ``on-failure`` or ``on-failure:N``.

    Returns:
        ``name`` and ``max`` (how often in a row, 0 for any number); None for ``no``.

    Raises:
        UsageError: It is none of these.
        UnsupportedError: Nobody on this host would do it.
    """
    name, colon, number = text.partition(":")
    if name not in POLICIES or (colon and (name != "on-failure" or not number.isdecimal())):
        raise UsageError(f"--restart {text!r} is no policy", "no, always, unless-stopped, on-failure[:N]")
    if name == "no":
        return None
    if os.geteuid() != 0 or _in_user_namespace():
        raise UnsupportedError(
            f"--restart {text}: only root's containers are restarted",
            "run kata start -a NAME from a unit of yours",
        )
    if not os.path.isdir("/run/systemd/system"):
        raise UnsupportedError(
            f"--restart {text}: this host does not run systemd, and kata has no daemon that would do it",
            "have a supervisor run kata start -a NAME",
        )
    return {"name": name, "max": int(number or 0)}


def _in_user_namespace() -> bool:
    try:
        return sysio.read_file("/proc/self/uid_map").split() != [b"0", b"0", b"4294967295"]
    except OSError:
        return False


def unit_name(identity: str) -> str:
    """The unit of a container."""
    return f"kata-{identity}.service"


def _text(pending: PendingContainer, policy: dict[str, Any]) -> str:
    command = " ".join(map(_quoted, launcher.command()))
    mark = pending.path(_MARK)
    kept = [
        f"Environment={_assigned(name, os.environ[name])}"
        for name in sorted(os.environ)
        if name == "PATH" or (name.startswith("KATA_") and name != _VARIABLE)
    ]
    often = policy["max"]
    return "\n".join(
        [
            "# For a container that was made with --restart; it goes with the container.",
            "[Unit]",
            f"Description=Container {_escaped(pending.name)} in a virtual machine of its own",
            "Wants=network-online.target",
            "After=network-online.target",
            # Restarts in a row that are allowed; 0 is any number.
            f"StartLimitIntervalSec={'infinity' if often else 0}",
            *([f"StartLimitBurst={often + 1}"] if often else []),
            *([f"ConditionPathExists=!{_escaped(mark)}"] if policy["name"] != "always" else []),
            "",
            "[Service]",
            f"Environment={_VARIABLE}={pending.id}",
            *kept,
            "Type=notify",
            "NotifyAccess=main",
            "TimeoutStartSec=infinity",
            f"ExecStart={command} start -a {pending.id}",
            f"ExecStop={command} stop {pending.id}",
            f"Restart={'on-failure' if policy['name'] == 'on-failure' else 'always'}",
            "RestartSec=1",
            f"RestartPreventExitStatus={STOPPED}",
            f"SuccessExitStatus={STOPPED}",
            "TimeoutStopSec=infinity",  # `kata stop` has its own limits
            "StandardOutput=null",  # it is in `kata logs`
            "",
            "[Install]",
            "WantedBy=multi-user.target",
            "",
        ]
    )


def _escaped(text: str) -> str:
    """For a unit file, where % begins a specifier."""
    return text.replace("%", "%%")


def _assigned(name: str, value: str) -> str:
    """For ``Environment=``, where $ is a character as any other."""
    plain = _escaped(value).replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")
    return f'"{name}={plain}"'


def _quoted(text: str) -> str:
    plain = _escaped(text).replace("\\", "\\\\").replace('"', '\\"').replace("$", "$$")
    return f'"{plain}"' if not plain.isalnum() else plain


def write_unit(pending: PendingContainer, policy: dict[str, Any]) -> None:
    """Write a container's unit and have it started at boots. It goes with the container.

    Args:
        pending: The container, which is being made.
        policy: As `parse` returns it.

    Raises:
        HostError: It cannot be written, or systemd does not take it.
    """
    name = unit_name(pending.id)
    path, link = os.path.join(_DIRECTORY, name), os.path.join(_WANTS, name)
    try:
        text = _text(pending, policy).encode()
        pending.make_elsewhere(path, lambda: sysio.replace_file(path, text, mode=0o644))
        os.makedirs(_WANTS, exist_ok=True)
        pending.make_elsewhere(link, lambda: os.symlink(path, link))
    except OSError as error:
        raise HostError(f"{path} cannot be written: {error.strerror}", "leave out --restart") from error
    _systemctl("daemon-reload")


def _systemctl(*words: str, timeout_s: float | None = _MANAGER_S) -> str:
    try:
        done = subprocess.run(
            ["systemctl", *words], capture_output=True, timeout=timeout_s, check=False, text=True
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        raise HostError(f"systemctl {' '.join(words)}: {error}", "systemctl status") from error
    if done.returncode != 0:
        raise HostError(
            f"systemctl {' '.join(words)} failed: {done.stderr.strip()[:500]}",
            f"systemctl status {words[-1]}",
        )
    return done.stdout


def begin(container: Container) -> None:
    """Note, in the unit, that the container is started: that it was stopped by hand before does not count any more."""
    with contextlib.suppress(FileNotFoundError):
        os.unlink(os.path.join(container.directory, _MARK))


def tell_started() -> None:
    """Tell systemd that the container runs (sd_notify(3))."""
    import socket

    path = os.environ.pop("NOTIFY_SOCKET", "")
    if path:
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as client, contextlib.suppress(OSError):
            client.sendto(b"READY=1", f"\0{path[1:]}" if path.startswith("@") else path)


def start(container: Container) -> None:
    """Have the unit start its container.

    Raises:
        HostError: It does not.
    """
    begin(container)  # or its condition would not hold
    name = unit_name(container.id)
    with contextlib.suppress(HostError):
        _systemctl("reset-failed", name)  # an earlier series of failures does not count any more
    try:
        _systemctl("start", name, timeout_s=None)  # a start has its own limits
    except HostError as error:
        forget(container)
        why = str(container.state().get("error") or "")
        raise HostError(
            f"container {container.name} could not be started: {why or error.message}",
            f"journalctl -u {name}",
        ) from None


def mark_stopped(container: Container) -> None:
    """Note that somebody stops the container by hand, before it ends: it is not to be started again. If it has ended
    already and its unit is about to start it, it does not.
    """
    with contextlib.suppress(OSError):
        sysio.replace_file(os.path.join(container.directory, _MARK), b"")
    name = unit_name(container.id)
    with contextlib.suppress(HostError):
        if _systemctl("show", "-p", "SubState", "--value", name).startswith("auto-restart"):
            _systemctl("stop", name)


def was_stopped(container: Container) -> bool:
    """Whether somebody has stopped the container by hand since it was started by hand."""
    return os.path.exists(os.path.join(container.directory, _MARK))


def count(container: Container) -> int:
    """How often the unit has started its container again."""
    try:
        text = _systemctl("show", "-p", "NRestarts", "--value", unit_name(container.id))
        return int(text.strip() or 0)
    except (HostError, ValueError):
        return 0


def forget(container: Container) -> None:
    """Have systemd let go of the unit of a container that is about to be removed."""
    name = unit_name(container.id)
    with contextlib.suppress(HostError):
        _systemctl("stop", name, timeout_s=None)
    with contextlib.suppress(HostError):
        _systemctl("reset-failed", name)


def reload() -> None:
    """Tell systemd that a unit file has gone."""
    with contextlib.suppress(HostError):
        _systemctl("daemon-reload")
