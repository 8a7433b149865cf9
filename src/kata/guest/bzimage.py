"""Extracts the uncompressed kernel from a distribution's bzImage.

A packaged kernel spends most of its early start decompressing itself, and without KVM that code is emulated. The ELF
file inside starts at once through its PVH entry point, so it is unpacked here, once.

Sources: Documentation/arch/x86/boot.rst (setup header), include/xen/interface/elfnote.h (PVH note), the LZ4
frame and block format descriptions, ELF-64 object file format.
"""

from __future__ import annotations

import lzma
import struct
import zlib

from kata.errors import GuestAssetError

_SETUP_MAGIC = b"HdrS"
_ELF_MAGIC = b"\x7fELF"
_PT_NOTE = 4
_PVH_NOTE = 18  # XEN_ELFNOTE_PHYS32_ENTRY
_LZ4_LEGACY = b"\x02\x21\x4c\x18"
_LZ4_CHUNK = 8 << 20
_MAX_KERNEL = 512 << 20


def extract_vmlinux(image: bytes) -> bytes:
    """Extract the kernel's ELF file from a bzImage.

    Args:
        image: A complete bzImage of the x86 boot protocol 2.08 or later, or an ELF file, which is returned as it is.

    Returns:
        The ELF file, without the relocations for address randomisation that the build appends to it.

    Raises:
        GuestAssetError: The image is of another kind, truncated, or compressed by an unsupported method.
    """
    if image[:4] == _ELF_MAGIC:
        return image
    if len(image) < 0x260 or image[0x202:0x206] != _SETUP_MAGIC:
        raise GuestAssetError("the kernel image is neither an ELF file nor a bzImage")
    version, sectors = struct.unpack_from("<H", image, 0x206)[0], image[0x1F1] or 4
    if version < 0x208:
        raise GuestAssetError(f"the kernel image follows boot protocol {version:#x}; 0x208 is needed")
    offset, length = struct.unpack_from("<II", image, 0x248)
    start = (sectors + 1) * 512 + offset
    payload = image[start : start + length]
    if len(payload) != length or not length:
        raise GuestAssetError("the kernel image is cut short: its payload lies beyond the end of the file")
    elf = _decompress(payload)
    if elf[:4] != _ELF_MAGIC:
        raise GuestAssetError("the payload of the kernel image is not an ELF file")
    return elf[: _elf_length(elf)]


def has_pvh_entry(elf: bytes) -> bool:
    """Whether a vmlinux can be started directly (it carries the PVH entry note).

    Raises:
        GuestAssetError: The ELF file's headers point outside of it.
    """
    for kind, offset, size in _segments(elf):
        if kind != _PT_NOTE:
            continue
        position, end = offset, min(offset + size, len(elf))
        while position + 12 <= end:
            name_size, value_size, note = struct.unpack_from("<III", elf, position)
            name = elf[position + 12 : position + 12 + name_size]
            if note == _PVH_NOTE and name == b"Xen\0":
                return True
            position += 12 + (name_size + 3 & ~3) + (value_size + 3 & ~3)
    return False


def _segments(elf: bytes) -> list[tuple[int, int, int]]:
    """(type, file offset, file size) of each program header."""
    if len(elf) < 64 or elf[:6] != _ELF_MAGIC + b"\x02\x01":
        raise GuestAssetError("the kernel is not a 64-bit little-endian ELF file")
    table, (entry, count) = struct.unpack_from("<Q", elf, 32)[0], struct.unpack_from("<HH", elf, 54)
    if entry < 56 or table + entry * count > len(elf):
        raise GuestAssetError("the kernel's ELF file is cut short: its program headers lie beyond its end")
    found = []
    for index in range(count):
        kind, _flags, offset, _va, _pa, size = struct.unpack_from("<IIQQQQ", elf, table + index * entry)
        if offset + size > len(elf):
            raise GuestAssetError("the kernel's ELF file is cut short: a segment lies beyond its end")
        found.append((kind, offset, size))
    return found


def _elf_length(elf: bytes) -> int:
    """Where the ELF file proper ends."""
    end: int = max((offset + size for _kind, offset, size in _segments(elf)), default=0)
    table: int = struct.unpack_from("<Q", elf, 40)[0]
    entry, count = struct.unpack_from("<HH", elf, 58)
    end = max(end, table + entry * count)
    if table and table + entry * count <= len(elf):
        for index in range(count):
            kind, offset, size = struct.unpack_from("<4xI16xQQ", elf, table + index * entry)
            if kind != 8:  # SHT_NOBITS takes no space in the file
                end = max(end, offset + size)
    return min(end, len(elf))


def _decompress(payload: bytes) -> bytes:
    # Each compressor's output is followed by four bytes of its length; the decoders stop before them.
    try:
        if payload[:2] == b"\x1f\x8b":
            return zlib.decompressobj(31).decompress(payload, _MAX_KERNEL)
        if payload[:6] == b"\xfd7zXZ\0":
            return lzma.LZMADecompressor(lzma.FORMAT_XZ).decompress(payload, _MAX_KERNEL)
        if payload[:3] == b"\x5d\0\0":
            return lzma.LZMADecompressor(lzma.FORMAT_ALONE).decompress(payload, _MAX_KERNEL)
        if payload[:4] == b"\x28\xb5\x2f\xfd":
            return unpack_zstd(payload)
        if payload[:4] == _LZ4_LEGACY:
            return _unpack_lz4(payload)
        if payload[:4] == _ELF_MAGIC:
            return payload
    except (zlib.error, lzma.LZMAError, EOFError, IndexError, struct.error) as error:
        raise GuestAssetError(f"the payload of the kernel image is damaged: {error}") from error
    raise GuestAssetError(
        f"the kernel image is compressed in an unknown way (it starts with {payload[:4].hex()})",
        "kata guest build --kernel small",
    )


def unpack_zstd(data: bytes) -> bytes:
    """Decompress a zstd frame; bytes after it are ignored.

    Raises:
        GuestAssetError: The frame is damaged, or expands beyond what a kernel or module can be.
    """
    import zstandard  # a third-party package that only this form needs

    try:
        out: bytes = zstandard.ZstdDecompressor().decompressobj().decompress(data)
    except zstandard.ZstdError as error:
        raise GuestAssetError(f"zstd data is damaged: {error}") from error
    return out


def _unpack_lz4(payload: bytes) -> bytes:
    """The legacy frame: chunks of a length and one block each, until a length that cannot be one."""
    out = bytearray()
    position = 4
    while position + 4 <= len(payload):
        length = struct.unpack_from("<I", payload, position)[0]
        # The appended length of the whole follows the last chunk.
        if position + 4 == len(payload) or length == 0 or position + 4 + length > len(payload):
            break
        out += lz4_block(payload[position + 4 : position + 4 + length], _LZ4_CHUNK)
        position += 4 + length
    return bytes(out)


def lz4_block(block: bytes, limit: int) -> bytes:
    """Decode one LZ4 block.

    Args:
        block: The compressed block.
        limit: The most it may expand to, in bytes.

    Raises:
        GuestAssetError: The block is damaged or expands beyond the limit.
    """
    out = bytearray()
    position, end = 0, len(block)
    try:
        while position < end:
            token = block[position]
            position += 1
            literals = token >> 4
            if literals == 15:
                more, position = _further_length(block, position)
                literals += more
            out += block[position : position + literals]
            position += literals
            if position >= end:
                break
            distance = block[position] | block[position + 1] << 8
            position += 2
            match = token & 15
            if match == 15:
                more, position = _further_length(block, position)
                match += more
            match += 4
            start = len(out) - distance
            if distance == 0 or start < 0 or len(out) + match > limit:
                raise GuestAssetError("an LZ4 block of the kernel image is damaged")
            if distance >= match:
                out += out[start : start + match]
            else:  # the match overlaps its own output: a repeated pattern
                pattern = out[start:]
                out += (pattern * (match // distance + 1))[:match]
    except IndexError:
        raise GuestAssetError("an LZ4 block of the kernel image is cut short") from None
    if len(out) > limit or position > end:
        raise GuestAssetError("an LZ4 block of the kernel image is damaged")
    return bytes(out)


def _further_length(block: bytes, position: int) -> tuple[int, int]:
    """What the bytes at a position add to a length, and the position behind them."""
    length = 0
    while (more := block[position]) == 255:
        length += 255
        position += 1
    return length + more, position + 1
