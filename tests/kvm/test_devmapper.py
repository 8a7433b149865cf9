"""containerd's devmapper snapshotter: a root file system on a thin volume, a disk of the guest.

Here, since the KVM lab's kernel has a device mapper and a test machine's need not.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from containerd_support import IMAGE, RUNTIME, Containerd, running
from waiting import until

pytestmark = [pytest.mark.skipif(os.geteuid() != 0, reason="needs root"), pytest.mark.long]

SECTORS = 512
DATA, METADATA = 512 << 20, 16 << 20
BLOCK = 128
"""Of the pool: 64 KiB."""


def _loop(path: Path, size: int) -> str:
    with path.open("wb") as file:
        file.truncate(size)
    made = subprocess.run(["losetup", "--find", "--show", path], capture_output=True, text=True, check=False)
    if made.returncode:
        pytest.skip(f"needs loop devices: {made.stderr.strip()}")
    return made.stdout.strip()


@pytest.fixture
def pool(run_directory: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """A pool of thin volumes; its name."""
    if not os.path.exists("/run/udev/control"):
        # dmsetup leaves the nodes to udev, whether it runs or not; containerd executes dmsetup as well.
        monkeypatch.setenv("DM_DISABLE_UDEV", "1")
    if shutil.which("dmsetup") is None:
        pytest.skip("needs dmsetup (apt-get install dmsetup)")
    subprocess.run(["modprobe", "-a", "loop", "dm-thin-pool"], capture_output=True, check=False)
    known = subprocess.run(["dmsetup", "targets"], capture_output=True, text=True, check=False)
    if "thin-pool" not in known.stdout:
        pytest.skip(f"needs the device mapper's thin volumes in the kernel: {known.stderr.strip()}")
    name = f"kata-test-{os.getpid()}"
    loops = []
    try:
        loops.append(_loop(run_directory / "metadata", METADATA))
        loops.append(_loop(run_directory / "data", DATA))
        table = f"0 {DATA // SECTORS} thin-pool {loops[0]} {loops[1]} {BLOCK} 0"
        subprocess.run(["dmsetup", "create", name, "--table", table], check=True)
        try:
            yield name
        finally:
            # Its volumes first.
            said = subprocess.run(["dmsetup", "ls"], capture_output=True, text=True, check=True).stdout
            volumes = [line.split()[0] for line in said.splitlines() if line.startswith(f"{name}-snap")]
            for one in [*volumes, name]:
                subprocess.run(["dmsetup", "remove", "--retry", one], check=True)
    finally:
        for node in loops:
            subprocess.run(["losetup", "--detach", node], check=True)
        for file in ("metadata", "data"):
            (run_directory / file).unlink(missing_ok=True)


@pytest.fixture
def daemon(
    run_directory: Path, guest_assets: Path, busybox_image: str, pool: str, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Containerd]:
    # For ctr. containerd 2 unpacks what it imports only with snapshotters that its configuration names once more.
    monkeypatch.setenv("CONTAINERD_SNAPSHOTTER", "devmapper")
    config = f"""
[plugins."io.containerd.snapshotter.v1.devmapper"]
root_path = {json.dumps(str(run_directory / "devmapper"))}
pool_name = "{pool}"
base_image_size = "64MB"
fs_type = "ext4"
"""
    with running(run_directory, guest_assets, busybox_image, second=False, plugins=config) as one:
        yield one


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
