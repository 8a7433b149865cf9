"""Which server a block device of the host's store stands for, and the command lines for its disk."""

from __future__ import annotations

import os
import socket
import stat
from pathlib import Path

import pytest

from kata.engine.containers import vhost_user
from kata.errors import HostError, HypervisorError
from kata.hypervisor.base import Disk, MachineShape
from kata.hypervisor.cloud_hypervisor import command as cloud_hypervisor
from kata.hypervisor.qemu import command, vhost_disks
from kata.hypervisor.qemu.settings import VMSettings


@pytest.mark.skipif(os.geteuid() != 0, reason="makes device nodes, which needs root")
def test_a_device_stands_for_the_socket_of_its_name(tmp_path: Path) -> None:
    store = str(tmp_path)
    assert vhost_user.socket_of(store, (241, 0)) == ""  # there is no store yet
    devices, sockets = tmp_path / "block/devices", tmp_path / "block/sockets"
    devices.mkdir(parents=True)
    sockets.mkdir()
    for name, number in (("one", 0), ("two", 1), ("three", 2)):
        os.mknod(devices / name, 0o600 | stat.S_IFBLK, os.makedev(241, number))
    (devices / "a-file").touch()
    for number in range(4200):
        (devices / f"b{number}").touch()
    (sockets / "three").touch()
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(sockets / "one"))
        assert vhost_user.socket_of(store, (241, 0)) == f"{sockets}/one"
    for number, why in ((1, "No such file or directory"), (2, "it is no socket")):
        with pytest.raises(
            HostError, match=f"the vhost-user device 241:{number} has no server at .*: {why}"
        ):
            vhost_user.socket_of(store, (241, number))
    assert vhost_user.socket_of(store, (8, 0)) == ""


def test_memory_and_ports_of_a_machine_that_can_be_given_some() -> None:
    def argv(**settings: bool) -> str:
        vm = VMSettings(name="x", run_dir="/r", kernel="/k", initrd="/i", accel="kvm", **settings)  # type: ignore[arg-type]
        return " ".join(command.build(vm, command.Fds(5, 6, None, kernel=7, initrd=8, disks={}, nic=9)))

    with_some = argv(shared_memory=True)
    assert "memory-backend-memfd,share=on,id=ram" in with_some
    assert with_some.count("pcie-root-port,id=served") == 4
    without = argv()
    assert "memfd" not in without
    assert "served" not in without


def test_a_disk_as_each_hypervisor_is_told_it() -> None:
    backend, device = command.vhost_user_disk(1, "server1")
    assert backend["backend"]["data"] == {
        "addr": {"type": "fd", "data": {"str": "server1"}},
        "server": False,
    }
    assert (device["driver"], device["bus"]) == ("vhost-user-blk-pci", "served1")
    assert device["chardev"] == backend["id"]
    config = cloud_hypervisor.disk_config(2, Disk("/s", readonly=False, vhost_user=True), "/disks/2")
    assert config == {"id": "disk2", "vhost_user": True, "vhost_socket": "/disks/2", "pci_device_id": 0x0C}
    assert MachineShape(kernel="k", initrd="i", shared_memory=True) != MachineShape(kernel="k", initrd="i")


def test_nobody_answers(tmp_path: Path) -> None:
    with pytest.raises(HypervisorError, match=r"cannot reach the server of the disk .*: No such file"):
        vhost_disks.connect(str(tmp_path / "none"))
    place = tmp_path / "ended"
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(place))
    with pytest.raises(HypervisorError, match=r"cannot reach the server of the disk .*: Connection refused"):
        vhost_disks.connect(str(place))
