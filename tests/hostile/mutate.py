"""Damage to valid input, from a seed: documents whose parts have other types, bytes that are not what they were."""

from __future__ import annotations

import copy
import json
import random
from typing import Any

VALUES: tuple[Any, ...] = (
    *(
        None,
        True,
        False,
        0,
        -1,
        1 << 63,
        1 << 200,
        1e308,
        "",
        "x" * 5000,
        [],
        {},
        [[]],
        {"": None},
        "..",
        "/",
        "\0",
    ),
    *(
        "\ud800",
        "a\nb",
        "\x1b[2J",
        "sha256:",
        "sha256:" + "0" * 64,
        "sha256:" + "g" * 64,
        "../../etc/passwd",
        "é" * 300,
    ),
)
"""What stands in the place of a document's value."""
TEXTS: tuple[str, ...] = (
    *(
        "",
        " ",
        "-",
        "--",
        "-1",
        "0",
        "9" * 40,
        "1e9",
        "NaN",
        "inf",
        "0x10",
        "a" * 5000,
        "é",
        "\u202e",
        "a\nb",
        "\x1b[2J",
    ),
    *(
        "\udcff\udcfe",
        "..",
        "/",
        "//",
        "./",
        "~",
        "a:b:c:d:e",
        ":",
        "=",
        "=x",
        ",",
        ",,,",
        "[::1]:80:80",
        "1.2.3.4:99999:1",
    ),
    *(
        "%s%n",
        "$(true)",
        "`true`",
        "'",
        '"',
        "\\",
        "oci:",
        "oci:/nonexistent",
        "rootfs:/dev/null",
        "docker-archive:/dev/zero",
    ),
    *(
        "*",
        "?",
        "@",
        "a@sha256:1",
        "/dev/zero",
        "/dev/full",
        "/proc/self/mem",
        "2147483648",
        "18446744073709551616",
        "-0",
        "1k",
        "1kk",
        "5s",
        "1h1h",
    ),
)
"""What stands in the place of an argument."""


def document(content: Any, random_: random.Random) -> Any:
    """A JSON document with one or two of its parts replaced, removed, or doubled."""
    content = copy.deepcopy(content)
    for _ in range(random_.choice((1, 1, 1, 2))):
        places = list(_places(content))
        if not places:
            return random_.choice(VALUES)
        holder, key = random_.choice(places)
        how = random_.random()
        if how < 0.75:
            holder[key] = random_.choice(VALUES)
        elif how < 0.9:
            del holder[key]
        elif isinstance(holder, list):
            holder.append(holder[key])
        else:
            holder[f"{key}x"] = holder.pop(key)
    return content


def _places(content: Any) -> Any:
    """All (container, key) of a document."""
    items = (
        content.items()
        if isinstance(content, dict)
        else enumerate(content)
        if isinstance(content, list)
        else ()
    )
    for key, value in list(items):
        yield content, key
        yield from _places(value)


def encoded(content: Any) -> bytes:
    """JSON with lone surrogates as escapes, as a hostile writer would have them."""
    return json.dumps(content).encode()


def damaged(data: bytes, random_: random.Random) -> bytes:
    """Bytes with a few of them changed, cut off, doubled, or with something in between."""
    out = bytearray(data)
    for _ in range(random_.choice((1, 1, 2, 4))):
        at = random_.randrange(len(out) + 1)
        how = random_.randrange(5)
        if how == 0 and out:
            out[at % len(out)] = random_.choice((0, 0x7F, 0x80, 0xFF, random_.randrange(256)))
        elif how == 1:
            del out[at:]
        elif how == 2:
            out[at:at] = random_.randbytes(random_.choice((1, 8, 600)))
        elif how == 3:
            out[at:at] = out[at : at + 512]
        elif out:
            # Where a number may be: a field of eight digits, or four bytes.
            out[at : at + 4] = random_.choice((b"7777", b"\xff\xff\xff\xff", b"\0\0\0\0", b"-1 \0"))
    return bytes(out)


_TAR_FIELDS = (
    (0, 100),
    (100, 8),
    (108, 8),
    (116, 8),
    (124, 12),
    (136, 12),
    (156, 1),
    (157, 100),
    (257, 8),
    (329, 8),
    (345, 155),
)
"""Offset and length of a tar header's fields, without its checksum (POSIX pax, "ustar Interchange Format")."""
_TAR_VALUES = (
    b"",
    b"\xff" * 155,
    b"7" * 155,
    b"\x80" + b"\0" * 10 + b"\x01",
    b"-1",
    b"0o17",
    b" 1 ",
    b"../../x",
    b"/",
    b".",
)
_TAR_KINDS = b"01234567LKxgSVDNXA\0"


def damaged_tar(data: bytes, random_: random.Random) -> bytes:
    """A tar archive with a field of one or two headers changed, and checksums that are right nevertheless."""
    out = bytearray(data)
    headers = [at for at in range(0, len(out) - 511, 512) if out[at + 257 : at + 262] == b"ustar"]
    for at in random_.sample(headers, min(len(headers), random_.choice((1, 1, 2)))):
        offset, length = random_.choice(_TAR_FIELDS)
        value = bytes([random_.choice(_TAR_KINDS)]) if length == 1 else random_.choice(_TAR_VALUES)
        out[at + offset : at + offset + length] = value[:length].ljust(length, b"\0")
        out[at + 148 : at + 156] = b" " * 8
        out[at + 148 : at + 156] = b"%06o\0 " % sum(out[at : at + 512])
    return bytes(out)
