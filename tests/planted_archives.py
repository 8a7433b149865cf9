"""Nasty images: layers whose archives or packing are not what they should be."""

from __future__ import annotations

import gzip
import struct
import zlib

import planted_files as made
import zstandard
from image_support import layer, member
from planted_files import TOKENS, entry, pem
from planted_images import Image, Stored, case, raw


@case
def absolute_names() -> Image:
    data = raw(*(entry(name, b"x", mode=0o4755) for name in ("/etc/a", "//etc/b")))
    return Image([data], [("odd-member", "/etc/a"), ("set-uid", "/etc/a"), ("set-uid", "/etc/b")])


@case
def names_that_climb() -> Image:
    data = raw(
        entry("../../etc/passwd", b"x"), entry("a/../../b", b"x"), entry("a/../inside", b"x", mode=0o4755),
        entry("etc/shadow", kind=b"1", link=b"../../etc/shadow"),
    )  # fmt: skip
    found = [
        ("path-escape", name) for name in ("../../etc/passwd", "a/../../b", "a/../inside", "/etc/shadow")
    ]
    return Image([data], [*found, ("set-uid", "/inside")])


@case
def links_out() -> Image:
    data = layer(
        member("out", "symlink", link="../../../etc"), member("through", "symlink", link="/etc"),
        member("etc/x", content=b"x"), member("through/passwd", content=b"x", mode=0o4755),
        member("run/docker.sock", "symlink", link="/host/docker.sock"),
        member("host-root", "symlink", link="/proc/1/root"),
        member("disk", "symlink", link="/dev/sda1"), member("fine", "symlink", link="../etc"),
        member("hard", "link", link="not/there"),
    )  # fmt: skip
    return Image(
        [data],
        [("odd-link", "/out"), ("odd-member", "/through/passwd"), ("set-uid", "/etc/passwd"),
         ("odd-link", "/run/docker.sock"), ("odd-link", "/host-root"), ("odd-link", "/disk"), ("odd-link", "/hard"),
         ("odd-link", "/fine")],
    )  # fmt: skip


@case
def parents_that_are_none() -> Image:
    data = raw(
        entry("loop", kind=b"2", link=b"pool"), entry("pool", kind=b"2", link=b"loop"), entry("file", b"x"),
        entry("loop/x", b"x"), entry("file/x", b"x"),
    )  # fmt: skip
    return Image([data], [("odd-member", "/loop/x"), ("odd-member", "loop/x"), ("odd-member", "file/x")])


@case
def sparse_files() -> Image:
    key = b"key = " + TOKENS["aws"].encode() + b"\n"
    data = raw(
        made.sparse_1_0("srv/a", 100_000, [(0, b"x" * 100), (50_000, key)]),
        made.sparse_old("srv/b", 90_000, [(0, b"x" * 100), (80_000, key)]),
        made.sparse_1_0("srv/huge", 8 << 40, [(7 << 40, key)]), entry("srv/after", b"x", mode=0o4755),
    )  # fmt: skip
    return Image(
        [data],
        [("secret", "/srv/a"), ("secret", "/srv/b"), ("archive-bomb", "srv/huge"), ("secret", "/srv/huge"),
         ("set-uid", "/srv/after")],
    )  # fmt: skip


@case
def a_malformed_sparse_map() -> Image:
    data = raw(entry("bin/a", b"x", mode=0o4755), made.sparse_1_0("srv/a", 100, [(50, b"x" * 100)]))
    return Image([data], [("set-uid", "/bin/a"), ("bad-layer", "")])


@case
def a_size_that_lies() -> Image:
    return Image(
        [entry("bin/a", b"x", mode=0o4755) + entry("srv/b", b"x" * 600, size=1 << 50)],
        [("set-uid", "/bin/a"), ("bad-layer", "")],
    )


@case
def two_sizes() -> Image:
    data = raw(
        entry("srv/a", b"x" * 700, size=3, records={"size": b"700"}), entry("bin/b", b"x", mode=0o4755)
    )
    return Image([data], [("odd-member", "srv/a"), ("set-uid", "/bin/b")])


@case
def odd_headers() -> Image:
    data = raw(
        made.pax({"path": b"etc/of-all"}, b"g"), entry("bin/a", b"x", mode=0o4755), entry("bin/b", kind=b"Q"),
        entry("dir/", kind=b"5", size=1000), entry("bin/c", b"x", mode=0o4755),
    )  # fmt: skip
    return Image(
        [data],
        [("odd-member", "bin/a"), ("set-uid", "/bin/a"), ("odd-member", "/bin/b"), ("set-uid", "/bin/c")],
    )


@case
def headers_without_a_member() -> Image:
    """Extension headers without end, for whoever waits for what they are about."""
    many = b"".join(made.pax({"path": b"bin/b"}) for _ in range(20))
    data = entry("bin/a", b"x", mode=0o4755) + many + entry("bin/c", b"x", mode=0o4755)
    few = b"".join(made.pax({"path": b"bin/other"}, kind) for kind in (b"x", b"x"))
    return Image(
        [raw(data), raw(few + entry("bin/c", b"x", mode=0o4755))],
        [("set-uid", "/bin/a"), ("bad-layer", ""), ("set-uid", "/bin/other")],
    )


@case
def data_behind_the_end() -> Image:
    data = raw(entry("bin/a", b"x", mode=0o4755)) + bytes(8192)
    return Image([data + entry("bin/evil", pem(), mode=0o4755)], [("set-uid", "/bin/a"), ("odd-member", "")])


@case
def a_header_behind_one_block_of_zeros() -> Image:
    data = entry("bin/a", b"x", mode=0o4755) + bytes(512) + raw(entry("bin/evil", mode=0o4755))
    return Image([data], [("set-uid", "/bin/a"), ("bad-layer", "")])


@case
def a_wrong_checksum() -> Image:
    data = bytearray(raw(entry("bin/a", b"x", mode=0o4755), entry("bin/b", b"x", mode=0o4755)))
    data[1024] ^= 1
    return Image([bytes(data), layer(member("bin/c", mode=0o4755))],
                 [("set-uid", "/bin/a"), ("bad-layer", ""), ("set-uid", "/bin/c")])  # fmt: skip


@case
def gzip_that_is_broken() -> Image:
    data = layer(member("bin/a", mode=0o4755), member("x", content=bytes(range(256)) * 4000))
    layers: list[bytes | Stored] = [
        Stored(made.broken_gzip(data, how)) for how in ("cut", "checksum", "garbage")
    ]
    return Image([*layers, layer(member("bin/b", mode=0o4755))],
                 [("bad-layer", "")] * 3 + [("set-uid", "/bin/a"), ("set-uid", "/bin/b")],
                 hidden=["/x", "/x", "/bin/a", "/bin/a"])  # fmt: skip


@case
def gzip_of_several_members() -> Image:
    data = layer(member("bin/a", mode=0o4755), member("x", content=b"x" * 9000))
    stored = gzip.compress(data[:700]) + gzip.compress(data[700:]) + bytes(100)
    return Image([Stored(stored)], [("set-uid", "/bin/a")])


@case
def zstd_whole_and_broken() -> Image:
    data = layer(member("bin/a", mode=0o4755), member("x", content=bytes(range(256)) * 4000))
    packed = zstandard.ZstdCompressor().compress(data)
    skippable = struct.pack("<II", 0x184D2A50, 5) + b"hello"
    return Image(
        [Stored(packed[:50] + b"\xff" * 20 + packed[70:], "zstd"),
         Stored(skippable + packed, "zstd"), Stored(packed[:40], "zstd")],
        [("bad-layer", "")] * 2 + [("set-uid", "/bin/a")],
    )  # fmt: skip


@case
def packed_as_nobody_may() -> Image:
    import bz2
    import lzma

    data = layer(member("bin/a", mode=0o4755))
    return Image([Stored(bz2.compress(data), ""), Stored(lzma.compress(data), ""), data],
                 [("bad-layer", "")] * 2 + [("set-uid", "/bin/a")])  # fmt: skip


@case
def a_layer_that_is_another() -> Image:
    data = layer(member("bin/a", mode=0o4755))
    lie = "sha256:" + "5" * 64
    return Image([Stored(data, "", lie)], [("set-uid", "/bin/a"), ("digest", "")])


@case
def a_layer_that_is_not_there() -> Image:
    layers: list[bytes | Stored] = [layer(member(f"bin/{name}", mode=0o4755)) for name in "ab"]
    return Image(layers, [("bad-layer", ""), ("set-uid", "/bin/b")], missing=(0,))


@case
def a_bomb() -> Image:
    packer = zlib.compressobj(9, wbits=31)
    size = 3 << 29
    stored = packer.compress(made.block(b"zeros", size))
    for _ in range(size >> 22):
        stored += packer.compress(bytes(1 << 22))
    stored += packer.flush()
    return Image([Stored(stored), layer(member("bin/a", mode=0o4755))],
                 [("archive-bomb", ""), ("set-uid", "/bin/a")])  # fmt: skip
