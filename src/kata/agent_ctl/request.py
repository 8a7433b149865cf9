"""Builds a request from the words of a command line: a JSON object, ``--field value`` pairs, or both."""

from __future__ import annotations

import json
import sys

from kata.agent_ctl.jsonmap import check, enum_values, find_field, from_json, read_base64, read_enum
from kata.errors import UsageError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Sequence
    from typing import Any

    from kata.agent_ctl.methods import Method
    from kata.proto.codec import Field, Message

_TRUE, _FALSE = ("true", "1", "yes", "on"), ("false", "0", "no", "off")


def build(method: Method, words: Sequence[str], globals_: Sequence[str] = ()) -> Message:
    """Build the request of a method.

    Args:
        method: The method.
        words: The words after its name: at most one JSON object (``{...}``, ``@FILE`` or ``-``), and pairs
            ``--field value``, ``--outer.inner value`` or ``--field=value``, which override the object.
        globals_: Names of options that belong before the method, for a better message.

    Raises:
        UsageError: The words are malformed, or do not fit the method.
    """
    document: str | None = None
    pairs: list[tuple[str, str | None]] = []
    queue = list(words)
    while queue:
        word = queue.pop(0)
        if word.startswith("--") and len(word) > 2:
            name, attached, value = word[2:].partition("=")
            if not attached and queue and not (queue[0].startswith("--") and len(queue[0]) > 2):
                pairs.append((name, queue.pop(0)))
            else:
                pairs.append((name, value if attached else None))
        elif document is None and (word == "-" or word.startswith(("{", "@", "json://", "file://"))):
            document = word
        else:
            raise UsageError(
                f"{method.name}: unexpected argument {word!r}",
                f"usage: {method.name} ['{{JSON}}' | @FILE | -] [--FIELD VALUE ...]",
            )
    value = load_json(document, method.name) if document is not None else {}
    message = from_json(method.request, value, method.name)
    for name, text in pairs:
        if "--" + name in globals_ and not _has_field(method.request, name):
            raise UsageError(
                f"{method.name} has no field {name!r}", f"the option --{name} goes before {method.name}"
            )
        _assign(message, name.split("."), text, method.name, f"--{name}")
    return message


def _has_field(cls: type[Message], name: str) -> bool:
    return any(field.name == name for field in cls.fields())


def load_json(document: str, where: str) -> Any:
    """Parse JSON that is given as text (``{...}``, ``json://{...}``), ``@FILE`` (``file://FILE``) or ``-``.

    Args:
        document: As the user wrote it.
        where: Which argument it is, for errors.

    Raises:
        UsageError: It cannot be read, or is not JSON.
    """
    if document.startswith("json://"):
        document = document[len("json://") :]
    elif document.startswith("file://"):
        document = "@" + document[len("file://") :]
    if document == "-" or document.startswith("@"):
        source = read_file(document[1:] or "-", where)
        origin = "standard input" if document in ("-", "@-") else document[1:]
    else:
        source, origin = document.encode("utf-8", "surrogateescape"), "the argument"
    try:
        return json.loads(source)
    except RecursionError:
        raise UsageError(f"{where}: {origin} is nested too deeply") from None
    except UnicodeDecodeError:
        raise UsageError(f"{where}: {origin} is not UTF-8 text") from None
    except ValueError as error:
        raise UsageError(f"{where}: {origin} is not valid JSON: {error}") from None


def read_file(path: str, where: str) -> bytes:
    """Read a file, or standard input for ``-``.

    Args:
        path: Path of the file, or ``-``.
        where: Which argument it is, for errors.

    Raises:
        UsageError: It cannot be read.
    """
    if path == "-":
        return sys.stdin.buffer.read()
    try:
        with open(path, "rb") as file:
            return file.read()
    except OSError as error:
        raise UsageError(f"{where}: cannot read {path}: {error.strerror}") from None


# ---- --field value ----


def _assign(message: Message, path: list[str], text: str | None, where: str, option: str) -> None:
    cls = type(message)
    field = find_field(cls, path[0], f"{where} {option}")
    rest = path[1:]
    if rest and field.label == "%":
        getattr(message, field.name)[".".join(rest)] = _value(cls, field, text, where, option)
        return
    if rest:
        if field.sub is None or field.label == "*":
            what = "a list: give its elements as JSON" if field.label == "*" else f"a {field.kind}"
            raise UsageError(f"{where} {option}: {field.name} is {what}", f"--{field.name} VALUE")
        inner = getattr(message, field.name)
        if inner is None:
            inner = field.sub()
            setattr(message, field.name, inner)
        _assign(inner, rest, text, where, option)
        return
    if field.label == "%":
        document = _need(text, where, option)
        merged = from_json(cls, {field.name: load_json(document, f"{where} {option}")}, where)
        getattr(message, field.name).update(getattr(merged, field.name))
    elif field.label == "*":
        getattr(message, field.name).extend(_elements(cls, field, text, where, option))
    else:
        setattr(message, field.name, _value(cls, field, text, where, option))


def _elements(cls: type[Message], field: Field, text: str | None, where: str, option: str) -> list[Any]:
    """The elements that one use of an option adds to a list: a single one, or those of a JSON array."""
    if field.sub is None and not (text or "").startswith("["):
        return [_value(cls, field, text, where, option)]
    found = load_json(_need(text, where, option), f"{where} {option}")
    wrapped = from_json(cls, {field.name: found if isinstance(found, list) else [found]}, where)
    elements: list[Any] = getattr(wrapped, field.name)
    return elements


def _need(text: str | None, where: str, option: str) -> str:
    if text is None:
        raise UsageError(f"{where}: {option} needs a value", f"{where} --help shows the fields")
    return text


def _value(cls: type[Message], field: Field, text: str | None, where: str, option: str) -> Any:
    place = f"{where} {option}"
    kind = field.kind
    if kind == "bool" and text is None:
        return True
    text = _need(text, where, option)
    if field.sub is not None:
        return from_json(field.sub, load_json(text, place), place)
    if kind == "string":
        found: Any = text
    elif kind == "bytes":
        found = read_bytes(text, place)
    elif kind == "bool":
        if text.lower() not in (*_TRUE, *_FALSE):
            raise UsageError(f"{place}: {text!r} is neither true nor false")
        found = text.lower() in _TRUE
    elif kind == "enum":
        values = enum_values(cls, field)
        found = read_enum(cls, field, text if text in values else _number(text, text), place)
    else:
        found = _number(text, None)
        if found is None:
            raise UsageError(f"{place}: {text!r} is not an integer ({kind})")
    check(kind, found, place)
    return found


def read_bytes(text: str, where: str) -> bytes:
    """Parse the value of a bytes field: base64, ``@FILE`` (``@-``: standard input), or ``text:...`` literally.

    Args:
        text: As the user wrote it.
        where: Which argument it is, for errors.

    Raises:
        UsageError: It is none of these.
    """
    if text.startswith("@"):
        return read_file(text[1:], where)
    if text.startswith("text:"):
        return text[len("text:") :].encode("utf-8", "surrogateescape")
    try:
        return read_base64(text, where)
    except UsageError as error:
        raise UsageError(error.message, "or give @FILE, or text:... for the text itself") from None


def _number(text: str, otherwise: Any) -> Any:
    """Parse an integer in decimal, 0x, 0o, 0b, or (as file modes are written) octal with a leading zero."""
    try:
        if len(text) > 1 and text[0] == "0" and text.isdecimal():
            return int(text, 8)
        return int(text, 0)
    except ValueError:
        return otherwise
