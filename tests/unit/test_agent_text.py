"""Text from the guest, before it is shown."""

from __future__ import annotations

import os

from kata.agent.text import escape_line, last_lines


def test_guest_text_cannot_reach_the_terminal() -> None:
    assert escape_line("a\x1b[2Jb\nc\u202e") == "a\\x1b[2Jb\\x0ac\\u202e"
    assert len(escape_line("x" * 10_000_000).encode()) <= 4096
    assert escape_line("ü" * 5000, 100).endswith("...")
    lines = last_lines(b"\xff\x1b]0;evil\x07\r\n" + b"line\n" * 1000)
    assert len(lines) == 20
    assert all(line.isprintable() for line in last_lines(os.urandom(100_000)))
