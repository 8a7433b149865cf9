"""The debug console: a shell of the guest, whose terminal a client of the management socket has.

The agent has the terminal (``kata.agent.v1.Debug/Console``); here is carried what comes and goes. With KVM the
original's clients reach the same on a port of the guest's vsock, without the engine.
"""

from __future__ import annotations

import asyncio
import os

from kata.agent import dial
from kata.errors import KataError, StateError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from kata.agent.client import AgentClient
    from kata.settings import GuestSettings

PROTOCOL = "kata-debug-console"
"""What an ``Upgrade`` header names."""
ENABLED = "agent.debug_console"
"""The kernel parameter without which the agent gives nobody a shell."""
_PIECE = 1 << 16


def check(guest: GuestSettings) -> None:
    """Look whether a guest can have a debug console.

    Raises:
        StateError: It was not asked for when the guest was started, or the guest has no shell.
    """
    if ENABLED not in guest.cmdline.split():
        raise StateError(
            "the debug console was not enabled when the sandbox was made",
            "debug_console_enabled = true in [agent.kata], and a new sandbox",
        )
    # A version is known of our own guests alone; somebody else's may have a shell of its own.
    shells = [path for path in guest.extensions if os.path.basename(path).startswith("extension-shell-")]
    if guest.kernel_version and not shells:
        raise StateError(
            "its guest has no shell",
            "kata guest build --extension shell, and a new sandbox",
        )


async def carry(agent: AgentClient, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """Carry a console's input and output until the shell or the client ends. Never raises.

    Args:
        agent: The guest's.
        reader: What the client types.
        writer: What it is shown.
    """
    try:
        console = await dial.console(agent)
    except KataError as error:
        writer.write(f"{error.message}\r\n".encode("utf-8", "backslashreplace"))
        return
    typing = asyncio.create_task(_type(reader, console))
    try:
        while data := await console.read():
            writer.write(data)
            await writer.drain()
    except (KataError, OSError):
        pass  # the machine ends, or the client has gone
    finally:
        typing.cancel()
        await asyncio.wait([typing])
        console.close()


async def _type(reader: asyncio.StreamReader, console: dial.Connection) -> None:
    """What comes from the client; its end ends the console, as a terminal's that is hung up."""
    try:
        while data := await reader.read(_PIECE):
            if not await console.write(data):
                return
    except OSError:
        pass
    console.close()
