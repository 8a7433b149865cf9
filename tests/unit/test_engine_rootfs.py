"""What a root file system is made of in the guest."""

from __future__ import annotations

import pytest

from kata.engine.containers import rootfs
from kata.errors import (
    ConfigError,
)
from kata.settings import RootfsSettings


def test_erofs_root_has_a_lower_an_upper_and_an_overlay() -> None:
    found = rootfs.storages("c", RootfsSettings(kind="erofs", lower_slot=0, upper_slot=1), ["05", "06"])
    assert [(one.driver, one.source, one.fstype) for one in found] == [
        ("blk", "05", "erofs"),
        ("blk", "06", "ext4"),
        ("overlayfs", "overlay", "overlay"),
    ]
    assert found[2].mount_point == rootfs.path("c")
    assert f"lowerdir={found[0].mount_point}" in found[2].options


@pytest.mark.parametrize(
    "bad", [None, RootfsSettings(kind="zip"), RootfsSettings(kind="erofs", lower_slot=0)]
)
def test_unknown_root_is_refused(bad: RootfsSettings | None) -> None:
    with pytest.raises(ConfigError):
        rootfs.storages("c", bad, ["05", "06"])
