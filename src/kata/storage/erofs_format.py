"""The part of the erofs on-disk format that our writer uses. This module does no I/O.

An uncompressed file system of 4 KiB blocks with 64-byte ("extended") inodes. Everything is little endian.

* The superblock is at byte 1024 of block 0. Its checksum is crc32c of bytes 1024..4095 with the field zero.
* An inode lies at byte ``meta_blkaddr * 4096 + nid * 32``; we keep ``meta_blkaddr`` zero, as mkfs.erofs
  does, so a nid is simply a byte offset divided by 32. The root's nid has 16 bits, so the root lies in
  block 0.
* After the inode come its extended attributes, then (layout *inline*) the last part of its data, which must
  not cross a block boundary. Everything before that part, or all of it in the layout *plain*, is one run of
  whole blocks.
* A directory is a sequence of blocks; each begins with 12-byte entries, followed by their names. All names of a
  directory, including "." and "..", are sorted bytewise, so that the kernel can use binary search.

Source: Linux, ``fs/erofs/erofs_fs.h`` and ``Documentation/filesystems/erofs.rst``.
"""

from __future__ import annotations

import stat
import struct

BLOCK = 4096
SLOT = 32
SLOTS = BLOCK // SLOT
"""Inode slots in a block: the unit of a nid."""
INODE = 64
SUPER_AT = 1024
ROOT_NID = (SUPER_AT + 128) // SLOT
"""The first slot behind the superblock."""

_MAGIC = 0xE0F5E1E2
_COMPAT_CHECKSUM = 0x1
_COMPAT_MTIME = 0x2

PLAIN = 0
INLINE = 2
"""Data layouts: whole blocks only, and with the tail behind the inode."""

_SUPER = struct.Struct("<IIIBBHQQIIII16s16sIHHHBBIQ24x")
_INODE = struct.Struct("<HHHHQIIIIQII16x")
_DIRENT = struct.Struct("<QHBB")
DIRENT = _DIRENT.size

_XATTR_PREFIXES = (
    # (prefix, index); the first that matches is taken, so the two ACL names stand before what is shorter
    (b"system.posix_acl_access", 2),
    (b"system.posix_acl_default", 3),
    (b"user.", 1),
    (b"trusted.", 4),
    (b"security.", 6),
)

_FILE_TYPES = {
    stat.S_IFREG: 1,
    stat.S_IFDIR: 2,
    stat.S_IFCHR: 3,
    stat.S_IFBLK: 4,
    stat.S_IFIFO: 5,
    stat.S_IFSOCK: 6,
    stat.S_IFLNK: 7,
}


def _crc_table() -> tuple[int, ...]:
    table = []
    for value in range(256):
        for _ in range(8):
            value = (value >> 1) ^ (0x82F63B78 if value & 1 else 0)
        table.append(value)
    return tuple(table)


def crc32c(data: bytes) -> int:
    """CRC-32C (Castagnoli) like the kernel's ``crc32c(~0, ...)``: without the final inversion."""
    table = _crc_table()
    crc = 0xFFFFFFFF
    for byte in data:
        crc = table[(crc ^ byte) & 0xFF] ^ (crc >> 8)
    return crc


def superblock(*, inodes: int, blocks: int, uuid: bytes, label: bytes = b"") -> bytes:
    """Encode the superblock (128 bytes), with a checksum of zero (see `seal`).

    Args:
        inodes: Number of inodes.
        blocks: Size of the file system in blocks.
        uuid: 16 bytes.
        label: Up to 15 bytes.
    """
    return _SUPER.pack(
        _MAGIC, 0, _COMPAT_CHECKSUM | _COMPAT_MTIME, 12, 0, ROOT_NID, inodes, 0, 0, blocks, 0, 0,
        uuid, label[:15], 0, 0, 0, 0, 0, 0, 0, 0,
    )  # fmt: skip


def size_of(block0: bytes) -> int:
    """The size of the file system in bytes according to its block 0; -1 if that has no superblock."""
    if len(block0) < BLOCK or struct.unpack_from("<I", block0, SUPER_AT)[0] != _MAGIC:
        return -1
    blocks: int = struct.unpack_from("<I", block0, SUPER_AT + 36)[0]
    return blocks * BLOCK


def seal(block0: bytearray) -> None:
    """Put the checksum into a complete block 0."""
    struct.pack_into("<I", block0, SUPER_AT + 4, 0)
    struct.pack_into("<I", block0, SUPER_AT + 4, crc32c(bytes(block0[SUPER_AT:BLOCK])))


def device_number(major: int, minor: int) -> int:
    """Encode a device number like the kernel's ``new_encode_dev``: 12 bits of major, 20 of minor."""
    return (minor & 0xFF) | ((major & 0xFFF) << 8) | ((minor & 0xFFF00) << 12)


def inode(
    *, layout: int, xattr_bytes: int, mode: int, size: int, address: int, number: int, uid: int, gid: int,
    mtime: int, mtime_ns: int, nlink: int,
) -> bytes:  # fmt: skip
    """Encode an inode (64 bytes).

    Args:
        layout: `PLAIN` or `INLINE`.
        xattr_bytes: Length of its attribute area (see `xattrs`).
        mode: Type and permission bits.
        size: Bytes of data, directory blocks or link target.
        address: First data block, or the device number of a device.
        number: Inode number in a 32-bit stat.
        uid: Owner.
        gid: Group.
        mtime: Seconds; may be negative.
        mtime_ns: Nanoseconds.
        nlink: Number of names.
    """
    count = (xattr_bytes - 12) // 4 + 1 if xattr_bytes else 0
    return _INODE.pack(
        1 | layout << 1, count, mode, 0, size, address, number, uid, gid,
        mtime & 0xFFFFFFFFFFFFFFFF, mtime_ns, nlink,
    )  # fmt: skip


def xattr_kept(name: bytes) -> bool:
    """Whether the format has a prefix index for this attribute."""
    return any(name.startswith(prefix) for prefix, _ in _XATTR_PREFIXES)


def xattrs(attributes: dict[bytes, bytes]) -> bytes:
    """Encode the attribute area after an inode: a 12-byte header, then the entries, each padded to 4 bytes.

    Args:
        attributes: Values by full name. Names must satisfy `xattr_kept`; a name has at most 255 bytes after its
            prefix, a value at most 65535, and all together at most 256 KiB.
    """
    if not attributes:
        return b""
    out = bytearray(12)
    for name in sorted(attributes):
        value = attributes[name]
        prefix, index = next(pair for pair in _XATTR_PREFIXES if name.startswith(pair[0]))
        rest = name[len(prefix) :]
        out += struct.pack("<BBH", len(rest), index, len(value)) + rest + value
        out += bytes(-len(out) % 4)
    return bytes(out)


def file_type(mode: int) -> int:
    """The type byte of a directory entry."""
    return _FILE_TYPES[stat.S_IFMT(mode)]


def dir_size(names: list[bytes]) -> int:
    """The size in bytes of a directory with these names, in order: all blocks but the last count in full."""
    full = 0
    used = 0
    for name in names:
        need = DIRENT + len(name)
        if used + need > BLOCK:
            full += BLOCK
            used = 0
        used += need
    return full + used


def dir_data(entries: list[tuple[bytes, int, int]]) -> bytes:
    """Encode the data of a directory.

    Args:
        entries: (name, nid, type byte) in bytewise order of the names, with "." and "..".

    Returns:
        As many bytes as `dir_size` says.
    """
    out = bytearray()
    start = 0
    while start < len(entries):
        used = 0
        end = start
        while end < len(entries) and used + DIRENT + len(entries[end][0]) <= BLOCK:
            used += DIRENT + len(entries[end][0])
            end += 1
        offset = (end - start) * DIRENT
        names = []
        for name, nid, kind in entries[start:end]:
            out += _DIRENT.pack(nid, offset, kind, 0)
            offset += len(name)
            names.append(name)
        out += b"".join(names)
        if end < len(entries):
            out += bytes(BLOCK - used)
        start = end
    return bytes(out)
