"""The warm pool without machines: which starts can have one, who is asked for it, and what is counted."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from kata import children, sysio
from kata.cli import session
from kata.engine import launch
from kata.engine.factory import pool, pool_counts
from kata.engine.lifecycle import boot_slots
from kata.journal import Journal
from kata.settings import (
    DiskSettings,
    EndpointSettings,
    GuestSettings,
    HypervisorSettings,
    MachineSettings,
    NetworkSettings,
    PodSettings,
    SandboxSettings,
    SizeSettings,
)

SOURCE = str(Path(__file__).resolve().parents[2] / "src")


@pytest.fixture(autouse=True)
def own_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    place = tmp_path / "r"
    monkeypatch.setenv("KATA_RUN_DIR", str(place))
    place.mkdir()
    return place


def sandbox(**changed: Any) -> SandboxSettings:
    machine = MachineSettings(
        hypervisor=HypervisorSettings(accel="tcg", pool=1),
        guest=GuestSettings(kernel="/k", initrd="/i"),
        size=SizeSettings(vcpus=1, memory_mib=512),
    )
    given = {"client": session.client_policy(), "machine": machine, "id": "s", **changed}
    return SandboxSettings(**given)


# ---- which starts ----

ENDPOINT = EndpointSettings(
    network="n", path="/n", namespace="/proc/1/fd/9", address="10.1.1.2", prefix=24, mac="02:00:00:00:00:01"
)
REASONS: dict[str, tuple[dict[str, Any], str]] = {
    "none": ({}, ""),
    "user": ({"network": NetworkSettings(mode="user")}, ""),
    "netns": ({"network": NetworkSettings(mode="netns", path="/n")}, ""),
    "macvtap": (
        {"network": NetworkSettings(mode="netns", model="macvtap")},
        "its network is connected by macvtap",
    ),
    "tap": ({"network": NetworkSettings(mode="tap")}, "its network is a tap of pasta's"),
    "devices": ({"host_devices": [7]}, "it has devices of the host"),
    "pod": ({"pod": PodSettings(config_path="")}, "pods are described after their engine's start"),
    "named": (
        {"network": NetworkSettings(mode="user", endpoints=[ENDPOINT])},
        "it is in a named network",
    ),
}


@pytest.mark.parametrize("case", REASONS)
def test_which_machines_may_come_from_the_pool(case: str) -> None:
    changed, reason = REASONS[case]
    assert pool.why_not(sandbox(**changed)) == reason


def needs(settings: SandboxSettings) -> str:
    return pool.wanted(settings, settings.to_plain())


def change(settings: SandboxSettings, what: Callable[[SandboxSettings], object]) -> SandboxSettings:
    what(settings)
    return settings


def set_in(part: str, name: str, value: object) -> Callable[[SandboxSettings], object]:
    def change(settings: SandboxSettings) -> None:
        setattr(getattr(settings.described(), part), name, value)

    return change


SHAPES = {
    "memory": set_in("size", "memory_mib", 1024),
    "processors": set_in("size", "vcpus", 2),
    "debug logging": set_in("guest", "verbose", True),
    "kernel parameters": set_in("guest", "cmdline", "quiet"),
    "merged pages": set_in("hypervisor", "ksm", True),
    "bound of memory": set_in("hypervisor", "pool_free_mib", 1),
    "a disk": lambda one: one.disks.append(DiskSettings(path="/d", readonly=True)),
    "a tap": lambda one: setattr(one, "network", NetworkSettings(mode="netns", path="/n")),
}


@pytest.mark.parametrize("case", SHAPES)
def test_what_makes_a_machine_another_one(case: str) -> None:
    assert needs(change(sandbox(), SHAPES[case])) != needs(sandbox())


def test_what_is_given_to_a_machine_later_does_not() -> None:
    """Id, name, network namespace, paths of disks, labels: two such sandboxes could have the same machine."""
    disks = [DiskSettings(path="/a", readonly=True), None]
    one = sandbox(disks=disks, network=NetworkSettings(mode="netns", path="/n"), hostname="a")
    other = sandbox(
        id="t",
        disks=[DiskSettings(path="/b", readonly=True), None],
        network=NetworkSettings(mode="netns"),
        hostname="b",
        notes=["x"],
        oom_score_adj=500,
        cgroups_path="/p/q",
    )
    assert needs(one) == needs(other)


@pytest.mark.parametrize("change", ["environment", "nice", "limit", "needs"])
def test_a_process_that_waits_is_like_an_engine(change: str) -> None:
    """Who differs in one of them has another name; what is only handed over makes no difference."""
    environment = {"KATA_X": "1"}
    name = pool.name_of("a", environment, 0)
    assert pool.name_of("a", {**environment, "TRACEPARENT": "00-1"}, 0) == name
    if change == "environment":
        assert pool.name_of("a", {"KATA_X": "2"}, 0) != name
    elif change == "nice":
        assert pool.name_of("a", environment, 5) != name
    elif change == "needs":
        assert pool.name_of("b", environment, 0) != name
    else:
        code = (
            "import resource, sys; sys.path.insert(0, sys.argv[1])\n"
            "from kata.engine.factory import pool\n"
            "print(pool.name_of('a', {'KATA_X': '1'}, 0))\n"
            "resource.setrlimit(resource.RLIMIT_CORE, (0, 0))\n"
            "print(pool.name_of('a', {'KATA_X': '1'}, 0))"
        )
        done = subprocess.run(
            ["prlimit", "--core=4096:4096", sys.executable, "-I", "-c", code, SOURCE],
            capture_output=True,
            text=True,
            check=True,
        )
        assert len(set(done.stdout.split())) == 2


# ---- who is asked ----


class Waiter:
    """A directory in the pool, and a socket in it that answers with the pid of this process, or not at all."""

    def __init__(self, name: str, answers: bytes | None) -> None:
        self.place = Path(pool.directory()) / name
        self.place.mkdir(parents=True)
        self._answers = answers
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with sysio.SocketName(str(self.place / pool.SOCKET_NAME)) as path:
            self._socket.bind(path)
        self._socket.listen(1)
        self.said: list[bytes] = []
        self._thread = threading.Thread(target=self._serve)
        self._thread.start()

    def _serve(self) -> None:
        try:
            client, _ = self._socket.accept()
        except OSError:
            return
        with client:
            client.settimeout(10)
            word, fds, _, _ = socket.recv_fds(client, 16, 16)
            for fd in fds:
                os.close(fd)
            self.said += [word, str(len(fds)).encode()]
            if self._answers is not None:
                client.send(self._answers)
            self.said.append(client.recv(16))

    def end(self) -> list[bytes]:
        """What it was told."""
        self._socket.shutdown(socket.SHUT_RDWR)
        self._thread.join(20)
        self._socket.close()
        return self.said


def take() -> tuple[int, str]:
    null = os.open(os.devnull, os.O_RDONLY)
    try:
        return pool.take("needs", {"KATA_X": "1"}, {"id": "s"}, "/place", [null] * 5)
    finally:
        os.close(null)


def prefix() -> str:
    return pool.name_of("needs", {"KATA_X": "1"}, os.nice(0))


def test_nobody_waits() -> None:
    assert take() == (0, "none was waiting")


def test_the_one_that_waits_is_taken() -> None:
    waiter = Waiter(f"{prefix()}-1", b"4711")
    try:
        assert take() == (4711, "")
    finally:
        said = waiter.end()
    assert said == [pool.TAKE, b"6", pool.CONFIRM]


def test_those_of_other_kinds_are_left_alone() -> None:
    waiters = [Waiter(f"{kind * 32}-1", b"1") for kind in "ab"]
    try:
        assert take() == (0, "none was waiting that is like it (2 of other kinds)")
    finally:
        said = [waiter.end() for waiter in waiters]
    assert said == [[], []]


def test_one_that_does_not_answer_is_left(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pool, "PATIENCE_S", 0.1)
    waiter = Waiter(f"{prefix()}-1", None)
    try:
        assert take() == (0, "the one that waited did not answer")
    finally:
        said = waiter.end()
    assert said[-1] == b""  # it has not been told to go on


def test_one_that_says_no_is_left() -> None:
    waiter = Waiter(f"{prefix()}-1", b"no")
    try:
        assert take() == (0, "none was waiting")
    finally:
        waiter.end()


# ---- what is counted ----


def test_counts_of_many_at_once_add_up(own_directory: Path) -> None:
    code = (
        "import sys; sys.path.insert(0, sys.argv[1])\n"
        "from kata.engine.factory import pool_counts as counts\n"
        "for number in range(100): counts.count((counts.MADE, counts.dropped(counts.MEMORY))[number % 2])"
    )
    assert set(pool_counts.read().values()) == {0}
    writers = [subprocess.Popen([sys.executable, "-c", code, SOURCE]) for _ in range(3)]
    assert [one.wait(60) for one in writers] == [0, 0, 0]
    found = pool_counts.read()
    assert found[pool_counts.MADE] == 150
    assert pool_counts.by_reason(found) == {**dict.fromkeys(pool_counts.REASONS, 0), "memory": 150}
    assert (own_directory / "pool.counts").stat().st_mode & 0o777 == 0o600


@pytest.mark.parametrize("content", [b"", b"made\n", b"made x\n\xff\n", b"made -3\n"])
def test_a_file_that_makes_no_sense_counts_nothing(own_directory: Path, content: bytes) -> None:
    (own_directory / "pool.counts").write_bytes(content)
    assert set(pool_counts.read().values()) == {0}
    pool_counts.count(pool_counts.TAKEN)
    assert pool_counts.read()[pool_counts.TAKEN] == 1


def test_who_cannot_count_goes_on(own_directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nor does it wait for somebody who stands still with the lock."""
    import fcntl

    with open(own_directory / "pool.counts", "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        pool_counts.count(pool_counts.MADE)
    monkeypatch.setenv("KATA_RUN_DIR", str(own_directory / "nowhere"))
    pool_counts.count(pool_counts.MADE)
    assert set(pool_counts.read().values()) == {0}


def test_those_who_were_killed_while_they_waited_are_counted() -> None:
    """Not those that a sandbox has taken, whose engine was killed."""
    child = subprocess.Popen(["sleep", "100"])
    for name, waits in (("waits", True), ("taken", False)):
        journal = Journal.create_dir(pool.directory(), name, {"client": "pool", "id": name})
        journal.set_owner(child.pid)
        journal.close()
        if waits:
            (Path(pool.directory()) / name / pool.SOCKET_NAME).touch()
    pool.count_killed()
    assert set(pool_counts.read().values()) == {0}
    child.send_signal(signal.SIGKILL)
    child.wait()
    pool.count_killed()
    counts = pool_counts.read()
    assert (counts[pool_counts.dropped(pool_counts.KILLED)], sum(counts.values())) == (1, 1)


# ---- when it is filled ----


def test_who_fills_lets_starts_go_first() -> None:
    boot_slots.wait_for_calm(0)
    slots = [boot_slots.BootSlot(print, 2) for _ in range(2)]
    slots[0].end()
    ended = threading.Timer(0.3, slots[1].end)
    ended.start()
    try:
        boot_slots.wait_for_calm(60, 2)
        assert not slots[1].is_held
        # Nor do they wait for ever.
        slots.append(boot_slots.BootSlot(print, 2))
        boot_slots.wait_for_calm(0.2, 2)
        assert slots[2].is_held
    finally:
        ended.join()
        for slot in slots:
            slot.end()


@pytest.mark.skipif(not os.path.exists("/proc/self/autogroup"), reason="this kernel has no autogroups")
def test_a_session_lets_others_go_first() -> None:
    """Where each session is a group of the scheduler's own, a process's priority counts only within it."""
    code = (
        "import os, sys; sys.path.insert(0, sys.argv[1])\n"
        "from kata import children\n"
        "os.setsid(); children.let_others_go_first()\n"
        "print(os.nice(0), open('/proc/self/autogroup').read().split()[-1])\n"
        "children.set_session_priority('self', 0)\n"
        "print(open('/proc/self/autogroup').read().split()[-1])"
    )
    done = subprocess.run([sys.executable, "-c", code, SOURCE], capture_output=True, text=True, check=True)
    assert done.stdout.split() == [str(children.LOWEST), str(children.SESSION), "0"]


# ---- beside the other ways to an engine ----


def ways(settings: SandboxSettings) -> list[str]:
    return [way.__name__ for way in launch._ways(settings)]


def test_one_that_waits_comes_before_a_parent_of_engines(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("KATA_ENGINE_PARENT", raising=False)
    settings = sandbox()
    assert ways(settings) == ["_take_waiting", "_execute"]
    settings.described().engine_parent = True
    assert ways(settings) == ["_take_waiting", "_fork_by_parent", "_execute"]
    settings.described().hypervisor.pool = 0
    assert ways(settings) == ["_fork_by_parent", "_execute"]


def test_why_none_was_taken_reaches_the_engine(own_directory: Path) -> None:
    """Also where the next way has the sandbox; a machine that can have none is not asked for one."""
    directory = own_directory / "sandboxes" / "s"
    journal = Journal.create_dir(str(directory.parent), "s", {"client": "kata", "id": "s"})
    try:
        for settings, said in (
            (sandbox(), "none was waiting"),
            (sandbox(host_devices=[7]), None),
        ):
            plain = settings.to_plain()
            assert launch._take_waiting(str(directory), settings, plain, journal, (0,) * 6) == 0
            assert plain.get("not_taken") == said
            assert SandboxSettings.from_plain(plain).not_taken == (said or "")
    finally:
        journal.close()
