"""Option parsing for the human commands.

A command declares its options as a table, from which parsing, ``--help`` and error messages are derived. The
conventions are Docker's and Podman's: options end at the first positional argument when what follows belongs to another
program (``kata run IMAGE CMD...``), short flags may be joined (``-it``), a value may be attached (``-eK=V``,
``--name=x``), ``--flag=false`` switches a flag off. argparse does not support the first of these, and its import costs
as much as the rest of the command line together.
"""

from __future__ import annotations

import os
import sys

from kata.errors import UsageError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Sequence

FLAG, VALUE, LIST = "flag", "value", "list"
_LONGEST_LINE = 120
"""What is laid out by hand in summaries and notes may be this wide."""
_TRUE, _FALSE = ("true", "1", "yes"), ("false", "0", "no")


class Option:
    """One option of a command.

    Args:
        names: Spellings, e.g. ``"-e --env"``; the last long one, without dashes, is the key of the result.
        metavar: Placeholder of the value in the help; empty for a flag.
        text: Description for the help.
        many: Whether the option may be repeated; the result is a list then.
    """

    __slots__ = ("key", "kind", "metavar", "names", "text")

    def __init__(self, names: str, metavar: str, text: str, *, many: bool = False) -> None:
        self.names = names.split()
        self.metavar = metavar
        self.text = text
        self.kind = LIST if many else VALUE if metavar else FLAG
        self.key = self.names[-1].lstrip("-").replace("-", "_")


class Arguments:
    """The parsed command line: a flag is a bool or None, a value a str or None, a repeatable option a list of str."""

    __slots__ = ("_values", "rest")

    def __init__(self, values: dict[str, bool | str | list[str] | None], rest: list[str]) -> None:
        self._values = values
        self.rest = rest

    def __contains__(self, key: str) -> bool:
        return key in self._values

    def flag(self, key: str, default: bool = False) -> bool:
        found = self._values[key]
        return found if isinstance(found, bool) else default

    def value(self, key: str) -> str | None:
        found = self._values[key]
        return found if isinstance(found, str) else None

    def many(self, key: str) -> list[str]:
        found = self._values[key]
        return found if isinstance(found, list) else []


class Command:
    """A command's grammar.

    Args:
        name: Name of the command, after ``kata``.
        usage: The positional part of the usage line, e.g. ``"IMAGE [COMMAND [ARG...]]"``.
        summary: What the command does, in one line.
        options: Its options.
        least: Minimum number of positional arguments.
        most: Maximum number of positional arguments; None for any number.
        interspersed: Whether options may follow positional arguments; false where the first positional argument
            starts another program's command line.
        notes: Further paragraphs for the help.
        program: Whose command it is.
        exclusive: Groups of options, by their keys, of which one at most may be given.
    """

    __slots__ = (
        *("exclusive", "interspersed", "least", "most", "name", "notes", "options", "program", "summary"),
        "usage",
    )

    def __init__(
        self,
        name: str,
        usage: str,
        summary: str,
        options: Sequence[Option] = (),
        *,
        least: int = 0,
        most: int | None = None,
        interspersed: bool = True,
        notes: str = "",
        program: str = "kata",
        exclusive: Sequence[Sequence[str]] = (),
    ) -> None:
        self.program = program
        self.name = name
        self.usage = usage
        self.summary = summary
        self.options = list(options)
        self.least = least
        self.most = most
        self.interspersed = interspersed
        self.notes = notes
        self.exclusive = exclusive

    def parse(self, argv: Sequence[str]) -> Arguments:
        """Parse the arguments after the command's name.

        Raises:
            UsageError: An option is unknown, lacks its value or takes none; two exclude each other; or there are
                too few or too many positional arguments.
            SystemExit: ``--help`` was given, and the help was printed.
        """
        by_name = {name: option for option in self.options for name in option.names}
        values: dict[str, bool | str | list[str] | None] = {
            option.key: [] if option.kind == LIST else None for option in self.options
        }
        rest: list[str] = []
        queue = list(argv)
        while queue:
            word = queue.pop(0)
            if word == "--":
                rest += queue
                break
            if not word.startswith("-") or word == "-":
                rest.append(word)
                if not self.interspersed:
                    rest += queue
                    break
                continue
            if word == "--help" or (word == "-h" and "-h" not in by_name):
                self.print_help()
                raise SystemExit(0)
            if word.startswith("--"):
                name, attached, value = word.partition("=")
                option = self._find(by_name, name)
                self._store(values, option, name, queue, value if attached else None)
                continue
            self._parse_short(by_name, values, word, queue)
        self._check_exclusive(values)
        self._check_count(rest)
        return Arguments(values, rest)

    def _parse_short(
        self,
        by_name: dict[str, Option],
        values: dict[str, bool | str | list[str] | None],
        word: str,
        queue: list[str],
    ) -> None:
        letters = word[1:]
        while letters:
            name, letters = "-" + letters[0], letters[1:]
            option = self._find(by_name, name)
            if option.kind == FLAG and letters[:1] != "=":  # -d=false
                values[option.key] = True
                continue
            self._store(values, option, name, queue, letters.removeprefix("=") if letters else None)
            return

    def _find(self, by_name: dict[str, Option], name: str) -> Option:
        option = by_name.get(name)
        if option is not None:
            return option
        import difflib

        from kata.cli import words

        if instead := words.about_option(self.name, name):
            raise UsageError(f"{self.program} {self.name} has no option {name}", instead)
        near = difflib.get_close_matches(name, by_name, 1)
        hint = (
            f"did you mean {near[0]}?" if near else f"'{self.program} {self.name} --help' lists the options"
        )
        raise UsageError(f"{self.program} {self.name}: unknown option {name}", hint)

    def _store(
        self,
        values: dict[str, bool | str | list[str] | None],
        option: Option,
        name: str,
        queue: list[str],
        attached: str | None,
    ) -> None:
        if option.kind == FLAG:
            if attached is None or attached.lower() in _TRUE:
                values[option.key] = True
            elif attached.lower() in _FALSE:
                values[option.key] = False
            else:
                raise UsageError(
                    f"{self.program} {self.name}: {name} is a switch, not {attached!r}",
                    f"use {name} or {name}=false",
                )
            return
        if attached is None:
            if not queue:
                raise UsageError(
                    f"{self.program} {self.name}: {name} needs a value: {option.metavar}",
                    f"'{self.program} {self.name} --help'",
                )
            attached = queue.pop(0)
        if option.kind == LIST:
            collected = values[option.key]
            assert isinstance(collected, list)
            collected.append(attached)
        else:
            values[option.key] = attached

    def _check_exclusive(self, values: dict[str, bool | str | list[str] | None]) -> None:
        for keys in self.exclusive:
            given = [key for key in keys if values[key] not in (None, False, [])]
            if len(given) > 1:
                names = {option.key: option.names[-1] for option in self.options}
                raise UsageError(
                    f"{self.program} {self.name}: {names[given[0]]} and {names[given[1]]} exclude each other",
                    "leave out one of the two",
                )

    def need(self, rest: list[str], least: int) -> None:
        """Check how many positional arguments there are; for where an option (``--all``) stands for them.

        Args:
            rest: The positional arguments.
            least: Minimum number.

        Raises:
            UsageError: There are too few.
        """
        if len(rest) < least:
            raise UsageError(
                f"{self.program} {self.name}: too few arguments",
                f"usage: {self.program} {self.name} {self.usage}".rstrip(),
            )

    def _check_count(self, rest: list[str]) -> None:
        self.need(rest, self.least)
        if self.most is not None and len(rest) > self.most:
            raise UsageError(
                f"{self.program} {self.name}: unexpected argument {rest[self.most]!r}",
                f"usage: {self.program} {self.name} {self.usage}".rstrip(),
            )

    def exclusions(self) -> list[str]:
        """A sentence about each group of options that exclude each other."""
        names = {option.key: option.names[-1] for option in self.options}
        groups = ([names[key] for key in keys] for keys in self.exclusive)
        return [f"Only one of {', '.join(group[:-1])} and {group[-1]} can be given." for group in groups]

    def print_help(self) -> None:
        """Write the help to stdout."""
        options = "[OPTION...] " if self.options else ""
        usage = f"usage: {self.program} {self.name} {options}{self.usage}"
        lines = [usage.rstrip(), "", *_paragraphs(self.summary)]
        if self.options:
            lines += ["", "options:"]
            heads = [", ".join(o.names) + (f" {o.metavar}" if o.metavar else "") for o in self.options]
            width = min(max(map(len, heads)), 30)
            for head, option in zip(heads, self.options, strict=True):
                lines += _entry(head, option.text, width)
        for text in self.exclusions():
            lines += ["", text]
        if self.notes:
            lines += ["", *_paragraphs(self.notes)]
        sys.stdout.write("\n".join(lines) + "\n")


def _columns() -> int:
    """How wide the help is."""
    try:
        return min(os.get_terminal_size(1).columns, 110)
    except OSError:
        return 100


def _paragraphs(text: str) -> list[str]:
    """Lines of text, of which those are wrapped that have no line breaks where they need some."""
    import textwrap

    return [
        part
        for line in text.split("\n")
        for part in (textwrap.wrap(line, _columns()) if len(line) > _LONGEST_LINE else [line])
    ]


def _entry(head: str, text: str, width: int) -> list[str]:
    """Lay out one line of a help table, wrapped to the terminal."""
    import textwrap

    wrapped = textwrap.wrap(text, max(_columns() - width - 5, 30)) or [""]
    first = f"  {head:<{width}}  {wrapped[0]}" if len(head) <= width else f"  {head}"
    tail = wrapped[1:] if len(head) <= width else wrapped
    return [first, *(f"  {'':<{width}}  {line}" for line in tail)]
