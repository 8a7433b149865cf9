"""Completion candidates for ``kata-agent-ctl``; see `kata.cli.complete`."""

from __future__ import annotations

from kata.agent_ctl import bench, fuzz, methods, shell
from kata.agent_ctl.session import COMMANDS
from kata.cli.complete import beginning, values

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Sequence

    from kata.agent_ctl.options import Option
    from kata.cli.complete import Candidates


def complete(options: Sequence[Option], before: Sequence[str], word: str) -> Candidates:
    """Return the candidates.

    Args:
        options: The program's options.
        before: The words before the one being typed, without the program.
        word: The beginning of the word being typed.
    """
    rest, pending = _skip_options(options, before)
    if pending is not None:
        return beginning(values(pending.metavar), word)
    if not rest:
        if word.startswith("-"):
            return _options(options, word)
        return beginning([*COMMANDS.items(), *((name, "") for name in methods.names())], word)
    for name, own in (("bench", bench.OPTIONS), ("fuzz", fuzz.OPTIONS)):
        if rest[0] == name:
            more, pending = _skip_options(own, rest[1:])
            if pending is not None:
                return beginning(values(pending.metavar), word)
            return [] if more else _options(own, word)
    if rest[0] == "list":
        return [] if len(rest) > 1 else beginning([(name, "") for name in methods.names()], word)
    return [(text.rstrip(), "") for text in shell.complete(list(rest), word)]


def _skip_options(options: Sequence[Option], words: Sequence[str]) -> tuple[list[str], Option | None]:
    """Skip the options at the beginning of *words*. Returns the other words, and an option that lacks its value."""
    by_name = {name: option for option in options for name in option.names}
    rest = list(words)
    while rest and rest[0].startswith("-") and rest[0] not in ("-", "--"):
        option = by_name.get(rest.pop(0))
        if option is None or not option.metavar:
            continue  # `--name=value`, or a switch
        if not rest:
            return [], option
        rest.pop(0)
    return rest[1:] if rest[:1] == ["--"] else rest, None


def _options(options: Sequence[Option], word: str) -> Candidates:
    name, attached, value = word.partition("=")
    for option in options if attached else ():
        if name in option.names and option.metavar:
            return [(f"{name}={text}", about) for text, about in beginning(values(option.metavar), value)]
    return beginning([(name, option.text) for option in options for name in option.names], word)
