"""systemd's cgroup driver: a sandbox's cgroup is a scope that systemd knows.

The KVM lab is booted without systemd. There it runs as the first process of a PID namespace, in a cgroup namespace:
for it and for what it starts, a machine of its own with cgroup version 2.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from containerd_support import Containerd, running
from waiting import until

from kata.engine.client import EngineClient

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="needs root")

CGROUPS = Path("/sys/fs/cgroup")
BOX = CGROUPS / "booted"
SCRIPT = """\
set -e
umount -l /sys/fs/cgroup
mount -t cgroup2 cgroup2 /sys/fs/cgroup
mount -t proc proc /proc
export container=kata-test
exec /lib/systemd/systemd --unit=bare.target --show-status=0
"""
MIB = 1 << 20


class Systemd:
    """A running one.

    Attributes:
        around: Runs a program where it is the first process.
        top: Its uppermost cgroup, as seen from here.
    """

    def __init__(self, around: list[str], top: Path) -> None:
        self.around = around
        self.top = top

    def call(self, *argv: str) -> str:
        done = subprocess.run([*self.around, *argv], capture_output=True, text=True, check=False)
        assert done.returncode == 0, f"{argv}: {done.stderr}"
        return done.stdout

    def shown(self, unit: str, name: str) -> str:
        return self.call("systemctl", "show", "--value", f"--property={name}", unit).strip()


@pytest.fixture
def systemd(run_directory: Path) -> Iterator[Systemd]:
    if os.path.isdir("/run/systemd/system"):
        yield Systemd([], CGROUPS)
        return
    if "KVM_LAB" not in os.environ:
        pytest.skip("needs a machine that systemd has booted, or the KVM lab")
    if not os.path.exists("/lib/systemd/systemd") or shutil.which("systemd-run") is None:
        pytest.skip("needs systemd (apt-get install systemd)")
    units = Path("/run/systemd/system")
    units.mkdir(parents=True)
    # Nothing of what a boot needs: the machine has that already.
    (units / "bare.target").write_text("[Unit]\nDescription=Nothing else\nDefaultDependencies=no\n")
    BOX.mkdir()
    enter = f"echo 0 >{BOX}/cgroup.procs; exec unshare --pid --fork --mount --cgroup --kill-child sh -c '{SCRIPT}'"
    said = run_directory / "systemd.log"
    with said.open("wb") as log:
        unshare = subprocess.Popen(["sh", "-c", enter], stdin=subprocess.DEVNULL, stdout=log, stderr=log)
    try:
        # It stays outside of the namespaces; what is their uppermost cgroup must have no process.
        children = Path(f"/proc/{unshare.pid}/task/{unshare.pid}/children")
        until(lambda: children.read_text(), "the first process", said.read_text)
        (CGROUPS / "cgroup.procs").write_text(str(unshare.pid))
        until(
            lambda: Path("/run/systemd/private").exists() and (BOX / "init.scope/cgroup.procs").exists(),
            "systemd answers",
            said.read_text,
        )
        pid = next(
            pid
            for pid in (BOX / "init.scope/cgroup.procs").read_text().split()
            if b"systemd\0--unit=bare.target" in Path(f"/proc/{pid}/cmdline").read_bytes()
        )
        # Into its cgroups first: from outside of them, nothing can be moved within.
        into = f'mkdir -p {BOX}/tests; echo 0 >{BOX}/tests/cgroup.procs; exec nsenter -t {pid} -m -p -C "$@"'
        yield Systemd(["sh", "-c", into, "sh"], BOX)
    finally:
        unshare.send_signal(signal.SIGKILL)
        unshare.wait()
        until(lambda: "populated 0" in (BOX / "cgroup.events").read_text(), "all of it has ended")
        for directory, _, _ in os.walk(BOX, topdown=False):
            os.rmdir(directory)
        shutil.rmtree("/run/systemd")


@pytest.fixture
def daemon(
    run_directory: Path,
    guest_assets: Path,
    busybox_image: str,
    systemd: Systemd,
    monkeypatch: pytest.MonkeyPatch,
) -> Iterator[Containerd]:
    # For ctr: the lab's file system is not for overlays.
    monkeypatch.setenv("CONTAINERD_SNAPSHOTTER", "native")
    around = systemd.around
    with running(run_directory, guest_assets, busybox_image, second=False, around=around) as one:
        yield one


def test_a_sandbox_is_a_scope_of_systemd(daemon: Containerd, systemd: Systemd) -> None:
    unit, parent = "kata-one.scope", systemd.top / "test.slice/test-pods.slice"
    limit = ("--memory-limit", str(200 * MIB), "--cpus", "0.5")
    daemon.detached("one", "sleep", "1000", options=("--cgroup", "test-pods.slice:kata:one", *limit))
    assert systemd.shown(unit, "ActiveState") == "active", daemon.diagnosis()
    assert systemd.shown(unit, "Delegate") == "yes"
    assert systemd.shown(unit, "Slice") == "test-pods.slice"
    leaf = parent / unit
    with EngineClient(str(daemon.run_dir / "sandboxes/default.one/engine.sock")) as engine:
        facts = engine.describe()
        for pid in ("engine_pid", "hypervisor_pid"):
            # As the sandbox's own machine sees it.
            assert str(facts[pid]) in systemd.call(
                "cat", f"/sys/fs/cgroup/test.slice/test-pods.slice/{unit}/cgroup.procs"
            )
        first = int((leaf / "memory.max").read_text())
        assert first > 200 * MIB
        assert systemd.shown(unit, "MemoryMax") == str(first)
        assert systemd.shown(unit, "TasksMax") == (leaf / "pids.max").read_text().strip() == "2048"
        engine.update("one", {"memory": {"limit": 150 * MIB}})
        second = int((leaf / "memory.max").read_text())
        assert second == int(systemd.shown(unit, "MemoryMax")) < first
        # What made a directory without a unit lose its limits.
        systemd.call("systemctl", "daemon-reload")
        systemd.call("systemctl", "set-property", "--runtime", "test-pods.slice", "CPUWeight=50")
        assert int((leaf / "memory.max").read_text()) == second
        assert "memory" in (parent / "cgroup.subtree_control").read_text().split()
    daemon.remove("one")
    until(lambda: not daemon.sandboxes(), "no sandbox is left", daemon.diagnosis)
    until(lambda: not leaf.exists(), "the scope's cgroup is gone")
    until(
        lambda: systemd.shown(unit, "ActiveState") == "inactive", "systemd knows of no such scope any more"
    )
    assert "systemd" not in daemon.diagnosis()
