"""The record of a start."""

from __future__ import annotations

from kata.engine.timings import Timings


def test_timings_are_relative_and_sorted() -> None:
    timings = Timings(100)
    timings.add("b", 200, 250)
    timings.add("a", 150, 180)
    timings.add("a", 1, 2)
    assert list(timings) == [("a", 50, 30), ("b", 100, 50)]
