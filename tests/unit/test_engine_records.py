"""What of a container is on disk."""

from __future__ import annotations

import contextlib
import os
import subprocess
from pathlib import Path

import pytest

from kata.engine.containers.records import StateFile, read_json, rfc3339


def test_state_file_is_replaced_whole(tmp_path: Path) -> None:
    path = tmp_path / "state.json"
    state = StateFile(str(path), {"pid": 1, "starttime": 2, "boot_id": "b"})
    state.write(status="running", pid=5)
    state.write(status="stopped", exit_code=4, finished_at=rfc3339(1_700_000_000_000_000_001))
    found = read_json(str(path))
    assert (found["status"], found["pid"], found["exit_code"]) == ("stopped", 5, 4)
    assert found["finished_at"] == "2023-11-14T22:13:20.000000001Z"
    assert os.listdir(tmp_path) == ["state.json"]
    assert read_json(str(tmp_path / "none")) == {}


def test_state_is_recorded_on_a_full_disk(tmp_path: Path) -> None:
    small = tmp_path / "small"
    small.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=16k", "none", small], check=True)
    try:
        path = small / "state.json"
        state = StateFile(str(path), {"pid": 1, "starttime": 2, "boot_id": "b"})
        state.write(status="running", pid=5)
        with contextlib.suppress(OSError), open(small / "fill", "wb", buffering=0) as file:
            while file.write(bytes(100)):
                pass
        state.write(status="stopped", exit_code=4)
        assert read_json(str(path))["exit_code"] == 4
        StateFile(str(path), {"pid": 3}).reserve()
        assert read_json(str(path))["exit_code"] == 4  # what another engine said stays until there is news
        # One that has no room yet gets none, and is told so at once; what there is stays as it is.
        other = StateFile(str(small / "other.json"), {"pid": 1})
        with pytest.raises(OSError, match="No space left"):
            other.reserve()
        with pytest.raises(OSError, match="No space left"):
            state.write(error="x" * 4096)
        assert read_json(str(path))["exit_code"] == 4
        assert sorted(os.listdir(small)) == ["fill", "state.json"]
    finally:
        subprocess.run(["umount", small], check=True)
