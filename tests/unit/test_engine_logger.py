"""Logging programs: their arguments, their descriptors, and programs that do not keep to the contract."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Awaitable, Callable
from pathlib import Path

import pytest

from kata import journal_undo
from kata.engine.standard_streams import logger
from kata.errors import HostError, UsageError
from kata.journal import Journal

TAKES = 'exec 5>&-; cat <&3 >"$1"; cat <&4 >>"$1"; echo "$CONTAINER_ID $CONTAINER_NAMESPACE" >>"$1"'


def program(tmp_path: Path, script: str) -> str:
    path = tmp_path / "program"
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(0o755)
    return str(path)


def play(tmp_path: Path, uri: str, scenario: Callable[[logger.Logger], Awaitable[None]]) -> None:
    """Start a logging program, and see that nothing of it stays: neither descriptors nor a line to undo."""
    journal = Journal.create_dir(str(tmp_path / "journal"), "s", {})
    before = len(os.listdir("/proc/self/fd"))

    async def work() -> None:
        await scenario(logger.Logger(uri, "c", "n", journal))

    try:
        asyncio.run(work())
    finally:
        left = len(os.listdir("/proc/self/fd"))
        living = [entry for entry in journal.entries if not entry.gone]
        assert journal_undo.undo(journal) == []
    assert left == before
    assert living == []


@pytest.mark.parametrize(
    ("uri", "argv"),
    [
        ("binary:///bin/log", ["/bin/log"]),
        ("binary:///a%20b?key=value&flag&x=1%262+3", ["/a b", "key", "value", "flag", "", "x", "1&2 3"]),
    ],
)
def test_a_query_is_arguments(uri: str, argv: list[str]) -> None:
    assert logger.command(uri) == argv


@pytest.mark.parametrize("uri", ["binary://host/bin/log", "binary:relative", "binary://"])
def test_what_names_no_program_is_refused(uri: str) -> None:
    with pytest.raises(UsageError, match="names no logging program"):
        logger.command(uri)


def test_a_program_reads_both_streams_to_their_end(tmp_path: Path) -> None:
    async def scenario(one: logger.Logger) -> None:
        await one.ready()
        await one.ready()  # it has said so
        for name in ("stdout", "stderr"):
            fd = one.take(name)
            os.write(fd, f"{name}\n".encode())
            os.close(fd)
        await one.leave()
        assert one.failure() == ""

    play(tmp_path, f"binary://{program(tmp_path, TAKES)}?{tmp_path}/out", scenario)
    assert (tmp_path / "out").read_text() == "stdout\nstderr\nc n\n"


def test_a_program_that_ends_before_it_is_ready_is_told_with_its_words(tmp_path: Path) -> None:
    async def scenario(one: logger.Logger) -> None:
        with pytest.raises(HostError, match="ended with status 3: no such disk"):
            await one.ready()
        one.close()

    play(tmp_path, f"binary://{program(tmp_path, 'echo no such disk >&2; exit 3')}", scenario)


def test_a_program_that_is_never_ready_is_killed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(logger, "READY_S", 0.2)

    async def scenario(one: logger.Logger) -> None:
        with pytest.raises(HostError, match="was not ready"):
            await one.ready()
        one.close()
        await asyncio.wait_for(one.ended.wait(), 20)

    play(tmp_path, f"binary://{program(tmp_path, 'trap : TERM; exec sleep 600')}", scenario)


def test_a_program_that_does_not_see_the_end_of_its_input_is_killed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(logger, "LEAVES_S", 0.2)

    async def scenario(one: logger.Logger) -> None:
        await one.ready()
        one.close()
        await asyncio.wait_for(one.leave(), 20)

    play(tmp_path, f"binary://{program(tmp_path, 'exec 5>&-; exec sleep 600')}", scenario)


def test_a_program_without_a_container_is_asked_to_end(tmp_path: Path) -> None:
    async def scenario(one: logger.Logger) -> None:
        await one.ready()
        one.dismiss()
        await asyncio.wait_for(one.ended.wait(), 20)
        one.dismiss()

    play(tmp_path, f"binary://{program(tmp_path, 'exec 5>&-; exec sleep 600')}", scenario)


def test_a_program_that_is_none_leaves_nothing(tmp_path: Path) -> None:
    async def scenario(one: logger.Logger) -> None:
        raise AssertionError("it was started")

    with pytest.raises(HostError, match="cannot start the logging program /none/such"):
        play(tmp_path, "binary:///none/such", scenario)
