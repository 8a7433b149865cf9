"""What may be written for IMAGE, and platforms."""

from __future__ import annotations

import os
import tarfile
import tracemalloc
from pathlib import Path

import pytest

from kata.errors import KataError, NotFoundError, UsageError
from kata.images import platform, reference, resolve


@pytest.mark.parametrize(
    ("text", "full"),
    [
        ("alpine", "docker.io/library/alpine:latest"),
        ("alpine:3.20", "docker.io/library/alpine:3.20"),
        ("team/app", "docker.io/team/app:latest"),
        ("docker.io/alpine", "docker.io/library/alpine:latest"),
        ("index.docker.io/library/alpine", "docker.io/library/alpine:latest"),
        ("localhost/app", "localhost/app:latest"),
        ("localhost:5000/team/app:1", "localhost:5000/team/app:1"),
        ("ghcr.io/a/b_c/d-e.f:V1", "ghcr.io/a/b_c/d-e.f:V1"),
        ("[::1]:5000/app", "[::1]:5000/app:latest"),
        ("app@sha256:" + "a" * 64, "docker.io/library/app@sha256:" + "a" * 64),
        ("app:1@sha256:" + "a" * 64, "docker.io/library/app@sha256:" + "a" * 64),
    ],
)
def test_references_as_docker_normalises_them(text: str, full: str) -> None:
    assert str(reference.parse(text)) == full


@pytest.mark.parametrize(
    "text",
    [
        "",
        "Alpine",
        "a:b:c",
        "a@sha256:12",
        "a/../b",
        "-a",
        "a:",
        "a" * 300,
        "a b",
        "x.io/",
        "/a",
        "a@",
        "http://a/b",
    ],
)
def test_references_that_are_none(text: str) -> None:
    with pytest.raises(UsageError) as caught:
        reference.parse(text)
    assert caught.value.hint
    assert len(caught.value.message) < 700


def test_short_names() -> None:
    assert [reference.familiar(n) for n in ("docker.io/library/a:1", "docker.io/t/a:1", "x.io/library/a:1")] == [
        "a:1", "t/a:1", "x.io/library/a:1",
    ]  # fmt: skip


def test_paths_without_a_prefix(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The hint names the prefix that is meant, by a look at what is there."""
    monkeypatch.chdir(tmp_path)
    for directory in ("layout", "tree"):
        (tmp_path / directory).mkdir()
    (tmp_path / "layout" / "oci-layout").touch()
    for name, member in (
        ("Oci.tar", "./index.json"),
        ("Docker.tar", "manifest.json"),
        ("Root.tar", "etc/passwd"),
    ):
        with tarfile.open(tmp_path / name, "w") as tar:
            tar.addfile(tarfile.TarInfo(member))
    with tarfile.open(tmp_path / "Packed.tar.gz", "w:gz") as tar:
        tar.addfile(tarfile.TarInfo("manifest.json"))
    (tmp_path / "Text").write_text("no archive" * 100)
    for text, words in [
        ("./layout", "write oci:./layout"),
        ("./tree", "write rootfs:./tree"),
        (str(tmp_path), f"write rootfs:{tmp_path}"),
        (".", "write rootfs:."),
        ("./Oci.tar", "write oci-archive:./Oci.tar"),
        ("Oci.tar", "write oci-archive:Oci.tar"),
        ("./Docker.tar", "write docker-archive:./Docker.tar"),
        ("./Packed.tar.gz", "write docker-archive:./Packed.tar.gz or"),
        ("./Root.tar", "tar -xf ./Root.tar"),
        ("./Text", "it is no image archive"),
        ("./none", "nothing is there"),
        ("docker-daemon:app:1", "docker save app:1 -o image.tar"),
        (
            "containers-storage:[overlay@/x]localhost/app",
            "podman save --format oci-archive localhost/app -o",
        ),
        ("docker://alpine:3", "leave the prefix out: alpine:3"),
        ("dir:/x", "skopeo copy dir:/x oci:DIR"),
    ]:
        with pytest.raises(UsageError) as caught:
            reference.parse(text)
        assert words in caught.value.hint, text
    # What can be an image's name is looked for as that first.
    (tmp_path / "tree.tar").write_bytes((tmp_path / "Docker.tar").read_bytes())
    assert "write docker-archive:tree.tar" in reference.hint_for_path("tree.tar")
    assert "write oci:layout" in reference.hint_for_path("layout")
    assert reference.hint_for_path("none") == ""
    monkeypatch.setenv("KATA_STATE_DIR", str(tmp_path / "state"))
    with pytest.raises(NotFoundError) as absent:
        resolve.resolve("layout", pull="never")
    assert "write oci:layout" in absent.value.hint
    with pytest.raises(NotFoundError) as absent:
        resolve.resolve("none", pull="never")
    assert absent.value.hint == "kata pull none:latest"
    assert str(reference.parse("docker:dind")) == "docker.io/library/docker:dind"
    assert str(reference.parse("dir:5000/x")) == "dir:5000/x:latest"


def test_a_hint_is_not_worth_waiting_or_much_memory(tmp_path: Path) -> None:
    """A fifo without a writer is not opened, and of headers as large as the file says only so much is read."""
    fifo = tmp_path / "fifo"
    os.mkfifo(fifo)
    archives: dict[Path, int] = {}
    for kind in (tarfile.GNUTYPE_LONGNAME, tarfile.XHDTYPE):
        header = tarfile.TarInfo("x")
        header.type, header.size = kind, 1 << 40
        one = tmp_path / f"one-{kind.decode()}"
        one.write_bytes(header.tobuf(tarfile.GNU_FORMAT))
        os.truncate(one, 1 << 41)  # a hole
        # As well as many that are no larger than they may be.
        header.size = 1 << 20
        many = tmp_path / f"many-{kind.decode()}"
        many.write_bytes((header.tobuf(tarfile.GNU_FORMAT) + b"\n" * (1 << 20)) * 20)
        archives |= {one: 1 << 20, many: 8 << 20}
    tracemalloc.start()
    try:
        for path, most in {fifo: 1 << 20, Path("/dev/tty"): 1 << 20, **archives}.items():
            tracemalloc.reset_peak()
            with pytest.raises(UsageError) as caught:
                reference.parse(str(path))
            assert "it is no image archive" in caught.value.hint
            assert tracemalloc.get_traced_memory()[1] < most, path
    finally:
        tracemalloc.stop()


def test_local_references(tmp_path: Path) -> None:
    (tmp_path / "dir:with:colons").mkdir()
    (tmp_path / "file").touch()
    local = reference.parse(f"oci:{tmp_path}/dir:with:colons:docker.io/x:1")
    assert isinstance(local, reference.LocalImage)
    assert (local.kind, local.path, local.tag) == ("oci", f"{tmp_path}/dir:with:colons", "docker.io/x:1")
    assert str(reference.parse(f"docker-archive:{tmp_path}/file:1")) == f"docker-archive:{tmp_path}/file:1"
    for text, words in [
        ("oci:", "names no directory"),
        (f"oci:{tmp_path}/none:1", "no such directory"),
        (f"oci:{tmp_path}/file", "is not a directory"),
        (f"rootfs:{tmp_path}/file", "is not a directory"),
        (f"oci-archive:{tmp_path}", "is not a file"),
        (f"oci-archive:{tmp_path}/file:", "names no tag"),
    ]:
        with pytest.raises(KataError, match=words) as caught:
            reference.parse(text)
        assert caught.value.hint


def test_platforms() -> None:
    amd64, v7 = platform.parse("amd64"), platform.parse("linux/arm/v7")
    assert amd64.rank(amd64) == 0
    assert platform.parse("linux/386").rank(amd64) > 0
    assert platform.parse("linux/amd64/v1").rank(amd64) == 0
    v2, v3 = platform.parse("linux/amd64/v2"), platform.parse("linux/amd64/v3")
    assert 0 < v2.rank(amd64) < v3.rank(amd64) < platform.parse("linux/386").rank(amd64)
    assert v3.rank(v3) == 0 < v2.rank(v3) < amd64.rank(v3)
    assert platform.parse("linux/amd64/weird").rank(amd64) == -1
    assert platform.parse("linux/arm/v7").rank(platform.parse("linux/arm/v6")) == -1
    assert platform.parse("windows/amd64").rank(amd64) == -1
    assert 0 < platform.parse("linux/arm/v6").rank(v7) < platform.parse("linux/arm/v5").rank(v7)
    assert platform.parse("linux/arm64").rank(platform.parse("aarch64")) == 0
    assert str(platform.parse("linux/aarch64")) == "linux/arm64"
    for text in ("", "linux/", "a/b/c/d"):
        with pytest.raises(UsageError):
            platform.parse(text)
