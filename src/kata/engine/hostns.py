"""The host's namespaces, for what must not run in the sandbox's. Light to import: used before the machine starts."""

from __future__ import annotations

import errno
import os

from .. import sysio

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Sequence

_AT_ONCE = 200
"""Descriptors in one message: the kernel takes 253 (SCM_MAX_FD)."""


class Namespaces:
    """The host's namespaces, held open from before the engine left them."""

    __slots__ = ("_mount", "_network")

    def __init__(self) -> None:
        flags = os.O_RDONLY | os.O_CLOEXEC
        self._mount = os.open("/proc/self/ns/mnt", flags)
        self._network = os.open("/proc/self/ns/net", flags)

    def enter(self) -> None:
        """Go there; for a child that has just been forked."""
        sysio.setns(self._network, sysio.CLONE_NEWNET)
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

    def _open_trees(self, paths: Sequence[str]) -> list[int | OSError]:
        import socket

        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        child = os.fork()
        if child == 0:
            try:
                self.enter()
                numbers, trees = [], []
                for path in paths:
                    try:
                        trees.append(sysio.open_tree(path))
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
        rest = iter(trees_seen)
        return [
            OSError(number, os.strerror(number), path) if number else next(rest)
            for number, path in zip(numbers_seen, paths, strict=True)
        ]
