"""kata.hypervisor.figures: what is counted as the guest's memory, and processes that have ended."""

from __future__ import annotations

import mmap
import os
import subprocess

import pytest

from kata.hypervisor import figures

MIB = 1 << 20


def test_memory_that_is_left_out_of_core_dumps_is_the_guests() -> None:
    pid = os.getpid()
    before = figures.guest_resident_bytes(pid)
    with (
        mmap.mmap(-1, 40 * MIB, mmap.MAP_PRIVATE) as ordinary,
        mmap.mmap(-1, 40 * MIB, mmap.MAP_PRIVATE) as guest,
    ):
        guest.madvise(mmap.MADV_NOHUGEPAGE)
        ordinary[: 20 * MIB] = bytes(20 * MIB)
        guest[: 15 * MIB] = bytes(15 * MIB)
        assert figures.guest_resident_bytes(pid) == before
        guest.madvise(mmap.MADV_DONTDUMP)
        assert figures.guest_resident_bytes(pid) == before + 15 * MIB
        guest.madvise(mmap.MADV_DONTNEED)
        assert figures.guest_resident_bytes(pid) == before


def test_a_process_that_has_ended_has_no_figures() -> None:
    child = subprocess.Popen(["true"])
    os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)
    assert "guest_resident_bytes" not in figures.Figures(child.pid).look()
    child.wait()
    assert figures.Figures(child.pid).look() == {}
    with pytest.raises(OSError, match="No such"):
        figures.guest_resident_bytes(child.pid)


def test_the_size_of_the_guests_memory_is_kept_for_a_while(monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = iter((3 * MIB, 5 * MIB))
    monkeypatch.setattr(figures, "guest_resident_bytes", lambda pid: next(sizes))
    own = figures.Figures(os.getpid())
    assert [own.look()["guest_resident_bytes"] for _ in range(3)] == [3 * MIB] * 3
    own._at_s -= figures.KEPT_S
    assert own.look()["guest_resident_bytes"] == 5 * MIB
