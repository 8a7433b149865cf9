"""`make install` and `make uninstall`, below a prefix of the test's own, and the first start that set-up makes."""

from __future__ import annotations

import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


class Installation:
    """A prefix, and how to run make and the installed kata with directories of their own."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.prefix = directory / "p"
        self.env = {
            **{
                name: value
                for name, value in os.environ.items()
                if name not in ("KATA_GUEST_DIR", "MAKEFLAGS")
            },
            "KATA_RUN_DIR": str(directory / "r"),
            "KATA_STATE_DIR": str(directory / "s"),
        }

    def make(self, *words: str) -> subprocess.CompletedProcess[str]:
        command = [
            "make",
            "--no-print-directory",
            "-C",
            str(ROOT),
            *words,
            f"PREFIX={self.prefix}",
            "CLIENTS=none",
        ]
        return subprocess.run(command, capture_output=True, text=True, env=self.env, check=False)

    def kata(self, *words: str, program: str = "kata") -> subprocess.CompletedProcess[str]:
        command = [str(self.prefix / "bin" / program), *words]
        return subprocess.run(
            command, capture_output=True, text=True, stdin=subprocess.DEVNULL, env=self.env, check=False
        )


@pytest.fixture
def installation(run_directory: Path) -> Iterator[Installation]:
    directory = Path(tempfile.mkdtemp(prefix="install", dir=run_directory))
    try:
        yield Installation(directory)
    finally:
        shutil.rmtree(directory)


@pytest.mark.timeout(900)
def test_install_run_uninstall(installation: Installation, busybox_image: str) -> None:
    done = installation.make("install", "FORCE=1")
    assert done.returncode == 0, done.stderr
    done = installation.kata("run", "--rm", busybox_image, "echo", "installed")
    assert (done.returncode, done.stdout) == (0, "installed\n"), done.stderr
    share = installation.prefix / "share"
    assert ".TH" in (share / "man/man1/kata-run.1").read_text()
    assert "__complete" in (share / "bash-completion/completions/kata").read_text()
    again = installation.make("install", "FORCE=1")
    assert again.returncode == 0, again.stderr
    assert "already there" in again.stderr
    # Isolated from the caller's Python settings, wherever it is called from.
    installation.env["PYTHONPATH"] = "/nonexistent"
    assert installation.kata("version").returncode == 0
    done = installation.kata("--vm", "Version", program="kata-agent-ctl")
    assert '"agent_version"' in done.stdout, done.stderr
    done = installation.kata("metrics", "nobody", program="kata-runtime")
    assert (done.returncode, "no running sandbox 'nobody'" in done.stderr) == (1, True), done.stderr
    assert ".TH" in (share / "man/man1/kata-runtime.1").read_text()
    del installation.env["PYTHONPATH"]
    done = installation.make("uninstall")
    assert done.returncode == 0, done.stderr
    assert not list(installation.prefix.glob("*/*"))
    assert (installation.directory / "s/images").is_dir()


def test_install_refuses_where_another_kata_is(installation: Installation) -> None:
    shim = installation.directory / "bin/containerd-shim-kata-v2"
    shim.parent.mkdir()
    shim.write_text("#!/bin/sh\n")
    shim.chmod(0o755)
    installation.env["PATH"] = f"{shim.parent}:{installation.env['PATH']}"
    done = installation.make("install")
    assert done.returncode != 0
    assert f"error: another Kata is on this machine: {shim}" in done.stderr
    assert "FORCE=1" in done.stderr
    assert not installation.prefix.exists()
