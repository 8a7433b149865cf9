"""The states of a process, and the words that clients parse."""

from __future__ import annotations

import asyncio

import pytest

from kata.engine.containers import process
from kata.engine.standard_streams.stdio import parse_stdio
from kata.errors import (
    NotFoundError,
    StateError,
)


def a_process(exec_id: str = "") -> process.Process:
    return process.Process("c", exec_id, parse_stdio(False, "", "", ""))


def test_every_transition_that_the_table_lacks_is_refused() -> None:
    async def work() -> None:
        states = (process.CREATED, process.RUNNING, process.PAUSED, process.STOPPED, process.DELETED)
        for start in states:
            for end in states:
                one = a_process()
                one.state = start
                if end in process._NEXT[start]:
                    one.transition(end)
                    assert one.state == end
                else:
                    with pytest.raises(StateError):
                        one.transition(end)

    asyncio.run(work())


def test_requests_in_the_wrong_state_get_the_words_that_clients_parse() -> None:
    async def work() -> None:
        one = a_process()
        one.start(7)
        with pytest.raises(StateError, match="cannot start a running process"):
            one.require_startable()
        with pytest.raises(StateError, match="cannot delete a running process"):
            one.require_deletable()
        assert one.stop(3, 1)
        assert not one.stop(137, 2)
        assert one.exit_status == 3
        with pytest.raises(NotFoundError, match="process already finished"):
            one.require_killable()

    asyncio.run(work())
