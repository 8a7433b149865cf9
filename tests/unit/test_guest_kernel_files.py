"""Kernel images and modules: every compression, every way of being damaged."""

from __future__ import annotations

import gzip
import lzma
import struct
import subprocess
from pathlib import Path

import pytest
import zstandard

from kata.errors import GuestAssetError
from kata.guest import bzimage
from kata.guest.modules import Tree, Wanted, parse_list, read_module


def elf(note: bytes = b"Xen\0", kind: int = 18, payload: bytes = b"") -> bytes:
    """A 64-bit ELF file with one note segment."""
    body = struct.pack("<III", len(note), 4, kind) + note + b"\0\0\0\1"
    offset = 64 + 56
    header = b"\x7fELF\x02\x01\x01" + bytes(9)
    header += struct.pack("<HHIQQQIHHHHHH", 2, 62, 1, 0, 64, 0, 0, 64, 56, 1, 64, 0, 0)
    segment = struct.pack("<IIQQQQQQ", 4, 4, offset, 0, 0, len(body) + len(payload), 0, 4)
    return header + segment + body + payload


def bzimage_of(payload: bytes, sectors: int = 2) -> bytes:
    """A bzImage of boot protocol 2.15 with this payload behind 100 bytes of decompressor."""
    head = bytearray((sectors + 1) * 512)
    head[0x1F1] = sectors
    head[0x202:0x206] = b"HdrS"
    struct.pack_into("<H", head, 0x206, 0x20F)
    struct.pack_into("<II", head, 0x248, 100, len(payload))
    return bytes(head) + bytes(100) + payload + b"tail"


KERNEL = elf(payload=bytes(range(256)) * 300 + b"abcabcabcabcabcabc" * 5000)
LENGTH = struct.pack("<I", len(KERNEL))


def lz4(data: bytes) -> bytes:
    return subprocess.run(["lz4", "-l", "-9", "-c"], input=data, capture_output=True, check=True).stdout


PACKERS = {
    "gzip": gzip.compress,
    "xz": lambda data: lzma.compress(data, lzma.FORMAT_XZ, lzma.CHECK_CRC32),
    "lzma": lambda data: lzma.compress(data, lzma.FORMAT_ALONE),
    "zstd": lambda data: zstandard.compress(data),
    "lz4": lz4,
}


@pytest.mark.parametrize("packer", PACKERS)
def test_the_kernel_comes_out_of_every_compression(packer: str) -> None:
    # The build appends relocations to the ELF file and the length to what the compressor made.
    payload = PACKERS[packer](KERNEL + b"relocations") + LENGTH
    assert bzimage.extract_vmlinux(bzimage_of(payload)) == KERNEL


def test_an_elf_file_is_taken_as_it_is() -> None:
    assert bzimage.extract_vmlinux(KERNEL) == KERNEL


@pytest.mark.parametrize(
    ("image", "words"),
    [
        (b"", "neither"),
        (b"#!/bin/sh" * 200, "neither"),
        (bzimage_of(b"\x42\x5a\x68" + bytes(100)), "unknown way"),
        (bzimage_of(gzip.compress(b"no kernel")), "not an ELF"),
        (bzimage_of(gzip.compress(KERNEL)[:40]), "not an ELF|damaged|cut short"),
        (bzimage_of(b"\xfd7zXZ\0" + bytes(100)), "damaged"),
        (bzimage_of(b"\x28\xb5\x2f\xfd" + bytes(100)), "damaged|not an ELF"),
        (bzimage_of(gzip.compress(KERNEL))[:1700], "cut short"),
        (bzimage_of(b"\x02\x21\x4c\x18" + struct.pack("<I", 3) + b"\x0f\x05\x00"), "damaged|cut short"),
    ],
)
def test_damaged_images_are_named_errors(image: bytes, words: str) -> None:
    with pytest.raises(GuestAssetError, match=words):
        bzimage.extract_vmlinux(image)


def test_the_entry_note_is_found() -> None:
    assert bzimage.has_pvh_entry(elf())
    assert not bzimage.has_pvh_entry(elf(kind=17))
    assert not bzimage.has_pvh_entry(elf(note=b"GNU\0"))
    with pytest.raises(GuestAssetError, match="cut short"):
        bzimage.has_pvh_entry(elf()[:-8])


def module(depends: str = "", softdep: str = "") -> bytes:
    """An ELF file with a .modinfo section."""
    info = f"license=GPL\0depends={depends}\0" + (f"softdep={softdep}\0" if softdep else "") + "name=x\0"
    names = b"\0.modinfo\0.shstrtab\0"
    at = 64
    table = at + len(info) + len(names)
    header = b"\x7fELF\x02\x01\x01" + bytes(9)
    header += struct.pack("<HHIQQQIHHHHHH", 1, 62, 1, 0, 0, table, 0, 64, 0, 0, 64, 3, 2)
    sections = struct.pack("<IIQQQQIIQQ", 0, 0, 0, 0, 0, 0, 0, 0, 0, 0)
    sections += struct.pack("<IIQQQQIIQQ", 1, 1, 0, 0, at, len(info), 0, 0, 1, 0)
    sections += struct.pack("<IIQQQQIIQQ", 10, 3, 0, 0, at + len(info), len(names), 0, 0, 1, 0)
    return header + info.encode() + names + sections


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """ext4 needs jbd2 and mbcache, and had better have crc32c; virtio-net is built in."""
    files = {
        "fs/ext4.ko": module("jbd2,mbcache", "pre: crc32c-intel missing post: later"),
        "fs/jbd2.ko.xz": lzma.compress(module()),
        "fs/mbcache.ko.gz": gzip.compress(module()),
        "crypto/crc32c-intel.ko.zst": zstandard.compress(module()),
        "fs/later.ko": module(),
        "fs/broken-dep.ko": module("nowhere"),
        "fs/ring-a.ko": module("ring-b"),
        "fs/ring-b.ko": module("ring-a"),
    }
    for name, data in files.items():
        path = tmp_path / "kernel" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
    (tmp_path / "modules.builtin").write_text("kernel/drivers/net/virtio-net.ko\n")
    return tmp_path


def resolve(tree: Path, *names: str, required: bool = True) -> list[str]:
    return [path for path, _data in Tree(str(tree)).resolve([Wanted(name, required) for name in names])]


def test_dependencies_come_first_and_once(tree: Path) -> None:
    assert resolve(tree, "ext4", "jbd2") == [
        "kernel/fs/jbd2.ko",
        "kernel/fs/mbcache.ko",
        "kernel/crypto/crc32c-intel.ko",
        "kernel/fs/ext4.ko",
    ]


def test_compressed_modules_come_out_plain(tree: Path) -> None:
    for _path, data in Tree(str(tree)).resolve([Wanted("ext4", True)]):
        assert data[:4] == b"\x7fELF"


def test_what_is_built_in_needs_no_file(tree: Path) -> None:
    assert resolve(tree, "virtio_net") == []


def test_a_missing_module_is_named_unless_it_may_be_missing(tree: Path) -> None:
    with pytest.raises(GuestAssetError, match=r"lacks nonesuch, broken_dep \(which needs nowhere\)"):
        resolve(tree, "nonesuch", "broken_dep")
    assert resolve(tree, "nonesuch", "broken_dep", required=False) == []


def test_modules_that_need_each_other_are_an_error(tree: Path) -> None:
    with pytest.raises(GuestAssetError, match="circle"):
        resolve(tree, "ring_a")


def test_a_directory_without_modules_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(GuestAssetError, match="no kernel modules"):
        Tree(str(tmp_path))


@pytest.mark.parametrize("name", ["a.ko", "a.ko.xz", "a.ko.gz", "a.ko.zst"])
def test_damaged_modules_are_named_errors(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(b"no module")
    with pytest.raises(GuestAssetError, match=r"a\.ko|zstd"):
        read_module(str(tmp_path / name))


def test_lists_of_modules() -> None:
    listed = parse_list("virtio-pci # the bus\n\n?9p\n# nothing\n", "list")
    assert [(item.name, item.required) for item in listed] == [("virtio_pci", True), ("9p", False)]
    with pytest.raises(GuestAssetError, match="list, line 2"):
        parse_list("a\n../b\n", "list")
