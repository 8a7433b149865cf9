"""`--restart`: a unit of systemd that starts a container again when it has ended, and when the host has booted.

`kata` has no daemon that could do it. The unit's process is ``kata start -a ID``, which ends as the container ends, so
the unit's rules for restarts are the container's. It ends itself by a signal where there is to be no restart:
`_STOPPED` after somebody has stopped the container by hand, which is marked first, and `_ENOUGH` after as many restarts
as were allowed. An exit status would not do: a container can end with any.

Sources: docker-run(1), "Restart policies"; systemd.service(5), systemd.unit(5); sd_booted(3).
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys

from kata import launcher, sysio
from kata.cli import records
from kata.errors import HostError, KataError, ToldToEnd, UnsupportedError, UsageError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    from kata.cli.records import Container, PendingContainer

POLICIES = ("no", "always", "unless-stopped", "on-failure")
_STOPPED, _ENOUGH = signal.SIGVTALRM, signal.SIGPROF
"""Signals of timers that nobody has set here: `kata` passes neither of them on."""
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
    return "\n".join(
        [
            "# For a container that was made with --restart; it goes with the container.",
            "[Unit]",
            f"Description=Container {_escaped(pending.name)} in a virtual machine of its own",
            "Wants=network-online.target",
            "After=network-online.target",
            # What is restarted counts them: systemd forgets its own limit whenever it reads its units again.
            "StartLimitIntervalSec=0",
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
            f"RestartPreventExitStatus={_STOPPED.name} {_ENOUGH.name}",
            f"SuccessExitStatus={_STOPPED.name}",
            "TimeoutStopSec=infinity",  # `kata stop` has its own limits
            "StandardOutput=null",  # it is in `kata logs`
            "StandardError=journal",
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


def attend(container: Container) -> int:
    """Start a container in its unit, and stay until it ends.

    Returns:
        Its exit code, after which the unit's rule for restarts counts.

    Raises:
        ToldToEnd: It is not to be started again.
    """
    from kata.cli import report, session

    begin(container)
    # What the container writes is in its log; the journal is for words of kata's.
    sys.stderr = os.fdopen(os.dup(2), "w", buffering=1)
    with open(os.devnull, "wb") as nowhere:
        os.dup2(nowhere.fileno(), 2)
    try:
        status = session.run_attached(container, stdin=False, detach_keys=b"", started=tell_started)
    except KataError as error:
        report.report(error)
        status = error.exit_code
    if was_stopped(container):
        raise ToldToEnd(_STOPPED)
    allowed = container.record["restart"]["max"]
    if status and allowed and count(container) >= allowed:
        raise ToldToEnd(_ENOUGH)
    return status


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
    already and its unit is about to start it, or is starting it, it does not.
    """
    _mark(container)
    name = unit_name(container.id)
    with contextlib.suppress(HostError):
        if _systemctl("show", "-p", "ActiveState", "--value", name).strip() != "activating":
            return
        # One that runs, which systemd is not told yet, is stopped by the caller with the grace that was asked for.
        if not container.running():
            _systemctl("stop", name, timeout_s=None)
    _mark(container)  # its start may have taken the first one away


def _mark(container: Container) -> None:
    with contextlib.suppress(OSError):
        sysio.replace_file(os.path.join(container.directory, _MARK), b"")


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
