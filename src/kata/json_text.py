"""JSON without the cost of `import json`: 11 ms with what it pulls in, most of it for regular expressions."""

from __future__ import annotations

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any


def dumps(value: Any) -> str:
    """Encode None, bool, int, finite float, str, list, tuple and dict as JSON.

    Raises:
        TypeError: It has a value of another type.
    """
    if value is None:
        return "null"
    if value is True:
        return "true"
    if value is False:
        return "false"
    if isinstance(value, int):
        return str(int(value))
    if isinstance(value, str):
        out = value.replace("\\", "\\\\").replace('"', '\\"')
        if out.isascii() and out.isprintable():
            return f'"{out}"'
        return '"' + "".join(c if " " <= c <= "~" else _u_escape(c) for c in out) + '"'
    if isinstance(value, dict):
        return "{" + ",".join(f"{dumps(str(k))}:{dumps(v)}" for k, v in value.items()) + "}"
    if isinstance(value, (list, tuple)):
        return "[" + ",".join(dumps(v) for v in value) + "]"
    if isinstance(value, float):
        return repr(value)
    raise TypeError(f"cannot write a {type(value).__name__} as JSON")


def _u_escape(char: str) -> str:
    code = ord(char)
    if code > 0xFFFF:
        code -= 0x10000
        return f"\\u{0xD800 + (code >> 10):04x}\\u{0xDC00 + (code & 0x3FF):04x}"
    return f"\\u{code:04x}"


class _Decoding:
    """How JSON is decoded, as the scanner in C asks for it: as `json.loads` does without arguments."""

    strict = True
    object_hook = None
    object_pairs_hook = None
    parse_float = float
    parse_int = int
    parse_constant = float


_scan: Callable[[str, int], tuple[Any, int]] | None = None


def loads(text: str | bytes) -> Any:
    """Decode JSON.

    It is CPython's scanner that does it in either case. What that objects to, `json.loads` is asked about, for its
    words.

    Raises:
        ValueError: It is not JSON.
    """
    global _scan
    try:
        if _scan is None:
            from _json import make_scanner

            _scan = make_scanner(_Decoding())  # type: ignore[arg-type]
        string = (text if isinstance(text, str) else str(text, "utf-8")).strip(" \t\r\n")
        value, end = _scan(string, 0)
        if end == len(string):
            return value
    except (ImportError, StopIteration, ValueError):
        pass
    import json

    return json.loads(text)
