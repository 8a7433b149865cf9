"""Boot slots: of many machines that are asked for at once, a few boot and the others wait in line.

A boot keeps a processor busy from its beginning to its end. Of thirty at once on two processors each takes as long
as all of them, and a hundred run into the patience of those who wait for an answer. With slots the first are up as
soon as they would be alone, and the last no later than before.

A boot slot is an advisory lock (flock(2)) on one of a few files, so the kernel takes it back from whoever dies with it.
Who finds none free waits in line: that is a lock as well, and only its holder looks for a free slot.
"""

from __future__ import annotations

import errno
import fcntl
import os
import time

from kata import paths
from kata.sysio import Fd

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

DIRECTORY = "boots"
"""Of the files, in `kata.paths.run_dir`; they stay, as it does."""
PATIENCE_S = 300.0
"""Then a machine boots without a slot: if somebody keeps theirs, rather slowly than never."""
POLL_S = 0.002
"""How often (in seconds) the first in line looks for a free slot; a machine from a template needs it for 50 ms."""
LOOK_S = 0.1
"""How often somebody looks again who lets all boots go first."""
_LINE = "line"


class BootSlot:
    """The permission to boot; waiting for it blocks.

    Args:
        log: Is told why there was none to be had; the machine boots all the same.
        most: How many have a slot at a time. 0 is one more than there are processors, so that none of them idles
            while a boot waits for a disk.
        patience_s: How long to wait for one.
    """

    __slots__ = ("_lock",)

    def __init__(self, log: Callable[[str], object], most: int = 0, patience_s: float = PATIENCE_S) -> None:
        directory = os.path.join(paths.run_dir(), DIRECTORY)
        most = most or len(os.sched_getaffinity(0)) + 1
        self._lock: Fd | None = None
        try:
            paths.make_dirs(directory, 0o700)
            self._lock = _any(directory, most)
            if self._lock is None:
                self._lock = _in_line(directory, most, time.monotonic() + patience_s)
        except OSError as error:
            log(f"machines cannot take boot slots: {error.strerror}: {error.filename or directory}")
            return
        if self._lock is None:
            log(f"no boot slot came free in {patience_s:g} s: booting without one")

    @property
    def is_held(self) -> bool:
        """Whether there is one."""
        return self._lock is not None

    def end(self) -> None:
        """The next, please. May be called again."""
        if self._lock is not None:
            self._lock.close()
            self._lock = None


def wait_for_calm(patience_s: float, most: int = 0) -> None:
    """Return when no machine boots, or that has lasted too long. Blocks.

    Args:
        patience_s: How long that may take.
        most: As of `BootSlot`.
    """
    directory = os.path.join(paths.run_dir(), DIRECTORY)
    most = most or len(os.sched_getaffinity(0)) + 1
    until = time.monotonic() + patience_s
    while time.monotonic() < until and any(_is_held(directory, str(number)) for number in range(most)):
        time.sleep(LOOK_S)


def _is_held(directory: str, name: str) -> bool:
    try:
        with Fd(os.open(os.path.join(directory, name), os.O_RDONLY | os.O_CLOEXEC)) as file:
            # For a moment nobody else can have it: who wants it then finds it as the first in line.
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:
        pass  # nobody has ever had it
    return False


def _any(directory: str, most: int) -> Fd | None:
    for number in range(most):
        with _open(directory, str(number)) as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                continue
            return Fd(file.detach())
    return None


def _in_line(directory: str, most: int, until: float) -> Fd | None:
    with _open(directory, _LINE) as line:
        if not _first(line, until):
            return None
        while (lock := _any(directory, most)) is None and time.monotonic() < until:
            time.sleep(POLL_S)
        return lock


def _first(line: Fd, until: float) -> bool:
    """Wait to be the first in line. The kernel keeps the order, so this sleeps in it rather than looking again."""
    import signal

    def enough(number: int, frame: object) -> None:
        raise TimeoutError(errno.ETIMEDOUT, "waited long enough")

    before = signal.signal(signal.SIGALRM, enough)
    try:
        signal.setitimer(signal.ITIMER_REAL, max(until - time.monotonic(), POLL_S))
        fcntl.flock(line, fcntl.LOCK_EX)
    except TimeoutError:
        return False
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
    return True


def _open(directory: str, name: str) -> Fd:
    return Fd(os.open(os.path.join(directory, name), os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600))
