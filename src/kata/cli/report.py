"""Prints errors for users, and ends programs by them."""

from __future__ import annotations

import os
import sys

from kata.errors import KataError, ToldToEnd
from kata.launcher import STDOUT

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Sequence


def report(error: KataError) -> None:
    """Print an error and its hint to stderr, coloured on a terminal unless NO_COLOR is set.

    Quoted input (an argument, a line of a file) is escaped, so that it cannot control the terminal.
    """
    colour = sys.stderr.isatty() and not os.environ.get("NO_COLOR")
    red, cyan, off = ("\x1b[1;31m", "\x1b[36m", "\x1b[0m") if colour else ("", "", "")
    lines = f"{red}error:{off} {_printable(error.message)}\n"
    if error.hint:
        lines += f"{cyan}hint:{off} {_printable(error.hint)}\n"
    try:
        sys.stderr.write(lines)
        sys.stderr.flush()
    except OSError:
        pass  # only the exit status reports the error


REMOVING = 1
"""The exit status of a command that could not remove something, as in Docker and Podman."""


def raise_failures(failures: Sequence[KataError], exit_code: int | None = None) -> None:
    """End a command that went on after failures: with the status of the first, after all of them were printed.

    Args:
        failures: In their order.
        exit_code: The status that the program is to end with instead of the first error's own.

    Raises:
        KataError: There is one. The last is raised, which whoever ends the program prints.
    """
    if not failures:
        return
    for failure in failures[:-1]:
        report(failure)
    failures[-1].exit_code = failures[0].exit_code if exit_code is None else exit_code
    raise failures[-1]


def _printable(text: str) -> str:
    return "".join(
        char if char.isprintable() or char in "\n\t" else char.encode("unicode_escape").decode()
        for char in text
    )


def exit_status(error: BaseException, program: str, failed: int | None = None) -> int:
    """Report what ended a program, and choose its exit status. For the last ``except`` of its main function.

    Args:
        error: What was raised.
        program: What was being run, for the sentence about a fault of our own: ``kata run``.
        failed: The status after any failure; None is that of the error (`KataError.exit_code`).

    Returns:
        As *failed* says; that of a `SystemExit`; 130 after Ctrl-C; 141 if the reader of our output has gone.

    Raises:
        BaseException: *error*, if it is none that a program ends by.
    """
    if isinstance(error, SystemExit):  # by --help
        return int(error.code or 0)
    if isinstance(error, KeyboardInterrupt):
        return 130
    if isinstance(error, ToldToEnd):
        import signal

        signal.signal(error.number, signal.SIG_DFL)  # so that the parent process sees it
        os.kill(os.getpid(), error.number)
        return 128 + error.number
    if isinstance(error, BrokenPipeError):
        # The reader of our output has gone (`kata ps | head`).
        _drop_output()
        return 141
    if isinstance(error, KataError):
        told = error
    elif isinstance(error, OSError):
        told = _explain(error)
        if error.filename == STDOUT:
            _drop_output()
    elif isinstance(error, RecursionError):
        told = KataError("the input is nested too deeply to be read")
    elif isinstance(error, Exception):
        from kata import crash

        told = crash.explain(error, program)
    else:
        raise error
    report(told)
    return told.exit_code if failed is None else failed


def _drop_output() -> None:
    """Let standard output lead nowhere; Python would report the error again while exiting."""
    os.dup2(os.open(os.devnull, os.O_WRONLY | os.O_CLOEXEC), 1)


def _explain(error: OSError) -> KataError:
    """Turn an operating system error that was not handled elsewhere into an error with a hint."""
    import errno

    if error.filename == STDOUT:
        return KataError(f"{STDOUT} cannot be written: {error.strerror}")
    where = f": {error.filename}" if error.filename else ""
    hints = {
        errno.ENOSPC: "free some space ('kata gc', 'kata rmi'), or move KATA_STATE_DIR to a larger disk",
        errno.EROFS: "set KATA_STATE_DIR and KATA_RUN_DIR to writable directories",
        errno.EACCES: "check the permissions of that path",
        errno.EMFILE: "raise the limit of open files ('ulimit -n')",
    }
    reason = error.strerror or str(error)
    return KataError(f"{reason}{where}", hints.get(error.errno or 0, ""))
