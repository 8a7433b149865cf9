"""Which root file systems become disks, and what is done about those that cannot."""

from __future__ import annotations

import asyncio
import os
import shutil
from pathlib import Path
from typing import Any

import pytest

from kata import sysio
from kata.engine.containers import rootfs, snapshot_root
from kata.engine.hostns import Namespaces
from kata.engine.tasks import Tasks
from kata.errors import KataError
from kata.journal import Journal
from kata.proto.agentext_pb import LayerEntry, LayerPart, ReadLayerResponse
from kata.proto.task_pb import Mount
from kata.settings import SnapshotSettings

OVERLAY = ["index=off", "workdir=/s/3/work", "upperdir=/s/3/fs", "lowerdir=/s/2/fs:/s/1/fs"]


def test_the_directories_of_an_overlay() -> None:
    found = snapshot_root.layers_of([Mount(type="overlay", source="overlay", options=OVERLAY)])
    assert isinstance(found, snapshot_root.Layers)
    assert (found.lower, found.upper) == (["/s/2/fs", "/s/1/fs"], "/s/3/fs")


@pytest.mark.parametrize(
    ("mounts", "why"),
    [
        ([], "no overlay"),
        ([Mount(type="bind", source="/s/1/fs", options=["rbind", "rw"])], "no overlay"),
        ([Mount(type="overlay", options=OVERLAY), Mount(type="bind", source="/x")], "no overlay"),
        ([Mount(type="overlay", options=OVERLAY, target="below")], "no overlay"),
        ([Mount(type="overlay", options=[*OVERLAY, "userxattr"])], "userxattr"),
        ([Mount(type="overlay", options=[*OVERLAY, "redirect_dir=on"])], "redirect_dir=on"),
        ([Mount(type="overlay", options=[*OVERLAY, "uidmap=0:1000:1"])], "uidmap"),
        ([Mount(type="overlay", options=["lowerdir=/s/2:/s/1", "ro"])], "mounted with ro"),
        ([Mount(type="overlay", options=["lowerdir=/s/2:/s/1"])], "one to write to"),
        ([Mount(type="overlay", options=["lowerdir=l/A:l/B", "upperdir=u", "workdir=w"])], "directories"),
        ([Mount(type="overlay", options=["lowerdir=/a\\:b", "upperdir=/u", "workdir=/w"])], "lowerdir"),
        ([Mount(type="overlay", options=["lowerdir=/a::/b", "upperdir=/u", "workdir=/w"])], "directories"),
    ],
)
def test_what_stays_shared(mounts: list[Mount], why: str) -> None:
    found = snapshot_root.layers_of(mounts)
    assert isinstance(found, str)
    assert why in found


def test_for_whom_it_is() -> None:
    def of(kind: str, annotation: str = "io.kubernetes.cri.container-type") -> dict[str, Any]:
        return {"annotations": {annotation: kind}}

    wanted = snapshot_root.is_wanted
    assert wanted("auto", of("container"))
    assert not wanted("auto", of("sandbox"))
    assert not wanted("block", of("sandbox"))
    assert not wanted("auto", {})
    assert wanted("block", {})


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root")
def test_what_only_the_host_sees_is_noticed(tmp_path: Path) -> None:
    (tmp_path / "layer").mkdir()
    child = os.fork()
    if child == 0:
        ok = False
        try:
            host = Namespaces()
            ok = host.are_seen_here([str(tmp_path / "layer"), "/"])
            sysio.unshare(sysio.CLONE_NEWNS)
            sysio.mount(None, "/", None, sysio.MS_REC | sysio.MS_PRIVATE)
            # The other way round is the same: a mount that one of the two does not have.
            sysio.mount("tmpfs", str(tmp_path / "layer"), "tmpfs")
            ok = ok and not host.are_seen_here(["/", str(tmp_path / "layer")])
        finally:
            os._exit(0 if ok else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


class Guest:
    """An agent that answers what it is told to; a machine with it, and nothing else of an engine."""

    def __init__(self, *answers: ReadLayerResponse | KataError) -> None:
        self.answers = list(answers)
        self.asked: list[bytes] = []
        self.living_agent = self
        self.vm = None

    async def signal_all(self, container_id: str, number: int) -> None:
        raise KataError("process already finished")

    async def read_layer(self, directory: str, position: bytes, timeout_s: float) -> ReadLayerResponse:
        assert directory == rootfs.upper_path("c1")
        self.asked.append(position)
        answer = self.answers.pop(0) if len(self.answers) > 1 else self.answers[0]
        if isinstance(answer, KataError):
            raise answer
        return answer


def carried(tmp_path: Path, guest: Guest) -> tuple[Path, list[str]]:
    """Carry back what a guest sends: the upper directory, and what the log has."""
    upper, journal = tmp_path / "fs", Journal.create(str(tmp_path / "journal"), {})
    upper.mkdir()
    said: list[str] = []

    class Told(Tasks):
        """Keeps the log's lines."""

        def log(self, text: str, level: str = "warning") -> None:
            said.append(text)

    async def run() -> None:
        tasks = Told("s1")
        runtime: Any = guest
        disks: Any = None
        root = snapshot_root.SnapshotRoot(
            "c1", runtime, tasks, journal, disks, SnapshotSettings(upper_mib=16)
        )
        root._make_disk(str(upper))
        await root.carry_back({"process": {}})
        await root.carry_back({"process": {}})  # the second time does nothing
        await root.remove()

    asyncio.run(run())
    assert [entry for entry in journal.entries if not entry.gone] == []
    journal.close()
    return upper, said


def part(path: bytes, mode: int = 0o100644, **more: Any) -> LayerPart:
    return LayerPart(entry=LayerEntry(path=path, mode=mode, **more))


TOP = part(b"", 0o040755)
HALF = ReadLayerResponse(parts=[TOP, part(b"one")], next=b"x")


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root")
class TestCarryBack:
    """From an agent's answers to a directory."""

    def test_in_parts(self, tmp_path: Path) -> None:
        guest = Guest(HALF, ReadLayerResponse(parts=[part(b"two")]), KataError("once is enough"))
        upper, said = carried(tmp_path, guest)
        assert sorted(os.listdir(upper)) == ["one", "two"]
        assert (guest.asked, said) == ([b"", b"x"], [])

    @pytest.mark.parametrize(
        "then",
        [
            KataError("gone"),
            ReadLayerResponse(parts=[part(b"../out")]),
            ReadLayerResponse(parts=[part(snapshot_root.DISK_NAME.encode())]),
            ReadLayerResponse(next=b"for ever"),
            ReadLayerResponse(parts=[TOP], next=b"x"),
        ],
    )
    def test_all_or_nothing(self, tmp_path: Path, then: ReadLayerResponse | KataError) -> None:
        upper, said = carried(tmp_path, Guest(HALF, then))
        assert os.listdir(upper) == []
        assert any("what it has written is lost" in line for line in said)
        assert not (tmp_path / "out").exists()

    def test_an_upper_directory_that_has_gone(self, tmp_path: Path) -> None:
        class Removes(Guest):
            async def signal_all(self, container_id: str, number: int) -> None:
                shutil.rmtree(tmp_path / "fs")

        _, said = carried(tmp_path, Removes(HALF))
        assert any("what it has written is lost" in line and "No such file" in line for line in said)

    def test_a_slow_guest_is_given_up(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(snapshot_root, "_BACK_FREE_S", -1.0)
        numbers = iter(range(1_000_000))

        class Endless(Guest):
            async def read_layer(
                self, directory: str, position: bytes, timeout_s: float
            ) -> ReadLayerResponse:
                number = next(numbers)
                return ReadLayerResponse(parts=[part(b"%d" % number) if number else TOP], next=b"x")

        upper, said = carried(tmp_path, Endless(KataError("")))
        assert os.listdir(upper) == []
        assert any("too slow" in line for line in said)

    def test_millions_of_files_leave_room_for_others(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """The helper thread removes them in turns; here it has time for none in the first ones."""
        monkeypatch.setattr(snapshot_root, "_DISCARD_S", -1.0)
        turns: list[str] = []
        some = snapshot_root.SnapshotRoot._discard_some

        def discard_some(root: snapshot_root.SnapshotRoot) -> str:
            if len(turns) == 3:
                monkeypatch.setattr(snapshot_root, "_DISCARD_S", 5.0)
            turns.append(some(root))
            return turns[-1]

        monkeypatch.setattr(snapshot_root.SnapshotRoot, "_discard_some", discard_some)
        upper, _ = carried(tmp_path, Guest(HALF, KataError("gone")))
        assert turns == ["out of time", "out of time", "out of time", ""]
        assert os.listdir(upper) == []

    def test_who_dies_meanwhile_leaves_an_empty_directory(self, tmp_path: Path) -> None:
        from kata import journal_undo

        upper = tmp_path / "fs"
        upper.mkdir()
        child = os.fork()
        if child == 0:
            try:
                journal = Journal.create(str(tmp_path / "journal"), {})
                nothing: Any = None
                root = snapshot_root.SnapshotRoot(
                    *("c1", nothing, nothing, journal, nothing, SnapshotSettings(upper_mib=16))
                )
                root._make_disk(str(upper))
                (upper / "half").mkdir()
                (upper / "half/file").write_text("x")
            finally:
                os._exit(0)
        os.waitpid(child, 0)
        assert sorted(os.listdir(upper)) == [snapshot_root.DISK_NAME, "half"]
        assert journal_undo.undo(Journal.open(str(tmp_path / "journal"))) == []
        assert os.listdir(upper) == []
