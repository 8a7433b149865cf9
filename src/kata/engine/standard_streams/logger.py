"""Logging programs: where a stream's URI is ``binary://PROGRAM?KEY=VALUE``, a program of the client's takes the output.

The contract is containerd's (its documentation of "pluggable logging", `core/runtime/v2` README): the program gets the
keys and values of the query as arguments, the container's id and namespace in its environment, standard output and
standard error as descriptors 3 and 4, and says by closing descriptor 5 that it is ready.
"""

from __future__ import annotations

import asyncio
import os

from kata import children
from kata.errors import HostError, UsageError
from kata.sysio import Fd

TYPE_CHECKING = False
if TYPE_CHECKING:
    from kata.journal import Journal

READY_S = 10.0
"""How long a program may take to say that it is ready."""
FAILS_S = 0.05
LEAVES_S = 10.0
"""How long it may take to end after the end of its input."""


def command(uri: str) -> list[str]:
    """Argument vector of a logging program.

    Raises:
        UsageError: It is no absolute path.
    """
    from urllib.parse import unquote, urlsplit

    parts = urlsplit(uri)
    program = unquote(parts.path)
    if parts.netloc or not os.path.isabs(program):
        raise UsageError(f"{uri} names no logging program", "binary:///absolute/path?key=value")
    argv = [program]
    for pair in filter(None, parts.query.split("&")):
        key, _, value = pair.partition("=")
        argv += [unquote(key.replace("+", " ")), unquote(value.replace("+", " "))]
    return argv


class Logger:
    """A logging program that was started.

    Attributes:
        ended: Set when it has ended.

    Args:
        uri: What the client named.
        container_id: The container.
        namespace: The client's.
        journal: The sandbox's.

    Raises:
        UsageError: The URI names no program.
        HostError: It cannot be executed.
    """

    def __init__(self, uri: str, container_id: str, namespace: str, journal: Journal) -> None:
        argv = command(uri)
        theirs: list[int] = []
        ours: list[int] = []
        self._child = children.SupervisedChild(f"the logging program {argv[0]}")
        try:
            for _ in range(2):
                reading, writing = os.pipe2(os.O_CLOEXEC)
                theirs.append(reading)
                ours.append(writing)
                os.set_blocking(writing, False)
            reading, writing = os.pipe2(os.O_CLOEXEC)
            ours.append(reading)
            theirs.append(writing)
            os.set_blocking(reading, False)
            self._child.start(
                argv,
                journal,
                "logger",
                with_stdout=False,
                fds_from_3=theirs,
                env={**children.ENVIRONMENT, "CONTAINER_ID": container_id, "CONTAINER_NAMESPACE": namespace},
                # It has to read to the end what was written before the engine's: its input ends with the engine.
                survives_parent=True,
            )
        except OSError as error:
            for fd in ours:
                os.close(fd)
            raise HostError(
                f"cannot start the logging program {argv[0]}: {error.strerror}",
                "It has to be executable by root.",
            ) from None
        finally:
            for fd in theirs:
                os.close(fd)
        self.program = argv[0]
        self._inputs = {"stdout": ours[0], "stderr": ours[1]}
        self._ready = Fd(ours[2])
        self.ended = asyncio.Event()
        self._loop = asyncio.get_running_loop()
        self._child.on_exit(self._on_exit)

    @property
    def child(self) -> children.SupervisedChild:
        """The program."""
        return self._child

    def take(self, name: str) -> int:
        """Where its input ``stdout`` or ``stderr`` is written, without blocking; the caller's to close."""
        return self._inputs.pop(name)

    def close(self) -> None:
        """Close what nobody took: the program sees the end of it."""
        while self._inputs:
            os.close(self._inputs.popitem()[1])

    def _on_exit(self) -> None:
        self._child.close()
        self.ended.set()

    async def ready(self) -> None:
        """Return when it takes its input.

        Raises:
            HostError: It has ended before it was ready, or never said so.
        """
        if not self._ready.is_open:
            return
        said = self._loop.create_future()

        def look() -> None:
            if not said.done():
                said.set_result(None)

        self._loop.add_reader(self._ready, look)
        try:
            await asyncio.wait_for(said, READY_S)
        except TimeoutError:
            self._child.kill()
            raise HostError(
                f"the logging program {self.program} was not ready within {READY_S:.0f} s",
                "It has to close descriptor 5 when it takes its input.",
            ) from None
        finally:
            self._loop.remove_reader(self._ready)
            self._ready.close()
        # The end of a program closes its descriptors, too, an instant before it can be reaped.
        try:
            await asyncio.wait_for(self.ended.wait(), FAILS_S)
        except TimeoutError:
            return
        failure = self.failure()
        if failure:
            raise HostError(failure, "Its arguments come from the query of its URI.")

    def failure(self) -> str:
        """A sentence if it has ended by itself, and not well."""
        return self._child.failure() if self._child.poll() else ""

    def dismiss(self) -> None:
        """Close its input and ask it to end (SIGTERM), as runc's shim does: there will be no container.

        nerdctl's waits for the container's task, and not for the end of its input.
        """
        self.close()
        if not self.ended.is_set():
            self._child.dismiss()

    async def leave(self) -> None:
        """Return when it has ended, by itself or, when its time is up, by a signal. Its input has to be closed."""
        try:
            await asyncio.wait_for(self.ended.wait(), LEAVES_S)
        except TimeoutError:
            self._child.kill()
            await self.ended.wait()
