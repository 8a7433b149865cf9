"""Runs commands over one link, for the command line, ``-c`` and the interactive mode."""

from __future__ import annotations

import shlex
import time

from kata.agent_ctl import bench, fuzz, methods, output
from kata.agent_ctl.jsonmap import enum_values
from kata.agent_ctl.options import table
from kata.agent_ctl.request import build
from kata.errors import GuestProtocolError, UsageError
from kata.proto.codec import DecodeError, EncodeError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from kata.agent_ctl.links import Link
    from kata.agent_ctl.methods import Method
    from kata.agent_ctl.output import Style
    from kata.proto.codec import Field, Message

CALL_S = 60.0
"""Default timeout of a call, in seconds, unless it waits for an event."""
COMMANDS = {
    "bench": "measure latency and throughput",
    "fuzz": "send malformed frames and requests, and report how the agent handles them",
    "list": "list the methods, or the fields of one",
}
_HELP = ("-h", "--help")


class Session:
    """A link and the settings for its use.

    Args:
        open_link: Makes the link when it is first needed.
        style: How answers are printed.
        timeout_s: Timeout of every call; None for the method's default, 0 for none.
        global_options: Names of options that belong before a command, for a better message.
        own_vm: The agent runs in a machine that was made for this command.
    """

    def __init__(
        self,
        open_link: Callable[[], Link],
        style: Style,
        timeout_s: float | None,
        global_options: Sequence[str] = (),
        own_vm: bool = False,
    ) -> None:
        self._open = open_link
        self._link: Link | None = None
        self.style = style
        self.timeout_s = timeout_s
        self.global_options = tuple(global_options)
        self.own_vm = own_vm

    @property
    def link(self) -> Link:
        """The link; it is made on first use."""
        if self._link is None:
            self._link = self._open()
        return self._link

    def close(self) -> None:
        """Close the link."""
        if self._link is not None:
            self._link.close()
            self._link = None

    def run(self, words: Sequence[str]) -> int:
        """Run one command.

        Returns:
            The exit status.

        Raises:
            KataError, TtrpcError: It failed.
        """
        name, *rest = words
        if name in COMMANDS and rest[:1] and rest[0] in _HELP:
            name, rest = "list", [name]
        if name == "list":
            self._list(rest)
            return 0
        if name == "bench":
            return bench.run(self.link, rest, self.style)
        if name == "fuzz":
            return fuzz.run(self.link, rest, self.style, self.own_vm)
        method = methods.get(name, COMMANDS)
        if rest[:1] and rest[0] in _HELP:
            print(describe(method))
            return 0
        # The request is checked before a machine is started for it.
        request = build(method, rest, self.global_options)
        output.show(self.call(method, request), self.style)
        return 0

    def call(self, method: Method, request: Message) -> Message:
        """Make one call, and time it.

        Args:
            method: The method.
            request: A message of its type.

        Raises:
            KataError, TtrpcError: It failed.
        """
        timeout_s = self.timeout_s
        if timeout_s is None:
            timeout_s = None if method.waits else CALL_S
        try:
            payload = request.encode()
        except EncodeError as error:
            raise UsageError(str(error)) from None
        link = self.link
        answer = b""
        began = time.perf_counter()
        try:
            answer = link.call(method.service, method.method, payload, timeout_s or None)
        finally:
            if self.style.timing:
                output.say_time(method, time.perf_counter() - began, len(payload), len(answer))
        try:
            return method.response.decode(answer)
        except DecodeError as error:
            raise GuestProtocolError(f"{link.label} gave a malformed answer: {error}") from None

    def _list(self, words: Sequence[str]) -> None:
        if not words:
            if self.style.form == output.JSON:
                output.show_json(listing())
            else:
                print(listing_text())
        elif words[0] == "bench":
            print(bench.usage(), end="")
        elif words[0] == "fuzz":
            print(fuzz.usage(), end="")
        elif words[0] == "list":
            print("list [METHOD]: the methods, or the fields of one")
        else:
            print(describe(methods.get(words[0], COMMANDS)))


def split(line: str) -> list[str]:
    """Split a line into words, like a shell. A JSON object is one word, including its quotes and spaces.

    Raises:
        UsageError: A quote is not closed.
    """
    head, brace, tail = line.strip().partition("{")
    try:
        # `Method {"a": 1}`: an unquoted object follows the name, up to the last brace.
        if brace and len(head.split()) == 1 and head.endswith((" ", "\t")):
            document, closing, rest = tail.rpartition("}")
            if closing:
                return [head.strip(), "{" + document + "}", *shlex.split(rest)]
        return shlex.split(line)
    except ValueError as error:
        raise UsageError(f"{line.strip()[:60]!r} cannot be split into words: {str(error).lower()}") from None


# ---- what there is ----


def listing() -> list[dict[str, str]]:
    """All methods, as JSON values."""
    found = [methods.get(name) for name in methods.names()]
    return [
        {
            "name": method.name,
            "service": method.service,
            "request": method.request.FULL_NAME,
            "response": method.response.FULL_NAME,
        }
        for method in found
    ]


def listing_text() -> str:
    """All methods as text: by service, each with its fields."""
    out: list[str] = []
    service = ""
    rows: list[tuple[str, str]] = []

    def flush() -> None:
        if rows:
            out.append(f"{service}:\n{table(rows)}\n")
            rows.clear()

    for name in methods.names():
        method = methods.get(name)
        if method.service != service:
            flush()
            service = method.service
        rows.append((method.name, " ".join(field.name for field in method.request.fields())))
    flush()
    return "\n".join(out).rstrip()


def describe(method: Method) -> str:
    """The help of a method: the fields of its request and answer, and of each message type in them."""
    out = [f"usage: {method.name} ['{{JSON}}' | @FILE | -] [--FIELD VALUE ...]", ""]
    out.append(f"{method.service}.{method.method}({method.request.__name__}) -> {method.response.__name__}")
    seen: set[type[Message]] = set()
    queue = [method.request, method.response]
    while queue:
        cls = queue.pop(0)
        if cls in seen:
            continue
        seen.add(cls)
        queue += [field.sub for field in cls.fields() if field.sub is not None]
        rows = [(field.name, type_name(cls, field)) for field in cls.fields()]
        out.append(f"\n{cls.__name__}:\n{table(rows)}" if rows else f"\n{cls.__name__}: no fields")
    out.append(
        "\nA nested field is --outer.inner VALUE; a list's option may come several times, or takes a JSON array."
        "\nbytes: base64, @FILE, or text:...; integers also as 0x1f or 0644; a switch may stand alone."
    )
    return "\n".join(out)


def type_name(cls: type[Message], field: Field) -> str:
    """A field's type, as text."""
    name = field.sub.__name__ if field.sub is not None else field.kind
    if field.kind == "enum":
        name = "|".join(enum_values(cls, field)) or name
    if field.label == "%":
        return f"map from {field.key} to {name}"
    return (
        f"{name}, any number" if field.label == "*" else f"{name}, optional" if field.label == "?" else name
    )
