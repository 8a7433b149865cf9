"""A machine that waited for a sandbox (`kata.engine.factory.waiting`), as the start of that sandbox sees it."""

from __future__ import annotations

import os

from kata import sysio
from kata.errors import HypervisorError, KataError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Sequence

    from kata.agent.client import AgentClient
    from kata.engine.factory.template import Template
    from kata.engine.lifecycle.volumes import Share
    from kata.hypervisor.base import Disk, MachineShape
    from kata.hypervisor.protocols import Machine, Started
    from kata.hypervisor.virtiofsd import FileServer
    from kata.journal import Journal
    from kata.network.netns import SpareTap
    from kata.network.user import NetworkPlan

END_S = 5.0
"""How long one that was killed is waited for."""
ADOPT_S = 5.0
"""How long a machine may take to be given a sandbox's disks, and its agent to answer."""


class Surroundings:
    """What a machine that waits has on the host beside its monitor, and where its engine is to be. Made by the only
    thread, where an engine is before its start.

    Attributes:
        share: What it sees of the host, which is nothing yet; None without a share.
        files: What serves that.
        spare: Its tap, where its interface leads to one.
    """

    __slots__ = ("_mounts", "_network", "files", "share", "spare")

    def __init__(self) -> None:
        flags = os.O_RDONLY | os.O_CLOEXEC
        self._mounts = sysio.Fd(os.open("/proc/self/ns/mnt", flags))
        self._network = sysio.Fd(os.open("/proc/self/ns/net", flags))
        self.share: Share | None = None
        self.files: FileServer | None = None
        self.spare: SpareTap | None = None

    def leave(self) -> None:
        """Go back where an engine is before its start. As the only thread.

        Raises:
            OSError: The kernel refused.
        """
        if os.stat("/proc/self/ns/net").st_ino != os.fstat(self._network.raw).st_ino:
            sysio.setns(self._network.raw, sysio.CLONE_NEWNET)
        sysio.setns(self._mounts.raw, sysio.CLONE_NEWNS)
        os.chdir("/")

    def have_ended(self) -> bool:
        """Whether what it needs has ended."""
        return self.files is not None and self.files.failure() is not None

    def helpers(self) -> list[int]:
        """The processes of it."""
        if self.files is None:
            return []
        pid = self.files.child.pid
        try:
            with open(f"/proc/{pid}/task/{pid}/children", encoding="ascii") as file:
                return [pid, *map(int, file.read().split())]
        except OSError:
            return [pid]

    def stop(self) -> None:
        """End what it consists of, after the machine. Blocks. Idempotent."""
        if self.files is not None:
            self.files.stop()
        self.release()

    def release(self) -> None:
        """Let go of what only a start needs. Idempotent."""
        if self.spare is not None:
            self.spare.close()
        self._mounts.close()
        self._network.close()


class Waiting:
    """A machine that waited for a sandbox, as the start of that sees it.

    Args:
        started: The machine.
        vm: The same, in the event loop.
        agent: Its agent, whose extensions of the protocol are known.
        shape: What it is.
        key: That of its template.
        journal: Of what it has on the host.
        around: What that is, beside the monitor.

    Attributes:
        client: The connection to its agent.
        features: The agent's extensions of the protocol.
        reason: Why it is not used; empty as long as it can be.
    """

    __slots__ = (
        *("_gone", "_trees", "_wire", "around", "client", "features", "journal", "key", "reason"),
        *("shape", "started", "vm"),
    )

    def __init__(
        self,
        started: Started,
        vm: Machine,
        agent: AgentClient,
        shape: MachineShape,
        key: str,
        journal: Journal,
        around: Surroundings,
    ) -> None:
        self.started = started
        self.vm = vm
        self.client = agent.client
        self.features = agent.features
        self.shape = shape
        self.key = key
        self.journal = journal
        self.around = around
        self.reason = ""
        self._wire: sysio.Fd | None = None
        self._trees: list[sysio.Fd] = []
        self._gone = False

    # ---- being taken ----

    def go_home(self) -> None:
        """Go where an engine is before its start, and take its share along. As the only thread.

        Raises:
            OSError: The kernel refused.
        """
        if self.around.share is not None and not self.reason:
            try:
                self._trees = self.around.share.pack()
            except OSError as error:
                self.reason = f"the share of the machine that waited could not be moved: {error.strerror}"
        self.around.leave()

    async def give(
        self, disks: Sequence[Disk | None], run_dir: str, sandbox_id: str, console_path: str, *, wired: bool
    ) -> None:
        """Give it what is a sandbox's. If that fails it is not used, and says why.

        Args:
            disks: See `kata.hypervisor.protocols.Machine.fill_disks`.
            run_dir: See there.
            sandbox_id: See there.
            console_path: See `kata.hypervisor.protocols.Machine.move_console`.
            wired: Its interface is to be connected to a helper.
        """
        import asyncio

        from kata.agent.client import AgentClient

        async def fill() -> None:
            await self.vm.fill_disks(disks, run_dir, sandbox_id)
            if wired:
                self._wire = sysio.Fd((await self.vm.insert_nic())[0])

        filling = asyncio.ensure_future(fill())
        try:
            answers = AgentClient(self.client).check(ADOPT_S)
            await asyncio.wait_for(asyncio.gather(filling, answers), ADOPT_S)
            self.vm.move_console(console_path)
        except (KataError, TimeoutError) as error:
            said = error.message if isinstance(error, HypervisorError) else "it did not answer"
            self.reason = f"the machine that waited could not be given to it: {said}"
        finally:
            filling.cancel()  # what has failed elsewhere does not go on here

    def bring_share(self, journal: Journal) -> bool:
        """Have its share in this mount namespace.

        Args:
            journal: The sandbox's.

        Returns:
            Whether it is there; otherwise that is the reason.
        """
        trees, self._trees = self._trees, []
        if self.around.share is not None:
            try:
                self.around.share.unpack(trees, journal)
            except OSError as error:
                self.reason = f"the share of the machine that waited could not be moved: {error.strerror}"
            finally:
                for tree in trees:
                    tree.close()
        return not self.reason

    def connect(self, plan: NetworkPlan) -> None:
        """Have a network use its interface, before `NetworkPlan.setup_nics`."""
        plan.wire, self._wire = self._wire, None
        if self.around.spare is not None:
            from kata.network.netns import NetnsPlan

            if isinstance(plan, NetnsPlan):
                plan.spare = self.around.spare

    def fits(self, template: Template) -> bool:
        """Whether it is what has this template; if not, or if it has ended, that is the reason."""
        if not self.reason:
            self.reason = template.reason
        if not self.reason and template.key != self.key:
            self.reason = "the machine that waited is another one"
        if not self.reason and (self.started.status() is not None or self.around.have_ended()):
            self.reason = "the machine that waited has ended"
        return not self.reason

    # ---- the end ----

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
        self.release()
        self.around.stop()
        journal_undo.undo(self.journal)

    def release(self) -> None:
        """Let go of what only a start needs. Idempotent."""
        if self._wire is not None:
            self._wire.close()
        for tree in self._trees:
            tree.close()
        self.around.release()
