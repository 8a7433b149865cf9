"""Entry point of the ``kata`` command: finds the sub-command, runs it, and reports its errors.

Sub-commands are modules that are imported on use, so that `kata run` does not pay for `kata pull`.
"""

from __future__ import annotations

import os
import sys

from kata import paths, sysio
from kata.errors import KataError, UsageError
from kata.launcher import name_output

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Sequence
    from typing import Any

COMMANDS: dict[str, tuple[str, str]] = {
    "run": ("run", "run a command in a new container, in a virtual machine of its own"),
    "create": ("run", "make a container without starting it"),
    "start": ("lifecycle", "start one or more containers"),
    "restart": ("lifecycle", "stop and start one or more containers"),
    "stop": ("lifecycle", "stop containers: SIGTERM, then SIGKILL after a grace period"),
    "kill": ("lifecycle", "send a signal to containers"),
    "rm": ("lifecycle", "remove containers"),
    "pause": ("lifecycle", "freeze all processes of containers"),
    "resume": ("lifecycle", "resume paused containers"),
    "rename": ("manage", "give a container another name"),
    "update": ("update", "change the limits of containers"),
    "wait": ("lifecycle", "wait until containers end and print their exit codes"),
    "exec": ("execute", "run a further command in a running container"),
    "attach": ("execute", "connect to a running container's standard streams"),
    "ps": ("listing", "list containers"),
    "top": ("top", "show what all sandboxes do, or list the processes in a container"),
    "logs": ("listing", "show a container's output"),
    "port": ("listing", "list a container's published ports"),
    "inspect": ("inspect", "show everything about containers and images as JSON"),
    "exists": ("inspect", "tell by the exit status whether there is such a container or image"),
    "events": ("events", "show what happened to sandboxes and containers, and what happens now"),
    "healthcheck": ("healthcheck", "run the health check of a container once"),
    "stats": ("listing", "show the resource usage of containers"),
    "metrics": ("metrics", "print the metrics of a sandbox as Prometheus reads them"),
    "cp": ("copy", "copy files between a container and the host"),
    "diff": ("export", "list what a container has changed in its files"),
    "export": ("export", "write a container's files as a tar stream"),
    "commit": ("export", "make an image of a container's files"),
    "images": ("image", "list images"),
    "build": ("build", "build an image from a Dockerfile; each RUN is in a machine of its own"),
    "pull": ("image", "fetch an image from a registry or an archive"),
    "push": ("registry_account", "send an image to a registry"),
    "rmi": ("image", "remove images"),
    "inspect-image": ("inspect_image", "read an image in a machine of its own, and report what is in it"),
    "tag": ("manage", "give an image a further name"),
    "history": ("manage", "show by which steps an image was made"),
    "save": ("export", "write images as an archive that 'docker load' reads"),
    "load": ("manage", "read images from an archive of 'docker save'"),
    "import": ("import_image", "make an image of a tar file with a root file system"),
    "prune": ("prune", "remove containers and images that are not used"),
    "volume": ("volume", "make, list and remove volumes with a name"),
    "network": ("network", "make, list and remove networks of containers"),
    "login": ("registry_account", "log in to a registry"),
    "logout": ("registry_account", "forget the credentials for a registry"),
    "explain": ("explain", "explain the size of a sandbox: the formula with its numbers"),
    "config": ("config", "show the configuration and where it comes from, or check a file"),
    "df": ("disk_usage", "show what images, containers, volumes and builds take on the disk"),
    "info": ("manage", "show how many containers and images there are, and what they run on"),
    "doctor": ("host", "check what this machine supports, and show how to fix what it does not"),
    "gc": ("host", "remove what crashed sandboxes left behind"),
    "guest": ("host", "build the guest's kernel and initrd, or show them"),
    "factory": ("factory", "make, show or remove the templates that machines go on from"),
    "debug": ("debug", "collect what a report of a bug needs, without secrets"),
    "install": ("client", "register kata with containerd, Docker, Podman or CRI-O on this machine"),
    "uninstall": ("client", "undo `kata install`"),
    "version": ("host", "show the versions of this program, its hypervisor and its guest"),
}
"""Command -> (module in `kata.cli`, summary), in the order of the help."""

_NEEDS_NO_ROOT = frozenset({"version", "config"})
_NEEDS_ROOT = frozenset({"install", "uninstall"})
"""What is for the whole machine. All else an ordinary user does in a user namespace (`kata.rootless`)."""


def _help() -> str:
    width = max(map(len, COMMANDS))
    listed = "\n".join(f"  {name:<{width}}  {summary}" for name, (_, summary) in COMMANDS.items())
    return (
        "usage: kata COMMAND [OPTION...] [ARG...]\n\n"
        "Runs each container in a lightweight virtual machine of its own, without a daemon.\n\n"
        f"commands:\n{listed}\n\n"
        "'kata COMMAND --help' describes a command. KATA_STATE_DIR and KATA_RUN_DIR set the directories of its\n"
        "files: for root /var/lib/kata and /run/kata, for others $XDG_DATA_HOME/kata and $XDG_RUNTIME_DIR/kata.\n"
    )


def dispatch(argv: Sequence[str]) -> int:
    """Run one command line.

    Args:
        argv: Without the program's name.

    Returns:
        The exit status.

    Raises:
        KataError: The command could not be carried out.
    """
    if not argv or argv[0] in ("-h", "--help", "help"):
        if len(argv) > 1 and argv[1] != "help" and not argv[1].startswith("-"):
            return dispatch([argv[1], "--help"])
        (sys.stdout if argv else sys.stderr).write(_help())
        return 0 if argv else 125
    name = argv[0]
    if name in ("-v", "--version"):
        from kata import __version__

        sys.stdout.write(f"kata version {__version__}\n")  # one line, as Docker has it
        return 0
    entry = COMMANDS.get(name)
    if entry is None:
        if name == "__complete":  # for the shells' completion scripts
            from kata.cli import complete

            return complete.main(argv[1:], lambda before, word: complete.kata(COMMANDS, before, word))
        import difflib

        from kata.cli import words

        meant = words.command(list(argv))
        if meant[0] in COMMANDS:
            return dispatch(meant)
        if instead := words.about_command(meant[0]):
            raise UsageError(f"kata has no command {name!r}", instead)
        if name.startswith("-"):
            raise UsageError(f"kata itself has no option {name!r}", "options follow the command: kata ps -a")
        near = difflib.get_close_matches(name, COMMANDS, 1)
        hint = f"did you mean 'kata {near[0]}'?" if near else "'kata --help' lists the commands"
        raise UsageError(f"unknown command {name!r}", hint)
    asks_help = any(word in ("--help", "-h") for word in argv[1:2])
    if os.geteuid() != 0 and not asks_help:
        _as_ordinary_user(name, argv)
    elif sysio.in_user_namespace():
        from kata import rootless

        rootless.settle_inside()  # podman unshare
    if not asks_help:
        paths.check_own(paths.run_dir(), paths.state_dir())
    # Not by importlib, whose import takes as long as that of three of these.
    name_of_module = f"kata.cli.{entry[0]}"
    __import__(name_of_module)
    module: Any = sys.modules[name_of_module]
    arguments = module.COMMANDS[name].parse(argv[1:])
    status: int = module.HANDLERS[name](arguments)
    return status


def _as_ordinary_user(name: str, argv: Sequence[str]) -> None:
    from kata import rootless

    if name in _NEEDS_ROOT:
        raise KataError(
            f"kata {name} has to run as root: it changes the whole machine", f"sudo kata {' '.join(argv)}"
        )
    rootless.settle()
    if name in _NEEDS_NO_ROOT:
        return
    try:
        rootless.enter()
    except KataError:
        if name != "doctor":  # which says so
            raise


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line and turn every outcome into an exit status (125 for an error of kata itself)."""
    name_output()
    try:
        try:
            status = dispatch(sys.argv[1:] if argv is None else argv)
        except SystemExit as asked:  # by --help
            status = int(asked.code or 0)
        sys.stdout.flush()
        return status
    except BaseException as error:
        from kata import crash
        from kata.cli.report import exit_status

        return exit_status(error, crash.name_of(["kata", *(sys.argv[1:] if argv is None else argv)]))
