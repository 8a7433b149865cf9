"""The host's namespaces, for what must not run in the sandbox's. Light to import: used before the machine starts."""

from __future__ import annotations

import errno
import os

from kata import sysio

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

_AT_ONCE = 200
"""Descriptors in one message: the kernel takes 253 (SCM_MAX_FD)."""


class Namespaces:
    """The host's namespaces, held open from before the engine left them."""

    __slots__ = ("_mount", "_network")

    def __init__(self) -> None:
        flags = os.O_RDONLY | os.O_CLOEXEC
        self._mount = os.open("/proc/self/ns/mnt", flags)
        self._network = os.open("/proc/self/ns/net", flags)

    def copy_network(self) -> int:
        """A descriptor of the host's network namespace, which the caller closes."""
        return os.dup(self._network)

    def close(self) -> None:
        """Let go of them."""
        os.close(self._mount)
        os.close(self._network)

    def enter(self) -> None:
        """Go there; for a child that has just been forked.

        The host's network is not entered by root of a user namespace, to whom it does not belong: files are reached all
        the same, and sockets by their paths (setns(2)).
        """
        try:
            sysio.setns(self._network, sysio.CLONE_NEWNET)
        except PermissionError:
            if not sysio.in_user_namespace():
                raise
        sysio.setns(self._mount, sysio.CLONE_NEWNS)

    def open_trees(self, paths: Sequence[str]) -> list[int | OSError]:
        """Copies of mounts as the host sees them, which may be more than the engine does: where the host's mounts
        are private, what is mounted there after the engine's start does not appear here.

        Blocks, and forks.

        Args:
            paths: On the host; symbolic links in them are followed.

        Returns:
            For each a descriptor for `kata.sysio.move_mount`, which the caller closes, or why there is none.

        Raises:
            OSError: The host's namespaces cannot be entered.
        """
        found: list[int | OSError] = []
        for start in range(0, len(paths), _AT_ONCE):
            found += self._open_trees(paths[start : start + _AT_ONCE])
        return found

    def are_seen_here(self, paths: Sequence[str]) -> bool:
        """Whether these directories are the same here as on the host, where others may be mounted upon them.

        Blocks, and forks.

        Raises:
            OSError: One is not there; or the host's namespaces cannot be entered.
        """
        from functools import partial  # with collections, which take 3 ms before the machine starts

        flags = os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC
        for start in range(0, len(paths), _AT_ONCE):
            some = paths[start : start + _AT_ONCE]
            found = self._sent([partial(os.open, path, flags) for path in some], some)
            opened = [one for one in found if isinstance(one, int)]
            try:
                for path, one in zip(some, found, strict=True):
                    if isinstance(one, OSError):
                        raise one
                    if not os.path.samestat(os.fstat(one), os.stat(path)):
                        return False
            finally:
                for one in opened:
                    os.close(one)
        return True

    def opened(self, work: Callable[[], int], path: str) -> int:
        """What *work* opens in the host's namespaces. Blocks, and forks.

        Args:
            work: Is called in a child there; a descriptor.
            path: What its failure is about.

        Returns:
            The descriptor, which the caller closes.

        Raises:
            OSError: Of *work*; or the host's namespaces cannot be entered.
        """
        [found] = self._sent([work], [path])
        if isinstance(found, OSError):
            raise found
        return found

    def mounted(self, work: Callable[[], None], path: str) -> int:
        """What *work* mounts at a path, with the host's mounts in sight, and nowhere on the host.

        Blocks, and forks.

        Args:
            work: Is called in a child, in a copy of the host's mount namespace that goes with it.
            path: On the host; without symbolic links.

        Returns:
            A descriptor for `kata.sysio.move_mount`, which the caller closes.

        Raises:
            OSError: Of *work*; or the host's namespaces cannot be entered.
        """

        def opened() -> int:
            sysio.unshare(sysio.CLONE_NEWNS)
            sysio.mount(None, "/", None, sysio.MS_REC | sysio.MS_PRIVATE)
            work()
            return sysio.open_tree(path)

        [tree] = self._sent([opened], [path])
        if isinstance(tree, OSError):
            raise tree
        return tree

    def _open_trees(self, paths: Sequence[str]) -> list[int | OSError]:
        from functools import partial

        return self._sent([partial(sysio.open_tree, path) for path in paths], paths)

    def _sent(self, opens: Sequence[Callable[[], int]], paths: Sequence[str]) -> list[int | OSError]:
        """What a child in the host's namespaces opens: for each a descriptor, or why there is none."""
        import socket

        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        child = os.fork()
        if child == 0:
            try:
                self.enter()
                numbers, trees = [], []
                for one in opens:
                    try:
                        trees.append(one())
                        numbers.append(0)
                    except OSError as error:
                        numbers.append(error.errno or errno.EIO)
                socket.send_fds(theirs, [bytes(numbers)], trees)
            finally:
                os._exit(0)
        theirs.close()
        with ours:
            # Nothing arrives when the child could not even enter.
            numbers_seen, trees_seen, _, _ = socket.recv_fds(
                ours, len(paths), len(paths), socket.MSG_CMSG_CLOEXEC
            )
        os.waitpid(child, 0)
        if len(numbers_seen) != len(paths):
            raise OSError(errno.EPERM, "the host's mount namespace cannot be entered")
        remaining_trees = iter(trees_seen)
        return [
            OSError(number, os.strerror(number), path) if number else next(remaining_trees)
            for number, path in zip(numbers_seen, paths, strict=True)
        ]
