"""Disks of the host in a guest: devices of a specification, and root file systems that are on disks."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from containerd_support import IMAGE, RUNTIME, SECOND, Containerd, running, until

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="needs root")

BLOCKFILE = """\
[plugins."io.containerd.snapshotter.v1.blockfile"]
root_path = "{directory}/blockfile"
scratch_file = "{scratch}"
fs_type = "ext4"
mount_options = []
"""


@pytest.fixture(scope="module")
def daemon(
    run_directory: Path, guest_assets: Path, busybox_image: str, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Containerd]:
    scratch = tmp_path_factory.mktemp("blockfile") / "scratch"
    with scratch.open("wb") as file:
        file.truncate(32 << 20)
    subprocess.run(["mkfs.ext4", "-q", "-O", "^has_journal", scratch], check=True)
    # Debian 12's containerd is older than the blockfile snapshotter.
    second = (SECOND / "containerd").exists()
    plugins = BLOCKFILE.replace("{scratch}", str(scratch))
    with running(run_directory, guest_assets, busybox_image, second=second, plugins=plugins) as one:
        yield one


@pytest.fixture
def device(tmp_path: Path) -> Iterator[str]:
    """A block device of 8 MiB."""
    image = tmp_path / "device"
    with image.open("wb") as file:
        file.truncate(8 << 20)
    made = subprocess.run(
        ["losetup", "--find", "--show", image], capture_output=True, text=True, check=False
    )
    if made.returncode:
        pytest.skip(f"needs loop devices: {made.stderr.strip()}")
    node = made.stdout.strip()
    try:
        yield node
    finally:
        subprocess.run(["losetup", "--detach", node], check=True)


def test_a_device_of_the_host(daemon: Containerd, device: str) -> None:
    script = f"echo from the guest | dd of={device} conv=fsync 2>/dev/null; cat /sys/class/block/*/size"
    done = daemon.run("one", "sh", "-c", script, options=("--device", device))
    assert done.returncode == 0, done.stderr
    assert str((8 << 20) // 512) in done.stdout.decode().split()
    assert Path(device).read_bytes()[:15] == b"from the guest\n"
    until(lambda: not daemon.sandboxes(), "no sandbox is left", daemon.diagnosis)


def test_a_device_that_is_not_there(daemon: Containerd, device: str) -> None:
    spec = daemon.spec({})
    spec["linux"]["devices"] = [{"path": "/dev/none", "type": "b", "major": 259, "minor": 4000}]
    path = daemon.directory / "none.json"
    path.write_text(json.dumps(spec))
    done = daemon.ctr("run", "--rm", "--runtime", RUNTIME, "--config", str(path), "none")
    assert done.returncode != 0
    assert b"no block device 259:4000" in done.stderr
    until(lambda: not daemon.sandboxes(), "no sandbox is left", daemon.diagnosis)


def test_a_root_file_system_on_a_disk(daemon: Containerd) -> None:
    plugins = daemon.ok("plugins", "ls")
    if not any("blockfile" in line and "ok" in line.split() for line in plugins.splitlines()):
        pytest.skip("needs a containerd with the blockfile snapshotter (1.7 or newer)")
    options = ("run", "--rm", "--runtime", RUNTIME, "--snapshotter", "blockfile")
    shown = daemon.ok(
        *options, IMAGE, "one", "sh", "-c", "echo kept > /made; cat /made; grep ' / ' /proc/mounts"
    )
    kept, mount = shown.splitlines()
    assert kept == "kept"
    assert " ext4 rw" in mount
    assert "/dev/vd" in mount
    until(lambda: not daemon.sandboxes(), "no sandbox is left", daemon.diagnosis)
