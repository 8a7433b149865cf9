"""Images in tar files: OCI archives, Docker's old and new form, compressed ones, foreign ones."""

from __future__ import annotations

import bz2
import gzip
import io
import json
import os
import shutil
import subprocess
import tarfile
from pathlib import Path
from typing import Any

import pytest
import zstandard
from image_support import (
    MOUNT_POINTS,
    Blobs,
    Erofs,
    docker_save,
    image,
    layer,
    member,
    sha256,
    simple_layout,
    tagged,
    write_layout,
)

from kata.errors import ImageError
from kata.images import archive as archives
from kata.images import platform, store
from kata.images.resolve import resolve

ONE = layer(member("one", content=b"1"))
TWO = layer(member("two", content=b"2"))


@pytest.fixture(autouse=True)
def state(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("KATA_STATE_DIR", str(tmp_path / "state"))
    monkeypatch.setattr(platform, "host", lambda: platform.Platform("linux", "amd64"))
    return tmp_path / "state" / "images"


def content(made: store.Image) -> set[str]:
    return set(Erofs(Path(made.rootfs_path)).tree()) - {"", *MOUNT_POINTS}


def pack(directory: Path, archive: Path, prefix: str = "") -> Path:
    """Put a directory into a tar file, as skopeo and `docker save` do."""
    with tarfile.open(archive, "w") as tar:
        for path in sorted(directory.rglob("*")):
            tar.add(path, prefix + str(path.relative_to(directory)), recursive=False)
    return archive


def test_oci_archive(tmp_path: Path) -> None:
    archive = pack(simple_layout(tmp_path / "l", ONE, TWO, how="gzip"), tmp_path / "a.tar")
    made = resolve(f"oci-archive:{archive}")
    assert content(made) == {"one", "two"}
    assert made.names == [f"oci-archive:{archive}"]


def test_docker_archive(tmp_path: Path) -> None:
    archive = docker_save(
        tmp_path / "a.tar",
        [{"layers": [ONE, TWO], "tags": ["team/app:1"], "config": {"Cmd": ["x"], "Env": None}}],
    )
    made = resolve(f"docker-archive:{archive}")
    assert content(made) == {"one", "two"}
    assert made.config == {"Cmd": ["x"]}
    assert made.names == [f"docker-archive:{archive}", "docker.io/team/app:1"]
    assert resolve("team/app:1", pull="never").id == made.id


def test_an_archive_is_the_same_image_as_the_layout(tmp_path: Path) -> None:
    layout = simple_layout(tmp_path / "l", ONE, TWO)
    one = resolve(f"oci-archive:{pack(layout, tmp_path / 'a.tar', './')}")
    assert resolve(f"oci:{layout}").id == one.id


def test_docker_25_writes_both_forms(tmp_path: Path) -> None:
    blobs = Blobs()
    described = image(blobs, [ONE], **tagged("1"))
    described["annotations"]["io.containerd.image.name"] = "docker.io/library/app:1"
    layout = write_layout(tmp_path / "l", blobs, [described])
    inner = json.loads(blobs[described["digest"]])
    place = "blobs/sha256/"
    listed = {
        "Config": place + inner["config"]["digest"][7:],
        "RepoTags": ["app:1"],
        "Layers": [place + inner["layers"][0]["digest"][7:]],
    }
    (layout / "manifest.json").write_text(json.dumps([listed]))
    both = pack(layout, tmp_path / "both.tar")
    (layout / "index.json").unlink()
    docker_only = pack(layout, tmp_path / "docker.tar")
    ids = {
        resolve(f"docker-archive:{both}").id,
        resolve(f"docker-archive:{both}:app:1").id,
        resolve(f"oci-archive:{both}:1").id,
        resolve(f"docker-archive:{docker_only}:1").id,
    }
    assert ids == {inner["config"]["digest"]}
    assert store.find("app:1").id in ids


def test_choosing_among_several(tmp_path: Path) -> None:
    archive = docker_save(
        tmp_path / "a.tar",
        [
            {"layers": [ONE], "tags": ["a:1", "x.io/b:2"]},
            {"layers": [TWO], "tags": ["c:latest"]},
            {"layers": []},
        ],
    )
    assert content(resolve(f"docker-archive:{archive}")) == {"two"}
    assert content(resolve(f"docker-archive:{archive}:a:1")) == {"one"}
    assert content(resolve(f"docker-archive:{archive}:2")) == {"one"}
    with pytest.raises(ImageError, match="no image with the tag 9") as caught:
        resolve(f"docker-archive:{archive}:9")
    assert "x.io/b:2" in caught.value.hint
    assert content(resolve(f"docker-archive:{archive}:@0")) == {"one"}
    with pytest.raises(ImageError, match="no image at the place @3"):
        resolve(f"docker-archive:{archive}:@3")
    unnamed = docker_save(tmp_path / "b.tar", [{"layers": [ONE]}, {"layers": [TWO]}])
    with pytest.raises(ImageError, match="2 images and none is tagged latest") as caught:
        resolve(f"docker-archive:{unnamed}")
    assert ":@0 to :@1" in caught.value.hint
    assert content(resolve(f"docker-archive:{unnamed}:@1")) == {"two"}


def test_repeated_layers_are_links_before_docker_25(tmp_path: Path) -> None:
    again = tarfile.TarInfo("01/layer.tar")
    again.type, again.linkname = tarfile.SYMTYPE, "../other/layer.tar"
    hard = tarfile.TarInfo("00/layer.tar")
    hard.type, hard.linkname = tarfile.LNKTYPE, "other/layer.tar"
    data = tarfile.TarInfo("other/layer.tar")
    data.size = len(ONE)
    archive = docker_save(tmp_path / "a.tar", [{"layers": [ONE, ONE], "linked": True}], extra=[again, hard])
    with tarfile.open(archive, "a") as tar:
        tar.addfile(data, io.BytesIO(ONE))
    assert content(resolve(f"docker-archive:{archive}")) == {"one"}


@pytest.mark.parametrize("pressed", [gzip.compress, bz2.compress, zstandard.compress])
def test_compressed_archives(tmp_path: Path, state: Path, pressed: Any) -> None:
    archive = docker_save(tmp_path / "a.tar", [{"layers": [ONE]}])
    archive.write_bytes(pressed(archive.read_bytes()))
    assert content(resolve(f"docker-archive:{archive}")) == {"one"}
    assert len(list((state / "rootfs").iterdir())) == 1


def test_an_unchanged_archive_is_not_read_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    archive = docker_save(tmp_path / "a.tar", [{"layers": [ONE]}])
    made = resolve(f"docker-archive:{archive}")
    monkeypatch.setitem(__import__("sys").modules, "kata.images.acquire", None)
    assert resolve(f"docker-archive:{archive}").id == made.id
    monkeypatch.undo()
    monkeypatch.setenv("KATA_STATE_DIR", str(tmp_path / "state"))
    docker_save(archive, [{"layers": [TWO]}])
    assert content(resolve(f"docker-archive:{archive}")) == {"two"}


def test_names_in_archives_do_not_replace_what_was_pulled(tmp_path: Path) -> None:
    first = docker_save(tmp_path / "a.tar", [{"layers": [ONE], "tags": ["app:1"]}])
    second = docker_save(tmp_path / "b.tar", [{"layers": [TWO], "tags": ["app:1"]}])
    resolve(f"docker-archive:{first}")
    newer = resolve(f"docker-archive:{second}")
    assert store.find("app:1").id == newer.id
    path = os.path.join(store.directory(), "index.json")
    index = json.loads(Path(path).read_text())
    index["names"]["docker.io/library/app:1"]["origin"] = "registry"
    Path(path).write_text(json.dumps(index))
    docker_save(tmp_path / "a.tar", [{"layers": [ONE, TWO], "tags": ["app:1"]}])
    resolve(f"docker-archive:{first}")
    assert store.find("app:1").id == newer.id


def _tar(**files: bytes) -> bytes:
    return layer(
        *(member(name.replace("__", "/").replace("_", "."), content=data) for name, data in files.items())
    )


BROKEN: dict[str, bytes] = {
    "neither index.json nor manifest.json": _tar(x=b""),
    "not an image archive but a root file system": _tar(etc__passwd=b"", bin__sh=b""),
    "a Docker older than 1.10": _tar(repositories=b"{}"),
    "manifest.json is not JSON": _tar(manifest_json=b"{"),
    "manifest.json lists no images": _tar(manifest_json=b"[]"),
    "manifest.json names no configuration": _tar(manifest_json=b"[{}]"),
    "is missing": _tar(manifest_json=b'[{"Config":"c.json","Layers":[]}]'),
    "which is not a sha256": _tar(index_json=b'{"manifests":[{"digest":"sha256:../../x","size":1}]}'),
    "not a usable tar archive": b"no tar at all, but a text that is long enough to be read as a header" * 20,
    "data end early": gzip.compress(os.urandom(5000))[:2000],
}


@pytest.mark.parametrize("words", BROKEN)
def test_broken_archives(tmp_path: Path, state: Path, words: str) -> None:
    path = tmp_path / "a.tar"
    path.write_bytes(BROKEN[words])
    with pytest.raises(ImageError, match=words) as caught:
        resolve(f"docker-archive:{path}")
    assert caught.value.hint
    assert not list((state / "rootfs").iterdir())


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (_tar(manifest_json=b'[{"Config":"c","Layers":5}]'), "names no configuration or layers"),
        (_tar(manifest_json=b'[{"Config":"c","Layers":true}]'), "names no configuration or layers"),
        (_tar(manifest_json=b'[{"Config":"c","Layers":{"l.tar":1}}]'), "names no configuration or layers"),
        (_tar(manifest_json=b'[{"Config":"\\ud800","Layers":[]}]'), r"\\xed\\xa0\\x80 is missing"),
        (
            _tar(
                manifest_json=b'[{"Config":"c","Layers":["\\udc00"]}]',
                c=json.dumps({"rootfs": {"diff_ids": [sha256(ONE)]}}).encode(),
            ),
            r"\\xed\\xb0\\x80 is missing",
        ),
        (
            layer(
                member("manifest.json", content=b'[{"Config":"c","Layers":[]}]'),
                member("c", "symlink", link="nowhere\udcff"),
            ),
            r"nowhere\\xed\\xb3\\xbf is missing",
        ),
        (_tar(manifest_json=b'[{"Config":"\\u001b","Layers":[]}]', **{"\x1b": b"{"}), r"\\x1b is not JSON"),
    ],
)
def test_odd_shapes_of_docker_archives(tmp_path: Path, data: bytes, words: str) -> None:
    """What JSON or a tar header may hold and an image may not is told in one printable sentence."""
    path = tmp_path / "a.tar"
    path.write_bytes(data)
    with pytest.raises(ImageError, match=words) as caught:
        resolve(f"docker-archive:{path}")
    assert caught.value.message.isprintable()
    assert caught.value.hint


def test_names_of_members_are_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Long names, and long targets of links, are counted before anything is kept of them."""
    monkeypatch.setattr(archives, "_MAX_NAMES", 1 << 20)
    path = tmp_path / "a.tar"
    for kind in ("file", "symlink", "link"):
        for form in (tarfile.PAX_FORMAT, tarfile.GNU_FORMAT):
            long = "n" * (400 << 10)
            name, link = (long, "") if kind == "file" else ("n", long)
            path.write_bytes(
                layer(*(member(f"{number}{name}", kind, link=link) for number in range(3)), form=form)
            )
            for prefix in ("oci-archive", "docker-archive"):
                with pytest.raises(ImageError, match="names of more than 1048576 bytes") as caught:
                    resolve(f"{prefix}:{path}")
                assert len(caught.value.message) < 1000


def test_a_link_in_a_circle(tmp_path: Path) -> None:
    links = []
    for name, target in (("00/layer.tar", "../b"), ("b", "00/layer.tar")):
        info = tarfile.TarInfo(name)
        info.type, info.linkname = tarfile.SYMTYPE, target
        links.append(info)
    archive = docker_save(tmp_path / "a.tar", [{"layers": [ONE], "linked": True}], extra=links)
    with pytest.raises(ImageError, match="is missing"):
        resolve(f"docker-archive:{archive}")


def test_a_layer_that_is_not_the_configuration_s(tmp_path: Path) -> None:
    archive = docker_save(tmp_path / "a.tar", [{"layers": [ONE]}])
    data = archive.read_bytes()
    archive.write_bytes(data.replace(b"one" + bytes(97), b"two" + bytes(97)))
    with pytest.raises(ImageError, match=r"checksum|unpacks to"):
        resolve(f"docker-archive:{archive}")


def test_a_compressed_bomb_is_refused(tmp_path: Path, state: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KATA_IMAGE_MAX_SIZE", "1000000")
    path = tmp_path / "a.tar"
    path.write_bytes(gzip.compress(bytes(50 << 20)))
    with pytest.raises(ImageError, match="unpacks to more than 1000000 bytes"):
        resolve(f"docker-archive:{path}")
    assert not list((state / "rootfs").iterdir())


@pytest.mark.parametrize("form", ["oci-archive", "docker-archive", "oci"])
def test_what_skopeo_writes(tmp_path: Path, form: str) -> None:
    if not shutil.which("skopeo"):
        pytest.skip("needs skopeo (apt-get install skopeo)")
    layout = simple_layout(tmp_path / "l", ONE, TWO)
    policy = tmp_path / "policy.json"
    policy.write_text('{"default":[{"type":"insecureAcceptAnything"}]}')
    target = tmp_path / "out"
    command = [
        "skopeo",
        "--policy",
        str(policy),
        "copy",
        f"oci:{layout}:latest",
        f"{form}:{target}:team/app:7",
    ]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    made = resolve(f"{form}:{target}")
    assert content(made) == {"one", "two"}
    assert resolve(f"{form}:{target}:team/app:7").id == made.id
