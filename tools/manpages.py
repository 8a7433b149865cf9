"""Writes what an installation shares with the machine: manual pages, and completion for the shells.

    share/man/man1/kata.1, kata-COMMAND.1, kata-agent-ctl.1, kata-log-parser.1, kata-monitor.1, kata-runtime.1
    share/bash-completion/completions/kata, kata-agent-ctl, kata-log-parser, kata-monitor, kata-runtime
    share/zsh/site-functions/_kata
    share/fish/vendor_completions.d/kata.fish, kata-agent-ctl.fish, kata-log-parser.fish,
    kata-monitor.fish, kata-runtime.fish

The pages are made from the tables that the commands parse their options with, so they say what ``--help`` says. The
completion is the same for every version: the program itself is asked (src/kata/cli/complete.py). `make install` calls
this. Run by /usr/bin/python3 with the standard library alone.

Usage: manpages.py DIRECTORY
"""

from __future__ import annotations

import shutil
import sys
from collections.abc import Iterator, Sequence
from importlib import import_module
from pathlib import Path
from types import ModuleType

ROOT = Path(__file__).resolve().parent.parent
if str(ROOT / "src") not in sys.path:
    sys.path.insert(0, str(ROOT / "src"))

from kata import __version__, paths  # noqa: E402
from kata.agent_ctl import bench, fuzz  # noqa: E402
from kata.agent_ctl import main as agent_ctl  # noqa: E402
from kata.agent_ctl.options import Option as AgentOption  # noqa: E402
from kata.agent_ctl.session import COMMANDS as AGENT_COMMANDS  # noqa: E402
from kata.cli import main as cli  # noqa: E402
from kata.cli.args import Command, Option  # noqa: E402
from kata.log_parser import options as log_parser  # noqa: E402
from kata.monitor import options as monitor  # noqa: E402
from kata.oci_runtime import commands as oci_runtime  # noqa: E402
from kata.oci_runtime.global_options import PROGRAM  # noqa: E402

PROGRAMS = ("kata", "kata-agent-ctl", "kata-log-parser", "kata-monitor", "kata-runtime")
COMPLETION = {
    "kata.bash": [f"bash-completion/completions/{name}" for name in PROGRAMS],
    "kata.zsh": ["zsh/site-functions/_kata"],
    "kata.fish": [f"fish/vendor_completions.d/{name}.fish" for name in PROGRAMS],
}
"""Script in tools/completion -> where the shell looks for it, below ``share``."""

_SUMMARY = "Runs each container in a lightweight virtual machine of its own, without a daemon."


def escape(text: str) -> str:
    """Text as roff shows it unchanged: no line of it is a request, hyphens can be searched for and copied."""
    text = text.replace("\\", "\\e").replace("-", "\\-")
    return "\n".join("\\&" + line if line[:1] in (".", "'") else line for line in text.split("\n"))


def heading(name: str, summary: str) -> str:
    """The beginning of a page: title and NAME."""
    summary = summary[:1].lower() + summary[1:].rstrip(".")
    title = f'.TH "{escape(name.upper())}" "1" "" "kata {__version__}" "kata"'
    return f"{title}\n.SH NAME\n{escape(name)} \\- {escape(summary)}"


def synopsis(*forms: str) -> str:
    """The section SYNOPSIS, of the forms of a command."""
    lines = [f'.B "{escape(name)}"\n{escape(rest)}'.rstrip() for name, _, rest in map(_cut_name, forms)]
    return ".SH SYNOPSIS\n" + "\n.br\n".join(lines)


def _cut_name(form: str) -> tuple[str, str, str]:
    """``kata run [OPTION...] IMAGE`` -> ``kata run``, and what is not to be typed as it is."""
    words = form.split(" ")
    count = next((i for i, word in enumerate(words) if not word.islower()), len(words))
    return " ".join(words[:count]), " ", " ".join(words[count:])


def option_list(options: Sequence[Option | AgentOption]) -> str:
    """A tagged paragraph for each option."""
    entries = []
    for option in options:
        names = ", ".join(f"\\fB{escape(name)}\\fR" for name in option.names)
        value = f" \\fI{escape(option.metavar)}\\fR" if option.metavar else ""
        repeated = " May be given repeatedly." if getattr(option, "many", False) or _is_list(option) else ""
        text = capitalised(option.text)
        entries.append(f".TP\n{names}{value}\n{escape(text.rstrip('.') + '.' + repeated)}")
    return "\n".join(entries)


def capitalised(text: str) -> str:
    """With a capital letter in front, unless the first word is none (``vsock://CID``)."""
    return text[:1].upper() + text[1:] if text.split(" ")[0].rstrip(",;:").isalpha() else text


def _is_list(option: Option | AgentOption) -> bool:
    return isinstance(option, Option) and option.kind == "list"


def notes(text: str) -> Iterator[str]:
    """Paragraphs of a help; those with indented lines are tables, which stay as they are."""
    for paragraph in filter(None, text.strip("\n").split("\n\n")):
        if any(line.startswith("  ") for line in paragraph.split("\n")):
            yield f".PP\n.nf\n{escape(paragraph)}\n.fi"
        else:
            yield f".PP\n{escape(paragraph)}"


def section(title: str, *parts: str) -> str:
    """A section of a page."""
    return "\n".join([f".SH {title}", *parts])


def of_command(command: Command) -> str:
    """The page of one command of ``kata``."""
    name = f"kata {command.name}"
    options = [*command.options]
    if not any("--help" in option.names for option in options):
        options.append(Option("--help", "", "describe the command"))
    forms = [f"{name} [OPTION...] {form}".rstrip() for form in command.usage.split(" | ")]
    parts = [
        heading(name.replace(" ", "-"), command.summary),
        synopsis(*forms),
        section("DESCRIPTION", escape(command.summary)),
        section("OPTIONS", option_list(options), *notes("\n\n".join(command.exclusions()))),
    ]
    if command.notes:
        parts.append(section("NOTES", *notes(command.notes)))
    parts.append(section("SEE ALSO", ".BR kata (1)"))
    return "\n".join(parts) + "\n"


def of_kata() -> str:
    """The page of ``kata`` itself, with the list of its commands."""
    commands = [
        f".TP\n.BR {escape(f'kata-{name}')} (1)\n{escape(capitalised(summary))}."
        for name, (_, summary) in cli.COMMANDS.items()
    ]
    variables = [
        f".TP\n.B {name}\n{escape(text)} ({escape(default)})." for name, default, text in paths_table()
    ]
    parts = [
        heading("kata", _SUMMARY),
        synopsis("kata COMMAND [OPTION...] [ARG...]", "kata COMMAND --help"),
        section("DESCRIPTION", escape(_SUMMARY), "It runs as root."),
        section("COMMANDS", *commands),
        section("ENVIRONMENT", *variables),
        section(
            "EXIT STATUS",
            "0 for success, 125 when kata itself failed. A command that runs a program in a container ends with that",
            "program's exit status; see",
            ".BR kata\\-run (1).",
        ),
        section(
            "SEE ALSO",
            ".BR kata\\-agent\\-ctl (1),",
            ".BR kata\\-log\\-parser (1),",
            ".BR kata\\-monitor (1),",
            ".BR kata\\-runtime (1)",
        ),
    ]
    return "\n".join(parts) + "\n"


def paths_table() -> list[tuple[str, str, str]]:
    """The rows of the table of variables in `kata.paths`: variable, default, what is there."""
    rows = []
    for line in (paths.__doc__ or "").splitlines():
        if line.startswith("``KATA_"):
            variable, default, text = (cell.strip("` ") for cell in line.split("  ") if cell.strip())
            rows.append((variable, default, text[:1].upper() + text[1:]))
    return rows


def of_agent_ctl() -> str:
    """The page of ``kata-agent-ctl``, from its own help."""
    head, *rest = agent_ctl.usage().split("\n\n")
    summary = rest[0]
    # The two lists are set from the tables; what follows them is prose.
    prose = "\n\n".join(part for part in rest[1:] if not part.startswith(("options:", "commands:")))
    commands = [f".TP\n.B {escape(name)}\n{escape(text)}." for name, text in AGENT_COMMANDS.items()]
    parts = [
        heading("kata-agent-ctl", "call a kata agent's methods"),
        synopsis(head.removeprefix("usage: ")),
        section("DESCRIPTION", escape(summary)),
        section("OPTIONS", option_list(agent_ctl.OPTIONS)),
        section(
            "COMMANDS",
            ".TP\n.I METHOD\n" + escape("A method of the agent's protocol by its name; --list shows them."),
            *commands,
        ),
        section("OPTIONS OF BENCH", option_list(bench.OPTIONS)),
        section("OPTIONS OF FUZZ", option_list(fuzz.OPTIONS)),
        section("NOTES", *notes(prose)),
        section("SEE ALSO", ".BR kata (1)"),
    ]
    return "\n".join(parts) + "\n"


def of_program(name: str, arguments: str, table: ModuleType) -> str:
    """The page of a program that has options and no commands.

    Args:
        name: The program.
        arguments: What may follow its name.
        table: Its module `options`: ``SUMMARY``, ``OPTIONS`` and ``NOTES``.
    """
    parts = [
        heading(name, table.SUMMARY),
        synopsis(f"{name} {arguments}"),
        section("DESCRIPTION", escape(table.SUMMARY)),
        section("OPTIONS", option_list(table.OPTIONS)),
        section("NOTES", *notes(table.NOTES)),
        section("SEE ALSO", ".BR kata (1)"),
    ]
    return "\n".join(parts) + "\n"


def of_runtime() -> str:
    """The page of ``kata-runtime``, with all of its commands."""
    commands = []
    for name, command in oci_runtime.COMMANDS.items():
        commands.append(f".SS {escape(name)}\n{escape(command.summary)}")
        commands += [option_list(command.options)] if command.options else []
        commands += notes(command.notes)
    forms = [
        f"{PROGRAM} {name} [OPTION...] {form}".rstrip()
        for name, command in oci_runtime.COMMANDS.items()
        for form in command.usage.split(" | ")
    ]
    parts = [
        heading(PROGRAM, oci_runtime.SUMMARY),
        synopsis(*forms),
        section("DESCRIPTION", escape(oci_runtime.SUMMARY), "It runs as root."),
        section("COMMANDS", *commands),
        section("EXIT STATUS", "0 for success, 1 for any failure."),
        section("SEE ALSO", ".BR kata (1)"),
    ]
    return "\n".join(parts) + "\n"


def pages() -> dict[str, str]:
    """Every page: file name -> content."""
    made = {
        "kata.1": of_kata(),
        "kata-agent-ctl.1": of_agent_ctl(),
        "kata-log-parser.1": of_program("kata-log-parser", "[OPTION...] [FILE...]", log_parser),
        "kata-monitor.1": of_program("kata-monitor", "[OPTION...]", monitor),
        "kata-runtime.1": of_runtime(),
    }
    for name, (module, _) in cli.COMMANDS.items():
        made[f"kata-{name}.1"] = of_command(import_module(f"kata.cli.{module}").COMMANDS[name])
    return made


def write(directory: Path) -> None:
    """Write pages and completion below *directory*, which is ``share`` or takes its place."""
    manuals = directory / "man/man1"
    manuals.mkdir(parents=True, exist_ok=True)
    for name, content in pages().items():
        (manuals / name).write_text(content)
    for source, targets in COMPLETION.items():
        for target in targets:
            path = directory / target
            path.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(ROOT / "tools/completion" / source, path)


def main() -> int:
    """Write them into the directory that is named."""
    if len(sys.argv) != 2:
        print("usage: manpages.py DIRECTORY", file=sys.stderr)
        return 2
    write(Path(sys.argv[1]))
    return 0


if __name__ == "__main__":
    sys.exit(main())
