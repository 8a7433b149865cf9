"""Health checks on the command line: ``--health-cmd`` and its kin, and the image's own.

The engine runs them (`kata.engine.containers.health`).

Source: docker-run(1), podman-healthcheck(1); ``Healthcheck`` in the Docker image specification v1.2, in nanoseconds.
"""

from __future__ import annotations

import os
import re

from kata.cli import records
from kata.errors import UsageError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Mapping
    from typing import Any

    from kata.cli.args import Arguments
    from kata.cli.records import Container

_UNITS = {"h": 3600.0, "m": 60.0, "s": 1.0, "ms": 1e-3, "us": 1e-6, "µs": 1e-6, "ns": 1e-9}
_DEFAULTS = {"interval": 30.0, "timeout": 30.0, "start_period": 0.0}
_LEAST_S = 0.001


def duration(text: str, option: str) -> float:
    """Parse a duration as Go writes it (``1m30s``, ``500ms``).

    Args:
        text: As the user wrote it.
        option: The option it belongs to, for errors.

    Returns:
        Seconds.

    Raises:
        UsageError: It is none.
    """
    if text == "0":
        return 0.0
    parts = re.findall(r"(\d+(?:\.\d+)?)(h|ms|us|µs|ns|m|s)", text)
    if not parts or "".join(number + unit for number, unit in parts) != text:
        raise UsageError(f"{option} {text!r} is no duration", f"{option} 30s, 1m30s, 500ms")
    return sum(float(number) * _UNITS[unit] for number, unit in parts)


def wanted(arguments: Arguments, image: Mapping[str, Any]) -> dict[str, Any] | None:
    """The health check of a container that is made.

    Args:
        arguments: Those of `kata run`.
        image: The ``config`` object of the image.

    Returns:
        ``command``, and ``interval_s``, ``timeout_s``, ``start_period_s``, ``retries``; None for no check.

    Raises:
        UsageError: An option is malformed.
    """
    from kata.cli import values

    given = {name: arguments.value(f"health_{name}") for name in ("interval", "timeout", "start_period")}
    command, retries = arguments.value("health_cmd"), arguments.value("health_retries")
    none = arguments.flag("no_healthcheck")
    if none and (command or retries or any(given.values())):
        raise UsageError("--no-healthcheck and --health-... exclude each other", "leave out one of the two")
    own = image.get("Healthcheck")
    own = own if isinstance(own, dict) else {}
    found = {
        f"{name}_s": _seconds(own, name)
        if text is None
        else duration(text, f"--health-{name.replace('_', '-')}")
        for name, text in given.items()
    }
    count = own.get("Retries")
    found_retries = count if isinstance(count, int) and count > 0 else 3
    if retries is not None:
        found_retries = values.whole(retries, "--health-retries", least=1)
    argv = _argv(own.get("Test")) if command is None else _typed(command)
    if none or not argv:
        return None
    if found["interval_s"] < _LEAST_S or found["timeout_s"] < _LEAST_S:
        raise UsageError(
            "a health check needs an interval and a timeout of 1ms at least", "--health-interval 30s"
        )
    return {"command": argv, "retries": found_retries, **found}


def _seconds(own: Mapping[str, Any], name: str) -> float:
    key = {"interval": "Interval", "timeout": "Timeout", "start_period": "StartPeriod"}[name]
    found = own.get(key)
    return found / 1e9 if isinstance(found, int) and found > 0 else _DEFAULTS[name]


def _argv(test: Any) -> list[str]:
    """The command of an image's ``Test``; empty for none."""
    if not isinstance(test, list) or not all(isinstance(word, str) for word in test) or len(test) < 2:
        return []
    if test[0] == "CMD":
        return list(test[1:])
    return ["/bin/sh", "-c", test[1]] if test[0] == "CMD-SHELL" else []


def _typed(text: str) -> list[str]:
    """The command of a ``--health-cmd``: text for a shell or, as Podman has it, a list of words in JSON."""
    if text in ("none", ""):
        return []
    if text.startswith("["):
        import json

        try:
            words = json.loads(text)
        except ValueError:
            words = None
        if isinstance(words, list) and words and all(isinstance(word, str) for word in words):
            return _argv(words) if words[0] in ("CMD", "CMD-SHELL", "NONE") else words
    return ["/bin/sh", "-c", text.removeprefix("CMD-SHELL ")]


def of(container: Container) -> dict[str, Any] | None:
    """What is known of a container's health, in Docker's words; None if it has no check, or has never run."""
    if not container.record.get("health"):
        return None
    return records.read_json(os.path.join(container.directory, "health.json")) or None
