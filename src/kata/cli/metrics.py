"""`kata metrics`: what a sandbox's engine tells Prometheus."""

from __future__ import annotations

import sys

from kata.cli import sandboxes
from kata.cli.args import Command

TYPE_CHECKING = False
if TYPE_CHECKING:
    from kata.cli.args import Arguments

COMMANDS = {
    "metrics": Command(
        "metrics",
        "[ID]",
        "Prints the metrics of a running sandbox, in Prometheus' text format.",
        most=1,
        notes="ID is a container of 'kata', or a container or pod of containerd, Docker or Kubernetes; an unambiguous\n"
        "beginning of an id is enough. It may be left out where one sandbox runs.",
    ),
}


def show(reference: str | None) -> int:
    """Print the metrics of the sandbox that is meant (see `sandboxes.management_socket`).

    Returns:
        The exit status.
    """
    from kata import management

    path = sandboxes.management_socket(reference)
    text = management.content(path, "GET", "/metrics")
    sys.stdout.write(text.decode("utf-8", "replace"))
    return 0


def _metrics(arguments: Arguments) -> int:
    return show(arguments.rest[0] if arguments.rest else None)


HANDLERS = {"metrics": _metrics}
