"""The end of a sandbox: each step is carried out, in order, whatever becomes of those before it."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from kata.engine.lifecycle.sandbox_state import Lifecycle, SandboxState
from kata.engine.lifecycle.teardown import Teardown
from kata.errors import HypervisorError, VMLostError
from kata.journal import FILE_NAME, Journal


class Ending:
    """As much of a sandbox as its end needs. What is done to it is noted in `steps`.

    Args:
        directory: For its journals.
        fails: Names of steps that raise.
    """

    def __init__(self, directory: Path, *fails: str) -> None:
        self.steps: list[str] = []
        self.messages: list[str] = []
        self.fails = fails
        self.id = "s1"
        self.is_discarded = False
        self.removed_directory = ""
        self.held: list[Any] = []
        self.removal_told_with: list[list[str]] = []
        self.trace: Any = None
        self.life = Lifecycle("s1")
        self.life.enter(SandboxState.BOOTING)
        self.life.enter(SandboxState.READY)
        self.journal = Journal.create_dir(str(directory), "run", {"client": "kata", "id": "s1"})
        self.containers: dict[str, Any] = {}
        self.tasks = SimpleNamespace(log=self.messages.append, run_blocking=self._run_blocking)
        child = SimpleNamespace(unwatch=lambda: None)
        self.runtime = SimpleNamespace(
            is_lost=False,
            race_vm_exit=self.life.race_vm_exit,
            abandon_boot=self.note("abandon boot"),
            terminate=self._terminate,
            vm=SimpleNamespace(stop=self.note_async("stop machine"), close=self.note("close machine")),
            machine=SimpleNamespace(
                waiting=None,
                cgroup=SimpleNamespace(leave=self.note("leave cgroup")),
                files=SimpleNamespace(
                    child=child, hang_up=self.note("hang up on files"), stop=self.note("stop files")
                ),
                network=SimpleNamespace(child=child, stop=self.note("stop network")),
            ),
        )
        self.network_services = SimpleNamespace(close=self.note("close services"))
        self.guest_network = SimpleNamespace(close=self.note("close guest network"))
        self.loggers = [SimpleNamespace(leave=self.note_async("leave logger"))]

    def note(self, name: str) -> Callable[[], None]:
        def work() -> None:
            self.steps.append(name)
            if name in self.fails:
                raise HypervisorError(f"no {name}")

        return work

    def note_async(self, name: str) -> Callable[[], Any]:
        async def work() -> None:
            self.note(name)()

        return work

    def tell_of_removal(self) -> None:
        directory = os.path.dirname(os.path.dirname(self.journal.path))
        if self.removed_directory:
            self.removal_told_with.append(os.listdir(directory))

    async def _run_blocking(self, work: Any, *arguments: Any) -> Any:
        return work(*arguments)

    def _terminate(self, error: VMLostError) -> None:
        self.steps.append("terminate")
        self.life.enter(SandboxState.FAILED, error)
        self.runtime.is_lost = True

    def add(self, container_id: str, remove: Callable[[], Any]) -> Any:
        init = SimpleNamespace(
            watcher=None, streams=SimpleNamespace(close=self.note(f"close {container_id}'s streams"))
        )
        self.containers[container_id] = SimpleNamespace(init=init, execs={}, remove=remove)
        return init


ORDER = [
    "remove c1",
    "abandon boot",
    "close services",
    "close guest network",
    "terminate",
    "leave cgroup",
    "hang up on files",
    "stop machine",
    "close machine",
    "stop files",
    "stop network",
    "close c1's streams",
    "leave logger",
]


def end(sandbox: Callable[[], Ending], grace_s: float = 5.0) -> Ending:
    async def run() -> Ending:
        made = sandbox()
        await Teardown(made, grace_s).run()  # type: ignore[arg-type]
        return made

    return asyncio.run(run())


@pytest.mark.parametrize(
    "fails", [(), *((step,) for step in ORDER if step not in ("terminate", "remove c1"))]
)
def test_a_step_that_fails_keeps_no_other_from_being_done(tmp_path: Path, fails: tuple[str, ...]) -> None:
    def sandbox() -> Ending:
        made = Ending(tmp_path, *fails)
        made.add("c1", made.note_async("remove c1"))
        return made

    done = end(sandbox)
    after = set(ORDER[ORDER.index(fails[0]) + 1 :]) if fails else set()
    assert after <= {*done.steps, "close machine", "close guest network", "close services"}
    assert not (tmp_path / "run").exists(), "the journal has been undone"
    if fails:
        assert len([line for line in done.messages if f"no {fails[0]}" in line]) == 1
    else:
        # The cgroup is left while the machine ends.
        assert sorted(done.steps) == sorted(ORDER)
        assert [one for one in done.steps if one != "leave cgroup"] == [
            one for one in ORDER if one != "leave cgroup"
        ]
        assert done.messages == []


def test_a_guest_that_does_not_write_back_is_not_waited_for(tmp_path: Path) -> None:
    async def never() -> None:
        await asyncio.sleep(60)

    def sandbox() -> Ending:
        made = Ending(tmp_path)
        made.add("c1", never)
        return made

    done = end(sandbox, 0.05)
    assert done.messages == ["the guest did not write back its containers' files within 0.05 s"]
    assert "stop machine" in done.steps


def test_a_machine_that_goes_meanwhile_ends_the_wait(tmp_path: Path) -> None:
    def sandbox() -> Ending:
        made = Ending(tmp_path)

        async def remove() -> None:
            made._terminate(VMLostError("crashed"))
            await asyncio.sleep(60)

        made.add("c1", remove)
        made.runtime.terminate = lambda _error: None
        return made

    assert end(sandbox).messages == []


@pytest.mark.parametrize("why", ["removed with it", "lost"])
def test_nobody_is_asked_to_write_back_what_nobody_will_read(tmp_path: Path, why: str) -> None:
    def sandbox() -> Ending:
        made = Ending(tmp_path)
        made.add("c1", made.note_async("remove c1"))
        made.is_discarded = why == "removed with it"
        made.runtime.is_lost = why == "lost"
        return made

    assert "remove c1" not in end(sandbox).steps


def test_the_end_waits_until_each_end_is_on_record(tmp_path: Path) -> None:
    def sandbox() -> Ending:
        made = Ending(tmp_path)

        async def watch() -> None:
            await asyncio.sleep(0.05)
            made.steps.append("recorded")

        init = made.add("c1", made.note_async("remove c1"))
        init.watcher = asyncio.ensure_future(watch())
        return made

    steps = end(sandbox).steps
    assert steps.index("stop machine") < steps.index("recorded") < steps.index("leave logger")
    assert "close c1's streams" not in steps, "whoever watches it closes them"


def test_what_goes_with_the_sandbox_is_undone_before_it(tmp_path: Path) -> None:
    lasting = Journal.create_dir(str(tmp_path), "container", {"client": "kata", "id": "c1"})
    lasting.close()

    def sandbox() -> Ending:
        made = Ending(tmp_path)
        made.removed_directory = str(tmp_path / "container")
        return made

    ended = end(sandbox)
    assert ended.messages == []
    # Told at once: the sandbox's own directory is still there, as it is if the engine is killed then.
    assert ended.removal_told_with == [["run"]]
    assert os.listdir(tmp_path) == []

    def without() -> Ending:
        made = Ending(tmp_path)
        made.removed_directory = str(tmp_path / "gone")
        return made

    (told,) = end(without).messages
    assert str(tmp_path / "gone") in told
    assert FILE_NAME in told or "cannot remove" in told
    assert os.listdir(tmp_path) == []
