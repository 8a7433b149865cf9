"""Docker with runc or with kata, as a case of people's real work finds it."""

from __future__ import annotations

import os
import re
import shlex
import socket
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from containerd_support import ROOT
from test_docker import Docker as Dockerd
from waiting import PATIENCE

RUNTIMES = {"runc": "runc", "kata": "io.containerd.kata.v2"}


class Box:
    """Docker with one of the runtimes.

    Args:
        docker: The daemon.
        runtime: A key of `RUNTIMES`.
        directory: For what cases share with containers; empty.
    """

    def __init__(self, docker: Dockerd, runtime: str, directory: Path) -> None:
        self.docker = docker
        self.runtime = runtime
        self.directory = directory
        self._count = 0

    def run(
        self, *arguments: str, image: str = "py", options: tuple[str, ...] = (), stdin: bytes = b""
    ) -> str:
        """Run a container to its end.

        Returns:
            Output, errors and exit status, as ``out; err; status n``.
        """
        return self.call(
            "run", "--rm", "--runtime", RUNTIMES[self.runtime], *options, image, *arguments, stdin=stdin
        )

    def call(self, *arguments: str, stdin: bytes = b"") -> str:
        """Run the client; as `run` returns it."""
        return self._done(["docker", *arguments], stdin)

    def _done(self, command: list[str], stdin: bytes) -> str:
        done = subprocess.run(
            command,
            input=stdin,
            env=self.docker.env,
            capture_output=True,
            timeout=PATIENCE,
            check=False,
        )
        said = [stream.decode(errors="replace").strip() for stream in (done.stdout, done.stderr)]
        # That the machine is emulated is said once, whatever the case; and dockerd says what a host's cgroups lack.
        said[1] = re.sub(
            r"^(note: using software emulation|WARNING: Your kernel).*$", "", said[1], flags=re.MULTILINE
        ).strip()
        return "; ".join([*(text for text in said if text), f"status {done.returncode}"])

    @contextmanager
    def running(self, *command: str, image: str = "py", options: tuple[str, ...] = ()) -> Iterator[str]:
        """A container that runs a command (`sleep` without one); its name."""
        self._count += 1
        name = f"w{os.getpid()}-{self.runtime}-{self._count}"
        given = command or ("sleep", "1000")
        try:
            self.docker(
                "run", "-d", "--runtime", RUNTIMES[self.runtime], "--name", name, *options, image, *given
            )
            yield name
        finally:
            self.docker("rm", "-f", name, code=None)

    def exec(self, name: str, *command: str, options: tuple[str, ...] = ()) -> str:
        """Run a command in a container; as `run` returns it."""
        return self.call("exec", *options, name, *command)

    def fresh(self) -> Path:
        """A new empty directory on the host."""
        return Path(tempfile.mkdtemp(dir=self.directory))

    def words(self, *arguments: str) -> str:
        """A command line for a shell: Docker's with runc, with kata that of our own command."""
        return shlex.join(self._person(arguments))

    def _person(self, arguments: tuple[str, ...]) -> list[str]:
        ours = self.runtime == "kata"
        image = f"oci:{ROOT}/build/images/busybox" if ours else "bb"
        command = [str(ROOT / "src/kata/__main__.py")] if ours else ["docker"]
        return [*command, *(image if word == "IMAGE" else word for word in arguments)]

    def person(self, *arguments: str, stdin: bytes = b"") -> str:
        """Run what `words` has; as `run` returns it."""
        return self._done(self._person(arguments), stdin)

    def shell(self, script: str) -> str:
        """Run a shell's command line; its standard output and exit status."""
        done = subprocess.run(
            ["sh", "-c", script], env=self.docker.env, stdin=subprocess.DEVNULL, capture_output=True,
            timeout=PATIENCE, check=False,
        )  # fmt: skip
        said = done.stdout.decode().strip()
        return f"{said}; status {done.returncode}" if said else str(done.returncode)

    @contextmanager
    def person_running(self, *command: str, options: tuple[str, ...] = ()) -> Iterator[str]:
        """Like `running`, with our own command where kata is the runtime."""
        self._count += 1
        name = f"w{os.getpid()}-own-{self._count}"
        said = self.person("run", "-d", "--name", name, *options, "IMAGE", *command)
        assert said.endswith("status 0"), said
        try:
            yield name
        finally:
            self.person("rm", "-f", name)

    def around(self) -> list[str]:
        """What leads a command to where published ports are."""
        return [] if self.runtime == "kata" else self.docker.containerd.around

    def pid(self, name: str) -> int:
        """The pid of a container's task on the host: with kata the hypervisor's."""
        return int(self.docker("inspect", "--format", "{{.State.Pid}}", name))


def settled(look: Callable[[], str], wanted: str) -> str:
    """What is seen once it is as wanted, or as long as it has time to become so."""
    deadline = time.monotonic() + PATIENCE / 8
    while (seen := look()) != wanted and time.monotonic() < deadline:
        time.sleep(0.2)
    return seen


def free_port() -> int:
    """A port that nobody has at this host's loopback."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def python(code: str) -> tuple[str, str, str]:
    return ("python3", "-c", code)
