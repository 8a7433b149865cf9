"""Completion candidates for ``kata-log-parser``; see `kata.cli.complete`."""

from __future__ import annotations

from kata.cli.complete import FILES, beginning, values
from kata.log_parser.options import OPTIONS

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Sequence

    from kata.cli.complete import Candidates


def complete(before: Sequence[str], word: str) -> Candidates:
    """Return the candidates.

    Args:
        before: The words before the one being typed, without the program.
        word: The beginning of the word being typed.
    """
    by_name = {name: option for option in OPTIONS for name in option.names}
    queue = list(before)
    while queue:
        option = by_name.get(queue.pop(0))
        if option is not None and option.metavar:
            if not queue:
                return beginning(values(option.metavar), word)
            queue.pop(0)
    if not word.startswith("-"):
        return [FILES]
    name, attached, value = word.partition("=")
    if attached:
        found = beginning(values(by_name[name].metavar), value) if name in by_name else []
        return [(text if text[0] == ":" else f"{name}={text}", about) for text, about in found]
    return beginning([(name, option.text) for option in OPTIONS for name in option.names], word)
