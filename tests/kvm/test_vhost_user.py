"""Disks that other processes serve by vhost-user-blk, as a client of containerd names them."""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator
from pathlib import Path

import pytest
from containerd_support import Containerd, running
from hypervisor_lab import SERVER, require, served
from waiting import until

from kata.hypervisor import registry

pytestmark = [
    pytest.mark.skipif(os.geteuid() != 0, reason="needs root"),
    pytest.mark.skipif(
        SERVER is None, reason="needs qemu-storage-daemon (apt-get install qemu-system-common)"
    ),
]


@pytest.fixture
def daemon(
    run_directory: Path, guest_assets: Path, busybox_image: str, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Containerd]:
    monkeypatch.setenv("CONTAINERD_SNAPSHOTTER", "native")  # the lab's file system has no overlays on it
    with running(run_directory, guest_assets, busybox_image, second=False) as one:
        yield one


@pytest.mark.parametrize("name", ["qemu", "cloud-hypervisor"])
def test_a_device_of_the_store(
    name: str, daemon: Containerd, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    require(registry.find(name))
    store = tmp_path / "store"
    for kind in ("devices", "sockets"):
        (store / "block" / kind).mkdir(parents=True)
    socket = store / "block/sockets/mine"
    # ctr gives the container the same path, and device nodes are of use in its /dev alone.
    node = f"/dev/kata-test-{os.getpid()}"
    for path in (node, store / "block/devices/mine"):
        os.mknod(path, 0o600 | stat.S_IFBLK, os.makedev(241, 7))
    request.addfinalizer(lambda: os.unlink(node))
    config = tmp_path / "configuration.toml"
    config.write_text(
        f'[runtime]\nhypervisor_name = "{name}"\n[hypervisor.{name}]\nenable_vhost_user_store = true\n'
        f'vhost_user_store_path = "{store}"\n'
    )
    image = tmp_path / "image"
    with image.open("wb") as file:
        file.truncate(8 << 20)
    options = ("--runtime-config-path", str(config), "--device", node)
    missing = daemon.run("none", "true", options=options)
    assert missing.returncode != 0
    assert f"the vhost-user device 241:7 has no server at {socket}".encode() in missing.stderr
    script = f"echo from the guest | dd of={node} conv=fsync 2>/dev/null; cat /sys/class/block/*/size"
    with served(image, socket):
        done = daemon.run("one", "sh", "-c", script, options=options)
        assert done.returncode == 0, done.stderr
        assert str((8 << 20) // 512) in done.stdout.decode().split()
        until(lambda: not daemon.sandboxes(), "no sandbox is left", daemon.diagnosis)
    assert image.read_bytes()[:15] == b"from the guest\n"
