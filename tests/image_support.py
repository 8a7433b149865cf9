"""What the image tests share: layers and layouts to order, and an erofs reader that is not the writer's twin."""

from __future__ import annotations

import gzip
import hashlib
import io
import json
import os
import stat
import struct
import subprocess
import tarfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

import zstandard

from kata.storage.erofs import Writer
from kata.storage.layers import LayerTree, Limits

# ---- layers ----


def member(
    name: str,
    kind: str = "file",
    content: bytes = b"",
    *,
    mode: int | None = None,
    uid: int = 0,
    gid: int = 0,
    mtime: float = 1_600_000_000,
    link: str = "",
    device: tuple[int, int] = (0, 0),
    xattrs: dict[str, str] | None = None,
) -> tuple[tarfile.TarInfo, bytes]:
    """One entry of a layer; `kind` is file, dir, link, symlink, char, block or fifo."""
    info = tarfile.TarInfo(name)
    info.type = {
        "file": tarfile.REGTYPE, "dir": tarfile.DIRTYPE, "link": tarfile.LNKTYPE, "symlink": tarfile.SYMTYPE,
        "char": tarfile.CHRTYPE, "block": tarfile.BLKTYPE, "fifo": tarfile.FIFOTYPE,
    }[kind]  # fmt: skip
    info.mode = mode if mode is not None else (0o755 if kind == "dir" else 0o644)
    info.uid, info.gid, info.mtime = uid, gid, mtime
    info.linkname = link
    info.devmajor, info.devminor = device
    info.size = len(content)
    info.pax_headers = {f"SCHILY.xattr.{key}": value for key, value in (xattrs or {}).items()}
    return info, content


def layer(*members: tuple[tarfile.TarInfo, bytes], form: int = tarfile.PAX_FORMAT) -> bytes:
    """An uncompressed layer."""
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w", format=form, errors="surrogateescape") as tar:
        for info, content in members:
            tar.addfile(info, io.BytesIO(content))
    return out.getvalue()


def compress(data: bytes, how: str) -> bytes:
    """A layer in its stored form: plain, gzip or zstd."""
    if how == "gzip":
        return gzip.compress(data, 1, mtime=0)
    if how == "zstd":
        return zstandard.ZstdCompressor().compress(data)
    return data


# ---- images ----

_SUFFIX = {"plain": "", "gzip": "+gzip", "zstd": "+zstd"}


def sha256(data: bytes) -> str:
    return "sha256:" + hashlib.sha256(data).hexdigest()


class Blobs(dict[str, bytes]):
    """The blobs of an image by digest."""

    def put(self, data: bytes, media_type: str = "", **more: Any) -> dict[str, Any]:
        """Add a blob; returns its descriptor."""
        digest = sha256(data)
        self[digest] = data
        return {"mediaType": media_type, "digest": digest, "size": len(data), **more}

    def put_json(self, content: Any, media_type: str, **more: Any) -> dict[str, Any]:
        return self.put(json.dumps(content).encode(), media_type, **more)


MANIFEST = "application/vnd.oci.image.manifest.v1+json"
INDEX = "application/vnd.oci.image.index.v1+json"
CONFIG = "application/vnd.oci.image.config.v1+json"


def image(
    blobs: Blobs, layers: Iterable[bytes], *, how: str = "plain", config: dict[str, Any] | None = None,
    arch: str = "amd64", variant: str = "", **more: Any,
) -> dict[str, Any]:  # fmt: skip
    """Put an image's blobs together; returns the descriptor of its manifest."""
    layers = list(layers)
    content = {
        "architecture": arch,
        **({"variant": variant} if variant else {}),
        "os": "linux",
        "created": "2024-01-02T03:04:05Z",
        "config": config if config is not None else {"Cmd": ["sh"]},
        "rootfs": {"type": "layers", "diff_ids": [sha256(data) for data in layers]},
    }
    manifest = {
        "schemaVersion": 2,
        "mediaType": MANIFEST,
        "config": blobs.put_json(content, CONFIG),
        "layers": [
            blobs.put(compress(data, how), f"application/vnd.oci.image.layer.v1.tar{_SUFFIX[how]}")
            for data in layers
        ],
    }
    return blobs.put_json(manifest, MANIFEST, **more)


def write_layout(directory: Path, blobs: Blobs, manifests: list[dict[str, Any]]) -> Path:
    """Write an OCI layout."""
    (directory / "blobs" / "sha256").mkdir(parents=True, exist_ok=True)
    for digest, data in blobs.items():
        (directory / "blobs" / "sha256" / digest[7:]).write_bytes(data)
    (directory / "oci-layout").write_text('{"imageLayoutVersion":"1.0.0"}')
    (directory / "index.json").write_text(json.dumps({"schemaVersion": 2, "manifests": manifests}))
    return directory


def tagged(tag: str) -> dict[str, Any]:
    return {"annotations": {"org.opencontainers.image.ref.name": tag}}


def simple_layout(
    directory: Path, *layers: bytes, how: str = "plain", tag: str = "latest", **more: Any
) -> Path:
    """A layout with one image."""
    blobs = Blobs()
    return write_layout(directory, blobs, [image(blobs, layers, how=how, **tagged(tag), **more)])


# ---- erofs ----


MOUNT_POINTS = {"dev", "etc", "etc/hostname", "etc/hosts", "etc/resolv.conf", "proc", "sys"}
"""What the conversion of an image adds where the layers have nothing there."""


def build(path: Path, *layers: bytes, limits: Limits | None = None, mount_points: bool = False) -> Path:
    """Convert layers into an erofs file, without store and image around it."""
    import tempfile

    with open(path, "wb+") as out, tempfile.TemporaryFile() as spool:
        writer = Writer(out.fileno(), spool.fileno())
        tree = LayerTree(writer, limits)
        for number, data in enumerate(layers, 1):
            assert tree.apply(io.BytesIO(data), str(number)) == sha256(data) or data[:2] == b"\x1f\x8b"
        if mount_points:
            tree.add_mount_points()
        writer.finish(tree.root, bytes(range(16)))
    return path


class Inode(NamedTuple):
    """What is compared of a file."""

    mode: int
    uid: int
    gid: int
    mtime: int
    mtime_ns: int
    nlink: int
    content: bytes
    """Content, link target, or (as text) device number."""
    xattrs: tuple[tuple[str, bytes], ...]
    nid: int

    @property
    def kind(self) -> str:
        return {
            stat.S_IFREG: "file", stat.S_IFDIR: "dir", stat.S_IFLNK: "symlink", stat.S_IFCHR: "char",
            stat.S_IFBLK: "block", stat.S_IFIFO: "fifo", stat.S_IFSOCK: "socket",
        }[stat.S_IFMT(self.mode)]  # fmt: skip


_PREFIXES = {
    1: "user.", 2: "system.posix_acl_access", 3: "system.posix_acl_default", 4: "trusted.", 6: "security.",
}  # fmt: skip


class Erofs:
    """Reads an erofs file as the kernel does: directories are searched by halving, tails may not cross blocks."""

    def __init__(self, path: Path) -> None:
        self.data = path.read_bytes()
        magic, _, _, bits, _, root = struct.unpack_from("<IIIBBH", self.data, 1024)
        (self.inodes,) = struct.unpack_from("<Q", self.data, 1024 + 16)
        self.blocks, meta = struct.unpack_from("<II", self.data, 1024 + 36)
        assert (magic, bits, meta) == (0xE0F5E1E2, 12, 0)
        assert self.blocks * 4096 == len(self.data)
        self.root = root

    def _data(self, at: int, size: int, layout: int, address: int, behind: int) -> bytes:
        if layout == 0:
            return self.data[address * 4096 : address * 4096 + size]
        whole = (size - 1) // 4096 * 4096
        start = at + behind
        assert start // 4096 == (start + size - whole - 1) // 4096, "inline data cross a block boundary"
        return self.data[address * 4096 : address * 4096 + whole] + self.data[start : start + size - whole]

    def inode(self, nid: int) -> Inode:
        """Read one inode."""
        at = nid * 32
        fields = struct.unpack_from("<HHHHQIIIIQII", self.data, at)
        form, count, mode, _, size, address, _, uid, gid, mtime, mtime_ns, nlink = fields
        assert form & 1
        layout = form >> 1
        assert layout in (0, 2)
        xattr_bytes = 12 + 4 * (count - 1) if count else 0
        if stat.S_ISREG(mode) or stat.S_ISDIR(mode) or stat.S_ISLNK(mode):
            content = self._data(at, size, layout, address, 64 + xattr_bytes)
        elif stat.S_ISFIFO(mode) or stat.S_ISSOCK(mode):
            content = b""
        else:
            major, minor = (address >> 8) & 0xFFF, (address & 0xFF) | ((address >> 12) & 0xFFF00)
            content = f"{major}:{minor}".encode()
        return Inode(
            mode, uid, gid, mtime - (1 << 64) if mtime >> 63 else mtime, mtime_ns, nlink, content,
            tuple(self._xattrs(at + 64, xattr_bytes)), nid,
        )  # fmt: skip

    def _xattrs(self, at: int, size: int) -> Iterable[tuple[str, bytes]]:
        end = at + size
        at += 12
        while at < end:
            length, index, value = struct.unpack_from("<BBH", self.data, at)
            name = self.data[at + 4 : at + 4 + length].decode()
            yield _PREFIXES[index] + name, self.data[at + 4 + length : at + 4 + length + value]
            at += 4 + length + value
            at += -at % 4

    def entries(self, nid: int) -> list[tuple[bytes, int, int]]:
        """The (name, nid, type) of a directory; the order that the kernel relies on is checked."""
        content = self.inode(nid).content
        found = []
        for start in range(0, len(content), 4096):
            block = content[start : start + 4096]
            count = struct.unpack_from("<QHBB", block, 0)[1] // 12
            heads = [struct.unpack_from("<QHBB", block, 12 * number) for number in range(count)]
            for number, (child, offset, kind, _) in enumerate(heads):
                end = heads[number + 1][1] if number + 1 < count else len(block)
                found.append((block[offset:end].rstrip(b"\0"), child, kind))
        names = [name for name, _, _ in found]
        assert names == sorted(set(names))
        assert {b".", b".."} <= set(names)
        return found

    def tree(self) -> dict[str, Inode]:
        """All files by path; the root is "". Link counts and entry types are checked."""
        found: dict[str, Inode] = {}
        names: dict[int, int] = {}
        waiting = [("", self.root, self.root)]
        while waiting:
            path, nid, parent = waiting.pop()
            inode = found[path] = self.inode(nid)
            names[nid] = names.get(nid, 0) + 1
            if inode.kind != "dir":
                continue
            subdirectories = 0
            for name, child, kind in self.entries(nid):
                if name in (b".", b".."):
                    assert child == (nid if name == b"." else parent)
                    continue
                mode = self.inode(child).mode
                assert kind == {
                    stat.S_IFREG: 1, stat.S_IFDIR: 2, stat.S_IFCHR: 3, stat.S_IFBLK: 4, stat.S_IFIFO: 5,
                    stat.S_IFSOCK: 6, stat.S_IFLNK: 7,
                }[stat.S_IFMT(mode)]  # fmt: skip
                subdirectories += stat.S_ISDIR(mode)
                shown = os.fsdecode(name)
                waiting.append((f"{path}/{shown}" if path else shown, child, nid))
            assert inode.nlink == subdirectories + 2
        for inode in found.values():
            assert inode.kind == "dir" or inode.nlink == names[inode.nid]
        assert self.inodes == len(names)
        return found


def fsck(path: Path) -> None:
    """Let Debian's fsck.erofs judge, where it is installed: it also knows the checksums."""
    try:
        run = subprocess.run(["fsck.erofs", str(path)], capture_output=True, text=True, check=False)
    except FileNotFoundError:
        return
    assert run.returncode == 0, run.stdout + run.stderr


def docker_save(
    archive: Path, images: list[dict[str, Any]], *, extra: list[tarfile.TarInfo] | None = None
) -> Path:
    """What Docker before 25 writes: manifest.json, configurations, <id>/layer.tar."""
    listed = []
    with tarfile.open(archive, "w") as tar:

        def add(name: str, data: bytes) -> None:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))

        for number, each in enumerate(images):
            config = json.dumps(
                {
                    "architecture": "amd64", "os": "linux", "config": each.get("config", {}),
                    "rootfs": {"type": "layers", "diff_ids": [sha256(data) for data in each["layers"]]},
                }
            ).encode()  # fmt: skip
            name = sha256(config)[7:] + ".json"
            add(name, config)
            names = []
            for position, data in enumerate(each["layers"]):
                names.append(f"{number}{position}/layer.tar")
                if not each.get("linked"):
                    add(names[-1], data)
            listed.append({"Config": name, "RepoTags": each.get("tags"), "Layers": names})
        for info in extra or []:
            tar.addfile(info)
        add("manifest.json", json.dumps(listed).encode())
    return archive
