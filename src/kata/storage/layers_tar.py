"""A tar reader for hostile archives: one pass, bounded memory, no file system access.

`tarfile` is not used because it reads extension headers of any length into memory, keeps every member, and takes three
times as long. This reader accepts the same as Go's ``archive/tar``, with which layers are usually made and read: ustar,
pax, GNU and old tar, base-256 numbers, and the four sparse formats. As there, a global pax header is read and ignored,
and types without content (links, directories, devices) have none, whatever their size field says.

Sources: POSIX.1-2017 ``pax``, GNU tar manual "Standard Format", "Storing Sparse Files".
"""

from __future__ import annotations

from typing import Protocol
from zlib import adler32

from kata.errors import ImageError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterator

BLOCK = 512
MAX_EXTENSION = 1 << 20
"""Maximum size of an extension header (long name or pax records), as in Go."""
_MAX_SPARSE = 1 << 16
_AT_ONCE = 64 << 10
_ZERO_BLOCK = bytes(BLOCK)
_ZERO_STEP = bytes(256 << 10)

FILE, LINK, SYMLINK, CHAR, BLOCK_DEVICE, DIRECTORY, FIFO = b"0", b"1", b"2", b"3", b"4", b"5", b"6"

_HINT = "the archive is damaged or was made by a broken tool; make or pull it again"


class Source(Protocol):
    """Where the archive comes from."""

    def read(self, size: int) -> bytes:
        """Exactly `size` bytes, fewer only at the end."""
        ...

    def pieces(self, size: int) -> Iterator[bytes]:
        """The next `size` bytes in pieces, fewer only at the end."""
        ...

    def skip(self, size: int) -> int:
        """Pass over `size` bytes; returns how many there were."""
        ...


class Entry:
    """One member of an archive."""

    __slots__ = (
        "gid", "link", "major", "minor", "mode", "mtime", "mtime_ns", "name", "size", "sparse", "stored",
        "type", "uid", "xattrs",
    )  # fmt: skip

    def __init__(self) -> None:
        self.name = b""
        self.type = FILE
        self.mode = 0
        self.uid = 0
        self.gid = 0
        self.size = 0
        """Bytes of content."""
        self.stored = 0
        """Bytes of content in the archive: fewer than `size` in a sparse file."""
        self.mtime = 0
        self.mtime_ns = 0
        self.link = b""
        self.major = 0
        self.minor = 0
        self.xattrs: dict[bytes, bytes] | None = None
        self.sparse: list[tuple[int, int]] | None = None
        """The (offset, length) runs of a sparse file that are in the archive."""


def text(name: bytes) -> str:
    """A name from an archive, made safe for an error message."""
    shown = name[:200].decode("utf-8", "backslashreplace")
    shown = "".join(char if char.isprintable() else f"\\x{ord(char):02x}" for char in shown)
    return shown + ("..." if len(name) > 200 else "")


def _number(field: bytes, what: str) -> int:
    """A numeric header field: octal digits, or base 256 when the top bit is set."""
    if field[0] & 0x80:
        value = int.from_bytes(field, "big") & ((1 << (8 * len(field) - 1)) - 1)
        if field[0] & 0x40:
            value -= 1 << (8 * len(field) - 1)
        return value
    digits = field.partition(b"\0")[0].strip()
    try:
        return int(digits or b"0", 8)
    except ValueError:
        raise ImageError(f"the tar header's {what} is not a number", _HINT) from None


def _decimal(value: bytes, what: str) -> int:
    if not value.isdigit() or len(value) > 20:
        raise ImageError(f"the pax record {what} is not a number", _HINT)
    return int(value)


def _checksum_right(block: bytes) -> bool:
    field = block[148:156]
    try:
        stored = _number(field, "checksum")
    except ImageError:
        return False
    # The lower half of Adler-32 is one more than the sum of the bytes, modulo 65521, which the sum of half a
    # block does not reach: ten times as fast as sum(). The field itself counts as eight spaces.
    unsigned = (adler32(block[:256]) & 0xFFFF) + (adler32(block[256:]) & 0xFFFF) - 2 - sum(field) + 256
    if stored == unsigned:
        return True
    rest = block[:148] + block[156:]
    return stored == unsigned - 256 * sum(byte > 127 for byte in rest)  # some old tars summed signed bytes


def _pax(data: bytes) -> list[tuple[bytes, bytes]]:
    r"""The records of a pax header: ``LENGTH KEY=VALUE\n`` each."""
    records = []
    at = 0
    while at < len(data):
        space = data.find(b" ", at, at + 12)
        digits = data[at:space] if space > 0 else b""
        if not digits.isdigit():
            if not data[at:].strip(b"\0"):
                break
            raise ImageError("a pax header is malformed", _HINT)
        end = at + int(digits)
        equals = data.find(b"=", space, end)
        if end > len(data) or end <= space + 2 or equals < 0 or data[end - 1] != 10:
            raise ImageError("a pax header is malformed", _HINT)
        records.append((data[space + 1 : equals], data[equals + 1 : end - 1]))
        at = end
    return records


class Reader:
    """Reads entries one after the other.

    Args:
        source: The archive.
    """

    def __init__(self, source: Source) -> None:
        self._source = source
        self._left = 0  # stored bytes of the current entry not yet read
        self._pad = 0
        self._entry: Entry | None = None

    def next(self) -> Entry | None:
        """The next entry, or None at the end of the archive.

        Raises:
            ImageError: The archive is malformed or ends early.
        """
        self._finish()
        records: list[tuple[bytes, bytes]] = []
        long_name = long_link = b""
        while True:
            block = self._block()
            if block is None:
                if records or long_name or long_link:
                    raise ImageError("the archive ends behind an extension header", _HINT)
                return None
            if not _checksum_right(block):
                raise ImageError("the checksum of a tar header is wrong", _HINT)
            kind = block[156:157]
            if kind in b"xgLK" and kind:
                data = self._extension(_number(block[124:136], "size"))
                if kind == b"x":
                    records = _pax(data)
                elif kind == b"L":
                    long_name = data.split(b"\0", 1)[0]
                elif kind == b"K":
                    long_link = data.split(b"\0", 1)[0]
                continue
            entry = self._header(block)
            if long_name:
                entry.name = long_name
            if long_link:
                entry.link = long_link
            sparse_map = self._apply_pax(entry, records) if records else None
            return self._classify(entry, block, sparse_map)

    def pieces(self) -> Iterator[bytes]:
        """Yield the content of the current entry, `size` bytes in total, with holes of sparse files as zeros.

        Raises:
            ImageError: The archive ends early.
        """
        entry = self._entry
        assert entry is not None
        if entry.sparse is None:
            if entry.size > _AT_ONCE:
                yield from self._take(entry.size)
            elif entry.size:
                data = self._source.read(entry.size)
                self._left -= len(data)
                if len(data) < entry.size:
                    raise ImageError("the archive ends within a file", _HINT)
                yield data
            return
        at = 0
        for offset, length in entry.sparse:
            yield from _zeros(offset - at)
            yield from self._take(length)
            at = offset + length
        yield from _zeros(entry.size - at)

    def _take(self, size: int) -> Iterator[bytes]:
        for piece in self._source.pieces(size):
            self._left -= len(piece)
            size -= len(piece)
            yield piece
        if size:
            raise ImageError("the archive ends within a file", _HINT)

    def _finish(self) -> None:
        """Skip the rest of the current entry."""
        rest = self._left + self._pad
        self._left = self._pad = 0
        if rest and self._source.skip(rest) < rest:
            raise ImageError("the archive ends within a file", _HINT)

    def _block(self) -> bytes | None:
        block = self._source.read(BLOCK)
        if not block:
            return None  # an archive without the two zero blocks: Go accepts it too
        if len(block) < BLOCK:
            raise ImageError("the archive ends within a header", _HINT)
        if block != _ZERO_BLOCK:
            return block
        second = self._source.read(BLOCK)
        if second.strip(b"\0"):
            raise ImageError("a tar header follows a block of zeros", _HINT)
        return None

    def _extension(self, size: int) -> bytes:
        if not 0 <= size <= MAX_EXTENSION:
            raise ImageError(f"an extension header of {size} bytes is larger than {MAX_EXTENSION}", _HINT)
        padded = size + -size % BLOCK
        data = self._source.read(padded)
        if len(data) < padded:
            raise ImageError("the archive ends within a header", _HINT)
        return data[:size]

    def _header(self, block: bytes) -> Entry:
        entry = Entry()
        entry.name = block[:100].split(b"\0", 1)[0]
        entry.mode = _number(block[100:108], "mode")
        entry.uid = _number(block[108:116], "owner")
        entry.gid = _number(block[116:124], "group")
        entry.size = entry.stored = _number(block[124:136], "size")
        entry.mtime = _number(block[136:148], "time")
        entry.type = block[156:157]
        entry.link = block[157:257].split(b"\0", 1)[0]
        if block[257:262] == b"ustar":
            if entry.type in b"34":
                entry.major = _number(block[329:337], "device number")
                entry.minor = _number(block[337:345], "device number")
            if block[257:265] == b"ustar\x0000":
                prefix = block[345:476] if block[508:512] == b"tar\0" else block[345:500]
                prefix = prefix.split(b"\0", 1)[0]
                if prefix:
                    entry.name = prefix + b"/" + entry.name
        return entry

    def _apply_pax(self, entry: Entry, records: list[tuple[bytes, bytes]]) -> dict[bytes, bytes] | None:  # noqa: C901, PLR0912
        """Put pax records into the entry; returns the GNU.sparse.* records, if there are any."""
        sparse: dict[bytes, bytes] = {}
        points: list[bytes] = []
        for key, value in records:
            if key == b"path":
                entry.name = value or entry.name
            elif key == b"linkpath":
                entry.link = value or entry.link
            elif key == b"size":
                entry.size = entry.stored = _decimal(value, "size") if value else entry.size
            elif key == b"uid":
                entry.uid = _decimal(value, "uid") if value else entry.uid
            elif key == b"gid":
                entry.gid = _decimal(value, "gid") if value else entry.gid
            elif key == b"mtime":
                if value:
                    entry.mtime, entry.mtime_ns = _time(value)
            elif key.startswith(b"SCHILY.xattr."):
                if entry.xattrs is None:
                    entry.xattrs = {}
                entry.xattrs[key[13:]] = value
            elif key == b"GNU.sparse.offset":
                points.append(value)
            elif key == b"GNU.sparse.numbytes":
                if len(points) % 2 == 0 or len(points) > 2 * _MAX_SPARSE:
                    raise ImageError("the sparse map is malformed", _HINT)
                points.append(value)
            elif key.startswith(b"GNU.sparse."):
                sparse[key[11:]] = value
        if points:  # format 0.0 repeats the two records; 0.1 has them in one, which then looks the same
            sparse[b"map"] = b",".join(points)
        return sparse or None

    def _classify(self, entry: Entry, block: bytes, sparse: dict[bytes, bytes] | None) -> Entry:
        kind = entry.type
        if kind in (b"\0", b"7"):
            kind = DIRECTORY if kind == b"\0" and entry.name.endswith(b"/") else FILE
        if not 0 <= entry.size < 1 << 63:
            raise ImageError(f"{text(entry.name)} has the impossible size {entry.size}", _HINT)
        if kind in b"123456":
            entry.size = entry.stored = 0
        elif kind not in (FILE, b"S"):
            raise ImageError(f"{text(entry.name)} has the unknown entry type {text(kind)!r}", _HINT)
        self._entry = entry
        self._left = entry.stored
        self._pad = -entry.stored % BLOCK
        if kind == b"S":
            self._old_sparse(entry, block)
            kind = FILE
        elif sparse is not None and kind == FILE:
            self._pax_sparse(entry, sparse)
        entry.type = kind
        if b"\0" in entry.name or b"\0" in entry.link:
            raise ImageError(f"{text(entry.name)} has a NUL byte in its name or link", _HINT)
        return entry

    def _old_sparse(self, entry: Entry, block: bytes) -> None:
        """GNU's own format: four runs in the header, more in blocks that follow it."""
        runs = []
        at, count, more = 386, 4, block[482]
        entry.size = _number(block[483:495], "size")
        while True:
            for index in range(count):
                field = block[at + 24 * index : at + 24 * index + 24]
                if field[0] == 0:
                    break
                runs.append((_number(field[:12], "sparse map"), _number(field[12:], "sparse map")))
            if not more:
                break
            if len(runs) > _MAX_SPARSE:
                raise ImageError(f"{text(entry.name)} has too many pieces", _HINT)
            block = self._source.read(BLOCK)
            if len(block) < BLOCK:
                raise ImageError("the archive ends within a header", _HINT)
            at, count, more = 0, 21, block[504]
        self._set_sparse(entry, runs)

    def _pax_sparse(self, entry: Entry, records: dict[bytes, bytes]) -> None:
        """Formats 0.0 and 0.1 (map in the records) and 1.0 (map before the data)."""
        entry.name = records.get(b"name") or entry.name
        size = records.get(b"realsize") or records.get(b"size")
        if records.get(b"major") == b"1" and records.get(b"minor") == b"0":
            numbers = self._sparse_lines()
        elif b"map" in records:
            numbers = [_decimal(item, "GNU.sparse.map") for item in records[b"map"].split(b",") if item]
        else:
            return
        if size is None or len(numbers) % 2 or len(numbers) > 2 * _MAX_SPARSE:
            raise ImageError(f"the sparse map of {text(entry.name)} is malformed", _HINT)
        entry.size = _decimal(size, "GNU.sparse.realsize")
        entry.stored = self._left
        self._set_sparse(entry, list(zip(numbers[::2], numbers[1::2], strict=True)))

    def _sparse_lines(self) -> list[int]:
        """The map of format 1.0: a count, then that many pairs, one number a line, padded to a block."""
        numbers: list[int] = []
        rest = b""
        want = -1
        while want < 0 or len(numbers) < want:
            if self._left < BLOCK:
                raise ImageError("a sparse map is malformed", _HINT)
            self._left -= BLOCK
            *lines, rest = (rest + self._source.read(BLOCK)).split(b"\n")
            for line in lines:
                if want < 0:
                    want = 2 * _decimal(line, "sparse map")
                    if want > 2 * _MAX_SPARSE:
                        raise ImageError("a sparse file has too many pieces", _HINT)
                elif len(numbers) < want:
                    numbers.append(_decimal(line, "sparse map"))
            if len(rest) > 20 and rest.strip(b"\0"):
                raise ImageError("a sparse map is malformed", _HINT)
        return numbers

    def _set_sparse(self, entry: Entry, runs: list[tuple[int, int]]) -> None:
        at = stored = 0
        kept = []
        for offset, length in runs:
            if offset < at or length < 0 or offset + length > entry.size:
                raise ImageError(f"the sparse map of {text(entry.name)} is malformed", _HINT)
            if length:
                kept.append((offset, length))
            at = offset + length
            stored += length
        if not 0 <= entry.size < 1 << 63 or stored > entry.stored:
            raise ImageError(f"the sparse map of {text(entry.name)} is malformed", _HINT)
        entry.sparse = kept


def _time(value: bytes) -> tuple[int, int]:
    """A pax time: seconds, maybe negative, maybe with a fraction; rounded down to nanoseconds."""
    whole, _, fraction = value.partition(b".")
    digits = whole[1:] if whole[:1] == b"-" else whole
    if not (digits.isdigit() and len(digits) < 19 and (not fraction or fraction.isdigit())):
        raise ImageError("the pax record mtime is not a time", _HINT)
    seconds, nanos = int(whole), int(fraction[:9].ljust(9, b"0"))
    if whole[:1] == b"-" and nanos:
        return seconds - 1, 10**9 - nanos
    return seconds, nanos


def _zeros(size: int) -> Iterator[bytes]:
    while size > 0:
        step = min(size, len(_ZERO_STEP))
        yield _ZERO_STEP[:step]
        size -= step
