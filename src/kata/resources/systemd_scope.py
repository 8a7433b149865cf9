"""A sandbox's cgroup as a scope of systemd: with the systemd cgroup driver, systemd is told of it.

A kubelet with that driver, and Docker on a host with cgroup version 2, name a cgroup as ``slice:prefix:name``. The tree
is systemd's then: it takes controllers away from a slice as soon as no unit that it knows needs them, so a directory
made behind its back loses its limits. The scope is delegated to us (``Delegate=yes``): in it systemd changes nothing.

systemd-run(1) asks for it, from systemd's private socket, so neither a message bus nor a client library is needed. It
registers the process that it is and becomes the program that it was given, which keeps the scope until the sandbox's
own processes are in it. When the last of these has ended, systemd takes the scope away.

Source: systemd.scope(5), systemd.resource-control(5), and systemd's ``docs/CGROUP_DELEGATION.md``.
"""

from __future__ import annotations

import os
import select

from kata import children

TYPE_CHECKING = False
if TYPE_CHECKING:
    from kata.journal import Journal

DEFAULT_SLICE = "system.slice"
PATIENCE_S = 10.0
_UP = b"up\n"
_HOLD = f"echo {_UP.decode().strip()}; exec sleep infinity"


def unit_of(cgroups_path: str) -> tuple[str, str] | None:
    """The slice and the unit that a specification's ``cgroupsPath`` names.

    Args:
        cgroups_path: ``slice:prefix:name``; an empty slice is the system's.

    Returns:
        None if it is a path.
    """
    parts = cgroups_path.split(":")
    if len(parts) != 3:
        return None
    unit = f"{parts[1]}-{parts[2]}" if parts[1] else parts[2]
    return parts[0] or DEFAULT_SLICE, unit if unit.endswith((".slice", ".scope")) else unit + ".scope"


def managed_by_systemd(unit: str) -> bool:
    """Whether systemd runs here (sd_booted(3)) and can be asked for such a unit: a slice has no processes."""
    return unit.endswith(".scope") and os.path.isdir("/run/systemd/system")


class Scope:
    """A scope that was made; it stays until `release`, and as long as it has processes after that.

    Args:
        journal: The sandbox's.
        slice_name: The slice's.
        unit: Its own name.
        properties: Names and values, as of systemd.resource-control(5).

    Raises:
        OSError: systemd refused, did not answer in time, or cannot be asked; `strerror` says why.
    """

    __slots__ = ("_child",)

    def __init__(self, journal: Journal, slice_name: str, unit: str, properties: list[str]) -> None:
        program = children.find_program("systemd-run")
        if program is None:
            raise OSError(0, "there is no systemd-run")
        told = [f"--property={one}" for one in ("Delegate=yes", *properties)]
        argv = [program, "--scope", "--quiet", "--collect", f"--slice={slice_name}", f"--unit={unit}", *told]
        said = children.StderrTail()
        reader, writer = os.pipe2(os.O_CLOEXEC)
        try:
            self._child = children.spawn(
                [*argv, "--", "/bin/sh", "-c", _HOLD], journal, "scope", stdout=writer, stderr=said.write_fd
            )
            os.close(writer)
            writer = -1
            said.started()
            ready, _, _ = select.select([reader], [], [], PATIENCE_S)
            if not ready or os.read(reader, len(_UP)) != _UP:
                self.release()
                raise OSError(0, said.text() or f"no answer for {PATIENCE_S:g} s")
        finally:
            said.close()
            for fd in (reader, writer):
                if fd >= 0:
                    os.close(fd)

    @property
    def pid(self) -> int:
        """Of the process that keeps it."""
        return self._child.pid

    def release(self) -> None:
        """End the process that has kept it; may be called again."""
        self._child.kill()
        self._child.wait(PATIENCE_S)
        self._child.close()


def change(unit: str, properties: list[str]) -> str:
    """Set properties of a scope, until it ends. Blocks for some milliseconds.

    Returns:
        Empty, or why systemd did not.
    """
    import subprocess

    try:
        done = subprocess.run(
            ["systemctl", "set-property", "--runtime", unit, *properties],
            env=children.ENVIRONMENT,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=PATIENCE_S,
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        return str(error)
    return "" if done.returncode == 0 else done.stderr.strip()
