"""`kata rename`, `tag`, `history`, `load`, `info`, `prune` on stores and records made for them, without machines."""

from __future__ import annotations

import gzip
import io
import json
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from image_support import MOUNT_POINTS, Erofs, docker_save, layer, member

from kata import journal
from kata.cli import main, records
from kata.errors import AlreadyExistsError, NotFoundError
from kata.images import platform, store
from kata.images.resolve import resolve

ONE = layer(member("one", content=b"1"))
TWO = layer(member("two", content=b"2"))


@pytest.fixture(autouse=True)
def state(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("KATA_STATE_DIR", str(tmp_path / "s"))
    monkeypatch.setenv("KATA_RUN_DIR", str(tmp_path / "r"))
    monkeypatch.setattr("os.geteuid", lambda: 0)
    monkeypatch.setattr(platform, "host", lambda: platform.Platform("linux", "amd64"))
    return tmp_path / "s"


def make(name: str, image: str = "", **more: object) -> records.Container:
    pending = records.PendingContainer(name)
    record = {
        "id": pending.id, "name": pending.name, "created_at": records.now(), "auto_remove": False, "labels": {},
        "image": {"reference": "x", "id": image}, **more,
    }  # fmt: skip
    return pending.commit(record, {"process": {}})


def said(capsys: pytest.CaptureFixture[str], *words: str, status: int = 0) -> str:
    assert main.main(list(words)) == status
    out = capsys.readouterr()
    return out.out if status == 0 else out.err


def test_rename(state: Path, capsys: pytest.CaptureFixture[str]) -> None:
    box = make("before")
    make("taken")
    assert said(capsys, "rename", "before", "after") == ""
    assert records.find("after").id == box.id
    assert records.find(box.id).name == "after"
    with pytest.raises(NotFoundError):
        records.find("before")
    with pytest.raises(AlreadyExistsError, match="is taken"):
        records.rename(records.find("after"), "taken")
    with pytest.raises(AlreadyExistsError, match="that name already"):
        records.rename(records.find("after"), "after")
    told = said(capsys, "container", "rename", "after", "a/b", status=125)
    assert "kata rename: 'a/b' cannot be a container's name" in told
    make("before")  # the name is free again
    records.remove(records.find("after"))
    assert sorted(path.name for path in (state / "names").iterdir()) == ["before", "taken"]
    assert journal.find(str(state / "containers"))


def test_load_tag_history_and_untag(
    state: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    archive = docker_save(
        tmp_path / "both.tar",
        [
            {"layers": [ONE], "tags": ["box:1", "box:2"]},
            {"layers": [ONE, TWO], "tags": ["other.example/two:latest"]},
        ],
    )
    assert said(capsys, "load", "-q", "-i", str(archive)).splitlines() == [
        "Loaded image: box:1",
        "Loaded image: box:2",
        "Loaded image: other.example/two:latest",
    ]
    assert sorted(name for image in store.list_images() for name in image.names) == [
        "docker.io/library/box:1", "docker.io/library/box:2", "other.example/two:latest",
    ]  # fmt: skip
    assert said(capsys, "image", "tag", "box:1", "mine/box") == ""
    assert resolve("mine/box", pull="never").id == resolve("box:2", pull="never").id
    assert "no name of an image" in said(capsys, "tag", "box:1", "oci:/x", status=125)
    assert "cannot have a digest" in said(capsys, "tag", "box:1", f"a@sha256:{'0' * 64}", status=125)
    assert "there is no image" in said(capsys, "tag", "nobody", "a", status=125)
    assert "Untagged: docker.io/mine/box:latest" in said(capsys, "image", "rm", "mine/box")
    # The same from standard input leaves nothing but the image.
    monkeypatch.setattr(
        sys, "stdin", SimpleNamespace(buffer=io.BytesIO(archive.read_bytes()), isatty=lambda: False)
    )
    assert "Loaded image: box:1" in said(capsys, "load", "-q")
    assert not list((state / "images/rootfs").glob("*.tmp"))
    assert "is no file" in said(capsys, "load", "-i", str(tmp_path / "none.tar"), status=125)
    (tmp_path / "text.tar").write_text("no archive")
    assert "hint: " in said(capsys, "load", "-i", str(tmp_path / "text.tar"), status=125)
    table = said(capsys, "history", "box:1")
    assert table.splitlines()[0].split() == ["IMAGE", "CREATED", "CREATED", "BY", "SIZE", "COMMENT"]


def test_prune(
    state: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    archive = docker_save(
        tmp_path / "a.tar", [{"layers": [ONE], "tags": ["box:1"]}, {"layers": [TWO], "tags": ["two:1"]}]
    )
    said(capsys, "load", "-qi", str(archive))
    used = store.find("box:1").id
    keep, gone = make("keep", used, labels={"kind": "kept"}), make("gone", used)
    waiting = make("waiting", used, made_to_run=True)
    answer = SimpleNamespace(readline=lambda: "n\n")
    monkeypatch.setattr(sys, "stdin", answer)
    assert said(capsys, "container", "prune").endswith("[y/N] ")
    assert len(records.all_containers()) == 3
    shown = said(capsys, "container", "prune", "-f", "--filter", "label=kind=kept")
    assert shown.startswith(f"Deleted Containers:\n{keep.id}\n\nTotal reclaimed space: ")
    assert said(capsys, "image", "prune", "-f") == "Total reclaimed space: 0B\n"
    shown = said(capsys, "image", "prune", "-af")
    assert "untagged: docker.io/library/two:1\ndeleted: sha256:" in shown
    assert [image.names for image in store.list_images()] == [["docker.io/library/box:1"]]
    answer.readline = lambda: "y\n"
    shown = said(capsys, "system", "prune")
    assert gone.id in shown
    assert waiting.id not in shown
    assert [one.name for one in records.all_containers()] == ["waiting"]
    assert said(capsys, "prune", "container", "-a", status=125)


def test_info(capsys: pytest.CaptureFixture[str]) -> None:
    make("one")
    assert (
        said(capsys, "info", "--format", "{{.Containers}} {{.ContainersRunning}} {{.Images}}") == "1 0 0\n"
    )
    assert json.loads(said(capsys, "system", "info", "-f", "json"))["ContainersStopped"] == 1
    assert "Containers: 1\n Running: 0\n" in said(capsys, "info")
    assert "Machines Waiting" not in said(capsys, "info")


def test_info_of_the_warm_pool(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    one = {"name": "x", "pid": 1, "machine_pid": 2, "since": 0.0, "bytes": 50 << 20}
    monkeypatch.setattr("kata.engine.factory.pool.listed", lambda: [one, one])
    assert "Machines Waiting: 2\n Memory: 100MiB\n" in said(capsys, "info")
    wanted = "{{.MachinesWaiting}} {{.MachinesWaitingMemory}}"
    assert said(capsys, "info", "--format", wanted) == f"2 {100 << 20}\n"


def test_all_of_them(capsys: pytest.CaptureFixture[str]) -> None:
    one, two = make("one"), make("two")
    assert said(capsys, "stop", "-a") == ""
    assert set(said(capsys, "rm", "-a").split()) == {one.id, two.id}
    assert records.all_containers() == []
    assert said(capsys, "rm", "-a") == ""


def test_import(
    state: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    tar = tmp_path / "root.tar.gz"
    tar.write_bytes(gzip.compress(ONE))
    changes = (
        'CMD ["/one", "x"]',
        "ENV A=b c",
        "LABEL kind=test",
        "EXPOSE 80 53/udp",
        "WORKDIR /w",
        "entrypoint run it",
    )
    words = [word for text in changes for word in ("-c", text)]
    identity = said(capsys, "import", "-q", *words, "-m", "by hand", str(tar), "mine/root:1").strip()
    image = store.find("mine/root:1")
    assert image.id == identity
    assert image.names == ["docker.io/mine/root:1"]
    assert image.config == {
        "Cmd": ["/one", "x"], "Env": ["A=b c"], "Labels": {"kind": "test"}, "WorkingDir": "/w",
        "ExposedPorts": {"80/tcp": {}, "53/udp": {}}, "Entrypoint": ["/bin/sh", "-c", "run it"],
    }  # fmt: skip
    assert set(Erofs(Path(image.rootfs_path)).tree()) - {"", *MOUNT_POINTS} == {"one"}
    assert "by hand" in said(capsys, "history", "mine/root:1")
    monkeypatch.setattr(sys, "stdin", SimpleNamespace(buffer=io.BytesIO(TWO), isatty=lambda: False))
    nameless = said(capsys, "import", "-q", "-").strip()
    assert store.find(nameless).names == []
    assert not list((state / "images/rootfs").glob("*.tmp"))
    for bad, message in (
        (["-c", "RUN true", str(tar)], "RUN is not offered"),
        (["-c", "CMD [1]", str(tar)], "no list of strings"),
        (["-c", "ENV A", str(tar)], "is not ENV KEY=VALUE"),
        (["-c", "CMD", str(tar)], "has no value"),
        (["https://example.org/x.tar"], "fetches nothing"),
        ([str(tmp_path / "none.tar")], "cannot be read"),
        ([str(tar), "Bad:Name:x"], "is not an image reference"),
    ):
        assert message in said(capsys, "import", "-q", *bad, status=125)
    (tmp_path / "text").write_text("this is no tar file at all " * 100)
    assert "hint: " in said(capsys, "import", "-q", str(tmp_path / "text"), status=125)
    assert not list((state / "images/rootfs").glob("*.tmp"))
