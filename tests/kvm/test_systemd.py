"""systemd's cgroup driver: a sandbox's cgroup is a scope that systemd knows.

The KVM lab is booted without systemd. There it runs as the first process of a PID namespace, in a cgroup namespace:
for it and for what it starts, a machine of its own with cgroup version 2.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from conftest import Kata
from containerd_support import Containerd, running
from oci_support import running as oci_running
from waiting import until

from kata.engine.client import EngineClient

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="needs root")

LONG = {"test_a_container_is_started_again"}
CGROUPS = Path("/sys/fs/cgroup")
BOX = CGROUPS / "booted"
UNITS = Path("/run/systemd/system")
SCRIPT = """\
set -e
umount -l /sys/fs/cgroup
mount -t cgroup2 cgroup2 /sys/fs/cgroup
mount -t proc proc /proc
export container=kata-test
# What the units of this machine would start is there already; running generators takes a minute in the lab.
# The path is all that is looked through at a reload: without the first two, scopes would lose their properties.
export SYSTEMD_UNIT_PATH=/run/systemd/system.control:/run/systemd/transient:/run/systemd/system:/etc/systemd/system
export SYSTEMD_GENERATOR_PATH=/run/systemd/none SYSTEMD_ENVIRONMENT_GENERATOR_PATH=/run/systemd/none
exec /lib/systemd/systemd --unit=multi-user.target --show-status=0
"""
MIB = 1 << 20


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


@pytest.fixture
def systemd(run_directory: Path) -> Iterator[Systemd]:
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


def test_the_cgroup_that_podman_asks_systemd_for(
    run_directory: Path, guest_assets: Path, busybox_image: str, systemd: Systemd
) -> None:
    """What Podman and CRI-O ask for with their cgroup manager "systemd"."""
    unit, slice_ = "libpod-box.scope", "test-libpod.slice"
    leaf = systemd.top / "test.slice" / slice_ / unit
    with oci_running(run_directory / "sd", guest_assets, busybox_image) as runtime:
        bundle = runtime.bundle("box", "sleep", "1000")
        config = json.loads((bundle / "config.json").read_text())
        config["linux"]["cgroupsPath"] = f"{slice_}:libpod:box"
        config["linux"]["resources"] = {"memory": {"limit": 200 * MIB}}
        (bundle / "config.json").write_text(json.dumps(config))
        runtime.around = systemd.around
        where = ("--bundle", str(bundle), "--pid-file", str(bundle / "pid"))
        quiet = {"capture_output": False, "stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
        done = runtime.call("--systemd-cgroup", "run", "--detach", *where, "box", **quiet)
        assert done.returncode == 0, runtime.logs()
        assert systemd.shown(unit, "ActiveState") == "active", runtime.logs()
        assert systemd.shown(unit, "Slice") == slice_
        inside = systemd.call("cat", f"/sys/fs/cgroup/test.slice/{slice_}/{unit}/cgroup.procs").split()
        assert (bundle / "pid").read_text() in inside
        assert 200 * MIB < int(systemd.shown(unit, "MemoryMax")) == int((leaf / "memory.max").read_text())
        runtime("delete", "--force", "box")
        until(lambda: not leaf.exists(), "the scope's cgroup is gone", runtime.logs)
        until(lambda: systemd.shown(unit, "ActiveState") == "inactive", "the scope is gone")
        runtime.around = []


def test_a_container_is_started_again(kvm_kata: Kata, busybox_image: str, systemd: Systemd) -> None:
    """`kata run --restart`: after its end and after a boot, not after it was stopped by hand, and no more often than
    was asked for.
    """

    def kata(*arguments: str) -> str:
        done = subprocess.run(
            [*systemd.around, *kvm_kata.command(*arguments)],
            env=kvm_kata.env,
            capture_output=True,
            check=False,
        )
        assert done.returncode == 0, f"kata {' '.join(arguments)}: {done.stderr.decode()}"
        return done.stdout.decode().strip()

    def starts(name: str) -> int:
        return kata("logs", name).splitlines().count("started")

    def made(name: str, policy: str, script: str) -> str:
        options = ("--restart", policy, "--network", "none", "--name", name)
        identity = kata("run", "-d", *options, busybox_image, "sh", "-c", f"echo started; {script}")
        return f"kata-{identity}.service"

    def is_now(unit: str, state: str) -> None:
        until(
            lambda: systemd.shown(unit, "ActiveState") == state,
            f"{unit} is {state}",
            lambda: systemd.call("systemctl", "status", "--no-pager", unit),
        )

    units = {}
    try:
        units["always"] = made("always", "always", "sleep 1")
        units["stopped"] = made("stopped", "unless-stopped", "sleep 1000")
        # No status of its own means to the unit that somebody has stopped it.
        units["twice"] = made("twice", "on-failure:1", "exit 250")
        # systemd's own limit would count anew.
        systemd.call("systemctl", "daemon-reload")
        until(lambda: starts("always") >= 2, "a restart")
        assert int(kata("inspect", "-f", "{{.RestartCount}}", "always")) >= 1
        is_now(units["twice"], "failed")
        assert starts("twice") == 2
        for name in ("always", "stopped"):
            kata("stop", "-t", "0", name)
            is_now(units[name], "inactive")
        before = {name: starts(name) for name in units}
        if isinstance(systemd, Booted):
            systemd.end()
            shutil.rmtree(kvm_kata.run_dir)  # it is in memory
            systemd.boot()
            # Docker starts it again at a boot, by hand stopped or not.
            is_now(units["always"], "active")
            assert systemd.shown(units["stopped"], "ActiveState") == "inactive"
            until(lambda: starts("always") >= before["always"] + 2, "a start at the boot, and a restart")
            assert starts("stopped") == before["stopped"]
        kata("start", "stopped")
        is_now(units["stopped"], "active")
    finally:
        if units:
            kata("rm", "-f", *units)
    for unit in units.values():
        assert not list(Path("/etc/systemd/system").rglob(unit))
        assert systemd.shown(unit, "LoadState") == "not-found"
