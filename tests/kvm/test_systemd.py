"""systemd's cgroup driver: a sandbox's cgroup is a scope that systemd knows."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from conftest import Kata
from containerd_support import Containerd, running
from oci_support import running as oci_running
from systemd_support import Booted, Systemd
from systemd_support import running as systemd_running
from waiting import until

from kata.engine.client import EngineClient

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="needs root")

LONG = {"test_a_container_is_started_again"}
MIB = 1 << 20


@pytest.fixture
def systemd(run_directory: Path) -> Iterator[Systemd]:
    with systemd_running(run_directory) as one:
        yield one


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
