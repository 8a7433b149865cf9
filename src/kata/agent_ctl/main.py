"""The command line: parses options, runs commands or the interactive mode, and reports errors."""

from __future__ import annotations

import sys

from kata import __version__
from kata.agent_ctl import address, links, methods, output
from kata.agent_ctl.options import Option, Values, parse, table
from kata.agent_ctl.session import COMMANDS, Session, listing, listing_text, split
from kata.errors import UsageError
from kata.hypervisor import registry
from kata.hypervisor.channel import AGENT_PORT
from kata.launcher import name_output
from kata.ttrpc.status import TtrpcError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from kata.agent_ctl.links import Link

CONNECT_S = 10.0

OPTIONS = (
    Option("-s --server", "ADDRESS", "vsock://CID[:PORT], unix://PATH or hvsock://PATH[:PORT] (hybrid vsock)"),
    Option("--hybrid-vsock", "", "the unix://PATH of --server is a hybrid vsock's socket"),
    Option("--hybrid-vsock-port", "PORT", "the guest's port there (1024)"),
    Option("--sandbox", "CONTAINER", "the agent of a running sandbox, through its engine"),
    Option("--vm", "", "the agent of a temporary virtual machine, made for this command"),
    Option("--vm-memory", "MIB", "memory of that machine (256)"),
    Option("--hypervisor", "|".join(registry.names()), f"what runs that machine ({registry.DEFAULT})"),
    Option("-c --cmd", "'COMMAND ...'", "a command; several run in order, up to the first that fails", many=True),
    Option("-t --timeout", "SECONDS", "for each call (60; WaitProcess, GetOOMEvent and streams: none); 0 is none"),
    Option("--connect-timeout", "SECONDS", "how long to retry while a guest boots (10)"),
    Option("-o --output", "json|text", "how answers are printed (json)"),
    Option("--camel-case", "", "JSON with lowerCamelCase names, not those of the .proto"),
    Option("--omit-defaults", "", "leave out fields that are zero, empty or false"),
    Option("--timing", "", "print on standard error how long each call took"),
    Option("--list", "", "list the methods (-o text: for people); METHOD --help shows the fields of one"),
    Option("-V --version", "", "print the version"),
    Option("-h --help", "", "this"),
)  # fmt: skip

_NOTES = """\
Requests are proto3 JSON: names as in the .proto or in lowerCamelCase, bytes as base64, 64-bit integers as numbers
or strings, enums by name or number. Answers are the same, with 64-bit integers as strings.
--FIELD VALUE overrides the JSON; bytes also as @FILE or text:..., nested fields as --outer.inner VALUE.
Without a command: commands are read from standard input, on a terminal with completion and history.
The exit status is 0, or 1 if anything failed.

examples:
  kata-agent-ctl --sandbox web GetMetrics
  kata-agent-ctl --server unix:///run/agent.sock CopyFile '{"path": "/run/x", "data": "aGk="}'
  kata-agent-ctl --vm -c Check -c 'GetGuestDetails --mem_block_size'
  kata-agent-ctl --vm fuzz --cases 2000
"""


def usage() -> str:
    """The help."""
    commands = [
        ("METHOD", "name of a method of the agent's protocol; --list shows them"),
        *COMMANDS.items(),
    ]
    return (
        "usage: kata-agent-ctl TARGET [OPTION...] [COMMAND [ARG...]]\n\n"
        "Calls a kata agent's methods. TARGET is one of --server, --sandbox and --vm.\n\n"
        f"options:\n{table([(option.head, option.text) for option in OPTIONS])}\n\n"
        f"commands:\n{table(commands)}\n\n{_NOTES}"
    )


def dispatch(argv: Sequence[str]) -> int:  # noqa: C901, PLR0912
    """Run one command line.

    Args:
        argv: Without the program's name.

    Returns:
        The exit status.

    Raises:
        KataError, TtrpcError: It failed.
    """
    if argv[:1] == ["__complete"]:  # for the shells' completion scripts
        from kata.agent_ctl.complete import complete
        from kata.cli.complete import main as answer

        return answer(argv[1:], lambda before, word: complete(OPTIONS, before, word))
    values, words = parse(OPTIONS, argv)
    if words[:1] == ["--"]:
        words = words[1:]
    style = _style(values)
    if values.flag("help"):
        print(usage(), end="")
        return 0
    if values.flag("version"):
        print(f"kata-agent-ctl {__version__}")
        return 0
    if values.flag("list"):
        if words:
            methods.get(words[0], COMMANDS)
            words = ["list", words[0]]
        elif style.form == output.JSON and values.value("output"):
            output.show_json(listing())
            return 0
        else:
            print(listing_text())
            return 0
    if words[:1] == ["help"]:
        words = ["list", *words[1:]]
        if len(words) == 1:
            print(usage(), end="")
            return 0
    commands = [split(line) for line in values.many("cmd")]
    if any(not command for command in commands):
        raise UsageError("--cmd: the command is empty")
    if words and commands:
        raise UsageError(f"{words[0]!r} and --cmd are both commands", "give all of them with --cmd")
    if words:
        commands = [words]
    for command in commands:
        _known(command)
    timeout = values.number("timeout", 0.0) if values.flag("timeout") else None
    # The target's form is checked before anything is done; it is connected to only when needed.
    open_link = _target(values, needed=not commands or not all(_needs_no_agent(one) for one in commands))
    names = [name for option in OPTIONS for name in option.names]
    session = Session(open_link, style, timeout, names, values.flag("vm"))
    try:
        if not commands:
            from kata.agent_ctl import shell

            return shell.run(session)
        for command in commands:
            try:
                status = session.run(command)
            except TtrpcError as error:
                output.report(error, command[0])
                return 1
            if status:
                return status
        return 0
    finally:
        session.close()


def _known(command: Sequence[str]) -> None:
    """Check that there is such a command, before a machine is booted for it."""
    if command[0] not in COMMANDS:
        methods.get(command[0], COMMANDS)


def _needs_no_agent(command: Sequence[str]) -> bool:
    return command[0] == "list" or command[1:2] in (["--help"], ["-h"])


def _style(values: Values) -> output.Style:
    form = values.value("output") or output.JSON
    if form not in (output.JSON, output.TEXT):
        hint = methods.nearest(form, (output.JSON, output.TEXT)) or "json or text"
        raise UsageError(f"--output: there is no form {form!r}", hint)
    return output.Style(
        form,
        camel_case=values.flag("camel-case"),
        defaults=not values.flag("omit-defaults"),
        timing=values.flag("timing"),
    )


def _target(values: Values, needed: bool) -> Callable[[], Link]:
    """Return a function that makes the link to the target of the options.

    Raises:
        UsageError: There is no target or more than one, or the address is malformed.
    """
    given = [name for name in ("server", "sandbox", "vm") if values.flag(name)]
    if len(given) > 1:
        raise UsageError(f"--{given[0]} and --{given[1]} name two agents", "give only one of them")
    for name, other in (
        ("hybrid-vsock", "server"),
        ("hybrid-vsock-port", "hybrid-vsock"),
        ("vm-memory", "vm"),
        ("hypervisor", "vm"),
    ):
        if values.flag(name) and not values.flag(other):
            raise UsageError(f"--{name} goes with --{other}")
    patience = values.number("connect-timeout", CONNECT_S)
    if values.flag("server"):
        port = values.integer("hybrid-vsock-port", AGENT_PORT, 0, 0xFFFFFFFE)
        where = address.parse(values.value("server") or "", values.flag("hybrid-vsock"), port)
        return lambda: links.to_server(where, patience)
    if values.flag("sandbox"):
        name = values.value("sandbox") or ""
        return lambda: links.to_sandbox(name)
    if values.flag("vm"):
        memory = values.integer("vm-memory", 256, 64, 1 << 20)

        def boot() -> Link:
            from kata.agent_ctl.vm import VMLink

            return VMLink(memory, values.value("hypervisor") or "")

        return boot
    if needed:
        raise UsageError("which agent?", "--server ADDRESS, --sandbox NAME or --vm; --help shows more")
    return links.Link


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line and turn every outcome into an exit status: 1 for any failure."""
    name_output()
    try:
        status = dispatch(sys.argv[1:] if argv is None else argv)
        sys.stdout.flush()
        return status
    except TtrpcError as error:
        output.report(error)
        return 1
    except BaseException as error:
        from kata.cli.report import exit_status

        return exit_status(error, "kata-agent-ctl", 1)
