"""The program ``kata-runtime`` with a root and bundles of its own, driven as conmon drives it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tarfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from conftest import ROOT
from waiting import PATIENCE, until

PROGRAM = ROOT / "src/kata/oci_runtime/__main__.py"
MONITOR = """
import ctypes, os, subprocess, sys
ctypes.CDLL(None).prctl(36, 1, 0, 0, 0)  # PR_SET_CHILD_SUBREAPER, as conmon does
made = subprocess.run(sys.argv[2:])
if made.returncode:
    sys.exit(200)
_, status = os.waitpid(int(open(sys.argv[1]).read()), 0)
code = os.waitstatus_to_exitcode(status)
sys.exit(code if code >= 0 else 128 - code)
"""


class Runtime:
    """The command line, with a root and bundles of its own."""

    def __init__(self, directory: Path, guest: Path, image: str) -> None:
        self.directory = directory
        self.around: list[str] = []
        """What the program is executed through."""
        self.run_dir = directory / "k"
        self.env = {
            "PATH": os.environ["PATH"],
            "KATA_RUN_DIR": str(self.run_dir),
            "KATA_STATE_DIR": str(directory / "s"),
            "KATA_GUEST_DIR": str(guest),
            **{name: value for name, value in os.environ.items() if name.startswith("KATA_TE")},
        }
        self.rootfs = directory / "rootfs"
        self.rootfs.mkdir()
        unpack(Path(image.removeprefix("oci:")), self.rootfs)

    def bundle(self, name: str, *argv: str, **process: Any) -> Path:
        """A bundle whose container runs *argv*."""
        path = self.directory / name
        path.mkdir()
        self("spec", "--bundle", str(path))
        config = json.loads((path / "config.json").read_text())
        config["root"] = {"path": str(self.rootfs)}
        config["process"].update({"args": list(argv), "terminal": False, **process})
        (path / "config.json").write_text(json.dumps(config))
        return path

    def call(self, *arguments: str, **how: Any) -> subprocess.CompletedProcess[bytes]:
        return subprocess.run(
            [*self.around, PROGRAM, *arguments],
            env=self.env,
            timeout=PATIENCE,
            check=False,
            **{"stdin": subprocess.DEVNULL, "capture_output": True, **how},
        )

    def __call__(self, *arguments: str) -> str:
        done = self.call(*arguments)
        assert done.returncode == 0, (arguments, done.stdout, done.stderr, self.logs())
        return done.stdout.decode()

    def monitor(self, bundle: Path, *options: str, **how: Any) -> subprocess.Popen[bytes]:
        """Create a container as conmon does, and wait for the process that stands for it."""
        pid_file = str(bundle / "pid")
        command: list[str] = [sys.executable, "-c", MONITOR, pid_file, str(PROGRAM), "create"]
        return subprocess.Popen(
            [*command, "--bundle", str(bundle), "--pid-file", pid_file, *options, bundle.name],
            env=self.env,
            **{"stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE, **how},
        )

    def pid(self, bundle: Path, monitor: subprocess.Popen[bytes]) -> int:
        """The number in the pid file, once it is there."""
        file = bundle / "pid"
        until(lambda: file.exists() or monitor.poll() is not None, "the pid file", self.logs)
        return int(file.read_text())

    def status(self, name: str) -> str:
        return str(json.loads(self("state", name))["status"])

    def left(self) -> list[str]:
        places = [*self.run_dir.glob("sandboxes/*"), *self.run_dir.glob("oci/*")]
        return [str(path) for path in places]

    def logs(self) -> str:
        logs = self.run_dir.glob("sandboxes/*/engine.log")
        return "\n".join(log.read_text(errors="replace")[-2000:] for log in logs)


def unpack(image: Path, target: Path) -> None:
    """Unpack the layers of the first image of an OCI layout."""

    def blob(digest: str) -> Path:
        return image / "blobs" / digest.replace(":", "/")

    index = json.loads((image / "index.json").read_text())
    manifest = json.loads(blob(index["manifests"][0]["digest"]).read_text())
    for layer in manifest["layers"]:
        with tarfile.open(blob(layer["digest"])) as archive:
            archive.extractall(target)


@contextmanager
def running(directory: Path, guest: Path, image: str) -> Iterator[Runtime]:
    """A runtime in a new directory; whatever is left there is deleted, and has to go."""
    directory.mkdir()
    one = Runtime(directory, guest, image)
    yield one
    for path in one.run_dir.glob("oci/*"):
        one.call("delete", "--force", path.name)
    assert one.left() == []
