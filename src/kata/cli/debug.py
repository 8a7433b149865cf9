"""`kata debug`: collects what a report of a bug needs."""

from __future__ import annotations

import os
import sys

from kata.cli import debug_collect, table
from kata.cli.args import Command, Option
from kata.cli.debug_archive import Bundle
from kata.cli.debug_keep import Masker
from kata.errors import NotFoundError, UsageError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from kata.cli.args import Arguments

_LEVELS = ("debug", "info", "warning")
COMMANDS = {
    "debug": Command(
        "debug",
        "bundle [CONTAINER] | level CONTAINER debug|info|warning",
        "'bundle' collects what a report of a bug needs in one archive, without secrets: of a container or sandbox (by"
        " name or id, running or not, of any client), or, without one, of this machine. 'level' changes what the engine"
        " of a running one writes to its log.",
        [
            Option("-o --output", "FILE", "where to write it; '-' is standard output (kata-debug-NAME.tar.gz)"),
            Option("--with-output", "", "also what the containers wrote, and all of the guest's console, which may hold"
                   " secrets of theirs"),
            Option("--json", "", "print JSON"),
        ],
        least=1,
        most=3,
        notes="Values of environment variables, labels and annotations, arguments of commands, and credentials are\n"
        "not in it; docs/debugging.md says what is. Look through it all the same before you give it away.",
    ),
}  # fmt: skip


def _bundle(arguments: Arguments) -> int:
    if len(arguments.rest) > 2:
        raise UsageError(f"kata debug bundle: unexpected argument {arguments.rest[2]!r}", "one at a time")
    masker = Masker()
    reference = arguments.rest[1] if len(arguments.rest) > 1 else ""
    if not reference and len(arguments.rest) > 1:
        raise UsageError("the name of a container is empty", "is a variable of the command not set?")
    subject = debug_collect.find(reference) if reference else None
    if reference and subject is None:
        raise NotFoundError(
            f"there is no container or sandbox {reference!r}",
            "'kata ps -a' lists containers; without a name, kata debug bundle describes this machine",
        )
    if subject is None and arguments.flag("with_output"):
        raise UsageError(
            "--with-output is about what containers wrote, and none is named", "kata debug bundle CONTAINER"
        )
    identity = subject.sandbox_id if subject else ""
    label = "".join(char if char.isalnum() or char in "._-" else "_" for char in reference)[:64] or "node"
    about = {"sandbox": identity, "runs": bool(subject and subject.runs)}
    bundle = Bundle(masker, about, f"kata-debug-{label}")
    target = arguments.value("output") or f"kata-debug-{label}.tar.gz"
    if target == "-":
        if arguments.flag("json"):
            raise UsageError("--json and -o - both want standard output", "leave out one of the two")
        if os.isatty(1):
            raise UsageError("the archive is not written to a terminal", "give a file, or a pipe: -o FILE")
    collector = debug_collect.Collector(bundle, masker)
    if subject is not None:
        collector.sandbox(subject, with_output=arguments.flag("with_output"))
    collector.node()
    files = bundle.write(target)
    if arguments.flag("json"):
        rows = [{"name": name, "bytes": size} for name, size in files]
        table.show_json({"path": os.path.abspath(target), "files": rows, "problems": bundle.problems})
        return 0
    out = sys.stderr if target == "-" else sys.stdout
    width = max(len(name) for name, _ in files)
    for name, size in files:
        out.write(f"  {name:<{width}}  {table.human_size(size)}\n")
    for problem in bundle.problems:
        out.write(table.printable(f"  without {problem['what']}: {problem['why']}") + "\n")
    out.write(
        f"{'the archive' if target == '-' else table.printable(target)}: look through it before you give it away:"
        " logs may quote what nobody knew to be secret\n"
    )
    return 0


def _level(arguments: Arguments) -> int:
    from kata import management
    from kata.cli import sandboxes

    if len(arguments.rest) != 3:
        raise UsageError(
            "kata debug level: a container and a level are needed",
            "kata debug level CONTAINER debug|info|warning",
        )
    _, reference, level = arguments.rest
    if level not in _LEVELS:
        raise UsageError(f"there is no level {level!r}", "one of: " + ", ".join(_LEVELS))
    if arguments.value("output") is not None or arguments.flag("with_output") or arguments.flag("json"):
        raise UsageError(
            "--output, --with-output and --json belong to 'kata debug bundle'", "leave them out"
        )
    management.content(sandboxes.management_socket(reference), "PUT", "/kata/v1/log-level", level.encode())
    return 0


def _debug(arguments: Arguments) -> int:
    verb = arguments.rest[0]
    if verb == "bundle":
        return _bundle(arguments)
    if verb == "level":
        return _level(arguments)
    raise UsageError(
        f"there is no 'kata debug {verb}'",
        "kata debug bundle [CONTAINER], or kata debug level CONTAINER LEVEL",
    )


HANDLERS = {"debug": _debug}
