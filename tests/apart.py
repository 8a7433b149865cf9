"""Running a part of a test in namespaces of its own. Needs root."""

from __future__ import annotations

import os
import traceback
from collections.abc import Callable

from kata import sysio, threads


def in_network(work: Callable[[], None]) -> None:
    """Run something in a thread that has a network namespace of its own; its exception is raised here."""

    def apart() -> None:
        sysio.unshare(sysio.CLONE_NEWNET)
        work()

    threads.aside(apart)


def in_mounts(work: Callable[[], None]) -> None:
    """Run something in a child that has a mount namespace of its own; what it raises fails the test.

    A child, since /proc/self/mountinfo is that of a process's first thread.
    """
    reader, writer = os.pipe()
    pid = os.fork()
    if pid == 0:
        try:
            sysio.unshare(sysio.CLONE_NEWNS)
            sysio.mount(None, "/", None, sysio.MS_REC | sysio.MS_PRIVATE)
            work()
        except BaseException:
            os.write(writer, traceback.format_exc().encode()[-4000:])
        finally:
            os._exit(0)
    os.close(writer)
    with os.fdopen(reader) as file:
        problem = file.read()
    os.waitpid(pid, 0)
    assert not problem, problem
