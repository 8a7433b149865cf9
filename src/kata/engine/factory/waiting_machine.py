"""A machine that waited for a sandbox (`kata.engine.factory.waiting`), as the start of that sandbox sees it."""

from __future__ import annotations

from kata.errors import HypervisorError, KataError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Sequence

    from kata.hypervisor.base import Disk, MachineShape
    from kata.hypervisor.protocols import Machine, Started
    from kata.journal import Journal
    from kata.ttrpc.client import Client

END_S = 5.0
"""How long one that was killed is waited for."""
ADOPT_S = 5.0
"""How long a machine may take to be given a sandbox's disks, and its agent to answer."""


class Waiting:
    """A machine that waited for a sandbox, as the start of that sees it.

    Args:
        started: The machine.
        vm: The same, in the event loop.
        client: The connection to its agent.
        shape: What it is.
        key: That of its template.
        journal: Of what it has on the host.

    Attributes:
        reason: Why it is not used; empty as long as it can be.
    """

    __slots__ = ("_gone", "client", "journal", "key", "reason", "shape", "started", "vm")

    def __init__(
        self, started: Started, vm: Machine, client: Client, shape: MachineShape, key: str, journal: Journal
    ) -> None:
        self.started = started
        self.vm = vm
        self.client = client
        self.shape = shape
        self.key = key
        self.journal = journal
        self.reason = ""
        self._gone = False

    def fits(self, key: str) -> bool:
        """Whether it is what has this template; if not, or if it has ended, that is the reason."""
        if not self.reason and key != self.key:
            self.reason = "the machine that waited is another one"
        if not self.reason and self.started.status() is not None:
            self.reason = "the machine that waited has ended"
        return not self.reason

    def discard(self) -> None:
        """End it, and leave nothing. Blocks. Idempotent."""
        if self._gone:
            return
        self._gone = True
        from kata import journal_undo

        self.client.close()
        self.started.kill()
        self.started.status(END_S)
        self.vm.close()
        journal_undo.undo(self.journal)

    async def give(
        self, disks: Sequence[Disk | None], run_dir: str, sandbox_id: str, console_path: str
    ) -> None:
        """Give it what is a sandbox's. If that fails it is not used, and says why.

        Args:
            disks: See `kata.hypervisor.protocols.Machine.fill_disks`.
            run_dir: See there.
            sandbox_id: See there.
            console_path: See `kata.hypervisor.protocols.Machine.move_console`.
        """
        import asyncio

        from kata.agent.client import AgentClient

        try:
            filling = self.vm.fill_disks(disks, run_dir, sandbox_id)
            answers = AgentClient(self.client).check(ADOPT_S)
            await asyncio.wait_for(asyncio.gather(filling, answers), ADOPT_S)
            self.vm.move_console(console_path)
        except (KataError, TimeoutError) as error:
            said = error.message if isinstance(error, HypervisorError) else "it did not answer"
            self.reason = f"the machine that waited could not be given to it: {said}"
