"""``exec`` without a command: a shell of a sandbox's guest, its debug console, as with the original.

The guest of this project has a shell only where its configuration asks for it. Elsewhere the error names what is the
nearest: a shell of a container, in the words of whoever made it, and how the guest gets one.
"""

from __future__ import annotations

import os
import select
import socket

from kata import management, paths
from kata.errors import NotFoundError, StateError, UsageError
from kata.oci_runtime import records
from kata.oci_runtime.global_options import PROGRAM

_TARGET = "/kata/v1/debug-console"
_END_OF_INPUT = b"\x04"
_AGAIN_MS = 500
"""How long after its input has ended the shell is told so once more, in milliseconds: between two commands it takes its
terminal out of the mode in which that is a word of its own, and what was typed in the other one is lost."""
_PIECE = 1 << 16
_SHELLS = {
    "kata": "kata exec -it {id} sh",
    "oci": f"{PROGRAM} exec -t {{id}} sh",
    "k8s.io": "crictl exec -it CONTAINER sh",
    "moby": "docker exec -it {id} sh",
}
"""Name of a client, or containerd's namespace -> what makes a shell in one of its containers."""


def run(root: str, reference: str) -> int:
    """Be the terminal of a shell in a sandbox's guest, until that ends.

    Args:
        root: The directory of the records.
        reference: A container of the OCI command line, or any sandbox of this host.

    Returns:
        0: how the shell ended is not told.

    Raises:
        NotFoundError: There is neither.
        UsageError: There is no debug console, or no engine.
        KataError: Its engine does not answer.
    """
    from kata.engine.services.debug_console import PROTOCOL

    directory, shell = _sandbox(root, reference)
    try:
        console = management.take_over(os.path.join(directory, paths.MANAGEMENT_SOCKET), _TARGET, PROTOCOL)
    except NotFoundError:
        raise UsageError(
            f"exec: no command, and the engine of sandbox {reference!r} is not running",
            f"a shell of its container, when it runs: {shell}",
        ) from None
    except StateError as error:
        raise UsageError(
            f"exec: no command, and there is no debug console of sandbox {reference!r}: {error.message}",
            f"a shell of its container: {shell}; one of its guest: {error.hint}",
        ) from None
    with console:
        _copy(console)
    return 0


def _sandbox(root: str, reference: str) -> tuple[str, str]:
    """The run directory of a sandbox, and the command that is a shell of its container."""
    record = records.find(root, reference)
    if record is not None:
        return record.sandbox, _SHELLS["oci"].format(id=reference)
    from kata.cli import sandboxes

    try:
        directory = sandboxes.find(reference)
    except NotFoundError:
        raise NotFoundError(
            f"there is no container and no running sandbox {reference!r}",
            f"{PROGRAM} list, kata ps, crictl pods",
        ) from None
    settings = sandboxes.settings_by_directory().get(directory, {})
    client = settings.get("client") or {}
    namespace = str(client.get("namespace") or "")
    shell = (
        _SHELLS.get(namespace)
        or _SHELLS.get(str(client.get("name")))
        or (f"nerdctl -n {namespace} exec -it {{id}} sh" if namespace else "that of whoever made it")
    )
    return directory, shell.format(id=str(settings.get("id") or os.path.basename(directory)))


def _copy(console: socket.socket) -> None:
    """Copy between the console and this process's standard streams until the console ends."""
    from kata.cli.pump import RawTerminal

    with RawTerminal(lambda _rows, _columns: None):
        poller = select.poll()
        for fd in (0, console.fileno()):
            poller.register(fd, select.POLLIN)
        ended = False
        while True:
            ready = dict(poller.poll(_AGAIN_MS if ended else None))
            if 0 in ready or not ready:
                typed = os.read(0, _PIECE) if 0 in ready else b""
                if 0 in ready and not typed:  # a file, or a pipe: the shell ends as at a terminal
                    poller.unregister(0)
                    ended = True
                try:
                    console.sendall(typed or _END_OF_INPUT)
                except OSError:
                    pass  # it has ended, which the next read tells
            if console.fileno() in ready:
                try:
                    shown = console.recv(_PIECE)
                except ConnectionResetError:
                    return
                if not shown:
                    return
                while shown:
                    shown = shown[os.write(1, shown) :]
