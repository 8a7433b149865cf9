"""The numbers on the host that tell the containers of a pod apart."""

from __future__ import annotations

import os
from pathlib import Path

from waiting import until

from kata.engine.containers.taskpid import TaskPid, of_path


def test_each_has_a_number_of_its_own_as_long_as_it_is_there() -> None:
    many = [TaskPid() for _ in range(40)]
    numbers = {one.pid for one in many}
    assert len(numbers) == 40
    assert os.getpid() not in numbers
    for number in numbers:
        assert os.readlink(f"/proc/{number}/ns/net") == os.readlink("/proc/self/ns/net")
        assert f"Tgid:\t{os.getpid()}\n" in Path(f"/proc/{number}/status").read_text()
        os.kill(number, 0)
    for one in many:
        one.end()
        one.end()
    until(
        lambda: not any(os.path.exists(f"/proc/{number}") for number in numbers),
        "their end",
        patience_s=10,
        poll_s=0.01,
    )


def test_the_number_in_a_path() -> None:
    assert of_path("/proc/123/ns/pid") == 123
    others = ["", "/proc/1/ns/net", "/proc/self/ns/pid", "/run/pidns/1", "/proc/-1/ns/pid"]
    for other in (*others, "/proc/9999999999/ns/pid"):
        assert of_path(other) == 0
