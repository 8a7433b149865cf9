"""A real systemd for tests: this machine's, or one that is booted for them in the KVM lab.

The KVM lab is booted without systemd. There it runs as the first process of a PID namespace, in a cgroup namespace:
for it and for what it starts, a machine of its own with cgroup version 2.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from waiting import until

CGROUPS = Path("/sys/fs/cgroup")
BOX = CGROUPS / "booted"
UNITS = Path("/run/systemd/system")
GENERATORS = Path("/run/systemd/none")
"""Programs that it runs at each reload; there are none unless a test puts some there."""
SCRIPT = """\
set -e
umount -l /sys/fs/cgroup
mount -t cgroup2 cgroup2 /sys/fs/cgroup
mount -t proc proc /proc
export container=kata-test
# What the units of this machine would start is there already; running generators takes a minute in the lab.
# The path is all that is looked through at a reload: without the first two, scopes would lose their properties.
units=/run/systemd/system.control:/run/systemd/transient:/run/systemd/system:/etc/systemd/system
export SYSTEMD_UNIT_PATH=$units:/run/systemd/generator
export SYSTEMD_GENERATOR_PATH=/run/systemd/none SYSTEMD_ENVIRONMENT_GENERATOR_PATH=/run/systemd/none
exec /lib/systemd/systemd --unit=multi-user.target --show-status=0
"""


class Systemd:
    """A running one.

    Attributes:
        around: Runs a program where it is the first process.
        top: Its uppermost cgroup, as seen from here.
    """

    def __init__(self) -> None:
        self.around: list[str] = []
        self.top = CGROUPS

    def call(self, *argv: str) -> str:
        done = subprocess.run([*self.around, *argv], capture_output=True, text=True, check=False)
        assert done.returncode == 0, f"{argv}: {done.stderr}"
        return done.stdout

    def shown(self, unit: str, name: str) -> str:
        return self.call("systemctl", "show", "--value", f"--property={name}", unit).strip()


class Booted(Systemd):
    """One that is the first process of a PID namespace, with targets that pull nothing in.

    Args:
        said: A file for what it prints.
    """

    def __init__(self, said: Path) -> None:
        super().__init__()
        self.top = BOX
        self._said = said
        self._unshare: subprocess.Popen[bytes] | None = None

    def boot(self) -> None:
        """Boot it, and return when it answers."""
        UNITS.mkdir(parents=True)
        for name in ("basic", "multi-user", "network-online", "shutdown", "sysinit"):
            (UNITS / f"{name}.target").write_text(f"[Unit]\nDescription={name}\nDefaultDependencies=no\n")
        BOX.mkdir()
        enter = (
            f"echo 0 >{BOX}/cgroup.procs;"
            f" exec unshare --pid --fork --mount --cgroup --kill-child sh -c '{SCRIPT}'"
        )
        with self._said.open("ab") as log:
            self._unshare = subprocess.Popen(
                ["sh", "-c", enter], stdin=subprocess.DEVNULL, stdout=log, stderr=log
            )
        # It stays outside of the namespaces; what is their uppermost cgroup must have no process.
        children = Path(f"/proc/{self._unshare.pid}/task/{self._unshare.pid}/children")
        until(lambda: children.read_text(), "the first process", self._said.read_text)
        (CGROUPS / "cgroup.procs").write_text(str(self._unshare.pid))
        until(
            lambda: Path("/run/systemd/private").exists() and (BOX / "init.scope/cgroup.procs").exists(),
            "systemd answers",
            self._said.read_text,
        )
        pid = next(
            pid
            for pid in (BOX / "init.scope/cgroup.procs").read_text().split()
            if b"systemd\0--unit=multi-user.target" in Path(f"/proc/{pid}/cmdline").read_bytes()
        )
        # Into its cgroups first: from outside of them, nothing can be moved within.
        into = f'mkdir -p {BOX}/tests; echo 0 >{BOX}/tests/cgroup.procs; exec nsenter -t {pid} -m -p -C "$@"'
        self.around = ["sh", "-c", into, "sh"]

    def end(self) -> None:
        """Have it end as by the power switch: with all that it has started. May be called again."""
        if self._unshare is not None:
            self._unshare.send_signal(signal.SIGKILL)
            self._unshare.wait()
            self._unshare = None
        if BOX.exists():
            until(lambda: "populated 0" in (BOX / "cgroup.events").read_text(), "all of it has ended")
            for directory, _, _ in os.walk(BOX, topdown=False):
                os.rmdir(directory)
        shutil.rmtree(UNITS.parent, ignore_errors=True)


@contextmanager
def running(run_directory: Path) -> Iterator[Systemd]:
    """One that runs; skips the test where there is none.

    Args:
        run_directory: For what it prints.
    """
    if os.path.isdir("/run/systemd/system"):
        yield Systemd()
        return
    if "KVM_LAB" not in os.environ:
        pytest.skip("needs a machine that systemd has booted, or the KVM lab")
    if not os.path.exists("/lib/systemd/systemd") or shutil.which("systemd-run") is None:
        pytest.skip("needs systemd (apt-get install systemd)")
    one = Booted(run_directory / "systemd.log")
    try:
        one.boot()
        yield one
    finally:
        one.end()
