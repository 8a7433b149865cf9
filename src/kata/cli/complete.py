"""Completion candidates for the shells' completion scripts (``tools/completion/``).

``kata __complete line LINE`` takes the line up to the cursor; ``kata __complete words WORD...`` takes its words without
the program, of which the last one is being typed. The output has one candidate a line: the word, a tab and a
description. ``:files`` asks the shell to add file names. All candidates are derived from the commands' own tables. On
any error there are no candidates: an error message in the middle of the line being typed would only disturb.
"""

from __future__ import annotations

import re
import sys

from kata.cli.args import FLAG, Option

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping, Sequence
    from typing import Protocol

    from kata.cli.args import Command

    class NamedOption(Protocol):
        """An option of any program."""

        @property
        def names(self) -> Sequence[str]:
            """As it is written, with its dashes."""

        @property
        def metavar(self) -> str:
            """What its value is; empty for a switch."""

        @property
        def text(self) -> str:
            """What it is for."""

    Candidates = list[tuple[str, str]]

FILES = (":files", "")
_FILES = frozenset({"FILE", "PATH", "SRC", "DEST"})
"""Placeholders of paths on the host. ``DIR`` and ``DST`` are paths in the container, which are not completed."""
_HELP = Option("-h --help", "", "describe the command")


def main(argv: Sequence[str], complete: Callable[[list[str], str], Candidates]) -> int:
    """Print the candidates.

    Args:
        argv: ``line LINE`` or ``words WORD...``.
        complete: Returns a program's candidates, given the words before the one being typed, and that word.

    Returns:
        0, even after an error.
    """
    try:
        form, *given = argv
        words = split(given[0])[1:] if form == "line" else given
        for text, description in complete(words[:-1], words[-1]):
            sys.stdout.write(f"{text}\t{description}\n" if description else f"{text}\n")
        sys.stdout.flush()
    except Exception:  # no candidates, see the module's docstring
        pass
    return 0


def split(line: str) -> list[str]:
    """Split the beginning of a command line into words; the last one is empty after a space.

    An open quotation ends with the line.
    """
    import shlex

    for end in ("", "'", '"'):
        try:
            words = shlex.split(line + end)
        except ValueError:
            continue
        return [*words, ""] if not end and line[-1:].isspace() else words
    return line.split(" ")


def kata(commands: Mapping[str, tuple[str, str]], before: Sequence[str], word: str) -> Candidates:
    """Candidates for ``kata``.

    Args:
        commands: Command -> (module in `kata.cli`, summary).
        before: The words before the one being typed, without the program.
        word: The beginning of the word being typed.
    """
    from importlib import import_module

    from kata.cli import words

    if not before or (before[0] == "help" and len(before) == 1):
        found = [(name, summary) for name, (_, summary) in commands.items()]
        if not before:
            found += [("--help", "list the commands"), ("--version", commands["version"][1])]
        return beginning(found, word)
    name, *rest = before if before[0] in commands else words.command(list(before))
    if name not in commands:
        return []
    module = import_module(f"kata.cli.{commands[name][0]}")
    command = module.COMMANDS[name]
    groups = getattr(module, "SUBCOMMANDS", {})
    if rest and rest[0] in groups:
        command, rest = groups[rest[0]], rest[1:]
    return of_command(command, rest, word)


def of_command(command: Command, before: Sequence[str], word: str) -> Candidates:
    """Candidates for what follows a command's name.

    Args:
        command: The command.
        before: The words between its name and the one being typed.
        word: The beginning of the word being typed.
    """
    options = [*command.options]
    if not any("--help" in option.names for option in options):
        options.append(_HELP)
    by_name = {name: option for option in options for name in option.names}
    given: list[str] = []
    queue = list(before)
    only_arguments = False
    while queue:
        item = queue.pop(0)
        if only_arguments or not item.startswith("-") or item == "-":
            given.append(item)
            if not command.interspersed:
                given += queue
                return _argument(command, given, word)
        elif item == "--":
            only_arguments = True
        else:
            pending = waiting_for_value(item, by_name)
            if pending is None:
                continue
            if not queue:
                return beginning(values(pending.metavar), word)
            queue.pop(0)
    if not only_arguments and word.startswith("-"):
        return option_words(options, word)
    return _argument(command, given, word)


def waiting_for_value(item: str, by_name: dict[str, Option]) -> Option | None:
    """The option in *item* that takes the next word as its value; None if there is none.

    Args:
        item: A word of the command line that begins with ``-``.
        by_name: Options by each of their names.
    """
    if item.startswith("--"):
        option = by_name.get(item)
        return option if option is not None and option.kind != FLAG else None
    for position in range(1, len(item)):
        option = by_name.get(f"-{item[position]}")
        if option is not None and option.kind != FLAG:
            return option if position == len(item) - 1 else None
    return None


def option_words(options: Iterable[Option], word: str) -> Candidates:
    """Options that begin with *word*, or the values of the one that ``--option=`` names.

    Args:
        options: Those of the command.
        word: What has been typed of the last word.
    """
    name, attached, value = word.partition("=")
    if attached and name.startswith("--"):
        for option in options:
            if name in option.names and option.metavar:
                found = beginning(values(option.metavar), value)
                # A request for the shell (":files") has neither a description nor the option in front.
                return [(text if text[0] == ":" else f"{name}={text}", about) for text, about in found]
        return []
    return beginning([(name, option.text) for option in options for name in option.names], word)


def _argument(command: Command, given: Sequence[str], word: str) -> Candidates:
    """Candidates for the positional argument after those that are *given*, by the command's usage line."""
    if command.most is not None and len(given) >= command.most:
        return []
    found: Candidates = []
    for form in command.usage.split(" | "):
        if not command.interspersed:
            form = form.split(" [")[0]  # what follows is another program's command line
        kinds = [kind.strip("[]") for kind in form.split()]
        if not kinds:
            continue
        if len(given) < len(kinds):
            kind = kinds[len(given)]
        elif kinds[-1].endswith("..."):
            kind = kinds[-1]
        else:
            continue
        found += values(kind.removesuffix("..."))
    return [pair for pair in dict.fromkeys(beginning(found, word)) if pair[0] not in given]


def values(kind: str) -> Candidates:
    """Candidates for a placeholder of the help: ``CONTAINER``, ``none|user``, ``FILE``, ...; empty if unknown."""
    first = re.match(r"\[?(\w+)", kind)  # `[SRC:]DST[:OPTIONS]` begins with a file of the host
    if kind != "CONTAINER:PATH" and first and first[1] in _FILES:
        return [FILES]
    if kind in ("CONTAINER", "ID"):
        return [(name, state) for name, state in _containers()]
    if kind == "CONTAINER:PATH":
        return [(f"{name}:", state) for name, state in _containers()]
    if kind == "VOLUME":
        from kata.cli import volumes

        return [(one["name"], "") for one in volumes.everything()]
    if "NETWORK" in kind.split("|"):
        from kata.cli import networks

        modes = [(choice, "") for choice in kind.split("|") if choice != "NETWORK"]
        return [*modes, *((one["name"], one["subnet"]) for one in networks.everything())]
    if kind == "IMAGE":
        return [*((name, "") for name in _images()), FILES]
    if kind == "SIGNAL":
        import signal

        return [(one.name.removeprefix("SIG"), signal.strsignal(one) or "") for one in signal.Signals]
    if kind == "CAP":
        from kata.oci.capabilities import ALL

        return [("ALL", ""), *((name.removeprefix("CAP_"), "") for name in sorted(ALL))]
    # In choices, literal words are written in lower case and placeholders in upper case.
    return [(choice, "") for choice in kind.split("|") if re.fullmatch(r"[a-z][a-z0-9,.-]*", choice)]


def of_options(
    options: Iterable[NamedOption], before: Sequence[str], word: str, operands: Candidates | None = None
) -> Candidates:
    """Candidates for a program that has options and no commands.

    Args:
        options: Its options.
        before: The words before the one being typed, without the program.
        word: The beginning of the word being typed.
        operands: Candidates where no option is being typed; None offers the options there as well.
    """
    known = list(options)
    by_name = {name: option for option in known for name in option.names}
    queue = list(before)
    while queue:
        option = by_name.get(queue.pop(0))
        if option is not None and option.metavar:
            if not queue:
                return beginning(values(option.metavar), word)
            queue.pop(0)
    if operands is not None and not word.startswith("-"):
        return operands
    name, attached, value = word.partition("=")
    if attached:
        found = beginning(values(by_name[name].metavar), value) if name in by_name else []
        return [(text if text[0] == ":" else f"{name}={text}", about) for text, about in found]
    return beginning([(name, option.text) for option in known for name in option.names], word)


def of_program(
    argv: Sequence[str], options: Iterable[NamedOption], operands: Candidates | None = None
) -> int:
    """Print the candidates of a program that has options and no commands.

    Args:
        argv: As for `main`.
        options: As for `of_options`.
        operands: As for `of_options`.

    Returns:
        0, even after an error.
    """
    return main(argv, lambda before, word: of_options(options, before, word, operands))


def beginning(found: Iterable[tuple[str, str]], word: str) -> Candidates:
    """Those of *found* that begin with *word*, and all requests for the shell.

    Args:
        found: Candidates, each with its description.
        word: What has been typed of the last word.
    """
    return [pair for pair in found if pair[0].startswith(word) or pair == FILES]


def _containers() -> list[tuple[str, str]]:
    """Names of containers and the state of each."""
    from kata.cli import records

    return [(one.name, str(one.raw_state().get("status", ""))) for one in records.all_containers()]


def _images() -> list[str]:
    from kata.images import store

    return sorted({name for image in store.list_images() for name in image.names})
