"""What `kata volume`, `kata network` and the commands for containers and images have in common.

They act on several objects by name, and go on after one at which they fail; they show objects as a JSON list or by a
template; and they have commands of their own after their name.
"""

from __future__ import annotations

import sys

from kata.cli.report import REMOVING, raise_failures
from kata.errors import KataError, NotFoundError, UsageError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping
    from typing import Any

    from kata.cli.args import Arguments, Command

    Handler = Callable[[Arguments], int]
    Object = dict[str, Any]

_OTHER_NAMES = {"list": "ls", "remove": "rm"}


def listed(commands: Mapping[str, Command]) -> str:
    """Commands and their options, as a paragraph of the help of what they follow."""
    lines = []
    for command in commands.values():
        lines += ["", f"{command.name} [OPTION...] {command.usage}".rstrip(), f"    {command.summary}"]
        lines += [f"    {', '.join(o.names)} {o.metavar}".rstrip() + f": {o.text}" for o in command.options]
        lines += [f"    {text}" for text in command.exclusions()]
    return "\n".join(lines[1:])


def dispatch(
    whose: str, words: list[str], commands: Mapping[str, Command], handlers: Mapping[str, Handler]
) -> int:
    """Run a command after ``volume`` or ``network``.

    Args:
        whose: What it follows.
        words: Its name, and its arguments.
        commands: The commands there are.
        handlers: What does each.

    Returns:
        Its exit status.

    Raises:
        UsageError: There is no such command, or its arguments are wrong.
        KataError: It failed.
    """
    name, *rest = words
    name = _OTHER_NAMES.get(name, name)
    if name not in commands:
        raise UsageError(f"kata {whose} has no command {name!r}", "one of " + ", ".join(commands))
    return handlers[name](commands[name].parse(rest))


def each(names: Iterable[str], act: Callable[[str], str | None], exit_code: int | None = None) -> int:
    """Do something to several objects. It goes on after a failure, and ends with what failed.

    Args:
        names: As the user wrote them.
        act: Does it to one. What it returns is printed, unless it is None.
        exit_code: See `report.raise_failures`.

    Raises:
        KataError: Something failed.
    """
    failures: list[KataError] = []
    for name in names:
        try:
            shown = act(name)
        except KataError as error:
            failures.append(error)
        else:
            if shown is not None:
                print(shown, flush=True)
    raise_failures(failures, exit_code)
    return 0


def remove(names: Iterable[str], act: Callable[[str], object], *, force: bool) -> int:
    """Remove several objects, and print their names; see `each`.

    Args:
        names: As the user wrote them.
        act: Removes one.
        force: What is not there is no error.

    Raises:
        KataError: One cannot be removed.
    """

    def remove_one(name: str) -> str | None:
        try:
            act(name)
        except NotFoundError:
            if not force:
                raise
            return None
        return name

    return each(names, remove_one, REMOVING)


def exists(find: Callable[[str], object], name: str) -> int:
    """The exit status that tells whether there is an object: 0, or 1."""
    try:
        find(name)
    except NotFoundError:
        return 1
    return 0


def inspect(
    names: Iterable[str],
    form: str | None,
    describe: Callable[[str], Object],
    free: Callable[[Object], Object],
) -> int:
    """Print what is known of several objects. What was found is printed before what failed, as in
    Docker: an empty list, too.

    Args:
        names: As the user wrote them.
        form: A Go template, ``json`` for one line, None or an empty one for an indented list.
        describe: Says what is known of one.
        free: Marks in that the objects whose keys are the user's (`template.FreeKeys`).

    Raises:
        KataError: The template is malformed, or something is not found.
    """
    from kata.cli import table
    from kata.cli.template import Template, emit

    template = Template(form) if form and form != "json" else None
    found: list[Object] = []
    failures: list[KataError] = []
    for name in names:
        try:
            found.append(describe(name))
        except KataError as error:
            failures.append(error)
    if template is not None:
        for one in found:
            emit(template.render(free(one)))
    elif form == "json":
        table.show_json_line(found)
    else:
        table.show_json(found)
    sys.stdout.flush()
    raise_failures(failures)
    return 0
