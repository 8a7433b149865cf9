"""Events for containerd: in order, again until they are taken, and never without bound."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Awaitable, Callable
from pathlib import Path

import pytest

from kata.engine.services import events
from kata.proto import events_pb, google_pb
from kata.proto.codec import Methods
from kata.ttrpc.server import Context, Server

TABLE = Methods({"Forward": "@events.ForwardRequest @google.Empty"})


class Refusal(Exception):
    grpc_code = 3


class Containerd:
    """The service that containerd has for events; remembers what it took."""

    def __init__(self) -> None:
        self.taken: list[tuple[str, str, str]] = []
        self.refuses = ""
        self.news = asyncio.Event()
        self.open = asyncio.Event()
        self.open.set()

    async def Forward(self, request: events_pb.ForwardRequest, context: Context) -> google_pb.Empty:
        await self.open.wait()
        envelope = request.envelope
        assert envelope is not None
        assert envelope.event is not None
        if envelope.topic == self.refuses:
            raise Refusal("no such topic")
        event = events_pb.TaskExit.decode(envelope.event.value)
        self.taken.append((envelope.namespace, envelope.topic, event.container_id))
        self.news.set()
        return google_pb.Empty()

    async def listen(self, path: Path) -> Server:
        server = Server({events.SERVICE: (TABLE, self)})
        listener = socket.socket(socket.AF_UNIX)
        listener.bind(str(path))
        listener.listen()
        self.serving = asyncio.create_task(server.serve(listener))
        return server


def play(
    scenario: Callable[[events.Publisher, Containerd, Path], Awaitable[None]], tmp_path: Path
) -> list[str]:
    """Run a scenario; what the publisher logged."""
    told: list[str] = []

    async def work() -> None:
        path = tmp_path / "s"
        publisher = events.Publisher(str(path), "n", told.append)
        await asyncio.wait_for(scenario(publisher, Containerd(), path), 60)

    asyncio.run(work())
    return told


def exit_of(container_id: str) -> events_pb.TaskExit:
    return events_pb.TaskExit(container_id=container_id)


def test_events_arrive_in_order_though_nobody_listens_at_first(tmp_path: Path) -> None:
    async def scenario(publisher: events.Publisher, containerd: Containerd, path: Path) -> None:
        for name in ("a", "b"):
            publisher.publish("/tasks/exit", exit_of(name))
        await asyncio.sleep(0.15)  # it has tried in vain
        server = await containerd.listen(path)
        publisher.publish("/tasks/exit", exit_of("c"))
        await publisher.close(30)
        assert containerd.taken == [("n", "/tasks/exit", name) for name in ("a", "b", "c")]
        await server.shutdown()

    assert play(scenario, tmp_path) == []


def test_an_event_is_sent_again_to_a_containerd_that_was_restarted(tmp_path: Path) -> None:
    async def scenario(publisher: events.Publisher, containerd: Containerd, path: Path) -> None:
        first = await containerd.listen(path)
        publisher.publish("/tasks/exit", exit_of("a"))
        await containerd.news.wait()
        await first.shutdown()
        path.unlink()
        publisher.publish("/tasks/exit", exit_of("b"))
        second = await containerd.listen(path)
        await publisher.close(30)
        assert [name for _, _, name in containerd.taken] == ["a", "b"]
        await second.shutdown()

    assert play(scenario, tmp_path) == []


def test_a_refused_event_is_told_and_holds_nobody_up(tmp_path: Path) -> None:
    async def scenario(publisher: events.Publisher, containerd: Containerd, path: Path) -> None:
        containerd.refuses = "/tasks/odd"
        server = await containerd.listen(path)
        publisher.publish("/tasks/odd", exit_of("a"))
        publisher.publish("/tasks/exit", exit_of("b"))
        await publisher.close(30)
        assert [name for _, _, name in containerd.taken] == ["b"]
        await server.shutdown()

    (told,) = play(scenario, tmp_path)
    assert told.startswith("containerd refused the event /tasks/odd")


def test_what_waits_is_bounded_and_what_is_lost_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(events, "LIMIT", 2)

    async def scenario(publisher: events.Publisher, containerd: Containerd, path: Path) -> None:
        containerd.open.clear()
        server = await containerd.listen(path)
        publisher.publish("/tasks/first", exit_of("a"))
        await asyncio.sleep(0.1)  # the call is on its way
        for name in ("b", "c"):
            publisher.publish("/tasks/exit", exit_of(name))
        containerd.open.set()
        await publisher.close(30)
        # The first was dropped from the queue while it was being sent: it arrives all the same, and only once.
        assert [name for _, _, name in containerd.taken] == ["a", "b", "c"]
        await server.shutdown()

    (told,) = play(scenario, tmp_path)
    assert "/tasks/first is dropped" in told


def test_an_end_does_not_wait_for_ever(tmp_path: Path) -> None:
    async def scenario(publisher: events.Publisher, containerd: Containerd, path: Path) -> None:
        publisher.publish("/tasks/exit", exit_of("a"))
        await publisher.close(0.05)

    assert play(scenario, tmp_path) == ["containerd did not take the last 1 events"]
