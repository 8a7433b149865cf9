"""Progress bars on stderr, if that is a terminal, for work that takes longer than about a second.

There is a bar for the image as a whole, whose size is that of all its layers, and one for each layer that is being
fetched. They go away when the work ends; a line about the whole stays.
"""

from __future__ import annotations

import sys
import threading
import time
from typing import Any

from kata.errors import RegistryError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from types import TracebackType

LAYER = "layer "
"""Begins the name of the step that fetches one layer; its digest follows, without the algorithm."""
KEPT_AFTER = (RegistryError, KeyboardInterrupt)
"""What a pull may end by that leaves what has arrived for the next attempt."""
_AFTER = 0.7
_WORDS = {
    "pull": "pulling",
    "unpack": "unpacking",
    "open": "opening",
    "write": "writing its file system",
    "wait": "waiting for another kata",
}
_NO_BYTES = frozenset({"write", "wait"})
"""Steps that are not measured by bytes of the image."""


class Terminal:
    """The default `Progress` of the image store: may be called from several threads.

    `rich` is imported only when the first bar is drawn, so that short work does not pay for it.

    Args:
        title: Name of what is fetched or converted.
    """

    def __init__(self, title: str) -> None:
        self._title = "".join(char if char.isprintable() else "?" for char in title)
        self._lock = threading.Lock()
        self._started = time.monotonic()
        self._bars: Any = None
        self._tasks: dict[str, Any] = {}
        self._layers: dict[str, bool] = {}
        self._pulled = (0, 0)
        self._wanted = sys.stderr is not None and sys.stderr.isatty()

    def __call__(self, what: str, done: int, total: int) -> None:
        """Update the bar of a step.

        Args:
            what: The step: ``pull``, ``unpack``, ``open``, ``write``, ``wait``, or ``layer DIGEST``; of layers that are
                there already, too, as soon as the image's layers are known.
            done: How much is done: bytes, but for ``write``.
            total: How much there is; 0 if unknown.
        """
        if not self._wanted:
            return
        with self._lock:
            if what == "pull":
                self._pulled = done, total
            elif what.startswith(LAYER):
                self._layers[what] = done >= total
            if time.monotonic() - self._started < _AFTER:
                return
            if self._bars is None:
                self._bars = _bars(self._title)
            if what.startswith(LAYER):
                self._draw_layer(what, done, total)
            else:
                self._draw(what, done, total)

    def _draw(self, what: str, done: int, total: int) -> None:
        words = _WORDS.get(what, what)
        if what == "pull" and self._layers:
            words += f" {sum(self._layers.values())} of {_layers(len(self._layers))}"
        if what not in self._tasks:
            self._tasks[what] = self._bars.add_task(words, total=total or None, bytes=what not in _NO_BYTES)
        self._bars.update(self._tasks[what], description=words, completed=done, total=total or None)

    def _draw_layer(self, what: str, done: int, total: int) -> None:
        """The bar of a layer is there while it is being fetched: an image may have more layers than there are lines."""
        task = self._tasks.get(what)
        if done >= total:
            if task is not None:
                self._bars.remove_task(self._tasks.pop(what))
        elif task is not None:
            self._bars.update(task, completed=done)
        elif done:
            words = what.removeprefix(LAYER)[:12]
            self._tasks[what] = self._bars.add_task(words, total=total, completed=done, bytes=True)

    def __enter__(self) -> Terminal:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with self._lock:
            self._wanted = False
        if self._bars is not None:
            self._bars.stop()
            done, total = self._pulled
            kept = kind is not None and issubclass(kind, KEPT_AFTER)
            if total and (kept or kind is None):
                self._say_outcome(done, total, kept=kept)

    def _say_outcome(self, done: int, total: int, *, kept: bool) -> None:
        whole = f"{_mib(total)} in {_layers(len(self._layers))}"
        if kept:
            whole = f"{_mib(done)} of {whole} have arrived; the next attempt goes on from there"
        sys.stderr.write(f"{self._title}: {whole}\n")


def _mib(count: int) -> str:
    return f"{count / (1 << 20):.1f} MiB"


def _layers(count: int) -> str:
    return f"{count} layer{'' if count == 1 else 's'}"


def _bars(title: str) -> Any:
    from rich.console import Console
    from rich.markup import escape
    from rich.progress import BarColumn, DownloadColumn, Progress, Task, TextColumn, TimeRemainingColumn
    from rich.text import Text

    class Amount(DownloadColumn):
        """``1.2/3.4 MiB``; a share where the step is not measured by bytes of the image."""

        def render(self, task: Task) -> Text:
            return super().render(task) if task.fields["bytes"] else Text(f"{task.percentage:.0f} %")

    bars = Progress(
        TextColumn(f"{escape(title)}: {{task.description}}"),
        BarColumn(),
        Amount(binary_units=True),
        TimeRemainingColumn(),
        console=Console(stderr=True),
        transient=True,
    )
    bars.start()
    return bars
