"""One user namespace for all that runs of an ordinary user who has networks with names.

A network namespace can be entered by those alone who are in the user namespace that it belongs to, or above. Engines of
two user namespaces that are beside each other could not both have an interface in one network (`kata.network.held`).
So each command of such a user goes into the user namespace of those that run, if there are any: itself and, as long as
their machines live, the engines in networks. They are written down in one file of the run directory, whose lock makes
one of two commands that start at the same time find the other. Nobody holds the namespace who has nothing else to do,
and it ends with the last process in it.

Only who may become root of that namespace gets into it: its owner, the same user (user_namespaces(7), "Capabilities").
"""

from __future__ import annotations

import fcntl
import os

from kata import paths, sysio

_FILE = "namespace.lock"
_MOST_BYTES = 1 << 20


class Companions:
    """The processes in the user's namespace. Nobody else changes them until this is closed.

    Raises:
        OSError: The file cannot be opened.
    """

    __slots__ = ("_fd",)

    def __init__(self) -> None:
        paths.make_dirs(paths.run_dir(), 0o711)
        path = os.path.join(paths.run_dir(), _FILE)
        self._fd = sysio.Fd(os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600))
        try:
            fcntl.flock(self._fd.raw, fcntl.LOCK_EX)
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> Companions:
        return self

    def __exit__(self, *_error: object) -> None:
        self.close()

    def close(self) -> None:
        """Let others go on. Idempotent."""
        self._fd.close()

    def _living(self) -> list[tuple[int, int, str]]:
        found = []
        for line in os.pread(self._fd.raw, _MOST_BYTES, 0).decode("ascii", "replace").splitlines():
            words = line.split()
            if len(words) == 3 and words[0].isdecimal() and words[1].isdecimal():
                pid, starttime, boot = int(words[0]), int(words[1]), words[2]
                if sysio.process_alive(pid, starttime, boot):
                    found.append((pid, starttime, boot))
        return found

    def join(self) -> bool:
        """Go into their user namespace. This process has one thread, and is in the user namespace above.

        Returns:
            Whether it is there now; false where nobody runs, or the kernel does not let this process in.
        """
        for pid, starttime, boot in self._living():
            try:
                with sysio.Fd(os.open(f"/proc/{pid}/ns/user", os.O_RDONLY | os.O_CLOEXEC)) as there:
                    if sysio.process_alive(pid, starttime, boot):  # it was that one's namespace
                        sysio.setns(there.raw, sysio.CLONE_NEWUSER)
                        return True
            except OSError:
                continue
        return False

    def add(self) -> None:
        """Write this process down, and those that have ended no longer.

        Raises:
            OSError: The disk is full.
        """
        own = sysio.proc_starttime(os.getpid())
        assert own is not None
        kept = [one for one in self._living() if one[0] != os.getpid()]
        lines = [f"{pid} {starttime} {boot}\n" for pid, starttime, boot in kept]
        text = "".join([*lines, f"{os.getpid()} {own} {sysio.boot_id()}\n"]).encode()
        os.pwrite(self._fd.raw, text, 0)
        os.ftruncate(self._fd.raw, len(text))


def has_networks() -> bool:
    """Whether this user has a network with a name."""
    try:
        return bool(os.listdir(os.path.join(paths.state_dir(), paths.NETWORKS)))
    except OSError:
        return False
