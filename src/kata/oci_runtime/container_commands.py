"""The grammar of the commands for containers, which is runc's.

Source: runc(8) and the pages of its commands;
https://github.com/opencontainers/runtime-tools/blob/master/docs/command-line-interface.md.
"""

from __future__ import annotations

from kata.cli.args import Command, Option
from kata.oci_runtime.global_options import PROGRAM

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Sequence

_BUNDLE = Option("-b --bundle", "DIR", "the directory with config.json (the working directory)")
_CONSOLE = Option("--console-socket", "PATH", "the socket that takes the master of the container's terminal")
_PID_FILE = Option("--pid-file", "FILE", "where the number of the process is written that stands for it")
_PRESERVE = Option(
    "--preserve-fds", "N", "is refused but for 0: a virtual machine cannot have open files of the host"
)
_NO_PIVOT = Option(
    "--no-pivot", "", "is refused: the guest's root directory is always changed by pivot_root"
)
_FORMAT = Option("-f --format", "FORMAT", "table, or json")
_NO_KEYRING = Option("--no-new-keyring", "", "is accepted: the guest's keyrings are not the host's")


def _command(
    name: str,
    usage: str,
    summary: str,
    options: Sequence[Option] = (),
    *,
    least: int = 1,
    most: int | None = 1,
    interspersed: bool = True,
    notes: str = "",
) -> Command:
    return Command(
        name,
        usage,
        summary,
        options,
        least=least,
        most=most,
        interspersed=interspersed,
        notes=notes,
        program=PROGRAM,
    )


COMMANDS = {
    "create": _command(
        "create",
        "ID",
        "Creates a container from a bundle; 'start' runs its command.",
        [_BUNDLE, _CONSOLE, _PID_FILE, _PRESERVE, _NO_PIVOT, _NO_KEYRING],
    ),
    "start": _command("start", "ID", "Runs the command of a container that was created."),
    "run": _command(
        "run",
        "ID",
        "Creates a container, runs its command, waits for its end and deletes the container.",
        [
            _BUNDLE,
            _CONSOLE,
            _PID_FILE,
            _PRESERVE,
            _NO_PIVOT,
            _NO_KEYRING,
            Option("-d --detach", "", "do not wait"),
            Option("--keep", "", "do not delete it at its end"),
        ],
    ),
    "exec": _command(
        "exec",
        "ID [COMMAND [ARG...]]",
        "Runs a further command in a container.",
        [
            Option("-p --process", "FILE", "the process as an object of the specification"),
            Option("-d --detach", "", "do not wait for its end"),
            _PID_FILE,
            _CONSOLE,
            _PRESERVE,
            Option("-t --tty", "", "with a terminal"),
            Option("--cwd", "DIR", "its working directory"),
            Option("-e --env", "NAME=VALUE", "a variable of its environment", many=True),
            Option("-u --user", "UID[:GID]", "as whom it runs"),
            Option("-g --additional-gids", "GID", "a further group", many=True),
            Option("-c --cap", "NAME", "a further capability", many=True),
            Option("--no-new-privs", "", "it cannot gain privileges"),
            Option("--ignore-paused", "", "wait for a container that is paused to go on"),
        ],
        most=None,
        interspersed=False,
        notes="Without a command, ID may be that of any sandbox, and it is the debug console: a shell of the guest,\n"
        "as in the original. A guest has one when its sandbox was made with 'debug_console_enabled = true' in\n"
        "[agent.kata], after 'kata guest build --extension shell'; otherwise the error names the command that is\n"
        "a shell of the container. The status is 0, and the window's size is not passed on ('stty cols 200').",
    ),
    "state": _command("state", "ID", "Shows the state of a container, as JSON."),
    "kill": _command(
        "kill",
        "ID [SIGNAL]",
        "Sends a signal to a container's first process (TERM).",
        [Option("-a --all", "", "to all of its processes")],
        most=2,
    ),
    "delete": _command(
        "delete",
        "ID",
        "Removes a container that has stopped.",
        [Option("-f --force", "", "kill it first if it runs; it is no error if there is none")],
    ),
    "pause": _command("pause", "ID", "Freezes all processes of a container."),
    "resume": _command("resume", "ID", "Lets the processes of a container go on."),
    "list": _command(
        "list",
        "",
        "Lists the containers that are recorded below --root.",
        [_FORMAT, Option("-q --quiet", "", "only their ids")],
        least=0,
        most=0,
    ),
    "ps": _command("ps", "ID", "Lists the processes of a container, by the guest's numbers.", [_FORMAT]),
    "events": _command(
        "events",
        "ID",
        "Shows what a container uses, as lines of JSON, until it ends.",
        [
            Option("--stats", "", "once"),
            Option("--interval", "TIME", "how often (5s)"),
        ],
    ),
    "update": _command(
        "update",
        "ID",
        "Changes the limits of a container; those of its machine follow.",
        [
            Option(
                "-r --resources",
                "FILE",
                "all of them, as an object of the specification; '-' is standard input",
            ),
            Option("--memory", "BYTES", "memory"),
            Option("--memory-reservation", "BYTES", "memory that it keeps when there is little"),
            Option("--memory-swap", "BYTES", "memory and swap; -1 for no limit"),
            Option("--cpu-period", "MICROSECONDS", "in which --cpu-quota holds"),
            Option("--cpu-quota", "MICROSECONDS", "processor time in each period"),
            Option("--cpu-share", "N", "weight beside others"),
            Option("--cpu-rt-period", "MICROSECONDS", "in which --cpu-rt-runtime holds"),
            Option("--cpu-rt-runtime", "MICROSECONDS", "real-time processor time in each period"),
            Option("--cpuset-cpus", "LIST", "processors of the guest"),
            Option("--cpuset-mems", "LIST", "memory nodes of the guest"),
            Option("--blkio-weight", "N", "weight of disk accesses"),
            Option("--pids-limit", "N", "processes; -1 for no limit"),
        ],
    ),
}
