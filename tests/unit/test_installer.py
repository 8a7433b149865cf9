"""What `make install` refuses, and that removal takes exactly what was installed."""

from __future__ import annotations

import importlib.util
import json
import os
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def installer(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    spec = importlib.util.spec_from_file_location("installer", ROOT / "tools" / "installer.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)

    def fill(tree: Path) -> None:  # the real one asks pip; tests/vm/test_install.py runs it
        (tree / "site-packages" / "kata").mkdir(parents=True)
        (tree / "site-packages" / "kata" / "__main__.py").write_text("#!/usr/bin/python3 -IS\n")
        (tree / "share/man/man1").mkdir(parents=True)
        (tree / "share/man/man1/kata.1").write_text(f".TH of {tree.name}\n")
        if "1-a" in tree.name:
            (tree / "share/man/man1/kata-old.1").touch()

    monkeypatch.setattr(module, "fill", fill)
    return module


def program(path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("#!/bin/sh\n")
    path.chmod(0o755)


def everything(directory: Path) -> set[str]:
    return {str(path.relative_to(directory)) for path in directory.rglob("*")}


@pytest.mark.parametrize("name", ["containerd-shim-kata-v2", "kata-runtime", "kata"])
def test_another_katas_program_on_the_path_is_found(
    installer: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    program(tmp_path / "bin" / name)
    monkeypatch.setenv("PATH", f"{tmp_path}/bin:/usr/bin:/bin")
    place = installer.Place(str(tmp_path / "prefix"), "")
    assert str(tmp_path / "bin" / name) in installer.other_katas(place)
    with pytest.raises(installer.Refusal, match="another Kata is on this machine") as caught:
        installer.check_machine(place, force=False)
    assert "FORCE=1" in caught.value.hint
    installer.check_machine(place, force=True)


def test_sandboxes_of_another_kata_are_told_from_ours(installer: ModuleType, tmp_path: Path) -> None:
    run, vc = tmp_path / "kata", tmp_path / "vc"
    for directory in (run / "sandboxes/one", run / "boots", run / "one", vc / "sbs/one"):
        directory.mkdir(parents=True)
    for link in (run / "one", vc / "sbs/one"):
        (link / "shim-monitor.sock").symlink_to(run / "sandboxes/one/shim-monitor.sock")
    assert installer.other_sandboxes(str(run), str(vc)) == []
    for directory in (run / "other", vc / "vm", vc / "sbs/other"):
        directory.mkdir()
    assert installer.other_sandboxes(str(run), str(vc)) == [
        f"{run}, which has other",
        f"{vc}, which has vm",
        f"{vc}/sbs, which has other",
    ]
    assert installer.other_sandboxes(str(tmp_path / "none"), str(tmp_path / "none")) == []


def test_our_own_program_on_the_path_is_no_other_kata(
    installer: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    program(tmp_path / "prefix/lib/kata/1/site-packages/kata/__main__.py")
    (tmp_path / "prefix/bin").mkdir()
    (tmp_path / "prefix/bin/kata").symlink_to("../lib/kata/1/site-packages/kata/__main__.py")
    monkeypatch.setenv("PATH", f"{tmp_path}/prefix/bin:/usr/bin:/bin")
    place = installer.Place(str(tmp_path / "prefix"), "")
    assert not [found for found in installer.other_katas(place) if str(tmp_path) in found]


def test_install_twice_then_uninstall_leaves_nothing(
    installer: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    place = installer.Place("/usr", str(tmp_path / "stage"))
    (tmp_path / "stage/usr/bin").mkdir(parents=True)
    program(tmp_path / "stage/usr/bin/other")
    before = everything(tmp_path)
    installer.install(place, "auto", dry_run=False)
    first = everything(tmp_path)
    link = tmp_path / "stage/usr/bin/kata"
    assert link.resolve().name == "__main__.py"
    assert os.access(link.resolve().parent, os.X_OK)
    page = tmp_path / "stage/usr/share/man/man1/kata.1"
    assert page.is_symlink()
    assert ".TH" in page.read_text()
    service = tmp_path / "stage/usr/lib/systemd/system/kata-monitor.service"
    assert service.is_symlink()
    assert "\nExecStart=/usr/bin/kata-monitor " in service.read_text()
    installer.install(place, "auto", dry_run=False)
    assert everything(tmp_path) == first
    assert "already there" in capsys.readouterr().err
    installer.uninstall(place, force=False, purge=True, dry_run=False)
    assert everything(tmp_path) == before | {"stage/usr/lib"}


def test_a_new_version_replaces_the_old_one(
    installer: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    place = installer.Place("/usr", str(tmp_path))
    versions = iter(["1-a", "2-b"])
    monkeypatch.setattr(installer, "digest", lambda: next(versions))
    installer.install(place, "auto", dry_run=False)
    installer.install(place, "auto", dry_run=False)
    assert sorted(path.name for path in (tmp_path / "usr/lib/kata").iterdir()) == ["2-b", "manifest.json"]
    assert "/2-b/" in os.readlink(tmp_path / "usr/bin/kata")
    # Its pages as well, and those that it has not are gone.
    pages = tmp_path / "usr/share/man/man1"
    assert [path.name for path in pages.iterdir()] == ["kata.1"]
    assert "2-b" in (pages / "kata.1").read_text()


def test_removal_leaves_directories_that_were_there(installer: ModuleType, tmp_path: Path) -> None:
    place = installer.Place("/usr", str(tmp_path))
    (tmp_path / "usr/share/man").mkdir(parents=True)
    installer.install(place, "auto", dry_run=False)
    assert (tmp_path / "usr/share/man/man1/kata.1").exists()
    others = tmp_path / "usr/bin/other"
    program(others)
    installer.uninstall(place, force=False, purge=False, dry_run=False)
    assert (tmp_path / "usr/share/man").is_dir()
    assert not (tmp_path / "usr/share/man/man1").exists()
    assert others.exists()


def test_an_installation_from_before_there_were_pages(installer: ModuleType, tmp_path: Path) -> None:
    place = installer.Place("/usr", str(tmp_path))
    installer.install(place, "auto", dry_run=False)
    manifest = json.loads(place.manifest.read_text())
    del manifest["directories"]
    place.manifest.write_text(json.dumps(manifest))
    installer.install(place, "auto", dry_run=False)
    installer.uninstall(place, force=False, purge=False, dry_run=False)
    assert not [path for path in tmp_path.rglob("*") if not path.is_dir()]


def test_an_old_version_that_still_runs_stays(
    installer: ModuleType,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    place = installer.Place("/usr", str(tmp_path))
    versions = iter(["1-a", "2-b", "2-b"])
    monkeypatch.setattr(installer, "digest", lambda: next(versions))
    installer.install(place, "auto", dry_run=False)
    running: list[int] = [4711]
    monkeypatch.setattr(installer, "running_from", lambda directory: running)
    installer.install(place, "auto", dry_run=False)
    assert (tmp_path / "usr/lib/kata/1-a").is_dir()
    assert "process 4711 runs from it" in capsys.readouterr().err
    running.clear()
    installer.install(place, "auto", dry_run=False)
    assert not (tmp_path / "usr/lib/kata/1-a").exists()


def test_processes_that_run_from_a_directory_are_found(installer: ModuleType, tmp_path: Path) -> None:
    import subprocess

    program(tmp_path / "tree/x")
    (tmp_path / "tree/x").write_text("import sys; print(flush=True); sys.stdin.read()")
    with subprocess.Popen(
        ["/usr/bin/python3", tmp_path / "tree/x"], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as child:
        assert child.stdout is not None
        child.stdout.readline()
        assert installer.running_from(str(tmp_path / "tree")) == [child.pid]
        child.communicate(b"")
    assert installer.running_from(str(tmp_path / "tree")) == []


def test_a_dry_run_changes_nothing(
    installer: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    place = installer.Place("/usr", str(tmp_path))
    installer.install(place, "auto", dry_run=True)
    assert everything(tmp_path) == set()
    assert "/usr/bin/kata ->" in capsys.readouterr().out
    installer.install(place, "auto", dry_run=False)
    before = everything(tmp_path)
    installer.uninstall(place, force=False, purge=False, dry_run=True)
    assert everything(tmp_path) == before


def test_a_link_that_was_pointed_elsewhere_stays(installer: ModuleType, tmp_path: Path) -> None:
    place = installer.Place("/usr", str(tmp_path))
    installer.install(place, "auto", dry_run=False)
    link = tmp_path / "usr/bin/kata"
    link.unlink()
    link.symlink_to("/opt/other/kata")
    installer.uninstall(place, force=False, purge=False, dry_run=False)
    assert os.readlink(link) == "/opt/other/kata"


@pytest.mark.parametrize("text", ["", "[]", '{"trees": 1}', "{"])
def test_a_broken_manifest_is_one_sentence(installer: ModuleType, tmp_path: Path, text: str) -> None:
    place = installer.Place("/usr", str(tmp_path))
    place.manifest.parent.mkdir(parents=True)
    place.manifest.write_text(text)
    with pytest.raises(installer.Refusal, match="cannot be read"):
        installer.load_manifest(place)


def test_uninstalling_nothing_says_so(installer: ModuleType, tmp_path: Path) -> None:
    with pytest.raises(installer.Refusal, match="nothing is installed below"):
        installer.uninstall(installer.Place(str(tmp_path), ""), force=False, purge=False, dry_run=False)


def real_prefix(installer: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """An installation without DESTDIR, with directories of its own."""
    for name in ("RUN", "STATE", "CACHE"):
        directory = tmp_path / name.lower()
        directory.mkdir()
        monkeypatch.setenv(f"KATA_{name}_DIR", str(directory))
    place = installer.Place(str(tmp_path / "prefix"), "")
    (tmp_path / "state/images").mkdir()
    guest = tmp_path / "state/guest"
    guest.mkdir()
    (guest / "vmlinux").write_text("")
    (tmp_path / "prefix/lib/kata/1").mkdir(parents=True)
    place.manifest.write_text(
        json.dumps({"trees": [f"{place.library}/1"], "links": [], "guest": [f"{guest}/vmlinux"]})
    )
    return place


def test_uninstall_refuses_while_a_sandbox_is_there(
    installer: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    place = real_prefix(installer, tmp_path, monkeypatch)
    (tmp_path / "run/sandboxes/abc").mkdir(parents=True)
    with pytest.raises(installer.Refusal, match="1 sandboxes are still there: abc"):
        installer.uninstall(place, force=False, purge=False, dry_run=False)
    assert place.manifest.exists()


def test_uninstall_keeps_images_unless_told(
    installer: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    place = real_prefix(installer, tmp_path, monkeypatch)
    (tmp_path / "run/noted-software-emulation").touch()
    installer.uninstall(place, force=False, purge=False, dry_run=False)
    assert (tmp_path / "state/images").is_dir()
    assert not (tmp_path / "state/guest").exists()
    assert not (tmp_path / "run").exists()
    assert not (tmp_path / "prefix/lib/kata").exists()


def test_purge_removes_state_and_cache(
    installer: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    place = real_prefix(installer, tmp_path, monkeypatch)
    installer.uninstall(place, force=False, purge=True, dry_run=False)
    assert not (tmp_path / "state").exists()
    assert not (tmp_path / "cache").exists()


def test_who_stages_it_is_told_that_the_guest_is_missing_and_who_packages_it_is_not(
    installer: ModuleType,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    (tmp_path / "a/usr").mkdir(parents=True)
    installer.install(installer.Place("/usr", str(tmp_path / "a")), "auto", dry_run=False)
    assert "guest" not in "".join(capsys.readouterr())  # tools/dist.py puts one in
    (tmp_path / "b/usr").mkdir(parents=True)
    words = ["install", "--prefix", "/usr", "--destdir", str(tmp_path / "b"), "--force"]
    monkeypatch.setattr("sys.argv", ["installer", *words])
    assert installer.main() == 0
    assert "the guest is not part of it" in "".join(capsys.readouterr())
