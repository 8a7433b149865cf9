"""Checks the report that comes from a machine: types, lengths and numbers. The machine that sent it is hostile.

What passes has exactly the members that are listed here. Its strings are bounded, and may hold any character: whoever
shows them escapes them for where they go.
"""

from __future__ import annotations

import json

from kata.errors import ImageError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Collection
    from typing import Any

TEXT = 1200
"""Characters of an ordinary string: 500 bytes of a name, of which none need be text."""
_LONG = 20_000
_NUMBER = 1 << 62
_LISTS = 20_000
_COUNTS = 100


class _Text:
    def __init__(self, most: int = TEXT) -> None:
        self.most = most


class _List:
    def __init__(self, of: Any, most: int = _LISTS) -> None:
        self.of = of
        self.most = most


class _Counts:
    """An object of numbers with keys of its own."""


_T, _N, _B = _Text(), int, bool

_IMAGE = {
    "has_layers": _B,
    "system": {"id": _T, "version": _T, "name": _T},
    "totals": {
        "files": _N, "directories": _N, "links": _N, "others": _N, "bytes": _N, "programs": _N, "libraries": _N,
    },
    "layers": _List(
        {
            "digest": _T, "kind": _T, "stored_bytes": _N, "bytes": _N, "entries": _N, "files": _N, "whole": _B,
        },
        1000,
    ),
    "masks": _List(_Text(_LONG), 200),
    "folders": _List({"path": _T, "bytes": _N, "files": _N}, 100),
    "hidden": {
        "files": _N,
        "bytes": _N,
        "largest": _List({"path": _T, "bytes": _N, "layer": _N, "by": _N}, 500),
    },
    "start": {
        "command": _List(_T, 100),
        "path": _T,
        "kind": _T,
        "scripts": _List({"path": _T, "text": _Text(_LONG)}, 50),
    },
    "counts": _Counts(),
    "findings": _List({"kind": _T, "path": _T, "detail": _T, "layer": _N}),
    "packages_found": _N,
    "packages": _List(
        {
            "kind": _T, "name": _T, "version": _T, "architecture": _T, "licence": _T, "path": _T, "within": _T,
            "layer": _N,
        }
    ),
}  # fmt: skip
_DIFFERENCE = {
    "packages_changed": _N,
    "packages": _List({"kind": _T, "name": _T, "was": _Text(4000), "is": _Text(4000)}, 1000),
    "files_changed": _N,
    "files": _List({"path": _T, "was": _T, "is": _T}, 1000),
}
_TRACE = {
    "seconds": _N,
    "status": _N,
    "ended": _T,
    "processes": _List({"pid": _N, "parent": _N, "command": _Text(4000)}, 1000),
    "files": _List({"path": _T, "what": _T}, 2000),
    "names": _List(_T, 1000),
    "connections": _List(_T, 1000),
    "output": _Text(_LONG),
    "truncated": _B,
}
_REPORT = {"format": _N, "images": _List(_IMAGE, 2), "milliseconds": _N}
_CLAMAV = {"files": _N, "signatures": _N, "seconds": _N, "problem": _T}
_FURTHER = {"difference": _DIFFERENCE, "trace": _TRACE, "clamav": _CLAMAV}
_OWED = {"clamav_seconds": "clamav"}
"""Member of the plan -> member that the report has then, and only then."""


def parse(data: bytes, images: int, asked: Collection[str] = ()) -> dict[str, Any]:
    """Parse and check a report.

    Args:
        data: What the machine sent.
        images: How many images it was given.
        asked: What it was told besides: members of the plan.

    Raises:
        ImageError: It is no such report.
    """
    try:
        content = json.loads(data)
    except (ValueError, RecursionError):
        raise ImageError("the machine sent no report that can be read") from None
    if not isinstance(content, dict):
        raise ImageError("the machine sent no report that can be read")
    shape = dict(_REPORT)
    shape.update({key: _FURTHER[key] for key in _FURTHER if key in content})
    for told, owed in _OWED.items():
        if (told in asked) != (owed in content):
            raise _wrong(f"report.{owed}")
    _check(content, shape, "report")
    if content["format"] != 1 or len(content["images"]) != images:
        raise ImageError("the machine sent the report of another program")
    return content


def _check(value: Any, shape: Any, where: str) -> None:
    if not _fits(value, shape):
        raise _wrong(where)
    if isinstance(shape, dict):
        for key, inner in shape.items():
            _check(value[key], inner, f"{where}.{key}")
    elif isinstance(shape, _List):
        for one in value:
            _check(one, shape.of, where)
    elif isinstance(shape, _Counts):
        for key, one in value.items():
            _check(key, _T, where)
            _check(one, _N, where)


def _fits(value: Any, shape: Any) -> bool:
    """Whether a value itself, but not yet what it holds, is of a shape."""
    if isinstance(shape, dict):
        return isinstance(value, dict) and value.keys() == shape.keys()
    if isinstance(shape, _List):
        return isinstance(value, list) and len(value) <= shape.most
    if isinstance(shape, _Text):
        return isinstance(value, str) and len(value) <= shape.most
    if isinstance(shape, _Counts):
        return isinstance(value, dict) and len(value) <= _COUNTS
    if shape is bool or isinstance(value, bool):
        return shape is bool and isinstance(value, bool)
    return isinstance(value, int) and -1 <= value <= _NUMBER


def _wrong(where: str) -> ImageError:
    return ImageError(f"the machine sent a report that is not as it should be: {where}")
