"""``--mount`` and ``-v DST``: which volumes, binds and tmpfs they ask for, and what is refused."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from kata.cli import making, records, run, session
from kata.cli.mounts import DEFAULT_SIZE, Mounts
from kata.errors import UsageError
from kata.images import resolve as resolving


def read(*texts: str) -> Mounts:
    found = Mounts()
    for text in texts:
        found.add(text)
    return found


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("dst=/v", ("/v", DEFAULT_SIZE, False, True)),
        ("type=volume,target=/v/,volume-opt=size=20g", ("/v", 20 << 30, False, True)),
        ("type=volume,destination=/v,ro,volume-nocopy", ("/v", DEFAULT_SIZE, True, False)),
        ("type=volume,dst=/v,readonly=false,volume-nocopy=true", ("/v", DEFAULT_SIZE, False, False)),
        ("dst=/v,rw=false", ("/v", DEFAULT_SIZE, True, True)),
        ("Type=volume,DST=/v,readonly=true,rw=false", ("/v", DEFAULT_SIZE, True, True)),
        ("readonly=false,rw,volume-driver=local,dst=/v", ("/v", DEFAULT_SIZE, False, True)),
        ('type=volume,"dst=/a,b",ro', ("/a,b", DEFAULT_SIZE, True, True)),
    ],
)
def test_volumes(text: str, expected: tuple[Any, ...]) -> None:
    [volume] = read(text).volumes
    assert (volume.destination, volume.size, volume.readonly, volume.copy) == expected


def test_binds_and_tmpfs(tmp_path: Path) -> None:
    colon = tmp_path / "a:b"
    colon.mkdir()
    found = read(
        f"type=bind,source={colon},target=/b,ro,bind-propagation=rslave,consistency=cached,relabel=private",
        "type=tmpfs,dst=/t,tmpfs-size=64m,tmpfs-mode=0700",
        "type=tmpfs,dst=/u,ro,noexec,notmpcopyup",
        f"type=bind,src={colon},dst=/c,noexec,nodev,nosuid=false,bind-recursive=enabled",
    )
    assert found.binds == [
        (str(colon), "/b", ["rbind", "rslave", "ro"]),
        (str(colon), "/c", ["rbind", "rprivate", "rw", "noexec", "nodev"]),
    ]
    assert found.tmpfs == [("/t", ["rw", "size=67108864", "mode=0700"]), ("/u", ["ro", "mode=1777"])]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("type=volume", "where to mount"),
        ("dst=relative", "absolute"),
        ("dst=/", "absolute"),
        ("type=npipe,dst=/v", "no type 'npipe'"),
        ("type=volume,src=./data,dst=/v", "no name of a volume"),
        ("type=volume,dst=/v,volume-opt=type=nfs", "no option 'type'"),
        ("type=volume,dst=/v,volume-opt=size=much", "not a size"),
        ("type=volume,dst=/v,tmpfs-size=1m", "volume has no option 'tmpfs-size'"),
        ("type=tmpfs,dst=/v,src=/x", "no source"),
        ("type=tmpfs,dst=/v,tmpfs-mode=rwx", "octal"),
        ("type=bind,dst=/v", "what to mount"),
        ("type=bind,src=/no/such,dst=/v", "does not exist"),
        ("type=bind,src=/etc,dst=/v,bind-propagation=far", "unknown option 'far'"),
        ("type=bind,src=/etc,dst=/v,relabel=no", "unknown option 'no'"),
        ("dst=/v,target=/w", "twice"),
        ("dst=/v,dst=/v", "twice"),
        ("dst=/v,ro=maybe", "neither true nor false"),
        ("dst=/v,readonly=true,rw", "contradict"),
        ("dst=/v,ro=false,rw=false", "contradict"),
        ('"dst=/v', "quotes do not match"),
        ("type=tmpfs,dst=/v,noexec=false", "no option 'noexec=false'"),
        ("type=tmpfs,dst=/v,tmpfs-size=0.1", "not a size"),
        ("dst=/v,volume-opt=size=1e9", "not a size"),
        ("dst=/v,volume-opt=size=1_000m", "not a size"),
        ("dst=/v,volume-driver=nfs", "no option 'volume-driver=nfs'"),
        ("dst", "not KEY=VALUE"),
        ("", "not KEY=VALUE"),
    ],
)
def test_what_is_refused(text: str, message: str) -> None:
    with pytest.raises(UsageError) as caught:
        read(text)
    assert message in caught.value.message


@pytest.mark.parametrize(
    ("text", "hint"),
    [
        ("type=bind,src=/etc,dst=/v,bind-nonrecursive", "below SRC"),
        ("type=bind,src=/etc,dst=/v,bind-recursive=disabled", "below SRC"),
        ("type=bind,src=/etc,dst=/v,bind-create-src", "mkdir -p SRC"),
        ("type=bind,src=/etc,dst=/v,U=true", "chown -R"),
        ("type=tmpfs,dst=/v,size=5m", "tmpfs-size"),
        ("type=tmpfs,dst=/v,tmpcopyup", "type=volume"),
        ("type=tmpfs,dst=/v,unheard-of", "type=tmpfs"),
        ("dst=/v,volume-label=a=b", "leave it out"),
        ("src=/etc,dst=/v", "type=bind,src=/etc,dst=/v"),
    ],
)
def test_who_refuses_says_what_to_do(text: str, hint: str) -> None:
    with pytest.raises(UsageError) as caught:
        read(text)
    assert hint in caught.value.hint


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Any:
    """How a container is made of a command line, of an image with two volumes."""
    for name in ("STATE", "CACHE", "RUN"):
        monkeypatch.setenv(f"KATA_{name}_DIR", str(tmp_path / name))
    config = {"Cmd": ["sh"], "Volumes": {"/data": {}, "/logs": {}}}
    image = SimpleNamespace(
        id="sha256:0", config=config, rootfs_dir="", rootfs_path="/lower", platform="linux/amd64"
    )
    monkeypatch.setattr(resolving, "resolve", lambda *_, **__: image)

    def make(*arguments: str, command: str = "create", auto_remove: bool = False) -> records.Container:
        parsed = run.COMMANDS[command].parse([*arguments, "image"])
        return making.make_container(
            parsed, run.SELDOM, auto_remove=auto_remove, made_to_run=command == "run"
        )

    return make


needs_mkfs = pytest.mark.skipif(
    not (shutil.which("mkfs.ext4") or os.path.exists("/usr/sbin/mkfs.ext4")),
    reason="needs mkfs.ext4 (apt-get install e2fsprogs)",
)


@needs_mkfs
@pytest.mark.parametrize(
    ("command", "auto_remove", "checksums"),
    [("run", True, False), ("run", False, True), ("create", True, True)],
)
def test_only_disks_that_outlive_their_machine_have_checksums(
    made: Any, command: str, auto_remove: bool, checksums: bool
) -> None:
    container = made("-v", "/a", command=command, auto_remove=auto_remove)
    for name in ("rw.img", "volume-0.img"):
        disk = os.path.join(container.directory, name)
        said = subprocess.run(
            ["dumpe2fs", "-h", disk],
            env={"PATH": "/usr/sbin:/sbin:/usr/bin:/bin"}, check=True, capture_output=True, text=True,
        ).stdout  # fmt: skip
        assert "has_journal" in said
        assert ("metadata_csum" in said) is checksums


@needs_mkfs
def test_a_volume_is_a_disk_of_the_machine(made: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    container = made("-v", "/a", "--mount", "dst=/logs/deep,volume-opt=size=64m,ro", "--mount", "dst=/data")
    files = sorted(name for name in os.listdir(container.directory) if name.endswith(".img"))
    assert files == ["rw.img", "volume-0.img", "volume-1.img", "volume-2.img"]
    about = os.stat(os.path.join(container.directory, "volume-1.img"))
    assert about.st_size == 64 << 20
    assert about.st_blocks * 512 < 1 << 20
    spec = json.loads(Path(container.directory, "config.json").read_text())
    found = {m["destination"]: m for m in spec["mounts"] if m["type"] == "bind"}
    assert {key: mount["source"] for key, mount in found.items()} == {
        "/a": "volume-0.img",
        "/data": "volume-2.img",
        "/logs/deep": "volume-1.img",
    }
    assert found["/logs/deep"]["options"] == ["rbind", "rprivate", "ro"]
    assert container.record["image_volumes"] == ["/logs"]
    monkeypatch.setattr("kata.engine.machine.machine_settings", lambda *_, **__: (None, []))
    settings = session.sandbox_settings(container, 0)
    assert settings.container is not None
    assert settings.container.volumes == []
    assert [(one.name, one.slot) for one in settings.container.disk_volumes] == [
        ("volume-0.img", 2),
        ("volume-1.img", 3),
        ("volume-2.img", 4),
    ]
    assert [os.path.basename(disk.path) for disk in settings.disks if disk] == ["lower", *files]
    records.remove(container)
    assert not os.path.exists(container.directory)


@pytest.mark.parametrize(
    "words",
    [
        ["--mount", "dst=/v", "--tmpfs", "/v"],
        ["-v", "/v", "-v", "/v/"],
        ["-v", "/etc:/v", "-v", "/tmp:/v/"],
        ["--tmpfs", "/v", "--tmpfs", "/v"],
        ["-v", "/etc:/v", "--tmpfs", "/v"],
    ],
)
def test_no_two_at_one_place(made: Any, words: list[str]) -> None:
    with pytest.raises(UsageError, match="two mounts at /v"):
        made(*words)


@pytest.mark.parametrize("options", ["ro", "rw,z"])
def test_options_without_a_source(made: Any, options: str) -> None:
    with pytest.raises(UsageError) as caught:
        made("-v", f"/v:{options}")
    assert caught.value.hint == "--mount type=volume,dst=/v" + (",ro" if options == "ro" else "")


def test_not_more_than_there_is_room_for(made: Any) -> None:
    with pytest.raises(UsageError, match="7 volumes"):
        made(*(word for number in range(7) for word in ("-v", f"/v{number}")))


@needs_mkfs
def test_volumes_of_an_image_stay_writable_in_a_read_only_container(made: Any) -> None:
    container = made("--read-only", "--tmpfs", "/logs")
    assert container.record["image_volumes"] == []
    assert [one["destination"] for one in container.record["disk_volumes"]] == ["/data"]
    with pytest.raises(UsageError, match=r"8 volumes on disks \(2 of them the image's"):
        made("--read-only", *(word for number in range(6) for word in ("-v", f"/v{number}")))


@needs_mkfs
def test_a_volume_that_cannot_be_made_leaves_nothing(made: Any, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="a volume of 1048576 bytes"):
        made("--mount", "dst=/v,volume-opt=size=1m")
    assert os.listdir(tmp_path / "STATE" / "containers") == []
