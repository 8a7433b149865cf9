"""What a guest sends of a container's writable layer: honest, it arrives whole; hostile, it harms nothing."""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from kata import sysio
from kata.errors import GuestProtocolError, HostError
from kata.proto.agentext_pb import LayerAttribute, LayerEntry, LayerPart
from kata.storage import upper
from kata.storage.upper import UpperLayer

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="needs root: owners and device nodes")

DIR, FILE, LINK = stat.S_IFDIR | 0o755, stat.S_IFREG | 0o644, stat.S_IFLNK | 0o777


def entry(path: str | bytes, mode: int = FILE, **more: object) -> LayerPart:
    raw = path.encode() if isinstance(path, str) else path
    return LayerPart(entry=LayerEntry(path=raw, mode=mode, **more))  # type: ignore[arg-type]


def data(content: bytes, offset: int = 0) -> LayerPart:
    return LayerPart(offset=offset, data=content)


TOP = entry("", DIR)


@pytest.fixture
def top(tmp_path: Path) -> Iterator[Path]:
    """The directory, with a neighbour that must stay as it is."""
    (tmp_path / "neighbour").mkdir()
    (tmp_path / "neighbour/file").write_text("before")
    directory = tmp_path / "fs"
    directory.mkdir()
    yield directory
    assert (tmp_path / "neighbour/file").read_text() == "before"
    assert sorted(os.listdir(tmp_path)) == ["fs", "neighbour"]
    assert os.listdir(tmp_path / "neighbour") == ["file"]


def take(directory: Path, parts: list[LayerPart], *, most_bytes: int = 1 << 20, most_entries: int = 1000,
         capabilities: tuple[str, ...] = ()) -> UpperLayer:  # fmt: skip
    with sysio.Fd(os.open(directory, os.O_RDONLY | os.O_DIRECTORY)) as fd:
        layer = UpperLayer(
            fd.raw, most_bytes=most_bytes, most_entries=most_entries, capabilities=frozenset(capabilities)
        )
        try:
            layer.add(parts)
            layer.finish()
        finally:
            layer.close()
    return layer


def test_everything_that_a_container_may_have_made(top: Path) -> None:
    capability = b"\1\0\0\2" + bytes(16)
    acl = b"\2\0\0\0" + b"\1\0\7\0\377\377\377\377\4\0\5\0\377\377\377\377\40\0\5\0\377\377\377\377"
    layer = take(
        top,
        [
            entry("", stat.S_IFDIR | 0o1777, mtime_ns=7_000_000_009, uid=5, gid=6),
            entry("d", stat.S_IFDIR | 0o2710, uid=70000, gid=4_000_000_000, mtime_ns=-1_500_000_000,
                  attributes=[LayerAttribute(name=b"system.posix_acl_default", value=acl)]),
            entry("d/empty"),
            entry("d/file", stat.S_IFREG | 0o6755, size=10, number=9, links=2, mtime_ns=1_000_000_001, attributes=[
                LayerAttribute(name=b"user.note", value=b"n"),
                LayerAttribute(name=b"security.capability", value=capability),
                LayerAttribute(name=b"trusted.overlay.origin", value=b"o"),
            ]),
            data(b"01234"), data(b"56789", 5),
            entry("again", stat.S_IFREG | 0o6755, size=10, number=9, links=2), data(b"0123456789"),
            entry("gone", stat.S_IFCHR),
            entry("link", LINK, link_target=b"../../../etc/passwd", mtime_ns=5),
            entry("null", stat.S_IFCHR | 0o666, rdev=os.makedev(1, 3)),
            entry("opaque", DIR, attributes=[LayerAttribute(name=b"trusted.overlay.opaque", value=b"y")]),
            entry("pipe", stat.S_IFIFO | 0o602),
            entry("socket", stat.S_IFSOCK | 0o700),
            entry("sparse", size=1 << 40), data(b"middle", 1 << 39),
        ],
        capabilities=("CAP_MKNOD", "CAP_SETFCAP"),
    )  # fmt: skip
    about = {path: os.lstat(top / path) for path in ("", "d", "d/file", "link", "null", "pipe", "socket")}
    assert (about[""].st_mode, about[""].st_uid, about[""].st_mtime_ns) == (
        *(stat.S_IFDIR | 0o1777, 5),
        7_000_000_009,
    )
    assert (about["d"].st_mode, about["d"].st_gid, about["d"].st_mtime_ns) == (
        *(stat.S_IFDIR | 0o2710, 4_000_000_000),
        -1_500_000_000,
    )
    assert (top / "d/file").read_bytes() == b"0123456789"
    assert (about["d/file"].st_mode, about["d/file"].st_mtime_ns) == (stat.S_IFREG | 0o6755, 1_000_000_001)
    assert os.getxattr(top / "d/file", "security.capability") == capability
    assert sorted(os.listxattr(top / "d/file")) == ["security.capability", "user.note"]
    assert os.listxattr(top / "d/empty") == []  # which would have been inherited
    assert os.path.samefile(top / "d/file", top / "again")
    gone = os.lstat(top / "gone")
    assert (stat.S_ISCHR(gone.st_mode), gone.st_rdev) == (True, 0)
    assert os.readlink(top / "link") == "../../../etc/passwd"
    assert about["null"].st_rdev == os.makedev(1, 3)
    assert [stat.filemode(about[name].st_mode) for name in ("pipe", "socket")] == [
        "prw-----w-",
        "srwx------",
    ]
    assert os.getxattr(top / "opaque", "trusted.overlay.opaque") == b"y"
    sparse = os.stat(top / "sparse")
    assert (sparse.st_size, sparse.st_blocks < 100) == (1 << 40, True)
    assert (layer.entries, layer.bytes, layer.dropped) == (12, 26, 0)


@pytest.mark.parametrize(
    ("parts", "why"),
    [
        ([entry("..", DIR)], "no name"),
        ([entry("a", DIR), entry("a/..", DIR)], "no name"),
        ([entry(".")], "no name"),
        ([entry("/etc", DIR)], "no name"),
        ([entry("a//b")], "not in the directory"),
        ([entry("../neighbour/file")], "not in the directory"),
        ([entry(b"a\0b")], "no name"),
        ([entry("n" * 256)], "no name"),
        ([entry("/".join(["n" * 200] * 30))], "too long"),
        ([entry("neighbour", LINK, link_target=b"../neighbour"), entry("neighbour/file")], "not in the directory"),
        ([entry("l", LINK, link_target=b".."), entry("l", DIR), entry("l/neighbour", DIR)], "File exists"),
        ([entry("a", DIR), entry("a", LINK, link_target=b"../neighbour"), entry("a/file")], "File exists"),
        ([entry("l", LINK, link_target=b"../neighbour/file"), entry("l", size=1), data(b"x")], "File exists"),
        ([entry("a", DIR), entry("b", DIR), entry("a/late")], "not in the directory"),
        ([entry("a"), entry("a")], "File exists"),
        ([entry("a", link_target=b"x", size=3), data(b"four")], "not where they can be"),
        ([entry("a", size=8), data(b"1234", 4), data(b"1234", 3)], "not where they can be"),
        ([entry("a", size=8), data(b"1", (1 << 64) - 1)], "not where they can be"),
        ([entry("a", size=1 << 63)], "no file is that large"),
        ([data(b"nobody's")], "no file's"),
        ([entry("a", DIR), data(b"x")], "no file's"),
        ([entry("l", LINK)], "leads nowhere"),
        ([entry("l", LINK, link_target=b"a\0b")], "leads nowhere"),
        ([entry("a", 0o644)], "no such kind"),
        ([entry("a", uid=0xFFFFFFFF)], "nobody's number"),
        ([entry("a", mtime_ns=(1 << 63) - 1)], "its time"),
        ([entry("a", attributes=[LayerAttribute(name=b"user.a", value=bytes(70_000))])], "too long"),
        ([entry("", DIR)], "comes first"),
        ([entry(f"f{n}") for n in range(1001)], "more than 1000"),
        ([entry("a", size=3 << 20), data(bytes(1 << 20)), data(b"x", 1 << 20)], "more data"),
        ([entry("a", size=1 << 19, number=1, links=2), data(bytes(1 << 19)),
          entry("b", size=1 << 19, number=1, links=2), data(bytes(1 << 19)), data(b"x")], "more data"),
    ],
)  # fmt: skip
def test_what_is_refused(top: Path, parts: list[LayerPart], why: str) -> None:
    with pytest.raises(GuestProtocolError, match=why):
        take(top, [TOP, *parts])


def test_the_guest_does_not_decide_how_much_is_remembered(
    top: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of files that have several links, as it says: their paths are kept until the last has come."""
    monkeypatch.setattr(upper, "MOST_LINKED", 1000)
    parts = [entry(f"{n:0100}", number=n, links=2) for n in range(11)]
    take(top, [TOP, *parts[:10]])
    (top / f"{0:0100}").unlink()
    with pytest.raises(GuestProtocolError, match="several links"):
        take(top, [TOP, *[entry(f"x{n:099}", number=n, links=2) for n in range(11)]])


def test_the_first_is_the_top(top: Path) -> None:
    for parts in ([entry("a")], [entry("", FILE)], []):
        with pytest.raises(GuestProtocolError):
            take(top, parts)
    assert os.listdir(top) == []


def test_what_the_container_may_not_make_is_left_out(top: Path) -> None:
    capability = LayerAttribute(name=b"security.capability", value=b"\1\0\0\2" + bytes(16))
    others = [b"trusted.secret", b"security.selinux", b"system.nfs4_acl", b"user.overlay.opaque"]
    layer = take(
        top,
        [
            TOP,
            entry("disk", stat.S_IFBLK | 0o666, rdev=os.makedev(8, 0)),
            entry("gone", stat.S_IFCHR),
            entry(
                "tool", attributes=[capability, *(LayerAttribute(name=one, value=b"y") for one in others)]
            ),
            entry(
                "redirected",
                DIR,
                attributes=[LayerAttribute(name=b"trusted.overlay.redirect", value=b"/etc")],
            ),
        ],
    )
    assert sorted(os.listdir(top)) == ["gone", "redirected", "tool"]
    assert os.listxattr(top / "tool") == os.listxattr(top / "redirected") == []
    assert layer.dropped == 2 + len(others)


def test_a_number_that_is_no_files(top: Path) -> None:
    """Hard links are made to files of the layer only, by what was sent of them."""
    take(top, [TOP, entry("l", LINK, link_target=b"../neighbour/file", number=7, links=2),
               entry("f", number=7, links=2, size=1), data(b"x")])  # fmt: skip
    assert (top / "f").read_bytes() == b"x"
    assert not (top / "f").is_symlink()


def test_a_mount_below_is_not_entered(top: Path) -> None:
    (top / "m").mkdir()
    sysio.mount("tmpfs", str(top / "m"), "tmpfs")
    try:
        with pytest.raises(GuestProtocolError):
            take(top, [TOP, entry("m", DIR), entry("m/file")])
        assert os.listdir(top / "m") == []
    finally:
        sysio.umount2(str(top / "m"))


def test_a_full_disk_is_the_hosts_fault(top: Path) -> None:
    sysio.mount("tmpfs", str(top), "tmpfs", 0, "size=64k")
    try:
        with pytest.raises(HostError, match="No space left"):
            take(top, [TOP, entry("a", size=1 << 19), data(bytes(range(256)) * 2048)])
    finally:
        sysio.umount2(str(top))


_NAMES = st.sampled_from(
    ["a", "b", "..", ".", "", "a/b", "a/..", "../neighbour", "../neighbour/file", "/", "l"]
)
_PARTS = st.lists(
    st.one_of(
        st.builds(
            entry,
            _NAMES,
            st.sampled_from([DIR, FILE, LINK, stat.S_IFCHR, stat.S_IFIFO, 0]),
            size=st.sampled_from([0, 3, 1 << 62]),
            links=st.sampled_from([1, 2]),
            number=st.sampled_from([1, 2]),
            link_target=st.sampled_from([b"", b"..", b"../neighbour", b"/etc"]),
        ),
        st.builds(data, st.binary(max_size=5), st.sampled_from([0, 1, 1 << 40])),
    ),
    max_size=12,
)


@settings(max_examples=300, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(_PARTS)
def test_nothing_gets_out_of_the_directory(top: Path, parts: list[LayerPart]) -> None:
    try:
        take(top, [TOP, *parts])
    except GuestProtocolError:
        pass
    assert (top.parent / "neighbour/file").read_text() == "before"
    assert sorted(os.listdir(top.parent)) == ["fs", "neighbour"]
    assert os.listdir(top.parent / "neighbour") == ["file"]
    with sysio.Fd(os.open(top, os.O_RDONLY)) as fd:
        from kata import journal_undo

        assert journal_undo.empty(fd.raw, str(top), float("inf")) == ""


def test_an_attribute_that_is_no_name_is_refused_last_of_all(top: Path) -> None:
    """The directories that are still open get theirs when all has come."""
    odd = LayerAttribute(name=b"user.a\0b", value=b"x")
    with pytest.raises(GuestProtocolError, match="embedded null"):
        take(top, [entry("", DIR, attributes=[odd])])
