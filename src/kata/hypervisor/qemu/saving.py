"""A machine of QEMU's that is saved into files, and one that goes on from them.

What is saved is QEMU's migration stream in a file (``docs/devel/migration`` of QEMU). A machine that was started to be
saved (`kata.hypervisor.base.Attachments.saves_into`) has its memory in a file from the start: then the stream has the
devices alone (``x-ignore-shared``), and whoever goes on from it maps that file privately.

`restoring` is for the start, before asyncio is imported: all that QEMU is to be told is in its control channel before
it runs, so that it goes on by itself.
"""

from __future__ import annotations

import errno
import os

from kata import sysio
from kata.errors import HypervisorError, SavedMachineError
from kata.hypervisor.qemu import slots
from kata.json_text import dumps
from kata.sysio import Fd

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any, Protocol

    from kata.hypervisor.qemu.settings import VMSettings

    class Commands(Protocol):
        """A machine that is saved."""

        settings: VMSettings

        @property
        def version(self) -> str:
            """See `kata.hypervisor.qemu.machine.Qemu.version`."""

        async def command(
            self, name: str, arguments: dict[str, Any] | None = None, fd: int | None = None
        ) -> Any:
            """See `kata.hypervisor.qemu.machine.Qemu.command`."""


STATE, MEMORY = FILES = ("state", "memory")
_SET = "migrate-set-capabilities"
_IGNORES_SHARED = {"capabilities": [{"capability": "x-ignore-shared", "state": True}]}
_BANDWIDTH = 1 << 40
"""Bytes a second: not to be slowed down. By default it is that of a slow network."""
_POLL_S = 0.005
_CUT_OFF = 255
"""Exit status of a `Filling` whose source has ended early; others are numbers of errors."""
_SAVE_S, _SAVE_MIB_PER_S = 30.0, 20.0
"""A slower disk is no disk to save machines to."""


class Saved:
    """Files of a saved machine, opened.

    Args:
        directory: What it was saved into.
        by_file: Its memory has to be a file of its own.

    Attributes:
        state: Its devices, and its memory where that has no file of its own.
        memory: That file, open for reading; None without.

    Raises:
        SavedMachineError: They cannot be opened.
    """

    __slots__ = ("memory", "state")

    def __init__(self, directory: str, *, by_file: bool = False) -> None:
        self.memory: Fd | None = None
        name = STATE
        try:
            # One directory for both, whatever takes its name meanwhile.
            with Fd(os.open(directory, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)) as place:
                self.state = Fd(os.open(name, os.O_RDONLY | os.O_CLOEXEC, dir_fd=place.raw))
                name = MEMORY
                try:
                    self.memory = Fd(os.open(name, os.O_RDONLY | os.O_CLOEXEC, dir_fd=place.raw))
                except FileNotFoundError:
                    if by_file:
                        raise
        except OSError as error:
            if name == MEMORY:
                self.state.close()
            raise SavedMachineError(
                f"cannot use the machine saved in {directory}: {error.strerror}: {name}"
            ) from error

    def close(self) -> None:
        """Close what nobody took. Idempotent."""
        self.state.close()
        if self.memory is not None:
            self.memory.close()


def file_like(memory: Fd) -> Fd:
    """A file in memory, as large as another and empty."""
    made = Fd(os.memfd_create("guest-memory"))
    os.truncate(made.raw, os.fstat(memory.raw).st_size)
    return made


def fill(target: Fd, memory: Fd) -> None:
    """Copy a file of a guest's memory, which is a hole for the most part, into one of `file_like`.

    Raises:
        SavedMachineError: It was cut off.
        HypervisorError: There is no room.
    """
    try:
        size = os.fstat(memory.raw).st_size
        end = 0
        while end < size:
            try:
                place = os.lseek(memory.raw, end, os.SEEK_DATA)
            except OSError:  # nothing but a hole behind
                return
            end = os.lseek(memory.raw, place, os.SEEK_HOLE)
            os.lseek(target.raw, place, os.SEEK_SET)
            while place < end:
                done = os.sendfile(target.raw, memory.raw, place, end - place)
                if not done:
                    raise SavedMachineError("the memory of a saved machine was cut off")
                place += done
    except OSError as error:
        raise HypervisorError(f"cannot copy the memory of a saved machine: {error.strerror}") from error


class Filling:
    """A process that copies a guest's memory (`fill`) while the hypervisor is started, and then tells that to go on.

    It is a process since the copy is a thousand calls, between which a thread would wait for the interpreter's lock.

    Args:
        target: See `fill`.
        memory: See `fill`.
        channel: Our end of QEMU's control channel.
        words: What is written to it when the memory is there.

    Raises:
        HypervisorError: It cannot be started.
    """

    __slots__ = ("_pid",)

    def __init__(self, target: Fd, memory: Fd, channel: int, words: bytes) -> None:
        parent = os.getpid()
        sysio.preload()
        try:
            self._pid = os.fork()
        except OSError as error:
            raise HypervisorError(f"cannot copy the memory of a saved machine: {error.strerror}") from error
        if self._pid:
            return
        try:
            sysio.die_with_parent(parent)
            fill(target, memory)
            sysio.write_all(channel, words)
            os._exit(0)
        except SavedMachineError:
            os._exit(_CUT_OFF)
        except HypervisorError as error:
            cause = error.__cause__
            os._exit((isinstance(cause, OSError) and cause.errno) or errno.EIO)
        finally:
            os._exit(errno.EIO)

    def wait(self) -> None:
        """Wait for its end. Idempotent.

        Raises:
            SavedMachineError: See `fill`.
            HypervisorError: See `fill`, or it was killed.
        """
        if not self._pid:
            return
        pid, self._pid = self._pid, 0
        status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        if status == _CUT_OFF:
            raise SavedMachineError("the memory of a saved machine was cut off")
        if status:
            reason = os.strerror(status) if status > 0 else "the process that does was killed"
            raise HypervisorError(f"cannot copy the memory of a saved machine: {reason}")

    def abandon(self) -> None:
        """End it, whatever it has done. Idempotent."""
        if self._pid:
            os.kill(self._pid, sysio.SIGKILL)
            os.waitpid(self._pid, 0)
            self._pid = 0


def has_file_uris(version: str) -> bool:
    """Whether a QEMU of this version is told of files as ``file:``; of a descriptor alone (``fd:``) it takes files no
    more (11.1). Older ones take a descriptor, and 7.2 that alone.
    """
    major = version.partition(".")[0]
    return major.isdecimal() and int(major) >= 10


def incoming_uri(state: int, *, in_set: bool) -> str:
    """What a QEMU is told of the file from which it goes on.

    Args:
        state: Number of the descriptor in QEMU.
        in_set: It is in the set of descriptors `kata.hypervisor.qemu.slots.INCOMING_SET`.
    """
    return f"file:/dev/fdset/{slots.INCOMING_SET}" if in_set else f"fd:{state}"


def restoring(uri: str, *, has_memory: bool) -> tuple[bytes, list[str]]:
    """What a QEMU is told that goes on from where a machine was saved.

    Args:
        uri: What was saved: `incoming_uri`.
        has_memory: The guest's memory has a file of its own.

    Returns:
        The commands, for its control channel, numbered from 1; and their names.
    """
    # Nobody is to be told that the machine has moved: its interfaces get other addresses. Once, at once, is while their
    # links are down.
    quiet = {"execute": "migrate-set-parameters", "arguments": {"announce-rounds": 1}}
    commands: list[dict[str, Any]] = [{"execute": "qmp_capabilities"}, quiet]
    if has_memory:
        commands.append({"execute": _SET, "arguments": _IGNORES_SHARED})
    commands.append({"execute": "migrate-incoming", "arguments": {"uri": uri}})
    # While it loads that says that the machine is to run then.
    commands.append({"execute": "cont"})
    lines = [dumps({**command, "id": number}) for number, command in enumerate(commands, 1)]
    return "\n".join([*lines, ""]).encode(), [command["execute"] for command in commands]


async def save(machine: Commands, directory: str) -> None:
    """Save a paused machine.

    Args:
        machine: The machine.
        directory: An existing directory in which nothing was saved before; that of `Attachments.saves_into` has the
            machine's memory already.

    Raises:
        UnsupportedError: It has a device that cannot be saved.
        HypervisorError: It is not paused, something was saved there before, or there is no room. What was written is
            removed.
    """
    import asyncio

    from kata.errors import UnsupportedError
    from kata.hypervisor import saved

    settings = machine.settings
    by_file = settings.memory is not None and settings.saves_into == os.path.abspath(directory)
    saved.check(directory, (STATE,) if by_file else FILES)
    if settings.share_fd is not None:
        raise UnsupportedError(
            "a machine that shares files by virtio-fs cannot be saved by QEMU: vhost-user-fs"
        )
    if settings.mapped_mib and not by_file:
        raise UnsupportedError("a machine that maps its image cannot be saved by QEMU: virtio-pmem")
    if settings.shape is None:
        raise HypervisorError("cannot save the machine: it is not known what machine it is")
    status = (await machine.command("query-status")).get("status")
    if status not in ("paused", "postmigrate"):
        raise HypervisorError(f"cannot save the machine: it is {status}", "Is it paused?")
    path = os.path.join(directory, STATE)
    try:
        fd = await asyncio.to_thread(
            os.open, path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600
        )
    except OSError as error:
        raise HypervisorError(f"cannot write {path}: {error.strerror}") from error
    try:
        with Fd(fd) as file:
            await _links(machine, up=False)  # whoever goes on has other interfaces behind them
            try:
                await _write(machine, file, by_file=by_file)
            finally:
                await _links(machine, up=True)
        await asyncio.to_thread(saved.write_shape, directory, settings.shape)
    except BaseException:
        saved.forget(directory, (STATE,))
        raise


async def _links(machine: Commands, *, up: bool) -> None:
    """Have the links of the machine's interfaces up or down, as far as they lead somewhere."""
    for index, nic in enumerate(machine.settings.nics()):
        if nic.backend:
            await machine.command("set_link", {"name": f"nic{index}", "up": up})


async def _write(machine: Commands, file: Fd, *, by_file: bool) -> None:
    if by_file:
        await machine.command(_SET, _IGNORES_SHARED)
    await machine.command("migrate-set-parameters", {"max-bandwidth": _BANDWIDTH})
    if not has_file_uris(machine.version):
        await machine.command("getfd", {"fdname": "save"}, fd=file.raw)
        await machine.command("migrate", {"uri": "fd:save"})
        await _wait(machine)
        return
    number = int((await machine.command("add-fd", fd=file.raw))["fdset-id"])
    try:
        await machine.command("migrate", {"uri": f"file:/dev/fdset/{number}"})
        await _wait(machine)
    finally:
        await machine.command("remove-fd", {"fdset-id": number})


async def _wait(machine: Commands) -> None:
    """Return once the machine is saved.

    Raises:
        HypervisorError: It could not be.
    """
    import asyncio
    import time

    until = time.monotonic() + _SAVE_S + machine.settings.max_memory_mib / _SAVE_MIB_PER_S
    while time.monotonic() < until:
        said = await machine.command("query-migrate")
        status = said.get("status")
        if status == "completed":
            return
        if status in ("failed", "cancelled"):
            words = said.get("error-desc") or "QEMU does not say why"
            raise HypervisorError(f"cannot save the machine: {words}")
        await asyncio.sleep(_POLL_S)
    await machine.command("migrate_cancel")
    raise HypervisorError("cannot save the machine: it took too long")
