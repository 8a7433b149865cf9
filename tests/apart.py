"""Running a part of a test in namespaces of its own."""

from __future__ import annotations

import threading
from collections.abc import Callable

from kata import sysio


def in_namespaces(work: Callable[[], None], namespaces: int) -> None:
    """Run something in a thread that has new namespaces, which end with it. Needs root.

    Args:
        work: What to run; its exception is raised here.
        namespaces: ``CLONE_NEWNET``, ``CLONE_NEWNS``. Mounts that are made there are seen nowhere else.
    """
    failed: list[BaseException] = []

    def run() -> None:
        try:
            sysio.unshare(namespaces)
            if namespaces & sysio.CLONE_NEWNS:
                sysio.mount(None, "/", None, sysio.MS_REC | sysio.MS_PRIVATE)
            work()
        except BaseException as error:
            failed.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    if failed:
        raise failed[0]
