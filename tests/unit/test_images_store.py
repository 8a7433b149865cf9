"""The image store: finding, converting once, naming, removing, clearing away."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest
from image_support import (
    CONFIG,
    INDEX,
    MANIFEST,
    MOUNT_POINTS,
    Blobs,
    Erofs,
    build,
    image,
    layer,
    member,
    sha256,
    simple_layout,
    tagged,
    write_layout,
)

from kata.errors import HostError, ImageError, NotFoundError, ResourceExhaustedError, StateError
from kata.images import changes, manifest, platform, store
from kata.images.resolve import resolve

ROOT = Path(__file__).resolve().parents[2]
HELLO = layer(member("hello", content=b"hello\n"))


@pytest.fixture(autouse=True)
def state(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A state directory of the test's own; afterwards the store holds no half-made file."""
    monkeypatch.setenv("KATA_STATE_DIR", str(tmp_path / "state"))
    monkeypatch.setattr(platform, "host", lambda: platform.Platform("linux", "amd64"))
    return tmp_path / "state" / "images"


def files(state: Path) -> set[str]:
    return {str(path.relative_to(state)) for path in state.rglob("*") if path.is_file()}


# ---- layouts ----


def test_a_layout_becomes_an_image(tmp_path: Path, state: Path) -> None:
    config = {
        "Cmd": ["sh"],
        "Env": ["A=b"],
        "User": "1:2",
        "Labels": {"x": "y"},
        "ExposedPorts": {"80/tcp": {}},
    }
    layout = simple_layout(tmp_path / "l", HELLO, config={**config, "OnBuild": None, "Unknown": 1})
    made = resolve(f"oci:{layout}")
    assert made.config == config
    assert made.created == "2024-01-02T03:04:05Z"
    assert made.platform == "linux/amd64"
    assert made.names == [f"oci:{layout}"]
    assert made.rootfs_dir == ""
    assert os.stat(made.rootfs_path).st_size == made.size
    assert Erofs(Path(made.rootfs_path)).tree()["hello"].content == b"hello\n"
    assert sha256(Path(store.blob_path(made.id)).read_bytes()) == made.id
    assert sha256(Path(store.blob_path(made.digest)).read_bytes()) == made.digest
    assert not [name for name in files(state) if "tmp" in name or name.endswith(".lock")]


def test_the_same_layout_again_reads_no_layer(tmp_path: Path) -> None:
    layout = simple_layout(tmp_path / "l", HELLO)
    first = resolve(f"oci:{layout}")
    for blob in (layout / "blobs" / "sha256").iterdir():
        blob.unlink()
    again = resolve(f"oci:{layout}", pull="never")
    assert (again.id, again.rootfs_path) == (first.id, first.rootfs_path)


def test_a_changed_layout_is_another_image(tmp_path: Path) -> None:
    first = resolve(f"oci:{simple_layout(tmp_path / 'l', HELLO)}")
    second = resolve(f"oci:{simple_layout(tmp_path / 'l', HELLO, layer(member('more')))}")
    assert second.id != first.id
    assert store.find(f"oci:{tmp_path}/l").id == second.id
    assert store.find(first.id).names == []


def test_finding_a_stored_image_imports_nothing_dear(tmp_path: Path) -> None:
    layout = simple_layout(tmp_path / "l", HELLO)
    resolve(f"oci:{layout}")
    program = (
        f"import sys; sys.path.insert(0, {str(ROOT / 'src')!r})\n"
        "from kata.images.resolve import resolve\n"
        f"resolve('oci:{layout}')\n"
        "print(' '.join(sys.modules))"
    )
    done = subprocess.run(
        [sys.executable, "-I", "-S", "-c", program], capture_output=True, text=True, check=True
    )
    dear = {
        "typing",
        "hashlib",
        "httpx",
        "rich",
        "subprocess",
        "tempfile",
        "threading",
        "dataclasses",
        "contextlib",
    }
    assert not dear & set(done.stdout.split())


@pytest.mark.parametrize("how", ["plain", "gzip", "zstd"])
def test_all_compressions_give_the_same_root_file_system(tmp_path: Path, how: str) -> None:
    layers = [layer(member(f"f{n}", content=os.urandom(1) * 5000)) for n in range(3)]
    one = resolve(f"oci:{simple_layout(tmp_path / 'a', *layers, how=how)}")
    two = resolve(f"oci:{simple_layout(tmp_path / 'b', *layers, how='plain')}")
    assert one.rootfs_path == two.rootfs_path
    assert one.id == two.id


def test_images_share_the_root_file_system_of_equal_layers(tmp_path: Path, state: Path) -> None:
    one = resolve(f"oci:{simple_layout(tmp_path / 'a', HELLO, config={'Cmd': ['1']})}")
    two = resolve(f"oci:{simple_layout(tmp_path / 'b', HELLO, config={'Cmd': ['2']})}")
    assert one.id != two.id
    assert one.rootfs_path == two.rootfs_path
    changes.remove(one.id)
    assert os.path.exists(two.rootfs_path)
    changes.remove(two.id)
    assert not os.path.exists(two.rootfs_path)
    assert files(state) == {"index.json", "lock", "adding"}


def test_an_image_without_layers(tmp_path: Path) -> None:
    made = resolve(f"oci:{simple_layout(tmp_path / 'l')}")
    assert set(Erofs(Path(made.rootfs_path)).tree()) == {"", *MOUNT_POINTS}


def test_a_lost_or_damaged_root_file_system_is_made_again(tmp_path: Path) -> None:
    layout = simple_layout(tmp_path / "l", HELLO)
    made = resolve(f"oci:{layout}")
    os.unlink(made.rootfs_path)
    assert store.list_images() == []
    again = resolve(f"oci:{layout}")
    assert os.stat(again.rootfs_path).st_size == made.size
    os.chmod(made.rootfs_path, 0o644)
    os.truncate(made.rootfs_path, 4096)
    again = resolve(f"oci:{layout}")
    assert os.stat(again.rootfs_path).st_size == made.size


def test_tags(tmp_path: Path) -> None:
    blobs = Blobs()
    one, two = (
        image(blobs, [HELLO], config={"Cmd": [tag]}, **tagged(tag)) for tag in ("1", "registry.io/app:2")
    )
    layout = write_layout(tmp_path / "l", blobs, [one, two])
    assert resolve(f"oci:{layout}:1").config == {"Cmd": ["1"]}
    assert resolve(f"oci:{layout}:2").config == resolve(f"oci:{layout}:registry.io/app:2").config
    with pytest.raises(ImageError, match="no image with the tag 3") as caught:
        resolve(f"oci:{layout}:3")
    assert "registry.io/app:2" in caught.value.hint
    with pytest.raises(ImageError, match="none is tagged latest"):
        resolve(f"oci:{layout}")
    latest = image(blobs, [HELLO], config={"Cmd": ["l"]}, **tagged("latest"))
    write_layout(layout, blobs, [one, two, latest])
    assert resolve(f"oci:{layout}").config == {"Cmd": ["l"]}


def test_images_without_names(tmp_path: Path) -> None:
    """Two of them are not one; several names of one are."""
    blobs = Blobs()
    one, two = (image(blobs, [HELLO], config={"Cmd": [text]}) for text in "12")
    layout = write_layout(tmp_path / "l", blobs, [one, two])
    with pytest.raises(ImageError, match="several images with no name") as caught:
        resolve(f"oci:{layout}")
    assert f"oci:{layout}:@0 to :@1" in caught.value.hint
    assert [resolve(f"oci:{layout}:@{n}").config for n in (0, 1)] == [{"Cmd": ["1"]}, {"Cmd": ["2"]}]
    with pytest.raises(ImageError, match="no image at the place @2"):
        resolve(f"oci:{layout}:@2")
    for entries in ([one, one], [{**one, **tagged(name)} for name in "abc"], [{**one, **tagged("a")}, one]):
        write_layout(layout, blobs, entries)
        assert resolve(f"oci:{layout}").config == {"Cmd": ["1"]}
    write_layout(layout, blobs, [{**one, **tagged("a")}, {**two, **tagged("a")}])
    with pytest.raises(ImageError, match="several images with the tag a"):
        resolve(f"oci:{layout}:a")


def test_an_image_of_a_later_level_of_the_processor(tmp_path: Path) -> None:
    blobs = Blobs()
    v2, v3 = (
        image(
            blobs,
            [HELLO],
            config={"Cmd": [level]},
            variant=level,
            platform={"os": "linux", "architecture": "amd64", "variant": level},
        )
        for level in ("v2", "v3")
    )
    layout = write_layout(tmp_path / "l", blobs, [v3, v2])
    assert resolve(f"oci:{layout}").platform == "linux/amd64/v2"
    assert resolve(f"oci:{layout}", platform="linux/amd64/v3").platform == "linux/amd64/v3"
    assert resolve(f"oci:{layout}", platform="linux/amd64/v4").platform == "linux/amd64/v3"
    v4 = platform.parse("linux/amd64/v4")
    assert platform.lacking(v4, emulated=True) == ["avx512f", "avx512bw", "avx512cd", "avx512dq", "avx512vl"]
    assert platform.lacking(platform.parse("linux/amd64/v3"), emulated=True) == []
    assert platform.lacking(platform.parse("linux/386"), emulated=False) == []


def _multi(tmp_path: Path) -> Path:
    blobs = Blobs()
    manifests = [
        image(
            blobs, [HELLO], arch=arch, config={"Cmd": [arch]}, platform={"os": "linux", "architecture": arch}
        )
        for arch in ("arm64", "amd64", "386")
    ]
    attestation = blobs.put_json({}, MANIFEST, platform={"os": "unknown", "architecture": "unknown"})
    attestation["annotations"] = {"vnd.docker.reference.type": "attestation-manifest"}
    index = blobs.put_json(
        {"schemaVersion": 2, "mediaType": INDEX, "manifests": [attestation, *manifests]}, INDEX
    )
    return write_layout(tmp_path / "multi", blobs, [index])


def test_multi_platform_indexes(tmp_path: Path) -> None:
    layout = _multi(tmp_path)
    assert resolve(f"oci:{layout}").config == {"Cmd": ["amd64"]}
    assert resolve(f"oci:{layout}", platform="linux/arm64").platform == "linux/arm64"
    assert resolve(f"oci:{layout}").config == {"Cmd": ["amd64"]}
    with pytest.raises(ImageError, match="only for: linux/386, linux/amd64, linux/arm64"):
        resolve(f"oci:{layout}", platform="linux/s390x")


def test_an_image_for_another_machine_is_refused(tmp_path: Path) -> None:
    layout = simple_layout(tmp_path / "l", HELLO, arch="arm64")
    with pytest.raises(ImageError, match="is built for linux/arm64, not for linux/amd64"):
        resolve(f"oci:{layout}")


def _spoil(layout: Path, change: Any) -> None:
    """Change the manifest of a simple layout, with the digests in the index put right."""
    index = json.loads((layout / "index.json").read_text())
    blobs = layout / "blobs" / "sha256"
    content = json.loads((blobs / index["manifests"][0]["digest"][7:]).read_text())
    config = json.loads((blobs / content["config"]["digest"][7:]).read_text())
    change(content, config)
    new = Blobs()
    if "config" in content and content["config"].get("mediaType") == CONFIG:
        content["config"] = new.put_json(config, CONFIG)
    index["manifests"] = [new.put_json(content, MANIFEST)]
    write_layout(layout, new, index["manifests"])


MALFORMED: dict[str, Any] = {
    "is not a container image": lambda m, c: m["config"].update(
        mediaType="application/vnd.cncf.helm.config.v1+json"
    ),
    "schema 1": lambda m, c: m.update(schemaVersion=1),
    "is not an image manifest": lambda m, c: m.update(layers="x"),
    "not a sha256": lambda m, c: m["layers"][0].update(digest="sha256:../../../etc/passwd"),
    "names 1001 layers; at most 1000": lambda m, c: m.update(layers=m["layers"] * 1001),
    "config.Env that is not text": lambda m, c: c["config"].update(Env=["A=\ud800"]),
    "config.Labels that is not text": lambda m, c: c["config"].update(Labels={"a": "\0"}),
    "config.Volumes that is not text": lambda m, c: c["config"].update(Volumes={"/\udfff": {}}),
    "no proper size": lambda m, c: m["layers"][0].update(size=-1),
    "layer 1 is encrypted": lambda m, c: m["layers"][0].update(
        mediaType="application/vnd.oci.image.layer.v1.tar+gzip+encrypted"
    ),
    "is missing": lambda m, c: m["layers"][0].update(digest="sha256:" + "0" * 64),
    "its configuration says sha256:1": lambda m, c: c["rootfs"].update(diff_ids=["sha256:" + "1" * 64]),
    "but its configuration names 2": lambda m, c: c["rootfs"]["diff_ids"].append("sha256:" + "1" * 64),
    "no proper list of layers": lambda m, c: c["rootfs"].update(diff_ids=[5]),
    "config that is not an object": lambda m, c: c.update(config=[]),
    "config.Env of the wrong type": lambda m, c: c["config"].update(Env="A=b"),
    "config.Labels of the wrong type": lambda m, c: c["config"].update(Labels=[]),
    "a label that is not a string": lambda m, c: c["config"].update(Labels={"a": 1}),
}


@pytest.mark.parametrize("words", MALFORMED)
def test_malformed_images(tmp_path: Path, state: Path, words: str) -> None:
    layout = simple_layout(tmp_path / "l", HELLO)
    _spoil(layout, MALFORMED[words])
    with pytest.raises(ImageError, match=words) as caught:
        resolve(f"oci:{layout}")
    assert caught.value.hint
    assert files(state) <= {"lock", "adding", "index.json"}


def test_damaged_layouts(tmp_path: Path) -> None:
    layout = simple_layout(tmp_path / "l", HELLO)
    digest = json.loads((layout / "index.json").read_text())["manifests"][0]["digest"]
    blob = layout / "blobs" / "sha256" / digest[7:]
    blob.write_bytes(blob.read_bytes() + b" ")
    with pytest.raises(ImageError, match="does not have the digest"):
        resolve(f"oci:{layout}")
    blob.write_bytes(b" " * (9 << 20))
    with pytest.raises(ImageError, match="is larger than"):
        resolve(f"oci:{layout}")
    for content, words in [(b"{", "not JSON"), (b"[]", "not a JSON object"), (b"[" * 100_000, "not JSON")]:
        (layout / "index.json").write_bytes(content)
        with pytest.raises(ImageError, match=words):
            resolve(f"oci:{layout}")
    (layout / "index.json").write_text('{"manifests": []}')
    with pytest.raises(ImageError, match="holds no image"):
        resolve(f"oci:{layout}")
    (layout / "index.json").unlink()
    with pytest.raises(ImageError, match="has no index"):
        resolve(f"oci:{layout}")


def test_indexes_within_indexes_end(tmp_path: Path) -> None:
    blobs = Blobs()
    inner = image(blobs, [HELLO])
    for _ in range(6):
        inner = blobs.put_json({"schemaVersion": 2, "mediaType": INDEX, "manifests": [inner]}, INDEX)
    with pytest.raises(ImageError, match="indexes within indexes"):
        resolve(f"oci:{write_layout(tmp_path / 'l', blobs, [inner])}")


def test_plain_directories_are_used_as_they_are(tmp_path: Path, state: Path) -> None:
    made = resolve(f"rootfs:{tmp_path}")
    assert (made.rootfs_dir, made.rootfs_path, made.config, made.id) == (str(tmp_path), "", {}, "")
    assert not state.exists()


# ---- names, removal ----


def test_missing_images(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(NotFoundError, match="not in the local store") as caught:
        resolve("alpine", pull="never")
    assert caught.value.hint == "kata pull alpine:latest"
    for call in (store.find, changes.remove):
        with pytest.raises(NotFoundError):
            call("alpine")
    with pytest.raises(NotFoundError, match="no image with the id"):
        resolve("sha256:abcdef")
    assert store.list_images() == []


def test_finding_by_id(tmp_path: Path) -> None:
    made = resolve(f"oci:{simple_layout(tmp_path / 'l', HELLO)}")
    for text in (made.id, made.id[7:], made.id[7:15], made.id[:20]):
        assert store.find(text).id == resolve(text, pull="never").id == made.id
    with pytest.raises(NotFoundError):
        store.find(made.id[7:10])
    assert [each.id for each in store.list_images()] == [made.id]


def test_removal(tmp_path: Path, state: Path) -> None:
    blobs = Blobs()
    layout = write_layout(tmp_path / "l", blobs, [image(blobs, [HELLO], **tagged("latest"))])
    made = resolve(f"oci:{layout}")
    resolve(f"oci:{layout}:latest")
    with pytest.raises(StateError, match="has 2 names"):
        changes.remove(made.id)
    assert changes.remove(f"oci:{layout}:latest") == [f"Untagged: oci:{layout}:latest"]
    with pytest.raises(StateError, match="used by the container web and 1 more"):
        changes.remove(f"oci:{layout}", in_use={made.id: ["web", "db"]})
    assert changes.remove(f"oci:{layout}", force=True, in_use={made.id: ["web"]}) == [
        f"Untagged: oci:{layout}"
    ]
    assert os.path.exists(made.rootfs_path)
    assert changes.gc(in_use=[made.id]) == []
    assert store.find(made.id).names == []
    assert changes.gc() == [made.id]
    assert files(state) == {"index.json", "lock", "adding"}


def test_removal_by_id_with_force(tmp_path: Path) -> None:
    blobs = Blobs()
    layout = write_layout(tmp_path / "l", blobs, [image(blobs, [HELLO], **tagged("latest"))])
    made = resolve(f"oci:{layout}")
    resolve(f"oci:{layout}:latest")
    assert changes.remove(made.id[7:20], force=True)[-1] == f"Deleted: {made.id}"
    assert store.list_images() == []


def test_gc_clears_what_a_crash_left(tmp_path: Path, state: Path) -> None:
    made = resolve(f"oci:{simple_layout(tmp_path / 'l', HELLO)}")
    kept = files(state)
    for name in (
        "rootfs/x.erofs.1.tmp",
        "rootfs/" + "0" * 64 + ".erofs",
        "blobs/sha256/ff",
        "index.json.9.tmp",
    ):
        (state / name).write_text("left")
    (state / "pulls" / "ff").mkdir(parents=True)
    (state / "pulls" / "ff" / "layer").write_text("left")
    with changes.locked("adding", shared=True):
        assert changes.gc() == []
    assert len(changes.gc()) == 5
    assert files(state) == kept
    assert store.find(made.id).id == made.id


def test_a_damaged_store_is_told(tmp_path: Path, state: Path) -> None:
    resolve(f"oci:{simple_layout(tmp_path / 'l', HELLO)}")
    (state / "index.json").write_text("{")
    with pytest.raises(ImageError, match=r"index\.json is damaged"):
        resolve("alpine")


# ---- failures while converting ----


def test_a_full_disk(tmp_path: Path, state: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = os.pwrite

    def full(fd: int, data: Any, at: int) -> int:
        if at > 1 << 20:
            raise OSError(errno.ENOSPC, "No space left on device")
        return real(fd, data, at)

    monkeypatch.setattr(os, "pwrite", full)
    layout = simple_layout(tmp_path / "l", layer(member("big", content=os.urandom(3 << 20))))
    with pytest.raises(ResourceExhaustedError, match="no space left") as caught:
        resolve(f"oci:{layout}")
    assert "kata gc" in caught.value.hint
    assert files(state) == {"adding"}


def test_names_and_images_are_removed_on_a_full_disk(tmp_path: Path, state: Path) -> None:
    small = state.parent
    small.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "none", small], check=True)
    try:
        for name in ("one", "two"):
            resolve(f"oci:{simple_layout(tmp_path / name, HELLO)}")
        assert len(store.Index().names) == 2
        with contextlib.suppress(OSError), open(small / "fill", "wb", buffering=0) as file:
            while file.write(bytes(100)):
                pass
        # The first takes a name away and so frees nothing.
        assert changes.remove(f"oci:{tmp_path}/one") == [f"Untagged: oci:{tmp_path}/one"]
        assert list(store.Index().names) == [f"oci:{tmp_path}/two"]
        assert changes.remove(f"oci:{tmp_path}/two")[0] == f"Untagged: oci:{tmp_path}/two"
        assert store.Index().names == {}
        assert not [name for name in files(state) if name.startswith(("rootfs", "records", "blobs"))]
    finally:
        subprocess.run(["umount", small], check=True)


def test_a_state_directory_that_cannot_be_made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("KATA_STATE_DIR", str(tmp_path / "file"))
    with pytest.raises(HostError, match="cannot be read"):
        resolve(f"oci:{simple_layout(tmp_path / 'l', HELLO)}")


def test_without_nameless_files(tmp_path: Path, state: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a file system that does not know O_TMPFILE the file has a name that gc recognises."""
    real = os.open

    def open_without(path: Any, flags: int, *rest: Any, **more: Any) -> int:
        if flags & os.O_TMPFILE == os.O_TMPFILE:
            raise OSError(errno.EOPNOTSUPP, "Operation not supported")
        return real(path, flags, *rest, **more)

    monkeypatch.setattr(os, "open", open_without)
    layout = simple_layout(tmp_path / "l", HELLO)
    made = resolve(f"oci:{layout}")
    assert Erofs(Path(made.rootfs_path)).tree()["hello"].content == b"hello\n"
    _spoil(layout, MALFORMED["its configuration says sha256:1"])
    before = files(state)
    with pytest.raises(ImageError):
        resolve(f"oci:{layout}")
    assert files(state) == before


def test_many_at_once_convert_once(tmp_path: Path, state: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    layouts = [
        simple_layout(
            tmp_path / str(n), HELLO, layer(member("x", content=bytes([n]))), config={"Cmd": [str(n)]}
        )
        for n in range(2)
    ]
    made: list[store.Image] = []
    failed: list[BaseException] = []

    def one(number: int) -> None:
        try:
            made.append(resolve(f"oci:{layouts[number % 2]}"))
        except BaseException as error:
            failed.append(error)

    threads = [threading.Thread(target=one, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failed
    assert len({each.id for each in made}) == 2
    assert not [name for name in files(state) if "tmp" in name or name.endswith(".lock")]


def test_progress_is_told(tmp_path: Path) -> None:
    told: list[tuple[str, int, int]] = []
    layout = simple_layout(tmp_path / "l", layer(member("big", content=os.urandom(3 << 20))), how="gzip")
    resolve(f"oci:{layout}", progress=lambda *step: told.append(step))
    assert told[0][0] == "unpack"
    assert all(0 <= done <= total for _, done, total in told)
    assert told[-1][1] == told[-1][2] or told[-1][0] == "write"


# ---- documents ----


def test_strings_of_an_image_cannot_reach_the_terminal(tmp_path: Path) -> None:
    blobs = Blobs()
    layout = write_layout(tmp_path / "l", blobs, [image(blobs, [HELLO], **tagged("\x1b[31m"))])
    with pytest.raises(ImageError) as caught:
        resolve(f"oci:{layout}:x")
    assert caught.value.hint.isprintable()
    _spoil(layout, lambda m, c: c.update(created="\x1b[31m", variant="\x1b[31m"))
    made = resolve(f"oci:{layout}")
    assert (made.created, made.platform) == ("", "linux/amd64")


def test_chain_ids() -> None:
    """The rule of the OCI image specification, by hand."""
    a, b = sha256(b"a"), sha256(b"b")
    assert manifest.chain_id([a]) == a
    assert manifest.chain_id([a, b]) == sha256(f"{a} {b}".encode())
    assert manifest.chain_id([]) == sha256(b"")


def test_the_uuid_follows_from_the_layers(tmp_path: Path) -> None:
    made = resolve(f"oci:{simple_layout(tmp_path / 'l', HELLO)}")
    raw = Path(made.rootfs_path).read_bytes()[1024 + 48 : 1024 + 64]
    digest = bytes.fromhex(sha256(HELLO)[7:])
    assert (raw[:6], raw[6] >> 4, raw[8] >> 6) == (digest[:6], 8, 2)
    assert build(tmp_path / "other", HELLO).stat().st_size == made.size


# ---- the image that `make run` uses ----


def test_busybox_image(tmp_path: Path) -> None:
    tool = ROOT / "tools" / "make-busybox-image"
    if not os.path.exists("/bin/busybox"):
        pytest.skip("needs a static busybox (apt-get install busybox-static)")
    for name in ("a", "b"):
        done = subprocess.run([tool, tmp_path / name], capture_output=True, text=True, check=False)
        if "dynamically linked" in done.stderr:
            pytest.skip("needs a static busybox (apt-get install busybox-static)")
        assert done.returncode == 0, done.stderr
    assert (tmp_path / "a" / "index.json").read_bytes() == (tmp_path / "b" / "index.json").read_bytes()
    made = resolve(f"oci:{tmp_path}/a:latest", platform=None)
    assert made.config["Cmd"] == ["sh"]
    tree = Erofs(Path(made.rootfs_path)).tree()
    assert tree["bin/busybox"].content == Path("/bin/busybox").read_bytes()
    assert tree["bin/busybox"].mode & 0o7777 == 0o755
    for name in ("bin/sh", "usr/bin/id", "sbin/ip"):
        target = os.path.normpath(os.path.join(os.path.dirname(name), tree[name].content.decode()))
        assert target == "bin/busybox"
    assert tree["tmp"].mode & 0o7777 == 0o1777
    assert b"nobody" in tree["etc/passwd"].content


def test_busybox_tool_refuses_a_directory_of_others(tmp_path: Path) -> None:
    (tmp_path / "precious").touch()
    done = subprocess.run(
        [ROOT / "tools" / "make-busybox-image", tmp_path], capture_output=True, text=True, check=False
    )
    assert done.returncode == 1
    assert done.stderr.startswith("error: ")
    assert os.listdir(tmp_path) == ["precious"]
