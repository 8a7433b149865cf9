"""Registers a sandbox's cgroup as a systemd scope, for clients that use the systemd cgroup driver.

A kubelet with that driver, and Docker on a host with cgroup version 2, name a cgroup as ``slice:prefix:name``. Then
systemd owns the tree. It disables a controller in a slice as soon as no unit that it knows needs it, so a directory
that systemd does not know loses its limits. The scope is delegated to us (``Delegate=yes``): systemd changes nothing in
it.

In a user namespace, as rootless Podman makes one, it is the user's own systemd (``systemd --user``) whose tree that is.

systemd-run(1) creates the scope through systemd's private socket, so neither a message bus nor a client library is
needed. It registers its own process and then executes a program, which keeps the scope alive until the sandbox's
processes are in it. When the last of these has ended, systemd removes the scope.

Source: systemd.scope(5), systemd.resource-control(5), and systemd's ``docs/CGROUP_DELEGATION.md``.
"""

from __future__ import annotations

import os
import select

from kata import children, sysio
from kata.sysio import Fd

TYPE_CHECKING = False
if TYPE_CHECKING:
    from kata.journal import Journal

DEFAULT_SLICE = "system.slice"
PATIENCE_S = 10.0
_PRIVATE = "systemd/private"
"""The socket on which systemd answers its user's programs, below its runtime directory."""
_UP = b"up\n"
_HOLD = f"echo {_UP.decode().strip()}; exec sleep infinity"


def unit_of(cgroups_path: str) -> tuple[str, str] | None:
    """Return the slice and the unit that a specification's ``cgroupsPath`` names.

    Args:
        cgroups_path: ``slice:prefix:name``; an empty slice stands for ``system.slice``.

    Returns:
        Names of slice and unit; None if it is a path.
    """
    parts = cgroups_path.split(":")
    if len(parts) != 3:
        return None
    unit = f"{parts[1]}-{parts[2]}" if parts[1] else parts[2]
    return parts[0] or DEFAULT_SLICE, unit if unit.endswith((".slice", ".scope")) else unit + ".scope"


def managed_by_systemd(unit: str) -> bool:
    """Whether a systemd runs (sd_booted(3)) that this user may ask for *unit*, which must not be a slice."""
    if not unit.endswith(".scope"):
        return False
    runtime = _users_runtime_dir()
    return os.path.exists(f"{runtime}/{_PRIVATE}") if runtime else os.path.isdir("/run/systemd/system")


def _users_runtime_dir() -> str:
    """The runtime directory of the user who made this user namespace; empty where the host's systemd is asked: by root,
    and by who is root in a container with a systemd.
    """
    if not sysio.in_user_namespace() or os.access(f"/run/{_PRIVATE}", os.W_OK):
        return ""
    user = next((outside for inside, outside, _ in sysio.id_map("uid") if inside == 0), 0)
    return f"/run/user/{user}"  # pam_systemd(8)


def _asking(program: str) -> tuple[list[str], dict[str, str]]:
    """How one of systemd's programs is called so that it asks the right one: words, and the environment."""
    runtime = _users_runtime_dir()
    if not runtime:
        return [program], children.ENVIRONMENT
    return [program, "--user"], {**children.ENVIRONMENT, "XDG_RUNTIME_DIR": runtime}


class Scope:
    """A new scope. It exists until `release`, and after that as long as it has other processes.

    Args:
        journal: The sandbox's journal.
        slice_name: Name of the slice that it is made in.
        unit: Name of the scope.
        properties: ``NAME=VALUE`` strings, see systemd.resource-control(5).

    Raises:
        OSError: systemd refused, did not answer in time, or cannot be asked; `strerror` says why.
    """

    __slots__ = ("_child",)

    def __init__(self, journal: Journal, slice_name: str, unit: str, properties: list[str]) -> None:
        program = children.find_program("systemd-run")
        if program is None:
            raise OSError(0, "there is no systemd-run")
        told = [f"--property={one}" for one in ("Delegate=yes", *properties)]
        words, environment = _asking(program)
        argv = [*words, "--scope", "--quiet", "--collect", f"--slice={slice_name}", f"--unit={unit}", *told]
        said = children.StderrTail()
        reader, writer = map(Fd, os.pipe2(os.O_CLOEXEC))
        try:
            self._child = children.spawn(
                [*argv, "--", "/bin/sh", "-c", _HOLD],
                journal,
                "scope",
                stdout=writer.raw,
                stderr=said.write_fd,
                env=environment,
            )
            writer.close()
            said.started()
            ready, _, _ = select.select([reader], [], [], PATIENCE_S)
            if not ready or os.read(reader.raw, len(_UP)) != _UP:
                self.release()
                raise OSError(0, said.text() or f"no answer for {PATIENCE_S:g} s")
        finally:
            said.close()
            reader.close()
            writer.close()

    @property
    def pid(self) -> int:
        """Process id of the program that keeps the scope alive."""
        return self._child.pid

    def release(self) -> None:
        """End the program that keeps the scope alive. Idempotent."""
        self._child.kill()
        self._child.wait(PATIENCE_S)
        self._child.close()


def change(unit: str, properties: list[str]) -> str:
    """Set properties of a scope, until it ends. Blocks for some milliseconds.

    Args:
        unit: Name of the scope.
        properties: ``NAME=VALUE`` strings.

    Returns:
        The reason why systemd refused; empty on success.
    """
    import subprocess

    words, environment = _asking("systemctl")
    try:
        done = subprocess.run(
            [*words, "set-property", "--runtime", unit, *properties],
            env=environment,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=PATIENCE_S,
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        return str(error)
    return "" if done.returncode == 0 else done.stderr.strip()
