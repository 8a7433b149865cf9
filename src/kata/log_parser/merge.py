"""Reads logs line by line and merges them by time, with bounded memory.

Of each file a window of lines is held, `WINDOW` of them and at most `WINDOW_BYTES`; within it lines are sorted, and the
earliest of all windows comes next. So logs of any size are merged as long as each is sorted but for shifts within a
window, as logs of several threads are. What is later than that comes where it is found, and is counted as out of order.
"""

from __future__ import annotations

import codecs
import heapq
import os
import re
import sys

from kata.log_parser import formats
from kata.log_parser.record import Record

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from typing import BinaryIO

    Complain = Callable[[str, int, str], None]
    """Takes file, line number, and what is wrong with it."""

WINDOW = 1024
WINDOW_BYTES = 1 << 20
_OWN_LOG = re.compile(r"/sandboxes/([\w.-]{1,160})/[^/]+$")


class Source:
    """One file, or standard input.

    Args:
        name: Its path; ``-`` is standard input.
        complain: Is told of lines that are malformed, or so late that they are not merged by their time.
        monotonic: It is also told of lines that are earlier than the one before.

    Attributes:
        records: How many lines were read as records.
        lines: How many lines there were.
    """

    def __init__(self, name: str, complain: Complain, *, monotonic: bool = False) -> None:
        self.name = name
        self._complain = complain
        self._monotonic = monotonic
        self.records = 0
        self.lines = 0
        found = _OWN_LOG.search(os.path.abspath(name)) if name != "-" else None
        self._sandbox = found[1] if found else ""

    def read(self) -> Iterator[Record]:
        """Yield its records as they stand.

        Raises:
            OSError: It cannot be read; it has the file's name.
        """
        try:
            if self.name == "-":
                yield from self._read(sys.stdin.buffer)
            else:
                with open(self.name, "rb", buffering=1 << 18) as file:
                    yield from self._read(file)
        except OSError as error:
            if error.filename is None:
                error.filename = "standard input" if self.name == "-" else self.name
            raise

    def _read(self, file: BinaryIO) -> Iterator[Record]:
        previous: Record | None = None
        while raw := file.readline(formats.MOST_LINE + 1):
            self.lines += 1
            if self.lines == 1:
                raw = raw.removeprefix(codecs.BOM_UTF8)
            if len(raw) > formats.MOST_LINE and not raw.endswith(b"\n"):
                while (more := file.readline(formats.MOST_LINE)) and not more.endswith(b"\n"):
                    pass
                self._complain(self.name, self.lines, f"it is longer than {formats.MOST_LINE >> 10} KiB")
                continue
            line = raw.decode("utf-8", "backslashreplace")
            if not line.strip("\r\n\0 "):
                continue
            try:
                record = formats.parse(line)
            except formats.Malformed as problem:
                if not _continues(line, previous):
                    self._complain(self.name, self.lines, str(problem))
                    continue
                assert previous is not None
                record = Record(line.rstrip("\r\n"), "text", previous.time_ns)
                record.level, record.source = previous.level, previous.source
                record.sandbox = previous.sandbox
            record.file, record.line, record.size = self.name, self.lines, len(raw)
            record.sandbox = record.sandbox or self._sandbox
            self.records += 1
            previous = record
            yield record

    def sorted(self) -> Iterator[tuple[int, int, Record]]:
        """Yield its records by time, as far as its window reaches: time, number, record.

        A record without a time is where it stands: at the time of the one before it.
        """
        waiting: list[tuple[int, int, Record]] = []
        size = latest = given = 0
        for number, record in enumerate(self.read()):
            before, latest = latest, record.time_ns if record.time_ns is not None else latest
            if self._monotonic and latest < before:
                self._complain(
                    record.file,
                    record.line,
                    f"it is {(before - latest) / 1e9:.6f} s earlier than the one before",
                )
            elif latest < given:
                self._complain(
                    record.file, record.line, "it is out of order, by more than what is held back"
                )
            heapq.heappush(waiting, (latest, number, record))
            size += record.size
            while len(waiting) > WINDOW or size > WINDOW_BYTES:
                first = heapq.heappop(waiting)
                size -= first[2].size
                given = max(given, first[0])
                yield first
        while waiting:
            yield heapq.heappop(waiting)


def _continues(line: str, previous: Record | None) -> bool:
    """Whether a line goes on with what an engine has begun to say: a traceback."""
    if previous is None or previous.format != "text":
        return False
    inside = previous.message.startswith(("Traceback", "  ", "During handling", "The above exception"))
    return line[0] in " \t" or line.startswith("Traceback (") or inside


def merge(sources: list[Source]) -> Iterator[Record]:
    """All records of all sources, by time; those of one time in the order of the sources."""

    def numbered(index: int, source: Source) -> Iterator[tuple[int, int, int, Record]]:
        return ((at, index, number, record) for at, number, record in source.sorted())

    for _, _, _, record in heapq.merge(*(numbered(*pair) for pair in enumerate(sources))):
        yield record
