"""The program ``kata-runtime``: the OCI runtime's command line, and the original's commands for administration.

Podman and CRI-O execute it half a dozen times for each container and wait each time, so what they ask most is read
here (`plain`), without the grammar, the help and the handlers of all commands (`kata.oci_runtime.commands`): their
import takes longer than the answer.
"""

from __future__ import annotations

import os
import sys
import time

from kata import launcher, paths, sysio
from kata.errors import KataError
from kata.oci_runtime.global_options import PROGRAM, GlobalOptions

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Sequence

_FLAGS = {
    "state": {},
    "start": {},
    "kill": {"-a": "all", "--all": "all"},
    "delete": {"-f": "force", "--force": "force"},
}
"""Commands that are mostly given by a caller's program, and their options: a part of `container_commands`."""


class Plain:
    """Arguments of one of these commands.

    Attributes:
        rest: What is no option.
    """

    __slots__ = ("_flags", "rest")

    def __init__(self, rest: list[str], flags: set[str]) -> None:
        self.rest = rest
        self._flags = flags

    def flag(self, key: str) -> bool:
        """Whether an option was given: ``all`` or ``force``."""
        return key in self._flags


def plain(argv: Sequence[str]) -> Plain | None:
    """Read a command line in the form in which programs give it.

    Args:
        argv: The command and what follows it.

    Returns:
        What `kata.cli.args.Command.parse` would have found; None for anything that this function leaves to it, mistakes
        included.
    """
    known = _FLAGS.get(argv[0]) if argv else None
    if known is None:
        return None
    rest, flags = [], set()
    for word in argv[1:]:
        if word in known:
            flags.add(known[word])
        elif word.startswith("-"):
            return None
        else:
            rest.append(word)
    return Plain(rest, flags) if 1 <= len(rest) <= 1 + (argv[0] == "kill") else None


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line and turn every outcome into an exit status: 1 for any failure, 255 for one of ``exec``."""
    launcher.name_output()
    options = GlobalOptions()
    command: Sequence[str] = ()
    began = time.monotonic()
    try:
        command = options.take(sys.argv[1:] if argv is None else argv)
        status = _dispatch(command, options)
        sys.stdout.flush()
    except BaseException as error:
        from kata.cli.report import exit_status

        if isinstance(error, KataError):
            options.record(error)
        # As with runc: a process that is executed may well end with 1 itself.
        status = exit_status(error, PROGRAM, 255 if command and command[0] == "exec" else 1)
    options.record_end(command, status, time.monotonic() - began)
    return status


def _dispatch(argv: Sequence[str], options: GlobalOptions) -> int:
    arguments = plain(argv)
    if arguments is None or os.geteuid() != 0 or sysio.in_user_namespace():
        from kata.oci_runtime import commands

        return commands.dispatch(argv, options)
    paths.check_own(paths.run_dir(), options.state_root)
    from kata.oci_runtime import containers

    return containers.HANDLERS[argv[0]](arguments, options)
