"""containerd's devmapper snapshotter: a root file system on a thin volume, a disk of the guest.

Here, since the KVM lab's kernel has a device mapper and a test machine's need not.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import thin_pool
from containerd_support import IMAGE, RUNTIME, Containerd, running
from hypervisor_lab import require
from waiting import until

from kata.hypervisor import registry

pytestmark = [pytest.mark.skipif(os.geteuid() != 0, reason="needs root"), pytest.mark.long]


@pytest.fixture
def pool(run_directory: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """A pool of thin volumes; its name."""
    for name, value in thin_pool.environment().items():
        monkeypatch.setenv(name, value)  # containerd executes dmsetup as well
    name = f"kata-test-{os.getpid()}"
    with contextlib.ExitStack() as stack:
        try:
            stack.enter_context(thin_pool.pool(run_directory, name))
        except thin_pool.Missing as missing:
            pytest.skip(str(missing))
        yield name


@pytest.fixture
def daemon(
    request: pytest.FixtureRequest,
    run_directory: Path,
    guest_assets: Path,
    busybox_image: str,
    pool: str,
    monkeypatch: pytest.MonkeyPatch,
) -> Iterator[Containerd]:
    name = request.param
    require(registry.find(name))
    configuration = run_directory / f"with-{name}.toml"
    configuration.write_text(f"[runtime]\nhypervisor_name = '{name}'\n")
    monkeypatch.setenv("KATA_CONF_FILE", str(configuration))
    # For ctr. containerd 2 unpacks what it imports only with snapshotters that its configuration names once more.
    monkeypatch.setenv("CONTAINERD_SNAPSHOTTER", "devmapper")
    config = thin_pool.configuration(pool, Path("{directory}/devmapper"))  # its own
    with running(run_directory, guest_assets, busybox_image, second=False, plugins=config) as one:
        yield one


@pytest.mark.parametrize("daemon", ["qemu", "cloud-hypervisor", "firecracker"], indirect=True)
def test_a_root_on_a_thin_volume(daemon: Containerd) -> None:
    plugins = daemon.ok("plugins", "ls")
    assert any({"devmapper", "ok"} <= set(line.split()) for line in plugins.splitlines()), plugins
    script = "echo kept > /made; cat /made; grep ' / ' /proc/mounts"
    shown = daemon.ok(*("run", "--rm", "--runtime", RUNTIME, IMAGE, "one", "sh", "-c", script))
    kept, mount = shown.splitlines()
    assert kept == "kept"
    assert " ext4 rw" in mount
    assert mount.startswith("/dev/vd")
    until(lambda: not daemon.sandboxes(), "no sandbox is left", daemon.diagnosis)
