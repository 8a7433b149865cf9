"""A command that is connected to a process's standard streams until it ends: bytes, signals, and the exit code."""

from __future__ import annotations

import _signal as signal  # type: ignore[import-not-found]  # `signal` makes enumerations, for 3 ms
import _thread
import os
import sys

from kata.cli.pump import OutputGone, Pump, RawTerminal
from kata.engine.client import EngineClient
from kata.errors import AgentError, AgentTimeoutError, KataError, VMLostError
from kata.suppress import suppress
from kata.sysio import Fd

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any

    from kata.cli.fifos import Fifos
    from kata.cli.records import Container
    from kata.engine.client import Running

_ENDING = (signal.SIGHUP, signal.SIGINT, signal.SIGQUIT, signal.SIGTERM)
"""Signals that ask a process to end."""
_MAX_UNANSWERED = 3
"""The command gives up after this many signals of `_ENDING` that the guest has not taken. Docker's number."""
_PROXIED = (
    signal.SIGHUP,
    signal.SIGINT,
    signal.SIGQUIT,
    signal.SIGTERM,
    signal.SIGUSR1,
    signal.SIGUSR2,
    signal.SIGCONT,
)
"""Signals that an attached command forwards to the container instead of acting on them, as `docker run` does."""
OUTPUT_GONE_S = 3.0
"""Seconds between the stop signal and SIGKILL for a process whose output has lost its reader: in a pipeline, SIGPIPE
would have ended it at once."""


class Attachment:
    """One process's streams and exit code, connected to this command.

    Args:
        client: The engine.
        container: The container.
        fifos: Its streams, connected; they are closed with this.
        running: The process, started.
        exec_id: Id of the process; empty for the container's init.
        terminal: Whether it has a terminal.
    """

    def __init__(
        self,
        client: EngineClient,
        container: Container,
        fifos: Fifos,
        running: Running,
        *,
        exec_id: str,
        terminal: bool,
    ) -> None:
        self._client = client
        self._container = container
        self._fifos = fifos
        self._running = running
        self._exec_id = exec_id
        self._terminal = terminal
        self._signals_reader: Fd | None = None
        self._signals_writer: Fd | None = None
        self._over = -1
        self._unresponsive: KataError | None = None
        self._unanswered = 0  # signals of `_ENDING` that the guest has not taken

    def copy(self, *, detach_keys: bytes = b"", proxy_signals: bool = True) -> int:
        """Copy the streams until the process has ended.

        Args:
            detach_keys: Bytes that, typed on a terminal, detach; empty for none.
            proxy_signals: Forward signals to the process.

        Returns:
            Its exit code.

        Raises:
            Detached: The user detached; the process goes on.
            OutputGone: The output cannot be written any more; the process goes on.
            KataError: The engine or the virtual machine was lost, or the guest takes no signals.
        """
        reader, self._over = os.pipe()
        pump = Pump(
            self._fifos,
            wait_fds=(self._client.fileno(), reader),
            ended=self._is_over,
            close_stdin=self._close_stdin,
            detach_keys=detach_keys if self._terminal else b"",
        )
        before: dict[int, Any] = {}
        try:
            if proxy_signals:
                before = self._proxy_signals()
            with self._raw_terminal():
                pump.run()
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)
            for end in (self._signals_reader, self._signals_writer):
                if end is not None:
                    end.close()
            self._fifos.close()
            # The writing end stays open: a thread may be about to use it, and this command is about to end.
            os.close(reader)
        try:
            return self._running.status()
        except VMLostError:
            raise self._lost() from None

    def _is_over(self) -> bool:
        if self._unresponsive is not None:
            raise self._unresponsive
        return self._running.over()

    def _lost(self) -> VMLostError:
        return lost(self._container, self._container.raw_state().get("error") or "its engine was killed")

    def _close_stdin(self) -> None:
        with suppress(KataError):
            self._client.close_stdin(self._container.id, self._exec_id)

    def _raw_terminal(self) -> RawTerminal | suppress:
        return RawTerminal(self._resize) if self._terminal else suppress()

    def _resize(self, rows: int, columns: int) -> None:
        self._on_new_connection(lambda other: other.resize(self._container.id, rows, columns, self._exec_id))

    def _proxy_signals(self) -> dict[int, Any]:
        """Forward signals from now on. Returns the handlers that they had."""
        reader, writer = os.pipe()
        self._signals_reader, self._signals_writer = Fd(reader), Fd(writer)
        return {number: signal.signal(number, self._forward) for number in _PROXIED}

    def _forward(self, number: int, _frame: object) -> None:
        if number in _ENDING:
            self._unanswered += 1
            if self._unanswered >= _MAX_UNANSWERED:
                raise self._no_answer(number)
        if self._signals_writer is None:
            return
        os.write(self._signals_writer.raw, bytes((number,)))
        if self._signals_reader is not None:  # most processes are sent none: the first one starts the thread
            reader, self._signals_reader = self._signals_reader.detach(), None
            _thread.start_new_thread(self._send_signals, (reader, self._over))

    def _send_signals(self, reader: int, over: int) -> None:
        """Send the signals from *reader* to the process, in order. Runs in a thread, since a guest may not answer."""
        while number := os.read(reader, 1):
            try:
                with EngineClient(self._container.socket) as other:
                    other.kill(self._container.id, number[0], self._exec_id)
            except AgentError as error:
                if error.grpc_code != AgentTimeoutError.grpc_code:
                    self._unanswered = 0  # a refusal is an answer
                elif number[0] in _ENDING:
                    self._unresponsive = self._no_answer(number[0])
                    with suppress(OSError):
                        os.write(over, b"x")
            except (KataError, OSError):
                self._unanswered = 0  # it has ended, or cannot be signalled yet
            else:
                self._unanswered = 0
        os.close(reader)

    def _no_answer(self, number: int) -> KataError:
        from kata.cli.signals import name_of

        what = f"its command in {self._container.name}" if self._exec_id else self._container.name
        return KataError(
            f"the guest of container {self._container.name} does not answer, so {what} was not sent"
            f" {name_of(number)} and goes on",
            f"kata kill {self._container.name}, or kata rm -f {self._container.name}, ends it whatever its guest does",
        )

    def _on_new_connection(self, what: Callable[[EngineClient], object]) -> None:
        """Make a call on a new connection: a signal handler may have interrupted a call on the existing one."""
        with suppress(KataError, OSError), EngineClient(self._container.socket) as other:
            what(other)


def say_gone(gone: OutputGone, what: str, hint: str = "") -> None:
    """Print to stderr, if that can still be written, what happens to a process whose output is gone.

    Args:
        gone: Which output, and how it went.
        what: What becomes of the process, as a clause.
        hint: What to do; empty for nothing.
    """
    with suppress(OSError):
        sys.stderr.write(f"{gone.sentence}: {what}\n" + (f"hint: {hint}\n" if hint else ""))
        sys.stderr.flush()


def gone_code(gone: OutputGone) -> int:
    """The exit code of a command whose output is gone."""
    return 128 + int(signal.SIGPIPE) if isinstance(gone.error, BrokenPipeError) else KataError.exit_code


def lost(container: Container, cause: str) -> VMLostError:
    """Make the error for a container whose virtual machine or engine has ended unexpectedly.

    Args:
        container: The container.
        cause: Why it ended, as a clause.
    """
    return VMLostError(f"container {container.name} was lost: {cause}", "kata doctor checks this machine")
