"""The tar reader: equal to `tarfile` on good archives, an ImageError on all others, bounded in any case."""

from __future__ import annotations

import contextlib
import io
import random
import shutil
import subprocess
import tarfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from image_support import layer, member

from kata.errors import ImageError
from kata.storage import layers_tar
from kata.storage.layers_tar import Entry, Reader


class Bytes:
    """An archive in memory."""

    def __init__(self, data: bytes) -> None:
        self._file = io.BytesIO(data)
        self.largest = 0

    def read(self, size: int) -> bytes:
        self.largest = max(self.largest, size)
        return self._file.read(size)

    def pieces(self, size: int) -> Iterator[bytes]:
        while size and (piece := self._file.read(min(size, 1000))):
            size -= len(piece)
            yield piece

    def skip(self, size: int) -> int:
        return sum(len(piece) for piece in self.pieces(size))


def entries(data: bytes, *, read: bool = True) -> list[tuple[Entry, bytes]]:
    reader = Reader(Bytes(data))
    found = []
    while (entry := reader.next()) is not None:
        content = b"".join(reader.pieces()) if read and entry.type == layers_tar.FILE else b""
        found.append((entry, content))
    return found


MEMBERS = [
    member("a/", "dir", mode=0o1777),
    member("a/file", content=b"hello" * 300, uid=12, gid=34, mtime=1_600_000_000),
    member("long/" * 40 + "name", content=b"x"),
    member("l" * 150, "symlink", link="t" * 300),
    member("big-owner", uid=3_000_000, gid=5_000_000, mtime=99_999_999_999),
    member("hard", "link", link="a/file"),
    member("null", "char", device=(1, 3)),
    member("sda", "block", device=(8, 17)),
    member("pipe", "fifo"),
    member("früh/\udcff", content=b"odd names"),
    member("empty"),
]


@pytest.mark.parametrize("form", [tarfile.PAX_FORMAT, tarfile.GNU_FORMAT])
def test_equal_to_tarfile(form: int) -> None:
    data = layer(*MEMBERS, form=form)
    with tarfile.open(fileobj=io.BytesIO(data), errors="surrogateescape") as tar:
        expected = [
            (
                info.name.encode("utf-8", "surrogateescape"), info.mode, info.uid, info.gid, int(info.mtime),
                info.linkname.encode("utf-8", "surrogateescape"), info.devmajor, info.devminor,
                (tar.extractfile(info) or io.BytesIO()).read() if info.isreg() else b"",
            )
            for info in tar
        ]  # fmt: skip
    seen = [
        (e.name.rstrip(b"/"), e.mode, e.uid, e.gid, e.mtime, e.link, e.major, e.minor, content)
        for e, content in entries(data)
    ]
    assert seen == expected


def test_ustar_prefix() -> None:
    name = "p" * 120 + "/" + "n" * 90
    data = layer(member(name, content=b"1"), form=tarfile.USTAR_FORMAT)
    assert entries(data)[0][0].name == name.encode()


def test_unread_content_is_passed_over() -> None:
    data = layer(*MEMBERS)
    assert [e.name for e, _ in entries(data, read=False)] == [e.name for e, _ in entries(data)]


def test_pax_times_and_attributes() -> None:
    found = entries(layer(member("a", mtime=-0.25, xattrs={"user.k": "v=1\n2"}), member("b", mtime=1.5)))
    assert (found[0][0].mtime, found[0][0].mtime_ns) == (-1, 750_000_000)
    assert found[0][0].xattrs == {b"user.k": b"v=1\n2"}
    assert (found[1][0].mtime, found[1][0].mtime_ns) == (1, 500_000_000)
    assert found[1][0].xattrs is None


def test_types_without_content_have_none() -> None:
    """As Go reads them: a size in the header of a link or directory is not followed by data."""
    info, _ = member("d", "dir")
    info.size = 5000
    out = io.BytesIO()
    out.write(info.tobuf(tarfile.GNU_FORMAT))
    out.write(layer(member("f", content=b"1")))
    assert [e.name for e, _ in entries(out.getvalue())] == [b"d/", b"f"]


def test_a_global_header_is_ignored_as_go_does() -> None:
    data = tarfile.TarInfo.create_pax_global_header({"comment": "git", "path": "x"}) + layer(member("f"))
    assert [e.name for e, _ in entries(data)] == [b"f"]


def test_old_directories_end_with_a_slash() -> None:
    info = tarfile.TarInfo("d/")
    info.type = b"\0"
    assert entries(info.tobuf(tarfile.USTAR_FORMAT))[0][0].type == layers_tar.DIRECTORY


def _sparse(path: Path) -> bytes:
    chance = random.Random(3)
    with path.open("wb") as file:
        for offset in (0, 70_000, 300_000, 1_000_000, 1_500_000, 3_000_000, 3_300_000):
            file.seek(offset)
            file.write(chance.randbytes(9000))
        file.truncate(5_000_000)
    return path.read_bytes()


@pytest.mark.parametrize(
    "form",
    [
        ["--format=gnu"],
        ["--format=oldgnu"],
        ["--format=posix", "--sparse-version=0.0"],
        ["--format=posix", "--sparse-version=0.1"],
        ["--format=posix", "--sparse-version=1.0"],
    ],
)
def test_sparse_files_of_gnu_tar(tmp_path: Path, form: list[str]) -> None:
    if not shutil.which("tar"):
        pytest.skip("needs GNU tar (apt-get install tar)")
    content = _sparse(tmp_path / "sparse")
    (tmp_path / "after").write_bytes(b"after")
    command = ["tar", "-C", str(tmp_path), "--sparse", *form, "-cf", "-", "sparse", "after"]
    data = subprocess.run(command, check=True, capture_output=True).stdout
    assert len(data) < 500_000
    found = entries(data)
    assert [(e.name, e.size) for e, _ in found] == [(b"sparse", 5_000_000), (b"after", 5)]
    assert found[0][1] == content
    assert found[1][1] == b"after"
    assert [e.name for e, _ in entries(data, read=False)] == [b"sparse", b"after"]


# ---- hostile ----


def pax(*records: tuple[str, str]) -> bytes:
    """A pax header with these records, followed by a file."""
    body = b""
    for key, value in records:
        rest = f" {key}={value}\n".encode()
        length = len(rest) + 1
        while len(str(length)) + len(rest) != length:
            length = len(str(length)) + len(rest)
        body += str(length).encode() + rest
    return raw_pax(body)


def raw_pax(body: bytes) -> bytes:
    head = tarfile.TarInfo("pax")
    head.type = b"x"
    head.size = len(body)
    return (
        head.tobuf(tarfile.USTAR_FORMAT) + body + bytes(-len(body) % 512) + layer(member("f", content=b"x"))
    )


def _header(**fields: object) -> bytes:
    info = tarfile.TarInfo("f")
    for key, value in fields.items():
        setattr(info, key, value)
    return info.tobuf(tarfile.GNU_FORMAT)


def _resum(block: bytearray) -> bytes:
    block[148:156] = b" " * 8
    block[148:156] = b"%06o\0 " % sum(block)
    return bytes(block)


GOOD = layer(member("f", content=b"x" * 1000))

DAMAGED = {
    "ends within a header": GOOD[:300],
    "ends within a file": GOOD[:1100],
    "checksum": GOOD[:100] + b"!" + GOOD[101:],
    "follows a block of zeros": bytes(512) + GOOD,
    "unknown entry type": _header(type=b"V"),
    "impossible size": _header(size=-5),
    "larger than": _header(type=b"L", size=1 << 40),
    "pax header is malformed": raw_pax(b"abc"),
    "a pax header is malformed": raw_pax(b"999 a=b\n"),
    "record size": pax(("size", "-1")),
    "record uid": pax(("uid", "1e3")),
    "record mtime": pax(("mtime", "nan")),
    "NUL byte": pax(("path", "a\0b")),
    "sparse map of f": pax(("GNU.sparse.map", "0,10,5,10"), ("GNU.sparse.size", "100")),
    "sparse map is malformed": pax(("GNU.sparse.numbytes", "5")),
    "a sparse map is malformed": pax(("GNU.sparse.major", "1"), ("GNU.sparse.minor", "0")),
    "is not a number": _resum(bytearray(_header()[:108] + b"zzzzzzz\0" + _header()[116:])),
    "behind an extension header": raw_pax(b"10 path=a\n")[:1024],
}


@pytest.mark.parametrize("words", DAMAGED)
def test_damaged_archives(words: str) -> None:
    with pytest.raises(ImageError, match=words) as caught:
        entries(DAMAGED[words])
    assert caught.value.hint


def test_huge_sparse_map_is_refused() -> None:
    body = b"70000\n" + b"0\n1\n" * 70000
    data = pax(
        ("GNU.sparse.major", "1"), ("GNU.sparse.minor", "0"), ("GNU.sparse.realsize", "9"), ("size", "99999")
    )
    with pytest.raises(ImageError, match="too many pieces"):
        entries(data[:1536] + body)


def test_an_extension_header_is_never_read_whole_when_it_is_too_long() -> None:
    source = Bytes(_header(type=b"x", size=5 << 30))
    with pytest.raises(ImageError):
        Reader(source).next()
    assert source.largest <= 1 << 20


_SEEDS = [layer(*MEMBERS), layer(*MEMBERS, form=tarfile.GNU_FORMAT), *DAMAGED.values()]


@settings(max_examples=400, deadline=None)
@given(
    seed=st.sampled_from(_SEEDS),
    changes=st.lists(st.tuples(st.integers(0, 20_000), st.binary(min_size=1, max_size=12)), max_size=6),
    sum_right=st.booleans(),
)
def test_any_bytes_give_entries_or_an_image_error(
    seed: bytes, changes: list[tuple[int, bytes]], sum_right: bool
) -> None:
    data = bytearray(seed)
    for at, new in changes:
        at %= len(data)
        data[at : at + len(new)] = new
        if sum_right and at + 512 <= len(data):
            start = at // 512 * 512
            data[start : start + 512] = _resum(data[start : start + 512])
    reader = Reader(Bytes(bytes(data)))
    with contextlib.suppress(ImageError):
        while (entry := reader.next()) is not None:
            assert 0 <= entry.size < 1 << 63
            if entry.type == layers_tar.FILE and entry.size < 1 << 20:
                assert sum(len(piece) for piece in reader.pieces()) == entry.size
