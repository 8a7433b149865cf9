"""A containerd of the tests' own, with this checkout's shim on its PATH."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import tarfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]
PATIENCE = float(os.environ.get("KATA_TEST_PATIENCE", "120"))
RUNTIME = "io.containerd.kata.v2"
IMAGE = "local/busybox:latest"


class Containerd:
    """A daemon with everything of its own below one short directory.

    Args:
        directory: Made by the caller.
        guest: The guest's directory.
    """

    def __init__(self, directory: Path, guest: Path) -> None:
        self.directory = directory
        self.socket = directory / "c.sock"
        self.run_dir = directory / "r"
        self.log = directory / "containerd.log"
        programs = directory / "bin"
        programs.mkdir()
        (programs / "containerd-shim-kata-v2").symlink_to(ROOT / "src/kata/__main__.py")
        self.env = {
            **os.environ,
            "PATH": f"{programs}:{ROOT}/build/programs/usr/bin:{os.environ['PATH']}",
            "KATA_RUN_DIR": str(self.run_dir),
            "KATA_STATE_DIR": str(directory / "s"),
            "KATA_GUEST_DIR": str(guest),
        }
        self.program = shutil.which("containerd", path=self.env["PATH"])
        if self.program is None or shutil.which("ctr", path=self.env["PATH"]) is None:
            pytest.skip("needs containerd (apt-get install containerd)")
        self._daemon: subprocess.Popen[bytes] | None = None
        (directory / "config.toml").write_text(
            f"""\
version = 2
root = "{directory}/root"
state = "{directory}/state"
disabled_plugins = ["io.containerd.grpc.v1.cri", "io.containerd.internal.v1.opt"]
[grpc]
address = "{self.socket}"
[ttrpc]
address = "{self.socket}.ttrpc"
"""
        )

    def start(self) -> None:
        """Start the daemon, and return when it answers."""
        assert self.program is not None
        with open(self.log, "ab") as log:
            self._daemon = subprocess.Popen(
                [self.program, "--config", str(self.directory / "config.toml")],
                env=self.env,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
            )
        until(lambda: self.ctr("version").returncode == 0, "containerd answers", self.log.read_text)

    def stop(self) -> None:
        """End the daemon; its containers go on."""
        if self._daemon is not None:
            self._daemon.send_signal(signal.SIGTERM)
            self._daemon.wait(30)
            self._daemon = None

    def ctr(self, *arguments: str, stdin: bytes = b"") -> subprocess.CompletedProcess[bytes]:
        """Run ctr to its end."""
        return subprocess.run(
            ["ctr", "--address", str(self.socket), *arguments],
            input=stdin,
            capture_output=True,
            timeout=PATIENCE,
            env=self.env,
            check=False,
        )

    def ok(self, *arguments: str, stdin: bytes = b"") -> str:
        """Run ctr, which has to end with 0; its standard output."""
        done = self.ctr(*arguments, stdin=stdin)
        assert done.returncode == 0, f"ctr {' '.join(arguments)}: {done.stderr.decode()}\n{self.diagnosis()}"
        return done.stdout.decode()

    def run(
        self, name: str, *command: str, options: tuple[str, ...] = ()
    ) -> subprocess.CompletedProcess[bytes]:
        """``ctr run --rm`` of busybox."""
        return self.ctr("run", "--rm", "--runtime", RUNTIME, *options, IMAGE, name, *command)

    def detached(self, name: str, *command: str, options: tuple[str, ...] = ()) -> int:
        """``ctr run -d`` of busybox; the task's pid."""
        self.ok("run", "-d", "--runtime", RUNTIME, *options, IMAGE, name, *command)
        return self.tasks()[name][0]

    def tasks(self, namespace: str = "default") -> dict[str, tuple[int, str]]:
        """Pid and status of each task."""
        lines = self.ok("--namespace", namespace, "task", "ls").splitlines()[1:]
        return {name: (int(pid), status) for name, pid, status in map(str.split, lines)}

    def remove(self, name: str) -> None:
        """Remove a task and its container."""
        self.ok("task", "rm", "-f", name)
        self.ok("container", "rm", name)

    def sandboxes(self) -> list[str]:
        """Names of the sandboxes' run directories."""
        try:
            return sorted(os.listdir(self.run_dir / "sandboxes"))
        except FileNotFoundError:
            return []

    def journal(self, sandbox: str) -> list[dict[str, Any]]:
        """The lines of a sandbox's journal."""
        path = self.run_dir / "sandboxes" / sandbox / "journal"
        return [json.loads(line) for line in path.read_text().splitlines()]

    def engine_pid(self, sandbox: str) -> int:
        """Pid of the engine of a sandbox."""
        return int([line["owner"]["pid"] for line in self.journal(sandbox) if "owner" in line][-1])

    def diagnosis(self) -> str:
        """What the engines' logs and containerd's end with."""
        texts = [
            path.read_text(errors="replace")[-2000:] for path in self.run_dir.glob("sandboxes/*/engine.log")
        ]
        return "\n".join([*texts, self.log.read_text(errors="replace")[-2000:]])

    def import_image(self, layout: Path) -> None:
        """Make an OCI layout's image known as `IMAGE`."""
        archive = self.directory / "image.tar"
        with tarfile.open(archive, "w") as tar:
            tar.add(layout, arcname=".")
        self.ok("image", "import", "--base-name", IMAGE.partition(":")[0], str(archive))


class Events:
    """What ``ctr events`` prints while this is open."""

    def __init__(self, daemon: Containerd) -> None:
        self._path = daemon.directory / "events"
        self._file = open(self._path, "wb")  # noqa: SIM115 - closed by close
        self._process = subprocess.Popen(
            ["ctr", "--address", str(daemon.socket), "events"], env=daemon.env, stdout=self._file
        )
        # It prints nothing of its own, so an event of ours tells when it listens.
        until(lambda: self._shows(daemon), "ctr events listens")

    def _shows(self, daemon: Containerd) -> bool:
        daemon.ok("namespaces", "create", name := f"n{time.monotonic_ns()}")
        daemon.ok("namespaces", "remove", name)
        return self._path.stat().st_size > 0

    def topics(self, container: str) -> list[tuple[str, dict[str, Any]]]:
        """(topic, event) of each task event of a container so far, in order."""
        found = []
        for line in self._path.read_text().splitlines():
            _, _, rest = line.partition(" /tasks/")
            topic, _, body = rest.partition(" ")
            if body and (event := json.loads(body)).get("container_id") == container:
                found.append((topic, event))
        return found

    def close(self) -> None:
        self._process.terminate()
        self._process.wait(10)
        self._file.close()


def until(
    condition: Callable[[], object], what: str, more: Callable[[], str] = str, patience_s: float = PATIENCE
) -> None:
    """Return when a condition holds.

    Raises:
        AssertionError: It did not within the patience; with what `more` says.
    """
    deadline = time.monotonic() + patience_s
    while not condition():
        assert time.monotonic() < deadline, f"waited for: {what}\n{more()}"
        time.sleep(0.05)
