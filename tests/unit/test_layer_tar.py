"""What a guest sends of a container's files becomes a tar stream; nonsense is refused."""

from __future__ import annotations

import io
import os
import stat
import tarfile
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kata.errors import GuestProtocolError, ImageError
from kata.proto.agentext_pb import LayerAttribute, LayerEntry, LayerPart
from kata.storage.layer_tar import LayerTar

DIR, FILE, LINK = stat.S_IFDIR | 0o755, stat.S_IFREG | 0o644, stat.S_IFLNK | 0o777
TOP = LayerPart(entry=LayerEntry(path=b"", mode=DIR))


def entry(path: str | bytes, mode: int = FILE, **more: Any) -> LayerPart:
    raw = path.encode() if isinstance(path, str) else path
    return LayerPart(entry=LayerEntry(path=raw, mode=mode, **more))


def data(content: bytes, offset: int = 0) -> LayerPart:
    return LayerPart(offset=offset, data=content)


def written(parts: list[LayerPart], most_bytes: int | None = None) -> bytes:
    out = io.BytesIO()
    tar = LayerTar(out.write, most_bytes)
    tar.add(parts)
    tar.finish()
    return out.getvalue()


def members(parts: list[LayerPart]) -> dict[str, tuple[tarfile.TarInfo, bytes]]:
    with tarfile.open(fileobj=io.BytesIO(written(parts)), mode="r:", errorlevel=2) as tar:
        found = {}
        for member in tar:
            file = tar.extractfile(member) if member.isreg() else None
            found[member.name] = (member, file.read() if file else b"")
        return found


def test_every_kind() -> None:
    capability = b"\x01\x00\x00\x02\x00\x04\xff\x00" + bytes(12)
    found = members(
        [
            TOP,
            entry("d", stat.S_IFDIR | 0o1777, uid=1, gid=2, mtime_ns=3_500_000_000),
            entry("d/file", stat.S_IFREG | 0o4755, size=6, links=2, number=7, device=1,
                  attributes=[LayerAttribute(name=b"security.capability", value=capability),
                              LayerAttribute(name=b"trusted.overlay.origin", value=b"x")]),
            data(b"con"), data(b"ent", 3),
            entry("d/again", size=6, links=2, number=7, device=1), data(b"conent"),
            entry("d/other", size=2, links=2, number=7, device=2), data(b"no"),
            entry("link", LINK, link_target=b"/etc/passwd"),
            entry("fifo", stat.S_IFIFO | 0o600),
            entry("null", stat.S_IFCHR | 0o666, rdev=os.makedev(1, 3)),
            entry("socket", stat.S_IFSOCK | 0o600),
            entry(b"raw\xff", size=0),
            entry("l" * 200 + "/" + "m" * 200, size=1), data(b"!"),
        ]
    )  # fmt: skip
    member, content = found["d/file"]
    assert (member.mode, content) == (0o4755, b"conent")
    assert os.fsencode(member.pax_headers["SCHILY.xattr.security.capability"]) == capability
    assert not any("trusted" in key for key in member.pax_headers)
    assert (found["d"][0].uid, found["d"][0].gid, found["d"][0].mode, found["d"][0].mtime) == (
        1,
        2,
        0o1777,
        3,
    )
    assert (found["d/again"][0].type, found["d/again"][0].linkname) == (tarfile.LNKTYPE, "d/file")
    assert found["d/other"][1] == b"no", "the same number in another file system is another file"
    assert found["link"][0].linkname == "/etc/passwd"
    assert found["fifo"][0].isfifo()
    assert (found["null"][0].devmajor, found["null"][0].devminor) == (1, 3)
    assert os.fsdecode(b"raw\xff") in found
    assert found["l" * 200 + "/" + "m" * 200][1] == b"!"
    assert "socket" not in found


def test_holes_and_files_that_change_while_they_are_read() -> None:
    found = members(
        [TOP, entry("sparse", size=5000), data(b"x", 4096), entry("cut", size=8), data(b"1234"),
         entry("grown", size=3), data(b"123456"), data(b"more", 6), entry("end", size=1), data(b".")]
    )  # fmt: skip
    assert found["sparse"][1] == bytes(4096) + b"x" + bytes(903)
    assert found["cut"][1] == b"1234" + bytes(4)
    assert found["grown"][1] == b"123"
    assert found["end"][1] == b"."


@pytest.mark.parametrize(
    "path", ["../x", "/x", "a//b", "a/./b", "a/..", "a\0b", "a/", "n" * 256, "a/" * 2100 + "a"]
)
def test_impossible_names(path: str) -> None:
    with pytest.raises(GuestProtocolError, match="impossible file name"):
        written([TOP, entry(path)])


def test_nonsense() -> None:
    for parts in (
        [data(b"x")],
        [entry("d", DIR), data(b"x")],
        [entry("f", size=4), data(b"ab", 2), data(b"c", 1)],
        [entry("f", size=1 << 60)],
        [entry("l", LINK, link_target=b"")],
        [entry("l", LINK, link_target=b"a\0b")],
        [entry("f", 0o644)],
        [entry("f", uid=0xFFFF_FFFF)],
        [entry("f", mtime_ns=1 << 62)],
    ):
        with pytest.raises(GuestProtocolError):
            written([TOP, *parts])


def test_it_does_not_fill_the_disk() -> None:
    """A file that says that it is large and has no content costs the guest nothing, and the host its size."""
    with pytest.raises(ImageError, match="more than an image may hold"):
        written([TOP, entry("sparse", size=1 << 40)], most_bytes=1 << 20)


@given(
    st.lists(
        st.tuples(
            st.binary(max_size=12), st.integers(0, 0o177777), st.integers(0, 5000), st.binary(max_size=9)
        )
    )
)
def test_whatever_comes(sent: list[tuple[bytes, int, int, bytes]]) -> None:
    parts = [TOP]
    for path, mode, size, content in sent:
        parts += [entry(path, mode, size=size, link_target=content), data(content)]
    try:
        out = written(parts)
    except GuestProtocolError:
        return
    assert len(out) % tarfile.RECORDSIZE == 0
    with tarfile.open(fileobj=io.BytesIO(out), mode="r:", errorlevel=2) as tar:
        for member in tar:
            assert not member.name.startswith("/")
            assert ".." not in member.name.split("/")
