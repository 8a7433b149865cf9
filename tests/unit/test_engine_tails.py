"""The ends of logs and consoles."""

from __future__ import annotations

from pathlib import Path

from kata.engine.services import tails
from kata.engine.standard_streams.logfile import LogFile


def test_the_end_of_a_log_over_its_files(tmp_path: Path) -> None:
    path = str(tmp_path / "log")
    log = LogFile(path, max_bytes=300, files=3)
    for number in range(10):
        log.write("stdout", f"line {number}\n".encode())
    log.write("stderr", b"\xff\x00binary")
    log.close()
    text = tails.of_log(path, 40)
    assert text.endswith("line 9\n\ufffd\\x00binary".encode())
    assert len(text) <= 48
    assert tails.of_log(path, 0) == b""
    assert tails.of_log(str(tmp_path / "none"), 40) == b""
    assert tails.of_log(path, 1 << 20).startswith(b"line ")
    # Records that are much larger than what they hold.
    wide = LogFile(str(tmp_path / "wide"))
    for number in range(3):
        wide.write("stdout", b"\x1b" * 65000 + b"%d" % number)
    wide.close()
    assert tails.of_log(str(tmp_path / "wide"), 5) == b"\\x1b" * 4 + b"2"
    assert tails.of_log(str(tmp_path / "wide"), 1 << 20).count(b"\\x1b") == 195000
