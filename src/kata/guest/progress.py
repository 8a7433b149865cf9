"""Telling a person what a long step is doing: a bar on a terminal, a line now and then elsewhere."""

from __future__ import annotations

import sys
import time
from typing import Protocol

TYPE_CHECKING = False
if TYPE_CHECKING:
    from rich.progress import TaskID


class Progress(Protocol):
    """What the builder reports to."""

    def note(self, text: str) -> None:
        """Say that something happens, in a few words."""

    def start(self, title: str) -> None:
        """Begin a step whose length is known."""

    def update(self, fraction: float) -> None:
        """Say how much of the step is done, from 0 to 1."""

    def stop(self) -> None:
        """End the step, done or not."""


class Silent:
    """Says nothing."""

    def note(self, text: str) -> None:
        """See `Progress`."""

    def start(self, title: str) -> None:
        """See `Progress`."""

    def update(self, fraction: float) -> None:
        """See `Progress`."""

    def stop(self) -> None:
        """See `Progress`."""


class Lines:
    """A line a tenth, for logs."""

    def __init__(self) -> None:
        self._title = ""
        self._tenth = 0
        self._began = 0.0

    def note(self, text: str) -> None:
        """See `Progress`."""
        print(f"  {text}", file=sys.stderr, flush=True)

    def start(self, title: str) -> None:
        """See `Progress`."""
        self._title, self._tenth, self._began = title, 0, time.monotonic()
        self.note(title)

    def update(self, fraction: float) -> None:
        """See `Progress`."""
        tenth = int(fraction * 10)
        if tenth > self._tenth:
            self._tenth = tenth
            self.note(f"{self._title}: {tenth * 10} % after {time.monotonic() - self._began:.0f} s")

    def stop(self) -> None:
        """See `Progress`."""


class Bar:
    """A bar with the time that is left, on a terminal."""

    def __init__(self) -> None:
        # Only a person who waits pays for this import.
        from rich.console import Console
        from rich.progress import (
            BarColumn,
            Progress,
            TaskProgressColumn,
            TextColumn,
            TimeElapsedColumn,
            TimeRemainingColumn,
        )

        self._console = Console(stderr=True)
        self._bar = Progress(
            TextColumn("  {task.description}"),
            BarColumn(),
            TaskProgressColumn(),
            TimeElapsedColumn(),
            TextColumn("left:"),
            TimeRemainingColumn(),
            console=self._console,
            transient=True,
        )
        self._task: TaskID | None = None

    def note(self, text: str) -> None:
        """See `Progress`."""
        self._console.print(f"  {text}", markup=False, highlight=False)

    def start(self, title: str) -> None:
        """See `Progress`."""
        self._task = self._bar.add_task(title, total=1.0)
        self._bar.start()

    def update(self, fraction: float) -> None:
        """See `Progress`."""
        if self._task is not None:
            self._bar.update(self._task, completed=fraction)

    def stop(self) -> None:
        """See `Progress`."""
        if self._task is not None:
            self._bar.remove_task(self._task)
            self._bar.stop()
            self._task = None


def for_stderr() -> Progress:
    """What suits standard error: a bar on a terminal, else lines."""
    return Bar() if sys.stderr.isatty() else Lines()
