#!/usr/bin/python3 -IS
"""A hypervisor that is none: its machines are the agent as an ordinary process, in namespaces of its own.

It is registered from outside (`main`), and shows that a monitor needs nothing of the product but the seam. The agent
is reached by a unix socket; disks are loop devices of this host; there is no network, no share and no console.

As a program it is kata: ``scripted_monitor.py run ...``, its engines included, with this monitor offered beside the
others. ``scripted_monitor.py guest ...`` is process 1 of such a machine.
"""

from __future__ import annotations

import os
import sys

if __name__ == "__main__":
    sys.path.append(os.path.join(os.path.dirname(os.path.realpath(__file__)), "..", "..", "src"))

from kata import children, paths, sysio
from kata.errors import GuestAssetError, HypervisorError, KataError, UnsupportedError, VMLostError
from kata.hypervisor.base import Capabilities, Check, MonitorBase
from kata.hypervisor.channel import UnixChannel

TYPE_CHECKING = False
if TYPE_CHECKING:
    import asyncio
    from collections.abc import Callable, Mapping, Sequence
    from typing import Any

    from kata.hypervisor.base import Attachments, Disk, DiskError, Ended, MachineShape, Nic
    from kata.hypervisor.channel import Channel
    from kata.hypervisor.protocols import Started
    from kata.journal import Journal

NAME = "scripted"
DISK_SLOTS = 6
_SETTIMEOFDAY = {"x86_64": 164, "aarch64": 170}


class Loop:
    """A loop device for a disk's file. It goes by itself with its last user. Source: loop(4), ``linux/loop.h``.

    Args:
        disk: The disk.
    """

    def __init__(self, disk: Disk) -> None:
        import fcntl
        import struct

        try:
            file = os.open(disk.path, (os.O_RDONLY if disk.readonly else os.O_RDWR) | os.O_CLOEXEC)
        except OSError as error:
            raise HypervisorError(f"cannot use the disk image {disk.path}: {error.strerror}") from error
        control = os.open("/dev/loop-control", os.O_RDWR | os.O_CLOEXEC)
        try:
            while True:
                number = fcntl.ioctl(control, 0x4C82)  # LOOP_CTL_GET_FREE
                self.path = f"/dev/loop{number}"
                self._fd = sysio.Fd(os.open(self.path, os.O_RDWR | os.O_CLOEXEC))
                flags = 4 | int(disk.readonly)  # LO_FLAGS_AUTOCLEAR, LO_FLAGS_READ_ONLY
                # struct loop_config: fd, block size, struct loop_info64 (flags at 52 of 232 bytes), reserved.
                config = struct.pack("II52xI176x64x", file, 0, flags)
                try:
                    fcntl.ioctl(self._fd.raw, 0x4C0A, config)  # LOOP_CONFIGURE
                except BlockingIOError:
                    self._fd.close()
                except OSError as error:
                    self._fd.close()
                    if error.errno != 16:  # EBUSY: somebody was faster
                        raise HypervisorError(f"cannot use {disk.path}: {error.strerror}") from error
                else:
                    break
        finally:
            os.close(control)
            os.close(file)

    def close(self) -> None:
        """Let it go."""
        self._fd.close()


class ScriptedStarted:
    """`kata.hypervisor.protocols.Started`."""

    share_tag = ""
    extra_memory_mib = 0
    nic_addresses: Sequence[str] = ()

    def __init__(
        self, child: children.Child, tail: children.StderrTail, socket: str, loops: list[Loop]
    ) -> None:
        self.child = child
        self.loops = loops
        self.disk_addresses: Sequence[str] = [loop.path for loop in loops]
        self._channel = UnixChannel(socket)
        self._tail = tail

    @property
    def pid(self) -> int:
        return self.child.pid

    @property
    def channel(self) -> Channel:
        return self._channel

    def complete(self) -> None:
        pass

    def give_agent(self, words: bytes) -> bool:
        return False

    def take_console(self) -> sysio.Fd | None:
        return None

    def said(self) -> str:
        self._tail.read()
        return self._tail.text().strip()

    def failure(self) -> KataError | None:
        status = self.child.poll()
        if not status:
            return None
        said = self.said()
        return HypervisorError(
            f"the scripted machine {children.ending(status)}" + (f": {said}" if said else "")
        )

    def status(self, wait_s: float = 0.0) -> int | None:
        return self.child.wait(wait_s) if wait_s > 0 else self.child.poll()

    def kill(self) -> None:
        self.child.kill()

    def close(self) -> None:
        for loop in self.loops:
            loop.close()
        self.loops.clear()
        self._tail.close()
        if self.child.poll() is not None:
            self.child.close()


class ScriptedMachine:
    """`kata.hypervisor.protocols.Machine`."""

    version = "1"

    def __init__(self, started: ScriptedStarted) -> None:
        import asyncio

        self.extra_memory_mib = 0
        self._started = started
        self._stopping = False
        self._attached: dict[str, Loop] = {}
        self._loop = asyncio.get_running_loop()
        self._ended: asyncio.Future[Ended] = self._loop.create_future()
        self._loop.add_reader(started.child.pidfd, self._on_exit)

    @property
    def pid(self) -> int:
        return self._started.pid

    @property
    def channel(self) -> Channel:
        return self._started.channel

    def _on_exit(self) -> None:
        from kata.hypervisor.base import Ended

        status = self._started.child.poll()
        if status is None:
            return
        self._loop.remove_reader(self._started.child.pidfd)
        if self._stopping:
            ended = Ended(status, "stopped", None)
        elif status == 0:
            ended = Ended(0, "poweroff", VMLostError("the virtual machine was switched off from inside"))
        else:
            failed = self._started.failure()
            assert failed is not None
            ended = Ended(status, "crashed", VMLostError(f"the virtual machine ended: {failed.message}"))
        self._ended.set_result(ended)

    async def wait(self) -> Ended:
        import asyncio

        return await asyncio.shield(self._ended)

    async def stop(self, grace_s: float = 0.0) -> Ended:
        self._stopping = True
        self._started.kill()
        return await self.wait()

    async def confined(self) -> None:
        pass

    async def pause(self) -> None:
        raise UnsupportedError("scripted machines cannot be paused")

    async def resume(self) -> None:
        raise UnsupportedError("scripted machines cannot be paused")

    async def save(self, directory: str) -> None:
        raise UnsupportedError("scripted machines cannot be saved")

    async def set_memory(self, plugged_mib: int) -> int:
        raise UnsupportedError("scripted machines keep their memory")

    async def set_balloon(self, mib: int) -> int:
        raise UnsupportedError("scripted machines keep their memory")

    async def attach_disk(self, disk: Disk) -> str:
        loop = Loop(disk)
        self._attached[loop.path] = loop
        return loop.path

    async def fill_disks(self, disks: Sequence[Disk | None], run_dir: str, sandbox_id: str) -> None:
        raise UnsupportedError("scripted machines do not wait")

    async def insert_nic(self) -> tuple[int, str]:
        raise UnsupportedError("it does not wait for sandboxes")

    def move_console(self, path: str) -> None:
        pass

    async def detach_disk(self, address: str) -> None:
        if address not in self._attached:
            raise HypervisorError(f"there is no disk at {address}")
        self._attached.pop(address).close()

    async def attach_nic(self, index: int, nic: Nic) -> str:
        raise UnsupportedError("scripted machines have no network")

    def console_tail(self, limit: int = 4096) -> str:
        return self._started.said()[-limit:]

    async def processors(self) -> list[str]:
        return []

    async def metrics(self) -> dict[str, int]:
        return {}

    async def counters(self) -> dict[str, dict[str, int]]:
        return {}

    def on_disk_error(self, callback: Callable[[DiskError], None]) -> None:
        pass  # a loop device tells nobody

    def on_traffic(self, callback: Callable[[str, bytes], None] | None) -> None:
        pass  # there is neither a monitor nor a console that would say something

    def close(self) -> None:
        for loop in self._attached.values():
            loop.close()
        self._started.close()


class ScriptedMonitor(MonitorBase):
    """`kata.hypervisor.protocols.Monitor`."""

    name = NAME
    title = "The scripted monitor"
    accelerators: tuple[str, ...] = ("kvm", "tcg")

    def capabilities(self, accel: str, options: Mapping[str, Any], *, bounces: bool = True) -> Capabilities:
        return Capabilities(disk_slots=DISK_SLOTS, attach_disk=True)

    def options(self, configuration: Mapping[str, Any], origin: Callable[[str], str]) -> dict[str, Any]:
        return {"path": configuration["path"]} if configuration.get("path") else {}

    def host_overhead_mib(self, accel: str) -> int:
        return 64

    def start(self, shape: MachineShape, attachments: Attachments, journal: Journal) -> ScriptedStarted:
        for path in (shape.kernel, shape.initrd):
            if not os.path.exists(path):
                raise GuestAssetError(f"cannot read {path}: it does not exist", "kata guest build")
        agent = dict(shape.options).get("path") or paths.agent_binary()
        socket = os.path.join(attachments.run_dir, "agent.sock")
        loops: list[Loop] = []
        tail = children.StderrTail()
        journal.begin("socket", path=socket)
        try:
            loops += [Loop(disk) for disk in attachments.disks if disk is not None]
            child = children.spawn(
                [sys.executable, "-I", "-S", os.path.realpath(__file__), "guest", str(agent), socket],
                journal,
                NAME,
                stdout=tail.write_fd,
                stderr=tail.write_fd,
                namespaces=sysio.CLONE_NEWPID | sysio.CLONE_NEWNS | sysio.CLONE_NEWIPC,
            )
        except BaseException as error:
            for loop in loops:
                loop.close()
            tail.close()
            if isinstance(error, OSError):
                raise HypervisorError(f"cannot start the scripted machine: {error.strerror}") from error
            raise
        finally:
            tail.started()
            attachments.close()
        return ScriptedStarted(child, tail, socket, loops)

    def adopt(self, started: Started, journal: Journal, console_path: str = "") -> ScriptedMachine:
        if not isinstance(started, ScriptedStarted):
            raise TypeError(started)
        return ScriptedMachine(started)

    def program(self, options: Mapping[str, Any]) -> str:
        return str(options.get("path", "")) or paths.agent_binary()

    def version(self, options: Mapping[str, Any]) -> str:
        return "1"

    def arguments(self, run_dir: str) -> list[tuple[str, str]]:
        return []

    def checks(self, options: Mapping[str, Any]) -> list[Check]:
        return [Check(NAME, True, "is always there")]


MONITOR = ScriptedMonitor()


def guest(agent: str, socket: str) -> int:
    """Process 1 of a machine: make it look like one, and run the agent to its end."""
    sysio.unshare(0x04000000 | sysio.CLONE_NEWNET)  # CLONE_NEWUTS
    sysio.mount(None, "/", None, sysio.MS_REC | sysio.MS_PRIVATE)
    sysio.mount("proc", "/proc", "proc", 0)
    sysio.mount("tmpfs", "/run", "tmpfs", 0)
    _leave_the_clock_alone()
    child = os.fork()
    if child == 0:
        os.execv(agent, [agent, "--server", f"unix://{socket}", "--log", "error"])
    while True:
        pid, status = os.wait()  # also for processes that have lost their parent
        if pid == child:
            return os.waitstatus_to_exitcode(status) & 0xFF


def _leave_the_clock_alone() -> None:
    """settimeofday(2) does nothing from here on: the time is the host's. Source: seccomp(2)."""
    import ctypes
    import struct

    number = _SETTIMEOFDAY[os.uname().machine]
    program = b"".join(
        struct.pack("HBBI", *step)
        for step in (
            (0x20, 0, 0, 0),  # the number of the system call
            (0x15, 0, 1, number),
            (0x06, 0, 0, 0x00050000),  # SECCOMP_RET_ERRNO, of no error
            (0x06, 0, 0, 0x7FFF0000),  # SECCOMP_RET_ALLOW
        )
    )
    code = ctypes.create_string_buffer(program, len(program))
    header = ctypes.create_string_buffer(struct.pack("HxxxxxxP", len(program) // 8, ctypes.addressof(code)))
    if ctypes.CDLL(None, use_errno=True).prctl(22, 2, ctypes.byref(header), 0, 0):  # PR_SET_SECCOMP, FILTER
        raise OSError(ctypes.get_errno(), "seccomp")


def main() -> int:
    """kata, with this monitor offered, for the engines that it starts as well."""
    from kata import __main__ as kata
    from kata import launcher
    from kata.hypervisor import registry

    registry.register(NAME, lambda: MONITOR)
    launcher.command = lambda: [sys.executable, "-I", "-S", os.path.realpath(__file__)]
    return kata.main()


if __name__ == "__main__":
    sys.exit(guest(*sys.argv[2:]) if sys.argv[1:2] == ["guest"] else main())
