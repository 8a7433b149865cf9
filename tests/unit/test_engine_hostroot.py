"""Root file systems that are mounted from what a snapshotter says, in a mount namespace of the tests'. Needs root."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from apart import in_mounts

from kata import journal_undo, mount_table
from kata.engine.containers import hostroot
from kata.engine.containers.hostroot import HostRoot
from kata.errors import HostError, UnsupportedError
from kata.journal import Journal
from kata.proto.task_pb import Mount

needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="mounting needs root")


def made(directory: Path, *mounts: Mount) -> tuple[HostRoot, Journal]:
    journal = Journal.create_dir(str(directory), "run", {"client": "kata", "id": "s1"})
    return HostRoot(str(directory / "root"), mounts, journal), journal


def mounted_at(path: Path) -> list[str]:
    return [entry.fstype for entry in mount_table.mounts() if entry.target == str(path)]


def layers(directory: Path, count: int, name: str = "layer") -> str:
    """An overlay's lower directories, each with a file that has its number."""
    paths = [directory / f"{name}{number}" for number in range(count)]
    for number, path in enumerate(paths):
        path.mkdir(parents=True)
        (path / f"file{number}").write_text(str(number))
    return "lowerdir=" + ":".join(map(str, paths))


@needs_root
def test_an_overlay_and_a_bind_mount_over_it(tmp_path: Path) -> None:
    (tmp_path / "upper").mkdir()
    (tmp_path / "work").mkdir()
    (tmp_path / "over").mkdir()
    (tmp_path / "over/from the bind").touch()
    overlay = Mount(
        type="overlay",
        source="overlay",
        options=[layers(tmp_path, 2), f"upperdir={tmp_path}/upper", f"workdir={tmp_path}/work"],
    )
    bind = Mount(type="bind", source=str(tmp_path / "over"), options=["rbind", "ro"])

    def work() -> None:
        root, journal = made(tmp_path, overlay, bind)
        assert root.disk is None
        assert not root.mounted_by_host
        root.mount()
        assert mounted_at(tmp_path / "root")[0] == "overlay"
        assert len(mounted_at(tmp_path / "root")) == 2
        assert os.listdir(tmp_path / "root") == ["from the bind"]
        with pytest.raises(OSError, match="Read-only"):
            (tmp_path / "root/new").touch()
        root.unmount()
        root.unmount()
        assert mounted_at(tmp_path / "root") == []
        # What its owner no longer takes off, the journal does.
        root.mount()
        assert journal_undo.undo(journal) == []
        assert mounted_at(tmp_path / "root") == []

    in_mounts(work)


@needs_root
def test_a_mount_that_is_refused_takes_those_before_it_off_again(tmp_path: Path) -> None:
    first = Mount(type="tmpfs", source="tmpfs", options=["size=1m"])
    second = Mount(type="bind", source=str(tmp_path / "none"), options=["rbind"])

    def work() -> None:
        root, journal = made(tmp_path, first, second)
        with pytest.raises(HostError, match=f"on {tmp_path}/root: No such file or directory") as refused:
            root.mount()
        assert "dmesg" in refused.value.hint
        assert mounted_at(tmp_path / "root") == []
        assert journal_undo.undo(journal) == []

    in_mounts(work)


@needs_root
def test_more_layers_than_a_page_has_room_for(tmp_path: Path) -> None:
    """Their paths are given relative to what they have in common, and our own working directory stays."""
    base = tmp_path / ("long" * 40)
    options = layers(base, 40)
    assert len(options) > hostroot._PAGE
    here = os.getcwd()

    def work() -> None:
        root, _ = made(tmp_path, Mount(type="overlay", source="overlay", options=[options]))
        root.mount()
        assert len(os.listdir(tmp_path / "root")) == 40
        assert os.getcwd() == here
        root.unmount()

    in_mounts(work)
    (base / "broken").touch()
    broken = options.replace(f"{base}/layer7", f"{base}/broken")

    def refused() -> None:
        root, _ = made(tmp_path / "again", Mount(type="overlay", source="overlay", options=[broken]))
        with pytest.raises(HostError):
            root.mount()

    (tmp_path / "again").mkdir()
    in_mounts(refused)


def test_options_that_no_page_holds_are_named(tmp_path: Path) -> None:
    paths = ":".join(f"/{'deep/' * 20}{number}/{'x' * 200}" for number in range(40))
    root, _ = made(tmp_path, Mount(type="overlay", source="overlay", options=[f"lowerdir={paths}"]))
    with pytest.raises(HostError, match="bytes long, and 4096 fit") as refused:
        root.mount()
    assert "fewer" in refused.value.hint


def test_what_cannot_be_mounted_here_is_named(tmp_path: Path) -> None:
    root, _ = made(tmp_path, Mount(type="bind", source="/", target="below", options=["rbind"]))
    with pytest.raises(UnsupportedError, match="'below'"):
        root.mount()


def test_one_that_is_there_already_is_left_alone(tmp_path: Path) -> None:
    root, journal = made(tmp_path)
    assert root.mounted_by_host
    root.mount()
    assert (tmp_path / "root").is_dir()
    root.unmount()
    journal.close()


def test_options_are_made_relative_to_what_their_paths_have_in_common() -> None:
    assert hostroot._shortened(["lowerdir=/a/b/1:/a/b/2", "upperdir=/a/c", "index=off"]) == (
        "/a",
        "lowerdir=b/1:b/2,upperdir=c,index=off",
    )
    assert hostroot._shortened(["lowerdir=rel:/a"]) == ("", "lowerdir=rel:/a")
    assert hostroot._shortened(["size=1m"]) == ("", "size=1m")
