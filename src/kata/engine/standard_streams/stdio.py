"""Where the standard streams of a process come from and go to.

A client names each by an `Endpoint`. Today's hand over text (`parse`): nothing, the path of a fifo, or a URI. A client
that hands over open descriptors uses `Descriptor`, with `send_terminal` for one that wants the master of a terminal.
"""

from __future__ import annotations

import fcntl
import os
import stat
from abc import ABC, abstractmethod

from kata.errors import UnsupportedError, UsageError
from kata.sysio import Fd, SocketName

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine
    from typing import Any, Protocol

    from kata.engine.tasks import Tasks

    class StandIn(Protocol):
        """A process of the host that stands for one of a container (`kata.engine.containers.host_process`)."""

        pid: int
        was_killed: bool

        def serve(
            self,
            kill: Callable[[int], Coroutine[Any, Any, None]],
            resize: Callable[[int, int], Coroutine[Any, Any, None]],
            tasks: Tasks,
        ) -> None:
            """Pass on what it is signalled with, and its terminal's size."""

        def end(self, status: int) -> None:
            """Have it end with a status."""

        def close(self) -> None:
            """Let go of it: it kills itself if it has no status yet."""


PIPE_BYTES = 1 << 20
CONSOLE_S = 5.0
"""How long whoever listens on a console socket may take to accept."""


class Endpoint(ABC):
    """One standard stream's other end, before it is opened.

    Args:
        text: As the client has written it, for descriptions and events; empty where it has written nothing.
    """

    __slots__ = ("text",)

    def __init__(self, text: str = "") -> None:
        self.text = text

    @property
    def is_null(self) -> bool:
        """Whether it stands for /dev/null: there is nothing to open."""
        return False

    @abstractmethod
    def open_source(self, *, held: bool = False) -> tuple[int, int | None]:
        """Open it for reading, as the standard input of a process.

        Args:
            held: Writers may come and go: hold a writing end as well, where there is such a thing.

        Returns:
            Two descriptors that belong to the caller: one to read from, which never blocks, and the end that is held;
            None without one.

        Raises:
            UnsupportedError: It is of a kind that is no source.
            UsageError: It cannot be opened.
        """

    @abstractmethod
    def open_sink(self, *, held: bool = False) -> tuple[int, int | None]:
        """Open it for writing, as an output of a process.

        Args:
            held: Readers may come and go: hold a reading end as well, where there is such a thing.

        Returns:
            As `open_source`, with a descriptor to write to.

        Raises:
            UnsupportedError: It is of a kind that is no sink.
            UsageError: It cannot be opened.
        """

    def close(self) -> None:  # noqa: B027 - most kinds own nothing
        """Let go of what it owns; for one that has not been opened and never will be."""


class Null(Endpoint):
    """/dev/null: who asks `is_null` need not open it."""

    __slots__ = ()

    @property
    def is_null(self) -> bool:
        """See `Endpoint`."""
        return True

    def open_source(self, *, held: bool = False) -> tuple[int, int | None]:
        """See `Endpoint.open_source`: nothing comes from it."""
        return os.open(os.devnull, os.O_RDONLY | os.O_CLOEXEC), None

    def open_sink(self, *, held: bool = False) -> tuple[int, int | None]:
        """See `Endpoint.open_sink`: it takes everything."""
        return os.open(os.devnull, os.O_WRONLY | os.O_CLOEXEC), None


class PathEndpoint(Endpoint):
    """A fifo or a file.

    Args:
        text: As the client has written it.
        path: Its path.
        appends: What is written is appended to a file that need not exist (``file://``).
    """

    __slots__ = ("appends", "path")

    def __init__(self, text: str, path: str, *, appends: bool = False) -> None:
        super().__init__(text)
        self.path = path
        self.appends = appends

    def open_source(self, *, held: bool = False) -> tuple[int, int | None]:
        """See `Endpoint`."""
        fd = self._open(os.O_RDONLY)
        return fd, self._open_held(fd, os.O_WRONLY) if held else None

    def open_sink(self, *, held: bool = False) -> tuple[int, int | None]:
        """See `Endpoint`. A fifo without a reader can be opened only if it is held."""
        if self.appends:
            return self._open(os.O_WRONLY | os.O_CREAT | os.O_APPEND), None
        if not held:
            return self._open(os.O_WRONLY), None
        reader = self._open(os.O_RDONLY)
        return self._open_held(reader, os.O_WRONLY), reader

    def _open_held(self, first: int, flags: int) -> int:
        try:
            return self._open(flags)
        except BaseException:
            os.close(first)
            raise

    def _open(self, flags: int) -> int:
        try:
            fd = os.open(self.path, flags | os.O_NONBLOCK | os.O_CLOEXEC, 0o600)
        except OSError as error:
            raise UsageError(
                f"cannot open the stream {self.path}: {error.strerror}", "its reader has to be there first"
            ) from error
        mode = os.fstat(fd).st_mode
        if stat.S_ISFIFO(mode):
            _enlarge(fd)
        elif not (stat.S_ISREG(mode) or stat.S_ISCHR(mode)):
            os.close(fd)
            raise UsageError(f"cannot use {self.path} as a stream: it is neither a fifo nor a file")
        return fd


class Program(Endpoint):
    """A logging program (``binary://``), which takes both outputs; `kata.engine.standard_streams.logger` starts it."""

    __slots__ = ()

    def open_source(self, *, held: bool = False) -> tuple[int, int | None]:
        """See `Endpoint`."""
        raise _unsupported(self.text)

    open_sink = open_source


class Descriptor(Endpoint):
    """An open descriptor that a client has handed over.

    Args:
        fd: A pipe, file, terminal or socket. It belongs to the endpoint until that is opened or closed.
    """

    __slots__ = ("_fd",)

    def __init__(self, fd: int) -> None:
        super().__init__()
        self._fd = Fd(fd)

    def open_source(self, *, held: bool = False) -> tuple[int, int | None]:
        """See `Endpoint`. Nothing is held: whoever handed it over has the other end."""
        return self._take(os.O_RDONLY), None

    def open_sink(self, *, held: bool = False) -> tuple[int, int | None]:
        """See `Endpoint`. Nothing is held: whoever handed it over has the other end."""
        return self._take(os.O_WRONLY), None

    def close(self) -> None:
        """See `Endpoint`."""
        self._fd.close()

    def _take(self, access: int) -> int:
        """The descriptor in a form that does not block.

        O_NONBLOCK belongs to the open file, which the client may share with its own caller (a shell's terminal): a
        pipe or a terminal is opened anew. A file never blocks, and has its offset and flags in the open file. A socket
        cannot be opened anew.
        """
        if not self._fd.is_open:
            raise UsageError("a stream's descriptor can be used only once")
        try:
            mode = os.fstat(self._fd.raw).st_mode
            if stat.S_ISFIFO(mode) or stat.S_ISCHR(mode):
                fd = _reopen(self._fd.raw, access)
                self.close()
            elif stat.S_ISREG(mode) or stat.S_ISSOCK(mode):
                fd = self._fd.detach()
                os.set_inheritable(fd, False)
                if stat.S_ISSOCK(mode):
                    os.set_blocking(fd, False)
            else:
                raise UsageError("a stream's descriptor is neither a pipe, a file, a terminal nor a socket")
        except OSError as error:
            raise UsageError(f"cannot use the descriptor of a stream: {error.strerror}") from error
        if stat.S_ISFIFO(mode):
            _enlarge(fd)
        return fd


def send_terminal(path: str) -> int:
    """Make a terminal and send its master to whoever waits for it (the OCI runtimes' ``--console-socket``).

    A process has its terminal in the guest. The one that is made here only carries bytes, so its slave is raw: what
    the client writes arrives as it is, and what the process has written leaves as it is. Its size is the client's to
    set.

    Args:
        path: The unix socket on which that is.

    Returns:
        The slave.

    Raises:
        UsageError: Nobody takes the master.
    """
    import socket
    import tty

    master, slave = os.openpty()
    try:
        tty.setraw(slave)
        with socket.socket(socket.AF_UNIX) as client, SocketName(path) as name:
            client.settimeout(CONSOLE_S)
            client.connect(name)
            # A descriptor travels only with some content; runc sends the terminal's name, too.
            socket.send_fds(client, [os.ttyname(slave).encode()], [master])
    except OSError as error:
        os.close(slave)
        raise UsageError(
            f"cannot send a terminal to {path}: {error.strerror or error}",
            "somebody has to listen on the console socket",
        ) from error
    finally:
        os.close(master)
    return slave


def _reopen(fd: int, access: int) -> int:
    """The same pipe or terminal as an open file of our own, which does not block."""
    return os.open(f"/proc/self/fd/{fd}", access | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC)


class Stdio:
    """The standard streams of a process.

    Args:
        terminal: It has a terminal: one output, and what is written to standard error is in it.
        stdin: Where its input comes from.
        stdout: Where its output goes.
        stderr: Where its errors go; not looked at with a terminal.
        host_process: The process of the host that has handed them over, if one has.
    """

    __slots__ = ("host_process", "stderr", "stdin", "stdout", "terminal")

    def __init__(
        self,
        terminal: bool,
        stdin: Endpoint,
        stdout: Endpoint,
        stderr: Endpoint,
        host_process: StandIn | None = None,
    ) -> None:
        self.host_process = host_process
        self.terminal = terminal
        self.stdin = stdin
        self.stdout = stdout
        self.stderr = stderr
        if terminal:
            stderr.close()
            self.stderr = Null()

    def close(self) -> None:
        """Let go of what has not been opened, once nothing more will be."""
        for endpoint in (self.stdin, self.stdout, self.stderr):
            endpoint.close()


def parse_stdio(terminal: bool, stdin: str, stdout: str, stderr: str) -> Stdio:
    """The streams that a client of the Task API names; see `Stdio` and `parse`.

    Raises:
        UnsupportedError: One is of a kind that there is not.
    """
    return Stdio(terminal, parse(stdin), parse(stdout), parse(stderr))


def parse(text: str) -> Endpoint:
    """The endpoint that a client of the Task API names.

    Args:
        text: A path, a ``fifo://``, ``file://`` or ``binary://`` URI, or nothing.

    Raises:
        UnsupportedError: It is another kind of URI.
    """
    if not text:
        return Null()
    scheme, separator, path = text.partition("://")
    if not separator:
        return PathEndpoint(text, text)
    if scheme in ("fifo", "file"):
        return PathEndpoint(text, path, appends=scheme == "file")
    if scheme == "binary":
        return Program(text)
    raise _unsupported(text)


def _unsupported(text: str) -> UnsupportedError:
    return UnsupportedError(
        f"streams of the kind {text.partition('://')[0]}:// are not supported: {text}",
        "use a fifo, file:// or, for standard output, binary://",
    )


def _enlarge(fd: int) -> None:
    try:
        fcntl.fcntl(fd, fcntl.F_SETPIPE_SZ, PIPE_BYTES)
    except OSError:
        pass  # over the user's pipe budget: only slower
