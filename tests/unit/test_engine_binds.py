"""What becomes of a spec's bind mounts: which are shared live, which are memory or copies in the guest."""

from __future__ import annotations

import os
import socket
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
from test_engine_volumes import in_child, share_of

from kata import journal_undo, mount_table, sysio
from kata.cli import session
from kata.engine.containers.binds import ContainerMounts
from kata.engine.containers.spec import GUEST_RUN, GUEST_SHARE
from kata.engine.forwarding.sockets import SocketForwardingState, connected, descriptor
from kata.engine.hostns import Namespaces
from kata.journal import Journal
from kata.settings import ClientPolicy, ContainerSettings, DiskVolumeSettings
from kata.shim import start

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="mounting needs root")


@pytest.fixture
def journal(tmp_path: Path) -> Journal:
    return Journal.create_dir(str(tmp_path / "r"), "sandbox", {})


def shared(journal: Journal, policy: ClientPolicy | None = None) -> ContainerMounts:
    policy = policy or start.client_policy("default", "/bundle")
    machine = SimpleNamespace(
        host=None, share=share_of(journal), disk_addresses=["05", "06", "07", "08", "0f"]
    )
    settings, tasks = SimpleNamespace(container=None, client=policy), None
    forwarding = SocketForwardingState()
    given = (settings, SimpleNamespace(machine=machine), tasks, lambda: forwarding, "c1")
    return ContainerMounts(*(cast(Any, one) for one in given))


def bind(source: Path, destination: str, *options: str) -> dict[str, Any]:
    return {
        "type": "bind",
        "source": str(source),
        "destination": destination,
        "options": ["rbind", *options],
    }


def test_a_volume_on_a_disk_is_a_directory_of_that_disk(journal: Journal) -> None:
    def work() -> None:
        one = shared(journal)
        volumes = [
            DiskVolumeSettings(name="volume-0.img", slot=2),
            DiskVolumeSettings(name="volume-1.img", slot=4, copy=False),
        ]
        settings = cast(Any, one)._settings
        settings.container = ContainerSettings(directory="/", disk_volumes=volumes)
        mounts = [
            {"type": "bind", "source": "volume-1.img", "destination": "/b", "options": ["rbind", "ro"]},
            {"type": "bind", "source": "volume-0.img", "destination": "/a", "options": ["rbind", "rw"]},
        ]
        found = one.add_all({"mounts": mounts}, None)
        assert [(bind.source, bind.options) for bind in found] == [
            (f"{GUEST_RUN}/c1/volumes/4/data", ["rbind", "ro"]),
            (f"{GUEST_RUN}/c1/volumes/2/data", ["rbind", "rw"]),
        ]
        root = f"kata.volume.root={GUEST_RUN}/c1/rootfs"
        assert [(one.source, one.driver_options) for one in one.storages] == [
            ("0f", [root, "kata.volume.path=/b", "kata.volume.empty"]),
            ("07", [root, "kata.volume.path=/a"]),
        ]

    in_child(work)
    assert not journal_undo.undo(journal)


def test_one_source_read_only_and_writable(journal: Journal, tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()

    def work() -> None:
        one = shared(journal)
        mounts = [bind(tmp_path / "data", "/a", "ro"), bind(tmp_path / "data", "/b", "rw")]
        places = [found.source for found in one.add_all({"mounts": mounts}, None)]
        names = [place.removeprefix(f"{GUEST_SHARE}/") for place in places]
        root = Path(os.path.dirname(journal.path), "share")
        with pytest.raises(OSError, match="Read-only"):
            (root / names[0] / "x").touch()
        (root / names[1] / "x").touch()
        one.remove_all()
        assert os.listdir(root) == []

    in_child(work)
    assert not journal_undo.undo(journal)


def test_many_volumes_take_few_looks_at_the_list_of_mounts(
    journal: Journal, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sources = [tmp_path / f"v{number}" for number in range(60)]
    for source in sources:
        (source / "below").mkdir(parents=True)

    def work() -> None:
        sysio.mount("tmpfs", str(sources[7] / "below"), "tmpfs", 0, "")
        one = shared(journal)
        looks: list[str] = []
        look, look_at = mount_table.mounts, mount_table.mount_at

        def noted(target: str) -> mount_table.MountInfo | None:
            looks.append(target)
            return look_at(target)

        def noted_all() -> list[mount_table.MountInfo]:
            looks.append("all")
            return look()

        monkeypatch.setattr(mount_table, "mounts", noted_all)
        monkeypatch.setattr(mount_table, "mount_at", noted)
        found = one.add_all({"mounts": [bind(source, "/x", "ro") for source in sources]}, None)
        assert looks == ["all", "all"]
        # Read-only in the guest, too, but for the one that has a mount below, which is the host's to keep.
        assert [number for number, each in enumerate(found) if "ro" not in each.options] == [7]
        assert len({each.source for each in found}) == len(sources)
        # The journal has the identity of each.
        mine = {(entry.mount_id, entry.device) for entry in look()}
        made = [entry for entry in journal.entries if entry.kind == "mount"]
        assert all(
            entry.identity and (entry.identity["id"], entry.identity["dev"]) in mine for entry in made
        )
        one.remove_all()

    in_child(work)
    assert not journal_undo.undo(journal)


def test_memory_becomes_the_guests(journal: Journal, tmp_path: Path) -> None:
    volume = tmp_path / "pods/u/volumes/kubernetes.io~empty-dir/cache"
    part = tmp_path / "pods/u/volume-subpaths/cache/c/0"
    shm, plain = tmp_path / "shm", tmp_path / "plain"
    for directory in (volume, part, shm, plain):
        directory.mkdir(parents=True)

    def work() -> None:
        sysio.mount("tmpfs", str(volume), "tmpfs", 0, "size=1m,mode=700,uid=5,gid=6")
        (volume / ".sub").mkdir(mode=0o750)
        sysio.mount(str(volume / ".sub"), str(part), None, sysio.MS_BIND)
        sysio.mount("tmpfs", str(shm), "tmpfs", 0, "size=2m,mode=1777")
        device = cast(mount_table.MountInfo, mount_table.mount_at(str(volume))).device.replace(":", "-")
        one = shared(journal)
        mounts = [
            bind(volume, "/cache"),
            bind(part, "/part", "ro"),
            bind(shm, "/dev/shm"),
            bind(plain, "/plain"),
            # A tmpfs of the host's that is neither stays the host's.
            bind(shm, "/elsewhere"),
        ]
        found = one.add_all({"mounts": mounts}, None)
        memory = f"{GUEST_RUN}/sandbox/ephemeral/{device}"
        assert [each.source for each in found[:3]] == [memory, f"{memory}/.sub", f"{GUEST_RUN}/sandbox/shm"]
        assert all(each.source.startswith(GUEST_SHARE) for each in found[3:])
        assert found[1].options == ["rbind", "ro"]
        told = [(each.driver, each.mount_point, list(each.options)[2:]) for each in one.storages]
        sized = ["mode=700", "uid=5", "gid=6", f"size={1 << 20}"]
        assert told == [
            ("ephemeral", memory, sized),
            ("ephemeral", memory, sized),
            ("local", f"{memory}/.sub", []),
            ("ephemeral", f"{GUEST_RUN}/sandbox/shm", ["mode=1777", "uid=0", "gid=0", f"size={2 << 20}"]),
        ]
        assert one.storages[2].options == ["mode=750"]

    in_child(work)
    assert not journal_undo.undo(journal)


def test_what_changes_is_followed(journal: Journal, tmp_path: Path) -> None:
    kinds = ("configmap", "secret", "projected", "downward-api", "nfs")
    paths = [tmp_path / f"volumes/kubernetes.io~{kind}/v" for kind in kinds]
    for path in paths:
        path.mkdir(parents=True)

    def work() -> None:
        one = shared(journal)
        found = one.add_all({"mounts": [bind(path, f"/{path.parent.name}") for path in paths]}, None)
        copies = [storage.mount_point for storage in one.storages]
        assert [each.source for each in found[:4]] == copies
        assert len(set(copies)) == 4
        assert {storage.driver for storage in one.storages} == {"watchable-bind"}
        assert all(storage.source.startswith(GUEST_SHARE) for storage in one.storages)
        assert found[4].source.startswith(GUEST_SHARE)

    in_child(work)
    assert not journal_undo.undo(journal)


def test_read_only_does_not_reach_below_unless_it_is_to(journal: Journal, tmp_path: Path) -> None:
    (tmp_path / "data/below").mkdir(parents=True)

    def work() -> None:
        sysio.mount("tmpfs", str(tmp_path / "data/below"), "tmpfs", 0, "")
        one = shared(journal)
        mounts = [bind(tmp_path / "data", "/a", "ro"), bind(tmp_path / "data", "/b", "ro", "rro")]
        plain, whole = one.add_all({"mounts": mounts}, None)
        # The guest sees one mount where there are two: the host itself keeps it from writing to the upper one.
        assert plain.options == ["rbind"]
        assert whole.options == ["rbind", "ro", "rro"]
        root = Path(os.path.dirname(journal.path), "share")
        (root / os.path.basename(plain.source) / "below/x").touch()
        for path in (root / os.path.basename(plain.source), root / os.path.basename(whole.source) / "below"):
            with pytest.raises(OSError, match="Read-only"):
                (path / "y").touch()
        # Docker means it recursively; a bind that takes no mounts along has none below.
        mounts = [bind(tmp_path / "data", "/a", "ro"), bind(tmp_path / "data", "/b")]
        mounts.append({**mounts[0], "options": ["bind", "ro"]})
        other = Journal.create_dir(str(tmp_path / "m"), "sandbox", {})
        docker = start.client_policy("moby", "/bundle")
        dockers, writable, flat = shared(other, docker).add_all({"mounts": mounts}, None)
        root = Path(os.path.dirname(other.path), "share")
        assert dockers.options == ["rbind", "ro"]
        with pytest.raises(OSError, match="Read-only"):
            (root / os.path.basename(dockers.source) / "below/z").touch()
        (root / os.path.basename(writable.source) / "below/z").touch()
        with pytest.raises(OSError, match="Read-only"):
            (root / os.path.basename(flat.source) / "z").touch()
        # A person means it in any case.
        third = Journal.create_dir(str(tmp_path / "p"), "sandbox", {})
        persons = shared(third, session.client_policy()).add_all({"mounts": mounts[:1]}, None)[0]
        assert persons.options == ["rbind", "ro"]
        with pytest.raises(OSError, match="Read-only"):
            (
                Path(os.path.dirname(third.path), "share", os.path.basename(persons.source)) / "below/z"
            ).touch()

    in_child(work)
    assert not journal_undo.undo(journal)


def test_a_socket_becomes_one_of_the_guests(journal: Journal, tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(tmp_path / "x.sock"))
    (tmp_path / "link").symlink_to("x.sock")

    def work() -> None:
        one = shared(journal)
        mounts = [
            bind(tmp_path / "x.sock", "/x.sock", "ro"),
            bind(tmp_path / "data", "/data"),
            bind(tmp_path / "link", "/y.sock"),
        ]
        first, data, second = one.add_all({"mounts": mounts}, None)
        assert (first.source, first.options) == (f"{GUEST_RUN}/sandbox/sockets/1", ["rbind", "ro"])
        assert data.source.startswith(GUEST_SHARE)
        assert second.source == f"{GUEST_RUN}/sandbox/sockets/2"
        assert one.relay is not None
        one.remove_all()

    in_child(work)
    assert not journal_undo.undo(journal)


def test_a_socket_that_only_the_host_sees(tmp_path: Path) -> None:
    hidden = tmp_path / "hidden"
    hidden.mkdir()

    def work() -> None:
        sysio.unshare(sysio.CLONE_NEWNS)
        sysio.mount(None, "/", None, sysio.MS_REC | sysio.MS_PRIVATE)
        sysio.mount("tmpfs", str(hidden), "tmpfs", 0, "")
        path = str(hidden / "x.sock")
        with socket.socket(socket.AF_UNIX) as listener:
            listener.bind(path)
            listener.listen()
            host = Namespaces()
            sysio.unshare(sysio.CLONE_NEWNS)
            sysio.umount2(str(hidden), 0)
            with pytest.raises(FileNotFoundError):
                connected(path)
            with socket.socket(fileno=host.opened(partial(descriptor, path), path)) as one:
                assert one.getpeername() == path
        with pytest.raises(ConnectionRefusedError):
            host.opened(partial(descriptor, path), path)

    in_child(work)
