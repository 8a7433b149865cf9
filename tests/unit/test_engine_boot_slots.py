"""Booting in slots: how many at a time, in which order, and that nobody is held up for ever."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from kata.engine.lifecycle.boot_slots import BootSlot

SOURCE = str(Path(__file__).resolve().parents[2] / "src")

WAITER = """
import sys
sys.path.insert(0, sys.argv[1])
from kata.engine.lifecycle.boot_slots import BootSlot
slot = BootSlot(print, 1)
print("mine", flush=True)
sys.stdin.read(1)
"""


@pytest.fixture(autouse=True)
def own_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KATA_RUN_DIR", str(tmp_path))


@pytest.fixture
def waiter() -> Callable[[], subprocess.Popen[str]]:
    """Starts processes that want the only slot, say so when they have it, and keep it till they are told."""

    def start() -> subprocess.Popen[str]:
        return subprocess.Popen(
            [sys.executable, "-c", WAITER, SOURCE], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )

    return start


def in_line(process: subprocess.Popen[str]) -> None:
    """Return when the process sleeps in a lock of the kernel's."""
    until = time.monotonic() + 10
    while time.monotonic() < until:
        with open("/proc/locks", encoding="ascii") as lines:
            if any(line.split()[1] == "->" and str(process.pid) in line.split() for line in lines):
                return
        time.sleep(0.01)
    raise AssertionError("it does not wait")


def test_so_many_have_a_slot_at_a_time() -> None:
    said: list[str] = []
    slots = [BootSlot(said.append, 2, patience_s=0.05) for _ in range(3)]
    assert [slot.is_held for slot in slots] == [True, True, False]
    assert said == ["no boot slot came free in 0.05 s: booting without one"]
    slots[0].end()
    slots[0].end()
    assert BootSlot(said.append, 2, patience_s=0.05).is_held


def test_the_next_is_let_in_when_one_is_killed(waiter: Callable[[], subprocess.Popen[str]]) -> None:
    with waiter() as first:
        assert first.stdout is not None
        assert first.stdout.readline() == "mine\n"
        with waiter() as second:
            assert second.stdout is not None
            time.sleep(0.2)
            first.kill()
            assert second.stdout.readline() == "mine\n"
            second.kill()


def test_the_line_is_served_in_its_order(waiter: Callable[[], subprocess.Popen[str]]) -> None:
    slot = BootSlot(print, 1)
    head = waiter()  # is first in line, and looks for a free slot
    line = []
    time.sleep(0.3)
    for _ in range(3):
        line.append(waiter())
        in_line(line[-1])
    slot.end()
    for process in (head, *line):
        assert process.stdout is not None
        assert process.stdout.readline() == "mine\n"
        process.kill()
        process.wait()
        process.stdout.close()
        assert process.stdin is not None
        process.stdin.close()


def test_who_waits_behind_others_loses_patience_too(waiter: Callable[[], subprocess.Popen[str]]) -> None:
    held = BootSlot(print, 1)
    before = signal.getsignal(signal.SIGALRM)
    with waiter() as head:
        time.sleep(0.3)
        said: list[str] = []
        began = time.monotonic()
        assert not BootSlot(said.append, 1, patience_s=0.3).is_held
        assert 0.2 < time.monotonic() - began < 5
        assert said[0].startswith("no boot slot")
        head.kill()
    assert signal.getsignal(signal.SIGALRM) is before
    assert signal.getitimer(signal.ITIMER_REAL) == (0.0, 0.0)
    held.end()


def test_a_machine_boots_where_slots_cannot_be_had(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("KATA_RUN_DIR", str(tmp_path / "file"))
    said: list[str] = []
    assert not BootSlot(said.append).is_held
    assert said == [f"machines cannot take boot slots: Not a directory: {tmp_path}/file/boots"]


def test_a_slot_is_not_inherited_by_programs(tmp_path: Path) -> None:
    slot = BootSlot(print, 1)
    held = [fd for fd in os.listdir("/proc/self/fd") if _target(fd).startswith(str(tmp_path))]
    assert [os.get_inheritable(int(fd)) for fd in held] == [False]
    slot.end()


def _target(fd: str) -> str:
    try:
        return os.readlink(f"/proc/self/fd/{fd}")
    except FileNotFoundError:
        return ""
