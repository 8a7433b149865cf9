"""How every kata process begins and ends, and the command that starts another one.

Imported on every start, so it imports next to nothing.
"""

from __future__ import annotations

import io
import os
import sys

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

STDOUT = "standard output"
"""Stands for a file name in errors of writing it."""


def settle() -> None:
    """Bring this process into the state that all of its code takes for granted; before anything else.

    Descriptors 0 to 2 are open: one that the caller has closed becomes /dev/null. Otherwise the next file or
    connection would get its number, and what is printed would go there, or what is read would come from there.

    Nobody but the owner may write what is made, whatever the caller's umask: it can only take more away.
    """
    os.umask(os.umask(0o077) | 0o022)
    closed = [fd for fd in range(3) if not _is_open(fd)]
    if closed:
        for _ in closed:  # an open takes the lowest number that is free
            os.set_inheritable(os.open(os.devnull, os.O_RDWR | os.O_CLOEXEC), True)
        # Python has made sys.stdin, sys.stdout and sys.stderr from what there was: once more from the start.
        os.execv(sys.executable, sys.orig_argv)


class _Output(io.FileIO):
    """Standard output; its errors can be told from those of other files."""

    def write(self, data: Any, /) -> int:
        """See `io.FileIO.write`."""
        try:
            return super().write(data)
        except OSError as error:
            error.filename = STDOUT
            raise


def name_output() -> None:
    """Have errors of writing standard output name it, for `kata.cli.report.exit_status`."""
    old = sys.stdout
    # A replacement by a test, or a closed stream, is left alone.
    if isinstance(old, io.TextIOWrapper) and isinstance(getattr(old.buffer, "raw", None), io.FileIO):
        buffer = io.BufferedWriter(_Output(old.fileno(), "w", closefd=False))
        sys.stdout = io.TextIOWrapper(
            buffer, encoding=old.encoding, errors=old.errors, line_buffering=old.line_buffering
        )


def let_go(status: int) -> int:
    """Write what the standard streams still hold; the last thing that a program does.

    What nobody takes any more (`kata run ... 2>&1 | head`) is dropped: Python would try once more while exiting, and
    make the status 120 of it. Output that is lost for another reason (a full disk) is told.

    Args:
        status: What the program is to exit with.

    Returns:
        The same; 1 for a 0 of which the output was lost.
    """
    for stream, fd in ((sys.stdout, 1), (sys.stderr, 2)):
        try:
            stream.flush()
        except OSError as error:
            os.dup2(os.open(os.devnull, os.O_WRONLY | os.O_CLOEXEC), fd)
            if fd == 1 and not status:  # otherwise the failure has been told
                status = 1
                if not isinstance(error, BrokenPipeError):
                    sys.stderr.write(f"error: standard output cannot be written: {error.strerror}\n")
    return status


def leave(status: int) -> None:
    """End this process, after `let_go`.

    Where nothing waits to be done at the end (functions of `atexit`, threads), the interpreter is not taken apart,
    which is a tenth of a short command's time.

    Args:
        status: What to exit with.
    """
    import atexit

    if "threading" not in sys.modules and not atexit._ncallbacks():
        os._exit(status & 0xFF)  # what exit(3) makes of it
    sys.exit(status)


def _is_open(fd: int) -> bool:
    try:
        os.fstat(fd)
    except OSError:
        return False
    return True


def command() -> list[str]:
    """The argv that starts a new kata process; the caller appends its arguments.

    Works from a checkout, an installation and under pytest alike: the interpreter is the one that runs now,
    and ``__main__.py`` finds the packages from its own place, so neither the environment nor the working
    directory matters.

    Returns:
        ``[interpreter, "-I", "-S", ".../kata/__main__.py"]``, absolute paths.
    """
    package = os.path.dirname(os.path.abspath(__file__))
    return [sys.executable, "-I", "-S", os.path.join(package, "__main__.py")]
