"""The log of a container: every byte, bounded, whatever the disk does."""

from __future__ import annotations

import base64
import json
import os
from pathlib import Path

from hypothesis import given
from hypothesis import strategies as st

from kata.engine.standard_streams.logfile import LogFile


def records(path: Path) -> list[dict[str, str]]:
    return [json.loads(line) for line in path.read_bytes().splitlines()]


def content(entries: list[dict[str, str]], stream: str) -> bytes:
    return b"".join(
        base64.b64decode(one["log64"]) if "log64" in one else one["log"].encode()
        for one in entries
        if one["stream"] == stream
    )


@given(st.lists(st.tuples(st.sampled_from(["stdout", "stderr"]), st.binary(max_size=200)), max_size=20))
def test_log_gives_back_every_byte(pieces: list[tuple[str, bytes]]) -> None:
    path = Path(f"/tmp/kt-log-{os.getpid()}")
    try:
        log = LogFile(str(path))
        for stream, data in pieces:
            log.write(stream, data)
        log.close()
        entries = records(path) if path.exists() else []
        for stream in ("stdout", "stderr"):
            assert content(entries, stream) == b"".join(data for name, data in pieces if name == stream)
    finally:
        path.unlink(missing_ok=True)


def test_log_keeps_text_as_text_though_characters_are_cut(tmp_path: Path) -> None:
    text = "grüße, 世界 🎉\n" * 5000
    raw = text.encode()
    log = LogFile(str(tmp_path / "log"))
    for start in range(0, len(raw), 777):
        log.write("stdout", raw[start : start + 777])
    log.close()
    entries = records(tmp_path / "log")
    assert all("log" in one for one in entries)
    assert content(entries, "stdout") == raw


def test_log_is_rotated_and_bounded(tmp_path: Path) -> None:
    log = LogFile(str(tmp_path / "log"), max_bytes=10_000, files=3)
    for number in range(2000):
        log.write("stdout", b"line %d\n" % number)
    log.close()
    files = sorted(tmp_path.iterdir())
    assert [file.name for file in files] == ["log", "log.1", "log.2"]
    assert all(file.stat().st_size <= 10_000 for file in files)
    kept = b"".join(content(records(file), "stdout") for file in reversed(files))
    expected = b"".join(b"line %d\n" % number for number in range(2000))
    assert expected.endswith(kept)


def test_log_on_a_full_disk_hurts_nobody_and_says_so() -> None:
    logged: list[str] = []
    log = LogFile("/dev/full", log=logged.append)
    log.write("stdout", b"lost")
    log.write("stdout", b"lost too")
    log.close()
    assert len(logged) == 1
    assert "No space left" in logged[0]
