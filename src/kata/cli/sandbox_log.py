"""`kata logs --guest` and `--engine`: the console of a sandbox's guest, and its engine's log, as they are on disk.

Both files become ``NAME.1`` when they are long, and a new one is begun; both go with the sandbox.
"""

from __future__ import annotations

import json
import os
import sys
import time

from kata.cli import sandboxes, table
from kata.engine.launch import LOG_NAME
from kata.engine.lifecycle.boot import CONSOLE_NAME

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterator

POLL_S = 0.1
MAX_LINE = 1 << 14
"""Bytes; the guest need not end its lines."""


class _Lines:
    """Reads the lines of a file, and of the one that takes its place."""

    def __init__(self, path: str) -> None:
        self._path = path
        self._fd = -1
        self._rest = b""
        self._older = [f"{path}.1"]

    def new(self) -> Iterator[bytes]:
        """The lines that were completed since the last call."""
        for path in self._older:
            self._open(path)
            yield from self._read()
            self.close()
        self._older = []
        while True:
            if self._fd < 0:
                self._open(self._path)
            yield from self._read()
            if self._fd < 0 or not self._replaced():
                return
            yield from self._read()  # what was written between the two
            self.close()

    def rest(self) -> bytes:
        """What there is of a line that has not ended."""
        return self._rest

    def _open(self, path: str) -> None:
        try:
            self._fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
        except FileNotFoundError:
            self._fd = -1

    def _read(self) -> Iterator[bytes]:
        while self._fd >= 0 and (data := os.read(self._fd, 1 << 16)):
            *lines, self._rest = (self._rest + data).split(b"\n")
            yield from lines
            if len(self._rest) > MAX_LINE:
                yield self._rest
                self._rest = b""

    def _replaced(self) -> bool:
        try:
            there = os.stat(self._path)
        except FileNotFoundError:
            return False
        here = os.fstat(self._fd)
        return (there.st_dev, there.st_ino) != (here.st_dev, here.st_ino)

    def close(self) -> None:
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1


def show(reference: str, *, guest: bool, tail: int | None, follow: bool, as_json: bool) -> int:
    """Print the console or the log.

    Args:
        reference: The sandbox, or a container of it, of any client: see `kata.cli.sandboxes.find`.
        guest: The guest's console; otherwise the engine's log.
        tail: How many of the last lines; None is all.
        follow: Whether to go on until the sandbox ends.
        as_json: Whether to print an object for each line.

    Returns:
        The exit status.

    Raises:
        KataError: There is no such sandbox.
    """
    directory = sandboxes.find(reference)
    source = "console" if guest else "engine"
    lines = _Lines(os.path.join(directory, CONSOLE_NAME if guest else LOG_NAME))
    try:
        found = list(lines.new())
        if not follow and lines.rest():
            found.append(lines.rest())
        for line in found if tail is None else found[max(0, len(found) - tail) :]:
            _print(line, source, as_json=as_json)
        sys.stdout.flush()
        while follow:
            there = os.path.isdir(directory)  # looked at first: what came before its end is shown
            for line in lines.new():
                _print(line, source, as_json=as_json)
            if not there:
                if lines.rest():
                    _print(lines.rest(), source, as_json=as_json)
                break
            sys.stdout.flush()
            time.sleep(POLL_S)
    finally:
        lines.close()
    return 0


def _print(line: bytes, source: str, *, as_json: bool) -> None:
    text = line.decode("utf-8", "replace").removesuffix("\r")
    if as_json:
        sys.stdout.write(json.dumps({"source": source, "line": text}) + "\n")
    else:
        sys.stdout.write(table.printable(text.replace("\t", "    ")) + "\n")
