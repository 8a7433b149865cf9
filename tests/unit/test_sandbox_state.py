"""The states of a sandbox: which may follow which, and what derives from them."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

import pytest

from kata.engine.lifecycle.sandbox_state import Lifecycle, SandboxState
from kata.errors import StateError, VMLostError

NEW, BOOTING, READY, FAILED, STOPPED, CLOSING, ENDING, ENDED = SandboxState

PATHS: dict[SandboxState, tuple[SandboxState, ...]] = {
    NEW: (),
    BOOTING: (BOOTING,),
    READY: (BOOTING, READY),
    FAILED: (BOOTING, READY, FAILED),
    STOPPED: (BOOTING, READY, STOPPED),
    CLOSING: (BOOTING, READY, CLOSING),
    ENDING: (BOOTING, READY, CLOSING, ENDING),
    ENDED: (BOOTING, READY, CLOSING, ENDING, ENDED),
}
"""A way to each state."""

ALLOWED = {
    NEW: {BOOTING, FAILED, ENDING},
    BOOTING: {READY, FAILED, STOPPED, CLOSING},
    READY: {FAILED, STOPPED, CLOSING},
    FAILED: {ENDING},
    STOPPED: {ENDING},
    CLOSING: {ENDING},
    ENDING: {ENDED},
    ENDED: set(),
}


def with_life(work: Callable[[Lifecycle], None], *path: SandboxState) -> None:
    async def run() -> None:
        life = Lifecycle("s1")
        for state in path:
            life.enter(state)
        work(life)

    asyncio.run(run())


@pytest.mark.parametrize("start", list(SandboxState))
@pytest.mark.parametrize("end", list(SandboxState))
def test_every_transition_that_the_table_lacks_is_refused(start: SandboxState, end: SandboxState) -> None:
    def work(life: Lifecycle) -> None:
        assert life.may(end) is (end in ALLOWED[start])
        if end in ALLOWED[start]:
            life.enter(end)
            assert life.state is end
        else:
            with pytest.raises(StateError, match=f"'s1' cannot go from {start.value} to {end.value}"):
                life.enter(end)
            assert life.state is start

    with_life(work, *PATHS[start])


@pytest.mark.parametrize(
    ("path", "lost", "ending", "failed"),
    [
        (PATHS[NEW], False, False, False),
        (PATHS[BOOTING], False, False, False),
        (PATHS[READY], False, False, False),
        (PATHS[FAILED], True, False, True),
        (PATHS[STOPPED], True, False, False),
        (PATHS[CLOSING], False, True, False),
        (PATHS[ENDING], True, True, False),
        (PATHS[ENDED], True, True, False),
        # That a machine failed is remembered to the end.
        ((*PATHS[FAILED], ENDING, ENDED), True, True, True),
        ((ENDING, ENDED), True, True, False),
    ],
)
def test_what_is_asked_of_a_state(
    path: tuple[SandboxState, ...], lost: bool, ending: bool, failed: bool
) -> None:
    def work(life: Lifecycle) -> None:
        assert (life.is_lost, life.is_ending, life.failed) == (lost, ending, failed)
        assert life.exit_reason.done() is lost
        assert bool(life.exited_ns) is lost
        assert bool(life.created_ns) is (BOOTING in path)
        assert life.ended.is_set() is (life.state is ENDED)
        assert bool(life.lost_reason) is lost

    with_life(work, *path)


def test_the_first_reason_stands() -> None:
    def work(life: Lifecycle) -> None:
        life.enter(FAILED, VMLostError("crashed", "look there"))
        life.enter(ENDING, VMLostError("was ended"))
        assert life.lost_reason == "crashed"
        assert life.lost_error().hint == "look there"
        assert life.exit_state is FAILED

    with_life(work, BOOTING)


def test_the_end_of_the_machine_ends_what_waits_for_it() -> None:
    async def run() -> None:
        life = Lifecycle("s1")
        life.enter(BOOTING)

        async def answer() -> int:
            return 7

        assert await life.race_vm_exit(answer()) == 7
        never: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        waiting = asyncio.ensure_future(life.race_vm_exit(never))
        await asyncio.sleep(0)
        life.enter(FAILED, VMLostError("crashed"))
        with pytest.raises(VMLostError, match="crashed"):
            await waiting
        await asyncio.sleep(0)
        assert never.cancelled()

    asyncio.run(run())


@pytest.mark.parametrize("outlives_caller", [False, True])
def test_what_is_waited_for_ends_with_its_caller_unless_it_is_kept(outlives_caller: bool) -> None:
    async def run() -> None:
        life = Lifecycle("s1")
        life.enter(BOOTING)
        begun, go_on = asyncio.Event(), asyncio.Event()
        steps: list[str] = []

        async def work() -> None:
            try:
                begun.set()
                await go_on.wait()
                steps.append("done")
            finally:
                await asyncio.sleep(0)
                steps.append("ended")

        task = asyncio.create_task(work())
        caller = asyncio.create_task(life.race_vm_exit(task, outlives_caller=outlives_caller))
        await begun.wait()
        caller.cancel()
        with pytest.raises(asyncio.CancelledError):
            await caller
        if outlives_caller:
            assert steps == []
            go_on.set()
            await task
            assert steps == ["done", "ended"]
        else:
            assert steps == ["ended"]
            assert task.cancelled()

    asyncio.run(run())
