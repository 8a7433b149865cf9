"""The last resort of every program: an exception that nobody expected becomes one sentence and a file to attach.

The files are ``$KATA_STATE_DIR/crashes/*.txt`` (or the system's directory for temporary files, where that cannot be
written): the newest eight, at most 64 KiB each, for root alone. They hold the exception's type, where in the program it
happened, and versions. Nothing else, since it may be secret: not the exception's words, no values of variables, and of
the command line the command's name.

Imported when it has happened, and not before.
"""

from __future__ import annotations

import contextlib
import os
import time

from kata import paths
from kata.errors import KataError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterator

_MOST_FILES = 8
_MOST_BYTES = 64 << 10
_MOST_EXCEPTIONS = 16


def explain(error: BaseException, program: str) -> KataError:
    """Write down an unexpected exception.

    Args:
        error: The exception.
        program: What was being run, for the sentence: ``kata run``.

    Returns:
        What to tell the user.
    """
    said = " ".join(str(error).split())
    shown = "".join(char if char.isprintable() else "?" for char in said)[:300]
    what = type(error).__name__ + (f": {shown}" if shown else "")
    try:
        path = _write(error, program)
    except OSError as failure:
        hint = f"please report it; its details could not be written down: {failure.strerror}"
    else:
        hint = f"please report it, and attach {path}"
    return KataError(f"{program} met a fault of its own: {what}", hint)


def last_resort(error: BaseException, program: str, status: int) -> int:
    """Tell of an unexpected exception on stderr.

    Returns:
        *status*, to exit with.
    """
    if isinstance(error, BrokenPipeError):
        return status  # whoever read from us has gone: there is nobody to tell, and no fault of ours
    told = explain(error, program)
    with contextlib.suppress(OSError):
        os.write(2, f"error: {told.message}\nhint: {told.hint}\n".encode(errors="backslashreplace"))
    return status


def _write(error: BaseException, program: str) -> str:
    import platform
    import tempfile

    from kata import __version__

    trace = "".join(_trace(error))
    if len(trace) > _MOST_BYTES:
        trace = f"{trace[: _MOST_BYTES // 2]}\n...\n{trace[-_MOST_BYTES // 2 :]}"
    text = (
        f"{program}, kata {__version__}, {time.strftime('%Y-%m-%dT%H:%M:%SZ', time.gmtime())}\n"
        f"Python {platform.python_version()}, {platform.platform()}\n\n{trace}"
    )
    name = f"{time.time_ns()}-{os.getpid()}.txt"
    directory = os.path.join(paths.state_dir(), "crashes")
    try:
        paths.make_dirs(directory, 0o700)
        path = os.path.join(directory, name)
        fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    except OSError:
        directory = ""
        fd, path = tempfile.mkstemp(".txt", "kata-crash-")
    try:
        with os.fdopen(fd, "wb") as file:
            file.write(text.encode(errors="backslashreplace"))
    except OSError:
        os.unlink(path)  # half of it would take the place of a whole one
        raise
    if directory:
        for old in sorted(os.listdir(directory))[:-_MOST_FILES]:
            with contextlib.suppress(OSError):
                os.unlink(os.path.join(directory, old))
    return path


def _trace(error: BaseException, told: set[int] | None = None) -> Iterator[str]:
    """As `traceback.format_exception`, without what the exceptions say.

    Args:
        error: The exception.
        told: Ids of those that have been told already.
    """
    import errno
    import traceback

    told = set() if told is None else told
    chain: list[tuple[BaseException, str]] = []
    link = ""
    one: BaseException | None = error
    while one is not None and id(one) not in told and len(told) < _MOST_EXCEPTIONS:
        told.add(id(one))
        chain.append((one, link))
        if one.__cause__ is not None:
            one, link = one.__cause__, "The above was the cause of:"
        else:
            one, link = None if one.__suppress_context__ else one.__context__, "While that was handled:"
    chain.reverse()
    for position, (each, _) in enumerate(chain):
        if position:
            yield f"\n{chain[position - 1][1]}\n\n"
        yield from traceback.format_tb(each.__traceback__)
        kind = type(each)
        number = (
            f" [{errno.errorcode.get(each.errno or 0, each.errno)}]" if isinstance(each, OSError) else ""
        )
        yield f"{kind.__module__}.{kind.__qualname__}{number}\n"
        for inner in each.exceptions if isinstance(each, BaseExceptionGroup) else ():
            if id(inner) not in told and len(told) < _MOST_EXCEPTIONS:
                yield "\nAmong them:\n\n"
                yield from _trace(inner, told)


def name_of(argv: list[str]) -> str:
    """How a program is called in the sentence: ``kata`` and its command, without arguments."""
    word = next((word for word in argv[1:] if not word.startswith("-")), "")
    return f"kata {word[:20]}" if word.isascii() and word.isalpha() else "kata"
