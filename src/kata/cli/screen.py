"""The whole terminal for one command: its size, keys, lines that are drawn where they have changed, and its way back.

Plain control sequences of ECMA-48 that every terminal of today has; so there is no description of terminals to be
missing, and the widths of characters are Unicode's (as terminals have them), not the C library's.
"""

from __future__ import annotations

import os
import select
import signal
import sys
import termios
import time
import unicodedata

from kata.errors import KataError, ToldToEnd

TYPE_CHECKING = False
if TYPE_CHECKING:
    from types import FrameType
    from typing import Any

BOLD, DIM, REVERSE, RED, GREEN, YELLOW, CYAN = "1", "2", "7", "31", "32", "33", "36"
_COLOURS = frozenset({RED, GREEN, YELLOW, CYAN})
_ENTER = "\x1b[?1049h\x1b[?25l\x1b[?7l\x1b[2J"  # another screen, no cursor, no wrapping at the edge
_LEAVE = "\x1b[0m\x1b[?7h\x1b[?25h\x1b[?1049l"
_KEYS = {
    "[A": "up",
    "[B": "down",
    "[C": "right",
    "[D": "left",
    "OA": "up",
    "OB": "down",
    "OC": "right",
    "OD": "left",
    "[H": "home",
    "[F": "end",
    "OH": "home",
    "OF": "end",
    "[1~": "home",
    "[4~": "end",
    "[5~": "page up",
    "[6~": "page down",
}
_PLAIN_KEYS = {
    "\r": "enter",
    "\n": "enter",
    "\x7f": "backspace",
    "\x08": "backspace",
    "\x1b": "escape",
    "\x0c": "redraw",
}
ESCAPE_S = 0.05
"""How long the rest of a key's sequence may take, in seconds; then it was the key Escape."""


def width(text: str) -> int:
    """How many columns a text takes; its characters are printable."""
    if text.isascii():
        return len(text)
    return sum(map(_width, text))


def _width(character: str) -> int:
    if character.isascii():
        return 1
    if unicodedata.combining(character) or unicodedata.category(character) in ("Mn", "Me"):
        return 0
    return 2 if unicodedata.east_asian_width(character) in "WF" else 1


def fit(text: str, columns: int, *, right: bool = False) -> str:
    """A text in exactly so many columns: padded, or cut with an ellipsis."""
    if columns <= 0:
        return ""
    has = width(text)
    if has > columns:
        kept, has = "", 0
        for character in text:
            wide = _width(character)
            if has + wide > columns - 1:
                break
            kept, has = kept + character, has + wide
        text, has = kept + "\u2026", has + 1
    padding = " " * (columns - has)
    return padding + text if right else text + padding


class Line:
    """A line of the screen: pieces of text, each with its style."""

    __slots__ = ("pieces",)

    def __init__(self, text: str = "", *styles: str) -> None:
        self.pieces: list[tuple[str, tuple[str, ...]]] = []
        if text:
            self.add(text, *styles)

    def add(self, text: str, *styles: str) -> Line:
        """Add a text, whose characters are printable."""
        self.pieces.append((text, styles))
        return self

    def plain(self) -> str:
        """The text alone."""
        return "".join(text for text, _ in self.pieces)

    def render(self, columns: int, *, colour: bool, selected: bool = False) -> str:
        """The control sequences for it, in so many columns at most."""
        out, left = "", columns
        for text, styles in self.pieces:
            if width(text) > left:
                text = fit(text, left)
            left -= width(text)
            codes = [one for one in styles if colour or one not in _COLOURS]
            if selected:
                codes.append(REVERSE)
            out += f"\x1b[{';'.join(codes)}m{text}\x1b[0m" if codes else text
        if selected and left > 0:
            out += f"\x1b[{REVERSE}m{' ' * left}\x1b[0m"
        return out


class Screen:
    """Holds the terminal from `__enter__` to `__exit__`, whatever happens between.

    SIGTERM and SIGHUP end the command by way of `ToldToEnd`; SIGTSTP gives the terminal back until SIGCONT.

    Args:
        colour: Whether to use colours; bold and reverse text is used without as well.

    Raises:
        KataError: Standard input or output is no terminal.
    """

    def __init__(self, *, colour: bool = True) -> None:
        if not (sys.stdin.isatty() and sys.stdout.isatty()):
            raise KataError(
                "standard input and output are no terminal", "--once prints a table, --json JSON"
            )
        if os.environ.get("TERM", "") in ("", "dumb"):
            raise KataError(
                "this terminal cannot move its cursor (TERM)", "--once prints a table, --json JSON"
            )
        self._in, self._out = sys.stdin.fileno(), sys.stdout.fileno()
        self._colour = colour
        self._saved: list[Any] = []
        self._shown: list[str] = []
        self._pending = ""
        self._handlers: dict[int, Any] = {}
        self._wake_read = self._wake_write = -1
        self.columns, self.rows = 80, 24
        self._is_stale = True

    # ---- the terminal's state ----

    def __enter__(self) -> Screen:
        self._wake_read, self._wake_write = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
        self._saved = termios.tcgetattr(self._in)
        for number in (signal.SIGTERM, signal.SIGHUP):
            self._handlers[number] = signal.signal(number, self._on_end)
        self._handlers[signal.SIGTSTP] = signal.signal(signal.SIGTSTP, self._on_stop)
        self._handlers[signal.SIGWINCH] = signal.signal(signal.SIGWINCH, self._on_resize)
        try:
            self._take()
        except BaseException:
            self._restore()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self._restore()

    def _restore(self) -> None:
        for number, handler in self._handlers.items():
            signal.signal(number, handler)
        self._give_back()
        os.close(self._wake_read)
        os.close(self._wake_write)

    def _take(self) -> None:
        mode = termios.tcgetattr(self._in)
        mode[0] &= ~(termios.IXON | termios.ICRNL)
        mode[3] &= ~(termios.ICANON | termios.ECHO)  # signals of keys stay
        mode[6][termios.VMIN], mode[6][termios.VTIME] = 1, 0
        termios.tcsetattr(self._in, termios.TCSADRAIN, mode)
        self._write(_ENTER)
        self._measure()

    def _give_back(self) -> None:
        try:
            self._write(_LEAVE)
            termios.tcsetattr(self._in, termios.TCSADRAIN, self._saved)
        except (OSError, termios.error):
            pass  # the terminal has gone

    def _measure(self) -> None:
        try:
            found = os.get_terminal_size(self._out)
            self.columns, self.rows = found.columns or 80, found.lines or 24
        except OSError:
            pass
        self._is_stale = True

    # ---- signals ----

    def wake(self) -> None:
        """Have `key` return soon. May be called in any thread."""
        try:
            os.write(self._wake_write, b"w")
        except OSError:
            pass  # it is awake already, or at its end

    def _on_end(self, number: int, frame: FrameType | None) -> None:
        raise ToldToEnd(number)

    def _on_resize(self, number: int, frame: FrameType | None) -> None:
        self._measure()
        self.wake()

    def _on_stop(self, number: int, frame: FrameType | None) -> None:
        self._give_back()
        signal.signal(signal.SIGTSTP, signal.SIG_DFL)
        os.kill(os.getpid(), signal.SIGTSTP)  # here until SIGCONT
        signal.signal(signal.SIGTSTP, self._on_stop)
        self._take()
        self.wake()

    # ---- output ----

    def _write(self, text: str) -> None:
        data = text.encode("utf-8", "replace")
        while data:
            data = data[os.write(self._out, data) :]

    def draw(self, lines: list[Line], selected: int = -1) -> None:
        """Show these lines, from the top; what has not changed is not written again.

        Args:
            lines: At most `rows` of them are shown.
            selected: Which of them is marked.
        """
        # A signal's handler says so, and may do that in the middle of this: the next time repaints all then.
        if self._is_stale:
            self._is_stale = False
            self._shown = []
        columns = self.columns
        wanted = [
            line.render(columns, colour=self._colour, selected=index == selected)
            for index, line in enumerate(lines[: self.rows])
        ]
        wanted += [""] * (self.rows - len(wanted))
        out = ""
        for index, text in enumerate(wanted):
            if index >= len(self._shown) or self._shown[index] != text:
                out += f"\x1b[{index + 1};1H{text}\x1b[K"
        if out:
            self._write(out)
        self._shown = wanted

    # ---- input ----

    def key(self, timeout_s: float) -> str:
        """The next key.

        Args:
            timeout_s: How long to wait for one, in seconds.

        Returns:
            A character; ``up``, ``enter`` and so on for others; empty if none was pressed, or `wake` was called.

        Raises:
            KataError: The terminal has gone.
        """
        if not self._pending and not self._read(timeout_s):
            return ""
        first, self._pending = self._pending[0], self._pending[1:]
        if first != "\x1b":
            name = _PLAIN_KEYS.get(first, first)
            if name == "redraw":
                self._shown = []
            return name if len(name) > 1 or name.isprintable() else ""
        give_up = time.monotonic() + ESCAPE_S
        while not self._sequence() and time.monotonic() < give_up and self._read(ESCAPE_S):
            pass
        found = self._sequence()
        if not found:
            return "escape"
        self._pending = self._pending[len(found) :]
        return _KEYS.get(found, "unknown")

    def _sequence(self) -> str:
        """What is left of the sequence of a key behind its escape character; empty if it is not whole, or is none."""
        text = self._pending
        if text[:1] == "O" and len(text) > 1:
            return text[:2]
        if text[:1] != "[":
            return ""
        for index, character in enumerate(text[1:], 1):
            if "@" <= character <= "~":
                return text[: index + 1]
        return ""

    def _read(self, timeout_s: float) -> bool:
        ready, _, _ = select.select([self._in, self._wake_read], [], [], max(0.0, timeout_s))
        if self._wake_read in ready:
            try:
                os.read(self._wake_read, 4096)
            except BlockingIOError:
                pass
        if self._in not in ready:
            return False
        data = os.read(self._in, 4096)
        if not data:
            raise KataError("the terminal has gone")
        self._pending += data.decode("utf-8", "replace")
        return True
