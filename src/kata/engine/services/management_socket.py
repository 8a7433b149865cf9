"""The engine's management socket, as far as it exists before anybody connects: ``shim-monitor.sock``.

Listening takes some system calls. What answers (`kata.engine.services.management`) is imported with the first
connection.
"""

from __future__ import annotations

import asyncio
import os
import socket

from kata import paths
from kata.engine.launch import listen
from kata.errors import KataError
from kata.ttrpc.server import peer_user

TYPE_CHECKING = False
if TYPE_CHECKING:
    from kata.engine.lifecycle.sandbox import Sandbox
    from kata.engine.services.management import Management

_AT_ONCE = 16
"""Connections that are accepted before the event loop looks at anything else."""
PAUSE_S = 1.0
"""How long nobody is let in when the engine may open no more files, in seconds."""


class ManagementSocket:
    """Listens in the sandbox's directory, and where the original's clients look.

    Args:
        sandbox: What is asked about. Its journal names all that is made.
    """

    def __init__(self, sandbox: Sandbox) -> None:
        self._sandbox = sandbox
        self._listener: socket.socket | None = None
        self._management: Management | None = None
        self._again: asyncio.TimerHandle | None = None

    def listen(self) -> None:
        """Listen from now on. What prevents that is logged: a sandbox works without."""
        sandbox = self._sandbox
        path = os.path.join(sandbox.run_dir, paths.MANAGEMENT_SOCKET)
        try:
            self._listener = socket.socket(fileno=listen(path, sandbox.journal))
        except (OSError, KataError) as error:
            sandbox.tasks.log(f"there is no management socket: {error}")
            return
        self._listener.setblocking(False)
        asyncio.get_running_loop().add_reader(self._listener, self._accept)
        for directory in paths.compat_dirs(sandbox.id, os.path.dirname(os.path.dirname(sandbox.run_dir))):
            self._offer(directory, path)

    def _offer(self, directory: str, path: str) -> None:
        """Make *directory* with a link to the socket. A client that connects to the link reaches the socket, however
        long its path is. The directory belongs to whoever came first: ids are unique only for one client.
        """
        journal = self._sandbox.journal
        link = os.path.join(directory, paths.MANAGEMENT_SOCKET)
        try:
            paths.make_dirs(os.path.dirname(directory), 0o711)
            journal.make_directory(directory)
            entry = journal.begin("file", path=link)
            os.symlink(path, link)
            journal.commit(entry)
        except FileExistsError:
            self._sandbox.tasks.log(
                f"{directory} is another sandbox's; this one's management socket is {path}"
            )
        except (OSError, KataError) as error:
            self._sandbox.tasks.log(f"there is no management socket in {directory}: {error}")

    def _accept(self) -> None:
        assert self._listener is not None
        for _ in range(_AT_ONCE):
            try:
                sock, _ = self._listener.accept()
            except BlockingIOError:
                return
            except OSError:  # no descriptors, or no memory: who waits goes on waiting, and so do we
                asyncio.get_running_loop().remove_reader(self._listener)
                self._again = asyncio.get_running_loop().call_later(PAUSE_S, self._resume)
                return
            # Whoever may connect may have the path mounted somewhere: nobody but our own user, and root.
            if peer_user(sock) not in (0, os.geteuid()):
                sock.close()
                continue
            if self._management is None:
                from kata.engine.services.management import Management

                self._management = Management(self._sandbox)
            self._management.server.take(sock)

    def _resume(self) -> None:
        assert self._listener is not None
        asyncio.get_running_loop().add_reader(self._listener, self._accept)

    async def close(self) -> None:
        """Listen no longer, and end all connections."""
        if self._again is not None:
            self._again.cancel()
        if self._listener is not None:
            asyncio.get_running_loop().remove_reader(self._listener)
            self._listener.close()
            self._listener = None
        if self._management is not None:
            await self._management.server.close()
