"""`kata cp` on the host's side; `tests/vm/test_cli_life.py` has the rest."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

import pytest

from kata.cli import copy


def test_a_further_name_costs_nothing_where_it_cannot_be(tmp_path: Path) -> None:
    first = tmp_path / "first"
    first.write_text("first")
    (tmp_path / "old").write_text("old")
    assert copy._linked(str(first), str(tmp_path / "old"))
    assert copy._linked(str(first), str(tmp_path / "old")), "a name that it has already"
    assert (tmp_path / "old").stat().st_ino == first.stat().st_ino
    with tempfile.TemporaryDirectory(dir="/dev/shm") as elsewhere:
        if os.stat(elsewhere).st_dev == os.stat(tmp_path).st_dev:
            pytest.skip("there is one file system only")
        kept = Path(elsewhere, "kept")
        kept.write_text("precious")
        assert not copy._linked(str(first), str(kept))
        assert kept.read_text() == "precious"
        assert os.listdir(elsewhere) == ["kept"]
    (tmp_path / "full").mkdir()
    (tmp_path / "full/file").touch()
    with pytest.raises(IsADirectoryError):
        copy._linked(str(first), str(tmp_path / "full"))
    assert sorted(os.listdir(tmp_path)) == ["first", "full", "old"]
