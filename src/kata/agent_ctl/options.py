"""Parses the options before a command: ``--name value``, ``--name=value``, ``-n value``."""

from __future__ import annotations

from kata.agent_ctl.methods import nearest
from kata.errors import UsageError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Sequence


class Option:
    """One option.

    Args:
        names: Its spellings, the long one last.
        metavar: Placeholder of its value in the help; empty for a switch.
        text: Description for the help.
        many: Whether it may be repeated.
    """

    __slots__ = ("many", "metavar", "names", "text")

    def __init__(self, names: str, metavar: str, text: str, *, many: bool = False) -> None:
        self.names = names.split()
        self.metavar = metavar
        self.text = text
        self.many = many

    @property
    def key(self) -> str:
        return self.names[-1].lstrip("-")

    @property
    def head(self) -> str:
        return ", ".join(self.names) + (f" {self.metavar}" if self.metavar else "")


class Values:
    """The values of the given options."""

    def __init__(self) -> None:
        self._found: dict[str, list[str]] = {}

    def add(self, option: Option, value: str) -> None:
        """Record an option that was given.

        Args:
            option: The option.
            value: Its value, as the user wrote it. The last one counts, unless the option may be given several times.
        """
        if not option.many:
            self._found[option.key] = []
        self._found.setdefault(option.key, []).append(value)

    def flag(self, key: str) -> bool:
        return key in self._found

    def value(self, key: str) -> str | None:
        found = self._found.get(key)
        return found[-1] if found else None

    def many(self, key: str) -> list[str]:
        return self._found.get(key, [])

    def number(self, key: str, default: float, least: float = 0.0) -> float:
        """The value of an option as a decimal number.

        Args:
            key: The option's key.
            default: The value if the option is not given.
            least: The smallest one that is allowed.

        Raises:
            UsageError: It is not a number, or less than *least*.
        """
        text = self.value(key)
        if text is None:
            return default
        try:
            found = float(text)
            if found >= least and found < float("inf"):
                return found
        except ValueError:
            pass
        raise UsageError(f"--{key}: {text!r} is not a number from {least:g}")

    def integer(self, key: str, default: int, least: int = 0, most: int = 1 << 40) -> int:
        """The value of an option as a whole number.

        Args:
            key: The option's key.
            default: The value if the option is not given.
            least: The smallest one that is allowed.
            most: The largest one.

        Raises:
            UsageError: It is not a whole number, or out of bounds.
        """
        text = self.value(key)
        if text is None:
            return default
        try:
            found = int(text, 0)
            if least <= found <= most:
                return found
        except ValueError:
            pass
        raise UsageError(f"--{key}: {text!r} is not a whole number from {least} to {most}")


def parse(
    options: Sequence[Option], words: Sequence[str], *, whole: bool = False
) -> tuple[Values, list[str]]:
    """Parse the options at the beginning of a command line.

    Args:
        options: The known options.
        words: The command line.
        whole: Whether it must consist of options only.

    Returns:
        The options' values, and the remaining words.

    Raises:
        UsageError: An option is unknown or lacks its value.
    """
    by_name = {name: option for option in options for name in option.names}
    values = Values()
    rest = list(words)
    while rest and rest[0].startswith("-") and rest[0] not in ("-", "--"):
        word = rest.pop(0)
        name, attached, value = word.partition("=") if word.startswith("--") else (word, "", "")
        option = by_name.get(name)
        if option is None:
            raise UsageError(f"unknown option {name}", nearest(name, by_name) or "--help lists the options")
        if not option.metavar:
            if attached:
                raise UsageError(f"{name} is a switch and takes no value")
            values.add(option, "")
        elif attached:
            values.add(option, value)
        elif rest:
            values.add(option, rest.pop(0))
        else:
            raise UsageError(f"{name} needs a value: {option.metavar}", "--help lists the options")
    if whole and rest:
        raise UsageError(f"unexpected argument {rest[0]!r}", f"the options are {', '.join(by_name)}")
    return values, rest


def table(heads: Sequence[tuple[str, str]]) -> str:
    """Format the two columns of a help text."""
    width = min(max((len(head) for head, _ in heads), default=0), 34)
    lines = []
    for head, text in heads:
        if len(head) > width:
            lines.append(f"  {head}")
            head = ""
        lines.append(f"  {head:<{width}}  {text}".rstrip())
    return "\n".join(lines)
