"""What `kata` passes on between its own streams and a container's."""

from __future__ import annotations

import os
import threading
from typing import Any

import pytest

from kata.cli import pump
from kata.errors import UsageError


def test_output_that_is_full_for_a_moment_is_not_gone() -> None:
    """Whoever shares our standard output may have made it non-blocking."""
    source, feed = os.pipe()
    reader, target = os.pipe()
    os.set_blocking(target, False)
    room = 0
    try:
        while True:
            room += os.write(target, bytes(4096))
    except BlockingIOError:
        pass
    one: Any = object.__new__(pump.Pump)
    one._outputs = {source: target}
    os.write(feed, b"behind")
    seen = bytearray()

    def read() -> None:
        while len(seen) < room + 6:
            seen.extend(os.read(reader, 65536))

    late = threading.Timer(0.2, read)
    late.start()
    assert one._copy_output(source, hung_up=False)
    late.join(30)
    assert seen.endswith(b"behind")
    for fd in (source, feed, reader, target):
        os.close(fd)


def test_whether_signals_are_passed_on() -> None:
    assert [pump.passes_signals(text) for text in (None, "true", "1", "false", "0")] == [True] * 3 + [
        False
    ] * 2
    with pytest.raises(UsageError, match="neither true nor false"):
        pump.passes_signals("")
