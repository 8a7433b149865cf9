"""Layers of a snapshot, as directories, become one erofs image, which is cached: whole, once, and not for ever."""

from __future__ import annotations

import json
import os
import signal
import socket
import stat
import subprocess
import sys
import time
from pathlib import Path

import pytest
from image_support import Erofs, fsck

from kata import sysio
from kata.errors import HostError, ImageError
from kata.storage import layer_images, whole_file

SOURCE = Path(__file__).resolve().parents[2] / "src" / "kata"

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="needs root: device nodes and trusted attributes")


@pytest.fixture(autouse=True)
def state(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("KATA_STATE_DIR", str(tmp_path / "state"))
    return tmp_path / "state"


@pytest.fixture
def layers(tmp_path: Path) -> list[str]:
    """Two layers, the higher first, with everything that a merge has to heed."""
    low, high = tmp_path / "1", tmp_path / "2"
    for path in (low / "etc/conf.d", low / "opaque/in", low / "gone", high / "etc", high / "opaque"):
        path.mkdir(parents=True)
    (low / "etc/hosts").write_text("low")
    (low / "etc/conf.d/a").write_text("a")
    (low / "etc/removed").write_text("removed")
    (low / "opaque/in/file").write_text("hidden")
    (low / "gone/file").write_text("hidden")
    (low / "was-file").write_text("file")
    (low / "was-dir").mkdir()
    (low / "was-dir/file").write_text("hidden")
    (high / "etc/hosts").write_text("high")
    os.mknod(high / "etc/removed", stat.S_IFCHR, 0)
    os.mknod(high / "gone", stat.S_IFCHR, 0)
    os.setxattr(high / "opaque", "trusted.overlay.opaque", b"y")
    (high / "opaque/new").write_text("new")
    (high / "was-file").mkdir(mode=0o711)
    (high / "was-dir").write_text("file now")
    # Every kind of file, and what they carry.
    os.mknod(low / "null", stat.S_IFCHR | 0o666, os.makedev(1, 3))
    os.mknod(low / "disk", stat.S_IFBLK | 0o600, os.makedev(259, 0x12345))
    os.mkfifo(low / "pipe", 0o620)
    with socket.socket(socket.AF_UNIX) as one:
        one.bind(str(low / "socket"))
    os.symlink("/etc/passwd", low / "link")
    os.symlink("/", low / "root")
    (low / "first").write_bytes(b"linked")
    os.link(low / "first", low / "etc/second")
    with open(low / "sparse", "wb") as file:
        file.truncate(64 << 20)
        file.seek(32 << 20)
        file.write(b"middle")
    (low / "tool").write_text("tool")
    os.chown(low / "tool", 70000, 4_000_000)
    os.chmod(low / "tool", 0o6755)
    os.setxattr(low / "tool", "security.capability", b"\1\0\0\2" + bytes(16))
    os.setxattr(low / "tool", "user.note", b"n" * 100)
    os.utime(low / "tool", ns=(0, 5_123_456_789))
    os.chmod(high, 0o750)
    return [str(high), str(low)]


def test_the_image_is_what_an_overlay_shows(layers: list[str], tmp_path: Path) -> None:
    path = Path(layer_images.make(layers))
    fsck(path)
    tree = Erofs(path).tree()
    assert tree["etc/hosts"].content == b"high"
    assert tree["etc/conf.d/a"].content == b"a"
    assert tree["opaque/new"].content == b"new"
    assert tree["was-dir"].content == b"file now"
    assert tree["was-file"].mode == stat.S_IFDIR | 0o711
    gone = {"etc/removed", "gone", "gone/file", "opaque/in", "opaque/in/file", "was-dir/file"}
    assert not gone & set(tree)
    assert (tree["null"].content, tree["disk"].content) == (b"1:3", b"259:74565")
    assert (tree["pipe"].kind, tree["socket"].kind) == ("fifo", "socket")
    assert (tree["link"].content, tree["root"].content) == (b"/etc/passwd", b"/")
    assert tree["first"].nid == tree["etc/second"].nid
    assert tree["first"].nlink == 2
    assert tree["sparse"].content == bytes(32 << 20) + b"middle" + bytes((32 << 20) - 6)
    tool = tree["tool"]
    assert tool[:5] == (stat.S_IFREG | 0o6755, 70000, 4_000_000, 5, 123_456_789)
    assert dict(tool.xattrs) == {"security.capability": b"\1\0\0\2" + bytes(16), "user.note": b"n" * 100}
    assert dict(tree["opaque"].xattrs) == {}  # it would control an overlay above
    assert path.stat().st_blocks * 512 < 4 << 20  # holes have stayed holes
    assert stat.S_IMODE(path.stat().st_mode) == 0o400


def test_the_merge_is_that_of_the_kernel(layers: list[str], tmp_path: Path) -> None:
    """The same tree as the host's own overlayfs shows of these directories."""
    point = tmp_path / "point"
    point.mkdir()
    try:
        sysio.mount("overlay", str(point), "overlay", sysio.MS_RDONLY, f"lowerdir={layers[0]}:{layers[1]}")
    except OSError as error:
        pytest.skip(f"needs overlayfs here: {error}")
    try:
        seen = {}
        for place, directories, files in os.walk(point):
            for name in directories + files:
                full = os.path.join(place, name)
                status = os.lstat(full)
                seen[os.path.relpath(full, point)] = (
                    *(status.st_mode, status.st_uid, status.st_gid),
                    *divmod(status.st_mtime_ns, 10**9),
                )
    finally:
        sysio.umount2(str(point))
    tree = Erofs(Path(layer_images.make(layers))).tree()
    assert {name: one[:5] for name, one in tree.items() if name} == seen


def test_once_and_for_these_directories_only(layers: list[str], tmp_path: Path) -> None:
    first = layer_images.make(layers)
    born = os.stat(first).st_ino
    assert layer_images.make(layers) == first
    assert os.stat(first).st_ino == born
    assert layer_images.find(layer_images.key_of(layer_images.identify(layers))) == first
    # The same name, and most likely the same inode number, but another directory.
    os.rename(layers[0], tmp_path / "aside")
    os.mkdir(layers[0], 0o750)
    (Path(layers[0]) / "other").write_text("other")
    assert layer_images.find(layer_images.key_of(layer_images.identify(layers))) == ""
    second = layer_images.make(layers)
    assert second != first
    assert "other" in Erofs(Path(second)).tree()
    assert not os.path.exists(first)  # one of its layers is gone


def test_several_makers_at_once(layers: list[str]) -> None:
    command = [sys.executable, "-I", "-S", str(SOURCE / "__main__.py"), "layer-image", str(1 << 40), *layers]
    makers = [subprocess.Popen(command, env=dict(os.environ), stderr=subprocess.PIPE) for _ in range(4)]
    assert [(maker.communicate()[1], maker.returncode) for maker in makers] == [(b"", 0)] * 4
    assert sorted(name.partition(".")[2] for name in os.listdir(layer_images.directory())) == [
        "erofs",
        "json",
    ]
    fsck(Path(layer_images.make(layers)))


def test_a_maker_that_is_killed_leaves_nothing_to_be_used(layers: list[str], tmp_path: Path) -> None:
    with open(tmp_path / "1/large", "wb") as file:
        for _ in range(64):
            file.write(os.urandom(4 << 20))
    command = [sys.executable, "-I", "-S", str(SOURCE / "__main__.py"), "layer-image", str(1 << 40), *layers]
    maker = subprocess.Popen(command, env=dict(os.environ))
    while not list(Path(layer_images.directory()).glob("*.lock")):
        assert maker.poll() is None
        time.sleep(0.001)
    maker.send_signal(signal.SIGKILL)
    maker.wait()
    key = layer_images.key_of(layer_images.identify(layers))
    assert layer_images.find(key) == ""
    assert layer_images.sweep()  # its lock, and its description
    assert os.listdir(layer_images.directory()) == []
    # One that a power failure has cut short is none either.
    path = layer_images.make(layers)
    os.truncate(path, 8192)
    assert layer_images.find(key) == ""
    fsck(Path(layer_images.make(layers)))


def test_a_full_disk(layers: list[str], state: Path) -> None:
    state.mkdir()
    sysio.mount("tmpfs", str(state), "tmpfs", 0, "size=2m")
    try:
        (Path(layers[1]) / "large").write_bytes(os.urandom(4 << 20))
        with pytest.raises((HostError, ImageError)):
            layer_images.make(layers)
        assert not list(Path(layer_images.directory()).glob("*.erofs*"))
    finally:
        sysio.umount2(str(state))


def test_what_cannot_be_carried_over(layers: list[str], tmp_path: Path) -> None:
    moved = Path(layers[0]) / "was-file"
    os.setxattr(moved, "trusted.overlay.redirect", b"/etc")
    with pytest.raises(ImageError, match="redirect"):
        layer_images.make(layers)
    command = [sys.executable, "-I", "-S", str(SOURCE / "__main__.py"), "layer-image", "0", *layers]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (done.returncode, "redirect" in done.stderr) == (1, True)
    with pytest.raises(HostError, match="No such file"):
        layer_images.make([str(tmp_path / "none")])
    assert layer_images.sweep()
    assert os.listdir(layer_images.directory()) == []


def test_the_images_take_no_more_than_they_may(tmp_path: Path) -> None:
    made = []
    for number in range(4):
        layer = tmp_path / f"layer{number}"
        layer.mkdir()
        (layer / "data").write_bytes(os.urandom(1 << 20))
        made.append(layer_images.make([str(layer)], most_bytes=5 << 19))
        os.utime(made[-1], (number + 1, number + 1))
    assert [os.path.exists(path) for path in made] == [False, False, True, True]
    assert layer_images.find(Path(made[2]).name.partition(".")[0])  # which has been used now
    layer = tmp_path / "one-more"
    layer.mkdir()
    (layer / "data").write_bytes(os.urandom(1 << 20))
    layer_images.make([str(layer)], most_bytes=5 << 19)
    assert [os.path.exists(path) for path in made] == [False, False, True, False]


def test_a_lock_in_use_is_left_alone(layers: list[str]) -> None:
    path = layer_images.make(layers)
    with whole_file.alone(f"{path}.lock", lambda: None):
        (Path(layers[1])).rename(layers[1] + ".gone")
        assert layer_images.sweep() == []
    assert layer_images.sweep() == [path]


def test_an_image_is_described(layers: list[str]) -> None:
    path = layer_images.make(layers)
    described = json.loads(Path(path.removesuffix(".erofs") + ".json").read_text())
    assert [one["path"] for one in described["layers"]] == layers
