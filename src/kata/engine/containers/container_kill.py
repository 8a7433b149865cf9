"""Signals to the processes of a container; and SIGKILL, which the guest has no say in.

docs/architecture.md, "A guest that does not answer", has the rules.
"""

from __future__ import annotations

import asyncio
import contextlib

from kata.engine.lifecycle import watch
from kata.errors import AgentTimeoutError, KataError, NotFoundError, UnsupportedError, UsageError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from kata.agent.client import AgentClient
    from kata.engine.access import MachineControl
    from kata.engine.containers.process import Process
    from kata.engine.tasks import Tasks
    from kata.settings import ClientPolicy

KILL_S = 4.0
"""How long the guest has to obey a SIGKILL of a container's init, in seconds. Then its machine is ended: the guest has
no say."""
REAP_S = 8.0
"""The same for a guest that has taken the signal and still answers: a large process is not gone at once."""
STARVED_S = 30.0
"""At most, however little processor time the host's load leaves the hypervisor: such time is not the guest's fault."""
SIGKILL = 9


class Killer:
    """Sends signals to the processes of one container.

    Args:
        init: Its first process.
        execs: Its others, by their ids.
        machine: The machine it is in.
        tasks: The engine's.
        client: How long the client waits, and what it makes of a late answer.
        has_others: Whether the machine is shared with other containers that run.

    Attributes:
        requested: Whether the init has been told to die: an exit of 137 needs no other explanation then.
    """

    __slots__ = ("_client", "_execs", "_has_others", "_id", "_init", "_machine", "_tasks", "requested")

    def __init__(
        self,
        init: Process,
        execs: Mapping[str, Process],
        machine: MachineControl,
        tasks: Tasks,
        client: ClientPolicy,
        has_others: Callable[[], bool],
    ) -> None:
        self._id = init.container_id
        self._init = init
        self._execs = execs
        self._machine = machine
        self._tasks = tasks
        self._client = client
        self._has_others = has_others
        self.requested = False

    async def kill(self, process: Process, signal: int, *, everything: bool) -> None:
        """Send a signal.

        Args:
            process: Whom to.
            signal: 1 to 64.
            everything: To every process of the container; SIGKILL to the init is that anyway.

        Raises:
            NotFoundError: ``process already finished``.
            AgentTimeoutError: The guest has not answered, which is never said of SIGKILL to the init, nor to a client
                that would then give up what it waits for: the signal may yet arrive.
            KataError: The guest refused.
        """
        if not 1 <= signal <= 64:
            raise UsageError(f"{signal} is not a signal", "1 to 64; see signal(7)")
        process.require_killable()
        agent = await self._machine.ready()
        try:
            if signal == SIGKILL and process is self._init:
                await self._kill_init(agent)
            else:
                await self._signal(agent, process, signal, everything=everything and process is self._init)
        except KataError as error:
            if error.grpc_code == NotFoundError.grpc_code:
                raise NotFoundError(f"process already finished: {process.label}") from None
            raise

    async def kill_init(self) -> None:
        """Send SIGKILL to the init, whatever its state on record is."""
        await self._kill_init(await self._machine.ready())

    async def _kill_init(self, agent: AgentClient) -> None:
        self.requested = True
        began = asyncio.get_running_loop().time()
        try:
            await agent.signal(self._id, "", SIGKILL, KILL_S)
        except AgentTimeoutError:
            self._end_machine("its guest did not answer", KILL_S)
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._init.ended.wait(), KILL_S)
        finally:
            # Whatever the guest has said: what counts is that it ends.
            if self._init.watcher is not None and not self._init.reaped.is_set():
                self._tasks.create_task(self._see_it_end(agent, began))

    async def _see_it_end(self, agent: AgentClient, began: float) -> None:
        """See to it that a killed init ends.

        Args:
            agent: The agent, which has answered to the signal.
            began: When it was sent, by the loop's clock.
        """
        took_s = await self._outlasts(agent, began)
        if not took_s:
            return
        if self._has_others():
            # The guest answers, and others of its pod run: they are not ended for one that is stuck in the kernel.
            self._tasks.log(
                f"container {self._id} has not ended {took_s:.0f} s after SIGKILL; its sandbox can be ended"
            )
        else:
            self._end_machine("its guest did not end it", took_s)

    async def _outlasts(self, agent: AgentClient, began: float) -> float:
        """Whether a killed init outlasts the time that its guest is given.

        Returns:
            0 if it has ended; otherwise how long it was waited for, in seconds.
        """
        loop = asyncio.get_running_loop()
        counted_s = loop.time() - began
        pause_s = KILL_S / 8
        reaped = asyncio.ensure_future(self._init.reaped.wait())
        try:
            while True:
                before, at = watch.cpu_time(self._machine.host_pid), loop.time()
                await asyncio.wait([reaped], timeout=pause_s)
                answers = not reaped.done() and await _answers(agent, pause_s)
                if reaped.done() or self._machine.is_lost:
                    return 0.0
                if not watch.was_starved(before, watch.cpu_time(self._machine.host_pid)):
                    counted_s += loop.time() - at
                if counted_s >= (REAP_S if answers else KILL_S) or loop.time() - began >= STARVED_S:
                    return loop.time() - began
        finally:
            reaped.cancel()

    def _end_machine(self, why: str, waited_s: float) -> None:
        if not self._machine.is_lost:
            self._machine.fail(
                f"container {self._id} was to be killed, and {why} within {waited_s:.0f} s:"
                " its virtual machine was ended"
            )

    async def _signal(self, agent: AgentClient, process: Process, signal: int, *, everything: bool) -> None:
        """Have the guest send a signal; once it is late, the signal is left on its way."""
        if everything:
            sending = asyncio.ensure_future(self._signal_all(agent, signal))
        else:
            sending = asyncio.ensure_future(agent.signal(self._id, process.exec_id, signal, None))
        patience_s = self._client.signal_s
        try:
            done, _ = await asyncio.wait([sending], timeout=patience_s)
        except asyncio.CancelledError:
            self._tasks.create_task(_quietly(sending))
            raise
        if done:
            sending.result()
            return
        self._tasks.create_task(_quietly(sending))
        late = f"the guest has not taken signal {signal} for {process.label} within {patience_s:g} s"
        if self._client.late_signals_fail:
            raise AgentTimeoutError(
                late, "SIGKILL ends a container whatever its guest does: kata kill, or kata rm -f"
            )
        self._tasks.log(late)

    async def _signal_all(self, agent: AgentClient, signal: int) -> None:
        try:
            await agent.signal_all(self._id, signal, None)
        except KataError as error:
            if error.grpc_code != UnsupportedError.grpc_code:
                raise
            # Another agent than ours: it knows the processes by their ids only.
            for one in [one.exec_id for one in self._execs.values() if one.alive]:
                with contextlib.suppress(KataError):  # it has just ended
                    await agent.signal(self._id, one, signal, None)
            await agent.signal(self._id, "", signal, None)


async def _answers(agent: AgentClient, timeout_s: float) -> bool:
    try:
        await agent.check(timeout_s)
    except KataError:
        return False
    return True


async def _quietly(work: asyncio.Future[None]) -> None:
    with contextlib.suppress(KataError):  # whoever asked has been told that it is late
        await work
