"""Volumes with a name: `kata volume`, and what `-v NAME:DST` makes of a container. Machines are in tests/vm."""

from __future__ import annotations

import json
import os
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from cli_state import outcome, state_fixture  # noqa: F401 - a fixture

from kata import paths
from kata.cli import mounts, records, volumes
from kata.errors import StateError, UsageError
from kata.journal import Journal

pytestmark = pytest.mark.skipif(
    shutil.which("mkfs.ext4", path="/usr/sbin:/sbin:/usr/bin:/bin") is None,
    reason="mkfs.ext4 is not installed",
)


def said(capsys: pytest.CaptureFixture[str], *words: str, status: int = 0) -> str:
    return outcome(capsys, "volume", *words, status=status)


def with_volume(container: str, volume: str) -> records.Container:
    pending = records.PendingContainer(container)
    record = {
        "id": pending.id, "name": container, "created_at": records.now(),
        "disk_volumes": [{"name": "volume-0.img", "volume": volume}],
    }  # fmt: skip
    return pending.commit(record, {})


def test_life_of_a_volume(state: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert said(capsys, "create", "-o", "size=64m", "--label", "kind=test", "data") == "data\n"
    assert os.stat(volumes.disk("data")).st_size == 64 << 20
    assert said(capsys, "create", "-o", "size=32m", "data") == "data\n"  # as in Docker, it stays as it is
    assert os.stat(volumes.disk("data")).st_size == 64 << 20
    nameless = said(capsys, "create", "-o", "size=32m").strip()
    assert len(nameless) == 64
    assert said(capsys, "ls", "--format", "{{.Driver}} {{.Name}} {{.Labels}}", "-f", "name=data") == (
        "local data kind=test\n"
    )
    assert said(capsys, "ls").splitlines()[0].split() == ["DRIVER", "VOLUME", "NAME"]
    assert set(said(capsys, "ls", "-q", "--filter", "dangling=true").split()) == {"data", nameless}
    assert said(capsys, "ls", "-qf", "label=other") == ""
    [found] = json.loads(said(capsys, "inspect", "data"))
    assert (found["Name"], found["Labels"], found["Driver"]) == ("data", {"kind": "test"}, "local")
    assert said(capsys, "inspect", "-f", "{{.Labels.kind}} {{.Labels.none}}", "data") == "test <no value>\n"

    box = with_volume("box", "data")
    assert "in use by the container box" in said(capsys, "rm", "data", status=1)
    assert said(capsys, "ls", "-qf", "dangling=false") == "data\n"
    assert nameless in said(capsys, "prune", "-f")
    assert said(capsys, "prune", "-af") == "Total reclaimed space: 0B\n"
    records.remove(box)
    assert said(capsys, "prune", "-f") == "Total reclaimed space: 0B\n"
    assert said(capsys, "rm", "data") == "data\n"
    assert list((state / "volumes").iterdir()) == []
    assert "there is no volume 'data'" in said(capsys, "rm", "data", status=1)
    assert said(capsys, "rm", "-f", "data") == ""


def test_prune_asks(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    said(capsys, "create", "-o", "size=32m", "data")
    monkeypatch.setattr(sys, "stdin", SimpleNamespace(readline=lambda: "\n"))
    assert said(capsys, "prune", "-a").endswith("[y/N] ")
    monkeypatch.setattr(sys, "stdin", SimpleNamespace(readline=lambda: "y\n"))
    assert "Deleted Volumes:\ndata\n\nTotal reclaimed space: " in said(capsys, "prune", "-a")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["create", "a/b"], "cannot be a volume's name"),
        (["create", "-o", "type=nfs", "data"], "no option 'type'"),
        (["create", "-o", "size=1k", "data"], "cannot be made"),
        (["create", "-d", "nfs", "data"], "not offered"),
        (["inspect", "../x"], "there is no volume"),
        (["rm", ".lock"], "there is no volume"),
        (["mount", "x"], "kata volume has no command 'mount'"),
        (["ls", "-f", "dangling=maybe"], "neither true nor false"),
        (["rm"], "too few arguments"),
    ],
)
def test_mistakes(state: Path, capsys: pytest.CaptureFixture[str], words: list[str], message: str) -> None:
    assert message in said(capsys, *words, status=1 if words[0] == "rm" and len(words) > 1 else 125)
    assert not list((state / "volumes").glob("*"))


def test_what_a_dead_process_left_is_made_anew(capsys: pytest.CaptureFixture[str]) -> None:
    Journal.create_dir(
        volumes.directory(), "data", {"client": "kata", "kind": "volume", "id": "data"}
    ).close()
    assert said(capsys, "ls", "-q") == ""
    assert said(capsys, "create", "-o", "size=32m", "data") == "data\n"
    assert said(capsys, "ls", "-q") == "data\n"


def test_one_machine_at_a_time(capsys: pytest.CaptureFixture[str]) -> None:
    said(capsys, "create", "-o", "size=32m", "data")
    one, two = with_volume("one", "data"), with_volume("two", "data")
    volumes.check_free(one)
    os.makedirs(paths.sandbox_dir(two.id))
    volumes.check_free(two)
    with pytest.raises(StateError, match="data is mounted by the container two"):
        volumes.check_free(one)
    with pytest.raises(StateError, match="is gone"):
        volumes.check_free(with_volume("three", "other"))


def test_options_of_run() -> None:
    found = mounts.Mounts()
    for text in ("data:/a", "data:/b:ro,nocopy", "/c"):
        found.add_short(text)
    found.add("type=volume,src=data,dst=/d,ro")
    assert [(one.name, one.destination, one.readonly, one.copy) for one in found.volumes] == [
        ("data", "/a", False, True),
        ("data", "/b", True, False),
        ("", "/c", False, True),
        ("data", "/d", True, True),
    ]
    for text, message in (
        ("data:/a:rshared", "no option 'rshared'"),
        ("data:a", "absolute"),
        ("da ta:/a", "cannot be a volume's name"),
        ("data:/a:ro:rw", "malformed"),
        ("data:/a:ro,rw", "malformed"),
    ):
        with pytest.raises(UsageError, match=message):
            found.add_short(text)
