"""Adds the runtime ``kata`` to Podman's configuration, and removes it again.

``containers.conf`` has a directory of drop-ins, so the runtime gets a file of its own, and nobody else's is changed.
Podman knows the name ``kata`` without it, and looks for the program in a list of places: it may find that of another
Kata first.

Source: containers.conf(5), "ENGINE.RUNTIMES TABLE".
"""

from __future__ import annotations

import os
import re
import shutil
import tempfile
import tomllib

from kata.cli import client_drop_in
from kata.cli.client_ask import ask, last_words
from kata.cli.client_edit import Edit, read
from kata.errors import ConfigError, HostError

TYPE_CHECKING = False
if TYPE_CHECKING:
    import subprocess
    from collections.abc import Mapping

DEFAULT_PATH = "/etc/containers/containers.conf.d/50-kata.conf"
CLIENT = "podman"
NAME = "kata"
PROGRAM = "kata-runtime"
LEAST = 4
"""The first version of Podman that this is tried with."""
_WHERE = "/usr/local/bin:/usr/local/sbin:/usr/bin:/usr/sbin"


class Podman:
    """The installed podman.

    Attributes:
        program: Its path.
        version: As it is said.
    """

    def __init__(self, program: str, version: str) -> None:
        self.program = program
        self.version = version

    def check(self, path: str, runtime: str) -> None:
        """Have podman read its configuration, and find the runtime in it.

        Args:
            path: The drop-in. It is read alone where podman does not look for it.
            runtime: The program that podman has to find.

        Raises:
            ConfigError: podman cannot read it, or finds another runtime.
            HostError: podman cannot be asked.
        """
        environment = dict(os.environ)
        if os.path.dirname(path) != os.path.dirname(DEFAULT_PATH):
            environment["CONTAINERS_CONF"] = path
        done = _info(self.program, "{{.Host.OCIRuntime.Path}}", "--runtime", NAME, env=environment)
        if done.returncode:
            raise ConfigError(
                f"podman refuses its configuration with {path}: {last_words(done)}", "podman info"
            )
        found = done.stdout.strip()
        if found != runtime:
            raise ConfigError(
                f"podman takes {found or 'nothing'} for its runtime {NAME!r}, not {runtime}",
                "grep -r kata /etc/containers ~/.config/containers: another file has a runtime of that name",
            )


def _info(
    program: str, template: str, *options: str, env: Mapping[str, str] | None = None
) -> subprocess.CompletedProcess[str]:
    """What ``podman info`` says by a template.

    Raises:
        HostError: It cannot be asked.
    """
    # In directories that go again: podman makes its storage when it is asked anything.
    with tempfile.TemporaryDirectory(prefix="kata-podman-") as work:
        places = [f"--{name}={work}/{name}" for name in ("root", "runroot", "tmpdir")]
        command = [program, *places, "--storage-driver=vfs", *options, "info", "--format", template]
        return ask(command, env)


def surroundings() -> str:
    """Who makes cgroups for podman, and its monitor, as a sentence's end.

    Raises:
        HostError: It cannot be asked, has no monitor that works, or somebody makes its cgroups who is not there.
    """
    program = shutil.which("podman") or "podman"
    template = (
        "{{.Host.CgroupManager}}|{{.Host.CgroupsVersion}}|{{.Host.Conmon.Path}}|{{.Host.Conmon.Version}}"
    )
    done = _info(program, template)
    if done.returncode:
        raise HostError(f"podman info: {last_words(done)}", "podman info")
    manager, _, rest = done.stdout.strip().partition("|")
    version, _, monitor = rest.partition("|")
    path, _, said = monitor.partition("|")
    if manager == "systemd" and not os.path.isdir("/run/systemd/system"):
        raise HostError(
            "its cgroup manager is systemd, which this host does not run",
            'cgroup_manager = "cgroupfs" in [engine] of containers.conf',
        )
    number = re.search(r"version (\S+?),?(\s|$)", said)
    return f"cgroup manager {manager} (cgroups {version}), monitor {path} {number[1] if number else said}".rstrip()


def podman() -> Podman:
    """Find podman on the PATH.

    Raises:
        HostError: There is none, it cannot be asked, or it is too old.
    """
    program = shutil.which("podman")
    if not program:
        raise HostError("podman is not on the PATH", "apt-get install podman")
    said = ask([program, "--version"]).stdout
    match = re.search(r"version (\d+)\S*", said)
    if match is None or int(match[1]) < LEAST:
        version = match[0] if match else said.strip()
        raise HostError(f"{program} ({version}) is too old", f"install Podman {LEAST} or newer")
    return Podman(program, match[0].split()[1])


def runtime_program() -> str:
    """Where `kata-runtime` is installed.

    Raises:
        HostError: It is not; Podman gives a runtime no PATH to be found on.
    """
    found = shutil.which(PROGRAM, path=_WHERE) or shutil.which(PROGRAM)
    if not found:
        raise HostError(f"{PROGRAM} is in none of {_WHERE.replace(':', ', ')}", "make install")
    return os.path.abspath(found)


def install(path: str) -> list[Edit]:
    """Work out the changes that make ``--runtime kata`` our runtime.

    Args:
        path: The drop-in; it need not exist.

    Returns:
        The changes; none if it is there already.

    Raises:
        AlreadyExistsError: There is a file of that name that is not ours.
        ConfigError: The file cannot be read.
        HostError: There is no runtime to name.
    """
    return client_drop_in.install(path, CLIENT, lambda made: _content(runtime_program(), made))


def uninstall(path: str) -> list[Edit]:
    """Work out the changes that remove the runtime.

    Raises:
        ConfigError: The file cannot be read, or has been changed since it was written.
    """
    return client_drop_in.uninstall(path, CLIENT, lambda made: _content(runtime(path), made))


clear_up = client_drop_in.clear_up


def runtime(path: str) -> str:
    """The program that a drop-in names; empty if it names none, or cannot be read.

    Args:
        path: The drop-in.
    """
    try:
        listed = tomllib.loads((read(path) or b"").decode())["engine"]["runtimes"][NAME]
        return str(listed[0])
    except (ConfigError, ValueError, LookupError, TypeError):
        return ""


def _content(program: str, made_directory: bool) -> str:
    import json

    top = client_drop_in.head(CLIENT, made_directory=made_directory)
    return f"{top}[engine.runtimes]\n{NAME} = [{json.dumps(program)}]\n"
