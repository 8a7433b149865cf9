"""The sandboxes of this host, of all clients, by what people call them."""

from __future__ import annotations

import os

from kata import paths
from kata.cli import records
from kata.engine.client import EngineClient
from kata.engine.containers.records import read_json
from kata.engine.launch import SETTINGS_NAME, SOCKET_NAME
from kata.errors import KataError, NotFoundError, UsageError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any


def settings_by_directory() -> dict[str, dict[str, Any]]:
    """Settings of each sandbox that has a run directory, by that directory."""
    base = os.path.join(paths.run_dir(), "sandboxes")
    try:
        names = sorted(os.listdir(base))
    except FileNotFoundError:
        return {}
    found = {os.path.join(base, name): read_json(os.path.join(base, name, SETTINGS_NAME)) for name in names}
    return {directory: settings for directory, settings in found.items() if settings}


def describe(directory: str) -> dict[str, Any]:
    """What the engine of a sandbox says of it.

    Raises:
        KataError: It does not answer.
    """
    with EngineClient(os.path.join(directory, SOCKET_NAME)) as engine:
        return engine.describe()


def find(reference: str) -> str:
    """Find a sandbox.

    Args:
        reference: Name or id of a container or pod, or the beginning of an id; or the name of a sandbox's directory.

    Returns:
        Its run directory.

    Raises:
        NotFoundError: No running sandbox matches.
        UsageError: The beginning of an id is ambiguous, or there is none: every id begins with nothing.
    """
    if not reference:
        raise UsageError("the name of a sandbox is empty", "is a variable of the command not set?")
    own = records.find_or_none(reference)
    wanted = own.id if own is not None else reference
    sandboxes = settings_by_directory()
    exact = [
        directory
        for directory, settings in sandboxes.items()
        if wanted in (settings.get("id"), os.path.basename(directory))
    ]
    begins = [
        directory for directory, settings in sandboxes.items() if str(settings.get("id")).startswith(wanted)
    ]
    found = exact or begins
    if not found:
        # Only its engine knows a pod's other containers.
        for directory in sandboxes:
            try:
                names = list(describe(directory)["containers"])
            except (KataError, OSError):
                continue
            if any(name.startswith(wanted) for name in names):
                found.append(directory)
    if not found:
        hint = "it does not run: kata start" if own is not None else "kata ps, ctr task ls, crictl pods"
        raise NotFoundError(f"there is no running sandbox {reference!r}", hint)
    if len(found) > 1:
        raise UsageError(f"several sandboxes are {reference!r}, or begin so", "give more of the id")
    return found[0]


def management_socket(reference: str | None) -> str:
    """The path of a sandbox's management socket.

    Args:
        reference: As for `find`; None is the only sandbox that there is.

    Raises:
        NotFoundError: No running sandbox matches.
        UsageError: Several do.
    """
    if reference is not None:
        return os.path.join(find(reference), paths.MANAGEMENT_SOCKET)
    found = sorted(settings_by_directory())
    if not found:
        raise NotFoundError("no sandbox is running", "kata run -d IMAGE starts one")
    if len(found) > 1:
        names = ", ".join(os.path.basename(one)[:40] for one in found[:5]) + (", ..." if found[5:] else "")
        raise UsageError(
            f"which of {len(found)} sandboxes? {names}", "name it; kata-monitor has all at once"
        )
    return os.path.join(found[0], paths.MANAGEMENT_SOCKET)
