"""The interactive mode: one command a line, with completion and history on a terminal."""

from __future__ import annotations

import os
import sys

from kata.agent_ctl import methods, output
from kata.agent_ctl.session import COMMANDS, Session, split
from kata.errors import KataError, UsageError
from kata.ttrpc.status import TtrpcError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterator

HISTORY_LINES = 1000
_OWN = {
    "help": "show this help, or the fields of a method",
    "timing": "timing on|off: print how long each call took",
    "output": "output json|text: how answers are printed",
    "timeout": "timeout SECONDS: for each call; 0 is no timeout",
    "quit": "end (so does the end of the input)",
}


def run(session: Session) -> int:
    """Read commands until the input ends.

    Returns:
        0; or 1 if a command failed and the input is not a terminal.
    """
    terminal = sys.stdin.isatty()
    if terminal:
        print(f"{session.link.label}; 'help' lists the commands", file=sys.stderr)
        _set_up_editing()
    failed = False
    for line in _lines(terminal):
        try:
            if _command(session, line):
                break
        except KataError as error:
            output.report(error)
            failed = True
        except TtrpcError as error:
            output.report(error, line.split()[0])
            failed = True
        except KeyboardInterrupt:
            sys.stderr.write("\ninterrupted\n")
            failed = True
    if terminal:
        _save_history()
    return 1 if failed and not terminal else 0


def _lines(terminal: bool) -> Iterator[str]:
    """Yield the lines that are commands, without empty ones and ``#`` comments."""
    while True:
        try:
            line = input("agent> ") if terminal else sys.stdin.readline()
        except EOFError:
            print(file=sys.stderr)
            return
        except KeyboardInterrupt:
            print("^C", file=sys.stderr)
            continue
        except UnicodeDecodeError:
            output.report(UsageError("a line that is not UTF-8 text was ignored"))
            continue
        if not terminal and not line:
            return
        if line.strip() and not line.lstrip().startswith("#"):
            yield line


def _command(session: Session, line: str) -> bool:
    """Run one line. Returns true if the session is to end."""
    words = split(line)
    name, rest = words[0], words[1:]
    if name in ("quit", "exit"):
        return True
    if name == "help":
        if rest:
            session.run(["list", rest[0]])
        else:
            _help()
    elif name in ("timing", "output", "timeout"):
        _set(session, name, rest)
    else:
        session.run(words)
    return False


def _set(session: Session, name: str, rest: list[str]) -> None:
    value = rest[0] if len(rest) == 1 else ""
    if name == "timing" and value in ("on", "off"):
        session.style.timing = value == "on"
    elif name == "output" and value in (output.JSON, output.TEXT):
        session.style.form = value
    elif name == "timeout" and value.replace(".", "", 1).isdecimal():
        session.timeout_s = float(value)
    else:
        raise UsageError(f"{name} {' '.join(rest)}: not understood".replace(" :", ":"), _OWN[name])


def _help() -> None:
    from kata.agent_ctl.options import table

    rows = [*COMMANDS.items(), *_OWN.items()]
    print(
        f"METHOD ['{{JSON}}' | @FILE] [--FIELD VALUE ...], or:\n{table(rows)}\nmethods: {' '.join(methods.names())}"
    )


# ---- editing ----


def _history_file() -> str:
    base = os.environ.get("XDG_STATE_HOME") or os.path.expanduser("~/.local/state")
    return os.path.join(base, "kata-agent-ctl", "history")


def _set_up_editing() -> None:
    try:
        import readline
    except ImportError:
        return
    readline.set_completer(Completer())
    readline.set_completer_delims(" \t\n")
    readline.parse_and_bind("tab: complete")
    try:
        readline.read_history_file(_history_file())
    except OSError:
        pass  # there is no history yet


def _save_history() -> None:
    try:
        import readline

        os.makedirs(os.path.dirname(_history_file()), mode=0o700, exist_ok=True)
        readline.set_history_length(HISTORY_LINES)
        readline.write_history_file(_history_file())
    except (ImportError, OSError):
        pass  # a read-only home directory is no error


class Completer:
    """Completes commands and methods, and then the fields of the method, including nested ones."""

    def __init__(self) -> None:
        self._found: list[str] = []

    def __call__(self, text: str, state: int) -> str | None:
        if state == 0:
            import readline

            before = readline.get_line_buffer()[: readline.get_begidx()].split()
            self._found = complete(before, text)
        return self._found[state] if state < len(self._found) else None


def complete(before: list[str], text: str) -> list[str]:
    """Return the candidates for a word.

    Args:
        before: The words before it.
        text: The beginning of the word.
    """
    if not before or before in (["help"], ["list"]):
        words = [*methods.names(), *COMMANDS, *(_OWN if not before else ())]
        return [word + " " for word in words if word.startswith(text)]
    method = methods.find(before[0])
    if method is None or not text.startswith("--"):
        return []
    *outer, last = text[2:].split(".")
    cls = method.request
    for name in outer:
        inner = next((field.sub for field in cls.fields() if field.name == name and not field.label), None)
        if inner is None:
            return []
        cls = inner
    prefix = "--" + "".join(f"{name}." for name in outer)
    return [
        prefix + field.name + ("." if field.sub is not None and not field.label else " ")
        for field in cls.fields()
        if field.name.startswith(last)
    ]
