"""`kata healthcheck run`: a container's health check, once and now."""

from __future__ import annotations

from kata.cli import execute, records
from kata.cli.args import Command
from kata.errors import StateError, UnsupportedError, UsageError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from kata.cli.args import Arguments

COMMANDS = {
    "healthcheck": Command(
        "healthcheck",
        "run CONTAINER",
        "Runs the health check of a container once.",
        least=2,
        most=2,
        notes="exit status: 0 healthy, 1 not healthy, 125 kata itself failed. The container's own checks go on, and\n"
        "'kata inspect --format {{.State.Health.Status}} NAME' has their outcome.",
    ),
}


def _healthcheck(arguments: Arguments) -> int:
    verb, reference = arguments.rest
    if verb != "run":
        raise UsageError(f"kata healthcheck has no {verb!r}", "kata healthcheck run NAME")
    container = records.find(reference)
    asked = container.record.get("health")
    if not asked:
        raise UnsupportedError(
            f"container {container.name} has no health check", "kata run --health-cmd COMMAND"
        )
    if container.state()["status"] != records.RUNNING:
        raise StateError(f"container {container.name} does not run", f"kata start {container.name}")
    once = execute.COMMANDS["exec"].parse([container.id, *asked["command"]])
    return 0 if execute.HANDLERS["exec"](once) == 0 else 1


HANDLERS = {"healthcheck": _healthcheck}
