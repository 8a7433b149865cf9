"""Reports the progress of long steps: with a bar on a terminal, otherwise with a line from time to time."""

from __future__ import annotations

import sys
import time
from typing import Protocol

TYPE_CHECKING = False
if TYPE_CHECKING:
    from rich.progress import TaskID


class Progress(Protocol):
    """Takes the builder's reports."""

    def note(self, text: str) -> None:
        """Report an event in a few words."""

    def start(self, title: str) -> None:
        """Begin a step of known length."""

    def update(self, fraction: float) -> None:
        """Report which part of the step is done, from 0 to 1."""

    def stop(self) -> None:
        """End the step, whether it is complete or not."""


class Silent:
    """Reports nothing."""

    def note(self, text: str) -> None:
        """See `Progress`."""

    def start(self, title: str) -> None:
        """See `Progress`."""

    def update(self, fraction: float) -> None:
        """See `Progress`."""

    def stop(self) -> None:
        """See `Progress`."""


class Lines:
    """Prints a line for each tenth of a step, for logs."""

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
    """Draws a bar with the remaining time, on a terminal."""

    def __init__(self) -> None:
        # Imported only when a bar is drawn.
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
    """The kind of progress that suits standard error: a bar on a terminal, otherwise lines."""
    return Bar() if sys.stderr.isatty() else Lines()
