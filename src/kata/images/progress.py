"""A progress bar on stderr, if that is a terminal, for work that takes longer than about a second."""

from __future__ import annotations

import sys
import threading
import time
from typing import Any

TYPE_CHECKING = False
if TYPE_CHECKING:
    from types import TracebackType

_AFTER = 0.7
_WORDS = {
    "pull": "pulling",
    "unpack": "unpacking",
    "open": "opening",
    "write": "writing",
    "wait": "waiting for another kata",
}


class Terminal:
    """The default `Progress` of the image store: may be called from several threads.

    `rich` is imported only when the first bar is drawn, so that short work does not pay for it.

    Args:
        title: Name of what is fetched or converted.
    """

    def __init__(self, title: str) -> None:
        self._title = title
        self._lock = threading.Lock()
        self._started = time.monotonic()
        self._bars: Any = None
        self._tasks: dict[str, Any] = {}
        self._wanted = sys.stderr is not None and sys.stderr.isatty()

    def __call__(self, what: str, done: int, total: int) -> None:
        """Update the bar of a step.

        Args:
            what: The step: ``pull``, ``unpack``, ``open``, ``write`` or ``wait``.
            done: Bytes done.
            total: Total bytes; 0 if unknown.
        """
        if not self._wanted or time.monotonic() - self._started < _AFTER:
            return
        with self._lock:
            if self._bars is None:
                self._bars = _bars(self._title)
            task = self._tasks.get(what)
            if task is None:
                task = self._tasks[what] = self._bars.add_task(_WORDS.get(what, what), total=total or None)
            self._bars.update(task, completed=done, total=total or None)

    def __enter__(self) -> Terminal:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bars is not None:
            self._bars.stop()
        self._wanted = False


def _bars(title: str) -> Any:
    from rich.console import Console
    from rich.markup import escape
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn

    bars = Progress(
        TextColumn(f"{escape(title)}: {{task.description}}"),
        BarColumn(),
        DownloadColumn(binary_units=True),
        TimeRemainingColumn(),
        console=Console(stderr=True),
        transient=True,
    )
    bars.start()
    return bars
