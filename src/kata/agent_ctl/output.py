"""Prints answers and errors. All text from a guest is made safe for a terminal."""

from __future__ import annotations

import json
import sys

from kata.agent.text import escape_line
from kata.agent_ctl.jsonmap import to_json
from kata.cli import report as cli_report
from kata.errors import KataError
from kata.ttrpc.status import NAMES, TtrpcError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    from kata.agent_ctl.methods import Method
    from kata.proto.codec import Message

JSON, TEXT = "json", "text"


class Style:
    """How answers are printed.

    Attributes:
        form: `JSON` or `TEXT`.
        camel_case: Names in JSON are in lowerCamelCase.
        defaults: Include fields with zero values.
        timing: Print on standard error how long each call took.
    """

    __slots__ = ("camel_case", "defaults", "form", "timing")

    def __init__(
        self, form: str = JSON, *, camel_case: bool = False, defaults: bool = True, timing: bool = False
    ) -> None:
        self.form = form
        self.camel_case = camel_case
        self.defaults = defaults
        self.timing = timing


def show(message: Message, style: Style) -> None:
    """Print an answer to standard output.

    Args:
        message: The answer.
        style: How to print it.
    """
    if style.form == TEXT:
        show_text(message, style)
    else:
        show_json(to_json(message, camel_case=style.camel_case, defaults=style.defaults))


def show_json(value: Any) -> None:
    """Print JSON, in ASCII only, so that it cannot control a terminal."""
    sys.stdout.write(json.dumps(value, indent=2) + "\n")
    sys.stdout.flush()


def show_text(message: Message, style: Style) -> None:
    """Print an answer for people: just the content of a single text or data field; otherwise one field a line, with
    those of sub-messages indented.

    Args:
        message: The answer.
        style: How to print it.
    """
    fields = type(message).fields()
    if not fields:
        sys.stdout.write("ok\n")
    elif len(fields) == 1 and fields[0].kind in ("string", "bytes") and not fields[0].label:
        value = getattr(message, fields[0].name)
        _content(value.encode("utf-8", "surrogateescape") if isinstance(value, str) else value)
    else:
        lines: list[str] = []
        _tree(to_json(message, camel_case=style.camel_case, defaults=style.defaults), "", lines)
        sys.stdout.write("\n".join(lines) + "\n" if lines else "ok\n")
    sys.stdout.flush()


def _content(data: bytes) -> None:
    """Print data: unchanged to a file or pipe, line by line and escaped to a terminal."""
    if not sys.stdout.isatty():
        sys.stdout.flush()
        sys.stdout.buffer.write(data)
        return
    for line in data.decode("utf-8", "replace").removesuffix("\n").split("\n"):
        sys.stdout.write(escape_line(line, 1 << 16) + "\n")


def _tree(value: Any, indent: str, lines: list[str]) -> None:
    pairs = (
        value.items() if isinstance(value, dict) else ((f"[{at}]", item) for at, item in enumerate(value))
    )
    for name, item in pairs:
        shown = escape_line(str(name))
        if isinstance(item, (dict, list)):
            if not item:
                lines.append(f"{indent}{shown}: none")
                continue
            if isinstance(item, list) and not any(isinstance(one, (dict, list)) for one in item):
                lines.append(f"{indent}{shown}: {', '.join(escape_line(str(one)) for one in item)}")
                continue
            lines.append(f"{indent}{shown}:")
            _tree(item, indent + "  ", lines)
        else:
            text = str(item).lower() if isinstance(item, bool) else str(item)
            lines.append(f"{indent}{shown}: {escape_line(text)}")


def say_time(method: Method, seconds: float, sent: int, received: int) -> None:
    """Print a line about a call on standard error.

    Args:
        method: The method that was called.
        seconds: How long the call took.
        sent: Bytes of the request.
        received: Bytes of the answer.
    """
    sys.stderr.write(f"{method.name}: {duration(seconds)}, {sent} bytes out, {received} bytes back\n")
    sys.stderr.flush()


def duration(seconds: float) -> str:
    """Format a time with a suitable unit."""
    if seconds < 1e-3:
        return f"{seconds * 1e6:.0f} us"
    return f"{seconds * 1e3:.2f} ms" if seconds < 1 else f"{seconds:.2f} s"


def code_name(code: int) -> str:
    """The name of a status code, or its number."""
    return NAMES[code] if 0 <= code < len(NAMES) else f"code {code}"


def report(error: KataError | TtrpcError, method: str = "") -> None:
    """Print an error, and its hint, to standard error; coloured on a terminal unless NO_COLOR is set.

    Args:
        error: The error.
        method: Name of the method that was called; empty if none was.
    """
    if isinstance(error, TtrpcError):
        message, hint = error.split_hint()
        text = f"{method + ': ' if method else ''}{code_name(error.code)}: {escape_line(message)}"
        error = KataError(text, escape_line(hint))
    cli_report.report(error)
