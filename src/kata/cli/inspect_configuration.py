"""What the report of `kata inspect-image` says of an image's configuration, without the secrets in it."""

from __future__ import annotations

import json
import re

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    from kata.images.handover import Selection

_READ = 4000
"""Characters of a string in which masks are looked for: all that is shown, and where a mask of it ends."""
_WHOLE = 1000
"""A mask of this many characters is the beginning of one: the machine sends no more."""


def _pattern(masks: list[str]) -> re.Pattern[str] | None:
    """What finds any of `masks`. Of long ones the beginning is enough, and takes the rest of the string with it."""
    wanted = sorted({mask for mask in masks if len(mask) >= 6}, key=len, reverse=True)
    parts = [
        re.escape(mask) if len(mask) < _WHOLE else re.escape(mask[:_WHOLE]) + "(?s:.*)" for mask in wanted
    ]
    return re.compile("|".join(parts)) if parts else None


def _masked(value: Any, pattern: re.Pattern[str]) -> Any:
    """A configuration without what is to be hidden. One pass: what takes a mask's place is not looked at again."""
    if isinstance(value, str):
        return pattern.sub(lambda match: _short(match[0]), value[:_READ])
    if isinstance(value, list):
        return [_masked(one, pattern) for one in value]
    if isinstance(value, dict):
        return {key: _masked(one, pattern) for key, one in value.items()}
    return value


def _short(secret: str) -> str:
    return f"{secret[:4]}... ({len(secret)} characters)"


def _texts(value: object, most: int = 200) -> list[str]:
    """Strings of a list, or keys of an object, of an image's configuration."""
    found = list(value) if isinstance(value, (list, dict)) else []
    return [str(one)[:1000] for one in found[:most]]


def described(chosen: Selection, masks: list[str] | None = None) -> dict[str, Any]:
    """What the configuration says, as far as the report shows it.

    Args:
        chosen: The image.
        masks: Strings to hide, from the machine that has read the image.

    Returns:
        ``image``, ``configuration`` and ``history``.
    """
    try:
        config = json.loads(chosen.config)
    except (ValueError, RecursionError):
        config = {}
    pattern = _pattern(masks or [])
    if pattern is not None:
        config = _masked(config, pattern)
    if not isinstance(config, dict):
        config = {}
    inner = config.get("config")
    if not isinstance(inner, dict):
        inner = {}
    history = config.get("history")

    def text(content: dict[str, Any], key: str, most: int = 1000) -> str:
        value = content.get(key)
        return value[:most] if isinstance(value, str) else ""

    labels = inner.get("Labels")
    platform = "/".join(part for key in ("os", "architecture", "variant") if (part := text(config, key, 50)))
    return {
        "image": {
            "name": chosen.name,
            "digest": chosen.digest,
            "platform": platform,
            "created": text(config, "created", 100),
        },
        "configuration": {
            "user": text(inner, "User"),
            "working_directory": text(inner, "WorkingDir"),
            "stop_signal": text(inner, "StopSignal"),
            "entrypoint": _texts(inner.get("Entrypoint")),
            "command": _texts(inner.get("Cmd")),
            "environment": _redacted(_texts(inner.get("Env"))),
            "ports": _texts(inner.get("ExposedPorts")),
            "volumes": _texts(inner.get("Volumes")),
            "labels": [
                f"{key[:200]}={str(value)[:500]}" for key, value in list(labels.items())[:200]
            ] if isinstance(labels, dict) else [],
        },
        "history": [
            {
                "by": text(step, "created_by"),
                "created": text(step, "created", 100),
                "empty": step.get("empty_layer") is True,
            }
            for step in (history if isinstance(history, list) else [])[:500]
            if isinstance(step, dict)
        ],
    }  # fmt: skip


_SECRET_WORDS = ("PASSWORD", "PASSWD", "SECRET", "TOKEN", "APIKEY", "API_KEY", "ACCESS_KEY", "PRIVATE_KEY")
_MASKED = re.compile(r".{4}\.\.\. \(\d+ characters\)", re.DOTALL)
"""What `_short` makes of a secret."""


def _redacted(variables: list[str]) -> list[str]:
    shown = []
    for one in variables:
        key, _, value = one.partition("=")
        hide = len(value) >= 6 and any(word in key.upper() for word in _SECRET_WORDS)
        # What the machine has masked is no secret any more.
        shown.append(f"{key}={_short(value)}" if hide and not _MASKED.fullmatch(value) else one)
    return shown
