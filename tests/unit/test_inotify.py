"""What the kernel tells of a directory."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from kata import inotify


def test_what_happens_in_a_directory_is_told(tmp_path: Path) -> None:
    queue = inotify.init()
    try:
        watch = inotify.add_watch(
            queue, str(tmp_path), inotify.IN_CREATE | inotify.IN_DELETE_SELF | inotify.IN_ONLYDIR
        )
        assert inotify.read(queue) == []
        (tmp_path / "näme").write_bytes(b"")
        (tmp_path / ("x" * 255)).write_bytes(b"")
        assert inotify.read(queue) == [
            (watch, inotify.IN_CREATE, "näme"),
            (watch, inotify.IN_CREATE, "x" * 255),
        ]
        for path in list(tmp_path.iterdir()):
            path.unlink()
        tmp_path.rmdir()
        assert inotify.read(queue) == [
            (watch, inotify.IN_DELETE_SELF, ""),
            (watch, inotify.IN_IGNORED, ""),
        ]
        with pytest.raises(FileNotFoundError):
            inotify.add_watch(queue, str(tmp_path), inotify.IN_CREATE)
    finally:
        os.close(queue)
