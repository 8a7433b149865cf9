"""Which disks a container gets, and what is said of those it cannot have."""

from __future__ import annotations

from typing import Any

import pytest

from kata.engine.containers import disks
from kata.errors import HostError, UnsupportedError
from kata.proto.task_pb import Mount


def mount(kind: str, source: str, *options: str, target: str = "") -> Mount:
    return Mount(type=kind, source=source, target=target, options=list(options))


@pytest.mark.parametrize(
    "mounts",
    [
        [],
        [mount("bind", "/var/lib/x", "rbind", "rw")],
        [mount("overlay", "overlay", "lowerdir=/a:/b", "upperdir=/c", "workdir=/d")],
        [mount("tmpfs", "tmpfs")],
    ],
)
def test_what_the_host_mounts(mounts: list[Mount]) -> None:
    assert disks.root_of(mounts) is None


def test_a_root_on_a_disk() -> None:
    root = disks.root_of([mount("ext4", "/dev/mapper/pool-snap-3", "discard", "rw")])
    assert root is not None
    assert (root.path, root.fstype, root.options, root.readonly) == (
        "/dev/mapper/pool-snap-3",
        "ext4",
        ["discard"],
        False,
    )
    root = disks.root_of([mount("xfs", "/images/3", "loop", "ro", "nouuid")])
    assert root is not None
    assert (root.options, root.readonly) == (["ro", "nouuid"], True)


@pytest.mark.parametrize(
    ("mounts", "words"),
    [
        ([mount("btrfs", "/dev/mapper/x")], "type btrfs on /dev/mapper/x"),
        ([mount("erofs", "/l/1", "loop"), mount("overlay", "overlay", "lowerdir=/l")], "several mounts"),
        ([mount("ext4", "/dev/sdb", target="/data")], "several mounts"),
    ],
)
def test_a_root_that_is_not_supported(mounts: list[Mount], words: str) -> None:
    with pytest.raises(UnsupportedError, match=words):
        disks.root_of(mounts)


def spec(*rules: dict[str, Any]) -> dict[str, Any]:
    return {
        "linux": {
            "devices": [
                {"path": "/dev/data", "type": "b", "major": 7, "minor": 3},
                {"path": "/dev/fuse", "type": "c", "major": 10, "minor": 229},
            ],
            "resources": {"devices": [{"allow": False, "access": "rwm"}, *rules]},
        }
    }


@pytest.mark.parametrize(("access", "readonly"), [("rwm", False), ("rm", True)])
def test_a_device_and_whether_it_may_be_written(access: str, readonly: bool) -> None:
    rule = {"allow": True, "type": "b", "major": 7, "minor": 3, "access": access}
    (device,) = disks.devices_of(spec(rule))
    assert (device.container_path, device.numbers, device.readonly) == ("/dev/data", (7, 3), readonly)
    assert disks.drop_host_devices(spec(rule)) == spec(rule)


def test_who_is_privileged_owns_the_guests_devices_only() -> None:
    privileged = spec({"allow": True, "access": "rwm"})
    assert disks.devices_of(privileged) == []
    kept = disks.drop_host_devices(privileged)["linux"]
    assert [device["path"] for device in kept["devices"]] == ["/dev/fuse"]
    assert kept["resources"] == privileged["linux"]["resources"]


def test_a_device_that_is_not_there() -> None:
    with pytest.raises(HostError, match="no block device 259:4000"):
        disks.Device("/dev/none", (259, 4000), False).host_path()
