"""Layers applied over each other: paths, links, whiteouts, hostile entries, limits, compression."""

from __future__ import annotations

import bz2
import gzip
import io
import lzma
import os
import stat
import tarfile
import tracemalloc
import zlib
from collections.abc import Callable
from pathlib import Path

import pytest
import zstandard
from image_support import Erofs, Inode, build, compress, layer, member

from kata.errors import ImageError
from kata.storage.layers import Limits, limits_from_environment
from kata.storage.layers_codec import STEP, Stream, decompressed, kind_of


def tree(tmp_path: Path, *layers: bytes, limits: Limits | None = None) -> dict[str, Inode]:
    return Erofs(build(tmp_path / "image", *layers, limits=limits)).tree()


def names(tmp_path: Path, *layers: bytes) -> set[str]:
    return set(tree(tmp_path, *layers)) - {""}


# ---- layers over each other ----


def test_upper_layers_win(tmp_path: Path) -> None:
    found = tree(
        tmp_path,
        layer(member("d", "dir", mode=0o700), member("d/a", content=b"1"), member("d/b", content=b"1")),
        layer(member("d", "dir", mode=0o711, uid=5), member("d/a", content=b"2")),
    )
    assert (found["d"].mode & 0o7777, found["d"].uid) == (0o711, 5)
    assert (found["d/a"].content, found["d/b"].content) == (b"2", b"1")


def with_mount_points(tmp_path: Path, *members: tuple[tarfile.TarInfo, bytes]) -> dict[str, Inode]:
    return Erofs(build(tmp_path / "image", layer(*members), mount_points=True)).tree()


def test_mount_points_are_added(tmp_path: Path) -> None:
    found = with_mount_points(tmp_path, member("bin", "dir"))
    assert {name: (inode.kind, inode.mode & 0o7777) for name, inode in found.items() if name} == {
        **dict.fromkeys(("bin", "dev", "etc", "proc", "sys"), ("dir", 493)),
        **{f"etc/{name}": ("file", 0o644) for name in ("hostname", "hosts", "resolv.conf")},
    }


def test_mount_points_of_the_image_stay_as_they_are(tmp_path: Path) -> None:
    found = with_mount_points(
        tmp_path,
        member("etc", "dir", mode=0o700),
        member("etc/hosts", content=b"mine"),
        member("etc/resolv.conf", "symlink", link="../run/resolv.conf"),
        member("proc", content=b"a file"),
    )
    assert found["etc"].mode & 0o7777 == 0o700
    assert found["etc/hosts"].content == b"mine"
    assert found["etc/resolv.conf"].kind == "symlink"
    assert found["proc"].kind == "file"


def test_mount_points_are_not_put_behind_a_link(tmp_path: Path) -> None:
    found = with_mount_points(tmp_path, member("conf", "dir"), member("etc", "symlink", link="conf"))
    assert set(found) == {"", "conf", "dev", "etc", "proc", "sys"}


def test_the_last_of_equal_entries_wins(tmp_path: Path) -> None:
    found = tree(
        tmp_path, layer(member("a", content=b"1" * 9000), member("a", content=b"2"), member("./a", "fifo"))
    )
    assert found["a"].kind == "fifo"


def test_kinds_replace_each_other(tmp_path: Path) -> None:
    layers = [
        layer(member("x", "dir"), member("x/below", content=b"1")),
        layer(member("x", content=b"file")),
        layer(member("x", "symlink", link="y")),
        layer(member("x", "dir"), member("x/new")),
    ]
    assert names(tmp_path, *layers[:1]) == {"x", "x/below"}
    assert tree(tmp_path, *layers[:2])["x"].content == b"file"
    assert tree(tmp_path, *layers[:3])["x"].kind == "symlink"
    assert names(tmp_path, *layers) == {"x", "x/new"}


def test_missing_parents_are_made(tmp_path: Path) -> None:
    found = tree(tmp_path, layer(member("a/b/c", content=b"1", uid=9, mtime=77)))
    assert found["a/b"][:4] == (stat.S_IFDIR | 0o755, 0, 0, 77)


def test_root_can_be_described(tmp_path: Path) -> None:
    found = tree(tmp_path, layer(member("./", "dir", mode=0o711, uid=3, xattrs={"user.a": "b"})))
    assert (found[""].mode & 0o7777, found[""].uid, found[""].xattrs) == (0o711, 3, (("user.a", b"b"),))


def test_names_are_cleaned(tmp_path: Path) -> None:
    entries = [
        member("/abs"),
        member("./dot"),
        member("a//b/./c"),
        member("x/../y"),
        member("/../up/../etc", "dir"),
    ]
    assert names(tmp_path, layer(*entries[:4])) == {"abs", "dot", "a", "a/b", "a/b/c", "y"}
    with pytest.raises(ImageError, match=r"leads out of the image"):
        tree(tmp_path, layer(entries[4]))


@pytest.mark.parametrize("link", ["usr/lib", "/usr/lib", "../../../usr/lib", "usr/../usr/./lib", "/lib2"])
def test_links_as_parents_are_followed_within_the_image(tmp_path: Path, link: str) -> None:
    """As with containerd: what an upper layer puts into /lib arrives where a lower layer's link points to."""
    found = tree(
        tmp_path,
        layer(
            member("usr/lib", "dir"),
            member("lib2", "symlink", link="usr/lib"),
            member("lib", "symlink", link=link),
        ),
        layer(
            member("lib/x.so", content=b"so"), member("hard", "link", link="lib/x.so"), member("lib/.wh.old")
        ),
    )
    assert found["usr/lib/x.so"].content == b"so"
    assert found["hard"].nid == found["usr/lib/x.so"].nid
    assert found["lib"].kind == "symlink"


def test_links_that_point_nowhere_or_in_circles(tmp_path: Path) -> None:
    found = names(tmp_path, layer(member("d", "symlink", link="/not/there"), member("d/x")))
    assert found == {"d", "not", "not/there", "not/there/x"}
    with pytest.raises(ImageError, match="too many symbolic links"):
        tree(
            tmp_path,
            layer(member("a", "symlink", link="b"), member("b", "symlink", link="a"), member("a/x")),
        )


def test_hard_links(tmp_path: Path) -> None:
    found = tree(
        tmp_path,
        layer(
            member("a", content=b"1" * 5000),
            member("b", "link", link="./a"),
            member("s", "symlink", link="a"),
        ),
        layer(member("c", "link", link="/b"), member("t", "link", link="s"), member("a", content=b"2")),
        layer(member(".wh.b"), member("c", "link", link="c")),
    )
    assert found["c"].content == b"1" * 5000
    assert found["c"].nlink == 1
    assert found["t"].kind == "symlink"
    assert found["a"].content == b"2"
    for target, words in [("gone", "does not exist"), ("d", "is a directory"), ("/", "root directory")]:
        with pytest.raises(ImageError, match=words):
            tree(tmp_path, layer(member("d", "dir"), member("x", "link", link=target)))


def test_whiteouts(tmp_path: Path) -> None:
    lower = layer(member("a/one"), member("a/two"), member("a/sub/x"), member("b"), member("c/deep/er"))
    upper = [member("a/.wh.one"), member(".wh.b"), member(".wh.c"), member(".wh.never"), member("q/.wh.x")]
    assert names(tmp_path, lower, layer(*upper)) == {"a", "a/two", "a/sub", "a/sub/x"}


@pytest.mark.parametrize("first", [True, False])
def test_whiteouts_do_not_touch_their_own_layer(tmp_path: Path, first: bool) -> None:
    lower = layer(member("d/old"), member("d/sub/old"), member("f", content=b"1"), member("e/old"))
    white = [member("d/.wh..wh..opq"), member(".wh.f"), member(".wh.e")]
    fresh = [
        member("d", "dir"), member("d/new"), member("d/sub", "dir"), member("d/sub/new"), member("f", content=b"2"),
        member("e", "dir"), member("e/new"),
    ]  # fmt: skip
    found = tree(tmp_path, lower, layer(*(white + fresh if first else fresh + white)))
    assert set(found) == {"", "d", "d/new", "d/sub", "d/sub/new", "f", "e", "e/new"}
    assert found["f"].content == b"2"


def test_aufs_bookkeeping_is_dropped(tmp_path: Path) -> None:
    assert names(tmp_path, layer(member(".wh..wh.aufs"), member(".wh..wh.plnk", "dir"), member("a"))) == {
        "a"
    }


def test_whiteouts_that_name_nothing(tmp_path: Path) -> None:
    for name in (".wh.", "d/.wh...", ".wh.."):
        with pytest.raises(ImageError, match="names no file"):
            tree(tmp_path, layer(member("d", "dir"), member(name)))


# ---- attributes and devices ----


def test_which_attributes_are_kept(tmp_path: Path) -> None:
    given = {
        "user.mine": "1", "security.capability": "2", "system.posix_acl_access": "3", "system.posix_acl_default": "4",
        "trusted.overlay.opaque": "y", "user.overlay.redirect": "/etc", "trusted.x": "1", "btrfs.compression": "zstd",
    }  # fmt: skip
    found = tree(tmp_path, layer(member("a", xattrs=given), member("d", "dir", xattrs=given)))
    expected = {k: v.encode() for k, v in list(given.items())[:4]}
    assert dict(found["a"].xattrs) == dict(found["d"].xattrs) == expected


def test_an_overlay_whiteout_device_deletes(tmp_path: Path) -> None:
    lower = layer(member("a", content=b"1"), member("b"))
    assert names(tmp_path, lower, layer(member("a", "char", device=(0, 0)))) == {"b"}


def test_nothing_appears_on_the_host(tmp_path: Path) -> None:
    work = tmp_path / "work"
    work.mkdir()
    before = os.getcwd()
    os.chdir(work)
    try:
        build(
            tmp_path / "image",
            layer(
                member("dev/sda", "block", device=(8, 0)), member("x", content=b"1"), member("pipe", "fifo"),
                member("evil", "symlink", link="/etc"), member("evil/passwd", content=b"root::0:0::/:/bin/sh\n"),
            ),
        )  # fmt: skip
    finally:
        os.chdir(before)
    assert not list(work.iterdir())
    assert b"/bin/sh\n" in (tmp_path / "image").read_bytes()


HOSTILE = {
    "leads out of the image": [member("../../etc/passwd")],
    "more than 255 bytes": [member("n" * 256)],
    "more than 4096 bytes": [member("d/" * 2100 + "x")],
    "is not a directory": [member("f"), member("f/x")],
    "root of the file system is not a directory": [member(".", content=b"x")],
    "device number 5000:1 does not exist": [member("d", "char", device=(5000, 1))],
    "target has 0 bytes": [member("s", "symlink", link="")],
    "target has 4096 bytes": [member("s", "symlink", link="x" * 4096)],
    "is not a user and group": [member("f", uid=0xFFFFFFFF)],
    "attributes are too long": [member("f", xattrs={f"user.{n}": "x" * 60_000 for n in range(4)})],
    "attribute user.x is too long": [member("f", xattrs={"user.x": "y" * 70_000})],
    "too many extended attributes": [member("/", "dir", xattrs={"user.x": "y" * 3000})],
}


@pytest.mark.parametrize("words", HOSTILE)
def test_hostile_entries_are_named_errors(tmp_path: Path, words: str) -> None:
    with pytest.raises(ImageError, match=words) as caught:
        tree(tmp_path, layer(member("good")), layer(*HOSTILE[words]))
    assert "layer 2, entry " in caught.value.message
    assert caught.value.hint
    assert len(caught.value.message) < 700


def test_a_name_cannot_reach_the_terminal(tmp_path: Path) -> None:
    with pytest.raises(ImageError) as caught:
        tree(tmp_path, layer(member("\x1b[31m/../../x\n")))
    assert caught.value.message.isprintable()


def test_limits(tmp_path: Path) -> None:
    many = layer(*(member(f"f{n}") for n in range(100)))
    with pytest.raises(ImageError, match="more than 50 entries"):
        tree(tmp_path, many, limits=Limits(entries=50))
    with pytest.raises(ImageError, match="more than 1000 bytes uncompressed"):
        tree(tmp_path, layer(member("f", content=bytes(1001))), limits=Limits(size=1000))
    with pytest.raises(ImageError, match="bytes of names"):
        tree(tmp_path, many, limits=Limits(names=200))
    slow = [
        member("l", "symlink", link="/".join(["d", ".."] * 800) + "/d"),
        *(member(f"l/{n}/x") for n in range(90)),
    ]
    with pytest.raises(ImageError, match="made to be slow"):
        tree(tmp_path, layer(*slow), limits=Limits(work=100_000))
    opaque = [*(member(f"d/{n}") for n in range(500)), *[member("d/.wh..wh..opq")] * 500]
    with pytest.raises(ImageError, match="made to be slow"):
        tree(tmp_path, layer(*opaque), limits=Limits(work=100_000))


def test_limits_from_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KATA_IMAGE_MAX_SIZE", "123")
    assert limits_from_environment().size == 123
    monkeypatch.setenv("KATA_IMAGE_MAX_SIZE", "much")
    with pytest.raises(ImageError, match="'much' is not a number"):
        limits_from_environment()


def test_a_bomb_takes_no_memory(tmp_path: Path) -> None:
    """256 MiB of zeros and of sparse file, in 300 KB: refused at the limit without being held."""
    packed = gzip.compress(layer(member("z", content=bytes(256 << 20))), 9)
    assert len(packed) < 1 << 20
    tracemalloc.start()
    try:
        with pytest.raises(ImageError, match="uncompressed"):
            tree(tmp_path, packed, limits=Limits(size=100 << 20))
        endless = zlib.compressobj(9, wbits=31)
        with pytest.raises(ImageError, match="too long"):
            Stream(io.BytesIO(endless.compress(bytes(64 << 20)) + endless.flush()), 1 << 20).skip(1 << 30)
        assert tracemalloc.get_traced_memory()[1] < 128 << 20  # the bombs themselves are made in memory here
    finally:
        tracemalloc.stop()


# ---- compression ----


def unpacked(data: bytes) -> bytes:
    pieces = list(decompressed(io.BytesIO(data)))
    assert all(len(piece) <= STEP for piece in pieces)
    return b"".join(pieces)


PLAIN = bytes(range(256)) * 5000


@pytest.mark.parametrize(
    ("kind", "packed"),
    [
        ("plain", PLAIN),
        ("gzip", gzip.compress(PLAIN)),
        (
            "gzip",
            gzip.compress(PLAIN[:1000]) + gzip.compress(b"") + gzip.compress(PLAIN[1000:]) + bytes(512),
        ),
        ("zstd", zstandard.compress(PLAIN)),
        (
            "zstd",
            zstandard.compress(PLAIN[:1000])
            + b"\x51\x2a\x4d\x18\3\0\0\0abc"
            + zstandard.compress(PLAIN[1000:]),
        ),
        ("zstd", b"\x5a\x2a\x4d\x18\3\0\0\0abc" + zstandard.compress(PLAIN)),
        ("bzip2", bz2.compress(PLAIN[:7]) + bz2.compress(PLAIN[7:])),
        ("xz", lzma.compress(PLAIN)),
    ],
)
def test_compressions(kind: str, packed: bytes) -> None:
    assert kind_of(packed[:6]) == kind
    assert unpacked(packed) == PLAIN


@pytest.mark.parametrize("kind", ["gzip", "bzip2", "xz", "zstd"])
def test_damaged_compression(kind: str) -> None:
    chance = os.urandom(50_000)
    compressors: dict[str, Callable[[bytes], bytes]] = {
        "gzip": gzip.compress,
        "bzip2": bz2.compress,
        "xz": lzma.compress,
        "zstd": zstandard.compress,
    }
    packed = bytearray(compressors[kind](chance))
    half = bytes(packed[: len(packed) // 2])
    if kind == "zstd":
        assert len(unpacked(half)) < len(chance)  # noticed by the archive's end, and by the digest
    else:
        with pytest.raises(ImageError, match=f"the {kind} data end early"):
            unpacked(half)
    packed[6:13] = b"\xff" * 7
    with pytest.raises(ImageError, match=f"the {kind} data are damaged"):
        unpacked(bytes(packed))


def test_garbage_behind_gzip_is_damage() -> None:
    with pytest.raises(ImageError, match="damaged"):
        unpacked(gzip.compress(b"x") + b"garbage")


def test_a_window_that_takes_too_much_memory_is_refused() -> None:
    parameters = zstandard.ZstdCompressionParameters(window_log=30, enable_ldm=True)
    packed = zstandard.ZstdCompressor(compression_params=parameters).compressobj()
    with pytest.raises(ImageError, match="damaged"):
        unpacked(packed.compress(b"x" * 10) + packed.flush())


@pytest.mark.parametrize("how", ["plain", "gzip", "zstd"])
def test_the_digest_covers_all_of_the_archive(tmp_path: Path, how: str) -> None:
    plain = layer(member("a", content=b"1" * 70_000)) + b"trailer behind the end"
    ticks: list[int] = []
    stream = Stream(io.BytesIO(compress(plain, how)), 1 << 30, ticks.append)
    assert stream.read(100) == plain[:100]
    assert b"".join(stream.pieces(60_000)) == plain[100:60_100]
    assert stream.skip(1 << 30) == len(plain) - 60_100
    assert stream.read(5) == b""
    stream.close()
    import hashlib

    assert stream.digest() == "sha256:" + hashlib.sha256(plain).hexdigest()
    assert sum(ticks) == len(compress(plain, how))
