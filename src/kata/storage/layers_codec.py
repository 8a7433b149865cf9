"""Layer streams: detects compression by its magic number, decompresses in bounded steps, and hashes the content.

A step never yields more than `STEP` bytes, whatever the compression ratio, so a decompression bomb takes time and disk
space up to the limits of `kata.storage.layers`, but no memory.
"""

from __future__ import annotations

import bz2
import hashlib
import lzma
import queue
import threading
import zlib
from typing import BinaryIO, Protocol, cast

from kata.errors import HostError, ImageError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

STEP = 256 << 10

_ZSTD_WINDOW = 128 << 20
"""The largest window that ``zstd`` accepts by default (8 MiB is usual)."""


class _Decompressor(Protocol):
    def decompress(self, data: bytes, max_length: int) -> bytes: ...

    @property
    def eof(self) -> bool: ...

    @property
    def unused_data(self) -> bytes: ...


def kind_of(magic: bytes) -> str:
    """The compression of a stream beginning with these (6 or more) bytes: gzip, zstd, bzip2, xz or plain."""
    if magic[:2] == b"\x1f\x8b":
        return "gzip"
    if magic[:4] == b"\x28\xb5\x2f\xfd" or (magic[1:4] == b"\x2a\x4d\x18" and magic[0] & 0xF0 == 0x50):
        return "zstd"
    if magic[:3] == b"BZh":
        return "bzip2"
    if magic[:6] == b"\xfd7zXZ\0":
        return "xz"
    return "plain"


def decompressed(source: BinaryIO, tick: Callable[[int], None] | None = None) -> Iterator[bytes]:
    """Decompress a layer.

    Args:
        source: The stored layer.
        tick: Called with the number of bytes read from `source` at each step.

    Yields:
        Pieces of at most `STEP` bytes.

    Raises:
        ImageError: The compressed data are damaged or end early.
    """
    head = source.read(STEP)
    kind = kind_of(head)
    try:
        if kind == "zstd":
            yield from _zstd(_Prefixed(head, source, tick))
        elif kind == "plain":
            while head:
                if tick is not None:
                    tick(len(head))
                yield head
                head = source.read(STEP)
        else:
            yield from _members(kind, _Prefixed(head, source, tick))
    except (zlib.error, OSError, lzma.LZMAError, EOFError) as error:
        if isinstance(error, OSError) and error.errno is not None:
            raise  # reading the source failed; bz2 reports damage as an OSError without a number
        raise ImageError(f"the {kind} data are damaged: {error}", _DAMAGED) from error


_DAMAGED = "pull or export the image again"


class _Prefixed:
    """A source whose beginning has already been read."""

    def __init__(self, head: bytes, source: BinaryIO, tick: Callable[[int], None] | None) -> None:
        self._head = head
        self._source = source
        self._tick = tick

    def read(self, size: int = -1) -> bytes:
        if self._head:
            data = self._head if size < 0 else self._head[:size]
            self._head = self._head[len(data) :]
        else:
            data = self._source.read(size if size >= 0 else STEP)
        if self._tick is not None:
            self._tick(len(data))
        return data


def _members(kind: str, source: _Prefixed) -> Iterator[bytes]:
    """Decompress gzip, bzip2 or xz, of which several members may follow each other (as by pigz, estargz, `cat`)."""
    data = source.read(STEP)
    while data:
        decoder = _decoder(kind)
        while not decoder.eof:
            piece = decoder.decompress(data, STEP)
            data = b""
            if piece:
                yield piece
            elif not decoder.eof:
                data = source.read(STEP)
                if not data:
                    raise ImageError(f"the {kind} data end early", _DAMAGED)
        data = decoder.unused_data or source.read(STEP)
        while data and not data.strip(b"\0"):  # padding, which gzip allows behind the last member
            data = source.read(STEP)
        data = data.lstrip(b"\0")


class _Gunzip:
    """zlib's decompressor with the interface of the other two."""

    def __init__(self) -> None:
        self._inner = zlib.decompressobj(31)

    def decompress(self, data: bytes, max_length: int) -> bytes:
        return self._inner.decompress(self._inner.unconsumed_tail + data, max_length)

    @property
    def eof(self) -> bool:
        return self._inner.eof

    @property
    def unused_data(self) -> bytes:
        return self._inner.unused_data


def _decoder(kind: str) -> _Decompressor:
    if kind == "gzip":
        return _Gunzip()
    if kind == "bzip2":
        return bz2.BZ2Decompressor()
    return lzma.LZMADecompressor(lzma.FORMAT_XZ, memlimit=_ZSTD_WINDOW)


def _zstd(source: _Prefixed) -> Iterator[bytes]:
    try:
        import zstandard
    except ImportError:
        raise HostError(
            "the layer is compressed with zstd, and the Python module zstandard is missing",
            "run `make install` again, or `pip install zstandard` in kata's environment",
        ) from None
    reader = zstandard.ZstdDecompressor(max_window_size=_ZSTD_WINDOW).stream_reader(
        cast("BinaryIO", source), read_across_frames=True
    )
    try:
        while piece := reader.read(STEP):
            yield piece
    except zstandard.ZstdError as error:
        raise ImageError(f"the zstd data are damaged: {error}", _DAMAGED) from error


class Stream:
    """The uncompressed bytes of a layer, produced by a separate thread while the caller processes them.

    Decompressing, hashing and writing release the interpreter's lock, so two cores are used.

    Args:
        source: The stored layer.
        limit: Maximum number of uncompressed bytes.
        tick: See `decompressed`; called in the other thread.
    """

    def __init__(self, source: BinaryIO, limit: int, tick: Callable[[int], None] | None = None) -> None:
        self._limit = limit
        self._queue: queue.Queue[bytes | BaseException | None] = queue.Queue(maxsize=8)
        self._hash = hashlib.sha256()
        self._stop = False
        self._done = False
        self._buffer = b""
        self._at = 0
        self.offset = 0
        """Number of bytes consumed so far."""
        self._thread = threading.Thread(target=self._run, args=(source, tick), daemon=True, name="layer")
        self._thread.start()

    def _run(self, source: BinaryIO, tick: Callable[[int], None] | None) -> None:
        try:
            for piece in decompressed(source, tick):
                if self._stop:
                    return
                self._limit -= len(piece)
                if self._limit < 0:
                    raise ImageError("the archive is too long", "raise KATA_IMAGE_MAX_SIZE if you trust it")
                self._hash.update(piece)
                self._queue.put(piece)
            self._queue.put(None)
        except BaseException as error:
            self._queue.put(error)

    def _next(self) -> bytes:
        if self._done:
            return b""
        piece = self._queue.get()
        if piece is None:
            self._done = True
            return b""
        if isinstance(piece, BaseException):
            self._done = True
            raise piece
        return piece

    def read(self, size: int) -> bytes:
        """Read exactly this many bytes; fewer only at the end of the stream."""
        end = self._at + size
        if end <= len(self._buffer):
            data = self._buffer[self._at : end]
            self._at = end
        else:
            parts = [self._buffer[self._at :]]
            missing = size - len(parts[0])
            self._buffer = b""
            self._at = 0
            while missing and (piece := self._next()):
                if len(piece) > missing:
                    self._buffer = piece
                    self._at = missing
                    piece = piece[:missing]
                parts.append(piece)
                missing -= len(piece)
            data = b"".join(parts)
        self.offset += len(data)
        return data

    def pieces(self, size: int) -> Iterator[bytes]:
        """Yield the next *size* bytes in pieces as they arrive; fewer only at the end of the stream."""
        while size:
            if self._at >= len(self._buffer):
                self._buffer = self._next()
                self._at = 0
                if not self._buffer:
                    return
            piece = self._buffer[self._at : self._at + size]  # of a whole `bytes` object: no copy
            self._at += len(piece)
            size -= len(piece)
            self.offset += len(piece)
            yield piece

    def skip(self, size: int) -> int:
        """Skip bytes. Returns their number."""
        end = self._at + size
        if end <= len(self._buffer):
            self._at = end
            self.offset += size
            return size
        return sum(len(piece) for piece in self.pieces(size))

    def digest(self) -> str:
        """``sha256:...`` of the whole stream; valid once it has been read to its end."""
        return "sha256:" + self._hash.hexdigest()

    def close(self) -> None:
        """End the thread."""
        self._stop = True
        while self._thread.is_alive():
            try:
                self._queue.get(timeout=0.05)
            except queue.Empty:
                pass
        self._thread.join()
