"""Opening the paths that a caller named for a process's standard streams."""

from __future__ import annotations

import fcntl
import os
import stat

from kata.errors import UnsupportedError, UsageError

PIPE_BYTES = 1 << 20


def open_stream(path: str, flags: int) -> int:
    """Open a fifo (or plain file) that the Task API named, without ever blocking.

    Args:
        path: A path or a ``fifo://`` or ``file://`` URI.
        flags: O_RDONLY, O_WRONLY or O_RDWR.

    Raises:
        UnsupportedError: Another kind of URI.
        UsageError: It cannot be opened, or is neither a fifo nor a file.
    """
    if "://" in path:
        scheme, _, rest = path.partition("://")
        if scheme not in ("fifo", "file"):
            raise UnsupportedError(
                f"streams of the kind {scheme}:// are not supported: {path}",
                "use a fifo, file:// or, for standard output, binary://",
            )
        if scheme == "file" and flags != os.O_RDONLY:
            flags = os.O_WRONLY | os.O_CREAT | os.O_APPEND
        path = rest
    try:
        fd = os.open(path, flags | os.O_NONBLOCK | os.O_CLOEXEC, 0o600)
    except OSError as error:
        raise UsageError(
            f"cannot open the stream {path}: {error.strerror}", "its reader has to be there first"
        ) from error
    mode = os.fstat(fd).st_mode
    if stat.S_ISFIFO(mode):
        try:
            fcntl.fcntl(fd, fcntl.F_SETPIPE_SZ, PIPE_BYTES)
        except OSError:
            pass  # over the user's pipe budget: only slower
    elif not (stat.S_ISREG(mode) or stat.S_ISCHR(mode)):
        os.close(fd)
        raise UsageError(f"cannot use {path} as a stream: it is neither a fifo nor a file")
    return fd
