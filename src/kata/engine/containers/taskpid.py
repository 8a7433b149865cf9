"""A number on the host for each container of a pod, by which clients tell their PID namespaces apart.

A client names a container's PID namespace by the pid of its task: ``/proc/PID/ns/pid`` (CRI's ``TARGET``, of
``kubectl debug --target``). All containers of a pod run in one process of the host, the hypervisor, so that pid alone
would not say whose is meant. What does is a thread of the engine for each: a thread's number is one of the same kind,
taken as long as the thread lives, ``/proc/NUMBER`` is there for it, with the sandbox's network namespace, and a signal
to it reaches the engine, with which the sandbox ends. It costs no process and nothing to be removed; it sleeps for as
long as its container is there.

Source: proc(5), "/proc/tid"; kill(2), whose number may be any thread's.
"""

from __future__ import annotations

import _thread
import re

_PATH = re.compile(r"/proc/([0-9]+)/ns/pid")
_STACK = 128 << 10
"""Bytes of stack, of which it touches a few pages. Python wants 32 KiB at the least."""


class TaskPid:
    """A sleeping thread that stands for one container's processes.

    Attributes:
        pid: Its number on the host.
    """

    __slots__ = ("_ends", "pid")

    def __init__(self) -> None:
        self._ends = _thread.allocate_lock()
        self._ends.acquire()
        told: list[int] = []
        ready = _thread.allocate_lock()
        ready.acquire()
        ends = self._ends

        def sleep() -> None:
            told.append(_thread.get_native_id())
            ready.release()
            ends.acquire()

        former = _thread.stack_size(_STACK)
        try:
            _thread.start_new_thread(sleep, ())
        finally:
            _thread.stack_size(former)
        ready.acquire()
        self.pid = told[0]

    def end(self) -> None:
        """The container is gone. May be called again."""
        if self._ends.locked():
            self._ends.release()


def of_path(path: str) -> int:
    """The number in the path of a process's PID namespace; 0 for any other path."""
    found = _PATH.fullmatch(path)
    return int(found[1]) if found and len(found[1]) < 10 else 0
