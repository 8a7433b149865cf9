"""The copy of a saved machine's memory, which a process of its own makes."""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest

from kata.errors import HypervisorError, SavedMachineError
from kata.hypervisor.qemu import saving
from kata.sysio import Fd

SIZE = 8 << 20
GO_ON = b"go on\n"


@pytest.fixture
def memory(tmp_path: Path) -> Iterator[Fd]:
    """A file with holes before, between and behind what is in it."""
    path = tmp_path / "memory"
    with open(path, "wb") as file:
        file.truncate(SIZE)
        for place in (1 << 20, 3 << 20):
            file.seek(place)
            file.write(os.urandom(40_000))
    with Fd(os.open(path, os.O_RDONLY)) as opened:
        yield opened


def test_all_of_it_is_there_before_the_hypervisor_is_told(memory: Fd) -> None:
    ours, theirs = socket.socketpair()
    with saving.file_like(memory) as target, ours, theirs:
        filling = saving.Filling(target, memory, ours.fileno(), GO_ON)
        theirs.settimeout(30)
        assert theirs.recv(100) == GO_ON
        assert os.pread(target.raw, SIZE, 0) == os.pread(memory.raw, SIZE, 0)
        assert os.fstat(target.raw).st_blocks * 512 < 1 << 20, "holes are holes"
        filling.wait()
        filling.wait()
        filling.abandon()


def test_the_reason_of_a_copy_that_fails_is_told(memory: Fd) -> None:
    ours, theirs = socket.socketpair()
    with ours, theirs, Fd(os.open(os.devnull, os.O_RDONLY)) as target:
        filling = saving.Filling(target, memory, ours.fileno(), GO_ON)
        with pytest.raises(HypervisorError, match=r"cannot copy the memory of a saved machine: "):
            filling.wait()
        theirs.setblocking(False)
        with pytest.raises(BlockingIOError):
            theirs.recv(100)


def test_a_template_that_was_cut_off_is_of_no_use(memory: Fd, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sendfile", lambda *arguments: 0)
    ours, theirs = socket.socketpair()
    with ours, theirs, saving.file_like(memory) as target:
        filling = saving.Filling(target, memory, ours.fileno(), GO_ON)
        with pytest.raises(SavedMachineError, match="cut off"):
            filling.wait()


def test_one_that_is_abandoned_leaves_no_process(memory: Fd) -> None:
    ours, theirs = socket.socketpair()
    with ours, theirs, saving.file_like(memory) as target:
        filling = saving.Filling(target, memory, ours.fileno(), GO_ON)
        pid = filling._pid
        filling.abandon()
        filling.abandon()
        filling.wait()
        with pytest.raises(ProcessLookupError):
            os.kill(pid, 0)
