"""How every kata process begins and ends, and the command that starts another one.

Imported on every start, so it imports next to nothing.
"""

from __future__ import annotations

import _imp
import io
import os
import sys
from marshal import loads as unmarshal

TYPE_CHECKING = False
if TYPE_CHECKING:
    from types import CodeType, ModuleType
    from typing import Any, NoReturn

STDOUT = "standard output"
"""Stands for a file name in errors of writing it."""


def settle() -> None:
    """Bring this process into the state that all of its code takes for granted; before anything else.

    From now on its own modules are found in a shorter way (`_Finder`).

    Descriptors 0 to 2 are open: one that the caller has closed becomes /dev/null. Otherwise the next file or
    connection would get its number, and what is printed would go there, or what is read would come from there.

    Nobody but the owner may write what is made, whatever the caller's umask: it can only take more away.
    """
    if not any(isinstance(finder, _Finder) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Finder())
    os.umask(os.umask(0o077) | 0o022)
    closed = [fd for fd in range(3) if not _is_open(fd)]
    if closed:
        for _ in closed:  # an open takes the lowest number that is free
            os.set_inheritable(os.open(os.devnull, os.O_RDWR | os.O_CLOEXEC), True)
        # Python has made sys.stdin, sys.stdout and sys.stderr from what there was: once more from the start.
        os.execv(sys.executable, sys.orig_argv)


_external: Any = sys.modules["_frozen_importlib_external"]
_PACKAGE = "kata."
_TAG = f".{sys.implementation.cache_tag}.pyc"
_HEAD = 16
"""Bytes in front of a compiled module's code: magic number, flags, and the source's time and size (PEP 552)."""


class _Loader(_external.SourceFileLoader):  # type: ignore[misc]
    """Executes a module whose code has been read already; whatever else is asked for, the source's file has."""

    def __init__(self, name: str, path: str, code: CodeType) -> None:
        super().__init__(name, path)
        self._code = code

    def exec_module(self, module: ModuleType) -> None:
        """See `importlib.abc.Loader`."""
        exec(self._code, module.__dict__)


class _Finder:
    """Finds the modules of this package in fewer steps than Python's own finder takes, as long as each is compiled.

    That one lists directories, looks for extension modules, and reads through two layers of files: half of what the
    import of a small module costs, and a command has forty of them. Whatever is out of the ordinary is left to it: a
    module that is not compiled, or whose source has changed since.
    """

    def find_spec(self, name: str, path: Any, target: Any = None) -> Any:
        """See `importlib.abc.MetaPathFinder`; None for what Python's finder is to look for."""
        if not name.startswith(_PACKAGE) or not path:
            return None
        base = path[0]
        tail = name.rpartition(".")[2]
        source = f"{base}/{tail}.py"
        code = _compiled(source, f"{base}/__pycache__/{tail}{_TAG}")
        places = None
        if code is None:
            places = [f"{base}/{tail}"]
            source = f"{base}/{tail}/__init__.py"
            code = _compiled(source, f"{base}/{tail}/__pycache__/__init__{_TAG}")
        if code is None:
            return None
        loader = _Loader(name, source, code)
        return _external.spec_from_file_location(
            name, source, loader=loader, submodule_search_locations=places
        )


def _compiled(source: str, path: str) -> CodeType | None:
    """The code of a module; None unless it is compiled from the source as that is now."""
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except OSError:
        return None
    try:
        data = os.read(fd, os.fstat(fd).st_size)
        made_from = os.stat(source)
    except OSError:
        return None
    finally:
        os.close(fd)
    mtime, size = int(made_from.st_mtime) & 0xFFFFFFFF, made_from.st_size & 0xFFFFFFFF
    head = _external.MAGIC_NUMBER + bytes(4) + mtime.to_bytes(4, "little") + size.to_bytes(4, "little")
    if data[:_HEAD] != head:
        return None
    try:
        code: CodeType = unmarshal(memoryview(data)[_HEAD:])
        _imp._fix_co_filename(code, source)  # type: ignore[attr-defined]
    except (ValueError, EOFError, TypeError):
        return None
    return code


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


def leave(status: int) -> NoReturn:
    """End this process, after `let_go`.

    What waits to be done at the end is done, in the interpreter's order: threads end, then the functions of `atexit`
    are called. The interpreter is not taken apart, which is a tenth of a short command's time, and most of the end of
    an engine's process.

    Args:
        status: What to exit with.
    """
    import atexit

    threads: Any = sys.modules.get("threading")
    if threads is not None:
        threads._shutdown()
    if atexit._ncallbacks():
        atexit._run_exitfuncs()
        status = let_go(status)
    os._exit(status & 0xFF)  # what exit(3) makes of it


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
