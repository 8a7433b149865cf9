"""Talking to a monitor whose program may be a scripted one: machines of it that need no guest to run."""

from __future__ import annotations

import contextlib
import os
import types
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

from hypervisor_lab import Lab, descriptors, tap

from kata import journal_undo
from kata.hypervisor.base import Attachments, Disk, Nic
from kata.journal import Journal

TYPE_CHECKING = False
if TYPE_CHECKING:
    from kata.hypervisor.protocols import Monitor

MIB = 1 << 20


class Talk(Lab):
    """A program, and the files that its machines are made of.

    Args:
        monitor: The monitor that the program stands for.
        program: Its path.
        directory: For everything.
        real: A guest that boots; otherwise its files are just files.
    """

    def __init__(self, monitor: Monitor, program: str, directory: Path, real: Any = None) -> None:
        directory.mkdir(parents=True)
        self.disk = directory / "disk.img"
        with self.disk.open("wb") as file:
            file.truncate(MIB)
        self.program = program
        self.kernel = directory / "kernel"
        self.kernel.write_bytes(b"kernel")
        guest: Any = types.SimpleNamespace(kernel=str(self.kernel), initrd=str(self.kernel))
        super().__init__(monitor, real or guest, str(self.disk), directory)
        self.accel = "kvm"

    @contextlib.asynccontextmanager
    async def talk(
        self, parameters: str = "", nics: int = 0, saved: str = "", disks: int = 1, **changes: Any
    ) -> AsyncIterator[Any]:
        """A machine of it; what is left afterwards fails the test.

        Args:
            parameters: The kernel's, by which a scripted program is told to misbehave.
            nics: How many interfaces with taps it has.
            saved: Where it was saved, of one that goes on.
            disks: How many disks it has.
            changes: Of its shape.
        """
        journal = Journal.create_dir(str(self.directory / "sandboxes"), f"m{os.getpid()}", {"test": "talk"})
        run_dir = os.path.dirname(journal.path)
        before = descriptors()
        shape = self.shape(parameters=parameters, options={"path": self.program}, nics=nics, **changes)
        attachments = Attachments(
            sandbox_id="talk",
            run_dir=run_dir,
            disks=[Disk(str(self.disk), readonly=True)] * disks,
            nics=[Nic(f"02:00:00:00:00:0{index}", tap_fd=tap(f"t{index}")) for index in range(nics)],
        )
        machine = None
        try:
            if saved:
                started = self.monitor.restore(saved, attachments, journal)
            else:
                started = self.monitor.start(shape, attachments, journal)
            machine = self.monitor.adopt(started, journal)
            yield machine
        finally:
            if machine is not None:
                await machine.stop()
                machine.close()
            assert journal_undo.undo(journal, 10) == []
            assert descriptors() - before == set()
            assert not os.path.exists(run_dir)
