"""``containerd-shim-kata-v2``: what containerd executes to start and to clean up a sandbox.

Three short commands: ``start`` launches an engine (or finds the one of the container's pod) and prints its address,
``delete`` removes what a dead engine left behind, ``-info`` describes this runtime. The Task API itself is served by
the engine. Standard output carries the answer and nothing else. containerd 1.x reads standard error of ``start`` as
part of the address, so on success nothing is written there either.

Source: containerd ``core/runtime/v2/README.md`` (the shim's command line).
"""

from __future__ import annotations

import os
import sys

from kata.errors import KataError, UsageError

USAGE = """\
containerd-shim-kata-v2: containers in virtual machines of their own, for containerd.

containerd executes this by itself for the runtime io.containerd.kata.v2:
  ctr run --runtime io.containerd.kata.v2 IMAGE NAME [COMMAND...]

Commands (containerd's, in the directory of a bundle):
  start    start a sandbox, or join the one of the container's pod; prints its address
  delete   clear up after a sandbox that has died; prints a DeleteResponse

Options:
  -namespace NAME        containerd's namespace
  -id ID                 the container
  -info                  print this runtime's description (RuntimeInfo) for containerd 2
  -v                     print the version

containerd gives these as well, and nothing depends on them: -address and -publish-binary (events go to
$TTRPC_ADDRESS), -bundle (what a sandbox has made is in its own journal), -debug (there is one level of log).
"""
_WITH_VALUE = frozenset({"namespace", "id", "address", "publish-binary", "bundle"})
_FEATURES = "types.containerd.io/opencontainers/runtime-spec/1/features/Features"
"""What containerd's typeurl package calls that structure; its value is JSON."""
_FLAGS = frozenset({"debug", "info", "v", "h", "help"})


class Arguments:
    """The command line.

    Attributes:
        action: ``start``, ``delete`` or empty.
        values: Options by name without dashes.
        flags: Options that were given without a value.
    """

    __slots__ = ("action", "flags", "values")

    def __init__(self, argv: list[str]) -> None:
        """Parse *argv*, as Go's ``flag`` package does: one dash or two, ``-name value`` or ``-name=value``.

        Raises:
            UsageError: An option is unknown or lacks its value.
        """
        self.values: dict[str, str] = {}
        self.flags: set[str] = set()
        rest = list(argv)
        while rest and rest[0].startswith("-") and rest[0] not in ("-", "--"):
            name, equals, value = rest.pop(0).lstrip("-").partition("=")
            if name in _FLAGS:
                if not equals or value.lower() in ("1", "t", "true"):
                    self.flags.add(name)
            elif name in _WITH_VALUE:
                if not equals:
                    if not rest:
                        raise UsageError(f"option -{name} needs a value", "containerd-shim-kata-v2 -h")
                    value = rest.pop(0)
                self.values[name] = value
            else:
                raise UsageError(f"there is no option -{name}", "containerd-shim-kata-v2 -h")
        self.action = rest[0] if rest else ""
        if len(rest) > 1:
            raise UsageError(f"unexpected argument {rest[1]!r}", "containerd-shim-kata-v2 -h")


def main(argv: list[str]) -> int:
    """Run one command.

    Args:
        argv: Without the program's name.

    Returns:
        The exit status.
    """
    try:
        arguments = Arguments(argv)
        if arguments.flags & {"h", "help"}:
            sys.stdout.write(USAGE)
            return 0
        if "v" in arguments.flags:
            from kata import __version__

            print(f"containerd-shim-kata-v2 (kata {__version__})")
            return 0
        if "info" in arguments.flags:
            return _info()
        if arguments.action == "start":
            from kata.shim import start

            start.start(arguments.values, _print)
            return 0
        if arguments.action == "delete":
            from kata.shim import delete

            os.write(1, delete.delete(arguments.values))
            return 0
        raise UsageError(
            f"there is no command {arguments.action!r}" if arguments.action else "a command is missing",
            "containerd executes this program; see containerd-shim-kata-v2 -h",
        )
    except KataError as error:
        hint = f"\nhint: {error.hint}" if error.hint else ""
        sys.stderr.write(f"error: {error.message}{hint}\n")
        return 1
    except OSError as error:
        where = f": {error.filename}" if error.filename else ""
        sys.stderr.write(f"error: {error.strerror or error}{where}\n")
        return 1


def _print(answer: bytes) -> None:
    os.write(1, answer)


def _info() -> int:
    import json

    from kata import __version__
    from kata.oci.features import features
    from kata.proto.google_pb import Any
    from kata.proto.task_pb import RuntimeInfo, RuntimeVersion

    info = RuntimeInfo(
        name="io.containerd.kata.v2",
        version=RuntimeVersion(version=__version__),
        features=Any(type_url=_FEATURES, value=json.dumps(features()).encode()),
    )
    os.write(1, info.encode())
    return 0
