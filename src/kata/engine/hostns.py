"""The host's namespaces, for what must not run in the sandbox's. Light to import: used before the machine starts."""

from __future__ import annotations

import os

from .. import sysio


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
