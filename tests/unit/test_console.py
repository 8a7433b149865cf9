"""The ring that keeps the end of a guest's console."""

from __future__ import annotations

import os
from pathlib import Path

from kata.hypervisor.console import ConsoleRing


def kept(path: Path) -> bytes:
    """What is on disk, the older part first."""
    older = Path(f"{path}.1")
    return (older.read_bytes() if older.exists() else b"") + path.read_bytes()


def test_the_newest_bytes_are_kept_on_disk_and_in_memory(tmp_path: Path) -> None:
    path = tmp_path / "console.log"
    ring = ConsoleRing(str(path), limit=100)
    everything = b""
    for number in range(200):
        line = f"line {number}\n".encode()
        everything += line
        ring.feed(line)
        on_disk = kept(path) if path.exists() else Path(f"{path}.1").read_bytes()
        assert everything.endswith(on_disk)
        assert min(len(everything), 50) <= len(on_disk) <= 100
    assert ring.tail(20) == "7\nline 198\nline 199"
    assert ring.tail(4096, lines=1) == "line 199"
    assert path.stat().st_mode & 0o777 == 0o600
    ring.close()
    ring.feed(b"after\n")  # goes to memory only
    assert not kept(path).endswith(b"after\n")
    assert ring.tail(6) == "after"
    ring.close()


def test_one_piece_larger_than_the_ring(tmp_path: Path) -> None:
    path = tmp_path / "console.log"
    ring = ConsoleRing(str(path), limit=100)
    data = bytes(range(65, 90)) * 20
    ring.feed(data)
    assert data.endswith(Path(f"{path}.1").read_bytes())
    assert len(ring.tail(4096, 100)) <= 100
    ring.close()


def test_the_tail_is_safe_to_print() -> None:
    ring = ConsoleRing("")
    ring.feed(b"a\x1b[2Jb\r\nc\x00\xff\xe2\x80\xae\n")
    text = ring.tail()
    assert text == "a\\x1b[2Jb\nc\\x00\ufffd\\u202e"
    assert ring.tail(lines=1) == "c\\x00\ufffd\\u202e"


def test_a_disk_that_cannot_be_written_is_done_without(tmp_path: Path) -> None:
    ring = ConsoleRing("/dev/full")
    ring.feed(b"x" * 10)
    ring.feed(b"y" * 10)
    assert ring.tail() == "x" * 10 + "y" * 10
    # What stands at the path is not followed: the directory may be somebody else's by then.
    (tmp_path / "precious").write_text("precious")
    (tmp_path / "console.log").symlink_to("precious")
    ring = ConsoleRing(str(tmp_path / "console.log"))
    ring.feed(b"over it")
    assert (tmp_path / "precious").read_text() == "precious"
    assert ring.tail() == "over it"
    before = set(os.listdir("/proc/self/fd"))
    ring.close()
    ring.close()
    assert set(os.listdir("/proc/self/fd")) == before
