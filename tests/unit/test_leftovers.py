"""The check that tests leave nothing behind sees what it is there to see."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import leftovers
import pytest


@pytest.fixture
def ours(tmp_path: Path) -> leftovers.Ours:
    return leftovers.Ours(str(tmp_path), f"{leftovers.MARK}=of-this-test-{os.getpid()}")


@contextmanager
def process(argv: list[str], **options: object) -> Iterator[int]:
    """A process that waits; ended at the end."""
    child = subprocess.Popen(argv, stdout=subprocess.PIPE, **options)  # type: ignore[call-overload]
    try:
        assert child.stdout.readline() == b"\n"
        yield child.pid
    finally:
        child.kill()
        child.communicate()


WAITS = ["/bin/sh", "-c", "echo; read -r word", "sh"]


def new(before: dict[leftovers.Thing, str], ours: leftovers.Ours, strict: bool = False) -> list[str]:
    return leftovers.compare(before, leftovers.snapshot(), ours, strict)


def test_nothing_new_is_nothing(ours: leftovers.Ours) -> None:
    assert new(leftovers.snapshot(), ours) == []


def test_a_process_is_found_by_its_environment(ours: leftovers.Ours) -> None:
    before = leftovers.snapshot()
    name, _, value = ours.mark.partition("=")
    with process(WAITS, stdin=subprocess.PIPE, env={**os.environ, name: value}) as pid:
        found = new(before, ours)
    assert len(found) == 1
    assert found[0].startswith(f"process {pid} ")


def test_a_process_is_found_by_its_arguments(ours: leftovers.Ours) -> None:
    before = leftovers.snapshot()
    with process([*WAITS, f"{ours.directory}/x"], stdin=subprocess.PIPE):
        assert len(new(before, ours)) == 1


def test_a_process_is_found_by_an_open_file(ours: leftovers.Ours) -> None:
    before = leftovers.snapshot()
    os.mkfifo(f"{ours.directory}/fifo")
    with (
        open(os.open(f"{ours.directory}/fifo", os.O_RDWR)) as fifo,
        process(WAITS, stdin=fifo),
    ):
        assert len(new(before, ours)) == 1


def test_a_strangers_process_is_not_ours(ours: leftovers.Ours) -> None:
    before = leftovers.snapshot()
    with process([*WAITS, "qemu-system-x86_64"], stdin=subprocess.PIPE) as pid:
        assert new(before, ours) == []
        strict = new(before, ours, strict=True)
    assert any(line.startswith(f"process {pid} ") for line in strict)


@pytest.mark.skipif(os.geteuid() != 0, reason="mounting needs root")
def test_a_mount_is_found(ours: leftovers.Ours) -> None:
    before = leftovers.snapshot()
    target = Path(ours.directory) / "mounted"
    target.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "left", target], check=True)
    try:
        found = new(before, ours)
    finally:
        subprocess.run(["umount", target], check=True)
    assert found == [f"mount {target} (tmpfs from left)"]
    assert new(before, ours) == []


def test_lanes_beside_each_other_are_looked_after_as_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(leftovers, "_ENDING_S", 0.0)
    monkeypatch.setenv("CI", "true")
    monkeypatch.delenv(leftovers.BESIDE, raising=False)
    file = str(tmp_path / "before")
    assert leftovers.main("before", file) == 0
    with process([*WAITS, "qemu-system-x86_64"], stdin=subprocess.PIPE) as pid:
        assert leftovers.main("since", file) == 1
        assert f"process {pid} " in capsys.readouterr().out
        # Each of them counts only what is its own, and so does everybody on a machine that others use.
        monkeypatch.setenv(leftovers.BESIDE, "1")
        assert not leftovers.is_ours_alone()
        monkeypatch.delenv(leftovers.BESIDE)
        monkeypatch.delenv("CI")
        assert leftovers.main("since", file) == 0
    assert capsys.readouterr().out == ""


def test_files_of_the_machine_that_the_lab_runs_on_are_not_the_labs(
    ours: leftovers.Ours, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("KVM_LAB", raising=False)
    before = leftovers.snapshot()
    path = Path(f"/tmp/kt-of-another-{os.getpid()}")
    path.touch()
    try:
        line = f"temporary file {path}"
        assert line in new(before, ours, strict=True)
        monkeypatch.setenv("KVM_LAB", "1")
        assert line not in new(before, ours, strict=True)
        own = leftovers.Ours(str(path), ours.mark)
        assert line in new(before, own, strict=True)
    finally:
        path.unlink()
