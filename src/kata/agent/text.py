"""Text from a guest, made safe for a terminal, a log or an error message.

The guest is hostile: its text may contain escape sequences that rewrite a terminal, line breaks that forge log lines,
or megabytes of data. All text from a guest passes through this module first.
"""

from __future__ import annotations

MAX_LINES = 20
MAX_BYTES = 4096


def _visible(character: str) -> str:
    if character == "\t":
        return "    "
    if character.isprintable():
        return character
    code = ord(character)
    return f"\\x{code:02x}" if code < 0x100 else f"\\u{code:04x}" if code < 0x10000 else f"\\U{code:08x}"


def escape_line(text: str, limit: int = MAX_BYTES) -> str:
    r"""One line of printable characters, at most *limit* bytes of UTF-8; line breaks are shown as ``\x0a``."""
    # Cut first, or a guest could waste the host's time by having megabytes escaped.
    cut = text[:limit]
    shown = "".join(map(_visible, cut.rstrip()))
    raw = shown.encode("utf-8", "replace")
    if len(raw) <= limit and len(cut) == len(text):
        return shown
    return raw[: max(0, limit - 3)].decode("utf-8", "ignore") + "..."


def last_lines(raw: bytes, lines: int = MAX_LINES, limit: int = MAX_BYTES) -> list[str]:
    """Return the last lines of a guest's console or log.

    Args:
        raw: The guest's output.
        lines: Maximum number of lines.
        limit: Maximum number of bytes, after escaping.

    Returns:
        Printable lines, oldest first; empty ones are left out.
    """
    found: list[str] = []
    left = limit
    tail = raw[-16 * limit :].decode("utf-8", "replace").replace("\r", "\n")
    for line in reversed(tail.split("\n")):
        if not line.strip():
            continue
        shown = escape_line(line, left)
        left -= len(shown.encode("utf-8", "replace"))
        found.append(shown)
        if len(found) >= lines or left <= 3:
            break
    found.reverse()
    return found
