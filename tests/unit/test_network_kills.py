"""Who makes, uses or removes a network with a name is killed at each of its steps, and nothing is left afterwards.

A step is a line of the modules that do it: a child traces itself, and kills itself at one of them. The namespaces,
bridges and taps are real.
"""

from __future__ import annotations

import os
import signal
import socket
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType
from typing import Any

import pytest

from kata import journal_undo, mount_table, paths, sysio
from kata.cli import main, networks
from kata.journal import Journal
from kata.network import bridge, held, members, resolver, user
from kata.settings import EndpointSettings

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="makes network namespaces")

_MODULES = (
    "bridge.py",
    "held.py",
    "networks.py",
    "journal.py",
    "journal_undo.py",
    "members.py",
    "records.py",
    "netns.py",
)
_KILLS = 40
"""How many of the steps, at even distances, are one at which the child is killed."""
_MOST = 4
"""Interfaces of a machine."""


@pytest.fixture(autouse=True)
def state(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("KATA_STATE_DIR", str(tmp_path / "s"))
    monkeypatch.setenv("KATA_RUN_DIR", str(tmp_path / "r"))
    try:
        yield
    finally:
        networks.let_go()


def _traced(work: Callable[[], None], kill_at: int) -> int:
    """Do something in a child that is killed at a step; at none where *kill_at* is 0. Returns how many there were."""
    reading, writing = os.pipe()
    pid = os.fork()
    if pid == 0:
        os.close(reading)
        status = 1
        try:
            steps = 0

            def trace(frame: FrameType, event: str, _argument: Any) -> Any:
                nonlocal steps
                if os.path.basename(frame.f_code.co_filename) not in _MODULES:
                    return None
                if event == "line":
                    steps += 1
                    if steps == kill_at:
                        os.kill(os.getpid(), signal.SIGKILL)
                return trace

            threading.settrace(trace)
            sys.settrace(trace)
            work()
            sys.settrace(None)
            os.write(writing, str(steps).encode())
            status = 0
        finally:
            os._exit(status)
    os.close(writing)
    with os.fdopen(reading) as file:
        said = file.read()
    status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    assert status == (-signal.SIGKILL if kill_at else 0)
    return int(said or 0)


def _killed_everywhere(
    work: Callable[[], None], before: Callable[[], None], after: Callable[[], None]
) -> None:
    before()
    steps = _traced(work, 0)
    assert steps > 20
    after()
    for kill_at in range(1, steps, max(steps // _KILLS, 1)):
        before()
        _traced(work, kill_at)
        after()


def _nothing_left() -> None:
    for base in (paths.run_dir(), paths.state_dir()):
        found = [str(path) for path in Path(base, "networks").glob("*")]
        assert found == []
    below = f"{paths.run_dir()}/"
    assert [mount.target for mount in mount_table.mounts() if mount.target.startswith(below)] == []
    networks.let_go()


def _removed(name: str) -> None:
    """`network rm` works where there is a network, and `kata gc` clears up where there is half of one."""
    if networks.load(name) is not None:
        assert main.main(["network", "rm", name]) == 0
    assert main.main(["gc"]) == 0
    _nothing_left()


def _make() -> None:
    with networks.locked():
        networks._hold(networks.create("front", ["10.5.0.0/24"]))


def test_making_a_network() -> None:
    _killed_everywhere(_make, lambda: None, lambda: _removed("front"))


def test_a_network_is_made_in_full_after_a_making_that_was_killed() -> None:
    def make_again() -> None:
        with networks.locked():
            record = networks.load("front") or networks.create("front", ["10.5.0.0/24"])
            holder = networks._hold(record)
        assert _links(holder.path) == set()
        _removed("front")

    _killed_everywhere(_make, lambda: None, make_again)


def test_removing_a_network() -> None:
    def remove() -> None:
        with networks.locked():
            networks.remove("front")

    def again() -> None:
        _removed("front")

    _killed_everywhere(remove, _make, again)


def _links(namespace: str) -> set[str]:
    there = sysio.Fd(os.open(namespace, os.O_RDONLY | os.O_CLOEXEC))
    with there, bridge._inside(there) as rtnl:
        return {link.name for link in rtnl.links()} - {"lo", held.BRIDGE}


def test_an_engine_in_networks(tmp_path: Path) -> None:
    with networks.locked():
        records = [networks.create("front", ["10.5.0.0/24"]), networks.create("back", ["10.6.0.0/24"])]
        namespaces = [networks._hold(record).path for record in records]
    front, back = (
        EndpointSettings(
            network=record["name"],
            path=networks.runtime_dir(record),
            namespace=namespaces[number],
            address=f"10.{5 + number}.0.2",
            prefix=24,
            mac=f"02:00:00:00:00:0{number}",
            names=["one"],
        )
        for number, record in enumerate(records)
    )
    sandboxes = os.path.join(paths.run_dir(), "sandboxes")
    host = user.HostNetwork(True, False, resolver.parse(""))

    def engine() -> None:
        journal = Journal.create_dir(sandboxes, "one", {"client": "kata", "id": "one"})
        plan = bridge.BridgedPlan("02:00:00:00:01:00", [], host, endpoints=[front], outside=False)
        plan.journal = journal
        nics = plan.setup_nics(_MOST)
        plan.start(journal, "one")
        assert len(_links(front.namespace)) == _MOST - 1
        plan.connect(back)
        assert len(_links(front.namespace)) == _MOST - 2
        assert [one.names for one in members.living(back.path)] == [["one"]]
        plan.disconnect("front")
        assert members.living(front.path) == []
        plan.disconnect("back")
        plan.connect(back)
        plan.stop()
        for nic in nics:
            nic.close()
        assert journal_undo.undo(journal) == []

    def after() -> None:
        for one in (front, back):
            assert members.living(one.path) == []
            assert _links(one.namespace) == set()
        assert main.main(["gc"]) == 0
        for one in (front, back):
            assert os.listdir(members.directory(one.path)) == []
        assert not os.path.isdir(sandboxes) or os.listdir(sandboxes) == []

    try:
        _killed_everywhere(engine, lambda: None, after)
        with socket.socket() as probe:  # this process's own namespace is the one that it was
            probe.bind(("127.0.0.1", 0))
    finally:
        for name in ("front", "back"):
            assert main.main(["network", "rm", name]) == 0
    _nothing_left()
