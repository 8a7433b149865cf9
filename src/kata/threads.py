"""Work in a thread that is over when it is done, for what a thread has to itself."""

from __future__ import annotations

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import TypeVar

    _Made = TypeVar("_Made")


def aside(work: Callable[[], _Made]) -> _Made:
    """Do something in a thread of its own, and wait for it.

    Namespaces, root and working directory may be a thread's own (setns(2), unshare(2)), and end with it: an ordinary
    user's process could not even go back into the host's. Returns and raises what *work* does.
    """
    made: list[_Made] = []
    errors: list[BaseException] = []

    def run() -> None:
        try:
            made.append(work())
        except BaseException as error:
            errors.append(error)

    import threading

    visitor = threading.Thread(target=run)
    visitor.start()
    visitor.join()
    if errors:
        raise errors[0]
    return made[0]
