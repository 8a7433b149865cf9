"""What follows from the end of a process, in which order, and whatever fails meanwhile."""

from __future__ import annotations

import asyncio
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from kata.engine.containers.process import KILLED, RUNNING, STOPPED, Process
from kata.engine.containers.process_end import EndOfProcesses
from kata.engine.standard_streams.stdio import Null, Stdio
from kata.errors import AgentTimeoutError, HostError, KataError


class Ends:
    """A container whose guest and whose disk do what a test says."""

    def __init__(self) -> None:
        self.steps: list[Any] = []
        self.messages: list[str] = []
        self.answers: dict[str, asyncio.Future[int]] = {}
        self.record_error: KataError | None = None
        self.lost_reason = ""
        self.killed = False
        self.init = self.process("")
        self.execs: dict[str, Process] = {}
        machine: Any = SimpleNamespace(
            is_lost=False, disk_error="", lost_reason="", await_exit_reason=self._await_exit_reason
        )
        self.machine = machine
        record: Any = SimpleNamespace(close_log=lambda: self.steps.append("log closed"), write=self._write)
        tasks: Any = SimpleNamespace(log=self.messages.append)
        killer: Any = SimpleNamespace(requested=False)
        self.killer = killer
        self.ends = EndOfProcesses(
            self.init,
            self.execs,
            machine,
            tasks,
            record,
            killer,
            lambda topic, event: self.steps.append((topic.rpartition("/")[2], getattr(event, "id", ""))),
            on_init_gone=lambda: self.steps.append("init gone"),
            before_end=self._before_end,
            on_reported=lambda process: self.steps.append(f"reported {process.exec_id or 'init'}"),
        )

    def process(self, exec_id: str) -> Process:
        made = Process("c1", exec_id, Stdio(False, Null(), Null(), Null()))
        made.start(100)
        streams: Any = SimpleNamespace(
            finish=self._finish, close=lambda: self.steps.append("streams closed")
        )
        made.streams = streams
        return made

    async def _before_end(self) -> None:
        self.steps.append("carried back")

    async def _finish(self) -> None:
        self.steps.append("output delivered")

    async def _write(self, **changes: Any) -> None:
        self.steps.append({key: changes[key] for key in ("status", "exit_code", "error", "oom_killed")})
        if self.record_error is not None:
            raise self.record_error

    async def _await_exit_reason(self, otherwise: str) -> KataError:
        self.machine.lost_reason = self.lost_reason or otherwise
        self.machine.is_lost = True
        return KataError(otherwise)

    async def wait(self, _container: str, process: str) -> int:
        return await self.answers.setdefault(process, asyncio.get_running_loop().create_future())

    def watch(self, process: Process) -> asyncio.Task[None]:
        agent: Any = self
        return asyncio.create_task(self.ends.watch(process, agent))

    def guest_says(self, process: str, status: int | KataError) -> None:
        answer = self.answers[process]
        if isinstance(status, int):
            answer.set_result(status)
        else:
            answer.set_exception(status)


def test_output_record_event_and_answer_come_in_this_order() -> None:
    async def run() -> None:
        made = Ends()
        watching = made.watch(made.init)
        await asyncio.sleep(0)
        made.guest_says("c1", 7)
        await watching
        assert made.steps == [
            "output delivered",
            "init gone",
            "carried back",
            "log closed",
            {"status": STOPPED, "exit_code": 7, "error": "", "oom_killed": False},
            ("exit", "c1"),
            "reported init",
        ]
        assert (made.init.state, made.init.exit_status) == (STOPPED, 7)
        assert made.init.ended.is_set()

    asyncio.run(run())


def test_the_ends_of_execs_are_told_before_that_of_the_init() -> None:
    async def run() -> None:
        made = Ends()
        made.execs["e1"] = made.process("e1")
        tasks = [made.watch(made.init), made.watch(made.execs["e1"])]
        await asyncio.sleep(0)
        made.guest_says("c1", 0)
        await asyncio.sleep(0.05)
        assert ("exit", "c1") not in made.steps
        made.guest_says("e1", 9)
        await asyncio.wait(tasks)
        exits = [step for step in made.steps if isinstance(step, tuple)]
        assert exits == [("exit", "e1"), ("exit", "c1")]

    asyncio.run(run())


@pytest.mark.parametrize("reason", ["crashed", ""])
def test_an_agent_that_does_not_say_makes_it_137_with_the_reason(reason: str) -> None:
    async def run() -> None:
        made = Ends()
        made.lost_reason = reason
        watching = made.watch(made.init)
        await asyncio.sleep(0)
        made.guest_says("c1", AgentTimeoutError("silence"))
        await watching
        assert made.init.exit_status == KILLED
        assert made.init.error == (reason or "the agent lost container 'c1': silence")
        assert made.messages == []

    asyncio.run(run())


def test_an_end_that_cannot_be_recorded_is_told_all_the_same() -> None:
    async def run() -> None:
        made = Ends()
        made.record_error = HostError("the disk is full")
        watching = made.watch(made.init)
        await asyncio.sleep(0)
        made.guest_says("c1", 3)
        await watching
        assert made.steps[-2:] == [("exit", "c1"), "reported init"]
        assert made.init.ended.is_set()
        assert len(made.messages) == 1
        assert "the disk is full" in made.messages[0]

    asyncio.run(run())


def test_streams_that_break_do_not_hold_the_end_back() -> None:
    async def run() -> None:
        made = Ends()

        async def finish() -> None:
            raise RuntimeError("a bug")

        made.init.streams.finish = finish  # type: ignore[union-attr,method-assign]
        watching = made.watch(made.init)
        await asyncio.sleep(0)
        made.guest_says("c1", 3)
        await watching
        assert ("exit", "c1") in made.steps
        assert (made.init.state, made.init.exit_status) == (STOPPED, 3)
        assert "was not recorded whole: RuntimeError('a bug')" in made.messages[0]

    asyncio.run(run())


@pytest.mark.parametrize("requested", [False, True])
def test_a_death_by_want_of_memory_is_waited_for_a_moment(requested: bool) -> None:
    async def run() -> None:
        made = Ends()
        made.killer.requested = requested
        watching = made.watch(made.init)
        await asyncio.sleep(0)
        made.guest_says("c1", KILLED)
        await asyncio.sleep(0.01)
        assert watching.done() == requested, "who was told to die needs no other explanation"
        made.ends.out_of_memory()
        await watching
        assert made.init.oom_killed is not requested

    asyncio.run(run())


def test_cri_o_is_told_of_it_by_a_file(tmp_path: Path) -> None:
    async def run() -> None:
        made = Ends()
        made.ends.out_of_memory(str(tmp_path))
        assert (tmp_path / "oom").read_bytes() == b""
        made.ends.out_of_memory(str(tmp_path / "none"))
        assert made.messages == [
            "container c1: CRI-O is not told of the OOM kill: No such file or directory"
        ]
        assert made.steps == [("oom", "")] * 2
        assert made.init.state == RUNNING

    asyncio.run(run())
