"""The states of a sandbox, what may follow what, and the one object that changes them.

Everything that asks how a sandbox is doing (``ready``, Describe, the Sandbox API, the end of an idle engine) derives
its answer from `Lifecycle.state`. The states of a container's processes are in `kata.engine.containers.process`.
"""

from __future__ import annotations

import asyncio
import enum
import time

from kata.errors import StateError, VMLostError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Awaitable
    from typing import Any, TypeVar

    from kata.errors import KataError

    T = TypeVar("T")


class SandboxState(enum.Enum):
    """Where a sandbox is in its life."""

    NEW = "new"  # an engine without a machine: a pod of the Sandbox API before CreateSandbox
    BOOTING = "booting"  # the machine was started, or its start has just failed; the guest is not set up
    READY = "ready"  # the guest takes containers
    FAILED = "failed"  # the machine is gone, and nobody had asked for that; the engine still answers
    STOPPED = "stopped"  # the machine was ended on request (StopSandbox); the engine still answers
    CLOSING = "closing"  # the end has begun: the guest writes back what its containers wrote
    ENDING = "ending"  # there is no machine any more: what the sandbox has on the host is being removed
    ENDED = "ended"  # nothing is left but the engine's process


_NEXT: dict[SandboxState, frozenset[SandboxState]] = {
    SandboxState.NEW: frozenset({SandboxState.BOOTING, SandboxState.FAILED, SandboxState.ENDING}),
    SandboxState.BOOTING: frozenset(
        {SandboxState.READY, SandboxState.FAILED, SandboxState.STOPPED, SandboxState.CLOSING}
    ),
    SandboxState.READY: frozenset({SandboxState.FAILED, SandboxState.STOPPED, SandboxState.CLOSING}),
    SandboxState.FAILED: frozenset({SandboxState.ENDING}),
    SandboxState.STOPPED: frozenset({SandboxState.ENDING}),
    SandboxState.CLOSING: frozenset({SandboxState.ENDING}),
    SandboxState.ENDING: frozenset({SandboxState.ENDED}),
    SandboxState.ENDED: frozenset(),
}

_WITHOUT_MACHINE = frozenset(
    {SandboxState.FAILED, SandboxState.STOPPED, SandboxState.ENDING, SandboxState.ENDED}
)
_AT_ITS_END = frozenset({SandboxState.CLOSING, SandboxState.ENDING, SandboxState.ENDED})


class Lifecycle:
    """The state of one sandbox.

    Args:
        sandbox_id: Its id, for messages.

    Attributes:
        state: The present one.
        exit_reason: Is done when there is no machine any more: the error that tells why.
        exit_state: The state in which it went: FAILED, STOPPED or ENDING; None while it is there.
        created_ns: When BOOTING was entered, in nanoseconds of the epoch; 0 before.
        exited_ns: When the machine went, in nanoseconds of the epoch; 0 before.
        ended: Is set in ENDED.
    """

    __slots__ = ("_id", "created_ns", "ended", "exit_reason", "exit_state", "exited_ns", "state")

    def __init__(self, sandbox_id: str) -> None:
        self._id = sandbox_id
        self.state = SandboxState.NEW
        self.exit_reason: asyncio.Future[KataError] = asyncio.get_running_loop().create_future()
        self.exit_state: SandboxState | None = None
        self.created_ns = 0
        self.exited_ns = 0
        self.ended = asyncio.Event()

    def may(self, state: SandboxState) -> bool:
        """Whether *state* may follow the present one."""
        return state in _NEXT[self.state]

    def enter(self, state: SandboxState, reason: KataError | None = None) -> None:
        """Go to *state*.

        Args:
            state: The next one.
            reason: For a state without a machine that is entered from one with a machine: why it is gone.

        Raises:
            StateError: It may not follow the present one.
        """
        if not self.may(state):
            raise StateError(f"sandbox {self._id!r} cannot go from {self.state.value} to {state.value}")
        self.state = state
        if state is SandboxState.BOOTING:
            self.created_ns = time.time_ns()
        if state in _WITHOUT_MACHINE and self.exit_state is None:
            self.exit_state = state
            self.exited_ns = time.time_ns()
            self.exit_reason.set_result(reason or VMLostError(f"sandbox {self._id} has ended"))
        if state is SandboxState.ENDED:
            self.ended.set()

    # ---- derived ----

    @property
    def is_lost(self) -> bool:
        """Whether there is no machine any more."""
        return self.state in _WITHOUT_MACHINE

    @property
    def is_ending(self) -> bool:
        """Whether the end has begun: no container can be made any more."""
        return self.state in _AT_ITS_END

    @property
    def failed(self) -> bool:
        """Whether the machine went unasked; stays true until the engine's own end."""
        return self.exit_state is SandboxState.FAILED

    @property
    def lost_reason(self) -> str:
        """Why there is no machine any more; empty while there is."""
        return self.exit_reason.result().message if self.is_lost else ""

    def lost_error(self) -> VMLostError:
        """What a call gets that needs the machine, once there is none or will soon be none."""
        if self.is_lost:
            error = self.exit_reason.result()
            return VMLostError(error.message, error.hint)
        return VMLostError(f"sandbox {self._id} is ending")

    async def race_vm_exit(self, work: Awaitable[T], *, outlives_caller: bool = False) -> T:
        """Await *work*; the end of the machine cancels it.

        Args:
            work: What to wait for.
            outlives_caller: A caller that is cancelled leaves *work*, a future that somebody else holds, to go on.
                Otherwise *work* is cancelled with its caller, and has ended when this returns.

        Returns:
            What *work* returns.

        Raises:
            KataError: The machine's end, or what *work* raises.
        """
        task = asyncio.ensure_future(work)
        both: set[asyncio.Future[Any]] = {task, self.exit_reason}
        try:
            await asyncio.wait(both, return_when=asyncio.FIRST_COMPLETED)
        except asyncio.CancelledError:
            if not outlives_caller:
                task.cancel()
                await asyncio.gather(task, return_exceptions=True)
            raise
        if task.done():
            return task.result()
        task.cancel()
        raise self.lost_error()
