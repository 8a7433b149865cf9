"""Ordinary users: which ids they have, and which of them programs of a sandbox get."""

from __future__ import annotations

import os
import pwd
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest

from kata import own_ids, paths, rootless, sysio

_HOLDER = """
import sys
from kata import own_ids, sysio
sysio.id_map = lambda kind: [(0, 1000, 1), (1, 100000, 65536)]
print(own_ids.take(0), own_ids.take(1), flush=True)
sys.stdin.read()
"""


def _mapped(monkeypatch: pytest.MonkeyPatch, users: Sequence[int], groups: Sequence[int]) -> None:
    maps = {"uid": [(0, 1000, 1), (1, 100000, *users)], "gid": [(0, 1000, 1), (1, 100000, *groups)]}
    monkeypatch.setattr(sysio, "id_map", maps.__getitem__)
    monkeypatch.setattr(own_ids, "_taken", None)


def test_subordinate_ids_are_a_users_by_name_or_number(tmp_path: Path) -> None:
    path = tmp_path / "subuid"
    me = pwd.getpwuid(os.geteuid()).pw_name
    path.write_text(
        f"other:100000:65536\n{me}:200000:1000\n\n{os.geteuid()}:300000:5\n{me}:0\n{me}:7:0\n{me}:a:b\n"
    )
    assert rootless.subordinate(str(path), os.geteuid()) == [(200000, 1000), (300000, 5)]
    assert rootless.subordinate(str(path), 4_000_000_000) == []
    assert rootless.subordinate(str(tmp_path / "none"), 0) == []


def test_the_last_ids_are_for_programs_and_nobody_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    for users, groups, last in (
        ([65536], [65536], 65533),
        ([10000], [10000], 10000),
        ([10000], [20000], 0),
        ([1000], [1000], 0),
    ):
        _mapped(monkeypatch, users, groups)
        assert own_ids.last_id() == last


def test_no_two_sandboxes_have_the_same_ids(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("KATA_RUN_DIR", str(tmp_path))
    _mapped(monkeypatch, [65536], [65536])
    mine = own_ids.take(0)
    assert 60000 < mine < 65534
    assert (own_ids.take(1), own_ids.take(0)) == (mine - 1, mine)
    # One whose process begins its search at the same place.
    monkeypatch.setattr(own_ids, "_taken", None)
    another = own_ids.take(0)
    assert abs(another - mine) >= 2
    source = Path(rootless.__file__).parents[1]
    holder = subprocess.Popen(
        [sys.executable, "-c", _HOLDER],
        env={**os.environ, "PYTHONPATH": str(source)},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    with holder:
        assert holder.stdout is not None
        theirs = [int(word) for word in holder.stdout.readline().split()]
        assert theirs[0] - theirs[1] == 1
        assert not set(theirs) & {mine, mine - 1, another, another - 1}


def test_without_ids_to_be_had_programs_are_the_users(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("KATA_RUN_DIR", str(tmp_path / "file/below"))
    (tmp_path / "file").touch()
    _mapped(monkeypatch, [65536], [65536])
    assert own_ids.take(0) == 0


def test_podmans_namespace_leads_to_the_users_directories(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(os, "environ", {"XDG_RUNTIME_DIR": str(tmp_path)})
    monkeypatch.setattr(sysio, "id_map", lambda kind: [(0, os.geteuid(), 1), (1, 100000, 65536)])
    monkeypatch.setattr(os, "access", lambda path, mode: True)
    rootless.settle_inside()  # this root's own /run
    assert paths.run_dir() == "/run/kata"
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    rootless.settle_inside()
    assert paths.run_dir() == f"{tmp_path}/kata"
    assert paths.state_dir() == f"{pwd.getpwuid(os.geteuid()).pw_dir}/.local/share/kata"
