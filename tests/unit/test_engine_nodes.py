"""Device nodes of a specification: the guest's, disks, or refused by name."""

from __future__ import annotations

import os
import socket
import stat
from pathlib import Path
from typing import Any

import pytest

from kata.engine.containers import nodes
from kata.errors import UnsupportedError

EVERYTHING = {"devices": [{"allow": True, "access": "rwm"}]}


def listed(path: str, kind: str, major: int, minor: int) -> dict[str, Any]:
    return {"path": path, "type": kind, "major": major, "minor": minor}


FUSE = listed("/dev/fuse", "c", 10, 229)
CARD = listed("/dev/dri/card0", "c", 226, 0)
DISK = listed("/dev/sda", "b", 8, 0)
FIFO = listed("/dev/initctl", "p", 0, 0)


def test_what_the_guest_has_stays() -> None:
    config = {"linux": {"devices": [FUSE, DISK, FIFO]}}
    assert nodes.of_guest(config) == (config, [])


def test_what_it_does_not_have_is_refused_by_name() -> None:
    with pytest.raises(
        UnsupportedError, match="/dev/dri/card0: the character device 226:0 is this host's"
    ) as info:
        nodes.of_guest({"linux": {"devices": [FUSE, CARD]}})
    assert "/dev/fuse" in info.value.hint


def test_of_a_privileged_containers_list_the_guests_are_left() -> None:
    config = {"linux": {"devices": [FUSE, CARD, DISK], "resources": EVERYTHING}}
    found, volumes = nodes.of_guest(config)
    assert found["linux"] == {"devices": [FUSE, DISK], "resources": EVERYTHING}
    assert volumes == []
    assert config["linux"]["devices"] == [FUSE, CARD, DISK], "the given one is as it was"


def test_a_privileged_container_has_what_an_ordinary_host_has() -> None:
    config: dict[str, Any] = {
        "linux": {"devices": [FUSE], "resources": EVERYTHING},
        "mounts": [{"destination": "/dev/net/tun"}],
    }
    made = nodes.with_guests(config)["linux"]["devices"]
    paths = [one["path"] for one in made]
    assert paths.count("/dev/fuse") == 1
    assert "/dev/net/tun" not in paths
    assert {"/dev/loop-control", "/dev/loop0", "/dev/loop7", "/dev/kmsg"} <= set(paths)
    assert {**listed("/dev/loop7", "b", 7, 7), "fileMode": 0o660} in made
    plain = {"linux": {"devices": [FUSE]}}
    mapped = {"linux": {**config["linux"], "namespaces": [{"type": "user"}]}}
    assert nodes.with_guests(plain) == plain
    assert nodes.with_guests(mapped) == mapped


def test_a_block_device_that_is_mounted_becomes_a_device(tmp_path: Path) -> None:
    node = tmp_path / "disk"
    try:
        os.mknod(node, 0o600 | stat.S_IFBLK, os.makedev(7, 200))
    except PermissionError:
        pytest.skip("needs the right to make device nodes")
    bind = {"type": "bind", "source": str(node), "destination": "/dev/x", "options": ["rbind", "ro"]}
    other = {"type": "bind", "source": str(tmp_path), "destination": "/data", "options": ["rbind"]}
    tmpfs = {"type": "tmpfs", "source": str(node), "destination": "/tmp"}
    found, [volume] = nodes.of_guest({"mounts": [bind, other, tmpfs]})
    assert found["mounts"] == [other, tmpfs]
    assert (volume.container_path, volume.numbers, volume.readonly) == ("/dev/x", (7, 200), True)
    whole = nodes.with_volumes(found, [volume])
    assert whole["linux"]["devices"] == [listed("/dev/x", "b", 7, 200)]
    assert nodes.with_volumes(found, []) == found


def test_the_guests_nodes_stand_for_the_hosts(tmp_path: Path) -> None:
    assert nodes.guest_path(os.stat("/dev/null")) == "/dev/null"
    (tmp_path / "link").symlink_to("/dev/zero")
    assert nodes.guest_path(os.stat(tmp_path / "link")) == "/dev/zero"
    assert nodes.guest_path(os.stat(tmp_path)) == ""


def test_what_is_neither_file_nor_directory_says_what_it_is(tmp_path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(tmp_path / "s"))
        found = nodes.refuse("/run/s", os.stat(tmp_path / "s"))
    assert found.message.startswith("cannot use the volume /run/s: it is a socket of this host")
    assert "over the network" in found.hint
    os.mkfifo(tmp_path / "f")
    assert "a fifo of this host" in nodes.refuse("/run/f", os.stat(tmp_path / "f")).message
    assert "the character device 1:3 of" in nodes.refuse("/dev/null", os.stat("/dev/null")).message
