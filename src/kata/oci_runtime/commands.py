"""All commands of ``kata-runtime``: the OCI runtime's, and the original's for administration.

What the original has and we do not is refused by name, with what to use instead.
"""

from __future__ import annotations

import os
import sys

from kata import __version__, paths, sysio
from kata.cli.args import Command, Option
from kata.errors import KataError, NotFoundError, UnsupportedError, UsageError
from kata.oci_runtime import container_commands
from kata.oci_runtime.global_options import HELP, PROGRAM

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from kata.cli.args import Arguments
    from kata.cli.complete import Candidates
    from kata.oci_runtime.global_options import GlobalOptions

SUMMARY = "Runs containers in virtual machines, as an OCI runtime does, and administers sandboxes."
_SANDBOX = Option("--sandbox-id", "ID", "the sandbox: its id, its beginning, or a container's name")


def _command(name: str, usage: str, summary: str, options: Sequence[Option] = (), **more: object) -> Command:
    return Command(name, usage, summary, options, program=PROGRAM, **more)  # type: ignore[arg-type]


COMMANDS = {
    **container_commands.COMMANDS,
    "metrics": _command(
        "metrics",
        "ID",
        "Prints the metrics of a running sandbox, in Prometheus' text format.",
        least=1,
        most=1,
    ),
    "iptables": _command(
        "iptables",
        "get | set FILE",
        "Shows the packet filter of a sandbox's guest in the format of iptables-save, or replaces its tables.",
        [_SANDBOX, Option("--v6", "", "that of IPv6")],
        least=1,
        most=2,
        notes="The guest needs the extension 'iptables': KATA_GUEST_EXTENSIONS. FILE may be '-' for standard input.",
    ),
    "direct-volume": _command(
        "direct-volume",
        "stats | resize",
        "Shows the bytes and inodes of a volume as its guest sees them, or grows its file system.",
        [
            Option("--volume-path", "PATH", "the volume: the source of a container's mount, on the host"),
            Option(
                "--size",
                "BYTES",
                "of the file system after 'resize'; its disk has been made as large before",
            ),
            _SANDBOX,
        ],
        least=1,
        most=1,
        notes="Without --sandbox-id, all running sandboxes are asked.",
    ),
    "factory": _command(
        "factory",
        "init|status|destroy",
        "Makes, shows or removes templates of machines: the same as 'kata factory'.",
        least=1,
        most=1,
        notes="It takes no options: 'kata factory' has them.",
    ),
    "check": _command(
        "check",
        "",
        "Checks what this machine supports: the same as 'kata doctor'.",
        [
            Option("--json", "", "print JSON"),
            Option("-n --no-network-checks", "", "use no network; this program never does"),
        ],
        most=0,
    ),
    "env": _command(
        "env",
        "",
        "Shows what sandboxes would be made of on this host: the original's document, as TOML.",
        [Option("--json", "", "print JSON")],
        most=0,
    ),
    "features": _command(
        "features",
        "",
        "Shows what of the OCI runtime specification is supported: its features structure, as JSON.",
        most=0,
    ),
    "spec": _command(
        "spec",
        "",
        "Writes a config.json to begin a bundle with. A file that is there is left as it is.",
        [
            Option("-b --bundle", "DIR", "where (the working directory)"),
            Option("--rootless", "", "is refused: no container needs it here"),
        ],
        most=0,
    ),
    "version": _command("version", "", "Shows the version of this program.", most=0),
}
_ALIASES = {"kata-check": "check", "kata-env": "env", "--version": "version", "-v": "version"}
_NEEDS_NO_ROOT = frozenset({"check", "env", "features", "spec", "version"})
_NO_CHECKPOINT = (
    "a machine's state has host connections that cannot be put back: stop the container and start it again"
)
_ELSEWHERE = {
    "checkpoint": _NO_CHECKPOINT,
    "restore": _NO_CHECKPOINT,
    "policy": 'kata-agent-ctl --sandbox ID SetPolicy --policy "$(cat FILE)"',
}


def usage() -> str:
    """The program's help."""
    width = max(map(len, COMMANDS))
    listed = "\n".join(f"  {name:<{width}}  {one.summary}" for name, one in COMMANDS.items())
    return (
        f"usage: {PROGRAM} [GLOBAL-OPTION...] COMMAND [OPTION...] [ARG...]\n\n{SUMMARY}\n\ncommands:\n{listed}\n\n"
        f"{HELP}\n"
        f"'{PROGRAM} COMMAND --help' describes a command. What is done with containers: 'kata --help'.\n"
    )


def dispatch(argv: Sequence[str], options: GlobalOptions) -> int:
    """Run one command line.

    Args:
        argv: Without the program's name and the options in front of the command.
        options: Those.

    Returns:
        The exit status.

    Raises:
        KataError: The command could not be carried out.
    """
    if argv and argv[0] == "__complete":
        from kata.cli import complete as completion

        return completion.main(argv[1:], complete)
    if not argv or argv[0] in ("-h", "--help", "help"):
        (sys.stdout if argv else sys.stderr).write(usage())
        return 0 if argv else 1
    name = _ALIASES.get(argv[0], argv[0])
    command = COMMANDS.get(name)
    if command is None:
        if name in _ELSEWHERE:
            raise UnsupportedError(f"this {PROGRAM} has no command {argv[0]!r}", _ELSEWHERE[name])
        raise UsageError(f"unknown command {argv[0]!r}", f"'{PROGRAM} --help' lists the commands")
    arguments = command.parse(argv[1:])
    _settle(name)
    paths.check_own(paths.run_dir(), options.state_root)
    if name not in container_commands.COMMANDS:
        return _HANDLERS[name](arguments)
    from kata.oci_runtime import containers

    if name in containers.HANDLERS:
        return containers.HANDLERS[name](arguments, options)
    if name in ("list", "ps", "events", "update"):
        from kata.oci_runtime import observation

        return observation.HANDLERS[name](arguments, options)
    from kata.oci_runtime import creation

    return creation.HANDLERS[name](arguments, options)


def _settle(name: str) -> None:
    """Have an ordinary user's sandboxes be where that user's are; see `kata.rootless`.

    Raises:
        HostError: That cannot be.
    """
    if os.geteuid() == 0 and not sysio.in_user_namespace():
        return
    from kata import rootless

    if os.geteuid() == 0:  # podman has made a user namespace
        rootless.settle_inside()
        return
    rootless.settle()
    if name not in _NEEDS_NO_ROOT:
        rootless.enter()


def complete(before: Sequence[str], word: str) -> Candidates:
    """Candidates for the shells' completion; see `kata.cli.complete`.

    Args:
        before: The words before the one being typed, without the program.
        word: The beginning of the word being typed.
    """
    from kata.cli import complete as completion

    if not before:
        found = [(name, one.summary) for name, one in COMMANDS.items()]
        return completion.beginning([*found, ("--help", "list the commands")], word)
    command = COMMANDS.get(_ALIASES.get(before[0], before[0]))
    return completion.of_command(command, before[1:], word) if command is not None else []


# ---- the commands ----


def _metrics(arguments: Arguments) -> int:
    from kata.cli import metrics

    return metrics.show(arguments.rest[0])


def _iptables(arguments: Arguments) -> int:
    from kata import management
    from kata.cli import sandboxes

    verb, *files = arguments.rest
    if (verb, len(files)) not in (("get", 0), ("set", 1)):
        raise UsageError(
            f"{PROGRAM} iptables: {' '.join(arguments.rest)!r} is not known", "get, or set FILE"
        )
    reference = arguments.value("sandbox_id")
    if not reference:
        raise UsageError(f"{PROGRAM} iptables: which sandbox?", "--sandbox-id ID")
    target = "/ip6tables" if arguments.flag("v6") else "/iptables"
    path = sandboxes.management_socket(reference)
    if verb == "get":
        sys.stdout.write(_printable(management.content(path, "GET", target)))
        return 0
    if files[0] == "-":
        rules = sys.stdin.buffer.read()
    else:
        with open(files[0], "rb") as file:
            rules = file.read()
    management.content(path, "PUT", target, rules)
    return 0


def _direct_volume(arguments: Arguments) -> int:
    verb = arguments.rest[0]
    if verb in ("add", "remove"):
        raise UnsupportedError(
            f"{PROGRAM} direct-volume {verb}: volumes by mountInfo.json are not known here",
            "Kubernetes' raw block volumes (volumeDevices) and Docker's --device become disks of the guest.",
        )
    if verb not in ("stats", "resize"):
        raise UsageError(f"{PROGRAM} direct-volume: {verb!r} is not known", "stats or resize")
    volume = arguments.value("volume_path")
    if not volume:
        raise UsageError(f"{PROGRAM} direct-volume: which volume?", "--volume-path PATH")
    size = arguments.value("size")
    if (size is not None) != (verb == "resize") or (size and not (size.isascii() and size.isdigit())):
        raise UsageError(
            f"{PROGRAM} direct-volume {verb}: --size is a number of bytes, for 'resize' only",
            "resize --volume-path PATH --size BYTES",
        )
    answer = _ask_about(volume, int(size) if size else None, arguments.value("sandbox_id"))
    sys.stdout.write(_printable(answer))
    return 0


def _ask_about(volume: str, size: int | None, reference: str | None) -> bytes:
    """What the sandbox that has a volume answers; *size* resizes it."""
    import json
    from urllib.parse import quote

    from kata import management
    from kata.cli import sandboxes

    if reference is not None:
        paths_of_sockets = [sandboxes.management_socket(reference)]
    else:
        paths_of_sockets = [
            os.path.join(directory, paths.MANAGEMENT_SOCKET)
            for directory in sandboxes.settings_by_directory()
        ]
    unknown: KataError = NotFoundError(
        f"no running sandbox has the volume {volume!r}", "kata ps, crictl pods"
    )
    for path in paths_of_sockets:
        try:
            if size is None:
                return management.content(
                    path, "GET", f"/direct-volume/stats?path={quote(volume, safe='/')}"
                )
            wanted = json.dumps({"VolumePath": volume, "Size": size}).encode()
            return management.content(path, "POST", "/direct-volume/resize", wanted)
        except NotFoundError as error:
            if reference is not None:
                unknown = error
    raise unknown


def _factory(arguments: Arguments) -> int:
    from kata.cli import factory

    return factory.HANDLERS["factory"](factory.COMMANDS["factory"].parse(arguments.rest))


def _check(arguments: Arguments) -> int:
    from kata.cli import host

    return host.HANDLERS["doctor"](arguments)


def _env(arguments: Arguments) -> int:
    from kata.oci_runtime import environment

    return environment.command(arguments)


def _features(arguments: Arguments) -> int:
    from kata.oci_runtime import features

    return features.command(arguments)


def _spec(arguments: Arguments) -> int:
    from kata.oci_runtime import spec

    return spec.command(arguments)


def _version(arguments: Arguments) -> int:
    from kata.oci import OCI_VERSION

    # The form that callers of runc read, and show to people.
    print(f"{PROGRAM} version {__version__}\nspec: {OCI_VERSION}")
    return 0


def _printable(data: bytes) -> str:
    """What a guest has said, without what would control a terminal."""
    text = data.decode("utf-8", "replace")
    return "".join(char if char.isprintable() or char in "\n\t" else repr(char)[1:-1] for char in text)


_HANDLERS: dict[str, Callable[[Arguments], int]] = {
    "metrics": _metrics,
    "iptables": _iptables,
    "direct-volume": _direct_volume,
    "check": _check,
    "env": _env,
    "factory": _factory,
    "features": _features,
    "spec": _spec,
    "version": _version,
}
