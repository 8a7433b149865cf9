"""``--filter KEY=VALUE`` of `kata ps` and `kata images`, as in Docker.

Values of one key are alternatives, but each label has to be there; several keys all have to agree.

Source: docker-ps(1), docker-images(1).
"""

from __future__ import annotations

import fnmatch
import re

from kata.cli import records, table
from kata.errors import UsageError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from typing import Any

    from kata.cli.records import Container
    from kata.images.store import Image


def parse(texts: Sequence[str], known: Sequence[str]) -> dict[str, list[str]]:
    """Read the values of ``--filter``, by key.

    Args:
        texts: As the user wrote them.
        known: The keys that there are.

    Raises:
        UsageError: One is malformed, or its key unknown.
    """
    found: dict[str, list[str]] = {}
    for text in texts:
        key, equals, value = text.partition("=")
        if not equals or key not in known:
            raise UsageError(
                f"--filter {text!r} is not offered" if equals else f"--filter {text!r} is not KEY=VALUE",
                "the keys are " + ", ".join(known),
            )
        found.setdefault(key, []).append(value)
    return found


def has_labels(labels: dict[str, str], wanted: Sequence[str]) -> bool:
    """Whether all labels that are wanted (``KEY`` or ``KEY=VALUE``) are there."""
    for text in wanted:
        key, equals, value = text.partition("=")
        if key not in labels or (equals and labels[key] != value):
            return False
    return True


_STATES = (records.CREATED, records.RUNNING, records.PAUSED, records.EXITED)
OF_CONTAINERS = (
    *(
        "ancestor",
        "before",
        "exited",
        "health",
        "id",
        "label",
        "name",
        "network",
        "publish",
        "since",
        "status",
        "volume",
    ),
)


def containers(
    found: list[tuple[Container, dict[str, Any]]], texts: Sequence[str]
) -> list[tuple[Container, dict[str, Any]]]:
    """Those containers that agree with all filters.

    Args:
        found: Containers with their states, the newest first.
        texts: Values of ``--filter``.

    Raises:
        UsageError: A filter is malformed.
        NotFoundError: One names a container that there is not.
    """
    wanted = parse(texts, OF_CONTAINERS)
    for state in wanted.get("status", ()):
        if state not in _STATES:
            raise UsageError(f"--filter status={state} is no state", "one of " + ", ".join(_STATES))
    if any(not code.isdigit() for code in wanted.get("exited", ())):
        raise UsageError(f"--filter exited={wanted['exited'][0]} is no exit code", "--filter exited=0")
    tests: list[Callable[[Container, dict[str, Any]], bool]] = []

    def add(key: str, test: Callable[[Container, dict[str, Any], str], bool]) -> None:
        if key in wanted:
            given = wanted[key]
            tests.append(lambda container, state: any(test(container, state, value) for value in given))

    names = {value: _pattern(value) for value in wanted.get("name", ())}
    images = {value: _image_of(value) for value in wanted.get("ancestor", ())}
    times = {
        value: str(records.find(value).record["created_at"])
        for key in ("before", "since")
        for value in wanted.get(key, ())
    }
    add("id", lambda c, _, value: bool(value) and c.id.startswith(value))
    add("name", lambda c, _, value: names[value].search(c.name) is not None)
    add("status", lambda _, state, value: state["status"] == value)
    add(
        "exited",
        lambda _, state, value: (
            state["status"] == records.EXITED and state.get("exit_code", 137) == int(value)
        ),
    )
    add(
        "ancestor",
        lambda c, _, value: (
            value == c.record["image"]["reference"]
            or (images[value] != "" and images[value] == c.record["image"]["id"])
        ),
    )
    add("health", lambda c, _, value: _health_of(c) == value)
    add("before", lambda c, _, value: str(c.record["created_at"]) < times[value])
    add("since", lambda c, _, value: str(c.record["created_at"]) > times[value])
    add("network", lambda c, _, value: value in records.network_names(c.record))
    add("volume", lambda c, _, value: value in _mounted(c.record))
    add("publish", lambda c, _, value: any(_is_port(port, value) for port in c.record["ports"]))
    labels = wanted.get("label", [])
    return [
        (container, state)
        for container, state in found
        if has_labels(container.record["labels"], labels) and all(test(container, state) for test in tests)
    ]


def _pattern(text: str) -> re.Pattern[str]:
    try:
        return re.compile(text.replace("^/", "^"))
    except re.error as error:
        raise UsageError(f"--filter name={text!r} is no regular expression: {error}") from None


def _image_of(name: str) -> str:
    from kata.images import store

    return store.find_id(name, store.Index()) or ""


def _mounted(record: dict[str, Any]) -> set[str]:
    shared = [text for one in record["volumes"] for text in (one["source"], one["destination"])]
    own = [
        text
        for one in record.get("disk_volumes") or ()
        for text in (one["destination"], one.get("volume", ""))
    ]
    return {*shared, *own}


def _is_port(port: dict[str, Any], text: str) -> bool:
    number, _, proto = text.partition("/")
    return str(port["host_port"]) == number and port["proto"] == (proto or "tcp")


OF_IMAGES = ("before", "dangling", "label", "reference", "since", "until")


def images(found: list[Image], texts: Sequence[str]) -> list[Image]:
    """Those images that agree with all filters.

    Args:
        found: All.
        texts: Values of ``--filter``.

    Raises:
        UsageError: A filter is malformed.
        NotFoundError: One names an image that there is not.
    """
    from kata.images import store

    wanted = parse(texts, OF_IMAGES)
    kept = [
        image for image in found if has_labels(image.config.get("Labels") or {}, wanted.get("label", []))
    ]
    for value in wanted.get("dangling", ()):
        if value.lower() not in ("true", "false", "1", "0"):
            raise UsageError(
                f"--filter dangling={value} is neither true nor false", "--filter dangling=true"
            )
        kept = [image for image in kept if bool(image.names) != (value.lower() in ("true", "1"))]
    for value in wanted.get("before", ()):
        created = store.find(value).created  # also where nothing is left to compare it with
        kept = [image for image in kept if image.created < created]
    for value in wanted.get("since", ()):
        created = store.find(value).created
        kept = [image for image in kept if image.created > created]
    for value in wanted.get("until", ()):
        limit = moment(value, "--filter until")
        kept = [image for image in kept if is_older(image.created, limit)]
    if patterns := wanted.get("reference"):
        kept = [
            image for image in kept if any(_matches(name, text) for name in image.names for text in patterns)
        ]
    return kept


def is_older(created: str, limit: float) -> bool:
    """Whether something was made before a time (Unix); what does not say when it was made was not, as in Docker."""
    seconds = table.seconds_of(created)
    return seconds is not None and seconds < limit


def _matches(name: str, pattern: str) -> bool:
    forms = {name, name.removeprefix("docker.io/"), name.removeprefix("docker.io/library/")}
    forms |= {form.rpartition(":")[0] for form in forms}
    return any(fnmatch.fnmatchcase(form, pattern) for form in forms)


_DURATION = re.compile(r"(?:(\d+(?:\.\d+)?)h)?(?:(\d+(?:\.\d+)?)m)?(?:(\d+(?:\.\d+)?)s)?")


def moment(text: str, option: str) -> float:
    """A point in time, as Docker reads it: RFC 3339 or a part of it, seconds of Unix time, or how long ago (``1h30m``).

    Args:
        text: As the user wrote it.
        option: The option it belongs to, for errors.

    Returns:
        Seconds of Unix time.

    Raises:
        UsageError: It is none of these.
    """
    import datetime
    import time

    if re.fullmatch(r"\d+(?:\.\d+)?", text):
        return float(text)
    ago = _DURATION.fullmatch(text)
    if ago and any(ago.groups()):
        hours, minutes, seconds = (float(part or 0) for part in ago.groups())
        return time.time() - hours * 3600 - minutes * 60 - seconds
    try:
        found = re.fullmatch(
            r"(\d{4}-\d\d-\d\d(?:T\d\d:\d\d(?::\d\d)?)?)(\.\d{1,9})?(Z|[+-]\d\d:\d\d)?", text
        )
        if found is None:
            raise ValueError
        # Without a zone it is local time, as in Docker.
        whole = datetime.datetime.fromisoformat(found[1] + (found[3] or "").replace("Z", "+00:00"))
        return whole.timestamp() + float(found[2] or 0)
    except ValueError:
        raise UsageError(
            f"{option} {text!r} is no time",
            "2026-01-31T12:00:00Z, seconds since 1970, or how long ago: 10m, 1h30m",
        ) from None


def _health_of(container: Container) -> str:
    from kata.cli import health

    if not container.record.get("health"):
        return "none"
    return str((health.of(container) or {}).get("Status", "starting"))
