"""How long a guest is waited for that takes memory or gives it back: it is the guest that says how far it is."""

from __future__ import annotations

import asyncio
import itertools
import time
from collections.abc import Iterable
from typing import Any

import pytest

from kata.errors import HypervisorError
from kata.hypervisor import settle


def settled(sizes: Iterable[int], wanted: int = 100, *, comes: bool = True) -> int:
    answers = iter(sizes)

    async def look() -> int:
        return next(answers)

    return asyncio.run(asyncio.wait_for(settle.settle(look, wanted, 0.3, comes=comes), 20))


def test_a_guest_that_gets_there() -> None:
    assert settled([0, 10, 10, 100]) == 100
    assert settled([300, 200, 200, 100], comes=False) == 100


def test_a_guest_that_stands_still() -> None:
    assert settled(itertools.chain([0, 10], itertools.repeat(20))) == 20


def test_a_guest_that_goes_to_and_fro_is_not_on_its_way() -> None:
    began = time.monotonic()
    assert settled(itertools.cycle([10, 20])) in (10, 20)
    assert time.monotonic() - began < 5


def test_a_guest_that_takes_a_byte_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(settle, "MOST_S", 0.5)
    assert 0 < settled(itertools.count(), 1 << 40) < 1000


def test_a_monitor_that_is_slow_to_answer() -> None:
    """Patience is for time, not for questions."""

    async def run() -> int:
        async def look() -> int:
            await asyncio.sleep(0.2)
            return 5

        return await asyncio.wait_for(settle.settle(look, 100, 0.5, comes=True), 3)

    assert asyncio.run(run()) == 5


def test_answers_of_a_monitor_that_was_taken_over() -> None:
    assert settle.number({"config": {"memory": {"size": 5}}}, "config", "memory", "size") == 5
    assert settle.number(7) == 7
    wrong: list[Any] = [None, [], "x", {}, {"size": None}, {"size": "5"}, {"size": 1.5}, {"size": {}}]
    for answer in wrong:
        with pytest.raises(HypervisorError, match="does not say how much memory"):
            settle.number(answer, "size")
