"""The start ledger."""

from __future__ import annotations

from kata.engine.lifecycle.booted_machine import BootedMachine
from kata.engine.timings import Timings


def test_timings_are_relative_and_sorted() -> None:
    timings = Timings(100)
    timings.add("b", 200, 250)
    timings.add("a", 150, 180)
    timings.add("a", 1, 2)
    assert list(timings) == [("a", 50, 30), ("b", 100, 50)]


def test_parts_stand_below_their_step_and_are_no_steps() -> None:
    machine = BootedMachine()
    machine.ready_ns = 160
    machine.steps = [
        ("plan_network", 110, 120),
        ("take_boot_slot", 160, 170),
        ("start_monitor", 170, 190),
    ]
    machine.came_by("cold", "the sandbox has a share")
    timings = Timings(100)
    timings.took(machine)
    timings.add_part("engine", "client", 100, 105)
    timings.add("engine", 100, 160)
    timings.add("start machine", 170, 190)
    assert timings.whole() == [
        ("engine", 0, 60, ""),
        ("client", 0, 5, "engine"),
        ("plan network", 10, 10, "engine"),
        ("start machine", 70, 20, ""),
        ("start monitor", 70, 20, "start machine"),
    ]
    assert [name for name, _, _ in timings] == ["engine", "start machine"]
    record = timings.record()
    assert (record["path"], record["reason"]) == ("cold", "the sandbox has a share")
    assert record["steps"][1] == {
        "name": "client",
        "start_seconds": 0.0,
        "duration_seconds": 5e-9,
        "part_of": "engine",
    }
    assert "part_of" not in record["steps"][0]
