"""Named points at which a process of ours stops until it is told to go on, or is killed.

A point is armed by making a fifo of its name in the directory that ``KATA_STOP_POINTS`` names and opening it for
reading. Who reaches it writes its pid there and waits until the fifo is gone. Points that are not armed cost a
failing open(2). The thread that reaches a point stops, in an engine mostly the event loop's: that is what makes the
moment exact.

Light to import: this is loaded before an engine starts its hypervisor.
"""

from __future__ import annotations

import functools
import importlib
import os
import time

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any

VARIABLE = "KATA_STOP_POINTS"
HYPERVISOR_VARIABLE = "KATA_FAULTS_HYPERVISOR"
"""Which hypervisor the engines have been told to use: its name in the registry, and in the journal."""
MONITORS = {
    "qemu": "kata.hypervisor.qemu.process",
    "cloud-hypervisor": "kata.hypervisor.cloud_hypervisor.process",
    "firecracker": "kata.hypervisor.firecracker.process",
}
"""Hypervisors, each with the module whose `spawn` starts it."""
SHARES_NOTHING = ("firecracker",)
"""Those whose root file systems have to be disks: containerd gets its devmapper snapshotter for them."""
_POLL_S = 0.005


HANG = "hang"
"""A hypervisor that is not killed: it stands still (SIGSTOP), and answers nothing any more."""
RUNS = ("exec.guest-started", "exec.answer", "exec.start-told", "exec.numbered")
"""Points at which a command runs in the guest. Who waits for its end does so without a limit, also if the guest stands
still; they have to be let go when the container is removed."""
WRONGLY = ("nonsense", "refuse")
"""How a hypervisor answers a request wrongly (`faults.answers`)."""


def hypervisor() -> str:
    """The hypervisor of this run."""
    return os.environ.get(HYPERVISOR_VARIABLE) or "qemu"


class Point:
    """A stop point.

    Attributes:
        name: ``phase.moment``; the phase is what the client is doing.
        where: Who reaches it: ``shim`` (a command of the shim, or of `kata-runtime` where it starts an engine),
            ``runtime`` (`kata-runtime` alone), ``engine``, ``maker`` (of a template), or ``waiter`` (with a machine of
            the pool, also when it has become a sandbox's engine); ``monitor`` is a request to the hypervisor, which
            is answered wrongly (`faults.answers`).
        what: In words, for the report.
        scenario: Whose client's calls lead there.
    """

    __slots__ = ("name", "scenario", "what", "where")

    def __init__(self, name: str, where: str, what: str, scenario: str = "ctr") -> None:
        self.scenario = scenario
        self.name = name
        self.where = where
        self.what = what

    @property
    def phase(self) -> str:
        """What the client is doing: create, start, exec, delete, clear; or ``template``, which is made for nobody."""
        return self.name.partition(".")[0]

    @property
    def victims(self) -> list[str]:
        """Who there is at this point and can be killed, with containerd's clients."""
        if self.where == "monitor":
            return list(WRONGLY)
        if self.where == "maker":
            return ["maker", "engine", "hypervisor", "containerd"]
        if self.where == "waiter":
            asks = ["shim"] if self.name in ASKED else []
            return ["waiter", "hypervisor", HANG, "virtiofsd", *asks, "containerd"]
        if self.phase == "clone":
            there = [] if self.name == "clone.found" else ["hypervisor", "hang"]
            return ["engine", *there, "containerd"]
        if self.name in ("create.directory", "create.socket") or self.phase == "clear":
            return ["shim", "containerd"]
        found = ["shim"] if self.where == "shim" else []
        found.append("engine")
        names = [point.name for point in POINTS]
        place = names.index(self.name)
        if place < names.index("delete.machine"):
            # At the shim's last points the engine is on its way: the machine is waited for.
            if place >= names.index("create.machine-gate") or self.where == "shim":
                found += ["hypervisor", "hang"]
            if place >= names.index("create.files"):
                found.append("virtiofsd")
        return [*found, "containerd"]


ASKED = ("pool.order-received", "pool.confirmed")
"""Points at which who has asked for a machine that waits is still there."""
POINTS = [
    Point("create.directory", "shim", "the sandbox's directory and journal exist, nothing else"),
    Point("create.socket", "shim", "the engine's socket is bound"),
    Point("create.engine", "shim", "the engine is forked off, its caller has not let go of it"),
    Point(
        "create.address", "shim", "the engine's address is in the bundle, containerd has not been told it"
    ),
    Point("create.owner", "engine", "the engine has taken the journal over"),
    Point("create.namespace", "engine", "the engine is in a mount namespace of its own"),
    Point("create.share", "engine", "the share's mounts are made"),
    Point("create.redirect-intended", "engine", "a redirection of traffic is written down, not made"),
    Point("create.network", "engine", "taps and redirections are made"),
    Point("create.machine-intended", "engine", "the hypervisor's intent is written down"),
    Point("create.machine-gate", "engine", "the hypervisor's process waits to execute its program"),
    Point("create.machine", "engine", "the hypervisor runs"),
    Point("create.cgroup-intended", "engine", "a cgroup is written down, not made"),
    Point("create.cgroup-made", "engine", "a cgroup is made, its identity is not written down"),
    Point("create.limited", "engine", "engine and hypervisor are in their cgroups"),
    Point("create.files", "engine", "the file server runs, where the share is served by one"),
    Point("create.request", "engine", "the Create call has arrived"),
    Point("create.image", "engine", "the image of the snapshot's layers is found", "disks"),
    Point("create.disk-intended", "engine", "the writable disk is written down, not made", "disks"),
    Point("create.disk", "engine", "the writable disk's file is made", "disks"),
    Point("create.root-intended", "engine", "the root file system's mount is written down, not made"),
    Point("create.root", "engine", "the root file system is mounted"),
    Point("create.shared", "engine", "the root file system and volumes are in the share"),
    Point("create.agent", "engine", "the agent has answered for the first time"),
    Point("create.guest", "engine", "the guest is about to be told to make the container"),
    Point("create.guest-made", "engine", "the guest has made the container"),
    Point("create.answer", "engine", "Create is about to be answered"),
    Point("start.request", "engine", "the Start call has arrived"),
    Point("start.guest", "engine", "the guest is about to be told to start the process"),
    Point("start.guest-started", "engine", "the guest has started the process"),
    Point("start.answer", "engine", "Start is about to be answered"),
    Point("exec.request", "engine", "the Exec call has arrived"),
    Point("exec.added", "engine", "the exec is taken down, its streams are open"),
    Point("exec.guest", "engine", "the guest is about to be told to execute"),
    Point("exec.guest-started", "engine", "the guest has executed"),
    Point("exec.answer", "engine", "the exec's Start is about to be answered"),
    Point("exec.ended", "engine", "the exec's end is known, not told"),
    Point("delete.kill", "engine", "the Kill call has arrived"),
    Point("delete.ended", "engine", "the init's end is known, not told"),
    Point("delete.part", "engine", "a part of what was written is carried back", "disks"),
    Point("delete.carried", "engine", "all that was written is carried back, the end is not told", "disks"),
    Point("delete.request", "engine", "the Delete call has arrived"),
    Point("delete.guest", "engine", "the guest is about to be told to remove the container"),
    Point("delete.guest-removed", "engine", "the guest has removed the container"),
    Point("delete.unshared", "engine", "root file system and volumes are taken back"),
    Point("delete.answer", "engine", "Delete is about to be answered"),
    Point("delete.shutdown", "engine", "the Shutdown call has arrived"),
    Point("delete.machine", "engine", "the hypervisor has ended"),
    Point("delete.undo", "engine", "the journal is about to be undone"),
    Point("delete.undone", "engine", "everything is undone, the engine is about to end"),
    Point("clear.request", "shim", "containerd has the dead engine's sandbox cleared up"),
    Point("clear.undone", "shim", "its journal is undone, containerd has not been told"),
]
POINTS += [
    Point("monitor.start", "monitor", "the hypervisor is asked whether its machine runs"),
    Point("monitor.disk", "monitor", "the hypervisor is given the root file system's disk"),
    Point("monitor.disk-taken", "monitor", "the hypervisor is told to let go of it"),
]
POINTS += [
    Point("template.directory", "maker", "a template's directory is there, half made", "making"),
    Point("template.machine", "maker", "the template's machine runs", "making"),
    Point("template.saved", "maker", "the machine is saved, not yet on the disk", "making"),
    Point("template.synced", "maker", "all is on the disk, not under its name", "making"),
    Point("template.named", "maker", "the template has its name", "making"),
    Point("clone.found", "engine", "a template is found, no machine has it", "clone"),
    Point("clone.restored", "engine", "a machine goes on from the template", "clone"),
    Point("clone.agent", "engine", "its agent has answered for the first time", "clone"),
    Point("clone.reseeded", "engine", "its random numbers are its own", "clone"),
]
POINTS += [
    Point("pool.restored", "waiter", "a machine goes on that is to wait", "pool"),
    Point("pool.listening", "waiter", "it waits", "pool"),
    Point("pool.order-received", "waiter", "it has been told whose it is to be", "pool"),
    Point("pool.confirmed", "waiter", "both have said that it is", "pool"),
    Point("pool.given-disks", "waiter", "it has the sandbox's disks", "pool"),
    Point("pool.taken", "waiter", "it is the sandbox's, with its network and files", "pool"),
]
POINTS += [
    Point("create.reserved", "runtime", "the container's id is taken, nothing is recorded", "podman"),
    Point("create.recorded", "runtime", "the container is recorded, its engine is not started", "podman"),
    Point(
        "create.standing", "runtime", "the process that stands for the container runs, unrecorded", "podman"
    ),
    Point("create.asked", "runtime", "the engine is about to be asked for the container", "podman"),
    Point("create.told", "runtime", "the engine has said that it is made", "podman"),
    Point("create.entered", "runtime", "that process has the container's root directory", "podman"),
    Point("create.numbered", "runtime", "its number is in the pid file, the engine is not let go", "podman"),
    Point("create.released", "runtime", "the engine is let go, `create` is about to end", "podman"),
    Point("start.asked", "runtime", "the engine is about to be asked for the start", "podman"),
    Point("start.told", "runtime", "it has said that the process runs", "podman"),
    Point("exec.standing", "runtime", "the process that stands for the exec runs", "podman"),
    Point("exec.asked", "runtime", "the engine is about to be asked for the exec", "podman"),
    Point("exec.told", "runtime", "it has taken the exec down", "podman"),
    Point("exec.start-told", "runtime", "it has said that the exec runs", "podman"),
    Point("exec.numbered", "runtime", "the exec's pid file is written", "podman"),
    Point("delete.kill-asked", "runtime", "the engine is about to be asked for the signal", "podman"),
    Point("delete.kill-told", "runtime", "it has said that the signal is sent", "podman"),
    Point("delete.asked", "runtime", "`delete` has found the container's record", "podman"),
    Point("delete.in-engine", "runtime", "the engine has removed the container, and ends", "podman"),
    Point("delete.removing", "runtime", "all is gone but the record", "podman"),
    Point("delete.half-removed", "runtime", "the record's directory is empty", "podman"),
    Point("delete.removed", "runtime", "the record is gone, `delete` is about to end", "podman"),
    Point("run.waits", "runtime", "`kata-runtime run` waits for the container's end", "run"),
    Point("run.ended", "runtime", "it knows of the end, and is about to delete the container", "run"),
]
PARTS = {
    "cloud-hypervisor": {
        "monitor.start": "vm.info",
        "monitor.disk": "vm.add-disk",
        "monitor.disk-taken": "vm.remove-device",
    },
    "firecracker": {"monitor.start": "/", "monitor.disk": "drives", "monitor.disk-taken": "drives"},
}
"""The parts of each one's API that these ask for; ``/`` is its root alone."""
BY_NAME = {point.name: point for point in POINTS}

_directory = ""


def stop(name: str) -> None:
    """Wait here if somebody has armed this point, until they take it away."""
    path = f"{_directory}/{name}"
    try:
        fd = os.open(path, os.O_WRONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError:
        return  # not armed, or nobody waits for it
    try:
        os.write(fd, f"{os.getpid()}\n".encode())
    finally:
        os.close(fd)
    while os.path.exists(path):
        time.sleep(_POLL_S)


def put_around(owner: Any, name: str, before: str = "", after: str = "") -> None:
    """Put points before and after a function or coroutine of a class or module."""
    import inspect

    original = getattr(owner, name)
    if inspect.iscoroutinefunction(original):

        @functools.wraps(original)
        async def wrapper(*arguments: Any, **options: Any) -> Any:
            if before:
                stop(before)
            result = await original(*arguments, **options)
            if after:
                stop(after)
            return result

    else:

        @functools.wraps(original)
        def wrapper(*arguments: Any, **options: Any) -> Any:
            if before:
                stop(before)
            result = original(*arguments, **options)
            if after:
                stop(after)
            return result

    setattr(owner, name, wrapper)


def install(directory: str, where: str) -> None:
    """Put the points in.

    Args:
        directory: Where they are armed.
        where: ``shim``, ``engine``, ``maker``, ``runtime`` or ``waiter``.
    """
    global _directory
    _directory = directory
    ways = {
        "shim": _install_shim,
        "engine": _install_engine,
        "maker": _install_maker,
        "runtime": _install_runtime,
        "waiter": _install_waiter,
    }
    ways[where]()


def _install_maker() -> None:
    from kata.engine.factory import maker
    from kata.hypervisor.qemu.monitor import QemuMonitor

    put_around(maker, "_in_a_child", "template.directory", "template.saved")
    put_around(QemuMonitor, "start", after="template.machine")
    put_around(maker, "_to_disk", after="template.synced")
    put_around(maker, "_make", after="template.named")


def _install_waiter() -> None:
    from kata.engine.factory import waiting, waiting_machine
    from kata.engine.lifecycle import boot

    put_around(waiting.Keeper, "start", after="pool.restored")
    put_around(waiting.Keeper, "_listen", after="pool.listening")
    put_around(waiting._Order, "receive", after="pool.order-received")
    put_around(waiting, "_become", before="pool.confirmed")
    put_around(waiting_machine.Waiting, "give", after="pool.given-disks")
    put_around(boot, "power_on", after="pool.taken")


def _install_shim() -> None:
    from kata.shim import delete, start

    _install_launch()
    put_around(start, "_write_address", after="create.address")
    put_around(delete, "delete", before="clear.request", after="clear.undone")


def _install_runtime() -> None:
    from faults import oci_points

    _install_launch()
    oci_points.install()


def _install_launch() -> None:
    """Points of who starts an engine."""
    from kata import journal
    from kata.engine import launch

    create_dir = journal.Journal.create_dir.__func__  # type: ignore[attr-defined]

    def created(cls: type, *arguments: Any, **options: Any) -> Any:
        made = create_dir(cls, *arguments, **options)
        stop("create.directory")
        return made

    journal.Journal.create_dir = classmethod(created)  # type: ignore[assignment]
    put_around(launch, "listen", after="create.socket")
    put_around(launch, "_spawn", after="create.engine")


def _install_engine() -> None:
    from kata import journal
    from kata.engine.lifecycle import boot, volumes
    from kata.resources import host_cgroup

    put_around(journal.Journal, "set_owner", after="create.owner")
    put_around(volumes, "own_namespace", after="create.namespace")
    put_around(volumes.Share, "prepare", after="create.share")
    put_around(boot, "limit", after="create.limited")
    put_around(importlib.import_module(MONITORS[hypervisor()]), "spawn", after="create.machine")
    put_around(host_cgroup, "_make_parent", before="create.cgroup-intended")
    _journal_points(journal.Journal)
    power_on = boot.power_on

    @functools.wraps(power_on)
    def powered_on(settings: Any, run_dir: str, *more: Any) -> Any:
        from kata.hypervisor import virtiofsd

        put_around(virtiofsd.FileServer, "start", after="create.files")
        if hypervisor() == "qemu":
            from kata.hypervisor.qemu.monitor import QemuMonitor

            put_around(QemuMonitor, "restore", "clone.found", "clone.restored")
        if settings.network.mode == "netns":
            from kata.network import netns

            put_around(netns.NetnsPlan, "setup_nics", after="create.network")
        try:
            return power_on(settings, run_dir, *more)
        finally:
            # What these need is imported while the machine boots, with and without them.
            _install_serving_engine()

    boot.power_on = powered_on  # type: ignore[assignment]


def _journal_points(journal: Any) -> None:
    """Points that only the journal's parameters tell from each other."""
    begin, commit = journal.begin, journal.commit

    @functools.wraps(begin)
    def intended(self: Any, kind: str, **params: Any) -> Any:
        entry = begin(self, kind, **params)
        if kind == "content":
            stop("create.disk-intended")
        elif kind == "redirect":
            stop("create.redirect-intended")
        elif kind == "mount" and params["fstype"] != "none":
            stop("create.root-intended")
        elif kind == "process" and params.get("role") == hypervisor():
            stop("create.machine-intended")
        return entry

    @functools.wraps(commit)
    def was_made(self: Any, entry: Any, **identity: Any) -> None:
        if entry.kind == "cgroup":
            stop("create.cgroup-made")
        commit(self, entry, **identity)
        if entry.kind == "process" and entry.params.get("role") == hypervisor():
            stop("create.machine-gate")

    journal.begin, journal.commit = intended, was_made


def _install_serving_engine() -> None:
    import sys

    sys.modules["ssl"] = None  # type: ignore[assignment]  # as the engine does before it imports asyncio
    from kata.agent.client import AgentClient
    from kata.engine.containers import binds, hostroot, snapshot_root
    from kata.engine.containers.container_parts import ContainerParts
    from kata.engine.containers.process_end import EndOfProcesses
    from kata.engine.lifecycle import guest_setup
    from kata.engine.lifecycle.teardown import Teardown
    from kata.engine.services.task_service import TaskService
    from kata.hypervisor.running import Running
    from kata.storage import upper

    put_around(snapshot_root.LayerDisks, "image", after="create.image")
    put_around(snapshot_root.SnapshotRoot, "_make_disk", after="create.disk")
    put_around(upper.UpperLayer, "add", after="delete.part")
    put_around(snapshot_root.SnapshotRoot, "carry_back", after="delete.carried")
    put_around(guest_setup, "_answered", after="create.agent")
    put_around(AgentClient, "reseed", "clone.agent", "clone.reseeded")
    put_around(hostroot.HostRoot, "mount", after="create.root")
    put_around(binds.ContainerMounts, "add_all", after="create.shared")
    put_around(AgentClient, "create_container", "create.guest", "create.guest-made")
    put_around(AgentClient, "start_container", "start.guest", "start.guest-started")
    put_around(AgentClient, "exec_process", "exec.guest", "exec.guest-started")
    put_around(AgentClient, "remove_container", "delete.guest", "delete.guest-removed")
    put_around(ContainerParts, "_remove_shared", after="delete.unshared")
    put_around(TaskService, "Create", "create.request", "create.answer")
    put_around(TaskService, "Exec", "exec.request", "exec.added")
    put_around(TaskService, "Kill", "delete.kill")
    put_around(TaskService, "Delete", "delete.request", "delete.answer")
    put_around(TaskService, "Shutdown", "delete.shutdown")
    put_around(Running, "stop", after="delete.machine")
    put_around(Teardown, "_undo", "delete.undo", "delete.undone")
    _ends(EndOfProcesses)
    _starts(TaskService)


def _ends(ends: Any) -> None:
    ended = ends._ended

    @functools.wraps(ended)
    async def has_ended(self: Any, process: Any, *more: Any) -> None:
        stop("exec.ended" if process.exec_id else "delete.ended")
        await ended(self, process, *more)

    ends._ended = has_ended


def _starts(service: Any) -> None:
    start: Callable[..., Any] = service.Start

    @functools.wraps(start)
    async def starting(self: Any, request: Any, context: Any) -> Any:
        if not request.exec_id:
            stop("start.request")
        answer = await start(self, request, context)
        stop("exec.answer" if request.exec_id else "start.answer")
        return answer

    service.Start = starting
