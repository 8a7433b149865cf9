"""The first half of a start: how files are shared, what is asked of a hypervisor, and what a failed start leaves."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import pytest
import sandbox_support

from kata import journal_undo, sysio
from kata.engine.lifecycle import boot, first_calls, volumes
from kata.engine.lifecycle.booted_machine import BootedMachine
from kata.errors import HostError, KataError, UnsupportedError
from kata.hypervisor import registry, virtiofsd
from kata.hypervisor.base import Capabilities
from kata.journal import Journal
from kata.proto import agent_pb
from kata.settings import ContainerSettings, NetworkSettings, RootfsSettings, VolumeSettings
from kata.ttrpc import frame
from kata.ttrpc.envelope import Request


def test_a_virtiofsd_that_is_asked_for_has_to_be_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(virtiofsd, "find", lambda configured="": None)
    journal = Journal.create_dir(str(tmp_path / "r"), "sandbox", {})

    noted: list[str] = []

    def server(accel: str, shared_fs: str = "", *, bounces: bool = False) -> object:
        settings = sandbox_support.sandbox("x", "/c", accel=accel, kernel="/k", initrd="/i")
        settings.notes = noted
        assert settings.machine is not None
        settings.machine.share.protocol = shared_fs
        settings.machine.guest.bounces = bounces
        start = boot.Boot(settings, str(tmp_path), journal)
        start.choose_monitor()
        start.machine.share = volumes.Share(str(tmp_path), journal)
        start.prepare_file_server()
        return start.machine.files

    assert server("kvm", shared_fs="virtio-9p") is None
    assert noted == []  # it was asked for
    assert server("kvm") is None
    assert "no virtiofsd" in noted.pop()
    assert server("tcg", shared_fs="virtio-fs") is None
    assert "kernel cannot have virtio-fs" in noted.pop()
    with pytest.raises(HostError, match="no virtiofsd"):
        server("tcg", shared_fs="virtio-fs", bounces=True)
    with pytest.raises(HostError, match="no virtiofsd"):
        server("kvm", shared_fs="virtio-fs")
    assert journal_undo.undo(journal) == []


@pytest.mark.parametrize(
    ("version", "cache"),
    [
        ("6.1.192", "mmap"),
        ("6.3", "mmap"),
        ("6.4.0", "none"),
        ("6.12.117", "none"),
        ("7.0", "none"),
        ("", "none"),
    ],
)
def test_9p_keeps_only_what_the_kernel_keeps_right(version: str, cache: str) -> None:
    assert first_calls.cache_of_9p(version) == cache


# ---- what the engine asks before it makes anything ----


class Poor:
    """A hypervisor that can do next to nothing."""

    name, title = "poor", "Poor"
    accelerators = ("kvm",)

    def __init__(self, **capabilities: Any) -> None:
        self._capabilities = Capabilities(**{"disk_slots": 1, **capabilities})

    def capabilities(self, accel: str, options: object, *, bounces: bool = True) -> Capabilities:
        return self._capabilities


def booting(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, monitor: Poor) -> boot.Boot:
    monkeypatch.setitem(registry._LOADERS, "poor", lambda: cast(Any, monitor))
    sandbox = sandbox_support.sandbox("x", str(tmp_path), kernel="/k", initrd="/i", accel="kvm")
    sandbox.described().hypervisor.name = "poor"
    return boot.Boot(sandbox, str(tmp_path), Journal.create_dir(str(tmp_path / "r"), "s", {}))


def test_devices_of_the_host(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Refused by name; and memory that they reach is there from the start, and stays."""
    start = booting(tmp_path, monkeypatch, Poor())
    start.choose_monitor()
    start.set_devices_aside()
    start._settings.host_devices = [99999999]
    with pytest.raises(
        UnsupportedError, match=r"Poor cannot give a machine devices of the host \(/dev/vfio/99999999"
    ):
        start.set_devices_aside()
    start = booting(tmp_path / "able", monkeypatch, Poor(host_devices=True, grow_memory=True))
    start.choose_monitor()
    start._settings.host_devices = [99999999]
    with pytest.raises(
        KataError, match=r"this host has no IOMMU, or it is off|there is no IOMMU group 99999999"
    ):
        start.set_devices_aside()
    start._described.size.max_memory_mib = 4096
    shapes = [boot.shape_of(start._settings, start.capabilities, host_devices=count) for count in (0, 2)]
    assert [(one.max_memory_mib, one.reclaim, one.host_devices) for one in shapes] == [
        (4096, True, 0),
        (0, False, 2),
    ]


def test_what_a_hypervisor_cannot_do_is_said_before_anything_is_made(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    start = booting(tmp_path, monkeypatch, Poor())
    assert start._described.hypervisor.accel == "kvm"
    start._described.hypervisor.accel = "tcg"
    with pytest.raises(HostError, match="Poor needs KVM"):
        start.choose_monitor()
    start._described.hypervisor.accel = "kvm"
    start._settings.disks = [None, None]
    with pytest.raises(UnsupportedError, match="Poor gives a machine 1 disks, and 2 are needed"):
        start.choose_monitor()
    start._settings.disks = []
    own = start._settings.container = ContainerSettings(
        directory=str(tmp_path), rootfs=RootfsSettings(kind="share", source="/root"), volumes=[]
    )
    with pytest.raises(
        UnsupportedError, match=r"the root file system /root is a directory.* Poor shares no"
    ):
        start.choose_monitor()
    own.rootfs = None
    own.volumes = [VolumeSettings(source=str(tmp_path), destination="/x")]
    with pytest.raises(UnsupportedError, match=f"cannot mount {tmp_path} writable"):
        start.choose_monitor()
    own.volumes[0].readonly = True
    start._settings.client.shares_from_start = True
    start.choose_monitor()
    start.prepare_share()
    assert start.machine.share is None
    start._settings.network = NetworkSettings(mode="netns")
    with pytest.raises(
        UnsupportedError, match="Poor cannot connect a machine to a network of the mode 'netns'"
    ):
        start.plan_network()
    start._settings.network = NetworkSettings()
    start.plan_network()
    start.describe_machine()
    made = start.machine.shape
    assert made is not None
    assert (made.nics, made.share, made.disks, made.max_vcpus) == (0, "", ("spare",), 0)
    assert os.listdir(tmp_path / "r/s") == ["journal"]


@pytest.mark.parametrize(("waiting", "nics"), [(0, 0), (2, 1)])
def test_a_machine_without_a_network_has_an_interface_only_with_a_pool(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, waiting: int, nics: int
) -> None:
    start = booting(tmp_path, monkeypatch, Poor(nics=4))
    start._described.hypervisor.pool = waiting
    start._settings.network = NetworkSettings(mode="none")
    start.choose_monitor()
    start.plan_network()
    start.describe_machine()
    assert start.machine.shape is not None
    assert start.machine.shape.nics == nics


@pytest.mark.parametrize(("accel", "expected"), [("tcg", True), ("kvm", False)])
def test_only_an_emulated_machine_starts_without_an_interface(
    tmp_path: Path, accel: str, expected: bool
) -> None:
    settings = sandbox_support.sandbox("x", str(tmp_path), kernel="/k", initrd="/i", accel=accel)
    assert boot.does_without_idle_nic(settings.described()) is expected


class Channel:
    """A machine that was started, as far as its agent's channel goes."""

    share_tag = "tag"

    def __init__(self, *, is_there: bool = True) -> None:
        self.is_there = is_there
        self.words = b""

    def give_agent(self, words: bytes) -> bool:
        self.words += words if self.is_there else b""
        return self.is_there


def test_a_clone_has_its_first_calls_before_its_engine_waits_for_answers(tmp_path: Path) -> None:
    settings = sandbox_support.sandbox("x", str(tmp_path), kernel="/k", initrd="/i", accel="tcg")
    settings.hostname, settings.resolv_conf = "name", ["nameserver 1.2.3.4"]
    machine = BootedMachine()
    channel = Channel()
    machine.started = cast(Any, channel)
    first_calls.give(machine, settings)
    calls = {one.stream: Request.decode(one.data) for one in frame.Parser().feed(channel.words)}
    assert {call.method: stream for stream, call in calls.items()} == machine.calls_made
    # Seeded before anything else is done.
    assert [call.method for call in calls.values()] == [
        "ReseedRandomDev",
        "GetGuestDetails",
        "CreateSandbox",
    ]
    assert len(agent_pb.ReseedRandomDevRequest.decode(calls[1].payload).data) == first_calls.SEED_BYTES
    wanted = agent_pb.CreateSandboxRequest.decode(calls[5].payload)
    assert (wanted.sandbox_id, wanted.hostname, list(wanted.dns)) == ("x", "name", ["nameserver 1.2.3.4"])
    # Where there is no channel yet, or the calls have to tell of a trace, nothing is said.
    for place, traced in ((Channel(is_there=False), False), (Channel(), True)):
        other = BootedMachine()
        other.started = cast(Any, place)
        settings.described().tracing = cast(Any, object()) if traced else None
        first_calls.give(other, settings)
        assert (other.calls_made, place.words) == ({}, b"")


def test_one_thing_that_cannot_be_taken_back_keeps_no_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    start = booting(tmp_path, monkeypatch, Poor())
    taken: list[str] = []

    def refuse() -> None:
        raise RuntimeError("no")

    start._undo += [lambda: taken.append("first"), refuse, lambda: taken.append("last")]
    start.undo()
    start.undo()
    assert taken == ["last", "first"]
    assert start._settings.notes == ["a start that failed was not taken back whole: no"]


# ---- a start that fails ----

STEPS = [
    "choose_monitor",
    "keep_host_namespaces",
    "enter_namespace",
    "prepare_share",
    "plan_network",
    "prepare_file_server",
    "describe_machine",
    "take_boot_slot",
    "start_monitor",
    "join_cgroup",
    "start_file_server",
    "start_network",
    "set_oom_scores",
    "complete_monitor",
]


def descriptors() -> set[str]:
    found = set()
    for number in os.listdir("/proc/self/fd"):
        try:
            found.add(f"{number} {os.readlink(f'/proc/self/fd/{number}')}")
        except FileNotFoundError:
            pass  # that of the listing
    return found


def in_child(work: Callable[[], str]) -> str:
    """What *work* says, in a process of its own: namespaces and cgroups are its alone."""
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            os.close(read)
            said = work()
        except BaseException as error:
            said = f"{type(error).__name__}: {error}"
        os.write(write, said.encode()[:60000])
        os._exit(0)
    os.close(write)
    with os.fdopen(read, "rb") as file:
        said = file.read().decode()
    os.waitpid(child, 0)
    return said


class Refused(KataError):
    """What a step fails with here."""


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root")
@pytest.mark.parametrize("network", ["netns", "user"])
@pytest.mark.parametrize("step", STEPS)
def test_a_start_that_fails_leaves_nothing_open(tmp_path: Path, step: str, network: str) -> None:
    """Each step in turn fails when it is done, with real namespaces, taps, helpers and a hypervisor's program."""
    for name in ("kernel", "initrd"):
        (tmp_path / name).write_bytes(b"nothing that boots")
    sandbox = sandbox_support.sandbox(
        "x", str(tmp_path / "c"), kernel=f"{tmp_path}/kernel", initrd=f"{tmp_path}/initrd", accel="tcg"
    )
    sandbox.network = NetworkSettings(mode=network)
    sandbox.described().guest.bounces = True  # a file server of its own, where the host has one
    sandbox.client.keeps_host_mounts = sandbox.client.shares_from_start = True
    sandbox.cgroups_path = f"/kata-test-{os.getpid()}-{step}"
    os.environ["KATA_RUN_DIR"] = str(tmp_path / "run")
    done = getattr(boot.Boot, step)

    def failing(self: boot.Boot) -> None:
        done(self)
        raise Refused(step)

    def work() -> str:
        from kata.engine import hostns  # noqa: F401
        from kata.hypervisor import virtiofsd  # noqa: F401
        from kata.network import netns, plan  # noqa: F401

        journal = Journal.create_dir(str(tmp_path / "r"), "s", {})
        sysio.preload()
        before = descriptors()
        setattr(boot.Boot, step, failing)
        try:
            boot.power_on(sandbox, os.path.dirname(journal.path), journal)
        except Refused:
            pass
        left = descriptors() - before
        children = Path(f"/proc/self/task/{os.getpid()}/children").read_text().split()
        notes = [note for note in sandbox.notes if boot.BY_9P not in note]
        return repr((sorted(left), children, notes, journal_undo.undo(journal, 10)))

    try:
        assert in_child(work) == "([], [], [], [])"
    finally:
        del os.environ["KATA_RUN_DIR"]
