"""Scopes of systemd, with a program in systemd-run's place: systemd itself cannot be made to fail on demand."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from kata import children, journal_undo, sysio
from kata.journal import Journal
from kata.resources import systemd_scope


@pytest.mark.parametrize(
    ("path", "unit"),
    [
        ("kubepods.slice:cri:abc", ("kubepods.slice", "cri-abc.scope")),
        (":docker:abc", ("system.slice", "docker-abc.scope")),
        ("a.slice::b.scope", ("a.slice", "b.scope")),
        ("a.slice:x:b.slice", ("a.slice", "x-b.slice")),
        ("/a/path", None),
        ("a:b:c:d", None),
        ("", None),
    ],
)
def test_a_cgroups_path_names_a_unit_or_a_directory(path: str, unit: tuple[str, str] | None) -> None:
    assert systemd_scope.unit_of(path) == unit


def test_who_is_root_in_a_user_namespace_asks_the_users_systemd(monkeypatch: pytest.MonkeyPatch) -> None:
    assert systemd_scope._asking("systemd-run") == (["systemd-run"], children.ENVIRONMENT)
    monkeypatch.setattr(sysio, "in_user_namespace", lambda: True)
    monkeypatch.setattr(sysio, "id_map", lambda kind: [(1, 100000, 65536), (0, 1234, 1)])
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    words, environment = systemd_scope._asking("systemd-run")
    assert words == ["systemd-run", "--user"]
    assert environment["XDG_RUNTIME_DIR"] == "/run/user/1234"
    assert not systemd_scope.managed_by_systemd("a.scope")  # none runs
    # In a container with a systemd, that one is asked: its socket is this root's.
    monkeypatch.setattr(os, "access", lambda path, mode: path == "/run/systemd/private")
    assert systemd_scope._asking("systemd-run") == (["systemd-run"], children.ENVIRONMENT)


def scope(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, script: str) -> systemd_scope.Scope:
    """A scope from a systemd-run that is *script*; its journal is in *tmp_path*."""
    program = tmp_path / "systemd-run"
    program.write_text(f"#!/bin/sh\n{script}\n")
    program.chmod(0o755)
    monkeypatch.setattr(children, "find_program", lambda name: str(program))
    journal = Journal.create_dir(str(tmp_path), "journal", {})
    before = len(os.listdir("/proc/self/fd"))
    try:
        return systemd_scope.Scope(journal, "a.slice", "b.scope", ["MemoryMax=1"])
    except OSError:
        assert len(os.listdir("/proc/self/fd")) == before
        assert [entry for entry in journal.entries if not entry.gone] == []
        assert journal_undo.undo(journal) == []
        raise


def test_a_scope_is_kept_by_a_process_until_it_is_released(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    script = f'echo "$@" >{tmp_path}/arguments; while [ "$1" != -- ]; do shift; done; shift; exec "$@"'
    kept = scope(tmp_path, monkeypatch, script)
    assert Path(f"/proc/{kept.pid}/comm").read_text() in ("sleep\n", "sh\n")
    arguments = (tmp_path / "arguments").read_text().split(" -- ")[0].split()
    assert arguments == [
        *("--scope", "--quiet", "--collect", "--slice=a.slice", "--unit=b.scope"),
        *("--property=Delegate=yes", "--property=MemoryMax=1"),
    ]
    kept.release()
    kept.release()
    assert not Path(f"/proc/{kept.pid}").exists()


def test_a_refusal_is_told_in_its_own_words(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(OSError, match=r"Unit b\.scope was already loaded"):
        scope(tmp_path, monkeypatch, "echo 'Unit b.scope was already loaded' >&2; exit 1")


def test_a_systemd_that_does_not_answer_is_not_waited_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(systemd_scope, "PATIENCE_S", 0.3)
    with pytest.raises(OSError, match="no answer for"):
        scope(tmp_path, monkeypatch, "exec sleep 600")


def test_a_host_without_systemd_run_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(children, "find_program", lambda name: None)
    journal = Journal.create_dir(str(tmp_path), "journal", {})
    with pytest.raises(OSError, match="there is no systemd-run"):
        systemd_scope.Scope(journal, "a.slice", "b.scope", [])
    assert journal_undo.undo(journal) == []
