"""Ends a container from a command, and waits until its sandbox is gone."""

from __future__ import annotations

import _signal as signal  # type: ignore[import-not-found]  # `signal` makes enumerations, for 3 ms
import os
import time

from kata import paths
from kata.cli import records, signals
from kata.engine.client import EngineClient
from kata.errors import AgentError, HostError, KataError, NotFoundError, StateError, VMLostError
from kata.suppress import suppress

TYPE_CHECKING = False
if TYPE_CHECKING:
    from kata.cli.records import Container

_AFTER_KILL_S = 10.0
"""How long an engine may take to end a container after SIGKILL, in seconds; the guest gets a part of that."""
ENDED = (VMLostError, NotFoundError, HostError)
"""Errors of a call when the container, or its engine, has ended before."""
_DEADLINE_EXCEEDED = 4

LOOK_MS = 50
"""How often (in milliseconds) it is looked whether the engine still lives, while its sandbox is there."""
BLIND_S = 0.01
"""The same in seconds where the directory cannot be watched."""
TELL_AFTER_S = 2.0
"""An engine that has not ended by itself after this time (in seconds) is told to."""
KILL_AFTER_S = 8.0
"""An engine that is still there after this time (in seconds) hangs. It is killed, and its journal is undone here."""


def wait_for_engine(container: Container, timeout_s: float = 10.0, *, tell: bool = False) -> bool:
    """Wait until the sandbox's run directory is gone. If its engine is dead, undo its journal.

    Args:
        container: The container.
        timeout_s: Seconds to wait.
        tell: Tell a living engine to end (it may be starting a container that is no longer wanted), and kill it if it
            does not.

    Returns:
        Whether the directory is gone.
    """
    directory = paths.sandbox_dir(container.id)
    if not os.path.isdir(directory):  # mostly: whoever waits for an engine has been told of its end by that
        return True
    with _Watch(directory) as watch:
        return _is_gone(watch, timeout_s, tell=tell)


class _Watch:
    """Waits for the end of a directory; a context manager.

    Args:
        directory: Its path.
    """

    __slots__ = ("_fd", "_poll", "directory")

    def __init__(self, directory: str) -> None:
        import select

        from kata import inotify, sysio

        self.directory = directory
        self._poll = select.poll()
        self._fd: sysio.Fd | None = None
        try:
            self._fd = sysio.Fd(inotify.init())
            self._poll.register(self._fd.raw, select.POLLIN)
            inotify.add_watch(self._fd.raw, directory, inotify.IN_MOVE_SELF | inotify.IN_DELETE_SELF)
        except OSError:
            self.close()  # it is gone, or the user may have no more queues: then it is looked more often

    def __enter__(self) -> _Watch:
        return self

    def __exit__(self, *_error: object) -> None:
        self.close()

    def close(self) -> None:
        """Stop watching."""
        if self._fd is not None:
            self._fd.close()
            self._fd = None

    def wait(self) -> None:
        """Return when the directory has been renamed or removed, or it is time to look."""
        if self._fd is None:
            time.sleep(BLIND_S)
        else:
            self._poll.poll(LOOK_MS)


def _is_gone(watch: _Watch, timeout_s: float, *, tell: bool) -> bool:
    from kata.journal import Journal

    directory = watch.directory
    began = time.monotonic()
    orders = [(TELL_AFTER_S, signal.SIGTERM), (KILL_AFTER_S, signal.SIGKILL)] if tell else []
    while os.path.isdir(directory):
        waited = time.monotonic() - began
        with suppress(KataError):  # the journal disappears a moment before its directory
            journal = Journal.open(os.path.join(directory, "journal"))
            try:
                if not journal.owner_alive():
                    from kata import journal_undo

                    journal_undo.undo(journal)
                    return True
                if orders and waited > orders[0][0]:
                    journal.signal_owner(orders.pop(0)[1], 0.0)
            finally:
                journal.close()
        if waited > timeout_s:
            return False
        watch.wait()
    return True


def stop(container: Container, grace_s: float, *, force: bool = False) -> None:
    """End a container: send its stop signal, SIGKILL after *grace_s* seconds, and wait until its sandbox is gone.

    Args:
        container: The container.
        grace_s: Seconds between its stop signal and SIGKILL; 0 for SIGKILL at once.
        force: The container is to be removed, so the guest gets no time to write its files back. Most likely it is
            removed when this returns.

    Raises:
        KataError: It has not ended.
    """
    state = container.state()
    if state["status"] not in (records.RUNNING, records.PAUSED):
        return
    kill = signals.number("KILL")
    first = signals.number(container.record["stop_signal"]) if grace_s > 0 else kill
    try:
        with EngineClient(container.socket) as engine:
            if force:
                # The engine, which has loaded what that takes, removes the container as well.
                with suppress(AgentError):  # it is late: `wait_for_engine` makes it
                    engine.discard(container.name, TELL_AFTER_S)
                return
            ended = first != kill and _ends_by(engine, container, first, state["status"], grace_s)
            if not ended:
                # Whatever the guest answers, the engine ends the container.
                with suppress(AgentError, NotFoundError):
                    engine.kill(container.id, kill, everything=True, timeout=_AFTER_KILL_S)
                ended = _ends_within(engine, container, _AFTER_KILL_S)
            if ended:
                # The end of the sandbox has begun with that of its container; this is answered at its own. What
                # `wait_for_engine` takes to learn of it is as much work as the rest of this command.
                with suppress(AgentError):
                    engine.shutdown(container.id, now=True, timeout=TELL_AFTER_S)
    except ENDED:
        pass
    finally:
        wait_for_engine(container, tell=force)
    if container.running():
        raise StateError(
            f"container {container.name} has not ended: its engine does not answer",
            f"kata rm -f {container.name}",
        )


def _ends_by(engine: EngineClient, container: Container, number: int, status: str, seconds: float) -> bool:
    """Send a signal. Returns whether the container ended in time, whatever the guest answered."""
    until = time.monotonic() + seconds
    with suppress(AgentError, NotFoundError):
        if status == records.PAUSED:  # a frozen process cannot act on a signal
            engine.resume(container.id, seconds)
        engine.kill(container.id, number, timeout=max(0.1, until - time.monotonic()))
    return _ends_within(engine, container, max(0.1, until - time.monotonic()))


def _ends_within(engine: EngineClient, container: Container, seconds: float) -> bool:
    try:
        engine.wait(container.id, timeout=seconds)
    except KataError as error:
        if error.grpc_code == _DEADLINE_EXCEEDED:
            return False
        raise
    return True
