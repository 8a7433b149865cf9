"""What of the host is copied into a machine that shares nothing with it, and what is refused."""

from __future__ import annotations

import os
import socket
import stat
from pathlib import Path

import pytest

from kata.engine.containers import copies
from kata.errors import UnsupportedError


def test_files_directories_and_links_are_found_in_an_order_in_which_they_can_be_made(tmp_path: Path) -> None:
    volume = tmp_path / "volume"
    (volume / "..1" / "deep").mkdir(parents=True)
    (volume / "..1" / "deep" / "key").write_bytes(b"secret")
    (volume / "..data").symlink_to("..1")
    (volume / "key").symlink_to("..data/deep/key")
    found = copies.gather(str(volume), "/in", "/etc/keys", readonly=True)
    assert [(one.path, stat.S_IFMT(one.about.st_mode), one.data) for one in found] == [
        ("/in", stat.S_IFDIR, b""),
        ("/in/..1", stat.S_IFDIR, b""),
        ("/in/..1/deep", stat.S_IFDIR, b""),
        ("/in/..1/deep/key", stat.S_IFREG, b"secret"),
        ("/in/..data", stat.S_IFLNK, b"..1"),
        ("/in/key", stat.S_IFLNK, b"..data/deep/key"),
    ]
    [one] = copies.gather(str(volume / "key"), "/in", "/x", readonly=True)
    assert (one.path, one.data) == ("/in", b"secret"), "a mount follows a link"
    descriptor = os.open(volume, os.O_PATH)
    try:
        again = copies.gather(f"/proc/self/fd/{descriptor}", "/in", "/x", readonly=True, named="/named")
    finally:
        os.close(descriptor)
    assert [one.path for one in again] == [one.path for one in found]


@pytest.mark.parametrize(
    "destination", ["/etc/resolv.conf", "/etc/hosts", "/etc/hostname", "/dev/termination-log"]
)
def test_what_clients_mount_writable_by_habit_is_copied(tmp_path: Path, destination: str) -> None:
    file = tmp_path / "file"
    file.write_bytes(b"")
    assert len(copies.gather(str(file), "/in", destination, readonly=False)) == 1
    with pytest.raises(UnsupportedError, match="writable"):
        copies.gather(str(tmp_path), "/in", destination, readonly=False)


def test_what_would_be_lost_or_is_large_is_refused_by_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    volume = tmp_path / "volume"
    volume.mkdir()
    with pytest.raises(UnsupportedError, match=f"cannot mount {volume} writable") as caught:
        copies.check(str(volume), "/x", readonly=False)
    assert "docs/hypervisors.md" in (caught.value.hint or "")
    (volume / "large").write_bytes(b"x" * (copies.MOST_BYTES // 2))
    copies.check(str(volume), "/x", readonly=True)
    (volume / "larger").write_bytes(b"x" * (copies.MOST_BYTES // 2 + 1))
    with pytest.raises(UnsupportedError, match=f"{volume} .* more than 4 MiB"):
        copies.check(str(volume), "/x", readonly=True)
    (volume / "larger").unlink()
    monkeypatch.setattr(copies, "MOST_FILES", 3)
    (volume / "b").mkdir()
    copies.check(str(volume), "/x", readonly=True)
    (volume / "c").mkdir()
    with pytest.raises(UnsupportedError, match="more than 3 files"):
        copies.check(str(volume), "/x", readonly=True)
    (volume / "c").rmdir()
    (volume / "b").rmdir()
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(volume / "sock"))
        with pytest.raises(UnsupportedError, match="'sock' in it is no file"):
            copies.check(str(volume), "/x", readonly=True)
        copies.check(str(volume / "sock"), "/x", readonly=False)  # carried, not copied
    copies.check(str(tmp_path / "none"), "/x", readonly=True)  # told when it is mounted
