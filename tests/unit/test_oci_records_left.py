"""What `kata gc` removes of the OCI command line's records, and what it leaves alone."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from kata import paths, sysio
from kata.engine import oci_records
from kata.oci_runtime.records import Record


@pytest.fixture(autouse=True)
def run_dir(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("KATA_RUN_DIR", str(tmp_path / "r"))
    (tmp_path / "r").mkdir()
    return tmp_path


def container(root: str, name: str, top: Path, *, bundle: bool = False, pid: int = 0) -> Path:
    record = Record(root, name)
    record.reserve().close()
    record.bundle = str(top / f"bundle-{name}")
    record.sandbox = str(top / "r/sandboxes" / name)
    record.pid = pid
    record.started = sysio.proc_starttime(pid) or 0 if pid else 0
    record.write()
    if bundle:
        os.mkdir(record.bundle)
        (Path(record.bundle) / "config.json").write_text("{}")
    return Path(record.directory)


def test_what_nobody_can_want_any_more(run_dir: Path) -> None:
    other = str(run_dir / "elsewhere")
    for root in (paths.oci_dir(), other):
        oci_records.register(root)
        oci_records.register(root)
        gone = container(root, "gone", run_dir)
        (gone / "pid.sock").write_text("")
        kept = [
            container(root, "bundle", run_dir, bundle=True),
            container(root, "process", run_dir, pid=os.getpid()),
            container(root, "engine", run_dir),
        ]
        (run_dir / "r/sandboxes/engine").mkdir(parents=True, exist_ok=True)
        unfinished, killed = Record(root, "unfinished"), Record(root, "killed")
        held = unfinished.reserve()
        killed.reserve().close()
        assert oci_records.sweep() == ["the record of container gone", "the record of container killed"]
        assert not gone.exists()
        assert all(path.exists() for path in (*kept, Path(unfinished.directory)))
        for path in kept:
            (path / "state.json").unlink()
            path.rmdir()
        held.close()
        os.rmdir(unfinished.directory)
        if (run_dir / "bundle-bundle").exists():
            (run_dir / "bundle-bundle/config.json").unlink()
            (run_dir / "bundle-bundle").rmdir()
    assert [os.readlink(link) for link in (run_dir / "r/oci-roots").iterdir()] == [other]
    assert oci_records.sweep() == []
    assert list((run_dir / "r/oci-roots").iterdir()) == [], "a root without a container is forgotten"


def test_a_directory_that_others_may_write_to_is_left_alone(run_dir: Path) -> None:
    """Root's `kata gc` follows nobody else's links, and removes nothing that somebody else could have put there."""
    root = str(run_dir / "open")
    oci_records.register(root)
    gone = container(root, "gone", run_dir)
    os.chmod(root, 0o777)
    assert oci_records.sweep() == []
    assert gone.exists()
    os.chmod(root, 0o700)
    os.rename(gone, run_dir / "aside")
    os.symlink(run_dir / "aside", gone)
    assert oci_records.sweep() == []
    assert (run_dir / "aside/state.json").exists()
