"""Signals that a command passes on to what it is attached to: when it gives up, and when not."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any, cast

import pytest
from engine_double import Engine, make

from kata.cli.attachment import Attachment
from kata.errors import KataError
from kata.proto import google_pb
from kata.sysio import Fd
from kata.ttrpc.status import PERMISSION_DENIED, TtrpcError

__all__ = ["make"]


class Attached:
    """An attachment without streams, and the thread that passes signals on."""

    def __init__(self, engine: Engine) -> None:
        container = SimpleNamespace(socket=engine.sock_path, id="c1", name="box")
        self.attachment = Attachment.__new__(Attachment)
        self.attachment._container = cast(Any, container)
        self.attachment._exec_id = ""
        self.attachment._unresponsive = None
        self.attachment._unanswered = 0
        self.attachment._signals_reader = None
        reader, signals = os.pipe()
        self._signals = self.attachment._signals_writer = Fd(signals)
        self.over, writer = os.pipe()
        self._thread = threading.Thread(target=self.attachment._send_signals, args=(reader, writer))
        self._thread.start()

    def signal(self) -> None:
        self.attachment._forward(signal.SIGTERM, None)

    def close(self) -> None:
        self._signals.close()
        self._thread.join(10)


@pytest.mark.parametrize("answer", ["taken", "refused"])
def test_a_guest_that_answers_is_not_given_up(
    make: Callable[..., Engine], monkeypatch: pytest.MonkeyPatch, answer: str
) -> None:
    engine = make(client={"ends_with_init": False})
    answered = threading.Semaphore(0)

    async def take(self: Any, request: Any, context: Any) -> Any:
        engine.loop.call_later(0.1, answered.release)
        if answer == "refused":
            raise TtrpcError(PERMISSION_DENIED, "a policy in the guest forbids it")
        return google_pb.Empty()

    monkeypatch.setattr(type(engine.double), "SignalProcess", take)
    with engine.client() as client:
        client.create("c1", engine.bundle("sleep"))
        client.start("c1")
        attached = Attached(engine)
        try:
            for _ in range(4):
                attached.signal()
                assert answered.acquire(timeout=10)
        finally:
            attached.close()
        assert attached.attachment._unresponsive is None


def test_a_guest_that_does_not_answer_is_given_up_at_the_third(
    make: Callable[..., Engine], monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = make(client={"ends_with_init": False})

    async def wait(self: Any, request: Any, context: Any) -> Any:
        import asyncio

        await asyncio.sleep(1)
        return google_pb.Empty()

    monkeypatch.setattr(type(engine.double), "SignalProcess", wait)
    with engine.client() as client:
        client.create("c1", engine.bundle("sleep"))
        client.start("c1")
        attached = Attached(engine)
        try:
            attached.signal()
            attached.signal()
            with pytest.raises(KataError, match="does not answer"):
                attached.signal()
        finally:
            attached.close()
